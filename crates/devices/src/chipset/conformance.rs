//! What every chipset device has to stand: any access at any time, saving and loading, reset and pause twice.

use super::clock::Clock;
use super::i6300esb::I6300Esb;
use super::testing::Slots;
use super::*;
use crate::chipset::output::Recorder;
use accel::{CpuSignals, Signal};
use base::Timers;
use bus::pci::{Ecam, PciBus, PciFunction};
use bus::{Bus, Device, IrqPin, RegionId, System, shared};
use memory::{Backing, GuestMemory, Layout, Region};
use proptest::prelude::*;
use std::sync::Arc;

/// A region of a device: its number and length.
type Place = (RegionId, u64);

struct Subject {
    device: Box<dyn Device>,
    regions: Vec<Place>,
}

/// Length of the flash chip under test.
const FLASH: u64 = 0x4000;

/// What the devices of a test are connected to.
struct Machine {
    clock: Clock,
    timers: Timers,
    irqchip: Arc<Irqchip>,
    signals: Arc<CpuSignals>,
}

impl Machine {
    fn new() -> Self {
        let clock = Clock::manual();
        let signals = Arc::new(CpuSignals::new());
        let cpus = vec![ApicCpu { apic_id: 0, signals: signals.clone() }];
        Self { irqchip: Irqchip::new(cpus, &clock), clock, timers: Timers::new(), signals }
    }

    fn pin(&self, gsi: u32) -> Arc<IrqPin> {
        IrqPin::new(self.irqchip.clone(), gsi)
    }

    /// One of each device.
    fn subjects(&self) -> Vec<Subject> {
        let subject =
            |device: Box<dyn Device>, regions: &[Place]| Subject { device, regions: regions.to_vec() };
        let system = System::new(|_| {});
        let chardev = Arc::new(Recorder::default());
        let [pit_line, rtc_line] = [0, 8].map(|gsi| LegacyLine::new(self.pin(gsi).line()));
        let hpet = Hpet::new(&self.clock, self.irqchip.clone(), pit_line.clone(), rtc_line.clone());
        let pin = self.pin(16);
        hpet.add_route(16, [pin.line(), pin.line(), pin.line()]);
        let base = RtcBase::Start(1_700_000_000);
        vec![
            subject(
                Box::new(IrqchipDevice::new(self.irqchip.clone())),
                &[
                    (IrqchipDevice::MASTER, 2),
                    (IrqchipDevice::SLAVE, 2),
                    (IrqchipDevice::ELCR, 2),
                    (IrqchipDevice::IOAPIC, 0x1000),
                    (IrqchipDevice::IOAPIC, 0x20),
                ],
            ),
            subject(Box::new(Pit::new(&self.clock, pit_line)), &[(Pit::COUNTERS, 4), (Pit::PORT_B, 1)]),
            subject(Box::new(Rtc::new(&self.clock, rtc_line, base)), &[(RegionId(0), 2)]),
            subject(Box::new(hpet), &[(RegionId(0), Hpet::LENGTH), (RegionId(0), 0x180)]),
            subject(
                Box::new(AcpiPm::new(&self.clock, self.pin(9).line(), system.clone())),
                &[(AcpiPm::BLOCK, AcpiPm::LENGTH), (AcpiPm::SMI_COMMAND, 2)],
            ),
            subject(
                Box::new(I8042::new(system.clone(), self.pin(1).line(), self.pin(12).line())),
                &[(I8042::DATA, 1), (I8042::COMMAND, 1)],
            ),
            subject(
                Box::new(Serial::new(chardev.clone(), self.pin(4).line(), &self.timers)),
                &[(RegionId(0), 8)],
            ),
            subject(Box::new(DebugCon::new(chardev, &self.timers, 0xe9)), &[(RegionId(0), 1)]),
            subject(Box::new(DebugExit::new(system.clone())), &[(RegionId(0), 4)]),
            subject(Box::new(self.fw_cfg()), &[(RegionId(0), FwCfg::PORTS.into())]),
            subject(Box::new(self.flash()), &[(RegionId(0), FLASH), (RegionId(0), 16)]),
            subject(
                Box::new(ChipsetRegisters::new(NoReboot::default())),
                &[(RegionId(0), 0x4000), (RegionId(0), 0x3800)],
            ),
            subject(Box::<SmBus>::default(), &[(RegionId(0), SmBus::PORTS)]),
            subject(Box::new(I6300Esb::new(&self.clock, system.clone())), &[(RegionId(0), 16)]),
            subject(
                Box::new(SystemPorts::new(system)),
                &[(SystemPorts::POST, 1), (SystemPorts::CONTROL, 1), (SystemPorts::DELAY, 1)],
            ),
        ]
    }

    /// Items by number and by name, one of which the guest may write.
    fn fw_cfg(&self) -> FwCfg {
        let memory = GuestMemory::new(&Layout::pc(1 << 20, 1 << 30).unwrap(), &Backing::Anonymous, false);
        let memory = memory.unwrap();
        // Descriptors of transfers, where the fuzz is likely to point.
        memory.fill(0, 0x1000, 0x12).unwrap();
        let mut items = FwCfgItems::new();
        items.add("opt/a", vec![1; 100]).unwrap();
        items.add_writable("opt/w", vec![0; 16]).unwrap();
        FwCfg::new(items, memory)
    }

    fn flash(&self) -> Flash {
        let region = Region::new(0xffc0_0000, FLASH, &Backing::Anonymous, false).unwrap();
        Flash::new(Arc::new(Slots::default()), region, None, false).unwrap()
    }

    /// The vCPU takes what there is for it.
    fn serve(&self) {
        self.signals.take(Signal::all());
        if let Some(apic) = self.irqchip.local_apic(0)
            && apic.acknowledge().is_some()
        {
            apic.write(0xb0, &[0; 4]);
        }
    }
}

/// A step of a hostile guest.
#[derive(Clone, Debug)]
enum Step {
    Read { region: usize, offset: u64, size: usize },
    Write { region: usize, offset: u64, size: usize, value: u64 },
    Wait { nanoseconds: u64 },
    Serve,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![4 => Just(1usize), 1 => Just(2), 3 => Just(4), 1 => Just(8)];
    let value = prop_oneof![any::<u64>(), 0..0x100u64, (0..64u32).prop_map(|b| 1 << b), Just(u64::MAX)];
    let place = (any::<usize>(), any::<u64>(), size);
    prop_oneof![
        4 => place.clone().prop_map(|(region, offset, size)| Step::Read { region, offset, size }),
        8 => (place, value)
            .prop_map(|((region, offset, size), value)| Step::Write { region, offset, size, value }),
        2 => prop_oneof![0..1000u64, 0..10_000_000u64, 0..200_000_000u64]
            .prop_map(|nanoseconds| Step::Wait { nanoseconds }),
        2 => Just(Step::Serve),
        1 => Just(Step::Reset),
    ]
}

impl Subject {
    /// Where an access goes: within the region, as the bus sees to.
    fn place(&self, region: usize, offset: u64, size: usize) -> (RegionId, u64, usize) {
        let (id, len) = self.regions[region % self.regions.len()];
        let size = size.min(1 << len.ilog2());
        (id, offset % (len - size as u64 + 1), size)
    }

    fn perform(&mut self, step: &Step, machine: &Machine) {
        match *step {
            Step::Read { region, offset, size } => {
                let (at, offset, size) = self.place(region, offset, size);
                self.device.read(at, offset, &mut [0xff; 8][..size]);
            }
            Step::Write { region, offset, size, value } => {
                let (at, offset, size) = self.place(region, offset, size);
                self.device.write(at, offset, &value.to_le_bytes()[..size]);
            }
            Step::Wait { nanoseconds } => machine.clock.advance(nanoseconds),
            Step::Serve => machine.serve(),
            Step::Reset => self.device.reset(),
        }
    }
}

/// The state, without what follows the host's clock.
fn saved(device: &dyn Device) -> serde_json::Value {
    let mut data = device.save().unwrap().data;
    if device.name() == "mc146818" {
        for host in ["offset", "offset_nanoseconds"] {
            data.as_object_mut().unwrap().remove(host);
        }
        // Flags of seconds and periods that passed meanwhile.
        data["cmos"][0x0c] = 0.into();
    }
    data
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn any_access_is_survived_and_saved(
        steps in prop::collection::vec(step(), 1..120),
        which in 0..15usize,
    ) {
        let machine = Machine::new();
        let mut subjects = machine.subjects();
        prop_assert_eq!(subjects.len(), 15);
        let subject = &mut subjects[which];
        subject.device.start().unwrap();
        for s in &steps {
            subject.perform(s, &machine);
        }
        subject.device.pause().unwrap();
        subject.device.pause().unwrap();
        // Into another process: the same state, and nothing is left over.
        let other = Machine::new();
        let mut twins = other.subjects();
        let twin = &mut twins[which];
        twin.device.load(subject.device.save().unwrap()).unwrap();
        prop_assert_eq!(saved(&*twin.device), saved(&*subject.device));
        // And it goes on from there.
        for s in &steps {
            twin.perform(s, &other);
        }
    }
}

/// An access to a local APIC, by one of two vCPUs.
fn apic_access() -> impl Strategy<Value = (usize, bool, bool, u32, u64)> {
    let value = prop_oneof![any::<u64>(), 0..0x100u64, (0..64u32).prop_map(|b| 1 << b), Just(0xfee0_0d00)];
    let register = prop_oneof![8 => 0..0x40u32, 1 => Just(0x1b), 1 => Just(0x6e0)];
    (0..2usize, any::<bool>(), any::<bool>(), register, value)
}

proptest! {
    #[test]
    fn local_apics_survive_any_access(accesses in prop::collection::vec(apic_access(), 1..200)) {
        let clock = Clock::manual();
        let cpu = |apic_id| ApicCpu { apic_id, signals: Arc::new(CpuSignals::new()) };
        let chip = Irqchip::new(vec![cpu(0), cpu(5)], &clock);
        let apics = [0, 1].map(|i| chip.local_apic(i).unwrap());
        for apic in &apics {
            apic.write(0xf0, &0x1ffu32.to_le_bytes());
        }
        for (cpu, by_msr, write, register, value) in accesses {
            let apic = &apics[cpu];
            match (by_msr || register >= 0x40, write) {
                (true, _) => {
                    let msr = if register == 0x1b || register == 0x6e0 { register } else { 0x800 + register };
                    // Faults are the guest's affair.
                    let _ = if write { apic.write_msr(msr, value) } else { apic.read_msr(msr).map(|_| ()) };
                }
                (_, true) => apic.write(u64::from(register) << 4, &value.to_le_bytes()[..4]),
                (_, false) => apic.read(u64::from(register) << 4, &mut [0; 4]),
            }
            apic.set_cr8(value as u8);
            clock.advance(value & 0xffff);
            if apic.has_interrupt() {
                prop_assert!(apic.acknowledge().is_some());
            }
        }
        for apic in &apics {
            let page = apic.save();
            apic.load(&page).unwrap();
            prop_assert_eq!(apic.save(), page);
        }
    }
}

#[test]
fn reset_twice_is_reset_once() {
    let machine = Machine::new();
    for mut s in machine.subjects() {
        s.device.reset();
        let once = saved(&*s.device);
        s.device.reset();
        assert_eq!(saved(&*s.device), once, "{}", s.device.name());
        assert!(s.device.load(bus::State::new("something else", 1, &()).unwrap()).is_err());
        let mut state = s.device.save().unwrap();
        state.version += 1;
        assert!(s.device.load(state).is_err(), "{}: a version of the future", s.device.name());
    }
}

/// The chipset's functions, whose registers place other devices.
fn functions(bus: &Arc<Bus>) -> Vec<Box<dyn PciFunction>> {
    let pci = PciBus::root(bus.clone(), vec![]);
    let machine = Machine::new();
    let system = System::new(|_| {});
    let isa = || (0..16).map(|gsi| machine.pin(gsi)).collect();
    let pm = shared(AcpiPm::new(&machine.clock, machine.pin(9).line(), system.clone()));
    let chipset = shared(ChipsetRegisters::new(NoReboot::default()));
    let pirqs = PirqRouter::new(16, 8, Some(machine.irqchip.clone()), isa());
    let ecam = shared(Ecam::new(pci.clone(), 256));
    vec![
        Box::new(MemoryController::q35(bus, &ecam, None, None)),
        Box::new(MemoryController::i440fx(None)),
        Box::new(Lpc::new(bus, pirqs, &pm, &chipset, None)),
        Box::new(Ich9SmBus::new()),
        Box::new(Piix3::new(PirqRouter::new(0, 4, None, isa()), None)),
        Box::new(Piix4Pm::new(bus, &pm, &shared(SmBus::new()), None)),
        Box::new(I6300Esb::new(&machine.clock, system)),
    ]
}

proptest! {
    #[test]
    fn chipset_functions_survive_any_configuration(
        writes in prop::collection::vec((0u16..0x100, prop::collection::vec(any::<u8>(), 1..5)), 1..60),
        which in 0..7usize,
    ) {
        let bus = Arc::new(Bus::new());
        let function = &mut functions(&bus)[which];
        let fresh = function.save().unwrap();
        for (offset, data) in &writes {
            function.write_config(*offset, data);
            function.read_config(*offset, &mut data.clone());
        }
        let state = function.save().unwrap();
        let other = Arc::new(Bus::new());
        let twin = &mut functions(&other)[which];
        twin.load(state.clone()).unwrap();
        prop_assert_eq!(twin.save().unwrap(), state);
        prop_assert_eq!(format!("{:?}", other), format!("{:?}", bus), "everything is in the same place");
        function.reset();
        function.reset();
        prop_assert_eq!(function.save().unwrap(), fresh);
        prop_assert_eq!(format!("{:?}", bus), "{}");
    }
}
