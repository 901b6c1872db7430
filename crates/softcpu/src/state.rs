//! Everything one vCPU is.
#![allow(unsafe_code)] // register file access by byte offset

use crate::block::Block;
use crate::fault::Exception;
use crate::mmu::{Mmu, TlbEntry};
use crate::vm::{Shared, Sibling};
use accel::{CpuIo, CpuSignals, Cpuid, LocalApic};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

/// Byte offsets into [`Cpu::regs`].
#[allow(missing_docs)]
pub mod reg {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 8;
    pub const RDX: u8 = 16;
    pub const RBX: u8 = 24;
    pub const RSP: u8 = 32;
    pub const RBP: u8 = 40;
    pub const RSI: u8 = 48;
    pub const RDI: u8 = 56;
    /// Pseudo-register: instruction pointer of the first instruction of the block.
    pub const RIP: u8 = 128;
    /// Pseudo-register: always zero.
    pub const ZERO: u8 = 136;
}

/// Segment registers, in encoding order.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// RFLAGS bits.
#[allow(missing_docs)]
pub mod fl {
    pub const CF: u64 = 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six that arithmetic writes, kept in [`super::Cpu::cc`].
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
    /// Everything that can be set, bit 1 aside.
    pub const ALL: u64 = ARITH | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// Control register bits.
#[allow(missing_docs)]
pub mod cr {
    pub const CR0_PE: u64 = 1;
    pub const CR0_MP: u64 = 1 << 1;
    pub const CR0_EM: u64 = 1 << 2;
    pub const CR0_TS: u64 = 1 << 3;
    pub const CR0_ET: u64 = 1 << 4;
    pub const CR0_NE: u64 = 1 << 5;
    pub const CR0_WP: u64 = 1 << 16;
    pub const CR0_AM: u64 = 1 << 18;
    pub const CR0_NW: u64 = 1 << 29;
    pub const CR0_CD: u64 = 1 << 30;
    pub const CR0_PG: u64 = 1 << 31;
    pub const CR4_VME: u64 = 1;
    pub const CR4_PVI: u64 = 1 << 1;
    pub const CR4_TSD: u64 = 1 << 2;
    pub const CR4_DE: u64 = 1 << 3;
    pub const CR4_PSE: u64 = 1 << 4;
    pub const CR4_PAE: u64 = 1 << 5;
    pub const CR4_MCE: u64 = 1 << 6;
    pub const CR4_PGE: u64 = 1 << 7;
    pub const CR4_PCE: u64 = 1 << 8;
    pub const CR4_OSFXSR: u64 = 1 << 9;
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    pub const CR4_UMIP: u64 = 1 << 11;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const EFER_SCE: u64 = 1;
    pub const EFER_LME: u64 = 1 << 8;
    pub const EFER_LMA: u64 = 1 << 10;
    pub const EFER_NXE: u64 = 1 << 11;
    pub const EFER_SVME: u64 = 1 << 12;
    pub const EFER_FFXSR: u64 = 1 << 14;
    pub const EFER_AUTOIBRS: u64 = 1 << 21;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Seg {
    /// Base address.
    pub base: u64,
    /// Limit in bytes (granularity applied).
    pub limit: u32,
    /// As [`accel::state::Segment::attributes`].
    pub attr: u32,
    /// Selector.
    pub selector: u16,
}

/// Bits of [`Seg::attr`].
#[allow(missing_docs)]
pub mod attr {
    pub const TYPE: u32 = 0xf;
    pub const ACCESSED: u32 = 1;
    /// Data: writable. Code: readable.
    pub const RW: u32 = 2;
    /// Data: expand-down. Code: conforming.
    pub const EC: u32 = 4;
    pub const CODE: u32 = 8;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

impl Seg {
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attr >> attr::DPL_SHIFT & 3) as u8
    }

    /// Whether every linear address can be read and written through the segment.
    pub fn is_flat_data(&self) -> bool {
        let kind = attr::P | attr::UNUSABLE | attr::S | attr::CODE | attr::EC | attr::RW;
        self.base == 0 && self.limit == u32::MAX && self.attr & kind == attr::P | attr::S | attr::RW
    }

    /// Whether the segment can be used (it is not null).
    pub fn usable(&self) -> bool {
        self.attr & attr::UNUSABLE == 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, less one.
    pub limit: u16,
}

bitflags::bitflags! {
    /// What code means depends on these; part of the key of every block.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Mode: u32 {
        /// Default operand and address size 32 (CS.D).
        const CODE32 = 1 << 0;
        /// 64-bit mode.
        const CODE64 = 1 << 1;
        /// Stack addresses are 32 bits wide (SS.B); not set in 64-bit mode.
        const STACK32 = 1 << 2;
        /// One instruction a block (single step, breakpoints, interrupt shadow).
        const STEP = 1 << 3;
        /// CS has a limit below 4 GiB that must be checked on each fetch, or a base.
        const LIMITED = 1 << 4;
        /// CPL is 3. Not part of a block's key, but of what the jump cache compares.
        const USER = 1 << 5;
        /// Real or virtual-8086 mode.
        const REAL = 1 << 6;
        /// 32-bit protected-mode code whose CS, DS, ES and SS cover all of the linear address space; DS, ES and SS can be
        /// written.
        const FLAT = 1 << 7;
    }
}

impl Mode {
    /// Whether code of this mode can be translated.
    pub fn translatable(self) -> bool {
        let flat = Mode::CODE32.union(Mode::STACK32).union(Mode::FLAT);
        !self.contains(Mode::STEP) && (self.is64() || self.difference(Mode::USER) == flat)
    }

    /// Whether this is 64-bit mode.
    #[inline(always)]
    pub fn is64(self) -> bool {
        self.contains(Mode::CODE64)
    }
}

/// Work that an instruction leaves to the run loop (with [`crate::op::Next::REQUEST`]); RIP is past the instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Request {
    /// Nothing.
    #[default]
    None,
    /// HLT: wait for an interrupt.
    Halt,
    /// The next instruction runs before interrupts are looked at (STI).
    Shadow,
    /// The same, and debug traps of this instruction wait as well (MOV SS, POP SS).
    StackShadow,
}

/// Counters, kept by the vCPU alone and copied out for [`accel::Vm::stats`].
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Stats {
    pub blocks_decoded: u64,
    pub ops_decoded: u64,
    pub blocks_dropped: u64,
    pub cache_flushes: u64,
    pub jump_misses: u64,
    pub tlb_fills: u64,
    pub tlb_flushes: u64,
    pub page_faults: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    pub mmio: u64,
    pub ports: u64,
    pub apic: u64,
    pub halts: u64,
    pub code_writes: u64,
    pub msrs: u64,
    pub cpuids: u64,
    pub native_blocks: u64,
    pub native_instructions: u64,
    pub native_bytes: u64,
    pub native_flushes: u64,
    pub native_dropped: u64,
    pub native_unlinked: u64,
    pub native_entries: u64,
    pub native_exit_link: u64,
    pub native_exit_lookup: u64,
    pub native_exit_at: u64,
    pub native_exit_poll: u64,
    pub native_exit_slow: u64,
    pub native_refills: u64,
    pub native_interpreted: u64,
}

/// A vCPU. Fields that translated code uses come first; the layout is C's, and offsets are taken with `offset_of!`.
#[repr(C, align(64))]
pub struct Cpu {
    /// General registers in encoding order, then the pseudo-registers of [`reg`].
    pub regs: [u64; 18],
    /// Instruction pointer. Up to date between blocks; within one, see [`Cpu::ip_at`].
    pub rip: u64,
    /// RFLAGS without the arithmetic flags; bit 1 set.
    pub flags: u64,
    /// Arithmetic flags as LAHF and SETO leave them: SF ZF 0 AF 0 PF 1 CF in the high byte, OF in bit 0.
    pub cc: u16,
    /// Current privilege level.
    pub cpl: u8,
    /// Interrupts may be pending although [`accel::Signal::INTERRUPT`] was taken: look again when IF is set.
    pub irq_latched: bool,
    /// What code means now.
    pub mode: Mode,
    /// Block that runs.
    pub block: *const Block,
    /// Link slot of the branch taken last, to be filled with the block that follows (null if there is none).
    pub link: *const std::cell::Cell<*const Block>,
    /// TLB table of data accesses at the current privilege.
    pub tlb: *mut TlbEntry,
    /// Byte offset of that table's last entry.
    pub tlb_mask: u64,
    /// Instructions retired.
    pub retired: u64,
    /// Pending word of [`CpuSignals`].
    pub signal_word: *const AtomicU32,
    /// Segment registers, in encoding order.
    pub seg: [Seg; 6],
    /// Local descriptor table.
    pub ldtr: Seg,
    /// Task register.
    pub tr: Seg,
    /// Global descriptor table register.
    pub gdtr: Table,
    /// Interrupt descriptor table register.
    pub idtr: Table,
    /// Control register 0.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base, PCID in the low bits.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended feature enables.
    pub efer: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// Exception recorded by the last [`crate::Fault`].
    pub exception: Exception,
    /// Operation that faulted; null outside blocks.
    pub fault_op: *const crate::op::Op,
    /// What the last instruction asks of the run loop.
    pub request: Request,
    /// Whether it runs.
    pub mp_state: accel::state::MpState,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// Interrupt acknowledged but not delivered (from a loaded state).
    pub acknowledged: Option<u8>,
    /// Exception to deliver before the next instruction (from a loaded state).
    pub injected: Option<Exception>,
    /// EFLAGS.TF was set when the instruction that runs began.
    pub step_armed: bool,
    /// EFLAGS.RF was loaded by the instruction that runs, so it stays for the next.
    pub rf_loaded: bool,
    /// Every instruction is logged (`softcpu::instructions` at level `trace`), and runs alone.
    pub traced: bool,
    /// Epoch of the memory map that the MMU knows.
    pub map_epoch: u64,
    /// Initial APIC ID.
    pub apic_id: u32,
    /// Interrupts are blocked until one more instruction has run.
    pub shadow: bool,
    /// #DB bits (as in DR6) found while an instruction ran, to be raised when it has completed.
    pub pending_db: u64,
    /// What a debugger outside the guest wants; with hardware breakpoints of its own, `dr` and `dr7` are not looked at.
    pub debugger: Option<Box<crate::debug::Debugger>>,
    /// What translated code needs beside the above.
    pub jit: crate::translate::State,
    /// Floating-point and vector registers.
    pub fpu: crate::fpu::Fpu,
    /// Model-specific registers.
    pub msr: crate::msr::Msrs,
    /// TLBs and the physical memory map.
    pub mmu: Mmu,
    /// Decoded code.
    pub code: crate::block::Cache,
    /// Counters.
    pub stats: Stats,
    /// CPUID as the guest sees it.
    pub cpuid: Cpuid,
    /// Mailbox.
    pub signals: Arc<CpuSignals>,
    /// Local APIC.
    pub apic: Option<Arc<dyn LocalApic>>,
    /// The VM.
    pub vm: Arc<Shared>,
    /// This vCPU as its siblings see it.
    pub me: Arc<Sibling>,
    /// The outside world; set while [`accel::Vcpu::run`] is active.
    pub(crate) io: Option<*const dyn CpuIo>,
}

/// Integer types that registers and memory operands have.
pub trait Int: Copy + Default + Eq + 'static + crate::mmu::Mem {
    /// Size in bits.
    const BITS: u32;
    /// Truncates.
    fn from_u64(v: u64) -> Self;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Sign-extends.
    fn sext(self) -> u64;
}

macro_rules! int {
    ($($t:ty, $s:ty);*) => {$(
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            #[inline(always)]
            fn from_u64(v: u64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $s as i64 as u64
            }
        }
    )*};
}
int!(u8, i8; u16, i16; u32, i32; u64, i64);

impl Cpu {
    /// Reads a register by byte offset ([`reg`]).
    #[inline(always)]
    pub fn get<T: Int>(&self, offset: u8) -> T {
        debug_assert!(offset as usize + size_of::<T>() <= size_of_val(&self.regs));
        // SAFETY: the decoder only makes offsets of registers inside the array, and integers have no alignment that
        // `read_unaligned` would need.
        unsafe { self.regs.as_ptr().cast::<u8>().add(offset as usize).cast::<T>().read_unaligned() }
    }

    /// Writes a register by byte offset; 32-bit writes clear the upper half.
    #[inline(always)]
    pub fn set<T: Int>(&mut self, offset: u8, value: T) {
        debug_assert!(offset as usize + size_of::<T>() <= size_of_val(&self.regs));
        let at = self.regs.as_mut_ptr().cast::<u8>();
        // SAFETY: as in `get`.
        unsafe {
            let at = at.add(offset as usize);
            if T::BITS == 32 {
                at.cast::<u64>().write_unaligned(value.to_u64());
            } else {
                at.cast::<T>().write_unaligned(value);
            }
        }
    }

    /// Instruction pointer of the instruction at offset `off` in the running block.
    #[inline(always)]
    pub fn ip_at(&self, off: u16) -> u64 {
        self.wrap_ip(self.regs[reg::RIP as usize / 8].wrapping_add(off as u64))
    }

    /// Truncates an instruction pointer to what the code size has.
    #[inline(always)]
    pub fn wrap_ip(&self, ip: u64) -> u64 {
        if self.mode.is64() { ip } else { ip as u32 as u64 }
    }

    /// RFLAGS, whole.
    pub fn rflags(&self) -> u64 {
        self.flags | crate::flags::to_rflags(self.cc)
    }

    /// Stack pointer width mask of the current mode.
    pub fn stack_mask(&self) -> u64 {
        if self.mode.is64() {
            u64::MAX
        } else if self.mode.contains(Mode::STACK32) {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Whether the CPU is in protected mode (also v86).
    #[inline(always)]
    pub fn protected(&self) -> bool {
        self.cr0 & cr::CR0_PE != 0
    }

    /// Whether the CPU is in virtual-8086 mode.
    #[inline(always)]
    pub fn v86(&self) -> bool {
        self.flags & fl::VM != 0
    }

    /// Whether long mode is active (64-bit or compatibility).
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & cr::EFER_LMA != 0
    }
}
