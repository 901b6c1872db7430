//! Boards: what is where. Each board is one file and one line of [`BOARDS`].

mod common;
mod microvm;
mod none;
mod parts;
mod pc;
mod pci_view;
mod plug;
mod q35;

use crate::acpi::AcpiConfig;
use crate::blueprint::{Blueprint, BoardSpec};
use crate::drives::Drives;
use crate::firmware::{self, Bootable, Firmware};
use crate::kernel::{E820, Tables};
use crate::netdevs::Netdevs;
use crate::smbios::{self, SmbiosConfig};
use crate::topology::Topology;
use crate::{Chardevs, Error, Result, acpi, cpu};
use accel::{Accel, CpuSignals, Cpuid, Irqs, Slot, Vcpu, VcpuConfig, Vm};
use base::props::Bag;
use base::{Timers, nearest};
use bus::pci::{PciBus, Windows, reg};
use bus::{Bus, IrqPin, RegionId, SharedDevice, Space, System};
use devices::chipset::{ApicCpu, Clock, FwCfg, Irqchip, LEGACY_AREA, Shadow};
use devices::virtio::balloon::Balloon;
use display::Displays;
use memory::{GuestMemory, Layout, Region};
pub(crate) use pci_view::PciView;
use pci_view::tables_now;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A kind of machine.
pub struct Board {
    /// Its name, as in `--machine NAME`.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// SMBIOS product name, by which guests know it.
    product: &'static str,
    /// Whether it can run firmware.
    firmware: bool,
    /// Where RAM below 4 GiB ends at most, for a given total in bytes.
    low_ram_end: fn(u64) -> u64,
    /// Puts the devices on.
    build: fn(&mut Builder, &BoardSpec) -> Result<()>,
}

/// All boards.
pub const BOARDS: &[Board] = &[q35::BOARD, pc::BOARD, microvm::BOARD, none::BOARD];

/// Where the ACPI tables go: the BIOS area, in which systems look for the RSDP.
const ACPI_TABLES: u64 = 0xe_0000;
/// Where the SMBIOS tables go.
const SMBIOS_TABLES: u64 = 0xf_0000;
const BIOS_AREA_END: u64 = 0x10_0000;
/// End of conventional memory; above it are the extended BIOS data area and video memory.
const LOW_END: u64 = 0x9_fc00;

/// A machine being put together.
pub(crate) struct Builder {
    pub(crate) memory: GuestMemory,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) irqs: Arc<dyn Irqs>,
    pub(crate) irqchip: Option<Arc<Irqchip>>,
    pub(crate) clock: Clock,
    pub(crate) displays: Arc<Displays>,
    pub(crate) balloon: Option<Arc<Balloon>>,
    pub(crate) timers: Timers,
    pub(crate) system: System,
    pub(crate) chardevs: Chardevs,
    pub(crate) drives: Drives,
    pub(crate) netdevs: Netdevs,
    /// Objects of the kind iothread.
    pub(crate) iothreads: Vec<Bag>,
    pub(crate) serials: Vec<String>,
    pub(crate) acpi: AcpiConfig,
    pub(crate) reserved: Vec<E820>,
    pub(crate) pci: Option<Arc<PciBus>>,
    pub(crate) windows: Option<fn() -> Windows>,
    pub(crate) devices: Vec<SharedDevice>,
    pub(crate) power_button: Option<Box<dyn Fn() + Send>>,
    pub(crate) product: &'static str,
    /// Firmware that is put in place already: where the reset vector lies.
    pub(crate) rom: Option<Region>,
    pub(crate) pci_view: Option<PciView>,
    /// Interrupts that PIRQs lead to on boards whose IOAPIC has no inputs for them.
    pub(crate) isa_pirqs: Option<[u8; 4]>,
    /// Whether there is a display.
    pub(crate) display: bool,
    pub(crate) boot: firmware::BootSpec,
    bootable: Vec<Bootable>,
    pins: BTreeMap<u32, Arc<IrqPin>>,
    mmio_slots: Vec<plug::MmioSlot>,
    buses: Vec<plug::NamedBus>,
    pub(crate) plugged: Vec<plug::Plugged>,
}

/// A machine put together. The builder stays, for what is plugged later.
pub(crate) struct Built {
    builder: Builder,
    pub(crate) processor: Processor,
    smbios: SmbiosConfig,
    e820: Vec<E820>,
}

impl std::ops::Deref for Built {
    type Target = Builder;
    fn deref(&self) -> &Builder {
        &self.builder
    }
}

impl std::ops::DerefMut for Built {
    fn deref_mut(&mut self) -> &mut Builder {
        &mut self.builder
    }
}

fn find(name: &str) -> Result<&'static Board> {
    BOARDS.iter().find(|b| b.name == name).ok_or_else(|| {
        let known = BOARDS.iter().map(|b| b.name).collect::<Vec<_>>();
        let near = nearest(name, known.iter().copied())
            .map(|n| format!("; did you mean '{n}'?"))
            .unwrap_or_default();
        Error::Config(format!("unknown machine '{name}': use {}{near}", known.join(" or ")))
    })
}

/// The model of the vCPUs.
pub(crate) struct Processor {
    /// Its name, as asked for.
    pub(crate) model: String,
    /// What guests see, without topology.
    pub(crate) cpuid: Cpuid,
    /// What they could see.
    pub(crate) supported: Cpuid,
}

/// The processor asked for; says what it goes without.
fn processor(bag: &base::props::Bag, accel: &dyn Accel) -> Result<Processor> {
    let request = cpu::Request::new(bag)?;
    let supported = accel.supported_cpuid()?;
    let resolved = cpu::resolve(&request, &supported)?;
    if request.spec.check && !resolved.missing.is_empty() {
        let missing: Vec<_> = resolved.missing.iter().map(ToString::to_string).collect();
        tracing::warn!(
            "CPU '{}': the accelerator '{}' has no {}; the guest goes without",
            request.name,
            accel.name(),
            missing.join(", ")
        );
    }
    Ok(Processor { model: request.name, cpuid: resolved.cpuid, supported })
}

/// Builds the board, its devices and its vCPUs.
pub(crate) fn build(
    blueprint: &Blueprint,
    accel: &dyn Accel,
    system: System,
    chardevs: Chardevs,
) -> Result<(Built, Vec<Box<dyn Vcpu>>)> {
    let board = find(&blueprint.machine.driver)?;
    let spec: BoardSpec = blueprint.machine.spec()?;
    let topology = Topology::new(&blueprint.smp).map_err(Error::Config)?;
    if topology.count() > accel.max_vcpus() {
        return Err(Error::Config(format!(
            "{} vCPUs are more than the accelerator '{}' supports here, {}",
            topology.count(),
            accel.name(),
            accel.max_vcpus()
        )));
    }
    let processor = processor(&blueprint.cpu, accel)?;
    if spec.smm == Some(true) {
        return Err(Error::Config(
            "system management mode is not available: leave out smm=on (Secure Boot firmware needs it)"
                .into(),
        ));
    }
    blueprint.boot.check()?;
    let firmware = open_firmware(board, blueprint)?;
    let size = blueprint.memory.size;
    let layout = Layout::pc(size, (board.low_ram_end)(size))?;
    let drives = Drives::open(&blueprint.blockdevs)?;
    let netdevs = Netdevs::open(&blueprint.netdevs)?;
    let memory = GuestMemory::new(&layout, &blueprint.memory.backing()?, blueprint.memory.prealloc)?;
    let vm = accel.create_vm()?;
    for region in memory.regions() {
        for part in shown_parts(board, region, firmware.is_some()) {
            vm.map(Slot {
                gpa: part.start,
                len: part.end - part.start,
                region: region.clone(),
                offset: part.start - region.start,
                readonly: false,
            })?;
        }
    }

    let displays = Displays::new().map_err(|source| Error::Host {
        what: "cannot start the thread that refreshes screens".into(),
        source,
    })?;
    let displays = Arc::new(displays);
    let timers = Timers::new();
    let clock = Clock::new(&timers);
    let signals: Vec<_> = (0..topology.count()).map(|_| Arc::new(CpuSignals::new())).collect();
    let (irqs, irqchip) = match vm.irqs() {
        Some(irqs) => (irqs, None),
        None => {
            let cpus =
                topology.apic_ids().zip(&signals).map(|(apic_id, s)| ApicCpu { apic_id, signals: s.clone() });
            let chip = Irqchip::new(cpus.collect(), &clock);
            (chip.clone() as Arc<dyn Irqs>, Some(chip))
        }
    };
    let mut builder = Builder {
        memory,
        vm: vm.clone(),
        bus: Arc::new(Bus::new()),
        irqs,
        irqchip: irqchip.clone(),
        clock,
        displays,
        balloon: None,
        timers,
        system,
        chardevs,
        drives,
        netdevs,
        iothreads: blueprint.objects.iter().filter(|o| o.driver == "iothread").cloned().collect(),
        serials: blueprint.serials.clone(),
        acpi: AcpiConfig {
            topology,
            timer_gsi: if irqchip.is_some() { 2 } else { 0 },
            ..AcpiConfig::default()
        },
        reserved: Vec::new(),
        pci: None,
        windows: None,
        devices: Vec::new(),
        power_button: None,
        product: board.product,
        rom: None,
        pci_view: None,
        isa_pirqs: None,
        display: false,
        boot: blueprint.boot.clone(),
        bootable: Vec::new(),
        pins: BTreeMap::new(),
        mmio_slots: Vec::new(),
        buses: Vec::new(),
        plugged: Vec::new(),
    };
    if let Some(chip) = &irqchip {
        builder.software_irqchip(chip)?;
    }
    if let Some(firmware) = &firmware {
        let (rom, chips) = firmware::install(firmware, &builder.vm, &builder.bus)?;
        builder.rom = Some(rom);
        builder.devices.extend(chips);
    }
    (board.build)(&mut builder, &spec)?;
    builder.plug(&blueprint.devices)?;
    builder.firmware_config(blueprint, &spec)?;

    let vcpus = signals
        .into_iter()
        .take(if board.name == none::BOARD.name { 0 } else { usize::MAX })
        .enumerate()
        .map(|(i, signals)| {
            let index = i as u32;
            let mut cpuid = processor.cpuid.clone();
            topology.fill_cpuid(&mut cpuid, index);
            let apic = irqchip.as_ref().and_then(|c| c.local_apic(i));
            vm.vcpu(VcpuConfig { index, apic_id: topology.apic_id(index), cpuid, signals, apic })
        })
        .collect::<std::result::Result<Vec<_>, _>>()?;
    Ok((builder.finish(processor), vcpus))
}

/// The blueprint's firmware, checked against what the board can run.
fn open_firmware(board: &Board, blueprint: &Blueprint) -> Result<Option<Firmware>> {
    let kernel = blueprint.kernel.is_some();
    if !board.firmware {
        if !matches!(blueprint.firmware.kind.as_str(), "auto" | "none") {
            return Err(Error::Config(format!(
                "machine '{}' runs no firmware: boot a kernel with --kernel, or use --machine q35",
                board.name
            )));
        }
        return Ok(None);
    }
    let firmware = blueprint.firmware.open(kernel)?;
    match (&firmware, kernel) {
        (None, false) => {
            Err(Error::Config("nothing to boot: --firmware none needs a kernel, given with --kernel".into()))
        }
        _ => Ok(firmware),
    }
}

/// The parts of a region that the guest sees as RAM for good: all but the legacy area, of which the upper half is RAM
/// too where there is no firmware to shadow.
fn shown_parts(board: &Board, region: &Region, firmware: bool) -> Vec<std::ops::Range<u64>> {
    let all = region.start..region.start + region.len();
    if !board.firmware || region.start != 0 {
        return vec![all];
    }
    const SHADOWED: u64 = 0xc_0000;
    let resume = if firmware { LEGACY_AREA.end } else { SHADOWED };
    [0..LEGACY_AREA.start, resume..all.end].into_iter().filter(|part| !part.is_empty()).collect()
}

impl Builder {
    /// RAM and ROM below 1 MiB, for the board's host bridge.
    pub(crate) fn shadow(&self) -> Result<Option<Shadow>> {
        let Some(rom) = &self.rom else { return Ok(None) };
        let ram = self.memory.regions()[0].clone();
        Ok(Some(Shadow::new(self.vm.clone(), ram, rom.clone())?))
    }

    fn smbios(&self) -> SmbiosConfig {
        let t = self.acpi.topology;
        SmbiosConfig {
            product: self.product.into(),
            uuid: None,
            sockets: t.sockets,
            cores: t.dies * t.cores,
            threads: t.dies * t.cores * t.threads,
            memory: self.memory.total(),
        }
    }

    /// The firmware configuration device, on boards that run firmware.
    fn firmware_config(&mut self, blueprint: &Blueprint, spec: &BoardSpec) -> Result<()> {
        if !(find(&blueprint.machine.driver)?).firmware {
            if !blueprint.fw_cfg.is_empty() {
                return Err(Error::Config("this machine has no firmware configuration device".into()));
            }
            return Ok(());
        }
        self.acpi.fw_cfg = true;
        let describe = tables_now(&self.acpi, &self.pci_view, &self.memory);
        let blob = spec.acpi.unwrap_or(true).then(&describe);
        let smbios = self.smbios();
        let items = firmware::items(&firmware::Facts {
            topology: &self.acpi.topology,
            memory: &self.memory,
            graphics: spec.graphics.unwrap_or(self.display),
            irq0_override: self.acpi.timer_gsi == 2,
            acpi: blob.as_ref(),
            smbios: smbios::for_firmware(&smbios),
            uuid: smbios.uuid,
            boot: &blueprint.boot,
            bootable: &self.bootable,
            files: &blueprint.fw_cfg,
            generation_id: None,
        })?;
        let mut device = FwCfg::new(items, self.memory.clone());
        let keys = ["etc/acpi/tables", "etc/table-loader"].map(|name| device.key_of(name));
        if let (true, [Some(tables), Some(script)]) = (blob.is_some(), keys) {
            let keys = vec![tables, script];
            device.refresh_with(keys, move || vec![(tables, Arc::new(describe().bytes) as _)]);
        }
        let device = self.own(device);
        self.bus.map(Space::Port, FwCfg::PORT.into(), FwCfg::PORTS.into(), "fw-cfg", &device, RegionId(0))?;
        Ok(())
    }

    /// The shared interrupt input `gsi`.
    pub(crate) fn pin(&mut self, gsi: u32) -> Arc<IrqPin> {
        self.pins.entry(gsi).or_insert_with(|| IrqPin::new(self.irqs.clone(), gsi)).clone()
    }

    fn finish(mut self, processor: Processor) -> Built {
        let smbios = self.smbios();
        let mut e820 = vec![E820 { start: 0, len: LOW_END, kind: E820::RAM }];
        e820.push(E820 { start: LOW_END, len: 0xa_0000 - LOW_END, kind: E820::RESERVED });
        e820.push(E820 { start: ACPI_TABLES, len: BIOS_AREA_END - ACPI_TABLES, kind: E820::RESERVED });
        for r in self.memory.regions() {
            let start = r.start.max(BIOS_AREA_END);
            if let Some(len) = (r.start + r.len()).checked_sub(start).filter(|l| *l > 0) {
                e820.push(E820 { start, len, kind: E820::RAM });
            }
        }
        e820.append(&mut self.reserved);
        e820.sort_by_key(|e| e.start);
        Built { builder: self, processor, smbios, e820 }
    }
}

impl Built {
    fn each(&self, mut f: impl FnMut(&mut dyn bus::Device) -> std::io::Result<()>) -> Result<()> {
        let functions = self.pci.as_ref().map(|p| p.devices()).unwrap_or_default();
        for device in self.devices.iter().chain(&functions) {
            let mut device = device.lock().unwrap_or_else(|e| e.into_inner());
            let device: &mut dyn bus::Device = &mut *device;
            if let Err(source) = f(device) {
                return Err(Error::Host { what: format!("device '{}'", device.name()), source });
            }
        }
        Ok(())
    }

    /// Starts the devices, then time.
    pub(crate) fn start(&self) -> Result<()> {
        self.each(|d| d.start())?;
        self.clock.start();
        Ok(())
    }

    /// Stops time, then the devices; vCPUs are parked already.
    pub(crate) fn pause(&self) {
        self.clock.stop();
        if let Err(e) = self.each(|d| d.pause()) {
            tracing::warn!("{e}");
        }
    }

    /// Whether the guest starts in firmware, rather than in a kernel that this program loads.
    pub(crate) fn starts_in_firmware(&self) -> bool {
        self.rom.is_some()
    }

    /// Back to power-on. RAM is cleared for a kernel that is loaded again; firmware finds what was there.
    pub(crate) fn reset(&self) {
        // `reset` of a device cannot fail.
        let _ = self.each(|d| {
            d.reset();
            Ok(())
        });
        if self.rom.is_some() {
            return;
        }
        for region in self.memory.regions() {
            if region.mapping.discard(0, region.len()).is_err() {
                let _ = self.memory.fill(region.start, region.len(), 0); // the region is RAM by definition
            }
            region.tracker.wrote(0, region.len());
        }
    }

    pub(crate) fn power_button(&self) {
        match &self.power_button {
            Some(press) => press(),
            None => tracing::warn!("this machine has no power button"),
        }
    }

    /// The code at the real-mode reset vector, where an operating system that knows no better way to reset jumps: it
    /// writes the ACPI reset register.
    fn write_reset_code(&self) -> Result<()> {
        const RESET_VECTOR: u64 = 0xf_fff0;
        let Some(port) = self.acpi.power.reset_port() else { return Ok(()) };
        let [low, high] = port.to_le_bytes();
        // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
        let code = [0xba, low, high, 0xb0, acpi::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
        Ok(self.memory.write(RESET_VECTOR, &code)?)
    }

    /// What firmware leaves behind: BARs, ACPI, SMBIOS, the memory map.
    pub(crate) fn write_tables(&self) -> Result<Tables> {
        if let (Some(pci), Some(windows)) = (&self.pci, self.windows) {
            pci.assign_resources(&mut windows()).map_err(|e| Error::Config(e.to_string()))?;
            for function in self.isa_pirqs.map(|_| pci.all_functions()).unwrap_or_default() {
                let mut function = function.lock().unwrap_or_else(|e| e.into_inner());
                let pirq = function.config().get_u8(reg::INTERRUPT_LINE);
                if let (1.., Some(irq)) = (
                    function.config().get_u8(reg::INTERRUPT_PIN),
                    self.isa_pirqs.and_then(|all| all.get(usize::from(pirq)).copied()),
                ) {
                    function.write_config(reg::INTERRUPT_LINE, &[irq]);
                }
            }
        }
        let used = acpi::write(&self.acpi, &self.memory, ACPI_TABLES)?;
        if ACPI_TABLES + used > SMBIOS_TABLES {
            return Err(Error::Config(
                "the ACPI tables do not fit below 0xf0000: use fewer vCPUs or devices".into(),
            ));
        }
        smbios::write(&self.smbios, &self.memory, SMBIOS_TABLES)?;
        self.write_reset_code()?;
        // Only a VGA answers there.
        let text_screen = self.bus.find(bus::Space::Memory, 0xb_8000).is_some();
        Ok(Tables { rsdp: Some(ACPI_TABLES), e820: self.e820.clone(), text_screen })
    }
}
