//! Linear and physical memory: segmentation, paging, TLBs, access to RAM and device registers.
//!
//! Fast paths are inline and look only at the current TLB table; everything else is in `slow.rs`.
#![allow(unsafe_code)] // dereferencing what the TLB says is host memory

mod atomic;
mod mem;
pub mod phys;
mod segment;
mod slow;
mod tlb;
mod walk;

pub use atomic::Locked;
pub use mem::Mem;
pub(crate) use mem::copy_out;
pub use tlb::{Context, ENTRY_SHIFT, ExecEntry, NO_TAG, Privilege, SLOW, TLB_SIZE, Tlb, TlbEntry, info};
pub use walk::{Walk, pf};

use crate::fault::Res;
use crate::state::Cpu;
use phys::PhysMap;
use std::sync::Arc;

/// Page part of an address.
pub const PAGE_MASK: u64 = !0xfff;

/// Kinds of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write, or a read that a write will follow.
    Write,
    /// Instruction fetch.
    Exec,
}

/// Translation state of a vCPU.
#[derive(Debug)]
pub struct Mmu {
    /// TLBs.
    pub tlb: Tlb,
    /// Physical address space, as of the epoch seen last.
    pub phys: Arc<PhysMap>,
    /// Maps in force earlier, whose memory the instruction that runs may still be using.
    pub old_maps: Vec<Arc<PhysMap>>,
    /// The page-directory pointers of PAE paging, as loaded with CR3.
    pub pdpte: [u64; 4],
    /// Physical address width (MAXPHYADDR).
    pub phys_bits: u32,
    /// Page of the xAPIC registers, while they are enabled.
    pub apic_page: Option<u64>,
    /// Pages with data breakpoints (linear), while there are any.
    pub watched: Vec<u64>,
}

impl Mmu {
    /// With empty TLBs.
    pub fn new(phys: Arc<PhysMap>, phys_bits: u32) -> Self {
        Self {
            tlb: Tlb::new(),
            phys,
            old_maps: Vec::new(),
            pdpte: [0; 4],
            phys_bits: phys_bits.clamp(32, 52),
            apic_page: None,
            watched: Vec::new(),
        }
    }
}

/// Whether a linear address is canonical (48 bits).
#[inline(always)]
pub fn canonical(lin: u64) -> bool {
    ((lin << 16) as i64 >> 16) as u64 == lin
}

impl Cpu {
    /// Entry of the current table for `lin`.
    #[inline(always)]
    fn entry(&self, lin: u64) -> &TlbEntry {
        // SAFETY: `tlb` always points at a table of the current context, and `tlb_mask` is its size less one entry; they
        // are set again whenever contexts or sizes change (`Cpu::retable`).
        unsafe { &*self.tlb.byte_add((lin >> (12 - ENTRY_SHIFT)) as usize & self.tlb_mask as usize) }
    }

    /// Host address for reading `len` bytes at `lin`, if the TLB has it and the access stays within a page.
    #[inline(always)]
    pub fn peek_read(&self, lin: u64, len: usize) -> Option<*const u8> {
        let e = self.entry(lin);
        if e.read == lin.wrapping_add(len as u64 - 1) & PAGE_MASK {
            Some(lin.wrapping_add(e.addend) as *const u8)
        } else {
            None
        }
    }

    /// Host address for writing `len` bytes at `lin`, if the TLB has it and the access stays within a page.
    #[inline(always)]
    pub fn peek_write(&self, lin: u64, len: usize) -> Option<*mut u8> {
        let e = self.entry(lin);
        if e.write == lin.wrapping_add(len as u64 - 1) & PAGE_MASK {
            Some(lin.wrapping_add(e.addend) as *mut u8)
        } else {
            None
        }
    }

    /// Reads guest memory at a linear address with the current privilege. `seg` only tells #SS from #GP.
    #[inline(always)]
    pub fn read<T: Mem>(&mut self, seg: usize, lin: u64) -> Res<T> {
        match self.peek_read(lin, size_of::<T>()) {
            // SAFETY: the TLB maps whole pages of host memory.
            Some(p) => Ok(unsafe { T::load(p) }),
            None => self.read_slow(seg, lin),
        }
    }

    /// Writes guest memory at a linear address with the current privilege.
    #[inline(always)]
    pub fn write<T: Mem>(&mut self, seg: usize, lin: u64, value: T) -> Res<()> {
        match self.peek_write(lin, size_of::<T>()) {
            Some(p) => {
                // SAFETY: as in `read`.
                unsafe { value.store(p) };
                Ok(())
            }
            None => self.write_slow(seg, lin, value),
        }
    }

    /// Reads, computes and writes back (not atomically). The write is known to be possible before `f` runs; whatever
    /// `f` returns beside the new value is passed on.
    #[inline(always)]
    pub fn rmw<T: Mem, R>(&mut self, seg: usize, lin: u64, f: impl FnOnce(T) -> (T, R)) -> Res<R> {
        match self.peek_write(lin, size_of::<T>()) {
            Some(p) => {
                // SAFETY: as in `read`; what can be written can be read.
                let (value, r) = f(unsafe { T::load(p) });
                // SAFETY: as above.
                unsafe { value.store(p) };
                Ok(r)
            }
            None => {
                let (value, r) = f(self.read_for_write(seg, lin)?);
                self.write_slow(seg, lin, value)?;
                Ok(r)
            }
        }
    }

    /// Host address of `len` bytes (1..=4096) for reading, if they lie in one page of plain memory. `None` means that
    /// the access is allowed so far, but must go through [`Self::read_bytes`]. Valid until the next access that may
    /// fault, call a device or change the TLB.
    #[inline(always)]
    pub fn host_read(&mut self, seg: usize, lin: u64, len: usize) -> Res<Option<*const u8>> {
        match self.peek_read(lin, len) {
            Some(p) => Ok(Some(p)),
            None => self.host_slow(seg, lin, len, Access::Read).map(|p| p.map(<*mut u8>::cast_const)),
        }
    }

    /// As [`Self::host_read`], for writing (and reading).
    #[inline(always)]
    pub fn host_write(&mut self, seg: usize, lin: u64, len: usize) -> Res<Option<*mut u8>> {
        match self.peek_write(lin, len) {
            Some(p) => Ok(Some(p)),
            None => self.host_slow(seg, lin, len, Access::Write),
        }
    }

    /// Points [`Cpu::tlb`] at the table for the current privilege. To be called after changes of CPL, EFLAGS.AC or
    /// address space.
    #[inline]
    pub fn retable(&mut self) {
        let table = self.mmu.tlb.table(self.privilege());
        self.tlb_mask = ((table.len() - 1) << ENTRY_SHIFT) as u64;
        self.tlb = table.as_mut_ptr();
        self.jit.forget_stack();
    }

    /// Privilege of explicit data accesses.
    #[inline(always)]
    pub fn privilege(&self) -> Privilege {
        if self.cpl == 3 {
            Privilege::User
        } else if self.flags & crate::state::fl::AC != 0 {
            Privilege::SupervisorAc
        } else {
            Privilege::Supervisor
        }
    }
}
