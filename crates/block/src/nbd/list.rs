//! What a server offers.

use super::{
    address::NbdAddress,
    client::{HANDSHAKE, greet, option_reply, start_tls},
    proto::*,
    socket::Socket,
};
use crate::{Error, Result};
use std::io::Write;

/// An export as its server describes it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Text for people.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Smallest, best and largest request in bytes, where the server says so.
    pub block_sizes: Option<[u32; 3]>,
    /// Metadata contexts.
    pub contexts: Vec<String>,
    /// Requests may have 64-bit lengths.
    pub extended: bool,
}

/// Most exports, contexts and facts that a server may list.
const MAX_ITEMS: usize = 65536;

fn option(socket: &mut Socket, option: u32, data: &[u8]) -> Result<()> {
    let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    socket.write_all(&out).map_err(|e| Error::io("NBD connection", e))
}

/// All replies of a kind that an option gives.
fn replies(socket: &mut Socket, number: u32, data: &[u8], wanted: u32) -> Result<Vec<Vec<u8>>> {
    option(socket, number, data)?;
    let mut out = Vec::new();
    loop {
        match option_reply(socket, number)? {
            (REP_ACK, _) => return Ok(out),
            (kind, _) if kind & 1 << 31 != 0 && number != OPT_LIST => return Ok(out),
            (REP_ERR_TLS_REQD, _) => {
                return Err(Error::unsupported("The server demands TLS; give --tls-creds"));
            }
            (kind, text) if kind & 1 << 31 != 0 => {
                return Err(Error::unsupported(format!(
                    "The server does not list its exports: {}",
                    String::from_utf8_lossy(&text)
                )));
            }
            (kind, data) if kind == wanted => out.push(data),
            _ => {}
        }
        if out.len() > MAX_ITEMS {
            return Err(Error::invalid("NBD server lists without end"));
        }
    }
}

fn describe(socket: &mut Socket, name: &str, listed: &mut Listed) -> Result<()> {
    let mut query = (name.len() as u32).to_be_bytes().to_vec();
    query.extend(name.as_bytes());
    let contexts = query.clone();
    query.extend(1u16.to_be_bytes());
    query.extend(INFO_BLOCK_SIZE.to_be_bytes());
    for info in replies(socket, OPT_INFO, &query, REP_INFO)? {
        let mut at = &info[..];
        match take_u16(&mut at)? {
            INFO_EXPORT => (listed.size, listed.flags) = (take_u64(&mut at)?, take_u16(&mut at)?),
            INFO_BLOCK_SIZE => {
                listed.block_sizes = Some([take_u32(&mut at)?, take_u32(&mut at)?, take_u32(&mut at)?]);
            }
            INFO_DESCRIPTION => listed.description = String::from_utf8_lossy(at).into_owned(),
            _ => {}
        }
    }
    let contexts = [&contexts[..], &0u32.to_be_bytes()].concat();
    for context in replies(socket, OPT_LIST_META_CONTEXT, &contexts, REP_META_CONTEXT)? {
        listed.contexts.push(String::from_utf8_lossy(context.get(4..).unwrap_or_default()).into_owned());
    }
    Ok(())
}

/// Asks a server for its exports. The address's export is not looked at.
pub fn list(address: &NbdAddress) -> Result<Vec<Listed>> {
    let failed = |e: std::io::Error| Error::io(format!("Failed to connect to '{address}'"), e);
    let mut socket = address.connect().map_err(failed)?;
    socket.set_read_timeout(Some(HANDSHAKE));
    greet(&mut socket, address)?;
    if let Some(tls) = &address.tls {
        start_tls(&mut socket, address)?;
        socket = tls.connect(socket, &address.host)?;
    }
    option(&mut socket, OPT_EXTENDED_HEADERS, &[])?;
    let extended = option_reply(&mut socket, OPT_EXTENDED_HEADERS)?.0 == REP_ACK;
    if !extended {
        option(&mut socket, OPT_STRUCTURED_REPLY, &[])?;
        option_reply(&mut socket, OPT_STRUCTURED_REPLY)?;
    }
    let mut out = Vec::new();
    for item in replies(&mut socket, OPT_LIST, &[], REP_SERVER)? {
        let mut at = &item[..];
        let len = take_u32(&mut at)? as usize;
        let name = at.get(..len).ok_or_else(|| Error::invalid("NBD server sends a malformed list"))?;
        let mut listed =
            Listed { name: String::from_utf8_lossy(name).into_owned(), extended, ..Listed::default() };
        let name = listed.name.clone();
        describe(&mut socket, &name, &mut listed)?;
        out.push(listed);
    }
    // A courtesy: the server sees the end of the connection anyway.
    let _ = option(&mut socket, OPT_ABORT, &[]);
    Ok(out)
}
