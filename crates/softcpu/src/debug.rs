//! Debug registers: breakpoints on instructions, data and ports are noticed here (Intel SDM vol. 3, chapter 18); and
//! what we show when the VM cannot go on.

use crate::exec::dr6;
use crate::fault::{Exception, Res, vector};
use crate::state::{Cpu, Mode, cr, fl, seg};
use accel::{DebugExit, Exit, GuestDebug};
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use std::fmt::Write;

const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_GD: u64 = 1 << 13;

/// What a debugger outside the guest wants.
#[derive(Clone, Debug, Default)]
pub struct Debugger {
    step: bool,
    software: Vec<u64>,
    /// Hardware breakpoints as the debug registers would hold them; they take the place of the guest's.
    hardware: Option<([u64; 4], u64)>,
}

impl Cpu {
    /// Sets what a debugger outside the guest wants.
    pub fn set_debugger(&mut self, debug: &GuestDebug) {
        let mut registers = ([0; 4], 0x400);
        for (n, b) in debug.hardware.iter().take(4).enumerate() {
            registers.0[n] = b.address;
            registers.1 |= b.dr7(n);
        }
        self.debugger = (*debug != GuestDebug::default()).then(|| {
            Box::new(Debugger {
                step: debug.single_step,
                software: debug.software.clone(),
                hardware: (!debug.hardware.is_empty()).then_some(registers),
            })
        });
        self.debug_changed();
    }

    /// DR7 that is in effect.
    pub(crate) fn active_dr7(&self) -> u64 {
        match self.debugger.as_ref().and_then(|d| d.hardware.as_ref()) {
            Some((_, dr7)) => *dr7,
            None => self.dr7,
        }
    }

    fn active_dr(&self, n: usize) -> u64 {
        match self.debugger.as_ref().and_then(|d| d.hardware.as_ref()) {
            Some((dr, _)) => dr[n],
            None => self.dr[n],
        }
    }

    /// Whether the debugger wants one instruction only.
    pub(crate) fn debugger_steps(&self) -> bool {
        self.debugger.as_ref().is_some_and(|d| d.step)
    }

    /// Whether the INT3 before RIP is the debugger's.
    pub(crate) fn debugger_breaks(&self) -> bool {
        let Some(d) = &self.debugger else { return false };
        d.software.contains(&self.fetch_address(self.rip.wrapping_sub(1)))
    }

    /// The debugger's stop, if an exception is one. RIP is then at the breakpoint, or after the step.
    pub(crate) fn debugger_stop(&mut self, e: &Exception) -> Option<Exit> {
        let d = self.debugger.as_ref()?;
        let stop = |pc, dr6, vector| Some(Exit::Debug(DebugExit { pc, dr6, vector }));
        match e.vector {
            vector::BP => {
                let at = self.rip.wrapping_sub(1);
                let pc = self.fetch_address(at);
                if !d.software.contains(&pc) {
                    return None;
                }
                self.rip = at;
                stop(pc, 0, vector::BP)
            }
            vector::DB => {
                let ours = d.step && e.dr6 & dr6::BS != 0 || d.hardware.is_some() && e.dr6 & 0xf != 0;
                if ours { stop(self.fetch_address(self.rip), e.dr6, vector::DB) } else { None }
            }
            _ => None,
        }
    }

    fn debug_register(&mut self, n: u8) -> Res<u8> {
        if n == 4 || n == 5 {
            if self.cr4 & cr::CR4_DE != 0 {
                return Err(self.ud());
            }
            return Ok(n + 2);
        }
        if n > 7 {
            return Err(self.ud());
        }
        Ok(n)
    }

    fn check_general_detect(&mut self) -> Res<()> {
        if self.dr7 & DR7_GD != 0 {
            return Err(self.raise_db(dr6::BD, false));
        }
        Ok(())
    }

    /// MOV from DRn.
    pub(crate) fn read_dr(&mut self, n: u8) -> Res<u64> {
        let n = self.debug_register(n)?;
        self.check_general_detect()?;
        Ok(match n {
            6 => self.dr6,
            7 => self.dr7,
            _ => self.dr[n as usize & 3],
        })
    }

    /// MOV to DRn.
    pub(crate) fn write_dr(&mut self, n: u8, value: u64) -> Res<()> {
        let n = self.debug_register(n)?;
        self.check_general_detect()?;
        if n >= 6 && value >> 32 != 0 {
            return Err(self.gp(0));
        }
        match n {
            6 => self.dr6 = value & DR6_WRITABLE | DR6_FIXED,
            7 => self.dr7 = value & 0xffff_2bff | 0x400,
            _ => self.dr[n as usize & 3] = value,
        }
        self.debug_changed();
        Ok(())
    }

    /// Takes note of new breakpoints.
    pub(crate) fn debug_changed(&mut self) {
        let watched: Vec<u64> = (0..4)
            .filter(|n| self.enabled(*n) && self.condition(*n) & 1 != 0)
            .map(|n| self.active_dr(n) & crate::mmu::PAGE_MASK)
            .collect();
        if watched != self.mmu.watched {
            self.mmu.watched = watched;
            self.flush_tlb();
        }
        self.update_mode();
    }

    fn enabled(&self, n: usize) -> bool {
        self.active_dr7() >> (2 * n) & 3 != 0
    }

    /// 0: execution, 1: write, 2: port, 3: read or write.
    fn condition(&self, n: usize) -> u64 {
        self.active_dr7() >> (16 + 4 * n) & 3
    }

    /// Length of a data breakpoint in bytes.
    fn length(&self, n: usize) -> u64 {
        match self.active_dr7() >> (18 + 4 * n) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        }
    }

    /// Notes the data breakpoints that an access meets; they are reported when the instruction has completed.
    pub(crate) fn check_data_breakpoints(&mut self, lin: u64, len: u64, write: bool) {
        for n in 0..4 {
            let size = self.length(n);
            let at = self.active_dr(n) & !(size - 1);
            let meets = lin < at.wrapping_add(size) && at < lin.wrapping_add(len);
            let kind = match self.condition(n) {
                1 => write,
                3 => true,
                _ => false,
            };
            if self.enabled(n) && kind && meets {
                self.pending_db |= 1 << n;
            }
        }
    }

    /// Raises #DB if there is a breakpoint on the instruction at RIP. Returns whether there was.
    pub(crate) fn instruction_breakpoint(&mut self) -> Result<bool, Exit> {
        if self.active_dr7() & 0xff == 0 || self.flags & fl::RF != 0 {
            return Ok(false);
        }
        let lin = self.fetch_address(self.rip);
        let hits = (0..4)
            .filter(|n| self.enabled(*n) && self.condition(*n) == 0 && self.active_dr(*n) == lin)
            .fold(0, |bits, n| bits | 1 << n);
        if hits == 0 {
            return Ok(false);
        }
        let e = Exception { vector: vector::DB, dr6: hits, ..Default::default() };
        self.take_exception(e).map_or(Ok(true), Err)
    }

    /// Logs the instruction at RIP, and the registers before it.
    #[cold]
    pub(crate) fn trace_instruction(&mut self) {
        let mut code = [0; 15];
        let lin = self.fetch_address(self.rip);
        let privilege = self.privilege();
        let held = self.exception;
        let text = if self.read_bytes_as(privilege, seg::CS, lin, &mut code).is_ok() {
            let bits = if self.mode.is64() {
                64
            } else if self.mode.contains(Mode::CODE32) {
                32
            } else {
                16
            };
            let mut text = String::new();
            let i = Decoder::with_ip(bits, &code, self.rip, DecoderOptions::NONE).decode();
            IntelFormatter::new().format(&i, &mut text);
            text
        } else {
            "?".into()
        };
        self.exception = held;
        tracing::trace!(
            target: "softcpu::instructions",
            "{:04x}:{:016x} {text:<40} {:x?} {:x}",
            self.seg[seg::CS].selector,
            self.rip,
            &self.regs[..16],
            self.rflags()
        );
    }

    /// The registers as text, for messages about a VM that cannot go on.
    pub fn dump(&self) -> String {
        let names = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15",
        ];
        let mut s = String::new();
        for (i, name) in names.iter().enumerate() {
            let end = if i % 4 == 3 { '\n' } else { ' ' };
            let _ = write!(s, "{name:>3}={:016x}{end}", self.regs[i]);
        }
        let _ = writeln!(
            s,
            "rip={:016x} rflags={:08x} cpl={} mode={:?}",
            self.rip,
            self.rflags(),
            self.cpl,
            self.mode
        );
        for (name, g) in ["es", "cs", "ss", "ds", "fs", "gs", "ldt", "tr"]
            .iter()
            .zip(self.seg.iter().chain([&self.ldtr, &self.tr]))
        {
            let _ = writeln!(
                s,
                "{name:>3}={:04x} base={:016x} limit={:08x} attr={:05x}",
                g.selector, g.base, g.limit, g.attr
            );
        }
        let _ = writeln!(
            s,
            "gdt={:016x}:{:04x} idt={:016x}:{:04x}",
            self.gdtr.base, self.gdtr.limit, self.idtr.base, self.idtr.limit
        );
        let _ = writeln!(
            s,
            "cr0={:08x} cr2={:016x} cr3={:016x} cr4={:08x} efer={:05x} xcr0={:x} dr7={:08x}",
            self.cr0, self.cr2, self.cr3, self.cr4, self.efer, self.fpu.xcr0, self.dr7
        );
        s
    }
}
