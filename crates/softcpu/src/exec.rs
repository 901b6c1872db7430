//! The run loop: block to block, and what happens between blocks.
#![allow(unsafe_code)] // follows pointers to blocks

use crate::block::Block;
use crate::decode;
use crate::fault::{Exception, Res, vector};
use crate::op::Next;
use crate::state::{Cpu, Mode, Request, attr, cr, fl, reg, seg};
use crate::vm::Ask;
use accel::state::MpState;
use accel::{CpuIo, Exit, Signal};
use std::sync::atomic::{AtomicU32, Ordering};

/// DR6 bits.
pub(crate) mod dr6 {
    /// Debug register access (DR7.GD).
    pub(crate) const BD: u64 = 1 << 13;
    /// Single step.
    pub(crate) const BS: u64 = 1 << 14;
    /// Task switch.
    pub(crate) const BT: u64 = 1 << 15;
}

impl Cpu {
    /// Runs until there is a reason to leave.
    pub(crate) fn execute(&mut self) -> Exit {
        loop {
            if let Some(exit) = self.boundary() {
                return exit;
            }
            // The instruction itself may end single-step mode.
            let stepping = self.mode.contains(Mode::STEP);
            let next = self.run_blocks();
            if next == Next::FAULT {
                if let Some(exit) = self.faulted() {
                    return exit;
                }
                continue;
            }
            if (stepping || self.mode.contains(Mode::STEP))
                && let Some(exit) = self.stepped()
            {
                return exit;
            }
            if next == Next::REQUEST {
                match std::mem::take(&mut self.request) {
                    Request::None => {}
                    Request::Halt => {
                        self.stats.halts += 1;
                        self.mp_state = MpState::Halted;
                    }
                    Request::Shadow | Request::StackShadow => {
                        self.shadow = true;
                        self.update_mode();
                    }
                }
            }
        }
    }

    /// Runs blocks until one has something to tell, or a signal is pending.
    fn run_blocks(&mut self) -> Next {
        let stepping = self.mode.contains(Mode::STEP);
        let mut block = match self.lookup() {
            Ok(b) => b,
            Err(_) => return self.fetch_fault(),
        };
        loop {
            // SAFETY: blocks live until the cache is flushed, which happens in `boundary` alone.
            let b = unsafe { &*block };
            let next = match self.run_translated(b) {
                Some(next) => next,
                None => {
                    self.block = block;
                    self.regs[reg::RIP as usize / 8] = self.rip;
                    self.retired += b.count as u64;
                    let first = b.first();
                    (first.handler)(self, first)
                }
            };
            if self.signals_pending() {
                return if next.0 >= Next::LEAST_ADDRESS { Next::LOOKUP } else { next };
            }
            if next.0 >= Next::LEAST_ADDRESS {
                block = next.0 as *const Block;
                continue;
            }
            if next != Next::LOOKUP || stepping || self.mode.contains(Mode::STEP) {
                return next;
            }
            let link = std::mem::replace(&mut self.link, std::ptr::null());
            block = match self.lookup() {
                Ok(b) => b,
                Err(_) => return self.fetch_fault(),
            };
            if !link.is_null() {
                // SAFETY: the slot is in a block that ran just now; only `boundary` frees blocks.
                let link = unsafe { &*link };
                // SAFETY: just found.
                if unsafe { (*block).second_page.is_none() } {
                    link.set(block);
                }
            }
        }
    }

    #[inline(always)]
    pub(crate) fn signals_pending(&self) -> bool {
        // SAFETY: points into `self.signals`, which lives as long.
        let word: &AtomicU32 = unsafe { &*self.signal_word };
        word.load(Ordering::Relaxed) != 0
    }

    /// The block at RIP.
    #[inline]
    pub(crate) fn lookup(&mut self) -> Res<*const Block> {
        if !self.mode.contains(Mode::LIMITED)
            && let Some(b) = self.code.jump(self.rip, self.jump_key())
        {
            return Ok(b);
        }
        self.lookup_slow()
    }

    /// Block at RIP for branches that continue without going through the run loop's own look-up.
    #[inline(always)]
    pub fn next_block(&mut self) -> Next {
        self.link = std::ptr::null();
        if self.mode.intersects(Mode::LIMITED.union(Mode::STEP)) {
            return Next::LOOKUP;
        }
        match self.code.jump(self.rip, self.jump_key()) {
            Some(b) => Next(b as usize),
            None => Next::LOOKUP,
        }
    }

    #[cold]
    #[inline(never)]
    fn lookup_slow(&mut self) -> Res<*const Block> {
        self.stats.jump_misses += 1;
        let key_mode = self.mode.difference(Mode::USER);
        let lin = self.fetch_address(self.rip);
        if self.mode.contains(Mode::LIMITED) && self.rip > self.seg[seg::CS].limit as u64 {
            return Err(self.gp(0));
        }
        let page = self.fetch_page(lin)?;
        let host = page + (lin & 0xfff) as usize;
        let mut found = self.code.find(host, key_mode);
        if let Some(b) = found {
            // SAFETY: just found.
            let b = unsafe { &*b };
            let over = self.mode.contains(Mode::LIMITED)
                && self.rip + b.len as u64 - 1 > self.seg[seg::CS].limit as u64;
            if over {
                // Decode as far as the limit allows, unless that is what this is.
                found = None;
            } else if let Some(second) = b.second_page
                && self.fetch_page(self.fetch_address(self.rip | 0xfff).wrapping_add(1))? != second
            {
                found = None;
            }
        }
        let block = match found {
            Some(b) => b,
            None => {
                if !self.guard_code(page) {
                    return Err(self.retry_fetch());
                }
                decode::block(self, page, lin)?
            }
        };
        if !self.mode.contains(Mode::LIMITED) {
            let key = self.jump_key();
            self.code.set_jump(self.rip, key, block);
        }
        Ok(block)
    }

    /// Linear address of an instruction pointer.
    pub(crate) fn fetch_address(&self, ip: u64) -> u64 {
        if self.mode.is64() { ip } else { self.seg[seg::CS].base.wrapping_add(ip) as u32 as u64 }
    }

    /// Fetching at RIP faulted.
    pub(crate) fn fetch_fault(&mut self) -> Next {
        self.fault_op = std::ptr::null();
        self.block = std::ptr::null();
        Next::FAULT
    }

    /// An instruction faulted; RIP is its own (or the next one's after a trap).
    fn faulted(&mut self) -> Option<Exit> {
        if !self.fault_op.is_null() {
            // The block's count was added when it was entered.
            // SAFETY: the operation is in the block that ran just now.
            let op = unsafe { crate::op::OpPtr::new(self.fault_op) };
            self.unretire(op);
            if self.exception.trap {
                self.retired += 1;
            }
            self.fault_op = std::ptr::null();
        }
        self.link = std::ptr::null();
        if self.exception.retry {
            return None;
        }
        if let Some(why) = self.exception.internal {
            return Some(Exit::InternalError(format!("{why}\n{}", self.dump())));
        }
        (self.step_armed, self.rf_loaded) = (false, false);
        // A data breakpoint met by an instruction that then faulted is lost, as on processors.
        self.pending_db = 0;
        let e = self.exception;
        self.end_shadow();
        self.take_exception(e)
    }

    /// An instruction has completed in single-step mode.
    fn stepped(&mut self) -> Option<Exit> {
        self.end_shadow();
        let mut bits = std::mem::take(&mut self.pending_db);
        if self.request == Request::StackShadow {
            // Single-step traps of MOV SS are lost; data breakpoints wait for the end of the next instruction.
            self.pending_db = bits;
            bits = 0;
        } else if self.step_armed {
            bits |= dr6::BS;
        }
        self.step_armed = false;
        if self.flags & fl::RF != 0 && !self.rf_loaded {
            self.flags &= !fl::RF;
        }
        self.rf_loaded = false;
        self.update_mode();
        if bits == 0 {
            return None;
        }
        if self.request == Request::Halt {
            // The trap ends the wait at once.
            self.request = Request::None;
        }
        self.take_exception(Exception { vector: vector::DB, dr6: bits, trap: true, ..Default::default() })
    }

    fn end_shadow(&mut self) {
        if self.shadow {
            self.shadow = false;
            self.update_mode();
        }
    }

    /// Between blocks: signals, interrupts, waiting, breakpoints. Returns why to leave, if there is a reason.
    fn boundary(&mut self) -> Option<Exit> {
        self.link = std::ptr::null();
        self.block = std::ptr::null();
        loop {
            if self.code.full() || self.code.wants_flush() {
                self.stats.cache_flushes += 1;
                self.code.flush();
                self.mmu.old_maps.clear();
            }
            let pending = self.signals.pending();
            if !pending.is_empty() {
                if pending.contains(Signal::FLUSH) {
                    self.answer_asks();
                    continue;
                }
                if pending.contains(Signal::KICK) {
                    self.signals.take(Signal::KICK);
                    return Some(Exit::Kicked);
                }
                if pending.contains(Signal::INIT) {
                    self.signals.take(Signal::INIT);
                    self.init();
                    continue;
                }
                if pending.contains(Signal::SIPI) {
                    self.signals.take(Signal::SIPI);
                    if self.mp_state == MpState::InitReceived {
                        self.start_up(self.signals.sipi_vector());
                    }
                    continue;
                }
                if pending.contains(Signal::SMI) {
                    // There is no system management mode; the platform does not announce one.
                    self.signals.take(Signal::SMI);
                }
                if pending.contains(Signal::INTERRUPT) {
                    self.signals.take(Signal::INTERRUPT);
                    self.irq_latched = true;
                }
                if pending.contains(Signal::NMI) {
                    self.signals.take(Signal::NMI);
                    self.nmi_pending = true;
                }
            }
            if matches!(self.mp_state, MpState::Uninitialized | MpState::InitReceived) {
                self.sleep();
                continue;
            }
            match self.take_event() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(exit) => return Some(exit),
            }
            if self.mp_state == MpState::Halted {
                self.sleep();
                continue;
            }
            if self.mode.contains(Mode::STEP) {
                if self.traced {
                    self.trace_instruction();
                }
                self.step_armed = self.flags & fl::TF != 0 || self.debugger_steps();
                match self.instruction_breakpoint() {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(exit) => return Some(exit),
                }
            }
            return None;
        }
    }

    /// Delivers a pending NMI or interrupt if that is possible now. Returns whether one was.
    fn take_event(&mut self) -> Result<bool, Exit> {
        if self.shadow {
            return Ok(false);
        }
        if let Some(e) = self.injected.take() {
            self.mp_state = MpState::Runnable;
            return self.take_exception(e).map_or(Ok(true), Err);
        }
        if self.debugger_steps() && self.mp_state != MpState::Halted {
            // A step is not into an interrupt's handler.
            return Ok(false);
        }
        if self.nmi_pending && !self.nmi_masked {
            self.nmi_pending = false;
            self.nmi_masked = true;
            self.mp_state = MpState::Runnable;
            self.stats.interrupts += 1;
            return self.take_interrupt(vector::NMI).map_or(Ok(true), Err);
        }
        if self.flags & fl::IF == 0 {
            return Ok(false);
        }
        let vector = match self.acknowledged.take() {
            Some(v) => Some(v),
            None if self.irq_latched => {
                self.irq_latched = false;
                let apic = self.apic.clone();
                let v = apic.as_ref().filter(|a| a.has_interrupt()).and_then(|a| a.acknowledge());
                if v.is_some() {
                    // There may be more; look again when the handler enables interrupts.
                    self.irq_latched = apic.is_some_and(|a| a.has_interrupt());
                }
                v
            }
            None => None,
        };
        let Some(vector) = vector else { return Ok(false) };
        self.mp_state = MpState::Runnable;
        self.stats.interrupts += 1;
        self.take_interrupt(vector).map_or(Ok(true), Err)
    }

    /// Sleeps until a signal comes.
    fn sleep(&mut self) {
        self.publish_stats();
        let signals = self.signals.clone();
        self.paused(|| signals.wait(Signal::all(), None));
    }

    /// Sets system flags, noting that interrupts become possible.
    pub fn set_flags(&mut self, rflags: u64) {
        let old = self.flags;
        self.cc = crate::flags::from_rflags(rflags);
        self.flags = rflags & fl::ALL & !fl::ARITH | 2;
        let changed = old ^ self.flags;
        if changed & self.flags & fl::IF != 0 && self.irq_latched {
            self.check_interrupts();
        }
        if changed & fl::AC != 0 {
            self.retable();
        }
        if changed & (fl::TF | fl::RF | fl::VM) != 0 {
            self.update_mode();
        }
    }

    /// Makes the run loop look for interrupts before the next block.
    pub fn check_interrupts(&mut self) {
        self.signals.word().fetch_or(Signal::INTERRUPT.bits(), Ordering::Relaxed);
    }

    /// Computes [`Cpu::mode`] and the TLB table from the state. To be called after changes of CS, SS, DS, ES, CPL, CR0.PE,
    /// EFER.LMA, EFLAGS.VM, EFLAGS.TF, DR7 and the interrupt shadow.
    pub fn update_mode(&mut self) {
        let cs = &self.seg[seg::CS];
        let mut m = Mode::empty();
        if self.efer & cr::EFER_LMA != 0 && cs.attr & attr::L != 0 {
            m |= Mode::CODE64;
        } else {
            if cs.attr & attr::DB != 0 {
                m |= Mode::CODE32;
            }
            if self.seg[seg::SS].attr & attr::DB != 0 {
                m |= Mode::STACK32;
            }
            if cs.base != 0 || cs.limit != u32::MAX {
                m |= Mode::LIMITED;
            }
        }
        if !self.protected() || self.v86() {
            m |= Mode::REAL;
        }
        if m == Mode::CODE32 | Mode::STACK32
            && [seg::ES, seg::SS, seg::DS].iter().all(|s| self.seg[*s].is_flat_data())
        {
            m |= Mode::FLAT;
        }
        if self.cpl == 3 {
            m |= Mode::USER;
        }
        let breakpoints = self.active_dr7() & 0xff != 0 || self.debugger_steps();
        if self.shadow || self.flags & fl::TF != 0 || breakpoints || self.traced {
            m |= Mode::STEP;
        }
        self.mode = m;
        self.retable();
    }

    /// Calls the outside world. The vCPU counts as outside meanwhile.
    pub(crate) fn outside<R: Default>(&mut self, f: impl FnOnce(&dyn CpuIo) -> R) -> R {
        let Some(io) = self.io else { return R::default() };
        // SAFETY: `run` sets `io` from a reference that lives until it returns, and clears it then.
        let io = unsafe { &*io };
        self.paused(|| f(io))
    }

    /// Does something while the vCPU counts as outside.
    pub(crate) fn paused<R>(&mut self, f: impl FnOnce() -> R) -> R {
        self.fpu.park();
        self.me.set_inside(false);
        let r = f();
        self.me.set_inside(true);
        // Ordered after the store: whoever asks either sees us inside or is seen here.
        if self.signals.word().load(Ordering::SeqCst) & Signal::FLUSH.bits() != 0 {
            self.answer_asks();
        }
        r
    }

    /// Translated code must not rely on checks of accesses that it has made.
    pub(crate) fn forget_checks(&mut self) {
        self.jit.forget_stack();
        if let Some(t) = self.code.translator.as_deref_mut() {
            t.version += 1;
        }
    }

    /// Does what siblings and the VM ask. May be called within an instruction.
    pub(crate) fn answer_asks(&mut self) {
        self.signals.take(Signal::FLUSH);
        // Before the epoch is read: whoever asks has changed it already.
        let (number, asks) = self.me.take_asks();
        let epoch = self.vm.map_epoch.load(Ordering::SeqCst);
        if epoch != self.map_epoch {
            self.map_epoch = epoch;
            let map = self.vm.map();
            // Addresses in the old map may be in use until the instruction ends.
            let old = std::mem::replace(&mut self.mmu.phys, map);
            self.mmu.old_maps.push(old);
            self.flush_all_tlbs();
            self.code.drop_all();
        }
        for ask in asks {
            match ask {
                Ask::Drop(page) => self.stats.blocks_dropped += self.code.drop_page(page) as u64,
                Ask::Protect(page) => {
                    self.mmu.tlb.protect(page);
                    self.forget_checks();
                }
                Ask::ProtectAll => {
                    self.flush_all_tlbs();
                    self.forget_checks();
                }
            }
        }
        self.me.answer(number);
    }
}
