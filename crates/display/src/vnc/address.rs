//! Where a server listens.

use std::path::PathBuf;

/// First port of displays, and of WebSockets.
const DISPLAYS: u16 = 5900;
const WEBSOCKETS: u16 = 5700;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// Host (empty: all) and display number.
    Display(String, u16),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl Address {
    /// Parses `HOST:N`, `:N`, `[IPV6]:N`, `unix:PATH`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("unix: needs a path".into())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let wrong = || format!("'{text}' is no display: use :N, HOST:N (port 5900 and N) or unix:PATH");
        let (host, number) = text.rsplit_once(':').ok_or_else(wrong)?;
        let number: u16 = number.parse().map_err(|_| wrong())?;
        if number > u16::MAX - DISPLAYS {
            return Err(format!("display {number} is too high: its port would be past 65535"));
        }
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        Ok(Self::Display(host.into(), number))
    }

    /// The port of a display.
    pub(super) fn port(number: u16) -> u16 {
        DISPLAYS.saturating_add(number)
    }

    /// Host and port of `websocket=`: `on`, PORT or HOST:PORT.
    pub(super) fn websocket(&self, text: &str, number: u16) -> Result<(String, u16), String> {
        let host = match self {
            Self::Display(host, _) => host.clone(),
            Self::Unix(_) => "127.0.0.1".into(),
        };
        if text == "on" {
            return Ok((host, WEBSOCKETS.saturating_add(number)));
        }
        let wrong = |_| format!("websocket={text}: use on, PORT or HOST:PORT");
        match text.rsplit_once(':') {
            Some((host, port)) => {
                let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
                Ok((host.into(), port.parse().map_err(wrong)?))
            }
            None => Ok((host, text.parse().map_err(wrong)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let ok = |t: &str| Address::parse(t).unwrap();
        assert_eq!(ok(":1"), Address::Display("".into(), 1));
        assert_eq!(ok("127.0.0.1:0"), Address::Display("127.0.0.1".into(), 0));
        assert_eq!(ok("[::1]:7"), Address::Display("::1".into(), 7));
        assert_eq!(ok("unix:/x"), Address::Unix("/x".into()));
        for bad in ["", "1", ":x", ":70000", ":60000", "unix:"] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(ok(":1").websocket("on", 1).unwrap(), ("".into(), 5701));
        assert_eq!(ok(":1").websocket("localhost:80", 1).unwrap(), ("localhost".into(), 80));
        assert!(ok(":1").websocket("off", 1).is_err());
    }
}
