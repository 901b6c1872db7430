//! `info ...`.

use super::{Entry, Shell, entry, registers};
use crate::qmp::Result;
use bus::Space;
use machine::Machine;
use machine::inspect_pci::{PciInfo, class_name};
use serde_json::Value;
use std::fmt::Write;

pub(super) const COMMANDS: &[Entry] = &[
    entry("version", "", "show the version of QEMU", |_, _| {
        let (major, minor, micro) = crate::qmp::VERSION;
        Ok(format!("{major}.{minor}.{micro} ({})\n", crate::qmp::PACKAGE))
    }),
    entry("status", "", "show the current VM status (running|paused)", |s, _| {
        let state = s.context.remote.state();
        let running = state == machine::RunState::Running;
        let detail = match state.name() {
            "running" | "paused" => String::new(),
            other => format!(" ({other})"),
        };
        Ok(format!("VM status: {}{detail}\n", if running { "running" } else { "paused" }))
    }),
    entry("kvm", "", "show KVM information", |s, _| {
        Ok(format!("kvm support: {}\n", if s.context.settings.kvm { "enabled" } else { "disabled" }))
    }),
    entry("name", "", "show the current VM name", |s, _| {
        Ok(s.context.settings.name.as_ref().map(|n| format!("{n}\n")).unwrap_or_default())
    }),
    entry("uuid", "", "show the current VM UUID", |s, _| Ok(format!("{}\n", s.context.settings.uuid))),
    entry("cpus", "", "show infos for each CPU", cpus),
    entry("hotpluggable-cpus", "", "show information about hotpluggable CPUs", hotpluggable),
    entry(
        "registers",
        "[-a|vcpu]",
        "show the cpu registers (-a: show register info for all cpus)",
        show_registers,
    ),
    entry("lapic", "[apic-id]", "show local apic state", lapic),
    entry("mem", "", "show the active virtual memory mappings", mappings),
    entry("tlb", "", "show virtual to physical memory mappings", tlb),
    entry("mtree", "", "show memory tree", mtree),
    entry("ramblock", "", "display system ramblock information", ramblock),
    entry("pci", "", "show PCI info", pci),
    entry("qtree", "", "show device tree", qtree),
    entry("qdm", "", "show qdev device model list", |_, _| {
        let mut out = String::new();
        for model in devices::models() {
            for name in model.names() {
                let _ = writeln!(out, "name \"{name}\", desc \"{}\"", model.about); // writing to a String cannot fail
            }
        }
        Ok(out)
    }),
    entry("block", "", "show info of block devices", block),
    entry("chardev", "", "show the character devices", |s, _| {
        let all = s.qmp("query-chardev", Value::Null)?;
        Ok(all
            .as_array()
            .into_iter()
            .flatten()
            .map(|c| format!("{}: filename={}\n", text(c, "label"), text(c, "filename")))
            .collect())
    }),
    entry("balloon", "", "show balloon information", |s, _| {
        let b = s.qmp("query-balloon", Value::Null)?;
        Ok(format!("balloon: actual={}\n", b["actual"].as_u64().unwrap_or_default() >> 20))
    }),
    entry(
        "memory_size_summary",
        "",
        "show the amount of initially allocated and present hotpluggable memory in bytes",
        |s, _| {
            let m = s.qmp("query-memory-size-summary", Value::Null)?;
            Ok(format!("base memory: {}\nplugged memory: {}\n", m["base-memory"], m["plugged-memory"]))
        },
    ),
    entry("memory-devices", "", "show memory devices", |_, _| Ok(String::new())),
    entry("numa", "", "show NUMA information", |_, _| Ok("0 nodes\n".into())),
    entry("iothreads", "", "show iothreads", |s, _| {
        let all = s.qmp("query-iothreads", Value::Null)?;
        Ok(all
            .as_array()
            .into_iter()
            .flatten()
            .map(|t| format!("{}:\n  thread_id={}\n", text(t, "id"), t["thread-id"]))
            .collect())
    }),
    entry("roms", "", "show roms", |_, _| Ok(String::new())),
    entry("migrate", "", "show migration status", |_, _| Ok("no migration has been started\n".into())),
    entry("snapshots", "", "show the currently saved VM snapshots", |_, _| {
        Ok("no block device can store vmstate for snapshot\n".into())
    }),
];

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn cpus(s: &mut Shell<'_>, _: &str) -> Result<String> {
    let all = s.qmp("query-cpus-fast", Value::Null)?;
    let line = |c: &Value| {
        let index = c["cpu-index"].as_u64().unwrap_or_default();
        let mark = if index == u64::from(s.cpu) { '*' } else { ' ' };
        format!("{mark} CPU #{index}: thread_id={}\n", c["thread-id"])
    };
    Ok(all.as_array().into_iter().flatten().map(line).collect())
}

fn hotpluggable(s: &mut Shell<'_>, _: &str) -> Result<String> {
    let all = s.qmp("query-hotpluggable-cpus", Value::Null)?;
    let mut out = "Hotpluggable CPUs:\n".to_owned();
    for c in all.as_array().into_iter().flatten() {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  type: \"{}\"\n  vcpus_count: \"{}\"", text(c, "type"), c["vcpus-count"]);
        if !text(c, "qom-path").is_empty() {
            let _ = writeln!(out, "  qom_path: \"{}\"", text(c, "qom-path"));
        }
        out += "  CPUInstance Properties:\n";
        for (key, value) in c["props"].as_object().into_iter().flatten() {
            let _ = writeln!(out, "    {key}: \"{value}\"");
        }
    }
    Ok(out)
}

fn show_registers(s: &mut Shell<'_>, args: &str) -> Result<String> {
    let count = s.context.machine(|m| m.vcpu_count())?;
    let which = match args {
        "" => s.cpu..s.cpu + 1,
        "-a" => 0..count,
        n => {
            let n: u32 = n.parse().map_err(|_| crate::qmp::Error::generic("invalid CPU index"))?;
            n..n.saturating_add(1)
        }
    };
    let mut out = String::new();
    for i in which {
        let cpu = s.context.machine(move |m| m.cpu_state(i))??;
        out += &registers::dump(i, &cpu);
    }
    Ok(out)
}

/// Registers of the local APIC that people look at: name and offset (Intel SDM volume 3, table 11-1).
const APIC: &[(&str, usize)] = &[
    ("ID", 0x20),
    ("VERSION", 0x30),
    ("TPR", 0x80),
    ("LDR", 0xd0),
    ("DFR", 0xe0),
    ("SPIV", 0xf0),
    ("ESR", 0x280),
    ("ICR", 0x300),
    ("ICR2", 0x310),
    ("LVTT", 0x320),
    ("LVTPC", 0x340),
    ("LVT0", 0x350),
    ("LVT1", 0x360),
    ("LVTERR", 0x370),
    ("TIMER_ICR", 0x380),
    ("TIMER_CCR", 0x390),
    ("TIMER_DCR", 0x3e0),
];

fn lapic(s: &mut Shell<'_>, args: &str) -> Result<String> {
    let index = match args {
        "" => s.cpu,
        n => n.parse().map_err(|_| crate::qmp::Error::generic("invalid CPU index"))?,
    };
    let cpu = s.context.machine(move |m| m.cpu_state(index))??;
    let Some(page) = cpu.lapic else {
        return Err(crate::qmp::Error::generic("the vCPU has no local APIC"));
    };
    let word = |at: usize| page.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let mut out = format!("dumping local APIC state for CPU {index}\n\n");
    for (name, at) in APIC {
        let _ = writeln!(out, "{name:<10} {:#010x}", word(*at)); // writing to a String cannot fail
    }
    for (name, at) in [("ISR", 0x100), ("IRR", 0x200)] {
        let bits = (0..256).filter(|v| word(at + 0x10 * (v / 32)) >> (v % 32) & 1 != 0);
        let bits: Vec<String> = bits.map(|v| v.to_string()).collect();
        let _ =
            writeln!(out, "{name:<10} {}", if bits.is_empty() { "(none)".into() } else { bits.join(" ") });
    }
    Ok(out)
}

/// Most pages that are listed.
const MOST_PAGES: usize = 100_000;

/// Calls `f` with each page that is mapped: linear address, entry, size; stops at the limit.
fn walk(m: &Machine, cpu: &accel::CpuState, f: &mut dyn FnMut(u64, u64, u64)) -> bool {
    let levels = if cpu.cr4 >> 12 & 1 != 0 { 5 } else { 4 };
    let mut left = MOST_PAGES;
    table(m, cpu.cr3 & 0x000f_ffff_ffff_f000, levels - 1, 0, levels, &mut left, f);
    left > 0
}

fn table(
    m: &Machine,
    base: u64,
    level: u32,
    linear: u64,
    levels: u32,
    left: &mut usize,
    f: &mut dyn FnMut(u64, u64, u64),
) {
    let mut page = vec![0; 4096];
    if m.memory().read(base, &mut page).is_err() {
        return;
    }
    for (i, bytes) in page.chunks_exact(8).enumerate() {
        let entry = u64::from_le_bytes(std::array::from_fn(|k| bytes[k]));
        if entry & 1 == 0 || *left == 0 {
            continue;
        }
        let mut at = linear | (i as u64) << (12 + 9 * level);
        if level == levels - 1 && i >= 256 {
            at |= u64::MAX << (12 + 9 * levels);
        }
        if level == 0 || (entry & 0x80 != 0 && level <= 2) {
            *left -= 1;
            f(at, entry, 1 << (12 + 9 * level));
        } else {
            // A table that points to itself ends at level 0.
            table(m, entry & 0x000f_ffff_ffff_f000, level - 1, at, levels, left, f);
        }
    }
}

fn paging(
    s: &Shell<'_>,
    f: impl FnOnce(&Machine, &accel::CpuState) -> String + Send + 'static,
) -> Result<String> {
    let cpu = s.cpu_state()?;
    if cpu.cr0 >> 31 & 1 == 0 {
        return Ok("PG disabled\n".into());
    }
    if cpu.efer >> 10 & 1 == 0 {
        return Err(crate::qmp::Error::generic("only the page tables of 64-bit mode are shown"));
    }
    s.context.machine(move |m| f(m, &cpu))
}

fn flags(entry: u64) -> String {
    [(63, 'X'), (8, 'G'), (7, 'P'), (6, 'D'), (5, 'A'), (4, 'C'), (3, 'T'), (2, 'U'), (1, 'W')]
        .iter()
        .map(|(bit, c)| if entry >> bit & 1 != 0 { *c } else { '-' })
        .collect()
}

fn tlb(s: &mut Shell<'_>, _: &str) -> Result<String> {
    paging(s, |m, cpu| {
        let mut out = String::new();
        let all = walk(m, cpu, &mut |at, entry, size| {
            let gpa = entry & 0x000f_ffff_ffff_f000 & !(size - 1);
            let _ = writeln!(out, "{at:016x}: {gpa:016x} {}", flags(entry)); // writing to a String cannot fail
        });
        if !all {
            out += "(more pages are not shown)\n";
        }
        out
    })
}

fn mappings(s: &mut Shell<'_>, _: &str) -> Result<String> {
    paging(s, |m, cpu| {
        let mut ranges: Vec<(u64, u64, String)> = Vec::new();
        let all = walk(m, cpu, &mut |at, entry, size| {
            let kind = format!(
                "{}r{}",
                if entry & 4 != 0 { 'u' } else { '-' },
                if entry & 2 != 0 { 'w' } else { '-' }
            );
            match ranges.last_mut() {
                Some((_, end, k)) if *end == at && *k == kind => *end = at.wrapping_add(size),
                _ => ranges.push((at, at.wrapping_add(size), kind)),
            }
        });
        let mut out = String::new();
        for (start, end, kind) in ranges {
            let _ = writeln!(out, "{start:016x}-{end:016x} {:016x} {kind}", end.wrapping_sub(start)); // cannot fail
        }
        if !all {
            out += "(more pages are not shown)\n";
        }
        out
    })
}

fn mtree(s: &mut Shell<'_>, _: &str) -> Result<String> {
    s.context.machine(|m| {
        let mut out = String::new();
        for (title, space) in [("memory", Space::Memory), ("I/O", Space::Port)] {
            let _ = writeln!(out, "address-space: {title}"); // writing to a String cannot fail
            let mut all = m.bus().mappings(space);
            if space == Space::Memory {
                for r in m.memory().regions() {
                    all.push((r.start, r.len(), "pc.ram".into()));
                }
                all.sort_by_key(|(start, ..)| *start);
            }
            for (start, len, name) in all {
                let kind = if &*name == "pc.ram" { "ram" } else { "i/o" };
                let _ = writeln!(out, "    {start:016x}-{:016x} (prio 0, {kind}): {name}", start + (len - 1));
            }
            out.push('\n');
        }
        out
    })
}

fn ramblock(s: &mut Shell<'_>, _: &str) -> Result<String> {
    s.context.machine(|m| {
        let mut out = "              Block Name    PSize              Offset               Used\n".to_owned();
        for r in m.memory().regions() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{:>24}    {:>5}  {:#018x} {:#018x}", "pc.ram", "4 KiB", r.start, r.len());
        }
        out
    })
}

fn pci(s: &mut Shell<'_>, _: &str) -> Result<String> {
    let all = s.context.machine(|m| m.pci())?;
    if all.is_empty() {
        return Ok("PCI not supported\n".into());
    }
    let mut out = String::new();
    all.iter().for_each(|info| function(&mut out, info));
    Ok(out)
}

fn function(out: &mut String, p: &PciInfo) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "  Bus {:2}, device {:3}, function {}:", p.bus, p.slot, p.function);
    let name = match class_name(p.class) {
        "Class" => format!("Class {:04x}", p.class),
        name => name.into(),
    };
    let _ = writeln!(out, "    {name}: PCI device {:04x}:{:04x}", p.id.0, p.id.1);
    if p.subsystem.0 != 0 {
        let _ = writeln!(out, "      PCI subsystem {:04x}:{:04x}", p.subsystem.0, p.subsystem.1);
    }
    if p.pin != 0 {
        let _ = writeln!(out, "      IRQ {}, pin {}", p.irq, (b'A' + (p.pin - 1).min(3)) as char);
    }
    if let Some((secondary, subordinate, _)) = &p.bridge {
        let _ = writeln!(
            out,
            "      BUS {}.\n      secondary bus {secondary}.\n      subordinate bus {subordinate}.",
            p.bus
        );
    }
    for r in &p.regions {
        let at = r.address.unwrap_or(u64::MAX);
        let end = r.address.map_or(r.size - 2, |a| a + r.size - 1);
        let _ = if r.io {
            writeln!(out, "      BAR{}: I/O at {at:#06x} [{end:#06x}].", r.bar)
        } else {
            let (bits, kind) =
                (if r.wide { 64 } else { 32 }, if r.prefetchable { " prefetchable" } else { "" });
            writeln!(out, "      BAR{}: {bits} bit{kind} memory at {at:#010x} [{end:#010x}].", r.bar)
        };
    }
    let _ = writeln!(out, "      id \"{}\"", p.device.as_deref().unwrap_or_default());
    for inner in p.bridge.iter().flat_map(|(.., inside)| inside) {
        function(out, inner);
    }
}

fn qtree(s: &mut Shell<'_>, _: &str) -> Result<String> {
    s.context.machine(|m| {
        let mut out = "bus: main-system-bus\n  type System\n".to_owned();
        for bag in m.devices() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "  dev: {}, id \"{}\"", bag.driver, bag.id.as_deref().unwrap_or_default());
            if let Ok(model) = devices::find_model(&bag.driver) {
                for p in model.all_properties().0 {
                    let value = bag.props.get(&p.name).or(p.default.as_ref()).cloned().unwrap_or(Value::Null);
                    let _ = writeln!(out, "    {} = {value}", p.name);
                }
            }
        }
        out
    })
}

fn block(s: &mut Shell<'_>, _: &str) -> Result<String> {
    s.context.machine(|m| {
        let mut out = String::new();
        for bag in &m.blueprint().blockdevs {
            let id = bag.id.as_deref().unwrap_or_default();
            let file = bag.props.get("file").and_then(Value::as_str).unwrap_or_default();
            let format = bag.props.get("format").and_then(Value::as_str).unwrap_or("probed");
            let read_only = bag.props.get("read-only").is_some_and(|v| v == true || v == "on");
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{id}: {file} ({format}{})", if read_only { ", read-only" } else { "" });
            if let Some(user) =
                m.devices().iter().find(|d| d.props.get("drive").and_then(Value::as_str) == Some(id))
            {
                let at = user
                    .id
                    .as_ref()
                    .map_or_else(|| user.driver.clone(), |i| format!("/machine/peripheral/{i}"));
                let _ = writeln!(out, "    Attached to:      {at}");
            }
        }
        out
    })
}
