//! Virtual-8086 mode.

use super::*;

/// State at an IRET that enters virtual-8086 mode at 1000:0000 with a stack at 0:STACK.
fn entering(g: &Guest, iopl: u64) -> CpuState {
    let mut s = g.protected();
    s.gpr[gpr::RSP] = at::STACK0 - 0x100;
    let frame: [u32; 9] =
        [0, 0x1000, (1 << 17 | iopl << 12 | 2) as u32, at::STACK as u32, 0, 0x40, 0x50, 0x60, 0x70];
    for (n, v) in frame.iter().enumerate() {
        g.memory.write_obj(s.gpr[gpr::RSP] + n as u64 * 4, v).unwrap();
    }
    g.code(32, at::CODE + 0x800, |a| a.iretd());
    s.rip = at::CODE + 0x800;
    s
}

#[test]
fn enters_runs_and_leaves_by_a_fault() {
    each(|mut g| {
        let s = entering(&g, 0);
        g.code(16, at::CODE, |a| {
            // DS is 0x50.
            a.mov(ax, word_ptr(2))?;
            a.mov(bx, ds)?;
            a.mov(dx, 0x2000)?;
            a.mov(es, dx)?;
            a.mov(cx, word_ptr(0).es())?;
            a.cli()
        });
        g.memory.write_obj(0x502, &0x4321u16).unwrap();
        g.memory.write_obj(0x2_0000, &0x8765u16).unwrap();
        let (v, s) = g.fault(&s);
        assert_eq!(v, 13, "CLI needs IOPL 3");
        assert_eq!((s.gpr[gpr::RBX], s.gpr[gpr::RCX]), (0x50, 0x8765));
        // Error code, IP, CS, flags, SP, SS, ES, DS, FS, GS on the ring 0 stack; EAX below.
        let word = |n: u64| g.get32(s.gpr[gpr::RSP] + n * 4);
        assert_eq!(word(0) & 0xffff, 0x4321);
        assert_eq!(word(3), 0x1000);
        assert_ne!(word(4) & 1 << 17, 0);
        assert_eq!([word(5), word(6)], [at::STACK as u32, 0]);
        assert_eq!([word(7), word(8), word(9), word(10)], [0x2000, 0x50, 0x60, 0x70]);
        assert_eq!(s.gpr[gpr::RSP] + 44, at::STACK0);
        assert_ne!(s.segments[seg::DS].attributes & Segment::UNUSABLE, 0);
        assert_eq!(s.rflags & 1 << 17, 0);
    });
}

#[test]
fn software_interrupts_need_iopl_3() {
    for (iopl, vector) in [(0, 13), (3, 5)] {
        each(|mut g| {
            let s = entering(&g, iopl);
            g.code(16, at::CODE, |a| a.int(5));
            let (v, _) = g.fault(&s);
            assert_eq!(v, vector);
        });
    }
}

#[test]
fn pushf_and_iret_are_the_guests_own_with_iopl_3() {
    each(|mut g| {
        let s = entering(&g, 3);
        g.code(16, at::CODE, |a| {
            a.sti()?;
            a.pushf()?;
            a.pop(bx)?;
            a.push(0x0003)?; // IOPL cannot be lowered from here
            a.popf()?;
            a.pushf()?;
            a.pop(cx)?;
            a.hlt()
        });
        let (v, s) = g.fault(&s);
        assert_eq!(v, 13, "HLT is privileged");
        assert_eq!(s.gpr[gpr::RBX] & 0x3200, 0x3200);
        assert_eq!(s.gpr[gpr::RCX] & 0x3201, 0x3001);
    });
}
