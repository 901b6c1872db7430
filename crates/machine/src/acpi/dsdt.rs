//! The DSDT: devices that cannot be found by probing.

use super::{AcpiConfig, HPET_BASE, Power, REDUCED_S5_SLEEP_TYPE, table};
use crate::topology::Topology;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, If, Interrupt, Memory32Fixed, Method,
    Name, Notify, Package, Path, ResourceTemplate, Return, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use bus::pci::Route;
use devices::chipset::{AcpiPm, FwCfg};

/// A PCI host bridge with ECAM.
#[derive(Clone, Debug)]
pub struct PciHost {
    /// Address of the configuration window.
    pub ecam_base: u64,
    /// Whether there is such a window (PCI Express).
    pub has_ecam: bool,
    /// Number of buses it spans (1 MiB each), at most 256.
    pub buses: u16,
    /// 32-bit memory windows: first and last address of each.
    pub mmio32: Vec<(u32, u32)>,
    /// 64-bit memory window: first and last address.
    pub mmio64: (u64, u64),
    /// Interrupt routing of the root bus.
    pub routes: Vec<Route>,
    /// The same for a system that uses the 8259s.
    pub pic_routes: Vec<Route>,
}

impl Default for PciHost {
    fn default() -> Self {
        Self {
            ecam_base: 0xb000_0000,
            has_ecam: true,
            buses: 256,
            mmio32: vec![(0xc000_0000, 0xfebf_ffff)],
            mmio64: (0x80_0000_0000, 0x8f_ffff_ffff),
            routes: Vec::new(),
            pic_routes: Vec::new(),
        }
    }
}

/// A 16550 serial port.
#[derive(Clone, Copy, Debug)]
pub struct SerialPort {
    /// First port.
    pub port: u16,
    /// Interrupt.
    pub gsi: u32,
}

/// A virtio-mmio transport.
#[derive(Clone, Copy, Debug)]
pub struct VirtioMmio {
    /// First address; 512 bytes.
    pub base: u32,
    /// Interrupt.
    pub gsi: u32,
}

/// AML that was written already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn aml(node: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    node.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

fn path(name: &str) -> Path {
    Path::new(name)
}

fn hid(id: &'static str) -> Raw {
    // PNP-style IDs (three letters, four digits) are compressed EISA IDs; others are strings.
    if id.len() == 7 {
        aml(&Name::new(path("_HID"), &EISAName::new(id)))
    } else {
        aml(&Name::new(path("_HID"), &id))
    }
}

fn device<'a>(name: &str, id: &'static str, uid: u32, resources: Vec<&'a (dyn Aml + 'a)>) -> Raw {
    let resources = aml(&ResourceTemplate::new(resources));
    aml(&Device::new(
        path(name),
        vec![&hid(id), &Name::new(path("_UID"), &uid), &Name::new(path("_CRS"), &resources)],
    ))
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut sb: Vec<Raw> = cpus(&config.topology);
    for (i, s) in config.serial.iter().enumerate() {
        let ports = IO::new(s.port, s.port, 1, 8);
        sb.push(device(&format!("COM{}", i + 1), "PNP0501", i as u32 + 1, vec![&ports, &edge(s.gsi)]));
    }
    if config.i8042 {
        sb.push(device(
            "KBD_",
            "PNP0303",
            0,
            vec![&IO::new(0x60, 0x60, 1, 1), &IO::new(0x64, 0x64, 1, 1), &edge(1)],
        ));
        sb.push(device("MOU_", "PNP0F13", 0, vec![&edge(12)]));
    }
    if config.rtc {
        sb.push(device("RTC_", "PNP0B00", 0, vec![&IO::new(0x70, 0x70, 1, 2), &edge(8)]));
    }
    if config.hpet {
        sb.push(device("HPET", "PNP0103", 0, vec![&Memory32Fixed::new(false, HPET_BASE as u32, 0x400)]));
    }
    if config.fw_cfg {
        let ports = IO::new(FwCfg::PORT, FwCfg::PORT, 1, FwCfg::PORTS as u8);
        sb.push(device("FWCF", "QEMU0002", 0, vec![&ports]));
    }
    for (i, v) in config.virtio_mmio.iter().enumerate() {
        let (mem, irq) = (Memory32Fixed::new(true, v.base, 0x200), edge(v.gsi));
        sb.push(device(&format!("VR{i:02X}"), "LNRO0005", i as u32, vec![&mem, &irq]));
    }
    if let Some(pci) = &config.pci {
        sb.push(pci_host(pci));
    }
    let sleep_type = match config.power {
        Power::Fixed { .. } => Some(AcpiPm::S5),
        Power::Reduced { gsi, .. } => {
            sb.extend(event_device(gsi));
            Some(REDUCED_S5_SLEEP_TYPE)
        }
        Power::None => None,
    };
    let mut t = table(b"DSDT", 2);
    let scope = aml(&Scope::new(path("\\_SB_"), sb.iter().map(|r| r as &dyn Aml).collect()));
    if config.pci.is_some() {
        let flag = path("\\PICF");
        let store = Store::new(&flag, &Arg(0));
        t.append_slice(&aml(&Name::new(path("PICF"), &ZERO)).0);
        t.append_slice(&aml(&Method::new(path("\\_PIC"), 1, false, vec![&store])).0);
    }
    t.append_slice(&scope.0);
    if let Some(kind) = sleep_type {
        t.append_slice(&aml(&Name::new(path("\\_S5_"), &Package::new(vec![&kind, &kind, &ZERO, &ZERO]))).0);
    }
    t.as_slice().to_vec()
}

fn cpus(topology: &Topology) -> Vec<Raw> {
    (0..topology.count())
        .map(|i| {
            let parts = [aml(&Name::new(path("_HID"), &"ACPI0007")), aml(&Name::new(path("_UID"), &i))];
            aml(&Device::new(path(&format!("C{i:03X}")), parts.iter().map(|p| p as &dyn Aml).collect()))
        })
        .collect()
}

/// Generic event device (5.6.9) and power button for reduced hardware.
fn event_device(gsi: u32) -> [Raw; 2] {
    let button = aml(&Device::new(path("PWRB"), vec![&hid("PNP0C0C"), &Name::new(path("_UID"), &ZERO)]));
    let pressed: u8 = 0x80;
    let notify = aml(&Notify::new(&path("\\_SB_.PWRB"), &pressed));
    let event = aml(&Method::new(path("_EVT"), 1, true, vec![&notify]));
    let ged = aml(&Device::new(
        path("GED_"),
        vec![
            &hid("ACPI0013"),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&edge(gsi)])),
            &event,
        ],
    ));
    [button, ged]
}

fn pci_host(pci: &PciHost) -> Raw {
    let (lo64, hi64) = pci.mmio64;
    let buses = AddressSpace::new_bus_number(0u16, pci.buses - 1);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7, None);
    let high_ports = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let low = |(first, last): &(u32, u32)| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, *first, *last, None)
    };
    let mmio32: Vec<_> = pci.mmio32.iter().map(low).collect();
    let mmio64 = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, lo64, hi64, None);
    let mut all: Vec<&dyn Aml> = vec![&buses, &config_ports, &low_ports, &high_ports];
    all.extend(mmio32.iter().map(|w| w as &dyn Aml));
    all.push(&mmio64);
    let resources = ResourceTemplate::new(all);
    let package = |routes: &[Route]| {
        let entry = |r: &Route| {
            let address = u32::from(r.slot) << 16 | 0xffff;
            aml(&Package::new(vec![&address, &r.pin, &ZERO, &r.gsi]))
        };
        let entries: Vec<Raw> = routes.iter().map(entry).collect();
        aml(&Package::new(entries.iter().map(|r| r as &dyn Aml).collect()))
    };
    // With the IOAPIC, or with the 8259s: the system has said which by _PIC (5.8.1).
    let apic = aml(&Return::new(&path("PRTA")));
    let pic = aml(&Return::new(&path("PRTP")));
    let choice = aml(&If::new(&path("\\PICF"), vec![&apic]));
    let route = aml(&Method::new(path("_PRT"), 0, false, vec![&choice, &pic]));
    let (zero, cid) = (ZERO, EISAName::new("PNP0A03"));
    aml(&Device::new(
        path("PCI0"),
        vec![
            &hid(if pci.has_ecam { "PNP0A08" } else { "PNP0A03" }),
            &Name::new(path("_CID"), &cid),
            &Name::new(path("_UID"), &zero),
            &Name::new(path("_SEG"), &zero),
            &Name::new(path("_BBN"), &zero),
            &Name::new(path("_CRS"), &resources),
            &Name::new(path("PRTA"), &package(&pci.routes)),
            &Name::new(path("PRTP"), &package(&pci.pic_routes)),
            &route,
        ],
    ))
}
