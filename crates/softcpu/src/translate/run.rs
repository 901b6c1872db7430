//! In and out of translated code, and what its slow paths call.
#![allow(unsafe_code)] // calls generated code, which calls back with a pointer to the vCPU

use super::FROZEN;
use super::cache::{Translator, site};
use super::stubs::exit;
use crate::SoftSpec;
use crate::block::Block;
use crate::mmu::PAGE_MASK;
use crate::native::recipe::Class;
use crate::op::Next;
use crate::state::{Cpu, Mode, reg, seg};
use std::arch::asm;

/// Bytes of host stack that return addresses of guest calls may take.
const DEPTH: u64 = 128 << 10;

/// Sets the GS base, which generated code reaches the vCPU by. Nothing else in the process uses it.
fn set_gs_base(base: u64) {
    use std::sync::OnceLock;
    static FAST: OnceLock<bool> = OnceLock::new();
    // SAFETY: reads the auxiliary vector.
    let fast = *FAST.get_or_init(|| unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0);
    if fast {
        // SAFETY: HWCAP2 says that the kernel lets us.
        unsafe { asm!("wrgsbase {}", in(reg) base, options(nostack, nomem, preserves_flags)) };
        return;
    }
    thread_local!(static CURRENT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    if CURRENT.get() != base {
        const ARCH_SET_GS: libc::c_int = 0x1001;
        // SAFETY: sets this thread's GS base; no code of the host's relies on it.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
        CURRENT.set(base);
    }
}

impl Cpu {
    /// Runs translated code if there is any for the block at RIP, or if it is time to make some. `None`: the interpreter
    /// is to run the block.
    #[inline(always)]
    pub(crate) fn run_translated(&mut self, block: &Block) -> Option<Next> {
        let heat = block.heat.get();
        if heat < self.jit.hot {
            block.heat.set(heat + 1);
            return None;
        }
        if heat == FROZEN {
            return None;
        }
        self.run_hot(block)
    }

    /// Makes the translator that the properties ask for.
    pub(crate) fn set_up_translator(&mut self, spec: &SoftSpec) -> accel::Result<()> {
        if spec.translate == Some(false) {
            return Ok(());
        }
        let mut t = match Translator::new(spec.cache as usize) {
            Ok(t) => t,
            Err(e) if spec.translate.is_none() => {
                tracing::warn!("no executable memory for translated code, so the guest will be slow: {e}");
                return Ok(());
            }
            Err(source) => {
                let what = "cannot get executable memory for translated code (accelerator option translate=off does without)";
                return Err(accel::Error::Host { what: what.into(), source });
            }
        };
        t.exact = spec.exact;
        self.jit.hot = spec.threshold.min(FROZEN - 1);
        self.code.translator = Some(Box::new(t));
        Ok(())
    }

    #[inline(never)]
    fn run_hot(&mut self, block: &Block) -> Option<Next> {
        // A dead block's page is not guarded: what is translated from it would not see later writes.
        if !self.mode.translatable() || block.mode != self.mode.difference(Mode::USER) || block.is_dead() {
            return None;
        }
        if self.code.translator.is_none() || block.second_page.is_some() {
            block.heat.set(FROZEN);
            return None;
        }
        // The interpreter's last branch is not what leads to where translated code ends.
        self.link = std::ptr::null();
        self.jit.key = self.translator_key();
        let key = self.jit.key;
        let t = self.code.translator.as_deref_mut()?;
        let entry = match t.jump(self.rip, key) {
            Some(entry) => entry,
            None => match self.translated_block(self.rip, block.host) {
                Some(b) => {
                    let t = self.code.translator.as_deref_mut()?;
                    t.set_jump(key, b);
                    t.entry(b)
                }
                None => {
                    block.heat.set(if self.code.wants_flush() { 0 } else { FROZEN });
                    return None;
                }
            },
        };
        Some(self.enter(entry))
    }

    fn translator_key(&mut self) -> u64 {
        let jump_key = self.jump_key();
        let epoch = self.mmu.tlb.global_epoch();
        let Some(t) = self.code.translator.as_deref_mut() else { return 0 };
        if t.global_epoch != epoch {
            t.global_epoch = epoch;
            t.uncross();
        }
        t.key(jump_key)
    }

    /// What a translated block is for, beside its address. Privilege is part of it since links between global pages rely
    /// on all that reach them being allowed to.
    fn block_mode(&self) -> Mode {
        self.mode.difference(Mode::STEP)
    }

    /// The translated block at `ip`, found or made.
    fn translated_block(&mut self, ip: u64, host: usize) -> Option<u32> {
        let mode = self.block_mode();
        let global = self.mmu.tlb.exec(self.cpl == 3, ip).is_some_and(|e| e.global);
        let t = self.code.translator.as_deref_mut()?;
        if let Some(b) = t.find(ip, host, mode) {
            return Some(b);
        }
        if t.full() {
            self.code.request_flush();
            return None;
        }
        let mut page = [0; 4096];
        // SAFETY: the interpreter has a block in this page of guest memory, so it is there, and marked as code.
        unsafe { crate::mmu::copy_out((host & !0xfff) as *const u8, &mut page) };
        t.translate(&page, ip, host, mode, global)
    }

    /// Runs translated code from `entry` until it has something to tell.
    fn enter(&mut self, mut entry: u64) -> Next {
        let Some(t) = self.code.translator.as_deref_mut() else { return Next::LOOKUP };
        let fixed = t.fixed;
        t.counters.entries += 1;
        self.jit.jumps = t.jumps();
        self.jit.me = std::ptr::from_mut(self) as u64;
        let here = 0u8;
        self.jit.depth_limit = (&raw const here as u64).saturating_sub(DEPTH);
        set_gs_base(self.jit.me);
        // SAFETY: `stubs::build` made a function of this signature there.
        let run: extern "sysv64" fn(u64) -> u32 = unsafe { std::mem::transmute(fixed.enter as *const ()) };
        loop {
            let why = run(entry);
            let argument = self.jit.argument;
            let (link, ip) = match why {
                exit::LINK => {
                    let Some(l) = self.code.translator.as_deref_mut().and_then(|t| {
                        t.counters.exit_link += 1;
                        t.link(argument as u32)
                    }) else {
                        return Next::LOOKUP;
                    };
                    (Some(argument as u32), l.target)
                }
                exit::LOOKUP | exit::POLL if !crate::mmu::canonical(argument) => {
                    return self.blame_branch();
                }
                exit::LOOKUP => (None, argument),
                exit::AT | exit::POLL => {
                    if let Some(t) = self.code.translator.as_deref_mut() {
                        *(if why == exit::AT {
                            &mut t.counters.exit_at
                        } else {
                            &mut t.counters.exit_poll
                        }) += 1;
                    }
                    self.rip = argument;
                    return Next::LOOKUP;
                }
                _ => {
                    if let Some(t) = self.code.translator.as_deref_mut() {
                        t.counters.exit_slow += 1;
                    }
                    return Next(self.jit.next);
                }
            };
            self.rip = ip;
            match self.follow(link, ip) {
                Some(e) => entry = e,
                None => return Next::LOOKUP,
            }
        }
    }

    /// A branch to a non-canonical address: the interpreter does it again, and faults.
    fn blame_branch(&mut self) -> Next {
        let branch = self.jit.branch;
        let Some(s) = self.code.translator.as_deref().and_then(|t| t.site(branch)) else {
            return Next::LOOKUP;
        };
        self.rip = s.ip;
        let sp = &mut self.regs[reg::RSP as usize / 8];
        *sp = sp.wrapping_sub(u64::from(s.size));
        self.interpret_one()
    }

    /// The entry of the translated block at `ip`, which translated code left for; and lets `link` lead there.
    fn follow(&mut self, link: Option<u32>, ip: u64) -> Option<u64> {
        // SAFETY: the word is in `self.signals`, which lives as long.
        if unsafe { (*self.signal_word).load(std::sync::atomic::Ordering::Relaxed) } != 0 {
            return None;
        }
        self.jit.key = self.translator_key();
        let key = self.jit.key;
        // What cannot be fetched faults in the interpreter.
        self.fetch_page(ip).ok()?;
        let e = self.mmu.tlb.exec(self.cpl == 3, ip)?;
        let mode = self.block_mode();
        let t = self.code.translator.as_deref_mut()?;
        if link.is_none() {
            t.counters.exit_lookup += 1;
        }
        let host = e.host + (ip & !PAGE_MASK) as usize;
        let b = t.find(ip, host, mode)?;
        match link {
            Some(n) => t.connect(n, b, key, e.global),
            None => t.set_jump(key, b),
        }
        Some(t.entry(b))
    }

    /// Whether the host's vector units may be used for the guest's instructions of a class; gets them ready.
    fn vectors_ready(&mut self, level: u8) -> bool {
        let class = if level == 2 { Class::Avx } else { Class::Sse };
        self.check_unit(class).is_ok() && self.fpu.enter_sse()
    }

    /// The interpreter does the instruction at RIP.
    fn interpret_one(&mut self) -> Next {
        let mode = self.mode;
        self.mode |= Mode::STEP;
        let found = self.lookup();
        self.mode = mode;
        let Ok(block) = found else { return self.fetch_fault() };
        // SAFETY: blocks live until the cache is flushed, which happens between runs.
        let b = unsafe { &*block };
        self.block = block;
        self.regs[reg::RIP as usize / 8] = self.rip;
        self.retired += 1;
        let first = b.first();
        let next = (first.handler)(self, first);
        self.link = std::ptr::null();
        next
    }

    /// What the slow path does: sets where translated code goes on.
    fn slow_path(&mut self) {
        let held = self.jit.vectors;
        let key = self.jit.key;
        let linear = self.jit.linear;
        let Some(t) = self.code.translator.as_deref_mut() else { std::process::abort() };
        // Sites are only dropped between runs, and the numbers are in the code.
        let Some(s) = t.site(self.jit.argument) else { std::process::abort() };
        let version = t.version;
        let (retry, resume, leave) = (t.address(s.retry), t.address(s.resume), t.fixed.exit_next);
        let mode = self.mode;
        let wanted = match s.bits & (site::SSE | site::AVX) {
            0 => 0,
            b if b & site::AVX != 0 => 2,
            _ => 1,
        };
        if wanted != 0 && self.vectors_ready(wanted) {
            self.jit.vectors = wanted.max(held);
            self.jit.target = retry;
            return;
        }
        if s.size != 0 {
            let write = s.bits & site::WRITE != 0;
            let size = s.size as usize;
            let filled = if write {
                self.host_write(seg::DS, linear, size).is_ok()
            } else {
                self.host_read(seg::DS, linear, size).is_ok()
            };
            let hit = if write {
                self.peek_write(linear, size).is_some()
            } else {
                self.peek_read(linear, size).is_some()
            };
            let aligned = linear & u64::from(s.align - 1) == 0;
            let same = self.unchanged(version, key, mode);
            if filled && !same {
                // The code that runs may be gone.
                self.rip = s.ip;
                return self.leave(leave, Next::LOOKUP);
            }
            if !hit && s.bits & site::GROUP != 0 && linear & 0xfff > 4096 - size as u64 {
                let Some(t) = self.code.translator.as_deref_mut() else { std::process::abort() };
                t.group_crossed(s.ip);
            }
            if filled && hit && aligned && s.bits & site::ONCE == 0 && self.reload(held) {
                self.count(|c| c.refills += 1);
                self.jit.target = retry;
                return;
            }
        }
        self.count(|c| c.interpreted += 1);
        self.rip = s.ip;
        let next = self.interpret_one();
        let plain = next == Next::LOOKUP || next.0 >= Next::LEAST_ADDRESS;
        if !plain {
            return self.leave(leave, next);
        }
        let same = self.unchanged(version, key, mode);
        if same
            && self.rip == s.next_ip
            && s.bits & (site::END | site::GROUP) == 0
            && wanted == 0
            && !self.signals_pending()
            && self.reload(held)
        {
            self.jit.target = resume;
            return;
        }
        if !self.carry_on(held, same) {
            self.leave(leave, Next::LOOKUP);
        }
    }

    /// Goes on with the translated block at RIP, if there is one. `same`: in the same address space and mode, and nothing
    /// was dropped.
    fn carry_on(&mut self, held: u8, same: bool) -> bool {
        if !self.mode.translatable() || self.signals_pending() {
            return false;
        }
        self.jit.key = self.translator_key();
        let (key, ip) = (self.jit.key, self.rip);
        let found = self.code.translator.as_deref().and_then(|t| t.jump(ip, key));
        let Some(entry) = found.or_else(|| self.follow(None, ip)) else { return false };
        if !self.reload(held) {
            self.jit.vectors = 0;
        }
        self.jit.target = entry;
        if !same && let Some(t) = self.code.translator.as_deref() {
            // Return addresses on the host's stack are for another address space, or lead to code that was dropped.
            self.jit.fresh = entry;
            self.jit.target = t.fixed.fresh;
        }
        true
    }

    fn count(&mut self, f: impl FnOnce(&mut super::Counters)) {
        if let Some(t) = self.code.translator.as_deref_mut() {
            f(&mut t.counters);
        }
    }

    /// Whether translated code may go on: nothing that it was made from has changed.
    fn unchanged(&mut self, version: u64, key: u64, mode: Mode) -> bool {
        self.mode == mode
            && self.translator_key() == key
            && self.code.translator.as_deref().is_some_and(|t: &Translator| t.version == version)
    }

    /// Gets the vector units ready again if translated code had loaded them.
    fn reload(&mut self, held: u8) -> bool {
        held == 0 || self.vectors_ready(held)
    }

    fn leave(&mut self, to: u64, next: Next) {
        self.jit.vectors = 0;
        self.jit.next = next.0;
        self.jit.target = to;
    }
}

/// Entry of slow paths from generated code.
///
/// # Safety
/// Called by the code of `stubs` with the vCPU that runs it, whose registers are all in memory.
pub(super) unsafe extern "sysv64" fn slow(cpu: *mut Cpu) {
    // SAFETY: generated code runs within `Cpu::enter`, which has the exclusive borrow and does not use it meanwhile.
    let cpu = unsafe { &mut *cpu };
    cpu.slow_path();
}
