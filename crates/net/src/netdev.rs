//! Netdevs from their property bags.

use crate::{Error, Netdev, Result, bridge, socket, tap, user, wrap};
use base::nearest;
use base::props::{Bag, Properties, check_id, parse_keyval_repeating};
use serde_json::Value;

/// A kind of netdev: what users can name.
pub struct NetdevSpec {
    /// Its name, as in `--netdev NAME`.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Its properties.
    pub properties: fn() -> Properties,
    open: fn(&Bag, &str) -> Result<Opened>,
}

/// A netdev, and what changes it while it is in use.
#[derive(Debug)]
pub struct Opened {
    /// The netdev.
    pub netdev: Netdev,
    /// Of user-mode networks.
    pub user: Option<user::Control>,
}

/// All kinds.
pub const KINDS: &[NetdevSpec] = &[
    NetdevSpec {
        name: "user",
        about: "user-mode network: NAT through this process's sockets, DHCP, DNS; needs no privileges",
        properties: Properties::of::<user::Spec>,
        open: |bag, id| {
            let (netdev, control) = user::open(id, &bag.spec()?)?;
            Ok(Opened { netdev, user: Some(control) })
        },
    },
    NetdevSpec {
        name: "tap",
        about: "tap device of the host: made here, in a bridge if wanted, or given as open descriptors",
        properties: Properties::of::<tap::Spec>,
        open: |bag, id| Ok(Opened { netdev: tap::open(id, &bag.spec()?)?, user: None }),
    },
    NetdevSpec {
        name: "bridge",
        about: "bridge of the host, through a helper that asks an access list",
        properties: Properties::of::<bridge::Spec>,
        open: |bag, id| Ok(Opened { netdev: bridge::open(id, &bag.spec()?)?, user: None }),
    },
    NetdevSpec {
        name: "socket",
        about: "cable to another virtual machine: stream, UDP or multicast, as QEMU frames it",
        properties: Properties::of::<socket::Spec>,
        open: |bag, id| Ok(Opened { netdev: socket::open(id, &bag.spec()?)?, user: None }),
    },
];

impl NetdevSpec {
    /// All properties, those of every netdev among them.
    pub fn all_properties(&self) -> Properties {
        let mut all = (self.properties)();
        all.0.extend(Properties::of::<wrap::Spec>().0);
        all
    }
}

/// A netdev's bag from `KIND[,id=ID][,property=value...]` or its JSON form; some properties may be repeated.
///
/// # Errors
/// Malformed text, or no kind.
pub fn parse(text: &str) -> Result<Bag> {
    if text.trim_start().starts_with('{') {
        let mut bag = Bag::parse(text, "type")?;
        // QMP wraps the strings of lists: {"str": "tcp::1-:2"}.
        for (_, value) in bag.props.iter_mut().filter(|(key, _)| REPEATABLE.contains(&key.as_str())) {
            for item in value.as_array_mut().into_iter().flatten() {
                if let Some(text) = item.get_mut("str") {
                    *item = text.take();
                }
            }
        }
        return Ok(bag);
    }
    let mut props = parse_keyval_repeating(text, "type", REPEATABLE)?;
    let mut take = |key: &str| match props.remove(key) {
        Some(Value::String(text)) if !text.is_empty() => Some(text),
        _ => None,
    };
    let driver = take("type")
        .ok_or_else(|| Error::Config(format!("'{text}': missing the kind of network; 'help' lists them")))?;
    let id = take("id");
    if let Some(id) = &id {
        check_id(id)?;
    }
    Ok(Bag { driver, id, props })
}

/// Properties that may be given several times.
pub const REPEATABLE: &[&str] = &["hostfwd", "guestfwd", "dnssearch"];

/// The kind that a user names.
///
/// # Errors
/// Says which name is nearest.
pub fn find_kind(name: &str) -> Result<&'static NetdevSpec> {
    KINDS.iter().find(|k| k.name == name).ok_or_else(|| {
        let hint = match nearest(name, KINDS.iter().map(|k| k.name)) {
            Some(near) => format!("did you mean '{near}'?"),
            None => format!("use {}", KINDS.iter().map(|k| k.name).collect::<Vec<_>>().join(", ")),
        };
        Error::Config(format!("unknown netdev '{name}'; {hint}"))
    })
}

/// Makes the netdev that a bag describes.
///
/// # Errors
/// Properties that make no sense, or the host's refusal.
pub fn open(bag: &Bag) -> Result<Opened> {
    let kind = find_kind(&bag.driver)?;
    let id = bag.id.as_deref().ok_or_else(|| Error::Config(format!("netdev {}: missing id", bag.driver)))?;
    let (around, own) = split(bag);
    let mut opened = (kind.open)(&own, id)?;
    opened.netdev = wrap::wrap(opened.netdev, &around.spec()?)?;
    Ok(opened)
}

/// Separates the properties of every netdev from those of its kind.
fn split(bag: &Bag) -> (Bag, Bag) {
    let common = Properties::of::<wrap::Spec>();
    let (mut around, mut own) = (bag.clone(), bag.clone());
    let is_common = |key: &str| common.names().any(|n| n == key);
    around.props.retain(|key, _| is_common(key));
    own.props.retain(|key, _| !is_common(key));
    (around, own)
}
