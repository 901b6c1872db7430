//! The compact form of `-serial`, `-monitor`, `-qmp` and the like.

use crate::{Error, Result};
use base::props::{Bag, parse_keyval};
use serde_json::Value;

/// Reads `stdio`, `null`, `pty`, `file:PATH`, `pipe:PATH`, `unix:PATH[,server=on]`, `tcp:[HOST]:PORT[,...]`,
/// `telnet:[HOST]:PORT[,...]`, `ringbuf`, `mon:...` (the same with `mux=on`), or a kind with properties.
/// `none` and `chardev:ID` are the caller's.
///
/// # Errors
/// A form there is none of.
pub fn shorthand(text: &str) -> Result<Bag> {
    let bad = |why: &str| Error::Config(format!("character device '{text}': {why}"));
    if let Some(rest) = text.strip_prefix("mon:") {
        let bag = shorthand(rest)?.with("mux", true);
        // Ctrl-C is the guest's, since Ctrl-A x ends the program.
        let signal = bag.driver == "stdio" && !bag.props.contains_key("signal");
        return Ok(if signal { bag.with("signal", false) } else { bag });
    }
    let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
    let mut bag = match kind {
        "stdio" | "null" | "pty" | "ringbuf" | "memory" if rest.is_empty() => {
            return Ok(Bag::parse(text, "backend")?);
        }
        "file" => Bag::new("file").with("path", rest),
        "pipe" => Bag::new("pipe").with("path", rest),
        "unix" => {
            let (path, options) = comma(rest);
            with_options(Bag::new("socket").with("path", path), options)?
        }
        "tcp" | "telnet" => {
            let (address, options) = comma(rest);
            let (host, port) = address.rsplit_once(':').ok_or_else(|| bad("expected HOST:PORT"))?;
            let mut bag = Bag::new("socket").with("port", port);
            if !host.is_empty() {
                bag = bag.with("host", host);
            }
            if kind == "telnet" {
                bag = bag.with("telnet", true);
            }
            with_options(bag, options)?
        }
        "udp" => return Err(bad("UDP is not supported; use tcp or unix")),
        "vc" => return Err(bad("virtual consoles are not supported; use stdio, pty or a socket")),
        "con" | "msmouse" | "braille" | "wctablet" | "testdev" | "parport" | "tty" | "serial" => {
            return Err(bad("this kind is not supported; use stdio, pty, file, pipe, tcp or unix"));
        }
        _ if text.contains('=') || text.contains(',') => Bag::parse(text, "backend")?,
        _ if text.starts_with("/dev/") => {
            return Err(bad("host serial devices are not supported; use pty or a socket"));
        }
        _ => {
            crate::find(kind)?;
            return Err(bad("this kind needs another form: use -chardev"));
        }
    };
    if bag.driver == "socket" {
        bag.props.entry("wait").or_insert(Value::Null);
        if bag.props["wait"].is_null() {
            bag.props.remove("wait");
        }
    }
    Ok(bag)
}

fn comma(text: &str) -> (&str, &str) {
    text.split_once(',').unwrap_or((text, ""))
}

/// Adds `server=on,wait=off`, and the old spellings `server,nowait,nodelay`.
fn with_options(mut bag: Bag, options: &str) -> Result<Bag> {
    if options.is_empty() {
        return Ok(bag);
    }
    for (key, value) in parse_keyval(options, "")? {
        match (key.as_str(), value.as_str()) {
            ("nowait", Some("on")) => bag = bag.with("wait", "off"),
            ("noserver", Some("on")) => bag = bag.with("server", "off"),
            ("nodelay", Some("on")) => bag = bag.with("nodelay", "on"),
            _ => {
                bag.props.insert(key, value);
            }
        }
    }
    Ok(bag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let show = |t: &str| {
            let bag = shorthand(t).unwrap();
            let props = bag
                .props
                .iter()
                .map(|(k, v)| format!("{k}={}", v.as_str().map_or(v.to_string(), String::from)));
            format!("{} {}", bag.driver, props.collect::<Vec<_>>().join(" "))
        };
        assert_eq!(show("unix:/tmp/q,server,nowait"), "socket path=/tmp/q server=on wait=off");
        assert_eq!(show("unix:/tmp/q,server=on,wait=off"), "socket path=/tmp/q server=on wait=off");
        assert_eq!(show("tcp::4444,server=on"), "socket port=4444 server=on");
        assert_eq!(show("telnet:localhost:1,server"), "socket host=localhost port=1 server=on telnet=true");
        assert_eq!(show("file:a,b"), "file path=a,b");
        assert_eq!(show("mon:stdio"), "stdio mux=true signal=false");
        assert_eq!(show("stdio,signal=off"), "stdio signal=off");
        for (text, word) in
            [("tcp:80", "HOST:PORT"), ("vc:80x24", "virtual consoles"), ("stdoi", "stdio"), ("udp::1", "UDP")]
        {
            let e = shorthand(text).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        }
    }
}
