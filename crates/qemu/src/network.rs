//! Networks: `-netdev`, `-nic`, and the card that a machine has by default.

use crate::command::Command;
use crate::translate::Plan;
use crate::{Error, Result};
use base::props::{Bag, check_id, parse_keyval_repeating};
use net::{KINDS, REPEATABLE, find_kind};
use serde_json::Value;
use std::fmt::Write;

/// Reads a back end; `None` if help was asked for.
pub(crate) fn parse(c: &mut Command, text: &str) -> Result<Option<Bag>> {
    if text == "help" || text == "?" {
        let mut out = "Available netdev backend types:\n".to_owned();
        for kind in KINDS {
            let _ = writeln!(out, "{}", kind.name); // writing to a String cannot fail
        }
        c.help = Some(out);
        return Ok(None);
    }
    let bag = if text.trim_start().starts_with('{') {
        Bag::parse(text, "type")?
    } else {
        let mut props = parse_keyval_repeating(text, "type", REPEATABLE)?;
        let driver = match props.remove("type") {
            Some(Value::String(driver)) if !driver.is_empty() => driver,
            _ => return Err(Error::new("Parameter 'type' is missing")),
        };
        let id = match props.remove("id") {
            Some(Value::String(id)) => Some(id),
            _ => None,
        };
        Bag { driver, id, props }
    };
    if let Some(id) = &bag.id {
        check_id(id)?;
    }
    if bag.wants_help() {
        let kind = find_kind(&bag.driver).map_err(|e| Error::new(e.to_string()))?;
        c.help = Some((kind.properties)().help(kind.name));
        return Ok(None);
    }
    Ok(Some(bag))
}

/// The card that QEMU gives a board, if we have it.
fn default_card(board: &str) -> String {
    let wanted = match board {
        "q35" => "e1000e",
        "pc" => "e1000",
        _ => "virtio-net",
    };
    let found = devices::find_model(wanted).is_ok();
    if found { wanted.into() } else { "virtio-net".into() }
}

/// Adds the back ends and cards of the command line, or the default ones.
pub(crate) fn add(plan: &mut Plan, c: &mut Command) -> Result<()> {
    let board = plan.blueprint.machine.driver.clone();
    let given = c.no_nic || !c.netdevs.is_empty() || !c.nics.is_empty();
    for bag in std::mem::take(&mut c.netdevs) {
        find_kind(&bag.driver).map_err(|e| Error::new(format!("-netdev {}: {e}", bag.driver)))?;
        plan.blueprint.netdevs.push(bag);
    }
    if !given && !c.no_defaults && board != "none" {
        c.nics.push(Bag::new("user"));
    }
    for (index, mut bag) in std::mem::take(&mut c.nics).into_iter().enumerate() {
        find_kind(&bag.driver).map_err(|e| Error::new(format!("-nic {}: {e}", bag.driver)))?;
        let id = bag.id.get_or_insert_with(|| format!("__nic{index}")).clone();
        // Identifiers of users begin with a letter, so ours cannot clash; back ends want one that does, too.
        let id = id.trim_start_matches('_').to_owned();
        bag.id = Some(id.clone());
        let mut text = |key: &str| bag.props.remove(key).map(|v| crate::command::text(&v));
        let model = match text("model").as_deref() {
            None => default_card(&board),
            Some("virtio" | "virtio-net-pci") => "virtio-net".into(),
            Some(other) => other.into(),
        };
        let mut device = Bag::new(model).with("netdev", id);
        for key in ["mac", "addr"] {
            if let Some(value) = text(key) {
                device = device.with(key, value);
            }
        }
        plan.blueprint.netdevs.push(bag);
        plan.blueprint.devices.push(device);
    }
    Ok(())
}
