//! IN, OUT, INS, OUTS.

use super::h;
use super::string::{advance, index, rep, repeat, repetition};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::op::{Next, Op, OpPtr};
use crate::state::{Cpu, Int, fl, reg, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

impl Cpu {
    /// Whether a port access is allowed: by IOPL, else by the bitmap in the task state segment (Intel SDM vol. 1,
    /// 19.5.2).
    fn check_port(&mut self, port: u16, len: u16) -> Res<()> {
        if !self.protected() || !self.v86() && self.cpl as u64 <= (self.flags & fl::IOPL) >> 12 {
            return Ok(());
        }
        let tr = self.tr;
        // Only a 32-bit (or 64-bit) TSS has a bitmap.
        let wide = tr.usable() && matches!(tr.attr & 0xf, 9 | 11);
        if !wide || tr.limit < 0x67 {
            return Err(self.gp(0));
        }
        let map = self.sys_read::<u16>(tr.base.wrapping_add(0x66))? as u32;
        let at = map + port as u32 / 8;
        if at + 1 > tr.limit {
            return Err(self.gp(0));
        }
        let bits = self.sys_read::<u16>(tr.base.wrapping_add(at as u64))?;
        let mask = ((1u32 << len) - 1) << (port & 7);
        if bits as u32 & mask != 0 { Err(self.gp(0)) } else { Ok(()) }
    }

    fn port_in<T: Int>(&mut self, port: u16) -> T {
        self.stats.ports += 1;
        let mut b = [0xff; 16];
        self.outside(|io| io.port_in(port, &mut b[..size_of::<T>()]));
        T::from_buf(&b)
    }

    fn port_out<T: Int>(&mut self, port: u16, value: T) {
        self.stats.ports += 1;
        let b = value.to_buf();
        self.outside(|io| io.port_out(port, &b[..size_of::<T>()]));
    }
}

/// The port: immediate in `op.imm`, or DX if bit 16 is set.
fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.imm & 0x1_0000 != 0 { cpu.get(reg::RDX) } else { op.imm as u16 }
}

fn input<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let p = port(cpu, op);
    cpu.check_port(p, size_of::<T>() as u16)?;
    let v = cpu.port_in::<T>(p);
    cpu.set(reg::RAX, v);
    Ok(())
}

fn output<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let p = port(cpu, op);
    cpu.check_port(p, size_of::<T>() as u16)?;
    let v = cpu.get::<T>(reg::RAX);
    cpu.port_out(p, v);
    Ok(())
}

fn ins_one<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<(u64, bool)> {
    let p = cpu.get::<u16>(reg::RDX);
    let len = size_of::<T>();
    cpu.check_port(p, len as u16)?;
    let di = index(cpu, op, reg::RDI);
    let lin = cpu.linear(seg::ES, di, len as u32, true)?;
    // The port is read only if the value can be stored.
    cpu.probe_write(seg::ES, lin, len)?;
    let v = cpu.port_in::<T>(p);
    cpu.write(seg::ES, lin, v)?;
    advance::<T>(cpu, op, reg::RDI, 1);
    Ok((1, false))
}

fn outs_one<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<(u64, bool)> {
    let p = cpu.get::<u16>(reg::RDX);
    let len = size_of::<T>();
    cpu.check_port(p, len as u16)?;
    let si = index(cpu, op, reg::RSI);
    let lin = cpu.linear(op.seg(), si, len as u32, false)?;
    let v = cpu.read::<T>(op.seg(), lin)?;
    cpu.port_out(p, v);
    advance::<T>(cpu, op, reg::RSI, 1);
    Ok((1, false))
}

fn string<T: Int, const OUT: bool>(cpu: &mut Cpu, op: OpPtr) -> Next {
    // The port's permission comes first, even if nothing is to be transferred.
    let port = cpu.get::<u16>(reg::RDX);
    if let Err(f) = cpu.check_port(port, size_of::<T>() as u16) {
        return op.fault(cpu, f);
    }
    let step = |cpu: &mut Cpu, op: &Op, _| if OUT { outs_one::<T>(cpu, op) } else { ins_one::<T>(cpu, op) };
    if op.imm == rep::NONE {
        let r = step(cpu, &op, 1).map(|_| ());
        return op.finish(cpu, r);
    }
    repeat(cpu, op, step)
}

/// Lowers the instructions of this family.
pub(super) fn lower(_ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    match i.mnemonic() {
        Mnemonic::In | Mnemonic::Out => {
            let out = i.mnemonic() == Mnemonic::Out;
            let (p, data) = if out { (0, 1) } else { (1, 0) };
            op.imm = if i.op_kind(p) == OpKind::Register { 0x1_0000 } else { i.immediate8() as u64 };
            op.handler = match (i.op_register(data).size(), out) {
                (1, false) => h!(input::<u8>),
                (2, false) => h!(input::<u16>),
                (_, false) => h!(input::<u32>),
                (1, true) => h!(output::<u8>),
                (2, true) => h!(output::<u16>),
                (_, true) => h!(output::<u32>),
            };
        }
        Mnemonic::Insb => op.handler = string::<u8, false>,
        Mnemonic::Insw => op.handler = string::<u16, false>,
        Mnemonic::Insd => op.handler = string::<u32, false>,
        Mnemonic::Outsb => op.handler = string::<u8, true>,
        Mnemonic::Outsw => op.handler = string::<u16, true>,
        Mnemonic::Outsd => op.handler = string::<u32, true>,
        _ => return None,
    }
    if i.is_string_instruction() {
        op.imm = repetition(i);
    }
    Some(Flow::Continue)
}
