//! Descriptor tables and descriptor checks: LGDT, LIDT, SGDT, SIDT, LLDT, SLDT, LTR, STR, LAR, LSL, VERR, VERW, ARPL.

use super::h;
use crate::decode::operand::{Kind, dst, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::{Res, vector};
use crate::flags::cc;
use crate::mmu::canonical;
use crate::op::Op;
use crate::segments::null;
use crate::state::{Cpu, Mode, Table, attr, cr};
use iced_x86::{Instruction, Mnemonic};

impl Cpu {
    /// Privileged: #GP unless CPL is 0.
    #[inline]
    pub(super) fn need_cpl0(&mut self) -> Res<()> {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// User-mode instruction prevention: SGDT, SIDT, SLDT, STR, SMSW.
    pub(super) fn check_umip(&mut self) -> Res<()> {
        if self.cr4 & cr::CR4_UMIP != 0 && self.cpl != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    /// Instructions that real and virtual-8086 mode do not have.
    fn need_protected(&mut self) -> Res<()> {
        if self.mode.contains(Mode::REAL) { Err(self.ud()) } else { Ok(()) }
    }

    /// A 16-bit operand: register `op.src`, or memory if `MEM`.
    pub(super) fn operand16<const MEM: bool>(&mut self, op: &Op) -> Res<u16> {
        if MEM {
            let lin = self.address(op, 2, false)?;
            self.read::<u16>(op.seg(), lin)
        } else {
            Ok(self.get(op.src))
        }
    }
}

/// `op.imm`: bytes of the base.
fn load_table<const IDT: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_cpl0()?;
    let wide = cpu.mode.is64();
    let lin = cpu.address(op, if wide { 10 } else { 6 }, false)?;
    let limit = cpu.read::<u16>(op.seg(), lin)?;
    let base = if wide {
        cpu.read::<u64>(op.seg(), lin.wrapping_add(2))?
    } else {
        let base = cpu.read::<u32>(op.seg(), lin.wrapping_add(2))? as u64;
        if op.imm == 3 { base & 0xff_ffff } else { base }
    };
    if wide && !canonical(base) {
        return Err(cpu.gp(0));
    }
    let t = Table { base, limit };
    if IDT {
        cpu.idtr = t
    } else {
        cpu.gdtr = t
    }
    Ok(())
}

fn store_table<const IDT: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.check_umip()?;
    let t = if IDT { cpu.idtr } else { cpu.gdtr };
    let len = if cpu.mode.is64() { 10 } else { 6 };
    let lin = cpu.address(op, len, true)?;
    let mut b = [0; 10];
    b[..2].copy_from_slice(&t.limit.to_le_bytes());
    b[2..].copy_from_slice(&t.base.to_le_bytes());
    cpu.write_bytes(op.seg(), lin, &b[..len as usize])
}

fn lldt<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_protected()?;
    cpu.need_cpl0()?;
    let selector = cpu.operand16::<MEM>(op)?;
    if selector & !3 == 0 {
        cpu.ldtr = null(selector);
        return Ok(());
    }
    let code = (selector & !3) as u32;
    if selector & 4 != 0 {
        return Err(cpu.gp(code));
    }
    let d = cpu.descriptor(selector, vector::GP)?;
    if d.kind() != 2 {
        return Err(cpu.gp(code));
    }
    if !d.present() {
        return Err(cpu.raise_with(vector::NP, code));
    }
    let mut ldt = d.load(selector);
    if cpu.long_mode() {
        ldt.base |= cpu.descriptor_high(d, selector, vector::GP)?;
    }
    cpu.ldtr = ldt;
    Ok(())
}

fn ltr<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_protected()?;
    cpu.need_cpl0()?;
    let selector = cpu.operand16::<MEM>(op)?;
    let code = (selector & !3) as u32;
    if selector & 4 != 0 {
        return Err(cpu.gp(code));
    }
    let d = cpu.descriptor(selector, vector::GP)?;
    if !cpu.is_available_tss(&d) {
        return Err(cpu.gp(code));
    }
    if !d.present() {
        return Err(cpu.raise_with(vector::NP, code));
    }
    let mut tr = d.load(selector);
    if cpu.long_mode() {
        tr.base |= cpu.descriptor_high(d, selector, vector::GP)?;
    }
    // Busy, in memory and in the register.
    cpu.sys_write(d.at.wrapping_add(5), (d.raw >> 40) as u8 | 2)?;
    tr.attr |= 2;
    cpu.tr = tr;
    Ok(())
}

/// SLDT, STR (and SMSW): a value to a register of the operand size, or two bytes to memory.
pub(super) fn store16(cpu: &mut Cpu, op: &Op, value: u64) -> Res<()> {
    match op.imm {
        0 => {
            let lin = cpu.address(op, 2, true)?;
            cpu.write(op.seg(), lin, value as u16)?;
        }
        2 => cpu.set(op.dst, value as u16),
        4 => cpu.set(op.dst, value as u32),
        _ => cpu.set(op.dst, value),
    }
    Ok(())
}

fn sldt(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_protected()?;
    cpu.check_umip()?;
    store16(cpu, op, cpu.ldtr.selector as u64)
}

fn str(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_protected()?;
    cpu.check_umip()?;
    store16(cpu, op, cpu.tr.selector as u64)
}

/// What LAR, LSL, VERR and VERW ask.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Question {
    Rights,
    Limit,
    Read,
    Write,
}

/// The answer, or `None` if the descriptor is not to be seen.
fn inspect(cpu: &mut Cpu, selector: u16, q: Question) -> Res<Option<u32>> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    let Some(d) = cpu.find_descriptor(selector)? else { return Ok(None) };
    let visible = d.is_conforming_code() || d.dpl() >= cpu.cpl && d.dpl() >= (selector & 3) as u8;
    if !visible {
        return Ok(None);
    }
    let long = cpu.long_mode();
    let user = d.attr() & attr::S != 0;
    Ok(match q {
        Question::Rights => {
            let ok = user
                || if long {
                    matches!(d.kind(), 2 | 9 | 11 | 12)
                } else {
                    matches!(d.kind(), 1..=5 | 9 | 11 | 12)
                };
            ok.then_some((d.raw >> 32) as u32 & 0x00ff_ff00)
        }
        Question::Limit => {
            let ok = user
                || if long { matches!(d.kind(), 2 | 9 | 11) } else { matches!(d.kind(), 1..=3 | 9 | 11) };
            ok.then(|| d.limit())
        }
        Question::Read => (user && (!d.is_code() || d.attr() & attr::RW != 0)).then_some(0),
        Question::Write => d.is_writable_data().then_some(0),
    })
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.cc = if on { cpu.cc | cc::ZF } else { cpu.cc & !cc::ZF };
}

fn lar_lsl<const MEM: bool, const LIMIT: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_protected()?;
    let selector = cpu.operand16::<MEM>(op)?;
    let r = inspect(cpu, selector, if LIMIT { Question::Limit } else { Question::Rights })?;
    if let Some(v) = r {
        match op.imm {
            2 => cpu.set(op.dst, v as u16),
            4 => cpu.set(op.dst, v),
            _ => cpu.set(op.dst, v as u64),
        }
    }
    set_zf(cpu, r.is_some());
    Ok(())
}

fn verify<const MEM: bool, const WRITE: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_protected()?;
    let selector = cpu.operand16::<MEM>(op)?;
    let r = inspect(cpu, selector, if WRITE { Question::Write } else { Question::Read })?;
    set_zf(cpu, r.is_some());
    Ok(())
}

fn arpl<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_protected()?;
    let rpl = cpu.get::<u16>(op.src) & 3;
    let raised = if MEM {
        let lin = cpu.address(op, 2, false)?;
        let a = cpu.read::<u16>(op.seg(), lin)?;
        if a & 3 < rpl {
            // Written only if there is something to change.
            let lin = cpu.address(op, 2, true)?;
            cpu.write(op.seg(), lin, a & !3 | rpl)?;
        }
        a & 3 < rpl
    } else {
        let a = cpu.get::<u16>(op.dst);
        if a & 3 < rpl {
            cpu.set(op.dst, a & !3 | rpl);
        }
        a & 3 < rpl
    };
    set_zf(cpu, raised);
    Ok(())
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let mem = |n| kind(i, n) == Kind::Mem;
    op.handler = match i.mnemonic() {
        Mnemonic::Lgdt | Mnemonic::Lidt => {
            // A 16-bit operand size takes 24 bits of the base.
            op.imm = if matches!(i.code(), iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16) {
                3
            } else {
                4
            };
            if i.mnemonic() == Mnemonic::Lidt { h!(load_table::<true>) } else { h!(load_table::<false>) }
        }
        Mnemonic::Sgdt => h!(store_table::<false>),
        Mnemonic::Sidt => h!(store_table::<true>),
        Mnemonic::Lldt | Mnemonic::Ltr => {
            if !mem(0) {
                src(i, 0, op);
            }
            match (i.mnemonic() == Mnemonic::Ltr, mem(0)) {
                (false, false) => h!(lldt::<false>),
                (false, true) => h!(lldt::<true>),
                (true, false) => h!(ltr::<false>),
                (true, true) => h!(ltr::<true>),
            }
        }
        Mnemonic::Sldt | Mnemonic::Str => {
            if !mem(0) {
                dst(i, 0, op);
                op.imm = size(i, 0) as u64;
            }
            if i.mnemonic() == Mnemonic::Str { h!(str) } else { h!(sldt) }
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            dst(i, 0, op);
            op.imm = size(i, 0) as u64;
            if !mem(1) {
                src(i, 1, op);
            }
            match (i.mnemonic() == Mnemonic::Lsl, mem(1)) {
                (false, false) => h!(lar_lsl::<false, false>),
                (false, true) => h!(lar_lsl::<true, false>),
                (true, false) => h!(lar_lsl::<false, true>),
                (true, true) => h!(lar_lsl::<true, true>),
            }
        }
        Mnemonic::Verr | Mnemonic::Verw => {
            if !mem(0) {
                src(i, 0, op);
            }
            match (i.mnemonic() == Mnemonic::Verw, mem(0)) {
                (false, false) => h!(verify::<false, false>),
                (false, true) => h!(verify::<true, false>),
                (true, false) => h!(verify::<false, true>),
                (true, true) => h!(verify::<true, true>),
            }
        }
        Mnemonic::Arpl if !ctx.mode.is64() => {
            src(i, 1, op);
            if mem(0) {
                h!(arpl::<true>)
            } else {
                dst(i, 0, op);
                h!(arpl::<false>)
            }
        }
        _ => return None,
    };
    Some(Flow::Continue)
}
