//! What differs between two outcomes of a case.

use crate::case::*;
use iced_x86::{Code, Decoder, DecoderOptions, Formatter, IntelFormatter, Mnemonic};
use std::fmt::Write;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Linear addresses from here on belong to the kernel, which reports faults there as protection faults whatever they
/// are.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// RF, set in what faults push and cleared by debuggers' ways.
const RF: u64 = 1 << 16;

fn hex(b: &[u8]) -> String {
    // Most significant byte first, in groups of eight.
    let mut s = String::new();
    for (n, chunk) in b.rchunks(8).rev().rev().enumerate() {
        if n > 0 {
            s.push('_');
        }
        for x in chunk.iter().rev() {
            let _ = write!(s, "{x:02x}");
        }
    }
    s
}

/// The instruction at the start of a case.
pub fn first_code(case: &Case) -> Code {
    Decoder::with_ip(case.bits, case.bytes(), case.regs.rip, DecoderOptions::NONE).decode().code()
}

/// The instruction at `rip`, which a fault has reported.
fn code_at(case: &Case, rip: u64) -> Code {
    let at = rip.wrapping_sub(case.regs.rip) as usize;
    match case.bytes().get(at..) {
        Some(bytes) => Decoder::new(case.bits, bytes, DecoderOptions::NONE).decode().code(),
        None => Code::INVALID,
    }
}

fn loads_control_word(case: &Case) -> bool {
    Decoder::with_ip(case.bits, case.bytes(), case.regs.rip, DecoderOptions::NONE)
        .iter()
        .any(|i| i.mnemonic() == Mnemonic::Fldcw)
}

/// Differences, as lines; empty if the outcomes agree.
pub fn compare(case: &Case, a: &Outcome, b: &Outcome) -> Vec<String> {
    let mut d = Vec::new();
    let mut number = |name: &str, x: u64, y: u64| {
        if x != y {
            d.push(format!("{name}: {x:#x} / {y:#x}"));
        }
    };
    // In which order the pieces of large operands are accessed is the processor's business, so where one faults in
    // several places, either will do.
    let code = code_at(case, a.regs.rip);
    let name = format!("{code:?}");
    let large = ["save", "rstor", "stenv", "ldenv", "m80", "askmov", "Cmps", "Lds", "Les", "Lss", "Bound"]
        .iter()
        .any(|n| name.contains(n));
    if !(large && matches!(a.vector, 12..=14) && matches!(b.vector, 12..=14)) {
        number("exception", a.vector.into(), b.vector.into());
        let kernel = a.vector == 14 && a.cr2 >= TASK_SIZE;
        let present = if kernel { 1 } else { 0 };
        number("error code", (a.error | present).into(), (b.error | present).into());
        number("cr2", a.cr2, b.cr2);
    }
    // PUSHA and POPA that fault have done a part of their work on some processors.
    let partial = ["Pusha", "Popa"].iter().any(|n| name.contains(n));
    if partial && a.vector == b.vector && a.vector != 3 {
        return d;
    }
    // Whether masked elements beyond a 16-bit offset wrap, or are checked against the limit, is the processor's business.
    if case.bits == 16
        && format!("{:?}", code_at(case, b.regs.rip)).contains("askmov")
        && a.vector != b.vector
    {
        return Vec::new();
    }
    let (x, y) = (&a.regs, &b.regs);
    number("rip", x.rip, y.rip);
    // On the way through the kernel, the upper half of a 16-bit stack's RSP gets lost, and null selectors become zero.
    let width = if case.bits == 64 { u64::MAX } else { 0xffff_ffff };
    let null = |s: u16| if s < 4 { 0 } else { u64::from(s) };
    for (n, name) in NAMES.iter().enumerate() {
        number(name, x.gpr[n] & width, y.gpr[n] & width);
    }
    for (n, name) in ["es", "ss", "ds"].iter().enumerate() {
        number(name, null(x.segments[n]), null(y.segments[n]));
    }
    let mask = !(u64::from(case.undefined) | RF);
    number("rflags", x.rflags & mask, y.rflags & mask);
    // Whether the result of an unmasked overflow or underflow is inexact as well is not computed.
    let inexact = if a.vector == 19 && x.mxcsr & 0x18 != 0 { 0x20 } else { 0 };
    // Dot products take several steps, and stop at the first that raises an unmasked exception.
    let dot = matches!(code.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd);
    if !(dot && a.vector == 19) {
        number("mxcsr", (x.mxcsr | inexact).into(), (y.mxcsr | inexact).into());
    }
    number("fcw", x.fcw.into(), y.fcw.into());
    number("fsw", x.fsw.into(), y.fsw.into());
    number("ftw", x.ftw.into(), y.ftw.into());
    // AMD's processors forget the pointers unless an exception is pending. The translator does not keep those of
    // instructions whose exceptions are masked; only a control word loaded later could show them.
    if x.fsw & 0x80 != 0 && !loads_control_word(case) {
        number("fop", x.fop.into(), y.fop.into());
        number("fip", x.fip << 16, y.fip << 16);
        number("fdp", x.fdp << 16, y.fdp << 16);
    }
    for n in 0..16 {
        if x.vec[n] != y.vec[n] {
            d.push(format!("ymm{n}: {} / {}", hex(&x.vec[n]), hex(&y.vec[n])));
        }
    }
    for n in 0..8 {
        if x.st[n] != y.st[n] {
            d.push(format!("st{n}: {} / {}", hex(&x.st[n]), hex(&y.st[n])));
        }
    }
    let ignored = |n: usize| case.ignore.iter().any(|(at, len)| (n as u32).wrapping_sub(*at) < *len);
    if a.data != b.data {
        let differing: Vec<usize> =
            (0..DATA_LEN).filter(|n| a.data[*n] != b.data[*n] && !ignored(*n)).collect();
        for n in differing.iter().take(8) {
            d.push(format!("[{:#x}]: {:#04x} / {:#04x}", DATA + *n as u64, a.data[*n], b.data[*n]));
        }
        if differing.len() > 8 {
            d.push(format!("... {} bytes of memory in all", differing.len()));
        }
    }
    d
}

/// The case, readable: instructions and everything that is not zero or usual.
pub fn describe(case: &Case) -> String {
    let mut s = String::new();
    let mut decoder = Decoder::with_ip(case.bits, case.bytes(), case.regs.rip, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    while decoder.can_decode() {
        let i = decoder.decode();
        let mut text = String::new();
        formatter.format(&i, &mut text);
        let at = (i.ip() - case.regs.rip) as usize;
        let bytes: Vec<String> = case.bytes()[at..at + i.len()].iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(s, "    {:#x}  {:<32} {text}   ; {:?}", i.ip(), bytes.join(" "), i.code());
    }
    let r = &case.regs;
    let plain = Regs::plain();
    for (n, name) in NAMES.iter().enumerate() {
        if r.gpr[n] != 0 {
            let _ = writeln!(s, "    {name} = {:#x}", r.gpr[n]);
        }
    }
    let mut unusual = |name: &str, x: u64, usual: u64| {
        if x != usual {
            let _ = writeln!(s, "    {name} = {x:#x}");
        }
    };
    unusual("rflags", r.rflags, plain.rflags);
    unusual("mxcsr", r.mxcsr.into(), plain.mxcsr.into());
    unusual("fcw", r.fcw.into(), plain.fcw.into());
    unusual("fsw", r.fsw.into(), 0);
    unusual("ftw", r.ftw.into(), 0);
    unusual("memory pattern", case.pattern.into(), 0);
    for n in 0..16 {
        if r.vec[n] != [0; 32] {
            let _ = writeln!(s, "    ymm{n} = {}", hex(&r.vec[n]));
        }
    }
    for n in 0..8 {
        if r.st[n] != [0; 10] {
            let _ = writeln!(s, "    st{n} = {}", hex(&r.st[n]));
        }
    }
    if case.patch_len != 0 {
        let (at, len) = (case.patch_at, case.patch_len as usize);
        let _ = writeln!(s, "    [{:#x}] = {:02x?}", DATA + u64::from(at), &case.patch[..len.min(64)]);
    }
    s
}
