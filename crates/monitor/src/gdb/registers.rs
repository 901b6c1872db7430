//! Registers in the order in which the target description names them.

use accel::CpuState;
use accel::state::seg;
use std::fmt::Write;
use std::sync::OnceLock;

/// A register: name, bits, type.
type Row = (&'static str, u32, &'static str);

/// `org.gnu.gdb.i386.core`, in GDB's order.
const CORE: &[Row] = &[
    ("rax", 64, "int64"),
    ("rbx", 64, "int64"),
    ("rcx", 64, "int64"),
    ("rdx", 64, "int64"),
    ("rsi", 64, "int64"),
    ("rdi", 64, "int64"),
    ("rbp", 64, "data_ptr"),
    ("rsp", 64, "data_ptr"),
    ("r8", 64, "int64"),
    ("r9", 64, "int64"),
    ("r10", 64, "int64"),
    ("r11", 64, "int64"),
    ("r12", 64, "int64"),
    ("r13", 64, "int64"),
    ("r14", 64, "int64"),
    ("r15", 64, "int64"),
    ("rip", 64, "code_ptr"),
    ("eflags", 32, "int32"),
    ("cs", 32, "int32"),
    ("ss", 32, "int32"),
    ("ds", 32, "int32"),
    ("es", 32, "int32"),
    ("fs", 32, "int32"),
    ("gs", 32, "int32"),
    ("st0", 80, "i387_ext"),
    ("st1", 80, "i387_ext"),
    ("st2", 80, "i387_ext"),
    ("st3", 80, "i387_ext"),
    ("st4", 80, "i387_ext"),
    ("st5", 80, "i387_ext"),
    ("st6", 80, "i387_ext"),
    ("st7", 80, "i387_ext"),
    ("fctrl", 32, "int"),
    ("fstat", 32, "int"),
    ("ftag", 32, "int"),
    ("fiseg", 32, "int"),
    ("fioff", 32, "int"),
    ("foseg", 32, "int"),
    ("fooff", 32, "int"),
    ("fop", 32, "int"),
];

/// `org.gnu.gdb.i386.sse`; XMM registers and MXCSR.
const XMM: usize = 16;

/// `org.gnu.gdb.i386.segments` and what system programmers want besides.
const SYSTEM: &[Row] = &[
    ("fs_base", 64, "int64"),
    ("gs_base", 64, "int64"),
    ("k_gs_base", 64, "int64"),
    ("cr0", 64, "int64"),
    ("cr2", 64, "int64"),
    ("cr3", 64, "int64"),
    ("cr4", 64, "int64"),
    ("cr8", 64, "int64"),
    ("efer", 64, "int64"),
];

/// Position of each general register of GDB's order in [`CpuState::gpr`].
const GPR: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];
const SEGMENTS: [usize; 6] = [seg::CS, seg::SS, seg::DS, seg::ES, seg::FS, seg::GS];
const KERNEL_GS_BASE: u32 = 0xc000_0102;

const FIRST_XMM: usize = CORE.len();
const MXCSR: usize = FIRST_XMM + XMM;
const FIRST_SYSTEM: usize = MXCSR + 1;
const COUNT: usize = FIRST_SYSTEM + SYSTEM.len();

/// The target description.
pub(super) fn description() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let mut out = "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target><architecture>i386:x86-64</architecture>"
            .to_owned();
        // Writing to a String cannot fail.
        let _ = write!(out, "<feature name=\"org.gnu.gdb.i386.core\">");
        for (name, bits, kind) in CORE {
            let _ = write!(out, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>");
        }
        out += "</feature><feature name=\"org.gnu.gdb.i386.sse\"><vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/><vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/><vector id=\"v16i8\" type=\"int8\" count=\"16\"/><vector id=\"v8i16\" type=\"int16\" count=\"8\"/><vector id=\"v4i32\" type=\"int32\" count=\"4\"/><vector id=\"v2i64\" type=\"int64\" count=\"2\"/><union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/><field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16i8\"/><field name=\"v8_int16\" type=\"v8i16\"/><field name=\"v4_int32\" type=\"v4i32\"/><field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>";
        for i in 0..XMM {
            let _ = write!(out, "<reg name=\"xmm{i}\" bitsize=\"128\" type=\"vec128\"/>");
        }
        out += "<reg name=\"mxcsr\" bitsize=\"32\" type=\"int\"/></feature><feature name=\"org.gnu.gdb.i386.segments\">";
        for (name, bits, kind) in &SYSTEM[..2] {
            let _ = write!(out, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>");
        }
        out += "</feature><feature name=\"kvasir.system\">";
        for (name, bits, kind) in &SYSTEM[2..] {
            let _ = write!(out, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"/>");
        }
        out + "</feature></target>"
    })
}

/// All registers.
pub(super) fn all(cpu: &CpuState) -> Vec<u8> {
    (0..COUNT).filter_map(|n| one(cpu, n)).flatten().collect()
}

fn legacy(cpu: &CpuState, at: usize, len: usize) -> Vec<u8> {
    cpu.xsave.get(at..at + len).map_or_else(|| vec![0; len], <[u8]>::to_vec)
}

/// One register.
pub(super) fn one(cpu: &CpuState, n: usize) -> Option<Vec<u8>> {
    let wide = |v: u64| Some(v.to_le_bytes().to_vec());
    let narrow = |v: u32| Some(v.to_le_bytes().to_vec());
    let word = |at: usize| u32::from(u16::from_le_bytes([legacy(cpu, at, 2)[0], legacy(cpu, at, 2)[1]]));
    match n {
        0..16 => wide(cpu.gpr[GPR[n]]),
        16 => wide(cpu.rip),
        17 => narrow(cpu.rflags as u32),
        18..24 => narrow(cpu.segments[SEGMENTS[n - 18]].selector.into()),
        24..32 => Some(legacy(cpu, 32 + 16 * (n - 24), 10)),
        32 => narrow(word(0)),
        33 => narrow(word(2)),
        34 => narrow(word(4) & 0xff),
        35..39 => narrow(0),
        39 => narrow(word(6)),
        FIRST_XMM..MXCSR => Some(legacy(cpu, 160 + 16 * (n - FIRST_XMM), 16)),
        MXCSR => Some(legacy(cpu, 24, 4)),
        FIRST_SYSTEM..COUNT => wide(match n - FIRST_SYSTEM {
            0 => cpu.segments[seg::FS].base,
            1 => cpu.segments[seg::GS].base,
            2 => cpu.msrs.iter().find(|(m, _)| *m == KERNEL_GS_BASE).map_or(0, |(_, v)| *v),
            3 => cpu.cr0,
            4 => cpu.cr2,
            5 => cpu.cr3,
            6 => cpu.cr4,
            7 => cpu.cr8,
            _ => cpu.efer,
        }),
        _ => None,
    }
}

/// Changes one register. Segment selectors and system registers are not changed: their hidden parts would not follow.
pub(super) fn set_one(cpu: &mut CpuState, n: usize, data: &[u8]) -> Option<()> {
    let wide = || Some(u64::from_le_bytes(data.try_into().ok()?));
    match n {
        0..16 => cpu.gpr[GPR[n]] = wide()?,
        16 => cpu.rip = wide()?,
        17 => {
            let flags = u32::from_le_bytes(data.try_into().ok()?);
            cpu.rflags = u64::from(flags) | 2;
        }
        24..32 => {
            let at = 32 + 16 * (n - 24);
            cpu.xsave.get_mut(at..at + 10)?.copy_from_slice(data.get(..10)?);
        }
        FIRST_XMM..MXCSR => {
            let at = 160 + 16 * (n - FIRST_XMM);
            cpu.xsave.get_mut(at..at + 16)?.copy_from_slice(data.get(..16)?);
        }
        n if n == FIRST_SYSTEM => cpu.segments[seg::FS].base = wide()?,
        n if n == FIRST_SYSTEM + 1 => cpu.segments[seg::GS].base = wide()?,
        // Writing what is there already is no change.
        _ if n < COUNT && one(cpu, n)? == data => {}
        _ => return None,
    }
    Some(())
}

/// Changes all registers that can be.
pub(super) fn set_all(cpu: &mut CpuState, data: &[u8]) -> Option<()> {
    let mut rest = data;
    for n in 0..COUNT {
        let len = one(cpu, n)?.len();
        if rest.is_empty() {
            break;
        }
        let (value, after) = rest.split_at_checked(len)?;
        // Those that cannot be changed stay.
        let _ = set_one(cpu, n, value);
        rest = after;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let mut cpu = CpuState { xsave: vec![0; 576], ..CpuState::default() };
        for i in 0..16 {
            cpu.gpr[i] = i as u64;
        }
        let data = all(&cpu);
        assert_eq!(data.len(), 17 * 8 + 7 * 4 + 80 + 8 * 4 + 256 + 4 + 9 * 8);
        // RBX is GDB's second.
        assert_eq!(one(&cpu, 1).unwrap(), 3u64.to_le_bytes());
        set_one(&mut cpu, 16, &0x1234u64.to_le_bytes()).unwrap();
        assert_eq!(cpu.rip, 0x1234);
        let mut other = CpuState { xsave: vec![0; 576], ..CpuState::default() };
        set_all(&mut other, &all(&cpu)).unwrap();
        assert_eq!((other.gpr, other.rip), (cpu.gpr, cpu.rip));
        assert!(set_one(&mut cpu, COUNT, &[0]).is_none() && set_one(&mut cpu, 0, &[0]).is_none());
    }

    #[test]
    fn the_description_names_every_register() {
        assert_eq!(description().matches("<reg ").count(), COUNT);
    }
}
