//! Exceptions, interrupts, and what happens when they cannot be delivered.

use super::*;

#[test]
fn faults_in_delivery_become_double_faults_and_then_the_end() {
    each(|mut g| {
        let s = g.long();
        // #UD's gate is not present: #NP, which is benign after #UD; its handler runs.
        let at_ud = at::IDT + 6 * 16;
        g.put64(at_ud, g.get64(at_ud) & !(1 << 47));
        g.code(64, at::CODE, |a| a.ud2());
        let (v, t) = g.fault(&s);
        assert_eq!((v, g.frame(&t, 0)), (11, 6 * 8 + 3));
        // #GP's gate is not present: contributory after contributory.
        let at_gp = at::IDT + 13 * 16;
        g.put64(at_gp, g.get64(at_gp) & !(1 << 47));
        g.code(64, at::CODE, |a| {
            a.mov(rax, 1u64 << 63)?;
            a.mov(rbx, qword_ptr(rax))
        });
        let (v, t) = g.fault(&s);
        assert_eq!((v, g.frame(&t, 0)), (8, 0));
        // No double-fault handler either.
        let at_df = at::IDT + 8 * 16;
        g.put64(at_df, g.get64(at_df) & !(1 << 47));
        let core = g.core();
        core.vcpu.load(&s).unwrap();
        assert_eq!(core.vcpu.run(&core.world).unwrap(), Exit::Shutdown);
    });
}

#[test]
fn a_fault_on_the_stack_is_a_double_fault_on_its_own_stack() {
    each(|mut g| {
        let mut s = g.long();
        g.gate64(8, at::HANDLERS + 8 * 16, 1);
        g.put64(at::PT + (0x10_0000 >> 12) * 8, 0);
        s.gpr[gpr::RSP] = 0x10_1000;
        g.code(64, at::CODE, |a| a.push(rax));
        let (v, t) = g.fault(&s);
        assert_eq!((v, t.gpr[gpr::RSP] & !0xfff), (8, at::STACK_IST - 0x1000));
        assert_eq!(g.frame(&t, 4), 0x10_1000, "RSP is as before the instruction");
    });
}

#[test]
fn interrupts_wait_for_the_flag_and_one_instruction_more() {
    each(|mut g| {
        let s = g.long();
        g.gate64(0x60, at::CODE + 0x800, 0);
        g.code(64, at::CODE + 0x800, |a| {
            a.mov(rdx, qword_ptr(rsp))?;
            a.mov(ecx, ebx)?;
            a.iretq()
        });
        g.code(64, at::CODE, |a| {
            a.mov(ebx, 1)?;
            a.nop()?;
            a.sti()?;
            a.mov(ebx, 2)?;
            a.mov(ebx, 3)?;
            done(a)
        });
        let core = g.core();
        core.apic.raise(0x60);
        core.vcpu.load(&s).unwrap();
        let s = core.run();
        assert_eq!(s.gpr[gpr::RCX], 2, "taken after the instruction that follows STI");
        assert_eq!(s.gpr[gpr::RDX], at::CODE + 5 + 1 + 1 + 5);
        assert_eq!(s.gpr[gpr::RBX], 3);
    });
}

#[test]
fn halted_until_an_interrupt() {
    each(|mut g| {
        let s = g.long();
        g.gate64(0x60, at::CODE + 0x800, 0);
        g.code(64, at::CODE + 0x800, |a| {
            a.mov(ecx, 5)?;
            a.iretq()
        });
        g.code(64, at::CODE, |a| {
            a.sti()?;
            a.hlt()?;
            a.mov(ebx, ecx)?;
            done(a)
        });
        let apic = g.core().apic.clone();
        let waker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(5));
            apic.raise(0x60);
        });
        let s = g.run(&s);
        waker.join().unwrap();
        assert_eq!(s.gpr[gpr::RBX], 5);
    });
}

#[test]
fn a_kick_ends_waiting_and_endless_loops() {
    for halting in [false, true] {
        each(|mut g| {
            let s = g.long();
            g.code(64, at::CODE, |a| {
                if halting {
                    a.hlt()
                } else {
                    let mut top = a.create_label();
                    a.set_label(&mut top)?;
                    a.jmp(top)
                }
            });
            let core = g.core();
            core.vcpu.load(&s).unwrap();
            let kicker = core.vcpu.kicker();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(2));
                kicker.kick();
            });
            assert_eq!(core.vcpu.run(&core.world).unwrap(), Exit::Kicked);
            thread.join().unwrap();
            let s = core.vcpu.save().unwrap();
            assert_eq!(s.mp_state, if halting { MpState::Halted } else { MpState::Runnable });
        });
    }
}

#[test]
fn nmis_are_masked_until_iret() {
    each(|mut g| {
        let s = g.long();
        g.gate64(2, at::CODE + 0x800, 0);
        g.code(64, at::CODE + 0x800, |a| {
            a.inc(ebx)?;
            a.out(0x20i32, al)?;
            a.mov(edx, ebx)?;
            a.iretq()
        });
        g.code(64, at::CODE, |a| {
            a.nop()?;
            done(a)
        });
        let core = g.core();
        core.vcpu.load(&s).unwrap();
        core.signals.raise(Signal::NMI);
        let t = core.run();
        assert_eq!(t.gpr[gpr::RBX], 1);
        // Two arrive while the first is handled: one is kept.
        let mut s = s;
        s.events.nmi_masked = true;
        g.code(64, at::CODE, |a| {
            a.nop()?;
            a.push(at::STACK as i32)?; // a frame by hand: SS, RSP, RFLAGS, CS, RIP
            a.mov(rax, rsp)?;
            a.push(i32::from(sel::DATA))?;
            a.push(rax)?;
            a.pushfq()?;
            a.push(i32::from(sel::CODE64))?;
            a.mov(ecx, at::CODE as u32 + 0x400)?;
            a.push(rcx)?;
            a.mov(esi, ebx)?;
            a.iretq()
        });
        g.code(64, at::CODE + 0x400, |a| {
            a.nop()?;
            done(a)
        });
        let core = g.core();
        core.vcpu.load(&s).unwrap();
        core.signals.raise(Signal::NMI);
        let t = core.run();
        assert_eq!((t.gpr[gpr::RSI], t.gpr[gpr::RBX]), (0, 1));
    });
}

#[test]
fn start_up_by_init_and_sipi() {
    let mut g = Guest::new(executors()[0].clone(), 2);
    g.memory.write_obj(0u64, &0u64).unwrap();
    g.code(16, 0x9_a000, |a| {
        a.mov(ax, cs)?;
        done(a)
    });
    let core = &mut g.cores[1];
    let s = core.vcpu.save().unwrap();
    assert_eq!((s.mp_state, s.rip, s.segments[seg::CS].base), (MpState::Uninitialized, 0xfff0, 0xffff_0000));
    core.signals.raise(Signal::INIT);
    core.signals.raise_sipi(0x9a);
    let s = core.run();
    assert_eq!(s.gpr[gpr::RAX], 0x9a00);
    assert_eq!((s.segments[seg::CS].base, s.cr0 & 1), (0x9_a000, 0));
}

#[test]
fn undefined_and_overlong_instructions() {
    for (code, vector) in [
        (&[0x0f, 0x0b][..], 6),                     // UD2
        (&[0xf0, 0x90], 6),                         // LOCK NOP
        (&[0xf0, 0x01, 0xc0], 6),                   // LOCK with a register
        (&[0x0f, 0xff, 0xc0], 6),                   // UD0
        (&[0x06], 6),                               // PUSH ES
        (&[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc0], 6), // AVX-512
        (&[0x66; 15], 13),
        (&[0x0f, 0x20, 0xc8], 6), // MOV from CR1
    ] {
        each(|mut g| {
            let s = g.long();
            g.memory.write(at::CODE, code).unwrap();
            g.memory.write(at::CODE + code.len() as u64, &[0x90; 16]).unwrap();
            let (v, t) = g.fault(&s);
            assert_eq!(v, vector, "{code:x?}");
            assert_eq!(g.frame(&t, u64::from(vector == 13)), at::CODE);
        });
    }
}

#[test]
fn a_push_that_faults_leaves_the_stack_pointer() {
    each(|mut g| {
        let mut s = g.long();
        g.gate64(14, at::HANDLERS + 14 * 16, 1);
        g.put64(at::PT + (0x10_0000 >> 12) * 8, 0x12_0000 | 5);
        s.gpr[gpr::RSP] = 0x10_0800;
        for code in [&[0x50u8][..], &[0xe8, 0, 0, 0, 0], &[0x8f, 0x00], &[0xc8, 8, 0, 0]] {
            g.memory.write(at::CODE, code).unwrap();
            s.gpr[gpr::RAX] = 0x10_0000; // POP [RAX] cannot write
            let (v, t) = g.fault(&s);
            assert_eq!((v, g.frame(&t, 4)), (14, 0x10_0800), "{code:x?}");
        }
    });
}
