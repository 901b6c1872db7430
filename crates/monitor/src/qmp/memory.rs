//! Guest memory.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use machine::inspect::Access;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

pub(super) const COMMANDS: &[Command] = &[
    command!("query-memory-size-summary", summary),
    command!("query-memory-devices", devices),
    command!("query-memdev", memdev),
    command!("query-balloon", query_balloon),
    command!("balloon", balloon),
    command!("memsave", memsave),
    command!("pmemsave", pmemsave),
];

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Summary {
    base_memory: u64,
    plugged_memory: u64,
}

fn summary(c: &Context, _: Empty) -> Result<Summary> {
    Ok(Summary { base_memory: c.machine(|m| m.memory().total())?, plugged_memory: 0 })
}

fn devices(_: &Context, _: Empty) -> Result<Vec<Value>> {
    Ok(Vec::new())
}

fn memdev(_: &Context, _: Empty) -> Result<Vec<Value>> {
    Ok(Vec::new())
}

#[derive(Serialize, JsonSchema)]
struct Balloon {
    actual: u64,
}

fn no_balloon() -> Error {
    Error::of(super::Class::DeviceNotActive, "No balloon device has been activated")
}

fn the_balloon(c: &Context) -> Result<Arc<devices::virtio::balloon::Balloon>> {
    c.machine(|m| m.balloon().cloned())?.ok_or_else(no_balloon)
}

fn query_balloon(c: &Context, _: Empty) -> Result<Balloon> {
    Ok(Balloon { actual: the_balloon(c)?.actual() })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SetBalloon {
    /// Memory that the guest is to do with, in bytes.
    value: u64,
}

fn balloon(c: &Context, a: SetBalloon) -> Result<Empty> {
    let balloon = the_balloon(c)?;
    if a.value == 0 {
        return Err(Error::generic("Parameter 'target' expects a size"));
    }
    balloon.set_target(a.value);
    Ok(Empty {})
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct MemSave {
    val: u64,
    size: u64,
    filename: String,
    cpu_index: Option<u32>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PMemSave {
    val: u64,
    size: u64,
    filename: String,
}

/// Copies guest memory to a file in pieces.
fn save(filename: &str, size: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<Empty> {
    let fail = |e: std::io::Error| Error::generic(format!("Could not open '{filename}': {e}"));
    let mut file = File::create(filename).map_err(fail)?;
    let mut buffer = vec![0; 64 << 10];
    let mut done = 0;
    while done < size {
        let n = (size - done).min(buffer.len() as u64) as usize;
        read(done, &mut buffer[..n])?;
        file.write_all(&buffer[..n])
            .map_err(|e| Error::generic(format!("writing memory to '{filename}' failed: {e}")))?;
        done += n as u64;
    }
    Ok(Empty {})
}

fn memsave(c: &Context, a: MemSave) -> Result<Empty> {
    c.machine(move |m| {
        let cpu = m.registers(a.cpu_index.unwrap_or(0))?;
        save(&a.filename, a.size, |offset, buffer| {
            m.linear(&cpu, a.val.wrapping_add(offset), Access::Read(buffer))
                .map_err(|at| Error::generic(format!("Invalid addr {at:#018x}/size {} specified", a.size)))
        })
    })?
}

fn pmemsave(c: &Context, a: PMemSave) -> Result<Empty> {
    let memory = c.machine(|m| m.memory().clone())?;
    if a.val.checked_add(a.size).is_none() {
        return Err(Error::generic("Parameter 'size' is out of range"));
    }
    save(&a.filename, a.size, |offset, buffer| {
        // Where there is no memory, a guest would read ones or zeroes; QEMU saves zeroes.
        if memory.read(a.val + offset, buffer).is_err() {
            for (i, page) in buffer.chunks_mut(4096).enumerate() {
                if memory.read(a.val + offset + 4096 * i as u64, page).is_err() {
                    page.fill(0);
                }
            }
        }
        Ok(())
    })
}
