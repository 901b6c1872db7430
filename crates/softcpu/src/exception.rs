//! Delivery of exceptions and interrupts in every mode (Intel SDM vol. 3, chapter 7).

use crate::fault::{Exception, Res, vector};
use crate::mmu::canonical;
use crate::segments::{Descriptor, null, privilege_of};
use crate::state::{Cpu, Seg, attr, fl, seg};
use crate::task;
use accel::Exit;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// INT n, INT3, INTO: the gate's privilege is checked.
    Software,
    /// A processor exception, or INT1.
    Exception,
    /// An external interrupt or NMI.
    External,
}

/// Event to deliver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) vector: u8,
    pub(crate) error: Option<u32>,
    pub(crate) source: Source,
    /// RF in the saved flags: the event is a fault, and the instruction will be restarted.
    pub(crate) fault: bool,
}

impl Event {
    /// The EXT bit of error codes that delivery itself raises.
    fn ext(&self) -> u32 {
        (self.source != Source::Software) as u32
    }

    fn idt_error(&self) -> u32 {
        self.vector as u32 * 8 + 2 + self.ext()
    }
}

/// Classes for the double-fault rules (Intel SDM vol. 3, table 7-4 and 7-5).
fn contributory(v: u8) -> bool {
    matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
}

impl Cpu {
    /// Delivers an exception that an instruction raised. Returns why to leave if that is not possible.
    pub(crate) fn take_exception(&mut self, e: Exception) -> Option<Exit> {
        if self.debugger.is_some()
            && let Some(exit) = self.debugger_stop(&e)
        {
            return Some(exit);
        }
        self.stats.exceptions += 1;
        let mut current = e;
        let mut first: Option<u8> = None;
        loop {
            match current.vector {
                vector::PF => {
                    self.stats.page_faults += 1;
                    self.cr2 = current.address;
                }
                vector::DB => {
                    self.dr6 = self.dr6 & !0xf | current.dr6;
                    self.dr7 &= !(1 << 13);
                    self.update_mode();
                }
                _ => {}
            }
            tracing::trace!(
                vector = current.vector,
                error = current.error,
                rip = format_args!("{:#x}", self.rip),
                address = format_args!("{:#x}", current.address),
                "exception"
            );
            let trap = current.trap || matches!(current.vector, vector::BP | vector::OF);
            let event = Event {
                vector: current.vector,
                error: current.error,
                source: Source::Exception,
                // The breakpoint handler sets RF itself if it wants to go on.
                fault: !trap && current.vector != vector::DB,
            };
            if self.deliver(event).is_ok() {
                return None;
            }
            let second = self.exception;
            if let Some(why) = second.internal {
                return Some(Exit::InternalError(format!("{why}\n{}", self.dump())));
            }
            if second.vector == vector::PF {
                self.cr2 = second.address;
            }
            let held = first.unwrap_or(current.vector);
            if held == vector::DF {
                return Some(Exit::Shutdown);
            }
            let double = contributory(held) && contributory(second.vector)
                || held == vector::PF && (contributory(second.vector) || second.vector == vector::PF);
            if double {
                current = Exception { vector: vector::DF, error: Some(0), ..Default::default() };
            } else {
                current = second;
            }
            first = Some(current.vector);
        }
    }

    /// Delivers an external interrupt or NMI.
    pub(crate) fn take_interrupt(&mut self, v: u8) -> Option<Exit> {
        let event = Event { vector: v, error: None, source: Source::External, fault: false };
        tracing::trace!(vector = v, rip = format_args!("{:#x}", self.rip), "interrupt");
        if self.deliver(event).is_ok() {
            return None;
        }
        let e = self.exception;
        if let Some(why) = e.internal {
            return Some(Exit::InternalError(format!("{why}\n{}", self.dump())));
        }
        self.take_exception(e)
    }

    /// Delivers an event with RIP as the return address. On a fault nothing but memory below the stack has changed.
    pub(crate) fn deliver(&mut self, e: Event) -> Res<()> {
        if !self.protected() {
            return self.deliver_real(e);
        }
        if self.v86() && e.source == Source::Software && self.flags & fl::IOPL != fl::IOPL {
            return Err(self.gp(0));
        }
        if self.long_mode() { self.deliver_long(e) } else { self.deliver_protected(e) }
    }

    fn saved_flags(&self, e: &Event) -> u64 {
        let f = self.rflags() & !fl::RF;
        if e.fault || self.flags & fl::RF != 0 && e.source == Source::External { f | fl::RF } else { f }
    }

    fn deliver_real(&mut self, e: Event) -> Res<()> {
        let at = e.vector as u64 * 4;
        if at + 3 > self.idtr.limit as u64 {
            // Without room in the table even a real-mode CPU double-faults, and then shuts down.
            return Err(self.gp(e.idt_error()));
        }
        let entry = self.sys_read::<u32>(self.idtr.base.wrapping_add(at))?;
        let mut stack = self.current_stack();
        let flags = self.rflags();
        stack.push(self, 2, flags)?;
        stack.push(self, 2, self.seg[seg::CS].selector as u64)?;
        stack.push(self, 2, self.rip)?;
        self.use_stack(&stack);
        self.flags &= !(fl::IF | fl::TF | fl::AC | fl::RF);
        self.load_real(seg::CS, (entry >> 16) as u16);
        self.rip = entry as u64 & 0xffff;
        self.update_mode();
        Ok(())
    }

    fn deliver_long(&mut self, e: Event) -> Res<()> {
        let at = e.vector as u32 * 16;
        if at + 15 > self.idtr.limit as u32 {
            return Err(self.gp(e.idt_error()));
        }
        let base = self.idtr.base.wrapping_add(at as u64);
        let (low, high) = (self.sys_read::<u64>(base)?, self.sys_read::<u64>(base.wrapping_add(8))?);
        let gate = Descriptor { raw: low, at: base };
        if !matches!(gate.kind(), 14 | 15) || e.source == Source::Software && gate.dpl() < self.cpl {
            return Err(self.gp(e.idt_error()));
        }
        if !gate.present() {
            return Err(self.raise_with(vector::NP, e.idt_error()));
        }
        let selector = (low >> 16) as u16;
        let ip = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let (cs, cpl) = self.gate_code(selector, &e)?;
        if cs.attr & (attr::L | attr::DB) != attr::L {
            return Err(self.gp((selector & !3) as u32 | e.ext()));
        }
        let ist = (low >> 32 & 7) as u32;
        let mut stack = if ist != 0 {
            let sp = self.tss_pointer(0x24 + (ist - 1) * 8)?;
            let mut s = self.current_stack();
            s.sp = sp;
            if cpl != self.cpl {
                s.ss = null(cpl as u16);
                s.ss.attr |= (cpl as u32) << attr::DPL_SHIFT;
            }
            s
        } else if cpl != self.cpl {
            self.inner_stack(cpl)?
        } else {
            self.current_stack()
        };
        stack.long = true;
        stack.mask = u64::MAX;
        stack.privilege = privilege_of(cpl);
        stack.error = e.ext();
        stack.sp &= !0xf;
        let (ss, sp, flags) = (self.seg[seg::SS].selector, self.regs[4], self.saved_flags(&e));
        stack.push(self, 8, ss as u64)?;
        stack.push(self, 8, sp)?;
        stack.push(self, 8, flags)?;
        stack.push(self, 8, self.seg[seg::CS].selector as u64)?;
        stack.push(self, 8, self.rip)?;
        if let Some(code) = e.error {
            stack.push(self, 8, code as u64)?;
        }
        if !canonical(ip) {
            return Err(self.gp(e.ext()));
        }
        self.use_stack(&stack);
        self.enter_gate(cs, cpl, ip, gate.kind() == 14);
        Ok(())
    }

    /// Loads CS and flags on the way through an interrupt or trap gate.
    fn enter_gate(&mut self, mut cs: Seg, cpl: u8, ip: u64, interrupt: bool) {
        cs.selector = cs.selector & !3 | cpl as u16;
        self.seg[seg::CS] = cs;
        self.cpl = cpl;
        self.rip = ip;
        self.flags &= !(fl::TF | fl::NT | fl::RF | fl::VM);
        if interrupt {
            self.flags &= !fl::IF;
        }
        self.update_mode();
    }

    /// The code segment that a gate names, and the privilege level that it runs at.
    fn gate_code(&mut self, selector: u16, e: &Event) -> Res<(Seg, u8)> {
        let error = (selector & !3) as u32 | e.ext();
        if selector & !3 == 0 {
            return Err(self.gp(e.ext()));
        }
        let Some(d) = self.find_descriptor(selector)? else { return Err(self.gp(error)) };
        if !d.is_code() || d.dpl() > self.cpl {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.raise_with(vector::NP, error));
        }
        self.mark_accessed(d)?;
        let cpl = if d.is_conforming_code() { self.cpl } else { d.dpl() };
        Ok((d.load(selector), cpl))
    }

    fn deliver_protected(&mut self, e: Event) -> Res<()> {
        let at = e.vector as u32 * 8;
        if at + 7 > self.idtr.limit as u32 {
            return Err(self.gp(e.idt_error()));
        }
        let base = self.idtr.base.wrapping_add(at as u64);
        let gate = Descriptor { raw: self.sys_read(base)?, at: base };
        let kind = gate.kind();
        if !matches!(kind, 5 | 6 | 7 | 14 | 15) || e.source == Source::Software && gate.dpl() < self.cpl {
            return Err(self.gp(e.idt_error()));
        }
        if !gate.present() {
            return Err(self.raise_with(vector::NP, e.idt_error()));
        }
        let selector = (gate.raw >> 16) as u16;
        if kind == 5 {
            return self.task_switch(selector, task::Reason::Interrupt, e.error);
        }
        let wide = kind >= 14;
        let bytes = if wide { 4 } else { 2 };
        let ip = gate.raw & 0xffff | if wide { gate.raw >> 32 & 0xffff_0000 } else { 0 };
        let (cs, cpl) = self.gate_code(selector, &e)?;
        let v86 = self.v86();
        if v86 && cpl != 0 {
            return Err(self.gp((selector & !3) as u32 | e.ext()));
        }
        if ip > cs.limit as u64 {
            return Err(self.gp(e.ext()));
        }
        let flags = self.saved_flags(&e);
        let mut stack = self.current_stack();
        if cpl != self.cpl {
            let (ss, sp) = (self.seg[seg::SS].selector, self.regs[4]);
            stack = self.inner_stack(cpl)?;
            stack.error |= e.ext();
            if v86 {
                for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                    let selector = self.seg[s].selector as u64;
                    stack.push(self, bytes, selector)?;
                }
            }
            stack.push(self, bytes, ss as u64)?;
            stack.push(self, bytes, sp)?;
        }
        stack.push(self, bytes, flags)?;
        stack.push(self, bytes, self.seg[seg::CS].selector as u64)?;
        stack.push(self, bytes, self.rip)?;
        if let Some(code) = e.error {
            stack.push(self, bytes, code as u64)?;
        }
        self.use_stack(&stack);
        if v86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.seg[s] = null(0);
            }
        }
        self.enter_gate(cs, cpl, ip, kind & 1 == 0);
        Ok(())
    }
}
