//! Architectural state of an x86-64 vCPU: one form for every accelerator, so that a guest can move between them.

use serde::{Deserialize, Serialize};

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes (granularity applied).
    pub limit: u32,
    /// Attributes: bits 8..24 of the descriptor's second doubleword, shifted to bit 0 (type 0-3, S 4, DPL 5-6, P 7,
    /// AVL 12, L 13, D/B 14, G 15), and bit 16 set if the segment is unusable (null).
    pub attributes: u32,
}

impl Segment {
    /// Bit of [`Self::attributes`]: the segment cannot be used.
    pub const UNUSABLE: u32 = 1 << 16;
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, less one.
    pub limit: u16,
}

/// Whether the vCPU runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Runnable,
    /// Waits for INIT.
    Uninitialized,
    /// Has had INIT, waits for SIPI.
    InitReceived,
    /// In HLT.
    Halted,
}

/// Events in flight at an instruction boundary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Exception to deliver before the next instruction: vector and error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// External interrupt acknowledged but not yet delivered.
    pub interrupt: Option<u8>,
    /// Interrupts are blocked for one instruction (STI or MOV SS).
    pub shadow: bool,
    /// An NMI is pending.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
}

/// Architectural state at an instruction boundary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// General registers in encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS (encoding order).
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: Table,
    /// Interrupt descriptor table register.
    pub idtr: Table,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Task priority.
    pub cr8: u64,
    /// Extended features.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// DR0-DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// XCR0.
    pub xcr0: u64,
    /// XSAVE area in standard (non-compacted) format, at least 576 bytes (legacy region and header).
    pub xsave: Vec<u8>,
    /// Other model-specific registers: (index, value), loaded in order.
    pub msrs: Vec<(u32, u64)>,
    /// Local APIC register page as KVM_GET_LAPIC lays it out, where the vCPU has one.
    pub lapic: Option<Vec<u8>>,
    /// Whether it runs.
    pub mp_state: MpState,
    /// Events in flight.
    pub events: Events,
}

/// Index of a general register in [`CpuState::gpr`].
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Index of a segment register in [`CpuState::segments`].
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}
