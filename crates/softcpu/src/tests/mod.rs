//! Small guests for what random single instructions do not reach: modes, privilege, paging, events, code that changes.
//! Each runs by the interpreter, and with everything translated.
#![allow(clippy::unwrap_used)] // what must not fail, panics

mod breakpoints;
mod code;
mod devices;
mod events;
mod groups;
mod long;
mod paging;
mod protected;
mod real;
mod smp;
mod state;
mod v86;

use crate::{SoftAccel, SoftSpec};
use accel::state::{MpState, Segment, Table, gpr, seg};
use accel::{
    Accel, CpuIo, CpuSignals, CpuState, Exit, Kicker, LocalApic, MsrFault, Signal, Slot, Vcpu, VcpuConfig, Vm,
};
use iced_x86::code_asm::*;
use memory::{Backing, GuestMemory, Region};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// RAM from address 0.
pub(super) const RAM: u64 = 8 << 20;
/// A page of ROM, and one of device registers behind it.
pub(super) const ROM: u64 = 0x4000_0000;
pub(super) const DEVICE: u64 = ROM + 0x1000;

/// Where things are in RAM.
pub(super) mod at {
    pub(crate) const PML4: u64 = 0x1000;
    pub(crate) const PDPT: u64 = 0x2000;
    pub(crate) const PD: u64 = 0x3000;
    /// Page table of the first 2 MiB.
    pub(crate) const PT: u64 = 0x4000;
    pub(crate) const GDT: u64 = 0x5000;
    pub(crate) const IDT: u64 = 0x6000;
    pub(crate) const TSS: u64 = 0x7000;
    pub(crate) const HANDLERS: u64 = 0x8000;
    /// Tops of stacks.
    pub(crate) const STACK: u64 = 0xa000;
    pub(crate) const STACK0: u64 = 0xb000;
    pub(crate) const STACK_IST: u64 = 0xc000;
    pub(crate) const CODE: u64 = 0x1_0000;
    pub(crate) const DATA: u64 = 0x2_0000;
}

/// Selectors of the test GDT.
pub(super) mod sel {
    pub(crate) const CODE64: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    pub(crate) const CODE32: u16 = 0x18;
    pub(crate) const USER_CODE32: u16 = 0x20 | 3;
    pub(crate) const USER_DATA: u16 = 0x28 | 3;
    pub(crate) const USER_CODE64: u16 = 0x30 | 3;
    pub(crate) const TSS: u16 = 0x38;
    /// First selector that tests may use (0x38 is 16 bytes in long mode).
    pub(crate) const FREE: u16 = 0x48;
}

/// Port that ends the run.
pub(super) const DONE: u32 = 0x80;

/// The world outside: remembers accesses; a write to [`DONE`] ends the run.
#[derive(Default)]
pub(super) struct World {
    kicker: OnceLock<Kicker>,
    /// Ports written, with values.
    pub(super) out: Mutex<Vec<(u16, u32)>>,
    /// Device writes: address and bytes.
    pub(super) written: Mutex<Vec<(u64, Vec<u8>)>>,
    /// Device reads: address and length.
    pub(super) read: Mutex<Vec<(u64, usize)>>,
}

impl CpuIo for World {
    fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn port_out(&self, port: u16, data: &[u8]) {
        let mut v = [0; 4];
        v[..data.len()].copy_from_slice(data);
        self.out.lock().unwrap().push((port, u32::from_le_bytes(v)));
        if u32::from(port) == DONE {
            self.kicker.get().unwrap().kick();
        }
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.read.lock().unwrap().push((gpa, data.len()));
        for (i, b) in data.iter_mut().enumerate() {
            *b = (gpa as u8).wrapping_add(i as u8);
        }
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.written.lock().unwrap().push((gpa, data.to_vec()));
    }
}

/// A local APIC with one interrupt at most.
pub(super) struct Apic {
    signals: Arc<CpuSignals>,
    /// Vector to deliver, or none.
    pub(super) vector: Mutex<Option<u8>>,
    cr8: AtomicU64,
}

impl Apic {
    /// Asserts an interrupt.
    pub(super) fn raise(&self, vector: u8) {
        *self.vector.lock().unwrap() = Some(vector);
        self.signals.raise(Signal::INTERRUPT);
    }
}

impl LocalApic for Apic {
    fn has_interrupt(&self) -> bool {
        self.vector.lock().unwrap().is_some()
    }
    fn acknowledge(&self) -> Option<u8> {
        self.vector.lock().unwrap().take()
    }
    fn base(&self) -> u64 {
        0xfee0_0900
    }
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
    fn read_msr(&self, _msr: u32) -> Result<u64, MsrFault> {
        Ok(self.base())
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> Result<(), MsrFault> {
        Ok(())
    }
    fn cr8(&self) -> u8 {
        self.cr8.load(Ordering::Relaxed) as u8
    }
    fn set_cr8(&self, value: u8) {
        self.cr8.store(value as u64, Ordering::Relaxed);
    }
    fn set_tsc_offset(&self, _offset: u64) {}
    fn init(&self) {}
    fn save(&self) -> Vec<u8> {
        vec![0; 1024]
    }
    fn load(&self, _page: &[u8]) -> accel::Result<()> {
        Ok(())
    }
}

/// A vCPU with its world.
pub(super) struct Core {
    pub(super) vcpu: Box<dyn Vcpu>,
    pub(super) world: World,
    pub(super) apic: Arc<Apic>,
    pub(super) signals: Arc<CpuSignals>,
}

impl Core {
    /// Runs until the guest writes to [`DONE`].
    pub(super) fn run(&mut self) -> CpuState {
        let exit = self.vcpu.run(&self.world).unwrap();
        assert_eq!(exit, Exit::Kicked);
        self.vcpu.save().unwrap()
    }

    /// Values written to a port.
    pub(super) fn port(&self, port: u16) -> Vec<u32> {
        self.world.out.lock().unwrap().iter().filter(|(p, _)| *p == port).map(|(_, v)| *v).collect()
    }
}

/// A VM with one vCPU or more.
pub(super) struct Guest {
    pub(super) memory: GuestMemory,
    pub(super) cores: Vec<Core>,
    pub(super) vm: Arc<dyn Vm>,
}

/// Code at an address.
pub(super) fn assemble(
    bits: u32,
    ip: u64,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a).unwrap();
    a.assemble(ip).unwrap()
}

/// `out DONE, al; hlt`.
pub(super) fn done(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(DONE as i32, al)?;
    a.hlt()
}

/// The executors that a test runs with.
pub(super) fn executors() -> [SoftSpec; 2] {
    let interpret = SoftSpec { translate: Some(false), ..Default::default() };
    let translate = SoftSpec { translate: Some(true), threshold: 0, cache: 16 << 20, exact: true };
    [interpret, translate]
}

/// Runs a test with every executor.
pub(super) fn each(f: impl Fn(Guest)) {
    for spec in executors() {
        f(Guest::new(spec, 1));
    }
}

fn segment(selector: u16, attributes: u32) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

impl Guest {
    pub(super) fn new(spec: SoftSpec, cpus: u32) -> Self {
        let accel = SoftAccel::new(spec).unwrap();
        let vm = accel.create_vm().unwrap();
        let region = Region::new(0, RAM, &Backing::Anonymous, false).unwrap();
        let rom = Region::new(ROM, 0x1000, &Backing::Anonymous, false).unwrap();
        let memory = GuestMemory::from_regions(vec![region.clone(), rom.clone()]);
        vm.map(Slot { gpa: 0, len: RAM, region, offset: 0, readonly: false }).unwrap();
        vm.map(Slot { gpa: ROM, len: 0x1000, region: rom, offset: 0, readonly: true }).unwrap();
        let cores = (0..cpus)
            .map(|index| {
                let signals = Arc::new(CpuSignals::new());
                let apic = Arc::new(Apic {
                    signals: signals.clone(),
                    vector: Mutex::new(None),
                    cr8: AtomicU64::new(0),
                });
                let config = VcpuConfig {
                    index,
                    apic_id: index,
                    cpuid: accel.supported_cpuid().unwrap(),
                    signals: signals.clone(),
                    apic: Some(apic.clone()),
                };
                let vcpu = vm.vcpu(config).unwrap();
                let world = World::default();
                let _ = world.kicker.set(vcpu.kicker());
                Core { vcpu, world, apic, signals }
            })
            .collect();
        Self { memory, cores, vm }
    }

    pub(super) fn core(&mut self) -> &mut Core {
        &mut self.cores[0]
    }

    pub(super) fn put64(&self, at: u64, value: u64) {
        self.memory.write_obj(at, &value).unwrap();
    }

    pub(super) fn get64(&self, at: u64) -> u64 {
        self.memory.read_obj(at).unwrap()
    }

    pub(super) fn get32(&self, at: u64) -> u32 {
        self.memory.read_obj(at).unwrap()
    }

    /// Puts code at an address.
    pub(super) fn code(
        &self,
        bits: u32,
        at: u64,
        f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        self.memory.write(at, &assemble(bits, at, f)).unwrap();
    }

    /// Sets a descriptor of the GDT.
    pub(super) fn descriptor(&self, selector: u16, raw: u64) {
        self.put64(at::GDT + u64::from(selector & !7), raw);
    }

    fn common_descriptors(&self) {
        self.descriptor(sel::CODE64, 0x00af_9b00_0000_ffff);
        self.descriptor(sel::DATA, 0x00cf_9300_0000_ffff);
        self.descriptor(sel::CODE32, 0x00cf_9b00_0000_ffff);
        self.descriptor(sel::USER_CODE32, 0x00cf_fb00_0000_ffff);
        self.descriptor(sel::USER_DATA, 0x00cf_f300_0000_ffff);
        self.descriptor(sel::USER_CODE64, 0x00af_fb00_0000_ffff);
    }

    /// Sets an interrupt gate (DPL 3, so that INT n reaches it) in a 64-bit IDT.
    pub(super) fn gate64(&self, vector: u8, to: u64, ist: u64) {
        let low =
            (to & 0xffff) | u64::from(sel::CODE64) << 16 | ist << 32 | 0xee << 40 | (to >> 16 & 0xffff) << 48;
        self.put64(at::IDT + u64::from(vector) * 16, low);
        self.put64(at::IDT + u64::from(vector) * 16 + 8, to >> 32);
    }

    /// Sets a gate of a 32-bit IDT.
    pub(super) fn gate32(&self, vector: u8, selector: u16, to: u64, attributes: u64) {
        let raw = (to & 0xffff) | u64::from(selector) << 16 | attributes << 40 | (to >> 16 & 0xffff) << 48;
        self.put64(at::IDT + u64::from(vector) * 8, raw);
    }

    /// Gates for all exceptions, each to a handler that ends the run with the vector in the port [`DONE`].
    fn handlers(&self, bits: u32) {
        for v in 0..32u64 {
            let to = at::HANDLERS + v * 16;
            // push rax; mov al, v; out DONE, al; hlt
            self.memory.write(to, &[0x50, 0xb0, v as u8, 0xe6, DONE as u8, 0xf4]).unwrap();
            if bits == 64 {
                self.gate64(v as u8, to, 0);
            } else {
                self.gate32(v as u8, sel::CODE32, to, 0xee);
            }
        }
    }

    /// State for 64-bit mode: the first 2 MiB mapped by 4 KiB pages (user, writable), 2 MiB to 8 MiB by large ones, RAM
    /// again at 0xffff_8000_0000_0000 (supervisor), and devices at [`ROM`].
    pub(super) fn long(&self) -> CpuState {
        self.common_descriptors();
        self.put64(at::PML4, at::PDPT | 7);
        self.put64(at::PML4 + 256 * 8, at::PDPT | 3);
        self.put64(at::PDPT, at::PD | 7);
        self.put64(at::PDPT + 8, ROM | 0x83); // 1 GiB
        self.put64(at::PD, at::PT | 7);
        for n in 1..4 {
            self.put64(at::PD + n * 8, n << 21 | 0x87);
        }
        for n in 0..512 {
            self.put64(at::PT + n * 8, n << 12 | 7);
        }
        self.handlers(64);
        self.descriptor(sel::TSS, 0x0000_8900_0000_0067 | at::TSS << 16);
        self.descriptor(sel::TSS + 8, 0);
        self.put64(at::TSS + 4, at::STACK0);
        self.put64(at::TSS + 0x24, at::STACK_IST);
        self.memory.write_obj(at::TSS + 102, &0x68u16).unwrap();
        let mut s = self.flat(0x8001_0033, sel::CODE64, 0xa09b);
        s.cr3 = at::PML4;
        s.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
        s.efer = 1 | 1 << 8 | 1 << 10 | 1 << 11;
        s
    }

    /// The same at CPL 3.
    pub(super) fn long_user(&self) -> CpuState {
        let mut s = self.long();
        s.segments[seg::CS] = segment(sel::USER_CODE64, 0xa0fb);
        for n in [seg::SS, seg::DS, seg::ES] {
            s.segments[n] = segment(sel::USER_DATA, 0xc0f3);
        }
        s
    }

    /// State for 32-bit protected mode without paging.
    pub(super) fn protected(&self) -> CpuState {
        self.common_descriptors();
        self.handlers(32);
        self.descriptor(sel::TSS, 0x0000_8900_0000_0067 | at::TSS << 16);
        self.memory.write_obj(at::TSS + 4, &(at::STACK0 as u32)).unwrap();
        self.memory.write_obj(at::TSS + 8, &u32::from(sel::DATA)).unwrap();
        self.memory.write_obj(at::TSS + 102, &0x68u16).unwrap();
        self.flat(0x33, sel::CODE32, 0xc09b)
    }

    /// The same at CPL 3.
    pub(super) fn protected_user(&self) -> CpuState {
        let mut s = self.protected();
        s.segments[seg::CS] = segment(sel::USER_CODE32, 0xc0fb);
        for n in [seg::SS, seg::DS, seg::ES] {
            s.segments[n] = segment(sel::USER_DATA, 0xc0f3);
        }
        s
    }

    /// State for real mode, at CODE with a stack below it.
    pub(super) fn real(&self) -> CpuState {
        let mut s = self.flat(0x10, 0, 0x9b);
        for g in &mut s.segments {
            *g = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 };
        }
        let base = at::CODE;
        s.segments[seg::CS] = Segment { selector: (base >> 4) as u16, base, limit: 0xffff, attributes: 0x9b };
        s.rip = 0;
        s.gdtr = Table { base: at::GDT, limit: 0x7f };
        s.idtr = Table { base: 0, limit: 0x3ff };
        s
    }

    fn flat(&self, control: u64, code: u16, attributes: u32) -> CpuState {
        let mut s = CpuState {
            cr0: control,
            rflags: 2,
            rip: at::CODE,
            apic_base: 0xfee0_0900,
            xcr0: 1,
            dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            mp_state: MpState::Runnable,
            ..Default::default()
        };
        s.gpr[gpr::RSP] = at::STACK;
        s.segments = [segment(sel::DATA, 0xc093); 6];
        s.segments[seg::CS] = segment(code, attributes);
        s.gdtr = Table { base: at::GDT, limit: 0xff };
        s.idtr = Table { base: at::IDT, limit: 0xfff };
        s.tr = Segment { selector: sel::TSS, base: at::TSS, limit: 0x67, attributes: 0x8b };
        s.ldtr = Segment { attributes: Segment::UNUSABLE, ..Default::default() };
        s.xsave = vec![0; 576];
        s.xsave[..2].copy_from_slice(&[0x7f, 3]);
        s.xsave[24..26].copy_from_slice(&[0x80, 0x1f]);
        s
    }

    /// Loads a state into the first vCPU and runs it to the end.
    pub(super) fn run(&mut self, state: &CpuState) -> CpuState {
        let core = self.core();
        core.vcpu.load(state).unwrap();
        core.run()
    }

    /// As [`Self::run`], where an exception is expected: its vector and the state in its handler.
    pub(super) fn fault(&mut self, state: &CpuState) -> (u32, CpuState) {
        let s = self.run(state);
        let v = *self.core().port(DONE as u16).last().unwrap();
        (v & 0xff, s)
    }

    /// Quadwords of a 64-bit exception frame, from the lowest (the error code if there is one), as [`Self::fault`] left it.
    pub(super) fn frame(&self, s: &CpuState, n: u64) -> u64 {
        // The handler has pushed RAX.
        self.get64((s.gpr[gpr::RSP] & 0xff_ffff) + 8 + n * 8)
    }
}
