//! `kvasir net`: networks of this host, and the helper that puts guests into bridges.

use crate::{Failure, status};
use ::net::bridge::{ACCESS_LISTS, allowed, helper};
use std::fmt::Write as _;
use std::path::Path;

/// List the kinds of networks and the bridges of this host, and say which can be used here.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List kinds of networks and bridges (the default)
    List,
    /// Make a tap device in a bridge for a user who may not, if the access list allows it
    BridgeHelper(Helper),
}

/// Options as those of QEMU's helper.
#[derive(clap::Args)]
struct Helper {
    /// Name of the bridge
    #[arg(long, value_name = "NAME")]
    br: String,
    /// Descriptor of the local socket through which the tap device's is sent
    #[arg(long, value_name = "N")]
    fd: i32,
    /// Have the offload header before each frame
    #[arg(long)]
    use_vnet: bool,
}

pub(crate) fn main(args: &Args) -> Result<u8, Failure> {
    match &args.command {
        None | Some(Command::List) => print!("{}", list()),
        Some(Command::BridgeHelper(h)) => helper(&h.br, h.fd, h.use_vnet)
            .map_err(|e| Failure { status: status::HOST, message: format!("bridge-helper: {e}") })?,
    }
    Ok(0)
}

/// Whether something can be used here, in a few words.
fn usable(kind: &str) -> String {
    match kind {
        "tap" => match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
            Ok(_) => "yes (making devices needs CAP_NET_ADMIN)".into(),
            Err(e) => format!("no: /dev/net/tun: {e}"),
        },
        "bridge" => match ACCESS_LISTS.iter().find(|p| Path::new(p).exists()) {
            Some(path) => format!("as {path} allows"),
            None => format!("no: there is no access list {}", ACCESS_LISTS[0]),
        },
        _ => "yes".into(),
    }
}

fn list() -> String {
    let mut out = String::from("Kinds of networks (kvasir run --net KIND):\n");
    for kind in ::net::KINDS {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(
            out,
            "  {:<8} {}\n  {:<8} usable here: {}",
            kind.name,
            kind.about,
            "",
            usable(kind.name)
        );
    }
    let mut bridges: Vec<String> = std::fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().join("bridge").is_dir())
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    bridges.sort();
    let _ = writeln!(out, "Bridges of this host:{}", if bridges.is_empty() { " none" } else { "" });
    let list = ACCESS_LISTS.iter().map(Path::new).find(|p| p.exists());
    for bridge in bridges {
        let verdict = match list.map(|list| allowed(&bridge, list)) {
            Some(Ok(true)) => "guests allowed".into(),
            Some(Ok(false)) | None => "guests not allowed".into(),
            Some(Err(e)) => e.to_string(),
        };
        let ports = std::fs::read_dir(format!("/sys/class/net/{bridge}/brif")).map_or(0, Iterator::count);
        let _ = writeln!(out, "  {bridge:<15} {ports} ports, {verdict}");
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_kind_is_listed() {
        let text = super::list();
        for kind in ::net::KINDS {
            assert!(text.contains(kind.about), "{text}");
        }
    }
}
