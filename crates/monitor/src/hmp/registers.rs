//! Registers: by name, and as `info registers` shows them.

use accel::CpuState;
use accel::state::Segment;
use std::fmt::Write;

const WIDE: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const NARROW: [&str; 8] = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi"];
const SEGMENTS: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];

/// A register's value.
pub(super) fn value(cpu: &CpuState, name: &str) -> Option<u64> {
    if let Some(i) = WIDE.iter().position(|n| *n == name) {
        return Some(cpu.gpr[i]);
    }
    if let Some(i) = NARROW.iter().position(|n| *n == name) {
        return Some(cpu.gpr[i] & 0xffff_ffff);
    }
    if let Some(i) = SEGMENTS.iter().position(|n| n.eq_ignore_ascii_case(name)) {
        return Some(cpu.segments[i].selector.into());
    }
    Some(match name {
        "rip" | "eip" | "pc" => cpu.rip,
        "eflags" | "rflags" => cpu.rflags,
        "cr0" => cpu.cr0,
        "cr2" => cpu.cr2,
        "cr3" => cpu.cr3,
        "cr4" => cpu.cr4,
        "cr8" => cpu.cr8,
        "efer" => cpu.efer,
        _ => return None,
    })
}

/// Width of the code that runs: 16, 32 or 64.
pub(super) fn code_bits(cpu: &CpuState) -> u32 {
    let cs = &cpu.segments[1];
    match (cpu.efer & 1 << 10 != 0 && cs.attributes & 1 << 13 != 0, cs.attributes & 1 << 14 != 0) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    }
}

/// The text of `info registers`.
pub(super) fn dump(index: u32, cpu: &CpuState) -> String {
    let mut out = format!("\nCPU#{index}\n");
    let long = cpu.efer & 1 << 10 != 0;
    let halted = u32::from(cpu.mp_state == accel::state::MpState::Halted);
    let flag = |bit: u32, c: char| if cpu.rflags >> bit & 1 != 0 { c } else { '-' };
    let flags: String = [(11, 'O'), (10, 'D'), (7, 'S'), (6, 'Z'), (4, 'A'), (2, 'P'), (0, 'C')]
        .iter()
        .map(
            |(bit, c)| {
                if *bit == 10 { if cpu.rflags >> 10 & 1 != 0 { 'D' } else { '-' } } else { flag(*bit, *c) }
            },
        )
        .collect();
    let cpl = cpu.segments[2].attributes >> 5 & 3;
    let state = format!("[{flags}] CPL={cpl} II={} A20=1 SMM=0 HLT={halted}", u32::from(cpu.events.shadow));
    let r = &cpu.gpr;
    // Writing to a String cannot fail.
    let _ = if long {
        let order =
            [(0, "RAX"), (3, "RBX"), (1, "RCX"), (2, "RDX"), (6, "RSI"), (7, "RDI"), (5, "RBP"), (4, "RSP")];
        for (i, (n, name)) in order.iter().enumerate() {
            let _ = write!(out, "{name}={:016x}{}", r[*n], if i % 4 == 3 { '\n' } else { ' ' });
        }
        for (n, value) in r.iter().enumerate().skip(8) {
            let _ = write!(out, "R{n:<2}={value:016x}{}", if n % 4 == 3 { '\n' } else { ' ' });
        }
        writeln!(out, "RIP={:016x} RFL={:08x} {state}", cpu.rip, cpu.rflags)
    } else {
        let order =
            [(0, "EAX"), (3, "EBX"), (1, "ECX"), (2, "EDX"), (6, "ESI"), (7, "EDI"), (5, "EBP"), (4, "ESP")];
        for (i, (n, name)) in order.iter().enumerate() {
            let _ = write!(out, "{name}={:08x}{}", r[*n] as u32, if i % 4 == 3 { '\n' } else { ' ' });
        }
        writeln!(out, "EIP={:08x} EFL={:08x} {state}", cpu.rip as u32, cpu.rflags)
    };
    for (name, s) in SEGMENTS.iter().zip(&cpu.segments) {
        segment(&mut out, &format!("{name} "), s, long);
    }
    segment(&mut out, "LDT", &cpu.ldtr, long);
    segment(&mut out, "TR ", &cpu.tr, long);
    let _ = if long {
        let _ = writeln!(out, "GDT=     {:016x} {:08x}", cpu.gdtr.base, cpu.gdtr.limit);
        let _ = writeln!(out, "IDT=     {:016x} {:08x}", cpu.idtr.base, cpu.idtr.limit);
        writeln!(out, "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}", cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4)
    } else {
        let _ = writeln!(out, "GDT=     {:08x} {:08x}", cpu.gdtr.base as u32, cpu.gdtr.limit);
        let _ = writeln!(out, "IDT=     {:08x} {:08x}", cpu.idtr.base as u32, cpu.idtr.limit);
        writeln!(out, "CR0={:08x} CR2={:08x} CR3={:08x} CR4={:08x}", cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4)
    };
    for i in 0..4 {
        let _ = write!(out, "DR{i}={:016x} ", cpu.dr[i]);
    }
    let _ = writeln!(out, "\nDR6={:016x} DR7={:016x}", cpu.dr[4], cpu.dr[5]);
    let _ = writeln!(out, "EFER={:016x}", cpu.efer);
    vectors(&mut out, &cpu.xsave);
    out
}

fn segment(out: &mut String, name: &str, s: &Segment, long: bool) {
    // The descriptor's second doubleword, as QEMU shows it.
    let present = s.attributes & Segment::UNUSABLE == 0;
    let attributes = if present { (s.attributes & 0xf0ff) << 8 } else { 0 };
    // Writing to a String cannot fail.
    let _ = if long {
        writeln!(out, "{name}={:04x} {:016x} {:08x} {attributes:08x}", s.selector, s.base, s.limit)
    } else {
        writeln!(out, "{name}={:04x} {:08x} {:08x} {attributes:08x}", s.selector, s.base as u32, s.limit)
    };
}

/// x87 and SSE registers, from the XSAVE area's legacy region (Intel SDM volume 1, 13.4.1).
fn vectors(out: &mut String, xsave: &[u8]) {
    if xsave.len() < 512 {
        return;
    }
    let u16_at = |i: usize| u16::from_le_bytes([xsave[i], xsave[i + 1]]);
    let u64_at = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| xsave[i + k]));
    let top = u16_at(2) >> 11 & 7;
    let mxcsr = u32::from_le_bytes(std::array::from_fn(|k| xsave[24 + k]));
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "FCW={:04x} FSW={:04x} [ST={top}] FTW={:02x} MXCSR={mxcsr:08x}",
        u16_at(0),
        u16_at(2),
        xsave[4]
    );
    for i in 0..8 {
        let at = 32 + 16 * i;
        let end = if i % 2 == 1 { '\n' } else { ' ' };
        let _ = write!(out, "FPR{i}={:016x} {:04x}{end}", u64_at(at), u16_at(at + 8));
    }
    for i in 0..16 {
        let at = 160 + 16 * i;
        let end = if i % 2 == 1 { '\n' } else { ' ' };
        let _ = write!(out, "XMM{i:02}={:016x} {:016x}{end}", u64_at(at + 8), u64_at(at));
    }
}
