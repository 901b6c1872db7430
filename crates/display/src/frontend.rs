//! Front ends as users name them: `--display KIND[=...]`.

use crate::Displays;
use crate::input::Keymap;
use crate::vnc::{self, Server, Share, TlsFiles};
use base::props::{Bag, PropError, parse_keyval};
use schemars::JsonSchema;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;

/// Options of `--display vnc=WHERE,...`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct VncSpec {
    /// Where to listen: :N, HOST:N (port 5900 and N), or unix:PATH.
    pub display: String,
    /// Try display numbers up to this one.
    pub to: Option<u16>,
    /// Serve WebSockets and a page for browsers: on (port 5700 and N), PORT or HOST:PORT.
    pub websocket: Option<String>,
    /// Viewers need a password, which is set by the monitor (set_password) or password-file=.
    pub password: bool,
    /// File whose first line is the password (eight characters count).
    pub password_file: Option<PathBuf>,
    /// Directory with server-cert.pem and server-key.pem: encryption (VeNCrypt X509) is required.
    pub tls_creds: Option<PathBuf>,
    /// Viewers need a certificate of the authority in ca-cert.pem too.
    pub tls_verify: bool,
    /// Viewers that want to be alone: allow-exclusive, force-shared or ignore.
    pub share: Option<String>,
    /// Layout of the guest's keyboard (en-us, de, fr ...), for viewers that send characters.
    pub keymap: Option<String>,
    /// Allow JPEG to viewers that ask for it.
    pub lossy: bool,
    /// Most viewers at a time.
    pub connections: usize,
    /// Number of the screen to show.
    pub head: usize,
}

impl Default for VncSpec {
    fn default() -> Self {
        let o = vnc::Options::default();
        Self {
            display: o.display,
            to: None,
            websocket: None,
            password: false,
            password_file: None,
            tls_creds: None,
            tls_verify: false,
            share: None,
            keymap: None,
            lossy: o.lossy,
            connections: o.connections,
            head: 0,
        }
    }
}

/// A front end that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// Wrong options.
    #[error(transparent)]
    Property(#[from] PropError),
    /// Wrong options.
    #[error("{0}")]
    Config(String),
    /// The server.
    #[error(transparent)]
    Vnc(#[from] vnc::VncError),
}

impl VncSpec {
    /// The server's options. `name` is what viewers show, `keymap` the layout unless the options name one.
    ///
    /// # Errors
    /// Options that make no sense, or files that cannot be read.
    pub fn options(&self, name: &str, keymap: Keymap) -> Result<vnc::Options, FrontEndError> {
        let wrong = |text: String| FrontEndError::Config(format!("VNC: {text}"));
        let share = match self.share.as_deref() {
            None | Some("allow-exclusive") => Share::AllowExclusive,
            Some("force-shared") => Share::ForceShared,
            Some("ignore") => Share::Ignore,
            Some(other) => {
                return Err(wrong(format!("share={other}: use allow-exclusive, force-shared or ignore")));
            }
        };
        let initial_password = match &self.password_file {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|e| wrong(format!("password-file={}: {e}", path.display())))?;
                let line = text.lines().next().unwrap_or_default().to_owned();
                if line.is_empty() {
                    return Err(wrong(format!("password-file={}: its first line is empty", path.display())));
                }
                if line.len() > 8 {
                    tracing::warn!("VNC: only the first eight characters of a password count");
                }
                Some(line)
            }
        };
        if self.tls_verify && self.tls_creds.is_none() {
            return Err(wrong("tls-verify= needs tls-creds=".into()));
        }
        let tls = match &self.tls_creds {
            Some(directory) => {
                Some(TlsFiles { directory: directory.clone(), verify_peer: self.tls_verify }.load()?)
            }
            None => None,
        };
        if self.connections == 0 {
            return Err(wrong("connections=0 lets nobody in".into()));
        }
        Ok(vnc::Options {
            display: self.display.clone(),
            to: self.to,
            websocket: self.websocket.clone(),
            password: self.password || initial_password.is_some(),
            initial_password,
            tls,
            share,
            keymap: match &self.keymap {
                Some(name) => Keymap::named(name).map_err(wrong)?,
                None => keymap,
            },
            lossy: self.lossy,
            connections: self.connections,
            head: self.head,
            name: name.into(),
        })
    }
}

/// A front end, as `--display` names it.
#[derive(Debug)]
pub enum FrontEnd {
    /// Nothing: screens can still be captured.
    None,
    /// Text in the terminal: the front door's business.
    Curses,
    /// A VNC server.
    Vnc(Box<vnc::Options>),
}

impl FrontEnd {
    /// Parses `none`, `curses`, `vnc=WHERE[,option=value...]`.
    ///
    /// # Errors
    /// Says what there is instead.
    pub fn parse(text: &str, name: &str, keymap: Keymap) -> Result<Self, FrontEndError> {
        let (kind, rest) = text.split_once('=').unwrap_or((text, ""));
        match kind {
            "none" if rest.is_empty() => Ok(Self::None),
            "curses" if rest.is_empty() => Ok(Self::Curses),
            "vnc" => {
                let bag =
                    Bag { driver: "--display vnc".into(), id: None, props: parse_keyval(rest, "display")? };
                let spec: VncSpec = bag.spec()?;
                Ok(Self::Vnc(Box::new(spec.options(name, keymap)?)))
            }
            "sasl" | "spice" | "egl-headless" | "dbus" => Err(FrontEndError::Config(format!(
                "--display {kind} is not supported: use vnc=WHERE or none"
            ))),
            _ => {
                let there_is = "use vnc=WHERE[,...], curses or none";
                Err(FrontEndError::Config(format!("unknown display '{text}': {there_is}")))
            }
        }
    }

    /// Begins to show the screens, as long as what is returned is kept.
    ///
    /// # Errors
    /// The server's.
    pub fn start(self, displays: &Arc<Displays>) -> Result<Option<Server>, FrontEndError> {
        match self {
            Self::None | Self::Curses => Ok(None),
            Self::Vnc(options) => Ok(Some(Server::start(displays, *options)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parse = |t: &str| FrontEnd::parse(t, "vm", Keymap::default());
        let FrontEnd::Vnc(o) =
            parse("vnc=127.0.0.1:3,to=9,share=ignore,websocket=on,keymap=de,password=on").unwrap()
        else {
            panic!()
        };
        assert_eq!(
            (o.display.as_str(), o.to, o.password, o.share),
            ("127.0.0.1:3", Some(9), true, Share::Ignore)
        );
        assert!(matches!(parse("none").unwrap(), FrontEnd::None));
        for (bad, hint) in [
            ("vnc=:1,share=x", "allow-exclusive"),
            ("vnc=:1,colour=red", "colour"),
            ("gl", "vnc=WHERE"),
            ("vnc=:1,tls-creds=/nowhere", "server-cert.pem"),
            ("vnc=:1,password-file=/nowhere", "/nowhere"),
            ("vnc=:1,tls-verify=on", "tls-creds"),
        ] {
            let text = parse(bad).unwrap_err().to_string();
            assert!(text.contains(hint), "{bad}: {text}");
        }
    }
}
