//! 32-bit protected mode: privilege, gates, segments, tasks, ports.

use super::*;

/// Error code and return address of a 32-bit exception frame (the handler has pushed EAX).
fn frame32(g: &Guest, s: &CpuState, n: u64) -> u32 {
    g.get32(s.gpr[gpr::RSP] + 4 + n * 4)
}

#[test]
fn call_gates_change_stacks_and_copy_arguments() {
    each(|mut g| {
        let s = g.protected_user();
        let target = at::CODE + 0x800;
        // 32-bit call gate, DPL 3, two arguments.
        g.descriptor(
            sel::FREE,
            (target & 0xffff) | u64::from(sel::CODE32) << 16 | 2 << 32 | 0xec << 40 | (target >> 16) << 48,
        );
        g.code(32, target, |a| {
            a.mov(eax, dword_ptr(esp + 8))?;
            a.mov(edx, dword_ptr(esp + 12))?;
            a.mov(ebx, ss)?;
            a.mov(ecx, esp)?;
            a.retf_1(8)
        });
        // push 11; push 22; call gate; then try a privileged port.
        let mut code = vec![0x6a, 11, 0x6a, 22, 0x9a, 0, 0, 0, 0];
        code.extend(u16::to_le_bytes(sel::FREE | 3));
        code.extend([0x89, 0xe6, 0xfa]); // mov esi, esp; cli
        g.memory.write(at::CODE, &code).unwrap();
        let (v, s) = g.fault(&s);
        assert_eq!(v, 13, "CLI needs IOPL");
        assert_eq!((s.gpr[gpr::RDX], s.gpr[gpr::RBX]), (11, u64::from(sel::DATA)));
        assert_eq!(s.gpr[gpr::RCX], at::STACK0 - 24);
        assert_eq!(s.gpr[gpr::RSI], at::STACK);
        assert_eq!(frame32(&g, &s, 2) & 3, 3, "back in user code");
    });
}

#[test]
fn segment_limits_and_types() {
    each(|mut g| {
        let s = g.protected();
        // Expand-down data segment: offsets above 0xfff only.
        g.descriptor(sel::FREE, 0x0040_9700_0000_0fff);
        g.code(32, at::CODE, |a| {
            a.mov(eax, u32::from(sel::FREE))?;
            a.mov(ds, eax)?;
            a.mov(ebx, dword_ptr(0x1000))?;
            a.mov(ecx, 1)?;
            a.mov(ebx, dword_ptr(0xffe))?;
            a.mov(ecx, 2)?;
            done(a)
        });
        let (v, s) = g.fault(&s);
        assert_eq!((v, s.gpr[gpr::RCX]), (13, 1));
    });
    each(|mut g| {
        let s = g.protected();
        // Writing through a code segment.
        g.code(32, at::CODE, |a| {
            a.mov(eax, dword_ptr(at::DATA).cs())?;
            a.mov(dword_ptr(at::DATA).cs(), eax)?;
            done(a)
        });
        let (v, _) = g.fault(&s);
        assert_eq!(v, 13);
    });
}

#[test]
fn segments_not_present_name_their_selector() {
    for (raw, into_ss, vector) in [
        (0x00cf_1300_0000_ffffu64, false, 11),
        (0x00cf_1300_0000_ffff, true, 12),
        (0x00cf_9b00_0000_ffff, true, 13),
    ] {
        each(|mut g| {
            let s = g.protected();
            g.descriptor(sel::FREE, raw);
            g.code(32, at::CODE, |a| {
                a.mov(eax, u32::from(sel::FREE))?;
                if into_ss { a.mov(ss, eax) } else { a.mov(es, eax) }?;
                done(a)
            });
            let (v, s) = g.fault(&s);
            assert_eq!(v, vector);
            assert_eq!(frame32(&g, &s, 0), u32::from(sel::FREE));
            assert_eq!(s.segments[seg::SS].selector, sel::DATA);
        });
    }
}

#[test]
fn interrupts_from_user_mode_and_back() {
    each(|mut g| {
        let s = g.protected_user();
        let handler = at::CODE + 0x800;
        g.gate32(0x40, sel::CODE32, handler, 0xee);
        g.gate32(0x41, sel::CODE32, handler, 0x8e);
        g.code(32, handler, |a| {
            a.mov(ebx, esp)?;
            a.mov(ecx, cs)?;
            a.iretd()
        });
        g.code(32, at::CODE, |a| {
            a.int(0x40)?;
            a.mov(edx, cs)?;
            a.mov(esi, esp)?;
            a.int(0x41)
        });
        let (v, s) = g.fault(&s);
        assert_eq!(v, 13, "the gate's DPL keeps INT from user code out");
        assert_eq!(frame32(&g, &s, 0), 0x41 * 8 + 2);
        assert_eq!((s.gpr[gpr::RBX], s.gpr[gpr::RSI]), (at::STACK0 - 20, at::STACK));
        assert_eq!((s.gpr[gpr::RCX], s.gpr[gpr::RDX]), (u64::from(sel::CODE32), u64::from(sel::USER_CODE32)));
    });
}

#[test]
fn the_port_bitmap_opens_single_ports() {
    each(|mut g| {
        let mut s = g.protected_user();
        s.tr.limit = 0x100;
        // All closed but 0x60.
        g.memory.fill(at::TSS + 0x68, 0x98, 0xff).unwrap();
        g.memory.write(at::TSS + 0x68 + 0x60 / 8, &[0xfe]).unwrap();
        g.code(32, at::CODE, |a| {
            a.mov(al, 7)?;
            a.out(0x60i32, al)?;
            a.out(0x60i32, ax)
        });
        let (v, s) = g.fault(&s);
        assert_eq!(v, 13, "the second byte's port is closed");
        assert_eq!(frame32(&g, &s, 1), at::CODE as u32 + 4);
        assert_eq!(g.core().port(0x60), [7]);
    });
}

#[test]
fn descriptors_can_be_inspected() {
    each(|mut g| {
        let s = g.protected();
        g.descriptor(sel::FREE, 0x0040_9200_0000_1234);
        g.code(32, at::CODE, |a| {
            a.mov(ebx, u32::from(sel::FREE))?;
            a.lsl(eax, ebx)?;
            a.setz(cl)?;
            a.lar(edx, ebx)?;
            a.verw(bx)?;
            a.setz(ch)?;
            a.mov(ebx, 0x1000)?;
            a.mov(esi, 77)?;
            a.lsl(esi, ebx)?;
            a.setz(bl)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RAX], 0x1234);
        assert_eq!(s.gpr[gpr::RDX], 0x0040_9200);
        assert_eq!(s.gpr[gpr::RCX], 0x101);
        assert_eq!((s.gpr[gpr::RSI], s.gpr[gpr::RBX] & 0xff), (77, 0));
    });
}

#[test]
fn tasks_switch_by_far_call_and_return() {
    each(|mut g| {
        let s = g.protected();
        let other = at::TSS + 0x200;
        g.descriptor(sel::TSS, 0x0000_8b00_0000_0067 | at::TSS << 16); // busy: it runs
        g.descriptor(sel::FREE, 0x0000_8900_0000_0067 | other << 16);
        let task = at::CODE + 0x800;
        let put = |at: u64, v: u32| g.memory.write_obj(other + at, &v).unwrap();
        put(0x20, task as u32);
        put(0x24, 2);
        put(0x38, at::STACK0 as u32); // ESP
        put(0x34, 0xbeef); // EBX
        for n in 0..6 {
            put(0x48 + n * 4, u32::from(if n == 1 { sel::CODE32 } else { sel::DATA }));
        }
        g.code(32, task, |a| {
            a.mov(dword_ptr(at::DATA), ebx)?;
            a.pushfd()?;
            a.pop(dword_ptr(at::DATA + 4))?;
            a.iretd()
        });
        let mut code = vec![0xbb, 1, 0, 0, 0, 0x9a, 0, 0, 0, 0]; // mov ebx, 1; call FREE:0
        code.extend(u16::to_le_bytes(sel::FREE));
        code.extend([0xe6, 0x80, 0xf4]);
        g.memory.write(at::CODE, &code).unwrap();
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RBX], 1);
        assert_eq!(g.get32(at::DATA), 0xbeef);
        assert_eq!(g.get32(at::DATA + 4) & 1 << 14, 1 << 14, "nested");
        assert_eq!(s.tr.selector, sel::TSS);
        assert_eq!(g.get64(at::GDT + u64::from(sel::FREE)) >> 40 & 0xf, 9, "available again");
        assert_eq!(s.cr0 & 8, 8, "TS");
    });
}

#[test]
fn segment_bases_and_the_stack_width_count() {
    each(|mut g| {
        let mut s = g.protected();
        s.segments[seg::FS].base = at::DATA;
        // A 16-bit stack segment at STACK0.
        let base = at::STACK0 - 0x1000;
        s.segments[seg::SS] = Segment { selector: sel::DATA, base, limit: 0xffff, attributes: 0x93 };
        s.gpr[gpr::RSP] = 0x1234_0000;
        g.code(32, at::CODE, |a| {
            a.mov(dword_ptr(4).fs(), 0x55)?;
            a.push(0x77)?;
            a.mov(ebx, esp)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!(g.get32(at::DATA + 4), 0x55);
        assert_eq!(s.gpr[gpr::RBX], 0x1234_fffc);
        assert_eq!(g.get32(base + 0xfffc), 0x77);
    });
}
