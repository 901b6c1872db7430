//! Control transfers beyond the segment: far JMP, CALL, RET; INT, IRET; SYSCALL, SYSRET, SYSENTER, SYSEXIT; segment loads.

use super::{ending, h};
use crate::decode::operand::{Kind, dst, kind, segment, size, src};
use crate::decode::{Ctx, Flow};
use crate::exception::{Event, Source};
use crate::fault::{Exception, Res, vector};
use crate::mmu::canonical;
use crate::op::{Next, Op};
use crate::segments::{Descriptor, flat_code, flat_data, null, stack_mask};
use crate::state::{Cpu, Mode, attr, cr, fl, reg, seg};
use crate::task::Reason;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// A far pointer: from the operation (`op.imm`: offset, `op.dst | op.src << 8`: selector), or from memory.
fn pointer<const MEM: bool>(cpu: &mut Cpu, op: &Op, bytes: u8) -> Res<(u16, u64)> {
    if !MEM {
        return Ok((op.dst as u16 | (op.src as u16) << 8, op.imm));
    }
    let lin = cpu.address(op, bytes as u32 + 2, false)?;
    let s = op.seg();
    let offset = match bytes {
        2 => cpu.read::<u16>(s, lin)? as u64,
        4 => cpu.read::<u32>(s, lin)? as u64,
        _ => cpu.read::<u64>(s, lin)?,
    };
    Ok((cpu.read::<u16>(s, lin.wrapping_add(bytes as u64))?, offset))
}

/// Checks an instruction pointer against a code segment about to be loaded.
fn check_ip(cpu: &mut Cpu, cs: &crate::state::Seg, ip: u64) -> Res<()> {
    let long = cpu.long_mode() && cs.attr & attr::L != 0;
    let ok = if long { canonical(ip) } else { ip <= cs.limit as u64 };
    if ok { Ok(()) } else { Err(cpu.gp(0)) }
}

/// Bytes of the operands of a far transfer.
fn far_jmp<const MEM: bool, const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    let (selector, ip) = pointer::<MEM>(cpu, op, BYTES)?;
    if cpu.mode.contains(Mode::REAL) {
        return cpu.far_real(selector, ip);
    }
    cpu.far_transfer(selector, ip, BYTES, false)?;
    Ok(cpu.next_block())
}

fn far_call<const MEM: bool, const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    let (selector, ip) = pointer::<MEM>(cpu, op, BYTES)?;
    if cpu.mode.contains(Mode::REAL) {
        let mut stack = cpu.current_stack();
        stack.push(cpu, BYTES, cpu.seg[seg::CS].selector as u64)?;
        stack.push(cpu, BYTES, cpu.rip)?;
        let next = cpu.far_real(selector, ip)?;
        cpu.use_stack(&stack);
        return Ok(next);
    }
    cpu.far_transfer(selector, ip, BYTES, true)?;
    Ok(cpu.next_block())
}

/// `op.imm` bytes of arguments are dropped.
fn far_ret<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    let mut stack = cpu.current_stack();
    let ip = stack.pop(cpu, BYTES)?;
    let selector = stack.pop(cpu, BYTES)? as u16;
    if cpu.mode.contains(Mode::REAL) {
        let next = cpu.far_real(selector, ip)?;
        stack.skip(op.imm);
        cpu.use_stack(&stack);
        return Ok(next);
    }
    let cpl = (selector & 3) as u8;
    if cpl < cpu.cpl {
        return Err(cpu.gp((selector & !3) as u32));
    }
    let cs = cpu.return_code(selector, cpl)?;
    check_ip(cpu, &cs, ip)?;
    stack.skip(op.imm);
    if cpl == cpu.cpl {
        cpu.use_stack(&stack);
        cpu.seg[seg::CS] = cs;
        cpu.rip = ip;
        cpu.update_mode();
        return Ok(cpu.next_block());
    }
    let sp = stack.pop(cpu, BYTES)?;
    let ss_selector = stack.pop(cpu, BYTES)? as u16;
    let ss = cpu.return_stack(ss_selector, cpl, cs.attr & attr::L != 0)?;
    cpu.seg[seg::CS] = cs;
    cpu.rip = ip;
    cpu.cpl = cpl;
    cpu.outer_stack(ss, sp.wrapping_add(op.imm), BYTES);
    cpu.update_mode();
    cpu.drop_inner_segments();
    Ok(cpu.next_block())
}

fn int_n(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    if op.imm as u8 == vector::BP && cpu.debugger_breaks() {
        return Err(cpu.raise_exception(Exception { vector: vector::BP, trap: true, ..Default::default() }));
    }
    software_interrupt(cpu, op.imm as u8)
}

fn into(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    if cpu.cc & crate::flags::cc::OF == 0 {
        return Ok(cpu.next_block());
    }
    software_interrupt(cpu, vector::OF)
}

fn int1(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    Err(cpu.raise_exception(Exception { vector: vector::DB, trap: true, ..Default::default() }))
}

fn software_interrupt(cpu: &mut Cpu, v: u8) -> Res<Next> {
    cpu.deliver(Event { vector: v, error: None, source: Source::Software, fault: false })?;
    // The single-step trap of the interrupted code is not taken at the handler's first instruction.
    cpu.step_armed = false;
    Ok(cpu.next_block())
}

fn iret<const BYTES: u8>(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    if cpu.long_mode() {
        iret_long(cpu, BYTES)?
    } else {
        iret_legacy(cpu, BYTES)?
    }
    cpu.nmi_masked = false;
    if cpu.nmi_pending {
        cpu.signals.raise(accel::Signal::NMI);
    }
    Ok(cpu.next_block())
}

/// Flags that IRET changes.
fn iret_flags(cpu: &mut Cpu, new: u64, bytes: u8, cpl: u8) {
    let mut may = fl::ARITH | fl::TF | fl::DF | fl::NT;
    if bytes > 2 {
        may |= fl::RF | fl::AC | fl::ID;
    }
    if cpl == 0 {
        may |= fl::IOPL;
        if bytes > 2 {
            may |= fl::VIF | fl::VIP;
        }
    }
    if cpl as u64 <= cpu.flags >> 12 & 3 {
        may |= fl::IF;
    }
    let mut f = cpu.rflags() & !may | new & may;
    if cpu.active_dr7() & 0xff == 0 {
        // RF only matters to instruction breakpoints, and is gone after the next instruction.
        f &= !fl::RF;
    }
    cpu.rf_loaded = f & fl::RF != 0;
    cpu.set_flags(f);
}

fn iret_long(cpu: &mut Cpu, bytes: u8) -> Res<()> {
    if cpu.flags & fl::NT != 0 {
        return Err(cpu.gp(0));
    }
    let mut stack = cpu.current_stack();
    let ip = stack.pop(cpu, bytes)?;
    let selector = stack.pop(cpu, bytes)? as u16;
    let flags = stack.pop(cpu, bytes)?;
    let cpl = (selector & 3) as u8;
    if cpl < cpu.cpl {
        return Err(cpu.gp((selector & !3) as u32));
    }
    let cs = cpu.return_code(selector, cpl)?;
    check_ip(cpu, &cs, ip)?;
    let old = cpu.cpl;
    if cpl != old || cpu.mode.is64() {
        let sp = stack.pop(cpu, bytes)?;
        let ss_selector = stack.pop(cpu, bytes)? as u16;
        let ss = cpu.return_stack(ss_selector, cpl, cs.attr & attr::L != 0)?;
        cpu.seg[seg::CS] = cs;
        cpu.cpl = cpl;
        cpu.rip = ip;
        cpu.outer_stack(ss, sp, bytes);
    } else {
        cpu.use_stack(&stack);
        cpu.seg[seg::CS] = cs;
        cpu.rip = ip;
    }
    iret_flags(cpu, flags, bytes, old);
    cpu.update_mode();
    if cpl != old {
        cpu.drop_inner_segments();
    }
    Ok(())
}

fn iret_legacy(cpu: &mut Cpu, bytes: u8) -> Res<()> {
    if cpu.mode.contains(Mode::REAL) {
        return iret_real(cpu, bytes);
    }
    if cpu.flags & fl::NT != 0 {
        return cpu.task_return();
    }
    let mut stack = cpu.current_stack();
    let ip = stack.pop(cpu, bytes)?;
    let selector = stack.pop(cpu, bytes)? as u16;
    let flags = stack.pop(cpu, bytes)?;
    if flags & fl::VM != 0 && bytes == 4 && cpu.cpl == 0 {
        let sp = stack.pop(cpu, 4)?;
        let mut selectors = [0; 6];
        for s in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
            selectors[s] = stack.pop(cpu, 4)? as u16;
        }
        selectors[seg::CS] = selector;
        cpu.cpl = 3;
        cpu.set_flags(flags);
        for (s, selector) in selectors.iter().enumerate() {
            cpu.load_real(s, *selector);
        }
        cpu.regs[4] = sp;
        cpu.rip = ip & 0xffff;
        cpu.update_mode();
        return Ok(());
    }
    let cpl = (selector & 3) as u8;
    if cpl < cpu.cpl {
        return Err(cpu.gp((selector & !3) as u32));
    }
    let cs = cpu.return_code(selector, cpl)?;
    check_ip(cpu, &cs, ip)?;
    let old = cpu.cpl;
    if cpl == old {
        cpu.use_stack(&stack);
        cpu.seg[seg::CS] = cs;
        cpu.rip = ip;
    } else {
        let sp = stack.pop(cpu, bytes)?;
        let ss_selector = stack.pop(cpu, bytes)? as u16;
        let ss = cpu.return_stack(ss_selector, cpl, false)?;
        cpu.seg[seg::CS] = cs;
        cpu.cpl = cpl;
        cpu.rip = ip;
        cpu.outer_stack(ss, sp, bytes);
    }
    iret_flags(cpu, flags & !fl::VM, bytes, old);
    cpu.update_mode();
    if cpl != old {
        cpu.drop_inner_segments();
    }
    Ok(())
}

fn iret_real(cpu: &mut Cpu, bytes: u8) -> Res<()> {
    if cpu.v86() && cpu.flags & fl::IOPL != fl::IOPL {
        return Err(cpu.gp(0));
    }
    let mut stack = cpu.current_stack();
    let ip = stack.pop(cpu, bytes)?;
    let selector = stack.pop(cpu, bytes)? as u16;
    let flags = stack.pop(cpu, bytes)?;
    if ip > cpu.seg[seg::CS].limit as u64 {
        return Err(cpu.gp(0));
    }
    cpu.use_stack(&stack);
    cpu.load_real(seg::CS, selector);
    cpu.rip = ip;
    let mut may = fl::ARITH | fl::TF | fl::DF | fl::IF | fl::NT;
    if bytes == 4 {
        may |= fl::RF | fl::AC | fl::ID;
    }
    if !cpu.v86() {
        may |= fl::IOPL;
    }
    let f = cpu.rflags() & !may | flags & may;
    cpu.set_flags(f & !fl::RF);
    cpu.update_mode();
    Ok(())
}

impl Cpu {
    /// Far transfer in real and virtual-8086 mode.
    fn far_real(&mut self, selector: u16, ip: u64) -> Res<Next> {
        if ip > self.seg[seg::CS].limit as u64 && !self.v86() || ip > 0xffff && self.v86() {
            return Err(self.gp(0));
        }
        self.load_real(seg::CS, selector);
        self.rip = ip;
        self.update_mode();
        Ok(self.next_block())
    }

    /// Code segment of a return (RET, IRET) to privilege level `cpl`.
    fn return_code(&mut self, selector: u16, cpl: u8) -> Res<crate::state::Seg> {
        let code = (selector & !3) as u32;
        let d = self.descriptor(selector, vector::GP)?;
        let privilege = if d.is_conforming_code() { d.dpl() <= cpl } else { d.dpl() == cpl };
        let size = self.long_mode() && d.attr() & (attr::L | attr::DB) == attr::L | attr::DB;
        if !d.is_code() || !privilege || size {
            return Err(self.gp(code));
        }
        if !d.present() {
            return Err(self.raise_with(vector::NP, code));
        }
        self.mark_accessed(d)?;
        Ok(d.load(selector))
    }

    /// Stack segment of a return to privilege level `cpl`.
    fn return_stack(&mut self, selector: u16, cpl: u8, long: bool) -> Res<crate::state::Seg> {
        if selector & !3 == 0 {
            // Null is fine for 64-bit code below level 3.
            if long && cpl < 3 && (selector & 3) as u8 == cpl {
                let mut s = null(selector);
                s.attr |= (cpl as u32) << attr::DPL_SHIFT;
                return Ok(s);
            }
            return Err(self.gp(0));
        }
        self.stack_segment(selector, cpl, vector::GP)
    }

    /// Makes a popped stack current.
    fn outer_stack(&mut self, ss: crate::state::Seg, sp: u64, bytes: u8) {
        let long = self.long_mode() && self.seg[seg::CS].attr & attr::L != 0;
        self.seg[seg::SS] = ss;
        if long {
            self.regs[4] = if bytes == 8 { sp } else { sp & ((1 << (bytes * 8)) - 1) };
        } else {
            let mask = stack_mask(&ss);
            self.regs[4] = self.regs[4] & !mask & 0xffff_ffff | sp & mask;
        }
    }

    /// Far JMP or CALL in protected mode.
    fn far_transfer(&mut self, selector: u16, ip: u64, bytes: u8, call: bool) -> Res<()> {
        let code = (selector & !3) as u32;
        let d = self.descriptor(selector, vector::GP)?;
        let rpl = (selector & 3) as u8;
        if d.is_code() {
            let privilege = if d.is_conforming_code() {
                d.dpl() <= self.cpl
            } else {
                rpl <= self.cpl && d.dpl() == self.cpl
            };
            let both = self.long_mode() && d.attr() & (attr::L | attr::DB) == attr::L | attr::DB;
            if !privilege || both {
                return Err(self.gp(code));
            }
            if !d.present() {
                return Err(self.raise_with(vector::NP, code));
            }
            self.mark_accessed(d)?;
            let mut cs = d.load(selector);
            cs.selector = selector & !3 | self.cpl as u16;
            let ip = if bytes == 2 { ip & 0xffff } else { ip };
            check_ip(self, &cs, ip)?;
            if call {
                let mut stack = self.current_stack();
                stack.push(self, bytes, self.seg[seg::CS].selector as u64)?;
                stack.push(self, bytes, self.rip)?;
                self.use_stack(&stack);
            }
            self.seg[seg::CS] = cs;
            self.rip = ip;
            self.update_mode();
            return Ok(());
        }
        let visible = d.dpl() >= self.cpl && rpl <= d.dpl();
        if d.attr() & attr::S != 0 || !visible {
            return Err(self.gp(code));
        }
        let reason = if call { Reason::Call } else { Reason::Jump };
        match (d.kind(), self.long_mode()) {
            (12, _) | (4, false) => self.call_gate(d, selector, call),
            (5, false) => {
                if !d.present() {
                    return Err(self.raise_with(vector::NP, code));
                }
                self.task_switch((d.raw >> 16) as u16, reason, None)
            }
            (1 | 9, false) if self.is_available_tss(&d) => self.task_switch(selector, reason, None),
            _ => Err(self.gp(code)),
        }
    }

    /// Through a call gate.
    fn call_gate(&mut self, gate: Descriptor, gate_selector: u16, call: bool) -> Res<()> {
        let long = self.long_mode();
        let gate_code = (gate_selector & !3) as u32;
        if !gate.present() {
            return Err(self.raise_with(vector::NP, gate_code));
        }
        let wide = gate.kind() == 12;
        let bytes = if long {
            8
        } else if wide {
            4
        } else {
            2
        };
        let selector = (gate.raw >> 16) as u16;
        let mut ip = gate.raw & 0xffff;
        if wide {
            ip |= gate.raw >> 32 & 0xffff_0000;
        }
        if long {
            ip |= self.descriptor_high(gate, gate_selector, vector::GP)?;
        }
        let code = (selector & !3) as u32;
        let d = self.descriptor(selector, vector::GP)?;
        let size = long && d.attr() & (attr::L | attr::DB) != attr::L;
        let privilege = d.dpl() <= self.cpl && (call || d.is_conforming_code() || d.dpl() == self.cpl);
        if !d.is_code() || !privilege || size {
            return Err(self.gp(code));
        }
        if !d.present() {
            return Err(self.raise_with(vector::NP, code));
        }
        self.mark_accessed(d)?;
        let mut cs = d.load(selector);
        check_ip(self, &cs, ip)?;
        let inner = call && !d.is_conforming_code() && d.dpl() < self.cpl;
        let cpl = if inner { d.dpl() } else { self.cpl };
        let (old_cs, old_ip) = (self.seg[seg::CS].selector as u64, self.rip);
        let mut stack = self.current_stack();
        if inner {
            let (ss, sp) = (self.seg[seg::SS].selector as u64, self.regs[4]);
            let mut old = stack;
            stack = self.inner_stack(cpl)?;
            stack.push(self, bytes, ss)?;
            stack.push(self, bytes, sp)?;
            if !long {
                // Arguments move to the new stack, in the same order.
                let count = (gate.raw >> 32 & 31) as usize;
                let mut arguments = [0; 32];
                for a in arguments.iter_mut().take(count) {
                    *a = old.pop(self, bytes)?;
                }
                for a in arguments[..count].iter().rev() {
                    stack.push(self, bytes, *a)?;
                }
            }
        } else if long {
            stack.long = true;
            stack.mask = u64::MAX;
        }
        if call {
            stack.push(self, bytes, old_cs)?;
            stack.push(self, bytes, old_ip)?;
            self.use_stack(&stack);
        }
        cs.selector = selector & !3 | cpl as u16;
        self.seg[seg::CS] = cs;
        self.cpl = cpl;
        self.rip = ip;
        self.update_mode();
        Ok(())
    }

    pub(super) fn is_amd(&self) -> bool {
        // "Auth" in EBX of leaf 0.
        self.cpuid.query(0, 0)[1] == 0x6874_7541
    }
}

fn syscall(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    if cpu.efer & cr::EFER_SCE == 0 || !cpu.protected() || cpu.v86() || !cpu.long_mode() && !cpu.is_amd() {
        return Err(cpu.ud());
    }
    let star = cpu.msr.star;
    let selector = (star >> 32) as u16 & !3;
    if cpu.long_mode() {
        let from64 = cpu.mode.is64();
        if !from64 && !cpu.is_amd() {
            return Err(cpu.ud());
        }
        let flags = cpu.rflags() & !fl::RF;
        cpu.regs[1] = cpu.rip;
        cpu.regs[11] = flags;
        cpu.rip = if from64 { cpu.msr.lstar } else { cpu.msr.cstar };
        cpu.seg[seg::CS] = flat_code(selector, 0, true);
        cpu.cpl = 0;
        let keep = !cpu.msr.fmask;
        cpu.set_flags(flags & keep & !fl::RF);
    } else {
        cpu.set(reg::RCX, cpu.rip as u32);
        cpu.rip = star & 0xffff_ffff;
        cpu.seg[seg::CS] = flat_code(selector, 0, false);
        cpu.cpl = 0;
        let f = cpu.rflags() & !(fl::IF | fl::RF | fl::VM);
        cpu.set_flags(f);
    }
    cpu.seg[seg::SS] = flat_data(selector.wrapping_add(8), 0);
    // Whether there is a single-step trap depends on TF as it is now.
    cpu.step_armed = cpu.flags & fl::TF != 0;
    cpu.update_mode();
    Ok(cpu.next_block())
}

fn sysret<const WIDE: bool>(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    if cpu.efer & cr::EFER_SCE == 0 || !cpu.protected() || cpu.v86() || !cpu.long_mode() && !cpu.is_amd() {
        return Err(cpu.ud());
    }
    if cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let base = (cpu.msr.star >> 48) as u16;
    if WIDE {
        let to = cpu.regs[1];
        if !canonical(to) && !cpu.is_amd() {
            return Err(cpu.gp(0));
        }
        cpu.seg[seg::CS] = flat_code(base.wrapping_add(16) | 3, 3, true);
        cpu.rip = to;
    } else {
        cpu.seg[seg::CS] = flat_code(base | 3, 3, false);
        cpu.rip = cpu.regs[1] & 0xffff_ffff;
    }
    cpu.seg[seg::SS] = flat_data(base.wrapping_add(8) | 3, 3);
    let flags =
        if cpu.long_mode() { cpu.regs[11] & fl::ALL & !(fl::RF | fl::VM) } else { cpu.rflags() | fl::IF };
    cpu.cpl = 3;
    cpu.set_flags(flags);
    cpu.update_mode();
    if cpu.flags & fl::TF != 0 {
        // The single-step trap comes at the end of SYSRET already.
        return Err(cpu.raise_db(crate::exec::dr6::BS, true));
    }
    Ok(cpu.next_block())
}

fn sysenter(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    if cpu.long_mode() && cpu.is_amd() {
        return Err(cpu.ud());
    }
    let cs = cpu.msr.sysenter_cs as u16 & !3;
    if !cpu.protected() || cs == 0 {
        return Err(cpu.gp(0));
    }
    let long = cpu.long_mode();
    let f = cpu.rflags() & !(fl::VM | fl::IF | fl::RF);
    cpu.cpl = 0;
    cpu.set_flags(f);
    cpu.seg[seg::CS] = flat_code(cs, 0, long);
    cpu.seg[seg::SS] = flat_data(cs.wrapping_add(8), 0);
    let (esp, eip) = (cpu.msr.sysenter_esp, cpu.msr.sysenter_eip);
    cpu.regs[4] = if long { esp } else { esp & 0xffff_ffff };
    cpu.rip = if long { eip } else { eip & 0xffff_ffff };
    cpu.update_mode();
    Ok(cpu.next_block())
}

fn sysexit<const WIDE: bool>(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    if cpu.long_mode() && cpu.is_amd() {
        return Err(cpu.ud());
    }
    let cs = cpu.msr.sysenter_cs as u16 & !3;
    if !cpu.protected() || cs == 0 || cpu.cpl != 0 || cpu.v86() {
        return Err(cpu.gp(0));
    }
    let (ip, sp) = (cpu.regs[2], cpu.regs[1]);
    if WIDE && !(canonical(ip) && canonical(sp)) {
        return Err(cpu.gp(0));
    }
    let (code, stack) = if WIDE { (32, 40) } else { (16, 24) };
    cpu.seg[seg::CS] = flat_code(cs.wrapping_add(code) | 3, 3, WIDE);
    cpu.seg[seg::SS] = flat_data(cs.wrapping_add(stack) | 3, 3);
    cpu.rip = if WIDE { ip } else { ip & 0xffff_ffff };
    cpu.regs[4] = if WIDE { sp } else { sp & 0xffff_ffff };
    cpu.cpl = 3;
    cpu.update_mode();
    Ok(cpu.next_block())
}

/// MOV to a segment register: selector from register `op.src`, into segment `op.dst`.
fn mov_seg_r(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let selector = cpu.get(op.src);
    cpu.load_segment(op.dst as usize % 6, selector)
}

fn mov_seg_m(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = cpu.address(op, 2, false)?;
    let selector = cpu.read::<u16>(op.seg(), lin)?;
    cpu.load_segment(op.dst as usize % 6, selector)
}

fn mov_ss<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    if MEM {
        mov_seg_m(cpu, op)?
    } else {
        mov_seg_r(cpu, op)?
    }
    Ok(cpu.after_segment_load(seg::SS))
}

/// MOV from a segment register: `op.src` is the segment. To memory always two bytes.
fn mov_r_seg<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let selector = cpu.seg[op.src as usize % 6].selector;
    match BYTES {
        2 => cpu.set(op.dst, selector),
        4 => cpu.set(op.dst, selector as u32),
        _ => cpu.set(op.dst, selector as u64),
    }
    Ok(())
}

fn mov_m_seg(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = cpu.address(op, 2, true)?;
    let selector = cpu.seg[op.src as usize % 6].selector;
    cpu.write(op.seg(), lin, selector)
}

/// LDS, LES, LFS, LGS, LSS: register `op.dst`, segment `op.imm`.
fn load_far<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let (selector, offset) = pointer::<true>(cpu, op, BYTES)?;
    cpu.load_segment(op.imm as usize % 6, selector)?;
    match BYTES {
        2 => cpu.set(op.dst, offset as u16),
        4 => cpu.set(op.dst, offset as u32),
        _ => cpu.set(op.dst, offset),
    }
    Ok(())
}

fn load_ss<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    load_far::<BYTES>(cpu, op)?;
    // Unlike MOV SS, LSS loads the stack pointer with it and needs no shadow.
    Ok(cpu.next_block())
}

fn lower_segment_move(i: &Instruction, op: &mut Op) -> Option<Flow> {
    if i.op0_kind() == OpKind::Register
        && let Some(s) = segment(i.op0_register())
    {
        op.dst = s;
        let mem = kind(i, 1) == Kind::Mem;
        if !mem {
            src(i, 1, op);
        }
        if s as usize == seg::SS {
            op.handler = if mem { ending!(mov_ss::<true>) } else { ending!(mov_ss::<false>) };
            return Some(Flow::End);
        }
        op.handler = if mem { h!(mov_seg_m) } else { h!(mov_seg_r) };
        return Some(Flow::Continue);
    }
    if i.op_count() == 2 && i.op1_kind() == OpKind::Register {
        op.src = segment(i.op1_register())?;
        op.handler = if kind(i, 0) == Kind::Mem {
            h!(mov_m_seg)
        } else {
            dst(i, 0, op);
            match size(i, 0) {
                2 => h!(mov_r_seg::<2>),
                4 => h!(mov_r_seg::<4>),
                _ => h!(mov_r_seg::<8>),
            }
        };
        return Some(Flow::Continue);
    }
    None
}

fn lower_load_far(i: &Instruction, op: &mut Op) -> Option<Flow> {
    let s = match i.mnemonic() {
        Mnemonic::Les => seg::ES,
        Mnemonic::Lds => seg::DS,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    };
    dst(i, 0, op);
    op.imm = s as u64;
    if s == seg::SS {
        op.handler = match size(i, 0) {
            2 => ending!(load_ss::<2>),
            4 => ending!(load_ss::<4>),
            _ => ending!(load_ss::<8>),
        };
        return Some(Flow::End);
    }
    op.handler = match size(i, 0) {
        2 => h!(load_far::<2>),
        4 => h!(load_far::<4>),
        _ => h!(load_far::<8>),
    };
    Some(Flow::Continue)
}

/// Lowers the instructions of this family.
pub(super) fn lower(_ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let direct = |op: &mut Op| {
        let (selector, offset) = match i.op0_kind() {
            OpKind::FarBranch16 => (i.far_branch_selector(), i.far_branch16() as u64),
            _ => (i.far_branch_selector(), i.far_branch32() as u64),
        };
        (op.dst, op.src, op.imm) = (selector as u8, (selector >> 8) as u8, offset);
    };
    op.handler = match i.code() {
        Code::Jmp_ptr1616 => {
            direct(op);
            ending!(far_jmp::<false, 2>)
        }
        Code::Jmp_ptr1632 => {
            direct(op);
            ending!(far_jmp::<false, 4>)
        }
        Code::Jmp_m1616 => ending!(far_jmp::<true, 2>),
        Code::Jmp_m1632 => ending!(far_jmp::<true, 4>),
        Code::Jmp_m1664 => ending!(far_jmp::<true, 8>),
        Code::Call_ptr1616 => {
            direct(op);
            ending!(far_call::<false, 2>)
        }
        Code::Call_ptr1632 => {
            direct(op);
            ending!(far_call::<false, 4>)
        }
        Code::Call_m1616 => ending!(far_call::<true, 2>),
        Code::Call_m1632 => ending!(far_call::<true, 4>),
        Code::Call_m1664 => ending!(far_call::<true, 8>),
        Code::Retfw
        | Code::Retfw_imm16
        | Code::Retfd
        | Code::Retfd_imm16
        | Code::Retfq
        | Code::Retfq_imm16 => {
            op.imm = if i.op_count() == 1 { i.immediate16() as u64 } else { 0 };
            match i.code() {
                Code::Retfw | Code::Retfw_imm16 => ending!(far_ret::<2>),
                Code::Retfd | Code::Retfd_imm16 => ending!(far_ret::<4>),
                _ => ending!(far_ret::<8>),
            }
        }
        Code::Iretw => ending!(iret::<2>),
        Code::Iretd => ending!(iret::<4>),
        Code::Iretq => ending!(iret::<8>),
        Code::Int_imm8 => {
            op.imm = i.immediate8() as u64;
            ending!(int_n)
        }
        Code::Int3 => {
            op.imm = vector::BP as u64;
            ending!(int_n)
        }
        Code::Into => ending!(into),
        Code::Int1 => ending!(int1),
        Code::Syscall => ending!(syscall),
        Code::Sysretd => ending!(sysret::<false>),
        Code::Sysretq => ending!(sysret::<true>),
        Code::Sysenter => ending!(sysenter),
        Code::Sysexitd => ending!(sysexit::<false>),
        Code::Sysexitq => ending!(sysexit::<true>),
        _ => {
            return match i.mnemonic() {
                Mnemonic::Mov => lower_segment_move(i, op),
                Mnemonic::Les | Mnemonic::Lds | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
                    lower_load_far(i, op)
                }
                _ => None,
            };
        }
    };
    Some(Flow::End)
}
