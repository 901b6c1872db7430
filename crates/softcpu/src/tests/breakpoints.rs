//! Single step and debug registers.

use super::*;

/// A #DB handler that records RIP and DR6 in a list at DATA, and goes on with RF set and TF as `keep_tf` says.
fn recorder(g: &Guest, keep_tf: bool) {
    g.gate64(1, at::CODE + 0x800, 0);
    g.code(64, at::CODE + 0x800, |a| {
        a.push(rax)?;
        a.push(rbx)?;
        a.mov(ebx, dword_ptr(at::DATA))?;
        a.mov(rax, qword_ptr(rsp + 16))?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(rax, dr6)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.mov(eax, 0xffff_0ff0u32)?;
        a.mov(dr6, rax)?;
        a.add(dword_ptr(at::DATA), 16)?;
        a.or(dword_ptr(rsp + 32), 0x1_0000)?;
        if !keep_tf {
            a.and(dword_ptr(rsp + 32), !0x100)?;
        }
        a.pop(rbx)?;
        a.pop(rax)?;
        a.iretq()
    });
    g.put64(at::DATA, at::DATA + 0x10);
}

fn recorded(g: &Guest) -> Vec<(u64, u64)> {
    let end = g.get64(at::DATA);
    (0..(end - at::DATA - 0x10) / 16)
        .map(|n| (g.get64(at::DATA + 0x10 + n * 16), g.get64(at::DATA + 0x18 + n * 16) & 0xe00f))
        .collect()
}

#[test]
fn single_step() {
    each(|mut g| {
        let s = g.long();
        recorder(&g, true);
        g.code(64, at::CODE, |a| {
            a.pushfq()?; // 1 byte
            a.or(dword_ptr(rsp), 0x100)?; // 7
            a.popfq()?; // 1
            a.nop()?; // at 9
            a.mov(ecx, 3)?; // at 10
            a.rep().stosb()?; // at 15: a trap for each iteration
            a.mov(ax, ss)?; // at 17
            a.mov(ss, ax)?; // at 20: its trap is lost
            a.nop()?; // at 23
            a.pushfq()?; // at 24
            a.and(dword_ptr(rsp), !0x100)?; // at 25
            a.popfq()?; // at 32
            a.nop()?;
            done(a)
        });
        let mut s = s;
        s.gpr[gpr::RDI] = at::DATA + 0x800;
        g.run(&s);
        let places: Vec<u64> = recorded(&g).iter().map(|r| r.0 - at::CODE).collect();
        assert_eq!(places, [10, 15, 15, 15, 17, 20, 24, 25, 32, 33]);
        assert!(recorded(&g).iter().all(|r| r.1 == 1 << 14));
    });
}

#[test]
fn instruction_breakpoints() {
    each(|mut g| {
        let mut s = g.long();
        recorder(&g, false);
        g.code(64, at::CODE, |a| {
            a.inc(ebx)?;
            a.inc(ebx)?;
            a.inc(ebx)?;
            done(a)
        });
        s.dr[1] = at::CODE + 2;
        s.dr[5] = 0x400 | 1 << 3;
        let t = g.run(&s);
        assert_eq!(t.gpr[gpr::RBX], 3);
        assert_eq!(recorded(&g), [(at::CODE + 2, 2)], "before the instruction, once thanks to RF");
    });
}

#[test]
fn data_breakpoints() {
    each(|mut g| {
        let mut s = g.long();
        recorder(&g, false);
        let watched = at::DATA + 0x1000;
        g.code(64, at::CODE, |a| {
            a.mov(eax, dword_ptr(watched))?; // 9 bytes
            a.mov(byte_ptr(watched + 3), 1)?; // 8
            a.mov(byte_ptr(watched + 4), 1)?; // 8, outside
            a.inc(dword_ptr(watched + 8))?;
            a.nop()?;
            done(a)
        });
        (s.dr[0], s.dr[2]) = (watched, watched + 8);
        // DR0: writes of four bytes; DR2: reads and writes of four.
        s.dr[5] = 0x400 | 1 | 1 << 4 | 0xd << 16 | 0xf << 24;
        g.run(&s);
        assert_eq!(recorded(&g), [(at::CODE + 17, 1), (at::CODE + 32, 4)]);
    });
}

#[test]
fn debug_registers_can_be_guarded() {
    each(|mut g| {
        let mut s = g.long();
        recorder(&g, false);
        g.code(64, at::CODE, |a| {
            a.mov(rax, dr0)?;
            done(a)
        });
        s.dr[5] = 0x400 | 1 << 13;
        s.dr[0] = 77;
        let t = g.run(&s);
        assert_eq!(recorded(&g), [(at::CODE, 1 << 13)]);
        assert_eq!((t.gpr[gpr::RAX], t.dr[5] & 1 << 13), (77, 0));
    });
}
