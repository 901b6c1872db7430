//! Execution while the guest has floating-point exceptions unmasked.
//!
//! SSE: the instruction runs masked, on a clean set of flags, with its results kept aside. If it raised what the guest
//! has not masked, the results are discarded and #XM is delivered.
//!
//! x87: the hardware itself defers an unmasked exception to the next waiting instruction, so the instruction just runs
//! with the guest's masks, and the status is looked at right after it; a pending exception goes to memory with the whole
//! state and waits there.

use super::Thunk;
use super::recipe::{Class, MemAccess};
use super::run::{Bounce, call, finish, linear, source};
use crate::fault::{Res, vector};
use crate::fpu::{Legacy, Vector, mxcsr};
use crate::op::Op;
use crate::state::{Cpu, cr};

/// Flags found before a result is computed: invalid, denormal, division by zero (Intel SDM vol. 1, 11.5.2).
const BEFORE: u32 = 7;
/// Underflow.
const UE: u32 = 1 << 4;
/// x87 exceptions that keep a result from being stored in memory: invalid, overflow, underflow.
const NO_STORE: u16 = 1 | 1 << 3 | 1 << 4;

impl Cpu {
    #[cold]
    pub(super) fn execute_unmasked(&mut self, op: &Op, t: &Thunk) -> Res<()> {
        match t.class {
            Class::X87 | Class::Mmx => self.execute_x87_unmasked(op, t),
            Class::Sse | Class::Avx => self.execute_sse_unmasked(op, t),
        }
    }

    fn execute_x87_unmasked(&mut self, op: &Op, t: &Thunk) -> Res<()> {
        let ignored = self.fpu.begin_ignoring();
        let result = self.execute_x87_settling(op, t);
        if let Some(fcw) = ignored {
            self.fpu.end_ignoring(fcw);
        }
        result
    }

    fn execute_x87_settling(&mut self, op: &Op, t: &Thunk) -> Res<()> {
        if !self.fpu.x87_is_live() {
            self.fpu.load_x87();
        }
        let flags = match t.access {
            MemAccess::None => call(self, op, t, std::ptr::null_mut()),
            MemAccess::Read => source::<false>(self, op, t, |cpu, mem| {
                // A device that was read has not touched the x87 unit.
                call(cpu, op, t, mem)
            })?,
            MemAccess::Write => {
                self.store_x87(op, t)?;
                0
            }
        };
        finish(self, op, t, flags);
        self.fpu.settle_x87();
        Ok(())
    }

    /// A store: through a copy, since the exception may forbid it.
    fn store_x87(&mut self, op: &Op, t: &Thunk) -> Res<()> {
        let size = usize::from(t.size);
        let lin = self.address(op, u32::from(t.size), true)?;
        self.probe_write(op.seg(), lin, size)?;
        let mut bounce = Bounce([0; 64]);
        call(self, op, t, bounce.0.as_mut_ptr());
        if self.fpu.settle_x87() & NO_STORE != 0 {
            return Ok(());
        }
        self.write_bytes(op.seg(), lin, &bounce.0[..size])
    }

    fn execute_sse_unmasked(&mut self, op: &Op, t: &Thunk) -> Res<()> {
        let size = usize::from(t.size);
        let mut bounce = Bounce([0; 64]);
        let mut at = None;
        match t.access {
            MemAccess::None => {}
            MemAccess::Read => {
                let lin = linear(self, op, t, false)?;
                self.read_bytes(op.seg(), lin, &mut bounce.0[..size])?;
            }
            MemAccess::Write => {
                let lin = linear(self, op, t, true)?;
                self.probe_write(op.seg(), lin, size)?;
                at = Some(lin);
            }
        }
        let guest = self.fpu.mxcsr();
        let unmasked = !(guest >> mxcsr::MASK_SHIFT) & mxcsr::FLAGS;
        let before = Kept::of(self, op, t);
        let mut modes = guest;
        if unmasked & UE != 0 {
            modes &= !mxcsr::FTZ; // without effect while underflow is unmasked
        }
        let (mut raised, flags) = self.run_sse(op, t, modes, &mut bounce);
        if unmasked & UE != 0 {
            // Unmasked, a tiny result is an underflow even if it is exact. Flushing to zero tells.
            let after = Kept::of(self, op, t);
            before.put_back(self, op);
            let stored = bounce.0;
            raised |= self.run_sse(op, t, guest | mxcsr::FTZ, &mut bounce).0 & UE;
            bounce.0 = stored;
            after.put_back(self, op);
        }
        if raised & unmasked & BEFORE != 0 {
            raised &= BEFORE;
        }
        self.fpu.set_mxcsr(guest | raised);
        if raised & unmasked != 0 {
            let switched = t.x87 && self.fpu.in_mmx();
            before.put_back(self, op);
            if switched {
                // The switch to MMX comes before the exception.
                self.fpu.enter_mmx();
            }
            let exceptions = self.cr4 & cr::CR4_OSXMMEXCPT != 0;
            return Err(if exceptions { self.raise(vector::XM) } else { self.ud() });
        }
        finish(self, op, t, flags);
        match at {
            Some(lin) => self.write_bytes(op.seg(), lin, &bounce.0[..size]),
            None => Ok(()),
        }
    }

    /// Runs a thunk with the given modes; the flags it raised, and its result.
    fn run_sse(&mut self, op: &Op, t: &Thunk, modes: u32, bounce: &mut Bounce) -> (u32, u64) {
        if t.x87 && !self.fpu.x87_is_live() {
            self.fpu.load_x87();
        }
        self.fpu.park();
        let mut flags = 0;
        let raised = crate::fpu::with_mxcsr(modes, || flags = call(self, op, t, bounce.0.as_mut_ptr()));
        (raised, flags)
    }
}

/// What an instruction may change, as it was before.
struct Kept {
    vector: Vector,
    general: u64,
    /// XMM0 and RCX: results of the string comparisons.
    implicit: (Vector, u64),
    x87: Option<Box<Legacy>>,
}

impl Kept {
    fn of(cpu: &mut Cpu, op: &Op, t: &Thunk) -> Self {
        let n = usize::from((op.dst / 8) & 15);
        let x87 = t.x87.then(|| Box::new(cpu.fpu.x87_ref().clone()));
        Self { vector: cpu.fpu.vec[n], general: cpu.regs[n], implicit: (cpu.fpu.vec[0], cpu.regs[1]), x87 }
    }

    fn put_back(&self, cpu: &mut Cpu, op: &Op) {
        let n = usize::from((op.dst / 8) & 15);
        (cpu.fpu.vec[0], cpu.regs[1]) = self.implicit;
        cpu.fpu.vec[n] = self.vector;
        cpu.regs[n] = self.general;
        if let Some(x87) = &self.x87 {
            *cpu.fpu.x87() = (**x87).clone();
        }
    }
}
