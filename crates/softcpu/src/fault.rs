//! Exceptions raised by instructions.

use crate::Cpu;

/// Exception vectors (Intel SDM vol. 3, table 7-1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// Proof that an exception has been recorded in [`Cpu::exception`]. It carries nothing, so that results of memory
/// accesses stay in registers.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Fault(());

/// Result of anything that can raise an exception.
pub type Res<T> = Result<T, Fault>;

/// The exception that a [`Fault`] stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exception {
    /// Vector.
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error: Option<u32>,
    /// For page faults: the linear address, for CR2.
    pub address: u64,
    /// For #DB: bits to set in DR6.
    pub dr6: u64,
    /// A trap: the instruction has completed, and RIP is already past it.
    pub trap: bool,
    /// No exception at all: the memory map changed while code was being fetched, so the fetch starts over.
    pub retry: bool,
    /// The guest asked for what the software CPU cannot do (such as executing from a device register): the VM stops.
    pub internal: Option<&'static str>,
}

impl Cpu {
    /// Records an exception without error code.
    #[cold]
    #[inline(never)]
    pub fn raise(&mut self, vector: u8) -> Fault {
        self.exception = Exception { vector, ..Default::default() };
        Fault(())
    }

    /// Records an exception with an error code.
    #[cold]
    #[inline(never)]
    pub fn raise_with(&mut self, vector: u8, error: u32) -> Fault {
        self.exception = Exception { vector, error: Some(error), ..Default::default() };
        Fault(())
    }

    /// Records a page fault at a linear address.
    #[cold]
    #[inline(never)]
    pub fn raise_pf(&mut self, address: u64, error: u32) -> Fault {
        self.exception = Exception { vector: vector::PF, error: Some(error), address, ..Default::default() };
        Fault(())
    }

    /// Records a debug exception; `dr6` are the bits to set in DR6.
    #[cold]
    #[inline(never)]
    pub fn raise_db(&mut self, dr6: u64, trap: bool) -> Fault {
        self.exception = Exception { vector: vector::DB, dr6, trap, ..Default::default() };
        Fault(())
    }

    /// Records any exception.
    #[cold]
    #[inline(never)]
    pub fn raise_exception(&mut self, exception: Exception) -> Fault {
        self.exception = exception;
        Fault(())
    }

    /// Records that the software CPU cannot go on.
    #[cold]
    #[inline(never)]
    pub fn raise_internal(&mut self, why: &'static str) -> Fault {
        self.exception = Exception { internal: Some(why), ..Default::default() };
        Fault(())
    }

    /// Records that the fetch at RIP starts over.
    #[cold]
    pub(crate) fn retry_fetch(&mut self) -> Fault {
        self.exception = Exception { retry: true, ..Default::default() };
        Fault(())
    }

    /// #UD.
    pub fn ud(&mut self) -> Fault {
        self.raise(vector::UD)
    }

    /// #GP with an error code.
    pub fn gp(&mut self, error: u32) -> Fault {
        self.raise_with(vector::GP, error)
    }
}
