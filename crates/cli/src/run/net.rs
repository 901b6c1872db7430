//! `--net` and `--netdev`.

use crate::Failure;
use ::net::{KINDS, find_kind};
use base::props::Bag;
use machine::Blueprint;
use serde_json::Value;
use std::fmt::Write as _;

/// A netdev's bag from text.
fn parse(text: &str) -> Result<Bag, Failure> {
    ::net::parse(text).map_err(Failure::usage)
}

/// Help that was asked for.
pub(super) fn help<'a>(texts: impl Iterator<Item = &'a String>) -> Result<Option<String>, Failure> {
    for text in texts {
        if text == "help" || text == "?" {
            let mut out = format!("{:<12} {}\n", "none", "no network");
            for kind in KINDS {
                let _ = writeln!(out, "{:<12} {}", kind.name, kind.about); // writing to a String cannot fail
            }
            return Ok(Some(out));
        }
        let bag = parse(text)?;
        if bag.wants_help() {
            let kind = find_kind(&bag.driver).map_err(Failure::usage)?;
            return Ok(Some(kind.all_properties().help(kind.name)));
        }
    }
    Ok(None)
}

/// Adds backends and cards to a blueprint. Without any of either there is one user-mode network.
pub(super) fn add(cards: &[String], backends: &[String], blueprint: &mut Blueprint) -> Result<(), Failure> {
    for text in backends {
        let bag = parse(text)?;
        find_kind(&bag.driver).map_err(Failure::usage)?;
        if bag.id.is_none() {
            return Err(Failure::usage(format!("--netdev {text}: missing id=, by which a device names it")));
        }
        blueprint.netdevs.push(bag);
    }
    let default = ["user".to_owned()];
    let cards = if cards.is_empty() && backends.is_empty() { &default } else { cards };
    for (index, text) in cards.iter().enumerate() {
        let mut bag = parse(text)?;
        if bag.driver == "none" {
            if cards.len() > 1 || !bag.props.is_empty() {
                return Err(Failure::usage("--net none stands alone"));
            }
            continue;
        }
        find_kind(&bag.driver).map_err(Failure::usage)?;
        let id = bag.id.get_or_insert_with(|| format!("net{index}")).clone();
        let text_of = |bag: &mut Bag, key: &str| match bag.props.remove(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let model = text_of(&mut bag, "model").unwrap_or_else(|| "virtio-net".into());
        let mut device = Bag::new(model).with("netdev", id);
        if let Some(mac) = text_of(&mut bag, "mac") {
            device = device.with("mac", mac);
        }
        blueprint.netdevs.push(bag);
        blueprint.devices.push(device);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blueprint(cards: &[&str], backends: &[&str]) -> Result<Blueprint, Failure> {
        let own = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut blueprint = Blueprint::default();
        add(&own(cards), &own(backends), &mut blueprint)?;
        Ok(blueprint)
    }

    #[test]
    fn a_network_by_default_and_by_wish() {
        let b = blueprint(&[], &[]).ok().unwrap();
        assert_eq!((b.netdevs[0].driver.as_str(), b.devices[0].driver.as_str()), ("user", "virtio-net"));
        let b = blueprint(&["none"], &[]).ok().unwrap();
        assert!(b.netdevs.is_empty() && b.devices.is_empty());
        let text = "user,hostfwd=tcp::1-:2,hostfwd=tcp::3-:4,mac=52:54:00:00:00:01,model=e1000,restrict=on";
        let b = blueprint(&[text], &[]).ok().unwrap();
        assert_eq!(b.netdevs[0].props["hostfwd"], serde_json::json!(["tcp::1-:2", "tcp::3-:4"]));
        assert_eq!(b.netdevs[0].props["restrict"], "on");
        assert_eq!((b.devices[0].driver.as_str(), &b.devices[0].props["netdev"]), ("e1000", &"net0".into()));
        let b = blueprint(&[], &["user,id=n"]).ok().unwrap();
        assert!(b.devices.is_empty());
        for (cards, backends) in [
            (&["none", "user"][..], &[][..]),
            (&["usr"], &[]),
            (&[], &["user"]),
            (&["none,x=y"], &[]),
            (&[""], &[]),
        ] {
            assert!(blueprint(cards, backends).is_err(), "{cards:?} {backends:?}");
        }
    }
}
