//! The network block device protocol (the NBD project's `doc/proto.md`): a client, which is a storage, and a server, which
//! exports images. Fixed newstyle negotiation, structured replies, extended headers, metadata contexts, TLS; unix sockets and
//! TCP.

mod address;
mod client;
mod list;
mod proto;
mod server;
mod socket;
mod tls;

pub use address::NbdAddress;
pub use client::NbdStorage;
pub use list::{Listed, list};
pub use server::{Export, Server};
pub use socket::Socket;
pub use tls::{TlsClient, TlsCredentials, TlsServer};
