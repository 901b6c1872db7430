//! What a browser gets from the WebSocket's port.

/// A file of the page: path, content type, contents.
pub(super) struct File {
    pub(super) path: &'static str,
    pub(super) kind: &'static str,
    pub(super) data: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/page.rs"));

const MISSING: &str =
    "This program was built without the noVNC page. Any noVNC elsewhere can connect to this address.\n";

/// The answer to a request for a file.
pub(super) fn answer(path: &str) -> Vec<u8> {
    let path = if path == "/" { "/index.html" } else { path };
    let (status, kind, body) = match FILES.iter().find(|f| f.path == path) {
        Some(file) => ("200 OK", file.kind, file.data),
        None if FILES.is_empty() => ("404 Not Found", "text/plain; charset=utf-8", MISSING.as_bytes()),
        None => ("404 Not Found", "text/plain; charset=utf-8", &b"There is no such file.\n"[..]),
    };
    let mut out = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\nX-Content-Type-Options: nosniff\r\n\r\n",
        body.len()
    )
    .into_bytes();
    out.extend_from_slice(body);
    out
}
