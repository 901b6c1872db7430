//! Code that changes: by itself, through aliases, by devices.

use super::*;
use std::sync::Mutex as StdMutex;

#[test]
fn a_store_into_the_next_instruction() {
    each(|mut g| {
        let s = g.long();
        // mov byte [rip+5], 0x42 writes the immediate of the MOV behind it (mov eax, 1).
        g.memory
            .write(at::CODE, &[0xc6, 0x05, 1, 0, 0, 0, 0x42, 0xb8, 1, 0, 0, 0, 0xe6, 0x80, 0xf4])
            .unwrap();
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RAX], 0x42);
    });
}

#[test]
fn a_loop_that_rewrites_itself() {
    each(|mut g| {
        let s = g.long();
        let patched = at::CODE + 0x400;
        g.code(64, patched, |a| {
            a.mov(eax, 0)?;
            a.ret()
        });
        g.code(64, at::CODE, |a| {
            let mut top = a.create_label();
            a.xor(ebx, ebx)?;
            a.xor(ecx, ecx)?;
            a.set_label(&mut top)?;
            a.mov(dword_ptr(patched + 1), ecx)?;
            a.call(patched)?;
            a.add(rbx, rax)?;
            a.inc(ecx)?;
            a.cmp(ecx, 500)?;
            a.jne(top)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RBX], 499 * 500 / 2);
    });
}

#[test]
fn stores_through_another_mapping_count() {
    each(|mut g| {
        let s = g.long();
        let patched = at::CODE + 0x1000;
        g.code(64, patched, |a| {
            a.mov(eax, 7)?;
            a.ret()
        });
        let alias = 0xffff_8000_0000_0000u64 + patched;
        g.code(64, at::CODE, |a| {
            a.call(patched)?;
            a.mov(ebx, eax)?;
            a.mov(rdi, alias)?;
            a.mov(dword_ptr(rdi + 1), 8)?;
            a.call(patched)?;
            a.mov(ecx, eax)?;
            // Also the alias runs the new code.
            a.call(rdi)?;
            a.mov(edx, eax)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RBX], s.gpr[gpr::RCX], s.gpr[gpr::RDX]), (7, 8, 8));
    });
}

#[test]
fn string_stores_and_locked_stores_count() {
    each(|mut g| {
        let s = g.long();
        let patched = at::CODE + 0x1000;
        g.code(64, patched, |a| {
            a.mov(eax, 7)?;
            a.ret()
        });
        g.code(64, at::CODE, |a| {
            a.call(patched)?;
            a.mov(rdi, patched + 1)?;
            a.mov(eax, 9)?;
            a.mov(ecx, 1)?;
            a.rep().stosd()?;
            a.call(patched)?;
            a.mov(ebx, eax)?;
            a.mov(rdi, patched + 1)?;
            a.lock().inc(dword_ptr(rdi))?;
            a.call(patched)?;
            a.mov(edx, eax)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RBX], s.gpr[gpr::RDX]), (9, 10));
    });
}

#[test]
fn writes_by_devices_count() {
    each(|mut g| {
        let s = g.long();
        let patched = at::CODE + 0x1000;
        g.code(64, patched, |a| {
            a.mov(eax, 7)?;
            a.ret()
        });
        g.code(64, at::CODE, |a| {
            a.call(patched)?;
            done(a)
        });
        let first = g.run(&s);
        g.memory.write(patched + 1, &[5]).unwrap();
        let second = g.run(&s);
        assert_eq!((first.gpr[gpr::RAX], second.gpr[gpr::RAX]), (7, 5));
    });
}

#[test]
fn an_instruction_over_two_pages_follows_its_second_page() {
    each(|mut g| {
        let s = g.long();
        let lin = 0x10_0ffe; // b8 | imm32 begins one byte before the second page ends... two bytes in the first
        let (first, second, other) = (0x12_0000, 0x13_0000, 0x14_0000);
        let pte = |l: u64| at::PT + (l >> 12) * 8;
        g.put64(pte(0x10_0000), first | 7);
        g.put64(pte(0x10_1000), second | 7);
        g.memory.write(first + 0xffe, &[0xb8, 1]).unwrap();
        g.memory.write(second, &[0, 0, 0, 0xc3]).unwrap();
        g.memory.write(other, &[0, 1, 0, 0xc3]).unwrap();
        g.code(64, at::CODE, |a| {
            a.call(lin)?;
            a.mov(ebx, eax)?;
            a.mov(dword_ptr(second), 0xc300_0001u32 as i32)?;
            a.call(lin)?;
            a.mov(ecx, eax)?;
            a.mov(dword_ptr(pte(0x10_1000)), other as u32 | 7)?;
            a.invlpg(ptr(0x10_1000))?;
            a.call(lin)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RBX], 1);
        assert_eq!(s.gpr[gpr::RCX], 0x101);
        assert_eq!(s.gpr[gpr::RAX], 0x1_0001);
    });
}

#[test]
fn remapped_code_is_fetched_anew() {
    each(|mut g| {
        let s = g.long();
        let (lin, first, second) = (0x10_0000u64, 0x12_0000u64, 0x13_0000u64);
        let pte = at::PT + (lin >> 12) * 8;
        g.put64(pte, first | 7);
        for (at, v) in [(first, 1u32), (second, 2)] {
            g.code(64, at, |a| {
                a.mov(eax, v)?;
                a.ret()
            });
        }
        g.code(64, at::CODE, |a| {
            let mut warm = a.create_label();
            a.mov(ecx, 100)?;
            a.set_label(&mut warm)?;
            a.call(lin)?;
            a.dec(ecx)?;
            a.jnz(warm)?;
            a.mov(ebx, eax)?;
            a.mov(dword_ptr(pte), second as u32 | 7)?;
            a.invlpg(ptr(lin))?;
            a.call(lin)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RBX], s.gpr[gpr::RAX]), (1, 2));
    });
}

#[test]
fn rom_runs_and_device_registers_do_not() {
    each(|mut g| {
        let s = g.long();
        g.code(64, ROM, |a| {
            a.mov(eax, 0x77)?;
            a.mov(dword_ptr(ROM + 4), eax)?; // a write to ROM goes to the devices
            a.ret()
        });
        g.code(64, at::CODE, |a| {
            a.mov(rbx, ROM)?;
            a.call(rbx)?;
            a.mov(ecx, eax)?;
            a.mov(rbx, DEVICE)?;
            a.out(0x10i32, al)?;
            a.jmp(rbx)
        });
        let core = &mut g.cores[0];
        core.vcpu.load(&s).unwrap();
        match core.vcpu.run(&core.world).unwrap() {
            Exit::InternalError(text) => assert!(text.contains("fetch") && text.contains("rip="), "{text}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(core.port(0x10), [0x77]);
        assert_eq!(*core.world.written.lock().unwrap(), [(ROM + 4, vec![0x77, 0, 0, 0])]);
    });
}

#[test]
fn memory_taken_away_is_not_run() {
    // A device takes the ROM away while code in it runs.
    struct Unplug {
        inner: World,
        vm: Arc<dyn Vm>,
        slot: StdMutex<Option<accel::SlotId>>,
    }
    impl CpuIo for Unplug {
        fn port_in(&self, _: u16, _: &mut [u8]) {}
        fn port_out(&self, port: u16, data: &[u8]) {
            if let Some(s) = self.slot.lock().unwrap().take() {
                self.vm.unmap(s).unwrap();
            }
            self.inner.port_out(port, data);
        }
        fn mmio_read(&self, _: u64, data: &mut [u8]) {
            data.fill(0xff);
        }
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }
    each(|mut g| {
        let s = g.long();
        g.code(64, ROM, |a| {
            a.out(0x10i32, al)?;
            a.nop()?;
            done(a)
        });
        g.code(64, at::CODE, |a| {
            a.mov(rbx, ROM)?;
            a.jmp(rbx)
        });
        // Slots are numbered in the order of their creation.
        let core = &mut g.cores[0];
        let world =
            Unplug { inner: World::default(), vm: g.vm.clone(), slot: StdMutex::new(Some(accel::SlotId(1))) };
        core.vcpu.load(&s).unwrap();
        assert!(matches!(core.vcpu.run(&world).unwrap(), Exit::InternalError(_)));
        assert_eq!(core.vcpu.save().unwrap().rip, ROM + 2, "the instruction that did it was the last");
    });
}
