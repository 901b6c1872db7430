//! Power management: PM1 blocks, timer, general-purpose events, SMI command port (ACPI specification 6.5, 4.8; Intel
//! ICH9 data sheet, 13.8.3, for the layout of the block).

use super::clock::{Clock, ClockTimer};
use super::tco::{self, NoReboot, Tco};
use bus::{Device, IrqLine, RegionId, State, StateError, System, SystemRequest};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

const KIND: &str = "acpi-pm";

/// Frequency of the power management timer in Hz.
pub const TIMER_FREQUENCY: u64 = 3_579_545;

/// Offsets in the block.
mod offset {
    pub const PM1_STATUS: u64 = 0x00;
    pub const PM1_ENABLE: u64 = 0x02;
    pub const PM1_CONTROL: u64 = 0x04;
    pub const TIMER: u64 = 0x08;
    pub const GPE0_STATUS: u64 = 0x20;
    pub const GPE0_ENABLE: u64 = 0x28;
    pub const SMI_ENABLE: u64 = 0x30;
    pub const SMI_STATUS: u64 = 0x34;
    /// Watchdog, 32 ports.
    pub const TCO: u64 = 0x60;
    pub const END: u64 = 0x80;
}

bitflags::bitflags! {
    /// PM1 events, in the status and the enable register.
    #[derive(Clone, Copy, PartialEq)]
    struct Pm1: u16 {
        const TIMER = 1;
        const GLOBAL = 1 << 5;
        const POWER_BUTTON = 1 << 8;
        const SLEEP_BUTTON = 1 << 9;
        const RTC = 1 << 10;
        /// Status only: woken from sleep.
        const WAKE = 1 << 15;
    }
}

const ENABLES: Pm1 =
    Pm1::TIMER.union(Pm1::GLOBAL).union(Pm1::POWER_BUTTON).union(Pm1::SLEEP_BUTTON).union(Pm1::RTC);

/// SMI enable register: writes of the command port raise one.
const SMI_ON_COMMAND: u32 = 1 << 5;

/// PM1 control register.
const SCI_EN: u16 = 1;
const BM_RLD: u16 = 1 << 1;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;

/// The power management block.
///
/// Events raise the system control interrupt once the guest has taken over: by writing [`AcpiPm::ENABLE`] to the SMI
/// command port.
pub struct AcpiPm {
    inner: Arc<Mutex<Inner>>,
    tco: Tco,
}

struct Inner {
    clock: Clock,
    timer: ClockTimer,
    sci: IrqLine,
    system: System,
    r: Registers,
    /// Value of the timer at clock zero, so that a loaded one goes on.
    timer_base: u32,
    /// Half periods of the timer (changes of its top bit) that the status register knows of.
    halves: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    pm1_status: u16,
    pm1_enable: u16,
    pm1_control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    smi_enable: u32,
    smi_status: u32,
    /// SMI command and status ports, 0xb2 and 0xb3.
    apm: [u8; 2],
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            pm1_status: 0,
            pm1_enable: 0,
            pm1_control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            // System management mode looks set up already, so that firmware leaves it alone: there is none.
            smi_enable: SMI_ON_COMMAND,
            smi_status: 0,
            apm: [0; 2],
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    registers: Registers,
    timer: u32,
    tco: tco::Saved,
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(|e| e.into_inner())
}

impl AcpiPm {
    /// The block, [`Self::LENGTH`] ports at PMBASE.
    pub const BLOCK: RegionId = RegionId(0);
    /// Its length.
    pub const LENGTH: u64 = 0x80;
    /// SMI command and status, ports 0xb2 and 0xb3.
    pub const SMI_COMMAND: RegionId = RegionId(1);
    /// Written to the SMI command port: ACPI on (FADT ACPI_ENABLE).
    pub const ENABLE: u8 = 2;
    /// Written to the SMI command port: ACPI off (FADT ACPI_DISABLE).
    pub const DISABLE: u8 = 3;
    /// SLP_TYP of soft-off, for the DSDT's `_S5`. It is the only sleep there is.
    pub const S5: u8 = 0;

    /// A block whose system control interrupt is `sci` (level-triggered), and whose watchdog does nothing.
    pub fn new(clock: &Clock, sci: IrqLine, system: System) -> Self {
        let no_reboot = NoReboot::default();
        no_reboot.set(true);
        Self::with_watchdog(clock, sci, system, no_reboot)
    }

    /// A block whose watchdog acts unless `no_reboot` is set.
    pub fn with_watchdog(clock: &Clock, sci: IrqLine, system: System, no_reboot: NoReboot) -> Self {
        let tco = Tco::new(clock, system.clone(), no_reboot);
        let inner = Arc::new_cyclic(|inner: &Weak<Mutex<Inner>>| {
            let inner = inner.clone();
            let timer = clock.timer(move || {
                if let Some(inner) = inner.upgrade() {
                    lock(&inner).update();
                }
            });
            let (r, timer_base, halves) = (Registers::default(), 0, 0);
            Mutex::new(Inner { clock: clock.clone(), timer, sci, system, r, timer_base, halves })
        });
        Self { inner, tco }
    }

    /// The user presses the power button. Returns whether the guest will notice.
    pub fn press_power_button(&self) -> bool {
        let mut s = lock(&self.inner);
        s.r.pm1_status |= Pm1::POWER_BUTTON.bits();
        s.update();
        s.r.pm1_control & SCI_EN != 0 && s.r.pm1_enable & Pm1::POWER_BUTTON.bits() != 0
    }

    /// Raises general-purpose event `n` (0..64).
    pub fn raise_gpe(&self, n: u32) {
        let mut s = lock(&self.inner);
        s.r.gpe_status |= 1u64.checked_shl(n).unwrap_or(0);
        s.update();
    }
}

impl Inner {
    /// Ticks of the timer since clock zero, with its value then, beyond its 32 bits.
    fn ticks(&self) -> u64 {
        let passed = u128::from(self.clock.now()) * u128::from(TIMER_FREQUENCY) / 1_000_000_000;
        (passed as u64).wrapping_add(self.timer_base.into()) // fewer than the nanoseconds
    }

    /// Brings the timer's status bit up to date, and the interrupt.
    fn update(&mut self) {
        let ticks = self.ticks();
        let halves = ticks >> 31;
        if halves != self.halves {
            self.halves = halves;
            self.r.pm1_status |= Pm1::TIMER.bits();
        }
        let r = &self.r;
        let event = r.pm1_status & r.pm1_enable != 0 || r.gpe_status & r.gpe_enable != 0;
        self.sci.set(event && r.pm1_control & SCI_EN != 0);
        let waiting = Pm1::TIMER.bits();
        if r.pm1_enable & waiting != 0 && r.pm1_status & waiting == 0 {
            let left = ((halves + 1) << 31).wrapping_sub(ticks);
            let ns = (u128::from(left) * 1_000_000_000).div_ceil(u128::from(TIMER_FREQUENCY));
            self.timer.arm(self.clock.now().saturating_add(u64::try_from(ns).unwrap_or(u64::MAX)));
        } else {
            self.timer.disarm();
        }
    }

    /// The eight bytes at an aligned offset of the block, and how they are read.
    fn read_block(&self, at: u64) -> u64 {
        let r = &self.r;
        match at {
            0 => {
                let pm1 = [r.pm1_status, r.pm1_enable, r.pm1_control];
                pm1.iter().rev().fold(0, |all, v| all << 16 | u64::from(*v))
            }
            offset::TIMER => self.ticks() & 0xffff_ffff,
            offset::GPE0_STATUS => r.gpe_status,
            offset::GPE0_ENABLE => r.gpe_enable,
            offset::SMI_ENABLE => u64::from(r.smi_enable) | u64::from(r.smi_status) << 32,
            _ => 0,
        }
    }

    fn write_byte(&mut self, at: u64, value: u8) {
        let r = &mut self.r;
        // Registers are little-endian and byte-wise writable; status bits are cleared by ones.
        let clear16 = |v: &mut u16, n: u64| *v &= !(u16::from(value) << (8 * n));
        let set16 = |v: &mut u16, n: u64| *v = *v & !(0xff << (8 * n)) | u16::from(value) << (8 * n);
        let set32 = |v: &mut u32, n: u64| *v = *v & !(0xff << (8 * n)) | u32::from(value) << (8 * n);
        let set64 = |v: &mut u64, n: u64| *v = *v & !(0xff << (8 * n)) | u64::from(value) << (8 * n);
        match at {
            offset::PM1_STATUS..offset::PM1_ENABLE => clear16(&mut r.pm1_status, at),
            offset::PM1_ENABLE..offset::PM1_CONTROL => {
                set16(&mut r.pm1_enable, at & 1);
                r.pm1_enable &= ENABLES.bits();
            }
            offset::PM1_CONTROL..0x06 => {
                let mut control = r.pm1_control;
                set16(&mut control, at & 1);
                r.pm1_control = control & (BM_RLD | SLP_TYP) | r.pm1_control & SCI_EN;
                if control & SLP_EN != 0 {
                    self.sleep((control & SLP_TYP) >> SLP_TYP_SHIFT);
                }
            }
            offset::GPE0_STATUS..offset::GPE0_ENABLE => r.gpe_status &= !(u64::from(value) << (8 * (at & 7))),
            offset::GPE0_ENABLE..offset::SMI_ENABLE => set64(&mut r.gpe_enable, at & 7),
            offset::SMI_ENABLE..offset::SMI_STATUS => set32(&mut r.smi_enable, at & 3),
            offset::SMI_STATUS..0x38 => r.smi_status &= !(u32::from(value) << (8 * (at & 3))),
            _ => {}
        }
    }

    fn sleep(&mut self, kind: u16) {
        if kind == u16::from(AcpiPm::S5) {
            self.system.request(SystemRequest::PowerOff);
        } else {
            tracing::debug!("sleep type {kind} is none that the ACPI tables offer");
        }
    }

    fn smi_command(&mut self, value: u8) {
        self.r.apm[0] = value;
        match value {
            AcpiPm::ENABLE => self.r.pm1_control |= SCI_EN,
            AcpiPm::DISABLE => self.r.pm1_control &= !SCI_EN,
            _ => {}
        }
    }
}

impl Device for AcpiPm {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        if at == Self::BLOCK && offset >= offset::TCO {
            for (byte, at) in data.iter_mut().zip(offset - offset::TCO..) {
                *byte = self.tco.read(at);
            }
            return;
        }
        let mut s = lock(&self.inner);
        if at == Self::SMI_COMMAND {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = s.r.apm[(offset as usize + i) & 1];
            }
            return;
        }
        if offset == offset::PM1_STATUS {
            s.update();
        }
        // Each register is looked at once for all its bytes, or a running timer would be torn.
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let bytes = s.read_block(at & !7).to_le_bytes();
            let from = &bytes[(at & 7) as usize..];
            let (now, later) = rest.split_at_mut(from.len().min(rest.len()));
            now.copy_from_slice(&from[..now.len()]);
            at += now.len() as u64;
            rest = later;
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        let mut s = lock(&self.inner);
        for (i, byte) in data.iter().enumerate() {
            let at_byte = offset + i as u64;
            match at {
                Self::SMI_COMMAND if at_byte & 1 == 0 => s.smi_command(*byte),
                Self::SMI_COMMAND => s.r.apm[1] = *byte,
                _ if (offset::TCO..offset::END).contains(&at_byte) => {
                    self.tco.write(at_byte - offset::TCO, *byte);
                }
                _ => s.write_byte(at_byte, *byte),
            }
        }
        s.update();
    }

    fn reset(&mut self) {
        self.tco.reset();
        let mut s = lock(&self.inner);
        s.r = Registers::default();
        s.halves = s.ticks() >> 31;
        s.update();
    }

    fn save(&self) -> Result<State, StateError> {
        let mut s = lock(&self.inner);
        s.update();
        let timer = s.ticks() as u32; // 32 bits are the timer's
        State::new(KIND, 1, &Saved { registers: s.r.clone(), timer, tco: self.tco.save() })
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        self.tco.load(saved.tco);
        let mut s = lock(&self.inner);
        s.r = saved.registers;
        s.timer_base = 0;
        s.timer_base = saved.timer.wrapping_sub(s.ticks() as u32);
        s.halves = s.ticks() >> 31;
        s.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel::Irqs;
    use bus::IrqPin;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl Irqs for Wire {
        fn set_line(&self, _: u32, level: bool) {
            self.0.store(level, Ordering::SeqCst);
        }
        fn msi(&self, _: u64, _: u32) {}
    }

    struct Rig {
        clock: Clock,
        pm: AcpiPm,
        wire: Arc<Wire>,
        seen: Arc<Mutex<Vec<SystemRequest>>>,
    }

    impl Rig {
        fn new() -> Self {
            let (clock, wire) = (Clock::manual(), Arc::new(Wire::default()));
            let seen: Arc<Mutex<Vec<SystemRequest>>> = Arc::default();
            let s = seen.clone();
            let system = System::new(move |r| s.lock().unwrap().push(r));
            let pm = AcpiPm::new(&clock, IrqPin::new(wire.clone(), 9).line(), system);
            Self { clock, pm, wire, seen }
        }
        fn put(&mut self, offset: u64, value: u16) {
            self.pm.write(AcpiPm::BLOCK, offset, &value.to_le_bytes());
        }
        fn get(&mut self, offset: u64) -> u16 {
            let mut b = [0; 2];
            self.pm.read(AcpiPm::BLOCK, offset, &mut b);
            u16::from_le_bytes(b)
        }
        fn timer(&mut self) -> u32 {
            let mut b = [0; 4];
            self.pm.read(AcpiPm::BLOCK, 8, &mut b);
            u32::from_le_bytes(b)
        }
        fn sci(&self) -> bool {
            self.wire.0.load(Ordering::SeqCst)
        }
        fn enable(&mut self) {
            self.pm.write(AcpiPm::SMI_COMMAND, 0, &[AcpiPm::ENABLE]);
        }
    }

    #[test]
    fn power_button() {
        let mut r = Rig::new();
        r.put(2, 0x100);
        assert!(!r.pm.press_power_button(), "ACPI is not on yet");
        assert!(!r.sci());
        r.enable();
        assert_eq!(r.get(4), 1);
        assert!(r.sci());
        r.put(0, 0x100);
        assert!(!r.sci());
        assert!(r.pm.press_power_button());
        assert_eq!((r.get(0), r.sci()), (0x100, true));
        r.pm.write(AcpiPm::SMI_COMMAND, 0, &[AcpiPm::DISABLE]);
        assert_eq!((r.get(4), r.sci()), (0, false));
    }

    #[test]
    fn soft_off() {
        let mut r = Rig::new();
        r.put(4, 1 << 10 | SLP_EN);
        assert_eq!(*r.seen.lock().unwrap(), []);
        r.put(4, SLP_EN);
        assert_eq!(*r.seen.lock().unwrap(), [SystemRequest::PowerOff]);
        assert_eq!(r.get(4) & SLP_EN, 0);
    }

    #[test]
    fn timer_counts_and_wraps() {
        let mut r = Rig::new();
        r.enable();
        r.clock.advance(1_000_000_000);
        assert_eq!(r.timer(), TIMER_FREQUENCY as u32);
        r.put(2, 1);
        assert!(!r.sci());
        r.clock.advance(600_000_000_000);
        assert!(r.sci());
        r.put(0, 1);
        assert!(!r.sci());
        let state = r.pm.save().unwrap();
        let before = r.timer();
        let mut other = Rig::new();
        other.clock.advance(12345);
        other.pm.load(state).unwrap();
        assert_eq!(other.timer(), before);
        other.clock.advance(600_000_000_000);
        assert!(other.sci());
    }

    #[test]
    fn general_purpose_events() {
        let mut r = Rig::new();
        r.enable();
        r.pm.raise_gpe(17);
        r.pm.raise_gpe(64);
        assert!(!r.sci());
        r.pm.write(AcpiPm::BLOCK, 0x2a, &[2]);
        assert!(r.sci());
        let mut b = [0; 8];
        r.pm.read(AcpiPm::BLOCK, 0x20, &mut b);
        assert_eq!(b, [0, 0, 2, 0, 0, 0, 0, 0]);
        r.pm.write(AcpiPm::BLOCK, 0x20, &[0xff, 0xff, 0xff, 0xff]);
        assert!(!r.sci());
    }

    #[test]
    fn unaligned_reads_span_registers() {
        let mut r = Rig::new();
        r.put(2, 0x0521);
        let mut b = [0; 4];
        r.pm.read(AcpiPm::BLOCK, 3, &mut b);
        assert_eq!(b, [5, 0, 0, 0]);
        r.pm.read(AcpiPm::BLOCK, 2, &mut b);
        assert_eq!(b, [0x21, 5, 0, 0]);
    }
}
