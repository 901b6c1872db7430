//! BMI1, BMI2, ADX and CRC32: ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, PDEP, PEXT, RORX, SARX, SHLX, SHRX, MULX, ADCX, ADOX.
#![allow(unsafe_code)] // host instructions

use super::{Ea, h};
use crate::decode::operand::{Kind, gpr, kind, size};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::flags::cc;
use crate::op::Op;
use crate::state::{Cpu, Int, Mode, reg};
use iced_x86::{Instruction, Mnemonic};
use std::arch::asm;

/// Operand sizes of these instructions.
trait Word: Int {
    fn andn(a: Self, b: Self, cc: u16) -> (Self, u16);
    fn bextr(a: Self, b: Self, cc: u16) -> (Self, u16);
    fn bzhi(a: Self, b: Self, cc: u16) -> (Self, u16);
    fn blsi(a: Self, cc: u16) -> (Self, u16);
    fn blsmsk(a: Self, cc: u16) -> (Self, u16);
    fn blsr(a: Self, cc: u16) -> (Self, u16);
    fn pdep(a: Self, mask: Self) -> Self;
    fn pext(a: Self, mask: Self) -> Self;
}

macro_rules! word {
    ($t:ty, $r:literal; $($two:ident)*; $($one:ident)*; $($plain:ident)*) => {
        impl Word for $t {
            $(fn $two(a: Self, b: Self, cc: u16) -> (Self, u16) {
                let (v, out): ($t, u16);
                // SAFETY: register arithmetic; the host has it, since CPUID promises it only then.
                unsafe {
                    asm!("add al, 0x7f", "sahf",
                        concat!(stringify!($two), " {0", $r, "}, {1", $r, "}, {2", $r, "}"), "lahf", "seto al",
                        out(reg) v, in(reg) a, in(reg) b, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (v, out)
            })*
            $(fn $one(a: Self, cc: u16) -> (Self, u16) {
                let (v, out): ($t, u16);
                // SAFETY: as above.
                unsafe {
                    asm!("add al, 0x7f", "sahf", concat!(stringify!($one), " {0", $r, "}, {1", $r, "}"), "lahf", "seto al",
                        out(reg) v, in(reg) a, inout("ax") cc => out, options(pure, nomem, nostack));
                }
                (v, out)
            })*
            $(fn $plain(a: Self, mask: Self) -> Self {
                let v: $t;
                // SAFETY: as above.
                unsafe {
                    asm!(concat!(stringify!($plain), " {0", $r, "}, {1", $r, "}, {2", $r, "}"),
                        out(reg) v, in(reg) a, in(reg) mask, options(pure, nomem, nostack, preserves_flags));
                }
                v
            })*
        }
    };
}
word!(u64, ""; andn bextr bzhi; blsi blsmsk blsr; pdep pext);
word!(u32, ":e"; andn bextr bzhi; blsi blsmsk blsr; pdep pext);

/// Second source register (or memory) by position: `op.imm` holds the register that VEX.vvvv names, as an offset.
#[inline(always)]
fn vvvv<T: Word>(cpu: &Cpu, op: &Op) -> T {
    cpu.get(op.imm as u8)
}

/// The r/m operand: register `op.src`, or memory.
#[inline(always)]
fn rm<T: Word, E: Ea, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<T> {
    if MEM {
        let lin = E::at(cpu, op, size_of::<T>() as u32, false)?;
        cpu.read::<T>(op.seg(), lin)
    } else {
        Ok(cpu.get(op.src))
    }
}

macro_rules! operations {
    ($($name:ident |$cpu:ident, $op:ident, $v:ident| $body:block)*) => {$(
        fn $name<T: Word, E: Ea, const MEM: bool>($cpu: &mut Cpu, $op: &Op) -> Res<()> {
            let $v: T = rm::<T, E, MEM>($cpu, $op)?;
            $body
            Ok(())
        }
    )*};
}

fn store<T: Word>(cpu: &mut Cpu, op: &Op, r: (T, u16)) {
    cpu.set(op.dst, r.0);
    cpu.cc = r.1;
}

operations! {
    andn |cpu, op, v| { let r = T::andn(vvvv(cpu, op), v, cpu.cc); store(cpu, op, r); }
    bextr |cpu, op, v| { let r = T::bextr(v, vvvv(cpu, op), cpu.cc); store(cpu, op, r); }
    bzhi |cpu, op, v| { let r = T::bzhi(v, vvvv(cpu, op), cpu.cc); store(cpu, op, r); }
    blsi |cpu, op, v| { let r = T::blsi(v, cpu.cc); store(cpu, op, r); }
    blsmsk |cpu, op, v| { let r = T::blsmsk(v, cpu.cc); store(cpu, op, r); }
    blsr |cpu, op, v| { let r = T::blsr(v, cpu.cc); store(cpu, op, r); }
    pdep |cpu, op, v| { let r = T::pdep(vvvv(cpu, op), v); cpu.set(op.dst, r); }
    pext |cpu, op, v| { let r = T::pext(vvvv(cpu, op), v); cpu.set(op.dst, r); }
    rorx |cpu, op, v| {
        let n = op.imm as u32 & (T::BITS - 1);
        let v = v.to_u64();
        let r = if n == 0 { v } else { v >> n | v << (T::BITS - n) };
        cpu.set(op.dst, T::from_u64(r));
    }
    sarx |cpu, op, v| {
        let n = vvvv::<T>(cpu, op).to_u64() & (T::BITS - 1) as u64;
        cpu.set(op.dst, T::from_u64((v.sext() as i64 >> n) as u64));
    }
    shlx |cpu, op, v| {
        let n = vvvv::<T>(cpu, op).to_u64() & (T::BITS - 1) as u64;
        cpu.set(op.dst, T::from_u64(v.to_u64() << n));
    }
    shrx |cpu, op, v| {
        let n = vvvv::<T>(cpu, op).to_u64() & (T::BITS - 1) as u64;
        cpu.set(op.dst, T::from_u64(v.to_u64() >> n));
    }
    mulx |cpu, op, v| {
        let p = cpu.get::<T>(reg::RDX).to_u64() as u128 * v.to_u64() as u128;
        // The low half first: if both name one register, it gets the high half.
        cpu.set(op.imm as u8, T::from_u64(p as u64));
        cpu.set(op.dst, T::from_u64((p >> T::BITS) as u64));
    }
    adcx |cpu, op, v| {
        let sum = cpu.get::<T>(op.dst).to_u64() as u128 + v.to_u64() as u128 + (cpu.cc & cc::CF != 0) as u128;
        cpu.set(op.dst, T::from_u64(sum as u64));
        cpu.cc = if sum >> T::BITS != 0 { cpu.cc | cc::CF } else { cpu.cc & !cc::CF };
    }
    adox |cpu, op, v| {
        let sum = cpu.get::<T>(op.dst).to_u64() as u128 + v.to_u64() as u128 + (cpu.cc & cc::OF != 0) as u128;
        cpu.set(op.dst, T::from_u64(sum as u64));
        cpu.cc = if sum >> T::BITS != 0 { cpu.cc | cc::OF } else { cpu.cc & !cc::OF };
    }
}

/// CRC32: polynomial 0x11edc6f41, by the host's instruction.
fn crc32<const BYTES: usize, E: Ea, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = if MEM {
        let lin = E::at(cpu, op, BYTES as u32, false)?;
        match BYTES {
            1 => cpu.read::<u8>(op.seg(), lin)? as u64,
            2 => cpu.read::<u16>(op.seg(), lin)? as u64,
            4 => cpu.read::<u32>(op.seg(), lin)? as u64,
            _ => cpu.read::<u64>(op.seg(), lin)?,
        }
    } else if BYTES == 1 {
        cpu.get::<u8>(op.src) as u64
    } else {
        cpu.get::<u64>(op.src)
    };
    let mut crc = cpu.get::<u32>(op.dst) as u64;
    // SAFETY: register arithmetic; CPUID promises it only if the host has it.
    unsafe {
        match BYTES {
            1 => {
                asm!("crc32 {0:e}, {1}", inout(reg) crc, in(reg_byte) v as u8, options(pure, nomem, nostack))
            }
            2 => asm!("crc32 {0:e}, {1:x}", inout(reg) crc, in(reg) v, options(pure, nomem, nostack)),
            4 => asm!("crc32 {0:e}, {1:e}", inout(reg) crc, in(reg) v, options(pure, nomem, nostack)),
            _ => asm!("crc32 {0}, {1}", inout(reg) crc, in(reg) v, options(pure, nomem, nostack)),
        }
    }
    cpu.set(op.dst, crc as u32 as u64);
    Ok(())
}

fn lower_crc32(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    op.dst = gpr(i.op0_register());
    let mem = kind(i, 1) == Kind::Mem;
    if !mem {
        op.src = gpr(i.op1_register());
    }
    macro_rules! pick {
        ($b:literal) => {
            match (mem, ctx.flat(op)) {
                (false, _) => h!(crc32::<$b, super::Flat, false>),
                (true, true) => h!(crc32::<$b, super::Flat, true>),
                (true, false) => h!(crc32::<$b, super::General, true>),
            }
        };
    }
    op.handler = match size(i, 1) {
        1 => pick!(1),
        2 => pick!(2),
        4 => pick!(4),
        _ => pick!(8),
    };
    Some(Flow::Continue)
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    macro_rules! form {
        ($f:ident, $rm:expr) => {{
            let mem = kind(i, $rm) == Kind::Mem;
            if !mem {
                op.src = gpr(i.op_register($rm));
            }
            op.dst = gpr(i.op0_register());
            op.handler = match (size(i, 0), mem, ctx.flat(op)) {
                (4, false, _) => h!($f::<u32, super::Flat, false>),
                (4, true, true) => h!($f::<u32, super::Flat, true>),
                (4, true, false) => h!($f::<u32, super::General, true>),
                (_, false, _) => h!($f::<u64, super::Flat, false>),
                (_, true, true) => h!($f::<u64, super::Flat, true>),
                (_, true, false) => h!($f::<u64, super::General, true>),
            };
            Some(Flow::Continue)
        }};
    }
    let m = i.mnemonic();
    let vex = matches!(
        m,
        Mnemonic::Andn
            | Mnemonic::Bextr
            | Mnemonic::Bzhi
            | Mnemonic::Blsi
            | Mnemonic::Blsmsk
            | Mnemonic::Blsr
            | Mnemonic::Pdep
            | Mnemonic::Pext
            | Mnemonic::Rorx
            | Mnemonic::Sarx
            | Mnemonic::Shlx
            | Mnemonic::Shrx
            | Mnemonic::Mulx
    );
    // The XOP form of BEXTR has an immediate, and is not offered; neither is VEX in real mode.
    if vex && (ctx.mode.contains(Mode::REAL) || i.encoding() != iced_x86::EncodingKind::VEX) {
        return None;
    }
    match m {
        Mnemonic::Andn => {
            op.imm = gpr(i.op1_register()) as u64;
            form!(andn, 2)
        }
        Mnemonic::Bextr => {
            op.imm = gpr(i.op2_register()) as u64;
            form!(bextr, 1)
        }
        Mnemonic::Bzhi => {
            op.imm = gpr(i.op2_register()) as u64;
            form!(bzhi, 1)
        }
        Mnemonic::Blsi => form!(blsi, 1),
        Mnemonic::Blsmsk => form!(blsmsk, 1),
        Mnemonic::Blsr => form!(blsr, 1),
        Mnemonic::Pdep => {
            op.imm = gpr(i.op1_register()) as u64;
            form!(pdep, 2)
        }
        Mnemonic::Pext => {
            op.imm = gpr(i.op1_register()) as u64;
            form!(pext, 2)
        }
        Mnemonic::Rorx => {
            op.imm = i.immediate8() as u64;
            form!(rorx, 1)
        }
        Mnemonic::Sarx => {
            op.imm = gpr(i.op2_register()) as u64;
            form!(sarx, 1)
        }
        Mnemonic::Shlx => {
            op.imm = gpr(i.op2_register()) as u64;
            form!(shlx, 1)
        }
        Mnemonic::Shrx => {
            op.imm = gpr(i.op2_register()) as u64;
            form!(shrx, 1)
        }
        Mnemonic::Mulx => {
            op.imm = gpr(i.op1_register()) as u64;
            form!(mulx, 2)
        }
        Mnemonic::Adcx => form!(adcx, 1),
        Mnemonic::Adox => form!(adox, 1),
        Mnemonic::Crc32 => lower_crc32(ctx, i, op),
        _ => None,
    }
}
