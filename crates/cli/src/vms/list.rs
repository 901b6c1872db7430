//! `kvasir ls` and `kvasir rm`.

use super::store::{Store, Vm};
use crate::Failure;
use std::os::unix::fs::MetadataExt;

/// List the virtual machines made with `create`.
#[derive(clap::Args)]
pub(crate) struct ListArgs {
    /// Print names only
    #[arg(long, short)]
    quiet: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

/// Remove virtual machines, with their disks.
#[derive(clap::Args)]
pub(crate) struct RemoveArgs {
    /// Names
    #[arg(required = true, value_name = "VM")]
    names: Vec<String>,
}

fn state(vm: &Vm) -> &'static str {
    if vm.is_running() { "running" } else { "shut off" }
}

/// Bytes that the VM takes on the host's disk.
fn used(vm: &Vm) -> u64 {
    let files = std::fs::read_dir(&vm.dir).into_iter().flatten();
    files.filter_map(|f| f.ok()?.metadata().ok()).map(|m| m.blocks() * 512).sum()
}

pub(crate) fn list(args: &ListArgs) -> Result<u8, Failure> {
    let vms = Store::open()?.all()?;
    if args.json {
        let list: Vec<_> = vms
            .iter()
            .map(|vm| {
                serde_json::json!({
                    "name": vm.name, "state": state(vm), "directory": vm.dir, "used": used(vm),
                    "description": vm.description,
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&list).map_err(Failure::usage)?);
        return Ok(0);
    }
    if args.quiet {
        vms.iter().for_each(|vm| println!("{}", vm.name));
        return Ok(0);
    }
    print!("{}", table(&vms));
    Ok(0)
}

fn table(vms: &[Vm]) -> String {
    let mut rows = vec![["NAME", "STATE", "CPUS", "MEMORY", "DISK", "FROM"].map(String::from)];
    for vm in vms {
        let d = &vm.description;
        let disk = format!("{:.1} GiB", used(vm) as f64 / f64::from(1 << 30));
        rows.push([
            vm.name.clone(),
            state(vm).into(),
            d.cpus.clone(),
            d.memory.clone(),
            disk,
            d.from.clone(),
        ]);
    }
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |row: &[String; 6]| {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

pub(crate) fn remove(args: &RemoveArgs) -> Result<u8, Failure> {
    let store = Store::open()?;
    // All are there, or none is removed.
    let vms = args.names.iter().map(|name| store.find(name)).collect::<Result<Vec<_>, _>>()?;
    if let Some(vm) = vms.iter().find(|vm| vm.is_running()) {
        return Err(Failure::usage(format!("'{}' is running: shut it down first", vm.name)));
    }
    vms.into_iter().try_for_each(Vm::remove)?;
    Ok(0)
}
