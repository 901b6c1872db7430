//! A VNC server (RFC 6143, and the extensions of the community's RFB protocol).
//!
//! Each viewer has two threads: one reads its messages, the other waits for news of its console and writes updates. A
//! viewer that is slow misses intermediate pictures; one that reads nothing at all is let go. Neither the guest nor
//! other viewers wait for it.

mod address;
mod auth;
mod clipboard;
mod encode;
mod handshake;
mod keyboard;
mod message;
mod page;
mod pixel;
mod scroll;
mod server;
mod session;
mod tls;
mod transport;
mod update;
mod websocket;

#[cfg(test)]
mod tests;

pub use message::{ClientMessage, read_message};
pub use pixel::PixelFormat;
pub use server::{Options, Server, Share, VncError};
pub use tls::TlsFiles;
pub use transport::{Rx, Source};
