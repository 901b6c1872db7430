//! WebSocket framing (RFC 6455), server side, binary messages only.

use super::transport::Link;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};
use std::io;
use std::sync::Mutex;

/// Most bytes of an HTTP request's head.
const MOST_HEAD: usize = 8 << 10;

const OP_CONTINUATION: u8 = 0;
const OP_TEXT: u8 = 1;
const OP_BINARY: u8 = 2;
const OP_CLOSE: u8 = 8;
const OP_PING: u8 = 9;
const OP_PONG: u8 = 10;

#[derive(Debug, Default)]
struct Receiving {
    /// Bytes of the current data frame that are to come.
    left: u64,
    mask: [u8; 4],
    /// Position in the mask.
    at: usize,
}

/// The state of a connection's receiving side.
#[derive(Debug, Default)]
pub(super) struct WebSocket(Mutex<Receiving>);

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("WebSocket: {what}"))
}

fn exact(link: &Link, out: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < out.len() {
        match link.recv_plain(&mut out[done..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}

impl WebSocket {
    /// Appends a binary message.
    pub(super) fn frame(data: &[u8], out: &mut Vec<u8>) {
        Self::frame_of(OP_BINARY, data, out);
    }

    fn frame_of(op: u8, data: &[u8], out: &mut Vec<u8>) {
        out.push(0x80 | op);
        match data.len() {
            n @ 0..126 => out.push(n as u8),
            n @ 126..0x1_0000 => {
                out.push(126);
                out.extend((n as u16).to_be_bytes());
            }
            n => {
                out.push(127);
                out.extend((n as u64).to_be_bytes());
            }
        }
        out.extend_from_slice(data);
    }

    pub(super) fn recv(&self, link: &Link, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        while state.left == 0 {
            let mut head = [0; 2];
            match link.recv_plain(&mut head[..1])? {
                0 => return Ok(0),
                _ => exact(link, &mut head[1..])?,
            }
            let (op, masked) = (head[0] & 0xf, head[1] & 0x80 != 0);
            if !masked || head[0] & 0x70 != 0 {
                return Err(bad("a frame that is not masked, or of an extension"));
            }
            let length = match head[1] & 0x7f {
                126 => {
                    let mut n = [0; 2];
                    exact(link, &mut n)?;
                    u16::from_be_bytes(n).into()
                }
                127 => {
                    let mut n = [0; 8];
                    exact(link, &mut n)?;
                    u64::from_be_bytes(n)
                }
                n => n.into(),
            };
            let mut mask = [0; 4];
            exact(link, &mut mask)?;
            match op {
                OP_BINARY | OP_CONTINUATION => *state = Receiving { left: length, mask, at: 0 },
                OP_PING | OP_PONG | OP_CLOSE => {
                    if length > 125 {
                        return Err(bad("a control frame that is too long"));
                    }
                    let mut payload = vec![0; length as usize];
                    exact(link, &mut payload)?;
                    payload.iter_mut().enumerate().for_each(|(i, b)| *b ^= mask[i % 4]);
                    if op != OP_PONG {
                        let mut reply = Vec::new();
                        Self::frame_of(if op == OP_PING { OP_PONG } else { OP_CLOSE }, &payload, &mut reply);
                        link.send_plain(&reply)?;
                    }
                    if op == OP_CLOSE {
                        return Ok(0);
                    }
                }
                OP_TEXT => return Err(bad("a text message, where binary ones are spoken")),
                _ => return Err(bad("an unknown frame")),
            }
        }
        let most = buf.len().min(usize::try_from(state.left).unwrap_or(usize::MAX));
        let n = link.recv_plain(&mut buf[..most])?;
        for byte in &mut buf[..n] {
            *byte ^= state.mask[state.at % 4];
            state.at += 1;
        }
        state.left -= n as u64;
        Ok(n)
    }
}

/// An HTTP request, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    /// The path, without query.
    pub(super) path: String,
    /// `Sec-WebSocket-Key` of a request for a WebSocket.
    pub(super) key: Option<String>,
    /// `binary` is among the protocols offered.
    pub(super) binary: bool,
}

/// Parses the head of a request.
pub(super) fn parse_request(head: &str) -> io::Result<Request> {
    let mut lines = head.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let (Some("GET"), Some(target), Some(version)) = (first.next(), first.next(), first.next()) else {
        return Err(bad("only GET is served"));
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return Err(bad("not an HTTP request"));
    }
    let path = target.split(['?', '#']).next().unwrap_or_default().to_owned();
    let mut request = Request { path, ..Request::default() };
    let (mut upgrade, mut key) = (false, None);
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name.trim().to_ascii_lowercase().as_str() {
            "upgrade" => upgrade |= value.eq_ignore_ascii_case("websocket"),
            "sec-websocket-key" => key = Some(value.to_owned()),
            "sec-websocket-protocol" => request.binary |= value.split(',').any(|p| p.trim() == "binary"),
            _ => {}
        }
    }
    if upgrade {
        request.key = Some(key.ok_or_else(|| bad("an upgrade without a key"))?);
    }
    Ok(request)
}

/// Reads the head of a request.
pub(super) fn read_request(link: &Link) -> io::Result<Request> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= MOST_HEAD {
            return Err(bad("a request that is too long"));
        }
        exact(link, &mut byte)?;
        head.push(byte[0]);
    }
    parse_request(&String::from_utf8_lossy(&head))
}

/// The answer that begins a WebSocket.
pub(super) fn accept(key: &str, binary: bool) -> String {
    let digest = Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes());
    let protocol = if binary { "Sec-WebSocket-Protocol: binary\r\n" } else { "" };
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n{protocol}\r\n",
        STANDARD.encode(digest)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshake() {
        let head = "GET /websockify?x=1 HTTP/1.1\r\nHost: a\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: base64, binary\r\n\r\n";
        let r = parse_request(head).unwrap();
        assert_eq!((r.path.as_str(), r.binary), ("/websockify", true));
        // RFC 6455, 1.3.
        assert!(accept(&r.key.unwrap(), false).contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        assert!(parse_request("POST / HTTP/1.1\r\n\r\n").is_err());
        assert!(parse_request("GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n").is_err());
        assert_eq!(parse_request("GET /vnc.html HTTP/1.1\r\n\r\n").unwrap().path, "/vnc.html");
    }

    #[test]
    fn lengths() {
        for (n, head) in [(5usize, 2usize), (126, 4), (70_000, 10)] {
            let mut out = Vec::new();
            WebSocket::frame(&vec![1; n], &mut out);
            assert_eq!(out.len(), n + head);
        }
    }
}
