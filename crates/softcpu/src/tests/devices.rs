//! Accesses that go to devices.

use super::*;

#[test]
fn registers_are_read_and_written_with_the_guests_sizes() {
    each(|mut g| {
        let mut s = g.long();
        s.gpr[gpr::RBX] = DEVICE;
        s.gpr[gpr::RAX] = 0x8877_6655_4433_2211;
        g.code(64, at::CODE, |a| {
            a.mov(byte_ptr(rbx + 1), al)?;
            a.mov(word_ptr(rbx + 2), ax)?;
            a.mov(dword_ptr(rbx + 4), eax)?;
            a.mov(qword_ptr(rbx + 8), rax)?;
            a.mov(ecx, dword_ptr(rbx + 0x10))?;
            a.movzx(edx, byte_ptr(rbx + 0x20))?;
            a.or(dword_ptr(rbx + 0x30), 1)?;
            done(a)
        });
        let t = g.run(&s);
        let w = g.core().world.written.lock().unwrap().clone();
        assert_eq!(w[0], (DEVICE + 1, vec![0x11]));
        assert_eq!(w[1], (DEVICE + 2, vec![0x11, 0x22]));
        assert_eq!(w[2], (DEVICE + 4, vec![0x11, 0x22, 0x33, 0x44]));
        assert_eq!(w[3], (DEVICE + 8, vec![0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]));
        assert_eq!(w[4], (DEVICE + 0x30, vec![0x31, 0x31, 0x32, 0x33]));
        assert_eq!((t.gpr[gpr::RCX], t.gpr[gpr::RDX]), (0x1312_1110, 0x20));
        assert_eq!(
            *g.core().world.read.lock().unwrap(),
            [(DEVICE + 0x10, 4), (DEVICE + 0x20, 1), (DEVICE + 0x30, 4)]
        );
    });
}

#[test]
fn strings_and_locked_operations_on_registers() {
    each(|mut g| {
        let mut s = g.long();
        s.gpr[gpr::RSI] = at::DATA;
        s.gpr[gpr::RDI] = DEVICE;
        s.gpr[gpr::RCX] = 3;
        s.gpr[gpr::RBX] = DEVICE + 0x40;
        s.gpr[gpr::RAX] = 5;
        g.memory.write(at::DATA, &[1, 2, 3, 4, 5, 6]).unwrap();
        g.code(64, at::CODE, |a| {
            a.rep().movsw()?;
            a.xchg(byte_ptr(rbx), al)?;
            done(a)
        });
        let t = g.run(&s);
        let w = g.core().world.written.lock().unwrap().clone();
        assert_eq!(w[..3], [(DEVICE, vec![1, 2]), (DEVICE + 2, vec![3, 4]), (DEVICE + 4, vec![5, 6])]);
        assert_eq!((w[3].clone(), t.gpr[gpr::RAX]), ((DEVICE + 0x40, vec![5]), 0x40));
    });
}

#[test]
fn the_local_apic_page_is_the_processors_own() {
    each(|mut g| {
        let mut s = g.long();
        g.put64(at::PDPT + 24, 0xc000_0083);
        s.gpr[gpr::RBX] = 0xfee0_0030;
        g.code(64, at::CODE, |a| {
            a.mov(eax, dword_ptr(rbx))?;
            a.mov(ecx, dword_ptr(rbx + 0x1000))?;
            a.mov(rdx, cr8)?;
            a.mov(esi, 9)?;
            a.mov(cr8, rsi)?;
            a.mov(rdi, cr8)?;
            done(a)
        });
        let t = g.run(&s);
        assert_eq!(t.gpr[gpr::RAX] & 0xff, 0x30);
        assert_eq!(*g.core().world.read.lock().unwrap(), [(0xfee0_1030, 4)]);
        assert_eq!((t.gpr[gpr::RDX], t.gpr[gpr::RDI], t.cr8), (0, 9, 9));
    });
}

#[test]
fn ports_and_their_strings() {
    each(|mut g| {
        let mut s = g.long();
        s.gpr[gpr::RSI] = at::DATA;
        s.gpr[gpr::RDI] = at::DATA + 0x100;
        g.memory.write(at::DATA, &[1, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        g.code(64, at::CODE, |a| {
            a.in_(al, 0x33)?;
            a.mov(ebx, eax)?;
            a.mov(edx, 0x1f0)?;
            a.mov(ecx, 2)?;
            a.rep().outsd()?;
            a.mov(ecx, 3)?;
            a.rep().insw()?;
            done(a)
        });
        let t = g.run(&s);
        assert_eq!(t.gpr[gpr::RBX] & 0xff, 0x33);
        assert_eq!(g.core().port(0x1f0), [1, 2]);
        assert_eq!(g.get64(at::DATA + 0x100), 0xf0f0_f0f0_f0f0);
        assert_eq!((t.gpr[gpr::RCX], t.gpr[gpr::RDI]), (0, at::DATA + 0x106));
    });
}
