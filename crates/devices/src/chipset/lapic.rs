//! The local APIC: registers, priorities, local vector table (Intel SDM vol. 3, chapter 11).
//!
//! Any thread posts interrupts; only the vCPU that owns the APIC acknowledges them and writes its registers. So there
//! is no lock: the request bits are atomic, and the rest is the owner's. Posting is an atomic OR and, if the vCPU
//! might take the interrupt, a signal. What concerns more than one APIC is in [`super::irqchip`].

use super::clock::Clock;
use super::lapic_timer::{ApicTimer, Mode};
use super::message::{Delivery, Destination, Message};
use accel::{CpuSignals, MsrFault, Signal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Register numbers: offset in the xAPIC page / 16, and x2APIC MSR less 0x800.
pub(super) mod reg {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const APR: usize = 0x09;
    pub const PPR: usize = 0x0a;
    pub const EOI: usize = 0x0b;
    pub const RRD: usize = 0x0c;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const IRR_LAST: usize = 0x27;
    pub const ESR: usize = 0x28;
    pub const ICR: usize = 0x30;
    pub const ICR2: usize = 0x31;
    pub const LVT_TIMER: usize = 0x32;
    pub const LVT_THERMAL: usize = 0x33;
    pub const LVT_PERF: usize = 0x34;
    pub const LVT_LINT0: usize = 0x35;
    pub const LVT_LINT1: usize = 0x36;
    pub const LVT_ERROR: usize = 0x37;
    pub const INITIAL_COUNT: usize = 0x38;
    pub const CURRENT_COUNT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
    pub const SELF_IPI: usize = 0x3f;
}

/// Bytes of the saved register page.
pub(super) const PAGE: usize = 0x400;

/// Version 0x14 (integrated APIC), six LVT entries, EOI broadcasts can be suppressed.
const VERSION: u32 = 0x14 | 5 << 16 | 1 << 24;

/// IA32_APIC_BASE.
pub(super) const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const DEFAULT_ADDRESS: u64 = 0xfee0_0000;

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_X2APIC: u32 = 0x800;

/// Spurious-interrupt vector register.
const SVR_ENABLE: u32 = 1 << 8;
const SVR_NO_BROADCAST: u32 = 1 << 12;

const LVT_MASKED: u32 = 1 << 16;
const LVT_LEVEL: u32 = 1 << 15;
const LVT_REMOTE_IRR: u32 = 1 << 14;

/// Error status register.
const ESR_SEND_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_VECTOR: u32 = 1 << 6;
const ESR_REGISTER: u32 = 1 << 7;

/// Bit of [`Lapic::pending`] beside the eight for the request words: an ExtINT may be there.
const PENDING_EXTINT: u32 = 1 << 8;

/// What a local APIC needs of the others.
pub(super) trait Fabric {
    /// Sends an interrupt message; returns whether anybody took it.
    fn send(&self, message: Message) -> bool;
    /// Tells the IOAPIC that an interrupt of this vector has ended.
    fn end_of_interrupt(&self, vector: u8);
    /// Acknowledges the 8259's interrupt, if it has one.
    fn acknowledge_pic(&self) -> Option<u8>;
}

/// One local APIC.
pub(super) struct Lapic {
    id: u32,
    index: usize,
    signals: Arc<CpuSignals>,
    base: AtomicU64,
    regs: [AtomicU32; PAGE / 16],
    /// Request words that may have a bit set, and [`PENDING_EXTINT`]. Set by whoever posts, cleared by the owner.
    pending: AtomicU32,
    /// Level of LINT0, where the 8259s' output is.
    lint0: AtomicBool,
    /// An ExtINT came by message.
    extint: AtomicBool,
    /// Errors since the last write to the ESR.
    errors: AtomicU32,
    timer: ApicTimer,
}

/// Where a deliverable interrupt comes from.
enum Source {
    ExtInt,
    Vector(u8),
}

fn highest(words: &[AtomicU32]) -> Option<u8> {
    words.iter().enumerate().rev().find_map(|(i, w)| {
        let bits = w.load(Ordering::Relaxed);
        (bits != 0).then(|| (i * 32 + 31 - bits.leading_zeros() as usize) as u8) // below 256
    })
}

impl Lapic {
    pub(super) fn new(
        index: usize,
        id: u32,
        signals: Arc<CpuSignals>,
        clock: &Clock,
        timer_expired: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let apic = Self {
            id,
            index,
            signals,
            base: AtomicU64::new(0),
            regs: std::array::from_fn(|_| AtomicU32::new(0)),
            pending: AtomicU32::new(0),
            lint0: AtomicBool::new(false),
            extint: AtomicBool::new(false),
            errors: AtomicU32::new(0),
            timer: ApicTimer::new(clock, timer_expired),
        };
        apic.reset();
        apic
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    fn get(&self, reg: usize) -> u32 {
        self.regs[reg].load(Ordering::Relaxed)
    }

    fn put(&self, reg: usize, value: u32) {
        self.regs[reg].store(value, Ordering::SeqCst);
    }

    /// RESET: as [`Self::init`], and the base goes back to its default.
    pub(super) fn reset(&self) {
        let bsp = if self.index == 0 { BASE_BSP } else { 0 };
        self.base.store(DEFAULT_ADDRESS | BASE_ENABLE | bsp, Ordering::SeqCst);
        self.init();
        if self.index == 0 {
            // "Virtual wire": what firmware sets up, and systems that are started without it expect, is that the
            // bootstrap processor gets the 8259s' interrupts.
            self.put(reg::LVT_LINT0, 0x700);
            self.look_at_lint0();
        }
    }

    /// INIT (SDM vol. 3, 11.4.7.1 and 11.4.7.3): all but the ID and base.
    pub(super) fn init(&self) {
        for r in &self.regs {
            r.store(0, Ordering::SeqCst);
        }
        self.pending.store(0, Ordering::SeqCst);
        self.extint.store(false, Ordering::SeqCst);
        self.errors.store(0, Ordering::SeqCst);
        self.timer.reset();
        self.put(reg::DFR, u32::MAX);
        self.put(reg::SVR, 0xff);
        for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
            self.put(lvt, LVT_MASKED);
        }
        self.set_identity();
        self.look_at_lint0();
    }

    /// The registers that follow from ID and mode.
    fn set_identity(&self) {
        self.put(reg::VERSION, VERSION);
        if self.x2apic() {
            self.put(reg::ID, self.id);
            self.put(reg::LDR, (self.id >> 4) << 16 | 1 << (self.id & 15));
        } else {
            self.put(reg::ID, self.id << 24);
        }
    }

    pub(super) fn base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// Whether it is there at all.
    pub(super) fn present(&self) -> bool {
        self.base() & BASE_ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.base() & BASE_X2APIC != 0
    }

    fn software_enabled(&self) -> bool {
        self.get(reg::SVR) & SVR_ENABLE != 0
    }

    // Receiving.

    /// Whether a message to this destination is for this APIC (SDM vol. 3, 11.6.2).
    pub(super) fn matches(&self, destination: Destination) -> bool {
        match destination {
            Destination::All => true,
            Destination::AllBut(index) => self.index != index,
            Destination::Index(index) => self.index == index,
            Destination::Physical(id) => self.id == id,
            Destination::Logical(mda) => {
                let ldr = self.get(reg::LDR);
                if self.x2apic() {
                    return mda >> 16 == ldr >> 16 && mda & ldr & 0xffff != 0;
                }
                let ldr = ldr >> 24;
                match self.get(reg::DFR) >> 28 {
                    0xf => mda & ldr & 0xff != 0,
                    // Cluster model; cluster 15 is everybody's.
                    0 => (mda >> 4 == 0xf || mda >> 4 == ldr >> 4) && mda & ldr & 0xf != 0,
                    _ => false,
                }
            }
        }
    }

    /// What the lowest-priority arbitration compares; `None` for an APIC that takes no part.
    pub(super) fn arbitration(&self) -> Option<u32> {
        (self.present() && self.software_enabled()).then(|| self.get(reg::PPR) & 0xff)
    }

    /// Takes a message. Returns whether it did.
    pub(super) fn accept(&self, delivery: Delivery, vector: u8, level: bool) -> bool {
        if !self.present() {
            return false;
        }
        match delivery {
            Delivery::Fixed | Delivery::LowestPriority => return self.post(vector, level),
            Delivery::Smi => self.signals.raise(Signal::SMI),
            Delivery::Nmi => self.signals.raise(Signal::NMI),
            Delivery::Init => self.signals.raise(Signal::INIT),
            Delivery::Startup => self.signals.raise_sipi(vector),
            Delivery::ExtInt => {
                self.extint.store(true, Ordering::SeqCst);
                self.pending.fetch_or(PENDING_EXTINT, Ordering::SeqCst);
                self.signals.raise(Signal::INTERRUPT);
            }
        }
        true
    }

    fn post(&self, vector: u8, level: bool) -> bool {
        if !self.software_enabled() {
            return false;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_VECTOR);
            return false;
        }
        let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
        let trigger = &self.regs[reg::TMR + word];
        let is_level = trigger.load(Ordering::Relaxed) & bit != 0;
        if level && !is_level {
            trigger.fetch_or(bit, Ordering::SeqCst);
        } else if !level && is_level {
            trigger.fetch_and(!bit, Ordering::SeqCst);
        }
        let old = self.regs[reg::IRR + word].fetch_or(bit, Ordering::SeqCst);
        self.pending.fetch_or(1 << word, Ordering::SeqCst);
        // The owner lowers its priority first and looks at the requests then; here it is the other way round. So one
        // of the two sees that the interrupt can go.
        if old & bit == 0 && u32::from(vector >> 4) > self.regs[reg::PPR].load(Ordering::SeqCst) >> 4 {
            self.signals.raise(Signal::INTERRUPT);
        }
        true
    }

    /// Sets the level of LINT0.
    pub(super) fn set_lint0(&self, level: bool) {
        if self.lint0.swap(level, Ordering::SeqCst) == level || !level {
            return;
        }
        self.look_at_lint0();
        let lvt = self.get(reg::LVT_LINT0);
        if self.present() && (lvt >> 8) & 7 != 7 {
            self.deliver_local(reg::LVT_LINT0);
        }
    }

    /// LINT1, where NMIs come in.
    pub(super) fn raise_lint1(&self) {
        if self.present() { self.deliver_local(reg::LVT_LINT1) } else { self.signals.raise(Signal::NMI) }
    }

    /// Notes that the 8259s' interrupt can be taken, if it can.
    fn look_at_lint0(&self) {
        if self.lint0_extint() {
            self.pending.fetch_or(PENDING_EXTINT, Ordering::SeqCst);
            self.signals.raise(Signal::INTERRUPT);
        }
    }

    /// Whether LINT0 asks for an 8259 interrupt. Without an APIC, LINT0 is the processor's INTR pin.
    fn lint0_extint(&self) -> bool {
        let lvt = self.regs[reg::LVT_LINT0].load(Ordering::SeqCst);
        self.lint0.load(Ordering::SeqCst) && (!self.present() || lvt & (LVT_MASKED | 0x700) == 0x700)
    }

    /// Delivers what an LVT entry says. Returns nothing: a masked entry drops the event.
    fn deliver_local(&self, lvt: usize) {
        let entry = self.get(lvt);
        if entry & LVT_MASKED != 0 {
            return;
        }
        match Delivery::from_bits(entry >> 8) {
            Some(Delivery::Fixed) => {
                let level = lvt == reg::LVT_LINT0 && entry & LVT_LEVEL != 0;
                if level {
                    if entry & LVT_REMOTE_IRR != 0 {
                        return;
                    }
                    self.regs[lvt].fetch_or(LVT_REMOTE_IRR, Ordering::SeqCst);
                }
                self.post(entry as u8, level);
            }
            Some(delivery @ (Delivery::Smi | Delivery::Nmi | Delivery::Init)) => {
                self.accept(delivery, 0, false);
            }
            Some(Delivery::ExtInt) if lvt == reg::LVT_LINT1 => {
                self.accept(Delivery::ExtInt, 0, false);
            }
            _ => {}
        }
    }

    /// The timer's callback.
    pub(super) fn timer_expired(&self) {
        if self.timer.expire() {
            self.deliver_timer();
        }
    }

    fn deliver_timer(&self) {
        let lvt = self.get(reg::LVT_TIMER);
        if self.present() && lvt & LVT_MASKED == 0 {
            self.post(lvt as u8, false);
        }
    }

    fn error(&self, bit: u32) {
        let old = self.errors.fetch_or(bit, Ordering::SeqCst);
        let lvt = self.get(reg::LVT_ERROR);
        // An error entry with an illegal vector would be one more error, of the same kind, without end.
        if old & bit == 0 && lvt & LVT_MASKED == 0 && lvt & 0xff >= 16 {
            self.post(lvt as u8, false);
        }
    }

    // The owner's side: delivery.

    #[inline]
    pub(super) fn has_interrupt(&self) -> bool {
        self.pending.load(Ordering::SeqCst) != 0 && self.deliverable().is_some()
    }

    fn deliverable(&self) -> Option<Source> {
        if self.pending.load(Ordering::SeqCst) & PENDING_EXTINT != 0 {
            if self.extint_ready() {
                return Some(Source::ExtInt);
            }
            self.pending.fetch_and(!PENDING_EXTINT, Ordering::SeqCst);
            if self.extint_ready() {
                self.pending.fetch_or(PENDING_EXTINT, Ordering::SeqCst);
                return Some(Source::ExtInt);
            }
        }
        if !self.present() {
            return None;
        }
        let vector = self.highest_request()?;
        (u32::from(vector >> 4) > self.get(reg::PPR) >> 4).then_some(Source::Vector(vector))
    }

    fn extint_ready(&self) -> bool {
        self.extint.load(Ordering::SeqCst) || self.lint0_extint()
    }

    fn highest_request(&self) -> Option<u8> {
        loop {
            let words = self.pending.load(Ordering::SeqCst) & 0xff;
            if words == 0 {
                return None;
            }
            let word = 31 - words.leading_zeros();
            let request = &self.regs[reg::IRR + word as usize];
            let bits = request.load(Ordering::SeqCst);
            if bits != 0 {
                return Some((word * 32 + 31 - bits.leading_zeros()) as u8); // below 256
            }
            self.pending.fetch_and(!(1 << word), Ordering::SeqCst);
            if request.load(Ordering::SeqCst) != 0 {
                self.pending.fetch_or(1 << word, Ordering::SeqCst);
            }
        }
    }

    pub(super) fn acknowledge(&self, fabric: &impl Fabric) -> Option<u8> {
        let vector = match self.deliverable()? {
            Source::ExtInt => {
                // A message stands for one interrupt; the 8259's output is a level.
                self.extint.store(false, Ordering::SeqCst);
                fabric.acknowledge_pic()
            }
            Source::Vector(vector) => {
                let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
                self.regs[reg::IRR + word].fetch_and(!bit, Ordering::SeqCst);
                self.regs[reg::ISR + word].fetch_or(bit, Ordering::SeqCst);
                self.put(reg::PPR, self.get(reg::TPR).max(u32::from(vector & 0xf0)));
                Some(vector)
            }
        };
        self.signal_if_deliverable();
        vector
    }

    fn signal_if_deliverable(&self) {
        if self.has_interrupt() {
            self.signals.raise(Signal::INTERRUPT);
        }
    }

    /// Processor priority (SDM vol. 3, 11.8.3.1), after a change of task priority or service.
    fn update_priority(&self) {
        let tpr = self.get(reg::TPR);
        let service = highest(&self.regs[reg::ISR..reg::ISR + 8]).unwrap_or(0);
        let service = u32::from(service) & 0xf0;
        self.put(reg::PPR, if tpr & 0xf0 >= service { tpr } else { service });
        self.signal_if_deliverable();
    }

    fn set_tpr(&self, value: u32) {
        self.put(reg::TPR, value & 0xff);
        self.update_priority();
    }

    pub(super) fn cr8(&self) -> u8 {
        (self.get(reg::TPR) >> 4) as u8 // four bits
    }

    pub(super) fn set_cr8(&self, value: u8) {
        self.set_tpr(u32::from(value & 15) << 4);
    }

    fn end_of_interrupt(&self, fabric: &impl Fabric) {
        let Some(vector) = highest(&self.regs[reg::ISR..reg::ISR + 8]) else { return };
        let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
        self.regs[reg::ISR + word].fetch_and(!bit, Ordering::SeqCst);
        self.update_priority();
        if self.get(reg::TMR + word) & bit == 0 {
            return;
        }
        let lint0 = self.get(reg::LVT_LINT0);
        if lint0 & LVT_REMOTE_IRR != 0 && lint0 as u8 == vector {
            self.regs[reg::LVT_LINT0].fetch_and(!LVT_REMOTE_IRR, Ordering::SeqCst);
            if self.lint0.load(Ordering::SeqCst) {
                self.deliver_local(reg::LVT_LINT0);
            }
        }
        if self.get(reg::SVR) & SVR_NO_BROADCAST == 0 {
            fabric.end_of_interrupt(vector);
        }
    }

    /// Interrupt command register (SDM vol. 3, 11.6.1).
    fn command(&self, fabric: &impl Fabric, low: u32, dest: u32) {
        let vector = low as u8;
        let Some(delivery) = Delivery::from_bits(low >> 8) else { return };
        // INIT level de-assert only touched arbitration IDs, which are no more; there is no ExtINT IPI.
        let deassert = delivery == Delivery::Init && low & 0xc000 == 0x8000;
        if deassert || delivery == Delivery::ExtInt {
            return;
        }
        if matches!(delivery, Delivery::Fixed | Delivery::LowestPriority) && vector < 16 {
            self.error(ESR_SEND_VECTOR);
            return;
        }
        let destination = match (low >> 18) & 3 {
            1 => Destination::Index(self.index),
            2 => Destination::All,
            3 => Destination::AllBut(self.index),
            _ => Destination::new(dest, low & 0x800 != 0, self.x2apic()),
        };
        if destination == Destination::Index(self.index) {
            // A self IPI is of fixed delivery; the other modes are invalid with this shorthand.
            if delivery == Delivery::Fixed {
                self.post(vector, false);
            }
            return;
        }
        fabric.send(Message { destination, delivery, vector, level: false });
    }

    // The owner's side: registers.

    fn read_reg(&self, r: usize) -> u32 {
        match r {
            reg::INITIAL_COUNT => self.timer.initial(),
            reg::CURRENT_COUNT => self.timer.count(),
            reg::ID
            | reg::VERSION
            | reg::TPR
            | reg::PPR
            | reg::LDR
            | reg::DFR
            | reg::SVR
            | reg::ISR..=reg::IRR_LAST
            | reg::ESR
            | reg::ICR
            | reg::ICR2
            | reg::LVT_TIMER..=reg::LVT_ERROR
            | reg::DIVIDE => self.get(r),
            // Write-only, or obsolete: no arbitration bus, no remote read.
            reg::EOI | reg::APR | reg::RRD => 0,
            _ => {
                self.error(ESR_REGISTER);
                0
            }
        }
    }

    fn write_reg(&self, fabric: &impl Fabric, r: usize, value: u32) {
        match r {
            reg::TPR => self.set_tpr(value),
            reg::EOI => self.end_of_interrupt(fabric),
            reg::LDR if !self.x2apic() => self.put(r, value & 0xff00_0000),
            reg::DFR if !self.x2apic() => self.put(r, value | 0x0fff_ffff),
            reg::SVR => self.set_svr(value),
            reg::ESR => self.put(r, self.errors.swap(0, Ordering::SeqCst)),
            reg::ICR => {
                self.put(r, value & 0x000c_cfff);
                self.command(fabric, value, self.get(reg::ICR2) >> 24);
            }
            reg::ICR2 => self.put(r, value & 0xff00_0000),
            reg::LVT_TIMER..=reg::LVT_ERROR => self.set_lvt(r, value),
            reg::INITIAL_COUNT => self.timer.set_initial(value),
            reg::DIVIDE => {
                self.put(r, value & 0xb);
                self.timer.set_divider(value);
            }
            // Read-only; hardware ignores such writes.
            reg::ID | reg::VERSION | reg::APR..=reg::PPR | reg::RRD..=reg::DFR => {}
            reg::ISR..=reg::IRR_LAST | reg::CURRENT_COUNT => {}
            _ => self.error(ESR_REGISTER),
        }
    }

    fn set_svr(&self, value: u32) {
        self.put(reg::SVR, value & (0xff | SVR_ENABLE | SVR_NO_BROADCAST));
        if value & SVR_ENABLE == 0 {
            for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
                self.regs[lvt].fetch_or(LVT_MASKED, Ordering::SeqCst);
            }
        }
    }

    /// Bits of an LVT entry that a guest can write.
    fn lvt_mask(r: usize) -> u32 {
        LVT_MASKED
            | match r {
                reg::LVT_TIMER => 0x6_00ff,
                reg::LVT_THERMAL | reg::LVT_PERF => 0x7ff,
                reg::LVT_LINT0 | reg::LVT_LINT1 => 0xa7ff,
                _ => 0xff,
            }
    }

    fn set_lvt(&self, r: usize, value: u32) {
        let mut value = value & Self::lvt_mask(r);
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        if r == reg::LVT_LINT0 && value & LVT_LEVEL != 0 {
            value |= self.get(r) & LVT_REMOTE_IRR;
        }
        self.put(r, value);
        match r {
            reg::LVT_TIMER => self.timer.set_mode(Mode::from_lvt(value)),
            reg::LVT_LINT0 => self.look_at_lint0(),
            _ => {}
        }
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        if !self.present() || self.x2apic() {
            data.fill(0xff);
            return;
        }
        data.fill(0);
        // Registers are 32 bits at multiples of 16; what is between reads as zero here.
        let (r, within) = ((offset >> 4) as usize, (offset & 15) as usize);
        if r >= self.regs.len() || within >= 4 {
            self.error(ESR_REGISTER);
            return;
        }
        let bytes = self.read_reg(r).to_le_bytes();
        for (d, s) in data.iter_mut().zip(&bytes[within..]) {
            *d = *s;
        }
    }

    pub(super) fn write(&self, fabric: &impl Fabric, offset: u64, data: &[u8]) {
        if !self.present() || self.x2apic() {
            return;
        }
        let r = (offset >> 4) as usize;
        let value = data.first_chunk().map(|b| u32::from_le_bytes(*b));
        match value {
            Some(value) if offset & 15 == 0 && r < self.regs.len() && r != reg::SELF_IPI => {
                self.write_reg(fabric, r, value);
            }
            _ => self.error(ESR_REGISTER),
        }
    }

    pub(super) fn read_msr(&self, msr: u32) -> Result<u64, MsrFault> {
        match msr {
            MSR_APIC_BASE => return Ok(self.base()),
            MSR_TSC_DEADLINE => return Ok(self.timer.deadline()),
            _ => {}
        }
        let r = self.x2apic_register(msr)?;
        match r {
            reg::APR | reg::RRD | reg::EOI | reg::DFR | reg::ICR2 | reg::SELF_IPI => Err(MsrFault),
            reg::ICR => Ok(u64::from(self.get(reg::ICR)) | u64::from(self.get(reg::ICR2)) << 32),
            _ if !Self::exists(r) => Err(MsrFault),
            _ => Ok(self.read_reg(r).into()),
        }
    }

    fn x2apic_register(&self, msr: u32) -> Result<usize, MsrFault> {
        let r = msr.checked_sub(MSR_X2APIC).ok_or(MsrFault)? as usize;
        if !self.x2apic() || !self.present() || r >= self.regs.len() { Err(MsrFault) } else { Ok(r) }
    }

    fn exists(r: usize) -> bool {
        matches!(r, reg::ID | reg::VERSION | reg::TPR | reg::PPR..=reg::EOI | reg::LDR | reg::SVR..=reg::ESR)
            || matches!(r, reg::ICR | reg::LVT_TIMER..=reg::CURRENT_COUNT | reg::DIVIDE | reg::SELF_IPI)
    }

    pub(super) fn write_msr(&self, fabric: &impl Fabric, msr: u32, value: u64) -> Result<(), MsrFault> {
        match msr {
            MSR_APIC_BASE => return self.write_base(value),
            MSR_TSC_DEADLINE => {
                if self.timer.set_deadline(value) {
                    self.deliver_timer();
                }
                return Ok(());
            }
            _ => {}
        }
        let r = self.x2apic_register(msr)?;
        // Reserved bits fault (SDM vol. 3, 11.12.1.2, table 11-6).
        let reserved = match r {
            reg::ICR => 0xfff3_2000,
            reg::TPR | reg::SELF_IPI => !0xff,
            reg::SVR => !u64::from(0xff | SVR_ENABLE | SVR_NO_BROADCAST),
            reg::EOI | reg::ESR => !0,
            reg::LVT_TIMER..=reg::LVT_ERROR => !u64::from(Self::lvt_mask(r) | 1 << 12 | LVT_REMOTE_IRR),
            reg::INITIAL_COUNT => !0xffff_ffff,
            reg::DIVIDE => !0xb,
            _ => return Err(MsrFault),
        };
        if value & reserved != 0 {
            return Err(MsrFault);
        }
        let low = value as u32; // the upper half matters to the ICR only
        match r {
            reg::ICR => {
                let dest = (value >> 32) as u32;
                self.put(reg::ICR, low & 0x000c_cfff);
                self.put(reg::ICR2, dest);
                self.command(fabric, low, dest);
            }
            reg::SELF_IPI if low < 16 => self.error(ESR_SEND_VECTOR),
            reg::SELF_IPI => {
                self.post(low as u8, false);
            }
            _ => self.write_reg(fabric, r, low),
        }
        Ok(())
    }

    /// Writes IA32_APIC_BASE: which changes of mode there are is SDM vol. 3, 11.12.5.
    fn write_base(&self, value: u64) -> Result<(), MsrFault> {
        if value & !(BASE_ADDRESS | BASE_ENABLE | BASE_X2APIC | BASE_BSP) != 0 {
            return Err(MsrFault);
        }
        let mode = |base: u64| (base & BASE_ENABLE != 0, base & BASE_X2APIC != 0);
        match (mode(self.base()), mode(value)) {
            (_, (false, true)) | ((true, true), (true, false)) | ((false, _), (true, true)) => Err(MsrFault),
            (old, new) => {
                self.base.store(value, Ordering::SeqCst);
                if new != old && !new.0 {
                    self.init();
                }
                self.set_identity();
                self.look_at_lint0();
                Ok(())
            }
        }
    }

    /// Sets the base as a saved state has it, whatever the mode was.
    pub(super) fn load_base(&self, value: u64) {
        self.base.store(value & (BASE_ADDRESS | BASE_ENABLE | BASE_X2APIC | BASE_BSP), Ordering::SeqCst);
        self.set_identity();
    }

    pub(super) fn set_tsc_offset(&self, offset: u64) {
        if self.timer.set_tsc_offset(offset) {
            self.deliver_timer();
        }
    }

    // State.

    pub(super) fn save(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        for (r, bytes) in page.chunks_mut(16).enumerate() {
            let value = match r {
                reg::INITIAL_COUNT => self.timer.initial(),
                reg::CURRENT_COUNT => self.timer.count(),
                _ => self.get(r),
            };
            bytes[..4].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    pub(super) fn load(&self, page: &[u8; PAGE]) {
        let value = |r: usize| {
            let at = r * 16;
            u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
        };
        for r in 0..self.regs.len() {
            self.put(r, value(r));
        }
        let mut words = 0;
        for word in 0..8 {
            // Vectors below 16 cannot be requested or in service.
            let legal = if word == 0 { 0xffff_0000 } else { u32::MAX };
            for first in [reg::ISR, reg::TMR, reg::IRR] {
                self.put(first + word, value(first + word) & legal);
            }
            words |= u32::from(self.get(reg::IRR + word) != 0) << word;
        }
        self.put(reg::TPR, value(reg::TPR) & 0xff);
        self.put(reg::SVR, value(reg::SVR) & (0xff | SVR_ENABLE | SVR_NO_BROADCAST));
        for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
            self.put(lvt, value(lvt) & (Self::lvt_mask(lvt) | LVT_REMOTE_IRR));
        }
        self.errors.store(0, Ordering::SeqCst);
        self.extint.store(false, Ordering::SeqCst);
        self.pending.store(words, Ordering::SeqCst);
        self.set_identity();
        self.look_at_lint0();
        let mode = Mode::from_lvt(value(reg::LVT_TIMER));
        self.timer.load(mode, value(reg::DIVIDE), value(reg::INITIAL_COUNT), value(reg::CURRENT_COUNT));
        self.update_priority();
    }
}
