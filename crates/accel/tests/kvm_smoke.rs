//! A few bytes of real-mode code on KVM. Skipped, saying why, where there is no `/dev/kvm`.
#![allow(clippy::unwrap_used)] // helpers of tests too

use accel::kvm::{KvmAccel, probe};
use accel::state::{MpState, Segment, gpr, seg};
use accel::{Accel, CpuIo, CpuSignals, Error, Exit, IoAddress, Kicker, Slot, Vcpu, VcpuConfig, Vm};
use base::EventFd;
use memory::{Backing, GuestMemory, PAGE_SIZE, Region};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

const RAM: u64 = 0x1_0000;
/// Where code is loaded; CS is 0.
const CODE: u64 = 0x1000;
/// A register block that nothing backs: segment 0x2000.
const MMIO: u64 = 0x2_0000;

struct Guest {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    memory: GuestMemory,
    slot: accel::SlotId,
    cpuid: accel::Cpuid,
}

/// What the guest did, and what it reads.
#[derive(Default)]
struct World {
    log: Mutex<Vec<(char, u64, Vec<u8>)>>,
    /// Kicked when the guest reads the register block.
    kicker: OnceLock<Kicker>,
}

impl World {
    fn push(&self, what: char, at: u64, data: &[u8]) {
        self.log.lock().unwrap().push((what, at, data.to_vec()));
    }
}

impl CpuIo for World {
    fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0x5a);
        self.push('i', u64::from(port), data);
    }
    fn port_out(&self, port: u16, data: &[u8]) {
        self.push('o', u64::from(port), data);
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xc3);
        self.push('r', gpa, data);
        if let Some(kicker) = self.kicker.get() {
            kicker.kick();
        }
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.push('w', gpa, data);
    }
}

/// Real-mode code at [`CODE`], about to run.
fn guest(code: &[u8]) -> Option<Guest> {
    let accel = match KvmAccel::open() {
        Ok(accel) => accel,
        Err(e) => {
            eprintln!("skipped: {e}");
            return None;
        }
    };
    let vm = accel.create_vm().unwrap();
    let region = Region::new(0, RAM, &Backing::Anonymous, false).unwrap();
    let memory = GuestMemory::from_regions(vec![region.clone()]);
    memory.write(CODE, code).unwrap();
    let slot = vm.map(Slot { gpa: 0, len: RAM, region, offset: 0, readonly: false }).unwrap();
    let cpuid = accel.supported_cpuid().unwrap();
    let config = VcpuConfig {
        index: 0,
        apic_id: 0,
        cpuid: cpuid.clone(),
        signals: Arc::new(CpuSignals::new()),
        apic: None,
    };
    let mut vcpu = vm.vcpu(config).unwrap();
    let mut state = vcpu.save_registers().unwrap();
    assert_eq!((state.rip, state.segments[seg::CS].base), (0xfff0, 0xffff_0000), "the reset vector");
    state.segments[seg::CS] = Segment { selector: 0, base: 0, ..state.segments[seg::CS] };
    state.rip = CODE;
    vcpu.load_registers(&state).unwrap();
    Some(Guest { vm, vcpu, memory, slot, cpuid })
}

/// Kicks after a while, so that a test which would spin for ever fails instead. Ends with the returned sender.
fn watchdog(kicker: Kicker, after: Duration) -> std::sync::mpsc::Sender<()> {
    let (stop, stopped) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if stopped.recv_timeout(after) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            kicker.kick();
        }
    });
    stop
}

#[test]
fn ports_memory_kicks_and_state() {
    #[rustfmt::skip]
    let code = [
        0xba, 0xf8, 0x03,             // mov dx, 0x3f8
        0xb0, 0x4b,                   // mov al, 'K'
        0xee,                         // out dx, al
        0xb8, 0x34, 0x12,             // mov ax, 0x1234
        0xef,                         // out dx, ax
        0x31, 0xdb,                   // xor bx, bx
        0xec,                         // in al, dx
        0x88, 0xc3,                   // mov bl, al
        0xb9, 0x03, 0x00,             // mov cx, 3
        0xbe, 0x00, 0x10,             // mov si, CODE
        0xfc,                         // cld
        0xf3, 0x6e,                   // rep outsb
        0xb8, 0x00, 0x20,             // mov ax, 0x2000
        0x8e, 0xc0,                   // mov es, ax
        0x26, 0xc7, 0x06, 0x10, 0x00, 0xef, 0xbe, // mov word es:[0x10], 0xbeef
        0x26, 0x8b, 0x2e, 0x20, 0x00, // mov bp, es:[0x20]
        0xeb, 0xfe,                   // jmp $
    ];
    let Some(mut g) = guest(&code) else { return };
    let world = World::default();
    world.kicker.set(g.vcpu.kicker()).unwrap();
    let stop = watchdog(g.vcpu.kicker(), Duration::from_secs(60));
    assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);

    let log = world.log.lock().unwrap().clone();
    let expected = [
        ('o', 0x3f8, vec![0x4b]),
        ('o', 0x3f8, vec![0x34, 0x12]),
        ('i', 0x3f8, vec![0x5a]),
        ('o', 0x3f8, vec![0xba]),
        ('o', 0x3f8, vec![0xf8]),
        ('o', 0x3f8, vec![0x03]),
        ('w', MMIO + 0x10, vec![0xef, 0xbe]),
        ('r', MMIO + 0x20, vec![0xc3, 0xc3]),
    ];
    assert_eq!(log, expected);
    // The kick came while the read was being served: the instruction is nevertheless finished.
    let state = g.vcpu.save().unwrap();
    assert_eq!(state.gpr[gpr::RBP] & 0xffff, 0xc3c3);
    assert_eq!(state.gpr[gpr::RBX] & 0xffff, 0x5a);
    assert_eq!(state.rip, CODE + code.len() as u64 - 2);
    assert_eq!(state.mp_state, MpState::Runnable);
    assert_eq!(state.lapic.as_ref().map(Vec::len), Some(1024));
    assert!(state.xsave.len() >= 576 && !state.msrs.is_empty());

    // A request made while the vCPU is not running is not lost.
    g.vcpu.kicker().kick();
    assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);
    // Nor one that comes while it spins.
    let kicker = g.vcpu.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);
    thread.join().unwrap();
    assert_eq!(world.log.lock().unwrap().len(), expected.len());
    drop(stop);

    let stats: std::collections::HashMap<_, _> = g.vm.stats().into_iter().collect();
    assert_eq!((stats["kvm.exits.mmio-read"], stats["kvm.exits.mmio-write"]), (1, 1));
    assert!(stats["kvm.exits.port-out"] >= 3 && stats["kvm.exits.port-in"] == 1);

    // The state goes through its serialised form into another VM and comes out the same.
    let chips = g.vm.save().unwrap();
    let text = serde_json::to_vec(&state).unwrap();
    let Some(mut other) = guest(&code) else { return };
    other.vm.load(&chips).unwrap();
    other.vcpu.load(&serde_json::from_slice(&text).unwrap()).unwrap();
    let (mut before, mut after) = (state, other.vcpu.save().unwrap());
    for s in [&mut before, &mut after] {
        s.msrs.retain(|&(msr, _)| msr != 0x10); // the time stamp counter runs on
    }
    assert_eq!(before, after);
    let kicker = g.vcpu.kicker();
    drop(g);
    kicker.kick(); // the vCPU is gone: harmless
}

#[test]
fn a_loaded_state_continues_where_it_was_saved() {
    #[rustfmt::skip]
    let code = [
        0x40,                   // again: inc ax
        0xe6, 0x80,             // out 0x80, al
        0xeb, 0xfb,             // jmp again
    ];
    let Some(mut g) = guest(&code) else { return };
    struct Count(Kicker, Mutex<Vec<u8>>);
    impl CpuIo for Count {
        fn port_in(&self, _: u16, _: &mut [u8]) {}
        fn port_out(&self, _: u16, data: &[u8]) {
            let mut seen = self.1.lock().unwrap();
            seen.push(data[0]);
            if seen.len().is_multiple_of(5) {
                self.0.kick();
            }
        }
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }
    let first = Count(g.vcpu.kicker(), Mutex::default());
    let mut registers = g.vcpu.save_registers().unwrap();
    registers.gpr[gpr::RAX] = 0;
    g.vcpu.load_registers(&registers).unwrap();
    assert_eq!(g.vcpu.run(&first).unwrap(), Exit::Kicked);
    let state = g.vcpu.save().unwrap();
    let Some(mut other) = guest(&code) else { return };
    other.vcpu.load(&state).unwrap();
    let second = Count(other.vcpu.kicker(), Mutex::default());
    assert_eq!(other.vcpu.run(&second).unwrap(), Exit::Kicked);
    assert_eq!(*first.1.lock().unwrap(), [1, 2, 3, 4, 5]);
    assert_eq!(*second.1.lock().unwrap(), [6, 7, 8, 9, 10]);
}

#[test]
fn doorbells_and_dirty_log() {
    #[rustfmt::skip]
    let code = [
        0xa2, 0x00, 0x50,       // mov [0x5000], al
        0xe6, 0x90,             // out 0x90, al       (doorbell)
        0xb0, 0x07,             // mov al, 7
        0xe6, 0x91,             // out 0x91, al       (doorbell for 7)
        0xb0, 0x08,             // mov al, 8
        0xe6, 0x91,             // out 0x91, al       (not for it)
        0xb8, 0x00, 0x20,       // mov ax, 0x2000
        0x8e, 0xc0,             // mov es, ax
        0x26, 0xa0, 0x00, 0x00, // mov al, es:[0]
        0xeb, 0xfe,             // jmp $
    ];
    let Some(mut g) = guest(&code) else { return };
    let bells = g.vm.doorbells().unwrap();
    let (any, seven) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    bells.attach(IoAddress::Port(0x90), 0, None, &any).unwrap();
    bells.attach(IoAddress::Port(0x91), 1, Some(7), &seven).unwrap();
    assert!(bells.attach(IoAddress::Port(0x91), 1, Some(7), &seven).is_err(), "taken");
    assert!(matches!(g.vm.take_dirty(g.slot, &mut |_| {}), Err(Error::Unsupported(_))));
    g.vm.set_dirty_log(g.slot, true).unwrap();

    let world = World::default();
    world.kicker.set(g.vcpu.kicker()).unwrap();
    let stop = watchdog(g.vcpu.kicker(), Duration::from_secs(60));
    assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);
    drop(stop);
    assert!(any.clear() && seven.clear());
    let log = world.log.lock().unwrap().clone();
    assert_eq!(log, [('o', 0x91, vec![8]), ('r', MMIO, vec![0xc3])]);

    let mut dirty = vec![];
    g.vm.take_dirty(g.slot, &mut |page| dirty.push(page)).unwrap();
    assert!(dirty.contains(&5) && dirty.iter().all(|&page| page < RAM / PAGE_SIZE), "{dirty:?}");
    g.vm.take_dirty(g.slot, &mut |page| panic!("page {page} reported twice")).unwrap();
    g.vm.set_dirty_log(g.slot, false).unwrap();

    bells.detach(IoAddress::Port(0x90), 0, None, &any).unwrap();
    assert!(bells.detach(IoAddress::Port(0x90), 0, None, &any).is_err(), "gone");
    let mut byte = [1];
    g.memory.read(0x5000, &mut byte).unwrap();
    assert_eq!(byte, [0]);
}

/// Bit of a vector in the request register of a saved local APIC.
fn requested(lapic: &[u8], vector: usize) -> bool {
    lapic[0x200 + vector / 32 * 0x10 + vector % 32 / 8] & (1 << (vector % 8)) != 0
}

#[test]
fn messages_reach_the_local_apic() {
    let Some(mut g) = guest(&[0xeb, 0xfe]) else { return };
    let world = World::default();
    // Software-enable the APIC: spurious vector register, bit 8.
    let mut state = g.vcpu.save().unwrap();
    state.lapic.as_mut().unwrap()[0xf0..0xf2].copy_from_slice(&[0xff, 0x01]);
    g.vcpu.load(&state).unwrap();
    let irqs = g.vm.irqs().unwrap();
    irqs.msi(0xfee0_0000, 0x41);
    irqs.msi(0xfed0_0000, 0x42); // to nowhere
    irqs.msi(0x1_fee0_0000, 0x43); // reserved bits
    irqs.set_line(3, true);
    irqs.set_line(3, false);

    let bells = g.vm.doorbells().unwrap();
    let (plain, masked) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let (a, b) = (bells.irqfd(&plain).unwrap(), bells.irqfd(&masked).unwrap());
    a.route(Some((0xfee0_0000, 0x51))).unwrap();
    b.route(Some((0xfee0_0000, 0x52))).unwrap();
    b.route(None).unwrap();
    plain.signal();
    masked.signal();
    // Nonsense from the guest masks, and leaves the other routes alone.
    a.route(Some((0x1234_0000_0000_0001, 0xffff_ffff))).unwrap();
    a.route(Some((0xfee0_0000, 0x53))).unwrap();
    plain.signal();
    drop(g.vm.doorbells().unwrap().irqfd(&plain).unwrap());

    // Injection through an eventfd may be left to a kernel worker.
    let mut seen = vec![];
    for _ in 0..500 {
        g.vcpu.kicker().kick();
        assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);
        let lapic = g.vcpu.save().unwrap().lapic.unwrap();
        seen = (0x40..0x60).filter(|&v| requested(&lapic, v)).collect();
        if seen == [0x41, 0x51, 0x53] {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(seen, [0x41, 0x51, 0x53]);
    // Unmasking delivers what was signalled meanwhile.
    b.route(Some((0xfee0_0000, 0x52))).unwrap();
    for _ in 0..500 {
        let lapic = g.vcpu.save().unwrap().lapic.unwrap();
        if requested(&lapic, 0x52) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the masked interrupt was lost");
}

#[test]
fn bad_requests_are_refused() {
    let Some(g) = guest(&[0xeb, 0xfe]) else { return };
    let region = Region::new(0, RAM, &Backing::Anonymous, false).unwrap();
    let slot = Slot { gpa: RAM - PAGE_SIZE, len: RAM, region, offset: 0, readonly: false };
    let error = g.vm.map(slot.clone()).unwrap_err().to_string();
    assert!(error.contains("overlaps"), "{error}");
    let second = g.vm.map(Slot { gpa: RAM, readonly: true, ..slot }).unwrap();
    assert_ne!(second, g.slot);
    g.vm.unmap(second).unwrap();
    assert!(g.vm.unmap(second).is_err());
    assert!(g.vm.set_dirty_log(second, true).is_err());
    let config = VcpuConfig {
        index: 1,
        apic_id: 0,
        cpuid: g.cpuid.clone(),
        signals: Arc::new(CpuSignals::new()),
        apic: None,
    };
    let error = g.vm.vcpu(config.clone()).err().unwrap().to_string();
    assert!(error.contains("two vCPUs"), "{error}");
    assert!(g.vm.vcpu(VcpuConfig { index: 0, apic_id: 4, ..config.clone() }).is_err());
    // The second processor waits for INIT.
    let mut ap = g.vm.vcpu(VcpuConfig { index: 1, apic_id: 1, ..config }).unwrap();
    assert_eq!(ap.save().unwrap().mp_state, MpState::Uninitialized);
    ap.kicker().kick();
    assert_eq!(ap.run(&World::default()).unwrap(), Exit::Kicked);
    assert!(matches!(g.vm.load(b"[]"), Err(Error::BadState(_))));
}

#[test]
fn writes_to_rom_are_accesses_and_reads_are_not() {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x00, 0x20,             // mov ax, 0x2000
        0x8e, 0xc0,                   // mov es, ax
        0x26, 0xa2, 0x08, 0x00,       // mov es:[8], al
        0x26, 0x8b, 0x1e, 0x08, 0x00, // mov bx, es:[8]
        0xb8, 0x00, 0x30,             // mov ax, 0x3000
        0x8e, 0xc0,                   // mov es, ax
        0x26, 0xa0, 0x00, 0x00,       // mov al, es:[0]
        0xeb, 0xfe,                   // jmp $
    ];
    let Some(mut g) = guest(&code) else { return };
    // Two pages of memory, the second of which the guest sees.
    let region = Region::new(0, 2 * PAGE_SIZE, &Backing::Anonymous, false).unwrap();
    GuestMemory::from_regions(vec![region.clone()]).write(PAGE_SIZE + 8, &[0x34, 0x12]).unwrap();
    g.vm.map(Slot { gpa: MMIO, len: PAGE_SIZE, region, offset: PAGE_SIZE, readonly: true }).unwrap();
    let world = World::default();
    world.kicker.set(g.vcpu.kicker()).unwrap();
    let stop = watchdog(g.vcpu.kicker(), Duration::from_secs(60));
    assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);
    drop(stop);
    assert_eq!(g.vcpu.save_registers().unwrap().gpr[gpr::RBX] & 0xffff, 0x1234);
    assert_eq!(*world.log.lock().unwrap(), [('w', MMIO + 8, vec![0]), ('r', 0x3_0000, vec![0xc3])]);
}

#[test]
fn no_kick_is_lost() {
    // Spinning in the guest, leaving it all the time, and asleep in HLT.
    for code in [&[0xeb, 0xfe][..], &[0xe6, 0x80, 0xeb, 0xfc], &[0xf4, 0xeb, 0xfd]] {
        let Some(mut g) = guest(code) else { return };
        let kicker = g.vcpu.kicker();
        let (acknowledge, acknowledged) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            for i in 0..500 {
                kicker.kick();
                if acknowledged.recv_timeout(Duration::from_secs(30)).is_err() {
                    // Lets the test end instead of hang.
                    kicker.kick();
                    panic!("kick {i} was lost");
                }
            }
        });
        let world = World::default();
        for _ in 0..500 {
            assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);
            let _ = acknowledge.send(()); // nobody listens after a failure
        }
        thread.join().unwrap();
    }
}

#[test]
fn a_halted_vcpu_stays_halted_through_save_and_load() {
    let code = [0xf4, 0xe6, 0x80, 0xeb, 0xfb]; // again: hlt; out 0x80, al; jmp again
    let Some(mut g) = guest(&code) else { return };
    let world = World::default();
    let stop = watchdog(g.vcpu.kicker(), Duration::from_millis(200));
    assert_eq!(g.vcpu.run(&world).unwrap(), Exit::Kicked);
    drop(stop);
    let state = g.vcpu.save().unwrap();
    assert_eq!((state.mp_state, state.rip), (MpState::Halted, CODE + 1));
    let Some(mut other) = guest(&code) else { return };
    other.vcpu.load(&state).unwrap();
    let stop = watchdog(other.vcpu.kicker(), Duration::from_millis(200));
    assert_eq!(other.vcpu.run(&world).unwrap(), Exit::Kicked);
    drop(stop);
    assert_eq!(other.vcpu.save().unwrap().mp_state, MpState::Halted);
    assert_eq!(*world.log.lock().unwrap(), []);
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    if !probe().usable() {
        eprintln!("skipped: {}", probe().reason);
        return;
    }
    let Some(mut g) = guest(&[0x0f, 0x0b]) else { return }; // ud2
    // 32-bit protected mode with an empty interrupt table.
    let mut state = g.vcpu.save_registers().unwrap();
    state.cr0 |= 1;
    for segment in &mut state.segments {
        *segment = Segment { selector: 0x10, base: 0, limit: 0xffff_ffff, attributes: 0xc093 };
    }
    state.segments[seg::CS] = Segment { selector: 8, base: 0, limit: 0xffff_ffff, attributes: 0xc09b };
    state.idtr.limit = 0;
    g.vcpu.load_registers(&state).unwrap();
    let stop = watchdog(g.vcpu.kicker(), Duration::from_secs(60));
    assert_eq!(g.vcpu.run(&World::default()).unwrap(), Exit::Shutdown);
    drop(stop);
}

#[test]
fn what_cannot_be_emulated_is_reported_with_registers() {
    // An instruction fetch from where nothing is: no host executes it, so KVM gives up.
    let Some(mut g) = guest(&[0xea, 0x00, 0x00, 0x00, 0x30]) else { return }; // jmp 0x3000:0
    let stop = watchdog(g.vcpu.kicker(), Duration::from_secs(60));
    match g.vcpu.run(&World::default()).unwrap() {
        Exit::InternalError(text) => {
            eprintln!("{text}");
            assert!(text.contains("vCPU 0: KVM internal error") && text.contains("CS =3000"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    drop(stop);
}

#[test]
fn probing_agrees_with_opening() {
    let p = probe();
    eprintln!("{}", p.reason);
    assert_eq!(p.exists && p.permitted, KvmAccel::open().is_ok());
    assert!(!p.usable() || p.extension.is_some());
}
