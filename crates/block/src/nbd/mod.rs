//! The network block device protocol (the NBD project's `doc/proto.md`): a client, which is a storage, and a server, which
//! exports images. Fixed newstyle negotiation, structured replies, metadata contexts; unix sockets and TCP.

mod client;
mod proto;
mod server;
mod socket;

pub use client::{NbdAddress, NbdStorage};
pub use server::{Export, Server};
pub use socket::Socket;
