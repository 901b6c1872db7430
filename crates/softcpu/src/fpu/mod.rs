//! The guest's x87, MMX, SSE and AVX state.
//!
//! Vector registers live in memory, one 64-byte slot each, so that a thunk or translated code loads and stores them
//! with one instruction. The x87 stack (and with it the MMX registers) lives in memory *or* in the host's own x87
//! unit: the first x87 or MMX instruction loads it, and it stays there while the vCPU runs, because nothing else in
//! this program uses that unit. The same holds for the rounding and flush modes and the sticky exception flags in
//! MXCSR. [`Fpu::flush`] brings everything back to memory; [`Fpu::park`] gives the host's Rust code a default MXCSR
//! while it does something else.

mod control;
mod host;
mod image;
mod xsave;

pub use image::BadImage;
pub(crate) use xsave::Save;
pub use xsave::{components, valid_xcr0};

/// State components of XCR0 (Intel SDM vol. 1, 13.1).
pub mod xcr0 {
    /// x87 (and MMX). Always set.
    pub const X87: u64 = 1;
    /// XMM registers and MXCSR.
    pub const SSE: u64 = 1 << 1;
    /// Upper halves of YMM registers.
    pub const AVX: u64 = 1 << 2;
    /// What this CPU has.
    pub const SUPPORTED: u64 = X87 | SSE | AVX;
}

/// MXCSR bits (Intel SDM vol. 1, 10.2.3).
pub mod mxcsr {
    /// Value after reset, and the host's own.
    pub const DEFAULT: u32 = 0x1f80;
    /// Sticky exception flags: IE, DE, ZE, OE, UE, PE.
    pub const FLAGS: u32 = 0x3f;
    /// Exception masks, in the order of the flags.
    pub const MASKS: u32 = 0x1f80;
    /// Shift from a mask bit to its flag.
    pub const MASK_SHIFT: u32 = 7;
    /// Flush to zero.
    pub const FTZ: u32 = 1 << 15;
    /// Bits that may be set; the others fault (#GP). As MXCSR_MASK in an FXSAVE image.
    pub const VALID: u32 = 0xffff;
}

/// x87 status word bits (Intel SDM vol. 1, 8.1.3).
pub mod fsw {
    /// Exception flags: IE, DE, ZE, OE, UE, PE.
    pub const FLAGS: u16 = 0x3f;
    /// Exception summary: an unmasked exception is pending.
    pub const ES: u16 = 1 << 7;
    /// Busy; equals ES.
    pub const B: u16 = 1 << 15;
    /// Shift of the three bits of the top-of-stack pointer.
    pub const TOP_SHIFT: u16 = 11;
}

/// x87 control word after FNINIT.
const FCW_INIT: u16 = 0x37f;

/// A vector register's slot: XMM in the first 16 bytes, YMM in the first 32. The rest is zero (room for AVX-512).
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector(pub [u8; 64]);

impl Vector {
    /// The XMM part.
    #[inline]
    pub fn xmm(&self) -> [u8; 16] {
        let mut x = [0; 16];
        x.copy_from_slice(&self.0[..16]);
        x
    }

    /// The YMM part.
    #[inline]
    pub fn ymm(&self) -> [u8; 32] {
        let mut y = [0; 32];
        y.copy_from_slice(&self.0[..32]);
        y
    }
}

/// The legacy region as FXSAVE64 lays it out (Intel SDM vol. 1, 10.5.1), which is what the host loads and stores.
/// The XMM part belongs to nobody: the guest's are in [`Fpu::vec`].
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub struct Legacy {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word: bit n set if physical register n is not empty.
    pub ftw: u8,
    reserved: u8,
    /// Last opcode, as the host saw it; the guest's is [`Fpu::fop`].
    host_fop: u16,
    host_fip: u64,
    host_fdp: u64,
    host_mxcsr: u32,
    host_mxcsr_mask: u32,
    /// ST(0) to ST(7), 10 bytes each.
    pub st: [[u8; 16]; 8],
    rest: [u8; 352],
}

impl Legacy {
    fn init() -> Self {
        Self {
            fcw: FCW_INIT,
            fsw: 0,
            ftw: 0,
            reserved: 0,
            host_fop: 0,
            host_fip: 0,
            host_fdp: 0,
            host_mxcsr: mxcsr::DEFAULT,
            host_mxcsr_mask: 0,
            st: [[0; 16]; 8],
            rest: [0; 352],
        }
    }

    /// Index of the physical register that is ST(0).
    pub fn top(&self) -> usize {
        (self.fsw >> fsw::TOP_SHIFT & 7) as usize
    }

    /// Replaces control, status and (abridged) tag words without moving the physical registers: the ST array, which is
    /// relative to the top of stack, is rotated.
    fn set_env(&mut self, fcw: u16, fsw: u16, ftw: u8) {
        let old = self.top();
        self.fcw = normalise_fcw(fcw);
        self.fsw = summarise(fsw, self.fcw);
        self.ftw = ftw;
        let by = (self.top() + 8 - old) & 7;
        self.st.rotate_left(by);
    }

    /// Tag of physical register `n` in the full tag word: 0 valid, 1 zero, 2 special, 3 empty (Intel SDM vol. 1, 8.1.7).
    fn full_tag(&self, n: usize) -> u16 {
        if self.ftw >> n & 1 == 0 {
            return 3;
        }
        let r = &self.st[(n + 8 - self.top()) & 7];
        let mantissa = u64::from_le_bytes([r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]]);
        let exponent = u16::from_le_bytes([r[8], r[9]]) & 0x7fff;
        match exponent {
            0 if mantissa == 0 => 1,
            0 | 0x7fff => 2,
            _ if mantissa >> 63 == 0 => 2,
            _ => 0,
        }
    }

    /// The full (16-bit) tag word.
    fn full_ftw(&self) -> u16 {
        (0..8).fold(0, |w, n| w | self.full_tag(n) << (2 * n))
    }
}

/// The abridged form of a full tag word.
fn abridge(full: u16) -> u8 {
    (0..8).fold(0, |w, n| w | u8::from(full >> (2 * n) & 3 != 3) << n)
}

/// Control word as the processor keeps it: bit 6 reads as one, reserved bits as zero.
fn normalise_fcw(fcw: u16) -> u16 {
    fcw & 0x1f3f | 0x40
}

/// Sets or clears ES and B as flags and masks demand.
fn summarise(word: u16, fcw: u16) -> u16 {
    if word & !fcw & fsw::FLAGS != 0 { word | fsw::ES | fsw::B } else { word & !(fsw::ES | fsw::B) }
}

/// What [`Fpu::ready`] tells: instructions of these kinds may run without further checks.
pub(crate) mod ready {
    /// Legacy SSE.
    pub(crate) const SSE: u8 = 1;
    /// AVX.
    pub(crate) const AVX: u8 = 2;
    /// x87.
    pub(crate) const X87: u8 = 4;
    /// MMX.
    pub(crate) const MMX: u8 = 8;
}

/// The guest's floating-point and vector state.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub struct Fpu {
    /// Vector registers 0 to 15.
    pub vec: [Vector; 16],
    legacy: Legacy,
    /// MXCSR; while it is live in the host, newer sticky flags are there.
    mxcsr: u32,
    /// The host's MXCSR holds the guest's modes and flags, with every exception masked.
    mxcsr_live: bool,
    /// The host's x87 unit holds the guest's registers, and `legacy` is stale.
    x87_live: bool,
    /// While live: the guest has an x87 exception unmasked, so the status must be looked at after each instruction.
    x87_unmasked: bool,
    /// Opcode of the last x87 instruction that is not a control instruction (11 bits).
    pub fop: u16,
    /// Its address: offset in its code segment. Selectors are not kept (CPUID says so).
    pub fip: u64,
    /// Address of its memory operand: offset in its segment.
    pub fdp: u64,
    /// Extended control register 0. Changes of it, too, need [`Fpu::control_changed`].
    pub xcr0: u64,
    /// Bits of [`ready`]: control registers permit, the host's units hold the guest's modes and registers, and no
    /// exception can come of it (all are masked, none is pending).
    pub(crate) ready: u8,
}

impl Default for Fpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Fpu {
    /// State after reset.
    pub fn new() -> Self {
        let mut fpu = Self {
            vec: [Vector([0; 64]); 16],
            legacy: Legacy::init(),
            mxcsr: mxcsr::DEFAULT,
            mxcsr_live: false,
            x87_live: false,
            x87_unmasked: false,
            fop: 0,
            fip: 0,
            fdp: 0,
            xcr0: xcr0::X87,
            ready: 0,
        };
        // RESET, unlike FNINIT, leaves exceptions masked, all registers zero and *not* empty (Intel SDM vol. 3, 10.1.1).
        fpu.legacy.fcw = 0x40;
        fpu.legacy.ftw = 0xff;
        fpu
    }

    /// What INIT does: all registers keep their contents, XCR0 too; they are brought to memory.
    pub fn init(&mut self) {
        self.flush();
        self.control_changed();
    }

    /// Must be called after every change of CR0, CR4, XCR0 or of the mode: instructions are checked anew.
    #[inline(always)]
    pub fn control_changed(&mut self) {
        self.ready = 0;
    }

    /// Brings everything into memory and leaves the host's units as Rust expects them. Must be called before the
    /// thread does anything else than run this vCPU, and before the state is looked at from elsewhere.
    pub fn flush(&mut self) {
        self.park();
        self.x87();
    }

    /// Gives the host its default MXCSR back, for code outside the CPU. Cheap when nothing is live.
    #[inline]
    pub fn park(&mut self) {
        if self.mxcsr_live {
            self.mxcsr |= host::stmxcsr() & mxcsr::FLAGS;
            host::ldmxcsr(mxcsr::DEFAULT);
            self.mxcsr_live = false;
            self.ready &= !(ready::SSE | ready::AVX);
        }
    }

    /// MXCSR.
    #[inline]
    pub fn mxcsr(&self) -> u32 {
        if self.mxcsr_live { self.mxcsr | host::stmxcsr() & mxcsr::FLAGS } else { self.mxcsr }
    }

    /// Sets MXCSR. The caller has checked [`mxcsr::VALID`].
    #[inline]
    pub fn set_mxcsr(&mut self, value: u32) {
        self.mxcsr = value & mxcsr::VALID;
        self.ready &= !(ready::SSE | ready::AVX);
        if self.mxcsr_live {
            host::ldmxcsr(self.mxcsr | mxcsr::MASKS);
        }
    }

    /// Makes the host compute with the guest's SSE modes, every exception masked. Returns whether the guest has them
    /// all masked, too.
    pub(crate) fn enter_sse(&mut self) -> bool {
        if !self.mxcsr_live {
            host::ldmxcsr(self.mxcsr | mxcsr::MASKS);
            self.mxcsr_live = true;
        }
        self.mxcsr & mxcsr::MASKS == mxcsr::MASKS
    }

    /// The x87 state in memory, for reading and changing.
    #[inline]
    pub fn x87(&mut self) -> &mut Legacy {
        if self.x87_live {
            self.store_x87();
            host::fninit();
            self.x87_live = false;
            self.ready &= !(ready::X87 | ready::MMX);
        }
        &mut self.legacy
    }

    /// The x87 state in memory, for reading; the host keeps its copy.
    #[inline]
    pub fn x87_ref(&mut self) -> &Legacy {
        if self.x87_live {
            self.store_x87();
        }
        &self.legacy
    }

    #[cold]
    fn store_x87(&mut self) {
        host::fxsave(&mut self.legacy);
    }

    /// Loads the x87 state into the host's unit.
    ///
    /// It must not hold a pending exception: the host itself would fault.
    #[cold]
    pub(crate) fn load_x87(&mut self) {
        debug_assert!(self.legacy.fsw & !self.legacy.fcw & fsw::FLAGS == 0);
        self.legacy.host_mxcsr = host::stmxcsr();
        self.x87_unmasked = self.legacy.fcw & fsw::FLAGS != fsw::FLAGS;
        host::fxrstor(&self.legacy);
        self.x87_live = true;
    }

    /// Whether the host's unit holds the x87 state.
    #[inline(always)]
    pub(crate) fn x87_is_live(&self) -> bool {
        self.x87_live
    }

    /// Whether the status must be looked at after an x87 instruction.
    #[inline(always)]
    pub(crate) fn x87_is_unmasked(&self) -> bool {
        self.x87_unmasked
    }

    /// Whether an unmasked x87 exception waits to be delivered (#MF). Never while live.
    #[inline(always)]
    pub fn x87_pending(&self) -> bool {
        !self.x87_live && self.legacy.fsw & fsw::ES != 0
    }

    /// Looks whether the last instruction left an unmasked exception pending; if so the state goes back to memory,
    /// where it can wait. Returns the pending flags.
    #[cold]
    pub(crate) fn settle_x87(&mut self) -> u16 {
        if !self.x87_live || host::fnstsw() & fsw::ES == 0 {
            return 0;
        }
        let image = self.x87();
        image.fsw & !image.fcw & fsw::FLAGS
    }

    /// Status word.
    #[inline]
    pub fn fsw(&self) -> u16 {
        if self.x87_live { host::fnstsw() } else { self.legacy.fsw }
    }

    /// Control word.
    #[inline]
    pub fn fcw(&self) -> u16 {
        if self.x87_live { host::fnstcw() } else { self.legacy.fcw }
    }

    /// FLDCW: sets the control word.
    #[inline]
    pub fn set_fcw(&mut self, value: u16) {
        let value = normalise_fcw(value);
        if self.x87_live && host::fnstsw() & !value & fsw::FLAGS == 0 {
            host::fldcw(value);
            self.x87_unmasked = value & fsw::FLAGS != fsw::FLAGS;
            if self.x87_unmasked {
                self.ready &= !(ready::X87 | ready::MMX);
            }
            return;
        }
        let image = self.x87();
        image.fcw = value;
        image.fsw = summarise(image.fsw, value);
    }

    /// FNCLEX: clears exception flags, ES, SF and B.
    pub fn clear_x87_exceptions(&mut self) {
        self.x87().fsw &= 0x7f00;
    }

    /// FNINIT. The data registers keep their bits.
    pub fn fninit(&mut self) {
        self.x87().set_env(FCW_INIT, 0, 0);
        (self.fop, self.fip, self.fdp) = (0, 0, 0);
    }

    /// Starts to ignore a pending exception (CR0.NE is clear): it is masked until [`Self::end_ignoring`] gets back the
    /// control word returned here. `None` if none is pending.
    pub(crate) fn begin_ignoring(&mut self) -> Option<u16> {
        self.x87_pending().then(|| {
            let image = self.x87();
            let fcw = image.fcw;
            image.fcw |= fsw::FLAGS;
            image.fsw = summarise(image.fsw, image.fcw);
            fcw
        })
    }

    /// See [`Self::begin_ignoring`].
    pub(crate) fn end_ignoring(&mut self, fcw: u16) {
        let image = self.x87();
        image.fcw = fcw;
        image.fsw = summarise(image.fsw, fcw);
    }

    /// An MMX register.
    pub(crate) fn mmx(&mut self, n: usize) -> [u8; 8] {
        let image = self.x87_ref();
        let r = image.st[(n + 8 - image.top()) & 7];
        [r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]]
    }

    /// Whether the state is as MMX instructions leave it.
    pub(crate) fn in_mmx(&mut self) -> bool {
        let image = self.x87_ref();
        image.ftw == 0xff && image.top() == 0
    }

    /// What every MMX instruction but EMMS does: the top of stack is register 0, and no register is empty.
    pub(crate) fn enter_mmx(&mut self) {
        let image = self.x87();
        image.set_env(image.fcw, image.fsw & !(7 << fsw::TOP_SHIFT), 0xff);
    }

    /// EMMS: the top of stack is register 0, and every register is empty.
    pub fn emms(&mut self) {
        if self.x87_live {
            host::emms();
        } else {
            let image = &mut self.legacy;
            image.set_env(image.fcw, image.fsw & !(7 << fsw::TOP_SHIFT), 0);
        }
    }

    /// Zeroes bits 128 and up of the first `count` vector registers (16 in 64-bit mode, else 8).
    pub fn vzeroupper(&mut self, count: usize) {
        for v in self.vec.iter_mut().take(count) {
            v.0[16..].fill(0);
        }
    }

    /// Zeroes the first `count` vector registers.
    pub fn vzeroall(&mut self, count: usize) {
        for v in self.vec.iter_mut().take(count) {
            v.0.fill(0);
        }
    }
}

/// Runs `f` with the given modes in the host's MXCSR (no exception unmasked), and returns the flags that it raised. The
/// guest's modes must not be live ([`Fpu::park`]).
pub(crate) fn with_mxcsr(modes: u32, f: impl FnOnce()) -> u32 {
    host::ldmxcsr(modes & !mxcsr::FLAGS | mxcsr::MASKS);
    f();
    let raised = host::stmxcsr() & mxcsr::FLAGS;
    host::ldmxcsr(mxcsr::DEFAULT);
    raised
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_the_top_of_stack_keeps_physical_registers() {
        let mut f = Fpu::new();
        f.fninit();
        let image = f.x87();
        for (i, r) in image.st.iter_mut().enumerate() {
            r[0] = i as u8;
        }
        image.set_env(FCW_INIT, 3 << fsw::TOP_SHIFT, 0xff);
        // Physical register 3 is now ST(0); it was ST(3).
        assert_eq!(image.st.map(|r| r[0]), [3, 4, 5, 6, 7, 0, 1, 2]);
        image.set_env(FCW_INIT, 0, 0xff);
        assert_eq!(image.st.map(|r| r[0]), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn tags() {
        let mut f = Fpu::new();
        f.fninit();
        let image = f.x87();
        image.set_env(FCW_INIT, 0, 0x0f);
        image.st[1][7] = 0x80; // exponent 0: denormal
        image.st[2][9] = 0x3f; // unnormal
        image.st[3] = *b"\0\0\0\0\0\0\0\x80\xff\x3f\0\0\0\0\0\0"; // 1.0
        assert_eq!(image.full_ftw(), 0xff00 | 1 | 2 << 2 | 2 << 4);
        assert_eq!(abridge(image.full_ftw()), 0x0f);
    }

    #[test]
    fn unmasking_a_raised_exception_makes_it_pending() {
        let mut f = Fpu::new();
        f.fninit();
        f.x87().fsw = 1; // IE
        f.set_fcw(0x37f);
        assert!(!f.x87_pending());
        f.set_fcw(0x37e);
        assert!(f.x87_pending());
        assert_eq!(f.fsw() & (fsw::ES | fsw::B), fsw::ES | fsw::B);
        f.clear_x87_exceptions();
        assert!(!f.x87_pending());
    }

    #[test]
    fn sticky_flags_survive_parking() {
        let mut f = Fpu::new();
        f.set_mxcsr(0x1f80 | 4);
        assert!(f.enter_sse());
        assert_eq!(f.mxcsr(), 0x1f84);
        f.park();
        assert_eq!(f.mxcsr(), 0x1f84);
        f.set_mxcsr(0x1f00);
        assert!(!f.enter_sse());
        f.park();
        assert_eq!(host::stmxcsr(), mxcsr::DEFAULT);
    }

    #[test]
    fn the_host_unit_keeps_the_stack() {
        let mut f = Fpu::new();
        f.fninit();
        f.x87().set_env(FCW_INIT, 5 << fsw::TOP_SHIFT, 0xe0);
        for i in 0..3 {
            f.legacy.st[i] = [i as u8 + 1, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f, 0, 0, 0, 0, 0, 0];
        }
        let before = f.legacy.st;
        f.load_x87();
        assert!(f.x87_is_live());
        f.flush();
        assert_eq!(f.legacy.st, before);
        assert_eq!((f.legacy.ftw, f.legacy.top()), (0xe0, 5));
    }
}
