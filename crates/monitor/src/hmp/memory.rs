//! Memory and ports: x, xp, print, i, o, gva2gpa, memsave.

use super::{Entry, Shell, entry, expression, need, registers, unquote, word};
use crate::qmp::{Error, Result};
use accel::CpuState;
use bus::Space;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use machine::inspect::Access;
use serde_json::json;
use std::fmt::Write;

pub(super) const COMMANDS: &[Entry] = &[
    entry("x", "/fmt addr", "virtual memory dump starting at 'addr'", |s, args| examine(s, args, false)),
    entry("xp", "/fmt addr", "physical memory dump starting at 'addr'", |s, args| examine(s, args, true)),
    entry("print|p", "/fmt expr", "print expression value (use $reg for CPU register access)", print),
    entry("i", "/fmt addr", "I/O port read", port_in),
    entry("o", "/fmt addr value", "I/O port write", port_out),
    entry(
        "gva2gpa",
        "addr",
        "print the guest physical address corresponding to a guest virtual address",
        gva2gpa,
    ),
    entry(
        "gpa2hva",
        "addr",
        "print the host virtual address corresponding to a guest physical address",
        |s, args| {
            let cpu = s.cpu_state()?;
            let gpa = expression::whole(need(args, "addr")?, Some(&cpu))?;
            let hva = s.context.machine(move |m| m.memory().chunk(gpa, 1).map(|c| c.as_ptr() as u64))?;
            match hva {
                Ok(hva) => Ok(format!("Host virtual address for {gpa:#x} (pc.ram) is {hva:#x}\n")),
                Err(_) => Err(Error::generic(format!("No memory is mapped at address {gpa:#x}"))),
            }
        },
    ),
    entry(
        "memsave",
        "addr size file",
        "save to disk virtual memory dump starting at 'addr' of size 'size'",
        |s, args| save(s, args, "memsave"),
    ),
    entry(
        "pmemsave",
        "addr size file",
        "save to disk physical memory dump starting at 'addr' of size 'size'",
        |s, args| save(s, args, "pmemsave"),
    ),
    entry("sum", "addr size", "compute the checksum of a memory region", |s, args| {
        let cpu = s.cpu_state()?;
        let (start, rest) = expression::parse(need(args, "start")?, Some(&cpu))?;
        let size = expression::whole(need(rest, "size")?, Some(&cpu))?;
        let memory = s.context.machine(|m| m.memory().clone())?;
        let mut sum = 0u16;
        let mut byte = [0];
        for at in 0..size.min(1 << 30) {
            // What is no memory counts as zero.
            byte[0] = 0;
            let _ = memory.read(start.wrapping_add(at), &mut byte);
            // The BSD checksum.
            sum = sum.rotate_right(1).wrapping_add(byte[0].into());
        }
        Ok(format!("{sum:05}\n"))
    }),
];

/// `/COUNT FORMAT SIZE`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Form {
    count: u32,
    format: char,
    size: u32,
}

/// Most items of a dump.
const MOST: u32 = 1 << 16;

fn form(args: &str, default: char, default_size: u32) -> Result<(Form, &str)> {
    let mut f = Form { count: 1, format: default, size: default_size };
    let Some(rest) = args.strip_prefix('/') else { return Ok((f, args)) };
    let (spec, rest) = word(rest);
    let digits = spec.find(|c: char| !c.is_ascii_digit()).unwrap_or(spec.len());
    if digits > 0 {
        f.count = spec[..digits]
            .parse()
            .ok()
            .filter(|n| *n <= MOST)
            .ok_or_else(|| Error::generic("invalid count"))?;
    }
    let mut sized = false;
    for c in spec[digits..].chars() {
        match c {
            'x' | 'o' | 'd' | 'u' | 'c' | 'i' => f.format = c,
            'b' => (f.size, sized) = (1, true),
            'h' => (f.size, sized) = (2, true),
            'w' | 'l' => (f.size, sized) = (4, true),
            'g' => (f.size, sized) = (8, true),
            _ => return Err(Error::generic(format!("invalid char in format: '{c}'"))),
        }
    }
    if f.format == 'c' && !sized {
        f.size = 1;
    }
    Ok((f, rest))
}

fn shown(value: u64, form: Form) -> String {
    let bits = form.size * 8;
    let width = form.size as usize * 2;
    match form.format {
        'o' => format!("{value:#o}"),
        'd' => {
            let shift = 64 - bits;
            format!("{}", (value << shift) as i64 >> shift)
        }
        'u' => value.to_string(),
        'c' => match u8::try_from(value) {
            Ok(b @ 0x20..=0x7e) => format!("'{}'", b as char),
            _ => format!("'\\x{value:02x}'"),
        },
        _ => format!("0x{value:0width$x}"),
    }
}

impl Shell<'_> {
    pub(super) fn cpu_state(&self) -> Result<CpuState> {
        let index = self.cpu;
        Ok(self.context.machine(move |m| m.registers(index))??)
    }

    /// Reads guest memory, by linear or physical address.
    fn read(&self, cpu: &CpuState, address: u64, len: usize, physical: bool) -> Result<Vec<u8>> {
        let cpu = cpu.clone();
        self.context.machine(move |m| {
            let mut data = vec![0; len];
            let found = if physical {
                m.memory().read(address, &mut data).is_ok()
            } else {
                m.linear(&cpu, address, Access::Read(&mut data)).is_ok()
            };
            if found {
                Ok(data)
            } else {
                Err(Error::generic(format!("Cannot access memory at {address:#x}")))
            }
        })?
    }
}

fn examine(s: &mut Shell<'_>, args: &str, physical: bool) -> Result<String> {
    let (form, rest) = form(args, 'x', 4)?;
    let cpu = s.cpu_state()?;
    let start = expression::whole(need(rest, "addr")?, Some(&cpu))?;
    if form.format == 'i' {
        return disassemble(s, &cpu, start, form.count, physical);
    }
    let per_line = match (form.format, form.size) {
        ('c', _) => 8,
        (_, 1) => 8,
        (_, 8) => 2,
        (_, 2) => 8,
        _ => 4,
    };
    let mut out = String::new();
    let mut at = start;
    for i in 0..form.count {
        if i % per_line == 0 {
            let _ = write!(out, "{}{at:016x}:", if i > 0 { "\n" } else { "" }); // writing to a String cannot fail
        }
        match s.read(&cpu, at, form.size as usize, physical) {
            Ok(data) => {
                let value = data.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
                let _ = write!(out, " {}", shown(value, form));
            }
            Err(e) => {
                let _ = write!(out, " {}", e.desc);
                break;
            }
        }
        at = at.wrapping_add(form.size.into());
    }
    out.push('\n');
    Ok(out)
}

fn disassemble(s: &Shell<'_>, cpu: &CpuState, start: u64, count: u32, physical: bool) -> Result<String> {
    let mut out = String::new();
    let mut formatter = IntelFormatter::new();
    let mut at = start;
    for _ in 0..count.min(4096) {
        let mut code = Vec::new();
        // As much of the longest instruction as can be read.
        for n in (1..=15).rev() {
            if let Ok(bytes) = s.read(cpu, at, n, physical) {
                code = bytes;
                break;
            }
        }
        if code.is_empty() {
            let _ = writeln!(out, "{at:#010x}: unable to read memory"); // writing to a String cannot fail
            break;
        }
        let i = Decoder::with_ip(registers::code_bits(cpu), &code, at, DecoderOptions::NONE).decode();
        let mut text = String::new();
        formatter.format(&i, &mut text);
        let bytes: Vec<String> =
            code[..i.len().max(1).min(code.len())].iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(out, "{at:#010x}:  {:<24} {text}", bytes.join(" "));
        at = at.wrapping_add(i.len().max(1) as u64);
    }
    Ok(out)
}

fn print(s: &mut Shell<'_>, args: &str) -> Result<String> {
    let (form, rest) = form(args, 'd', 8)?;
    let cpu = s.cpu_state().ok();
    let value = expression::whole(need(rest, "val")?, cpu.as_ref())?;
    Ok(match form.format {
        'x' => format!("{value:#x}\n"),
        _ => format!("{}\n", shown(value, Form { size: 8, ..form })),
    })
}

fn port(args: &str, s: &Shell<'_>) -> Result<(Form, u16, String)> {
    let (form, rest) = form(args, 'x', 1)?;
    let cpu = s.cpu_state().ok();
    let (address, rest) = expression::parse(need(rest, "addr")?, cpu.as_ref())?;
    if form.size > 4 {
        return Err(Error::generic("ports are at most 32 bits wide"));
    }
    Ok((form, (address & 0xffff) as u16, rest.into()))
}

fn port_in(s: &mut Shell<'_>, args: &str) -> Result<String> {
    let (form, address, _) = port(args, s)?;
    let value = s.context.machine(move |m| {
        let mut data = vec![0; form.size as usize];
        m.bus().read(Space::Port, address.into(), &mut data);
        data.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b))
    })?;
    let (letter, width) = match form.size {
        1 => ('b', 2),
        2 => ('w', 4),
        _ => ('l', 8),
    };
    Ok(format!("port{letter}[{address:#06x}] = 0x{value:0width$x}\n"))
}

fn port_out(s: &mut Shell<'_>, args: &str) -> Result<String> {
    let (form, address, rest) = port(args, s)?;
    let cpu = s.cpu_state().ok();
    let value = expression::whole(need(&rest, "val")?, cpu.as_ref())?;
    s.context.machine(move |m| {
        m.bus().write(Space::Port, address.into(), &value.to_le_bytes()[..form.size as usize]);
    })?;
    Ok(String::new())
}

fn gva2gpa(s: &mut Shell<'_>, args: &str) -> Result<String> {
    let cpu = s.cpu_state()?;
    let address = expression::whole(need(args, "addr")?, Some(&cpu))?;
    let found = s.context.machine(move |m| machine::inspect::translate(m.memory(), &cpu, address))?;
    Ok(match found {
        Some(mapping) => format!("gpa: {:#x}\n", mapping.gpa),
        None => "Unmapped\n".into(),
    })
}

fn save(s: &mut Shell<'_>, args: &str, command: &str) -> Result<String> {
    let cpu = s.cpu_state()?;
    let (val, rest) = expression::parse(need(args, "val")?, Some(&cpu))?;
    let (size, rest) = expression::parse(need(rest, "size")?, Some(&cpu))?;
    let mut arguments = json!({ "val": val, "size": size, "filename": unquote(need(rest, "filename")?) });
    if command == "memsave" {
        arguments["cpu-index"] = s.cpu.into();
    }
    s.qmp(command, arguments).map(|_| String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        fn f(t: &str) -> (Form, &str) {
            form(t, 'x', 4).unwrap()
        }
        assert_eq!(f("/4xb 0x10"), (Form { count: 4, format: 'x', size: 1 }, "0x10"));
        assert_eq!(f("0x10"), (Form { count: 1, format: 'x', size: 4 }, "0x10"));
        assert_eq!(f("/c 1").0.size, 1);
        assert!(form("/99999999999x 1", 'x', 4).is_err() && form("/z 1", 'x', 4).is_err());
        assert_eq!(shown(0xff, Form { count: 1, format: 'd', size: 1 }), "-1");
        assert_eq!(shown(0x41, Form { count: 1, format: 'c', size: 1 }), "'A'");
        assert_eq!(shown(0x41, Form { count: 1, format: 'x', size: 2 }), "0x0041");
    }
}
