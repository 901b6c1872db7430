//! Whether an instruction may use its unit now, and getting the host's units ready for it.

use super::Thunk;
use super::recipe::Class;
use crate::fault::{Res, vector};
use crate::fpu::{ready, xcr0};
use crate::state::{Cpu, cr};

/// Outcome of a check that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exceptions {
    /// Everything is masked: nothing to look at afterwards.
    Masked,
    /// An exception may have to be delivered.
    Unmasked,
}

impl Class {
    /// Bit of [`ready`].
    pub(super) const fn ready(self) -> u8 {
        match self {
            Class::X87 => ready::X87,
            Class::Mmx => ready::MMX,
            Class::Sse => ready::SSE,
            Class::Avx => ready::AVX,
        }
    }
}

impl Cpu {
    /// #UD and #NM.
    pub(crate) fn check_unit(&mut self, class: Class) -> Res<()> {
        let em = self.cr0 & cr::CR0_EM != 0;
        let undefined = match class {
            Class::X87 => false,
            Class::Mmx => em,
            Class::Sse => em || self.cr4 & cr::CR4_OSFXSR == 0,
            Class::Avx => {
                let both = xcr0::SSE | xcr0::AVX;
                !self.protected()
                    || self.v86()
                    || self.cr4 & cr::CR4_OSXSAVE == 0
                    || self.fpu.xcr0 & both != both
            }
        };
        if undefined {
            return Err(self.ud());
        }
        if self.cr0 & cr::CR0_TS != 0 || class == Class::X87 && em {
            return Err(self.raise(vector::NM));
        }
        Ok(())
    }

    /// #MF, if an unmasked x87 exception is pending. With CR0.NE clear the processor would signal FERR# and wait for the
    /// interrupt of external logic that asserts IGNNE#; such logic answers at once here, so the exception is ignored.
    pub(crate) fn check_x87_pending(&mut self) -> Res<()> {
        if self.fpu.x87_pending() && self.cr0 & cr::CR0_NE != 0 {
            return Err(self.raise(vector::MF));
        }
        Ok(())
    }

    /// Checks of a waiting x87 instruction.
    pub(crate) fn check_x87_waiting(&mut self) -> Res<()> {
        self.check_x87_available()?;
        self.check_x87_pending()
    }

    /// The whole check of a thunk that [`crate::fpu::Fpu::ready`] does not vouch for.
    #[cold]
    pub(super) fn make_ready(&mut self, t: &Thunk) -> Res<Exceptions> {
        self.check_unit(t.class)?;
        let mut masked = true;
        if t.x87 {
            self.check_x87_pending()?;
            if self.fpu.x87_pending() {
                return Ok(Exceptions::Unmasked);
            }
            if !self.fpu.x87_is_live() {
                self.fpu.load_x87();
            }
            masked = !self.fpu.x87_is_unmasked();
        }
        if matches!(t.class, Class::Sse | Class::Avx) {
            masked &= self.fpu.enter_sse();
        }
        if !masked {
            return Ok(Exceptions::Unmasked);
        }
        self.fpu.ready |= match t.class {
            // An SSE instruction that uses MMX registers says nothing about those that do not; and vice versa.
            Class::Sse | Class::Avx if t.x87 => 0,
            class => class.ready(),
        };
        Ok(Exceptions::Masked)
    }
}
