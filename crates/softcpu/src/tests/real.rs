//! Real mode.

use super::*;

#[test]
fn interrupts_go_through_the_vector_table() {
    each(|mut g| {
        g.memory.write_obj(0x21 * 4, &0x2000_0100u32).unwrap(); // 2000:0100
        g.code(16, 0x2_0100, |a| {
            a.mov(bx, cs)?;
            a.pushf()?;
            a.pop(dx)?;
            a.iret()
        });
        g.code(16, at::CODE, |a| {
            a.sti()?;
            a.stc()?;
            a.int(0x21)?;
            a.pushf()?;
            a.pop(cx)?;
            done(a)
        });
        let s = g.real();
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RBX], 0x2000);
        assert_eq!(s.gpr[gpr::RDX] & 0x201, 1, "IF is clear in the handler");
        assert_eq!(s.gpr[gpr::RCX] & 0x201, 0x201, "IRET brings the flags back");
        assert_eq!(s.gpr[gpr::RSP], at::STACK);
    });
}

#[test]
fn far_calls_and_returns() {
    each(|mut g| {
        g.code(16, 0x3_0010, |a| {
            a.mov(ax, 0x1234)?;
            a.retf_1(4)
        });
        // push 1; push 2; call 3000:0010
        g.memory.write(at::CODE, &[0x6a, 1, 0x6a, 2, 0x9a, 0x10, 0, 0, 0x30, 0xe6, 0x80, 0xf4]).unwrap();
        let s = g.real();
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RAX], s.gpr[gpr::RSP]), (0x1234, at::STACK));
        assert_eq!(s.segments[seg::CS].base, at::CODE);
    });
}

#[test]
fn accesses_beyond_the_limit_fault() {
    each(|mut g| {
        g.memory.write_obj(13 * 4, &0x2000_0000u32).unwrap();
        g.code(16, 0x2_0000, |a| {
            a.mov(cx, 13)?;
            done(a)
        });
        g.code(16, at::CODE, |a| {
            a.mov(bx, 0xffff)?;
            a.mov(ax, word_ptr(bx))?;
            a.mov(cx, 1)?;
            done(a)
        });
        let s = g.real();
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RCX], 13);
        assert_eq!(g.memory.read_obj::<u16>(at::STACK - 6).unwrap(), 3, "the address of the instruction");
    });
}

#[test]
fn to_protected_mode_and_back_with_big_segments() {
    each(|mut g| {
        g.protected();
        g.put64(0x500, at::GDT << 16 | 0x7f);
        g.put64(RAM - 16, 0x1122_3344_5566_7788);
        g.code(16, at::CODE, |a| {
            a.cli()?;
            a.lgdt(fword_ptr(0x500))?;
            a.mov(eax, cr0)?;
            a.or(al, 1)?;
            a.mov(cr0, eax)?;
            a.mov(bx, sel::DATA as i32)?;
            a.mov(ds, bx)?;
            a.and(al, 0xfei32)?;
            a.mov(cr0, eax)?;
            // The limit stays at 4 GiB: "unreal" mode.
            a.mov(ebx, RAM as i32 - 16)?;
            a.mov(edx, dword_ptr(ebx))?;
            done(a)
        });
        let s = g.real();
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RDX], 0x5566_7788);
        assert_eq!(s.cr0 & 1, 0);
        assert_eq!(s.segments[seg::DS].limit, u32::MAX);
    });
}

#[test]
fn strings_wrap_at_64_kib() {
    each(|mut g| {
        g.memory.write(0xfffe, b"ab").unwrap();
        g.code(16, at::CODE, |a| {
            a.cld()?;
            a.mov(si, 0xfffe)?;
            a.mov(di, 0x1000)?;
            a.mov(cx, 3)?;
            a.rep().movsb()?;
            done(a)
        });
        g.memory.write(0, b"c").unwrap();
        let s = g.real();
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RSI], s.gpr[gpr::RCX]), (1, 0));
        let mut b = [0; 3];
        g.memory.read(0x1000, &mut b).unwrap();
        assert_eq!(&b, b"abc");
    });
}
