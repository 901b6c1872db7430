//! Interrupt controllers of a machine whose accelerator has none: 8259 pair, IOAPIC, a local APIC for each vCPU.

use super::clock::Clock;
use super::ioapic::{self, IoApic};
use super::lapic::{Fabric, Lapic, PAGE};
use super::message::{Delivery, Destination, Message};
use super::pic::Pic;
use accel::{CpuSignals, Irqs, LocalApic, MsrFault};
use bus::{Device, RegionId, State, StateError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// A vCPU, as the interrupt controllers see it.
#[derive(Clone, Debug)]
pub struct ApicCpu {
    /// APIC ID.
    pub apic_id: u32,
    /// Mailbox.
    pub signals: Arc<CpuSignals>,
}

/// The interrupt controllers. Lines go to the 8259s and the IOAPIC alike, as they are wired in a PC: line 0, the
/// timer, is input 2 of the IOAPIC, and 2, the slave 8259's, is nothing else's.
pub struct Irqchip(Arc<Chip>);

struct Chip {
    lapics: Vec<Lapic>,
    /// APIC ID and index, by ID.
    by_id: Vec<(u32, usize)>,
    pic: Mutex<Pic>,
    ioapic: Mutex<IoApic>,
}

/// A vCPU's handle to its local APIC.
struct Handle {
    chip: Arc<Chip>,
    index: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Irqchip {
    /// Controllers for the given vCPUs, the bootstrap processor first. All vCPUs that may ever be: those that are
    /// not there yet just do not answer.
    pub fn new(cpus: Vec<ApicCpu>, clock: &Clock) -> Arc<Self> {
        let mut by_id: Vec<_> = cpus.iter().enumerate().map(|(index, c)| (c.apic_id, index)).collect();
        by_id.sort_unstable();
        Arc::new(Self(Arc::new_cyclic(|chip: &Weak<Chip>| {
            let lapic = |(index, cpu): (usize, ApicCpu)| {
                let chip = chip.clone();
                Lapic::new(index, cpu.apic_id, cpu.signals, clock, move || {
                    if let Some(chip) = chip.upgrade() {
                        chip.lapics[index].timer_expired();
                    }
                })
            };
            Chip {
                lapics: cpus.into_iter().enumerate().map(lapic).collect(),
                by_id,
                pic: Mutex::new(Pic::new()),
                ioapic: Mutex::new(IoApic::new()),
            }
        })))
    }

    /// Local APIC of the vCPU with this index, if there is such a vCPU.
    pub fn local_apic(&self, index: usize) -> Option<Arc<dyn LocalApic>> {
        (index < self.0.lapics.len()).then(|| Arc::new(Handle { chip: self.0.clone(), index }) as _)
    }

    /// A non-maskable interrupt at every processor's LINT1, as a machine's NMI button gives it.
    pub fn nmi(&self) {
        for lapic in &self.0.lapics {
            lapic.raise_lint1();
        }
    }

    /// RESET of all controllers, local APICs included.
    pub fn reset(&self) {
        for lapic in &self.0.lapics {
            lapic.reset();
        }
        self.0.with_pic(Pic::reset);
        lock(&self.0.ioapic).reset();
    }
}

impl Irqs for Irqchip {
    fn set_line(&self, gsi: u32, level: bool) {
        let (pic, pin) = match gsi {
            0 => (Some(0), 2),
            2 => return,
            1..16 => (Some(gsi as u8), gsi as usize), // below 16
            _ if (gsi as usize) < ioapic::PINS => (None, gsi as usize),
            _ => return,
        };
        if let Some(n) = pic {
            self.0.with_pic(|p| p.set_line(n, level));
        }
        let chip = &*self.0;
        lock(&chip.ioapic).set_line(pin, level, &mut |m| chip.send(m));
    }

    fn msi(&self, address: u64, data: u32) {
        if let Some(message) = Message::from_msi(address, data) {
            self.0.send(message);
        }
    }
}

impl std::fmt::Debug for Irqchip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Irqchip({} cpus)", self.0.lapics.len())
    }
}

impl Chip {
    /// Works on the 8259s and tells the local APICs their output, which goes to LINT0 of all of them.
    fn with_pic<T>(&self, f: impl FnOnce(&mut Pic) -> T) -> T {
        let mut pic = lock(&self.pic);
        let before = pic.output();
        let result = f(&mut pic);
        let after = pic.output();
        if before != after {
            for lapic in &self.lapics {
                lapic.set_lint0(after);
            }
        }
        result
    }

    fn with_id(&self, id: u32) -> Option<&Lapic> {
        // IDs are indices mostly.
        if let Some(lapic) = self.lapics.get(id as usize).filter(|l| l.id() == id) {
            return Some(lapic);
        }
        let at = self.by_id.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        self.lapics.get(self.by_id[at].1)
    }

    /// Lowest-priority delivery: the one with the lowest processor priority. Among equals the vector decides, so
    /// that an interrupt keeps its processor, whose caches know it.
    fn arbitrate(&self, message: Message) -> Option<&Lapic> {
        let n = self.lapics.len();
        let start = usize::from(message.vector) % n.max(1);
        let order = (0..n).map(|i| &self.lapics[(start + i) % n]);
        order
            .filter(|l| l.matches(message.destination))
            .filter_map(|l| l.arbitration().map(|priority| (priority, l)))
            .min_by_key(|(priority, _)| *priority)
            .map(|(_, l)| l)
    }
}

impl Fabric for Chip {
    fn send(&self, message: Message) -> bool {
        let Message { destination, delivery, vector, level } = message;
        match (destination, delivery) {
            (Destination::Physical(id), _) => {
                self.with_id(id).is_some_and(|l| l.accept(delivery, vector, level))
            }
            (_, Delivery::LowestPriority) => {
                self.arbitrate(message).is_some_and(|l| l.accept(delivery, vector, level))
            }
            _ => {
                let mut taken = false;
                for lapic in self.lapics.iter().filter(|l| l.matches(destination)) {
                    taken |= lapic.accept(delivery, vector, level);
                }
                taken
            }
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        lock(&self.ioapic).end_of_interrupt(vector, &mut |m| self.send(m));
    }

    fn acknowledge_pic(&self) -> Option<u8> {
        self.with_pic(|p| p.output().then(|| p.acknowledge()))
    }
}

impl Handle {
    fn lapic(&self) -> &Lapic {
        &self.chip.lapics[self.index]
    }
}

impl LocalApic for Handle {
    fn has_interrupt(&self) -> bool {
        self.lapic().has_interrupt()
    }
    fn acknowledge(&self) -> Option<u8> {
        self.lapic().acknowledge(&*self.chip)
    }
    fn base(&self) -> u64 {
        self.lapic().base()
    }
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lapic().read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.lapic().write(&*self.chip, offset, data);
    }
    fn read_msr(&self, msr: u32) -> Result<u64, MsrFault> {
        self.lapic().read_msr(msr)
    }
    fn write_msr(&self, msr: u32, value: u64) -> Result<(), MsrFault> {
        self.lapic().write_msr(&*self.chip, msr, value)
    }
    fn cr8(&self) -> u8 {
        self.lapic().cr8()
    }
    fn set_cr8(&self, value: u8) {
        self.lapic().set_cr8(value);
    }
    fn set_tsc_offset(&self, offset: u64) {
        self.lapic().set_tsc_offset(offset);
    }
    fn init(&self) {
        self.lapic().init();
    }
    fn save(&self) -> Vec<u8> {
        self.lapic().save()
    }
    fn load(&self, page: &[u8]) -> accel::Result<()> {
        let page: &[u8; PAGE] = page.try_into().map_err(|_| {
            accel::Error::BadState(format!(
                "local APIC page of {} bytes where {PAGE} are expected",
                page.len()
            ))
        })?;
        self.lapic().load(page);
        Ok(())
    }
    fn load_base(&self, value: u64) {
        self.lapic().load_base(value);
    }
}

/// The 8259s and the IOAPIC as a device on the buses. The local APICs are reached by their vCPUs, and saved with
/// them.
pub struct IrqchipDevice(Arc<Irqchip>);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    pic: Pic,
    ioapic: IoApic,
}

const KIND: &str = "irqchip";

impl IrqchipDevice {
    /// Ports 0x20 and 0x21.
    pub const MASTER: RegionId = RegionId(0);
    /// Ports 0xa0 and 0xa1.
    pub const SLAVE: RegionId = RegionId(1);
    /// Ports 0x4d0 and 0x4d1.
    pub const ELCR: RegionId = RegionId(2);
    /// The IOAPIC's 4 KiB at [`Self::IOAPIC_ADDRESS`].
    pub const IOAPIC: RegionId = RegionId(3);
    /// Where PCs have the IOAPIC.
    pub const IOAPIC_ADDRESS: u64 = 0xfec0_0000;

    /// The device to map: [`Self::MASTER`], [`Self::SLAVE`], [`Self::ELCR`], [`Self::IOAPIC`].
    pub fn new(irqchip: Arc<Irqchip>) -> Self {
        Self(irqchip)
    }
}

impl Device for IrqchipDevice {
    fn name(&self) -> &str {
        KIND
    }

    fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
        let chip = &self.0.0;
        if at == Self::IOAPIC {
            lock(&chip.ioapic).read(offset, data);
            return;
        }
        for (i, byte) in data.iter_mut().enumerate() {
            let odd = (offset + i as u64) & 1 != 0;
            *byte = match at {
                Self::MASTER => chip.with_pic(|p| p.read(false, odd)),
                Self::SLAVE => chip.with_pic(|p| p.read(true, odd)),
                _ => chip.with_pic(|p| p.elcr(odd)),
            };
        }
    }

    fn write(&mut self, at: RegionId, offset: u64, data: &[u8]) {
        let chip = &*self.0.0;
        if at == Self::IOAPIC {
            lock(&chip.ioapic).write(offset, data, &mut |m| chip.send(m));
            return;
        }
        for (i, byte) in data.iter().enumerate() {
            let odd = (offset + i as u64) & 1 != 0;
            chip.with_pic(|p| match at {
                Self::MASTER => p.write(false, odd, *byte),
                Self::SLAVE => p.write(true, odd, *byte),
                _ => p.set_elcr(odd, *byte),
            });
        }
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn save(&self) -> Result<State, StateError> {
        let chip = &self.0.0;
        let saved = Saved { pic: lock(&chip.pic).clone(), ioapic: lock(&chip.ioapic).clone() };
        State::new(KIND, 1, &saved)
    }

    fn load(&mut self, state: State) -> Result<(), StateError> {
        let saved: Saved = state.unpack(KIND, 1)?;
        if !saved.pic.is_valid() || !saved.ioapic.is_valid() {
            let reason = "impossible register contents".into();
            return Err(StateError::Invalid { kind: KIND.into(), reason });
        }
        let chip = &self.0.0;
        chip.with_pic(|p| *p = saved.pic);
        *lock(&chip.ioapic) = saved.ioapic;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel::Signal;

    struct Rig {
        clock: Clock,
        chip: Arc<Irqchip>,
        signals: Vec<Arc<CpuSignals>>,
        apics: Vec<Arc<dyn LocalApic>>,
    }

    const TPR: u64 = 0x80;
    const PPR: u64 = 0xa0;
    const EOI: u64 = 0xb0;
    const LDR: u64 = 0xd0;
    const DFR: u64 = 0xe0;
    const SVR: u64 = 0xf0;
    const ESR: u64 = 0x280;
    const ICR: u64 = 0x300;
    const ICR2: u64 = 0x310;
    const LVT_TIMER: u64 = 0x320;
    const LINT0: u64 = 0x350;
    const LINT1: u64 = 0x360;
    const LVT_ERROR: u64 = 0x370;

    impl Rig {
        /// Enabled APICs with these IDs.
        fn with_ids(ids: &[u32]) -> Self {
            let clock = Clock::manual();
            let signals: Vec<_> = ids.iter().map(|_| Arc::new(CpuSignals::new())).collect();
            let cpu = |(id, s): (&u32, &Arc<CpuSignals>)| ApicCpu { apic_id: *id, signals: s.clone() };
            let chip = Irqchip::new(ids.iter().zip(&signals).map(cpu).collect(), &clock);
            let apics: Vec<_> = (0..ids.len()).map(|i| chip.local_apic(i).unwrap()).collect();
            let rig = Self { clock, chip, signals, apics };
            for i in 0..ids.len() {
                rig.put(i, SVR, 0x1ff);
            }
            rig
        }
        fn new(n: u32) -> Self {
            Self::with_ids(&(0..n).collect::<Vec<_>>())
        }
        fn get(&self, cpu: usize, offset: u64) -> u32 {
            let mut b = [0; 4];
            self.apics[cpu].read(offset, &mut b);
            u32::from_le_bytes(b)
        }
        fn put(&self, cpu: usize, offset: u64, value: u32) {
            self.apics[cpu].write(offset, &value.to_le_bytes());
        }
        /// What vCPU `cpu` takes next; its INTERRUPT signal must be up exactly if there is something new.
        fn take(&self, cpu: usize) -> Option<u8> {
            let signalled = self.signals[cpu].take(Signal::INTERRUPT) != Signal::empty();
            if self.apics[cpu].has_interrupt() {
                assert!(signalled, "an interrupt without a signal");
            }
            self.apics[cpu].acknowledge()
        }
        fn takers(&self) -> Vec<usize> {
            (0..self.apics.len()).filter(|i| self.take(*i).is_some()).collect()
        }
        fn icr(&self, cpu: usize, dest: u32, low: u32) {
            self.put(cpu, ICR2, dest << 24);
            self.put(cpu, ICR, low);
        }
        fn x2apic(&self, cpu: usize) {
            let base = self.apics[cpu].base();
            self.apics[cpu].write_msr(0x1b, base | 0xc00).unwrap();
        }
        fn device(&self) -> IrqchipDevice {
            IrqchipDevice::new(self.chip.clone())
        }
        fn redirect(&self, pin: u8, entry: u64) {
            let mut d = self.device();
            for (i, half) in [entry as u32, (entry >> 32) as u32].into_iter().enumerate().rev() {
                d.write(IrqchipDevice::IOAPIC, 0, &[0x10 + 2 * pin + i as u8]);
                d.write(IrqchipDevice::IOAPIC, 0x10, &half.to_le_bytes());
            }
        }
        /// The 8259 pair with vectors 0x20 and 0x28, everything unmasked.
        fn program_pic(&self) {
            let mut d = self.device();
            for (at, base, wiring) in [(IrqchipDevice::MASTER, 0x20, 4), (IrqchipDevice::SLAVE, 0x28, 2)] {
                for (offset, v) in [(0, 0x11), (1, base), (1, wiring), (1, 1), (1, 0)] {
                    d.write(at, offset, &[v]);
                }
            }
        }
    }

    #[test]
    fn priorities() {
        let r = Rig::new(1);
        for vector in [0x41, 0x81, 0x45] {
            r.chip.msi(0xfee0_0000, vector);
        }
        assert_eq!((r.take(0), r.get(0, PPR)), (Some(0x81), 0x80));
        assert_eq!(r.take(0), None);
        r.chip.msi(0xfee0_0000, 0x91);
        assert_eq!(r.take(0), Some(0x91));
        r.put(0, EOI, 0);
        assert_eq!(r.take(0), None, "0x81 is in service");
        r.put(0, TPR, 0x42);
        r.put(0, EOI, 0);
        assert_eq!((r.take(0), r.get(0, PPR)), (None, 0x42));
        r.apics[0].set_cr8(3);
        assert_eq!((r.take(0), r.apics[0].cr8()), (Some(0x45), 3));
        assert_eq!(r.take(0), None);
        r.put(0, EOI, 0);
        assert_eq!(r.take(0), Some(0x41));
        r.put(0, EOI, 0);
        r.put(0, EOI, 0);
        assert_eq!((r.take(0), r.get(0, PPR)), (None, 0x30));
    }

    #[test]
    fn blocked_interrupts_do_not_wake() {
        let r = Rig::new(1);
        r.put(0, TPR, 0x50);
        r.chip.msi(0xfee0_0000, 0x51);
        assert_eq!(r.signals[0].pending(), Signal::empty());
        r.put(0, TPR, 0);
        assert_eq!(r.take(0), Some(0x51));
    }

    #[test]
    fn io_apic_level_interrupt_from_line_to_eoi() {
        let r = Rig::new(1);
        r.redirect(11, 0x8051);
        r.chip.set_line(11, true);
        assert_eq!(r.take(0), Some(0x51));
        r.put(0, EOI, 0);
        assert_eq!(r.take(0), Some(0x51), "still asserted");
        r.chip.set_line(11, false);
        r.put(0, EOI, 0);
        assert_eq!(r.take(0), None);
        // With the broadcast suppressed the guest tells the IOAPIC itself.
        r.put(0, SVR, 0x11ff);
        r.chip.set_line(11, true);
        assert_eq!(r.take(0), Some(0x51));
        r.put(0, EOI, 0);
        assert_eq!(r.take(0), None);
        r.device().write(IrqchipDevice::IOAPIC, 0x40, &0x51u32.to_le_bytes());
        assert_eq!(r.take(0), Some(0x51));
    }

    #[test]
    fn line_0_is_pin_2() {
        let r = Rig::new(1);
        r.redirect(2, 0x30);
        r.redirect(0, 0x31);
        r.chip.set_line(0, true);
        r.chip.set_line(2, true);
        assert_eq!((r.take(0), r.take(0)), (Some(0x30), None));
    }

    #[test]
    fn the_8259_comes_through_lint0() {
        let r = Rig::new(2);
        r.program_pic();
        r.put(0, LINT0, 0x1_0700);
        r.chip.set_line(4, true);
        assert_eq!(r.takers(), [0; 0], "masked");
        r.put(0, LINT0, 0x700);
        assert_eq!(r.take(0), Some(0x24));
        assert_eq!(r.take(0), None);
        r.chip.set_line(3, true);
        r.chip.set_line(3, false);
        assert_eq!(r.take(0), Some(0x23));
        r.device().write(IrqchipDevice::MASTER, 0, &[0x20]);
        r.device().write(IrqchipDevice::MASTER, 0, &[0x20]);
        assert_eq!(r.take(0), None);
        // Fixed instead of ExtINT: the output's edge gives the entry's own vector.
        r.put(0, LINT0, 0x66);
        r.chip.set_line(12, true);
        assert_eq!(r.take(0), Some(0x66));
        // Without an APIC LINT0 is INTR.
        r.apics[1].write_msr(0x1b, 0xfee0_0000).unwrap();
        assert_eq!(r.take(1), Some(0x2c));
        r.chip.reset();
        assert!(r.apics.iter().all(|a| !a.has_interrupt() && a.base() & 0x800 != 0));
    }

    #[test]
    fn nmi_button() {
        let r = Rig::new(2);
        r.put(1, LINT1, 0x400);
        r.chip.nmi();
        assert_eq!([0, 1].map(|i| r.signals[i].take(Signal::all())), [Signal::empty(), Signal::NMI]);
    }

    #[test]
    fn ipis_and_shorthands() {
        let r = Rig::with_ids(&[0, 2, 7]);
        r.icr(0, 7, 0x4041);
        assert_eq!(r.takers(), [2]);
        r.icr(0, 0xff, 0x4051);
        assert_eq!(r.takers(), [0, 1, 2]);
        r.icr(1, 0, 0x4_4061);
        assert_eq!(r.takers(), [1]);
        r.icr(1, 0, 0x8_4071);
        assert_eq!(r.takers(), [0, 1, 2]);
        r.icr(1, 0, 0xc_4081);
        assert_eq!(r.takers(), [0, 2]);
        r.icr(0, 9, 0x4091);
        assert_eq!(r.takers(), [0; 0]);
    }

    #[test]
    fn init_sipi_nmi_smi() {
        let r = Rig::new(2);
        r.icr(0, 1, 0x4500);
        assert_eq!(r.signals[1].take(Signal::all()), Signal::INIT);
        r.icr(0, 1, 0x8500);
        assert_eq!(r.signals[1].take(Signal::all()), Signal::empty(), "de-assert");
        r.icr(0, 1, 0x469a);
        assert_eq!((r.signals[1].take(Signal::all()), r.signals[1].sipi_vector()), (Signal::SIPI, 0x9a));
        r.icr(0, 1, 0x4400);
        r.icr(0, 1, 0x4200);
        assert_eq!(r.signals[1].take(Signal::all()), Signal::NMI | Signal::SMI);
    }

    #[test]
    fn logical_destinations() {
        let r = Rig::new(4);
        for i in 0..4 {
            r.put(i, LDR, 1 << (24 + i));
        }
        r.icr(0, 0b1010, 0x4841);
        assert_eq!(r.takers(), [1, 3]);
        for i in 0..4 {
            r.put(i, DFR, 0x0fff_ffff);
            r.put(i, LDR, ((i as u32 / 2) << 4 | 1 << (i % 2)) << 24);
        }
        r.icr(0, 0x13, 0x4851);
        assert_eq!(r.takers(), [2, 3]);
        r.icr(0, 0xf1, 0x4861);
        assert_eq!(r.takers(), [0, 2]);
    }

    #[test]
    fn lowest_priority() {
        let r = Rig::new(3);
        for (i, tpr) in [0x40, 0x20, 0x30].into_iter().enumerate() {
            r.put(i, LDR, 1 << (24 + i));
            r.put(i, TPR, tpr);
        }
        r.icr(0, 7, 0x4951);
        assert_eq!(r.takers(), [1]);
        // It has 0x51 in service now.
        r.icr(0, 7, 0x4952);
        assert_eq!(r.takers(), [2]);
        r.put(2, SVR, 0xff);
        r.chip.msi(0xfee0_700c, 0x61);
        assert_eq!(r.takers(), [0]);
    }

    #[test]
    fn x2apic() {
        let r = Rig::with_ids(&[0, 1, 0x21]);
        assert_eq!(r.apics[0].read_msr(0x802), Err(MsrFault));
        for i in 0..3 {
            r.x2apic(i);
        }
        let a = &r.apics[2];
        assert_eq!((a.read_msr(0x802), a.read_msr(0x80d)), (Ok(0x21), Ok(0x2_0002)));
        assert_eq!(r.get(2, 0x20), u32::MAX, "the page is gone");
        let b = &r.apics[0];
        b.write_msr(0x830, 0x21 << 32 | 0x41).unwrap();
        assert_eq!(r.takers(), [2]);
        b.write_msr(0x830, 0x2_0002 << 32 | 0x851).unwrap();
        assert_eq!(r.takers(), [2]);
        b.write_msr(0x830, 0x3 << 32 | 0x861).unwrap();
        assert_eq!(r.takers(), [0, 1]);
        b.write_msr(0x830, 0xffff_ffff << 32 | 0x71).unwrap();
        assert_eq!(r.takers(), [0, 1, 2]);
        assert_eq!(b.read_msr(0x830), Ok(0xffff_ffff << 32 | 0x71));
        b.write_msr(0x83f, 0x81).unwrap();
        assert_eq!(r.takers(), [0]);
        r.chip.msi(0xfeef_f000, 0x91);
        assert_eq!(r.takers(), [0, 1, 2]);
        for (msr, value) in [(0x80b, 1), (0x828, 1), (0x808, 0x100), (0x802, 0), (0x80d, 0), (0x83f, 0x181)] {
            assert_eq!(b.write_msr(msr, value), Err(MsrFault), "{msr:#x}");
        }
        for msr in [0x800, 0x809, 0x80b, 0x80e, 0x831, 0x83f, 0x840, 0x8ff] {
            assert_eq!(b.read_msr(msr), Err(MsrFault), "{msr:#x}");
        }
        for base in [0xfee0_0900, 0xfee0_0500, 0xfee0_0d01, 1 << 52 | 0xfee0_0d00] {
            assert_eq!(b.write_msr(0x1b, base), Err(MsrFault), "{base:#x}");
        }
        b.write_msr(0x1b, 0xfee0_0100).unwrap();
        assert_eq!(b.write_msr(0x1b, 0xfee0_0d00), Err(MsrFault));
        b.write_msr(0x1b, 0xfee0_0900).unwrap();
        assert_eq!((r.get(0, SVR), r.get(0, TPR)), (0xff, 0));
    }

    #[test]
    fn errors() {
        let r = Rig::new(1);
        r.put(0, LVT_ERROR, 0xfe);
        r.icr(0, 0, 0x4005);
        assert_eq!(r.take(0), Some(0xfe));
        assert_eq!(r.get(0, ESR), 0);
        r.put(0, ESR, 0);
        assert_eq!(r.get(0, ESR), 0x20);
        r.put(0, EOI, 0);
        r.chip.msi(0xfee0_0000, 3);
        assert_eq!(r.take(0), Some(0xfe));
        r.get(0, 0x3f0);
        r.put(0, ESR, 0);
        assert_eq!(r.get(0, ESR), 0xc0);
        r.put(0, ESR, 0);
        assert_eq!(r.get(0, ESR), 0);
    }

    #[test]
    fn timer_interrupts() {
        let r = Rig::new(1);
        r.put(0, 0x3e0, 0xb);
        r.put(0, LVT_TIMER, 0x2_00ec);
        r.put(0, 0x380, 1_000_000);
        r.clock.advance(1_500_000);
        assert_eq!((r.take(0), r.get(0, 0x390)), (Some(0xec), 500_000));
        r.put(0, EOI, 0);
        r.put(0, LVT_TIMER, 0x3_00ec);
        r.clock.advance(1_000_000);
        assert_eq!(r.take(0), None, "masked");
        r.put(0, LVT_TIMER, 0x4_00ed);
        r.apics[0].set_tsc_offset(1 << 40);
        r.apics[0].write_msr(0x6e0, (1 << 40) + r.clock.now() + 700).unwrap();
        r.clock.advance(699);
        assert_eq!(r.take(0), None);
        r.clock.advance(1);
        assert_eq!((r.take(0), r.apics[0].read_msr(0x6e0)), (Some(0xed), Ok(0)));
        r.put(0, EOI, 0);
        r.apics[0].write_msr(0x6e0, 5).unwrap();
        assert_eq!(r.take(0), Some(0xed), "passed already");
    }

    #[test]
    fn software_disable() {
        let r = Rig::new(2);
        r.put(0, LINT1, 0x400);
        r.put(0, SVR, 0xff);
        assert_eq!(r.get(0, LINT1), 0x1_0400);
        r.put(0, LINT1, 0x400);
        assert_eq!(r.get(0, LINT1), 0x1_0400);
        r.chip.msi(0xfee0_0000, 0x41);
        assert_eq!(r.take(0), None);
        r.icr(1, 0, 0x4400);
        assert_eq!(r.signals[0].take(Signal::all()), Signal::NMI);
    }

    #[test]
    fn apic_save_and_load() {
        let (a, b) = (Rig::new(1), Rig::new(1));
        a.x2apic(0);
        a.chip.msi(0xfee0_0000, 0x81);
        a.take(0);
        a.chip.msi(0xfee0_0000, 0x91);
        a.apics[0].write_msr(0x808, 0x42).unwrap();
        a.apics[0].write_msr(0x832, 0x2_0055).unwrap();
        a.apics[0].write_msr(0x838, 123_456).unwrap();
        a.clock.advance(1000);
        let page = a.apics[0].save();
        assert_eq!(page.len(), 1024);
        b.apics[0].load_base(a.apics[0].base());
        b.apics[0].load(&page).unwrap();
        assert_eq!(b.apics[0].save(), page);
        assert_eq!(b.take(0), Some(0x91));
        b.apics[0].write_msr(0x80b, 0).unwrap();
        b.apics[0].write_msr(0x80b, 0).unwrap();
        assert_eq!(b.apics[0].read_msr(0x80a), Ok(0x42));
        b.clock.advance(250_000);
        assert_eq!(b.take(0), Some(0x55));
        assert!(b.apics[0].load(&page[1..]).is_err());
    }

    /// Several threads post while the vCPU takes, sleeps and changes its priority: none may be lost.
    #[test]
    fn nothing_is_lost_between_threads() {
        use std::sync::atomic::{AtomicU32, Ordering};
        use std::time::{Duration, Instant};
        const EACH: u32 = 5_000;
        let r = Rig::new(1);
        let taken: Vec<AtomicU32> = (0..3).map(|_| AtomicU32::new(0)).collect();
        std::thread::scope(|scope| {
            for (i, count) in taken.iter().enumerate() {
                let chip = &r.chip;
                scope.spawn(move || {
                    for n in 0..EACH {
                        chip.msi(0xfee0_0000, 0x31 + 0x40 * i as u32);
                        while count.load(Ordering::SeqCst) == n {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let (apic, mut left) = (&r.apics[0], 3 * EACH);
            while left > 0 {
                let deadline = Instant::now() + Duration::from_secs(60);
                r.signals[0].wait(Signal::INTERRUPT, Some(deadline));
                assert_eq!(r.signals[0].take(Signal::INTERRUPT), Signal::INTERRUPT, "{left} left");
                while let Some(vector) = apic.acknowledge() {
                    apic.set_cr8(if left % 3 == 0 { 15 } else { 0 });
                    taken[usize::from(vector - 0x31) / 0x40].fetch_add(1, Ordering::SeqCst);
                    left -= 1;
                    r.put(0, EOI, 0);
                    apic.set_cr8(0);
                }
            }
        });
        assert!(taken.iter().all(|t| t.load(Ordering::SeqCst) == EACH));
    }

    #[test]
    fn device_save_and_load() {
        let (a, b) = (Rig::new(1), Rig::new(1));
        a.program_pic();
        a.redirect(5, 0x8041);
        a.chip.set_line(5, true);
        let state = a.device().save().unwrap();
        // The bootstrap processor has the 8259s at LINT0 from the start.
        b.device().load(state.clone()).unwrap();
        assert_eq!(b.device().save().unwrap(), state);
        assert_eq!(b.take(0), Some(0x25));
        let mut bad = state;
        bad.data["pic"]["master"]["first"] = 9.into();
        assert!(b.device().load(bad).is_err());
    }
}
