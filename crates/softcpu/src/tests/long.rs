//! 64-bit and compatibility mode.

use super::*;

const LSTAR: u32 = 0xc000_0082;
const STAR: u32 = 0xc000_0081;
const FMASK: u32 = 0xc000_0084;

#[test]
fn system_calls_and_returns() {
    each(|mut g| {
        let mut s = g.long_user();
        // SYSRET wants user data 8 and user code 16 above its base.
        let star = u64::from(sel::USER_CODE32) << 48 | u64::from(sel::CODE64) << 32;
        s.msrs = vec![(STAR, star), (LSTAR, at::CODE + 0x800), (FMASK, 0x401)];
        s.rflags = 0x203;
        g.code(64, at::CODE + 0x800, |a| {
            a.mov(r8, rsp)?;
            a.mov(r9d, cs)?;
            a.mov(r10d, ss)?;
            a.pushfq()?;
            a.pop(r12)?;
            a.sysretq()
        });
        g.code(64, at::CODE, |a| {
            a.syscall()?;
            a.mov(r13d, cs)?;
            a.mov(r14d, ss)?;
            a.mov(r15, rcx)?;
            a.hlt()
        });
        let (v, s) = g.fault(&s);
        assert_eq!(v, 13);
        assert_eq!(s.gpr[8], at::STACK);
        assert_eq!((s.gpr[9], s.gpr[10]), (u64::from(sel::CODE64), u64::from(sel::DATA)));
        assert_eq!(s.gpr[12] & 0x201, 0x200, "FMASK clears CF");
        assert_eq!(s.gpr[11], 0x203);
        assert_eq!((s.gpr[13], s.gpr[14]), (u64::from(sel::USER_CODE64), u64::from(sel::USER_DATA)));
        assert_eq!(s.gpr[15], at::CODE + 2);
    });
}

#[test]
fn interrupt_stacks() {
    each(|mut g| {
        let s = g.long_user();
        g.gate64(6, at::HANDLERS + 6 * 16, 1);
        g.code(64, at::CODE, |a| a.ud2());
        let (v, s) = g.fault(&s);
        assert_eq!((v, s.gpr[gpr::RSP]), (6, at::STACK_IST - 48));
        assert_eq!(g.frame(&s, 0), at::CODE);
        assert_eq!(g.frame(&s, 1), u64::from(sel::USER_CODE64));
        assert_eq!(g.frame(&s, 3), at::STACK);
        assert_eq!(g.frame(&s, 4), u64::from(sel::USER_DATA));
        assert_eq!(s.segments[seg::SS].selector, 0);
    });
}

#[test]
fn stacks_are_aligned_and_frames_restored() {
    each(|mut g| {
        let mut s = g.long();
        s.gpr[gpr::RSP] = at::STACK - 5;
        g.gate64(0x50, at::CODE + 0x800, 0);
        g.code(64, at::CODE + 0x800, |a| {
            a.mov(rbx, rsp)?;
            a.iretq()
        });
        g.code(64, at::CODE, |a| {
            a.int(0x50)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RBX], ((at::STACK - 5) & !15) - 40);
        assert_eq!(s.gpr[gpr::RSP], at::STACK - 5);
    });
}

#[test]
fn non_canonical_addresses() {
    let bad = 0x8000_0000_0000u64;
    for (stack, vector) in [(false, 13), (true, 12)] {
        each(|mut g| {
            let mut s = g.long();
            s.gpr[gpr::RBX] = bad;
            s.gpr[gpr::RBP] = bad;
            g.code(64, at::CODE, |a| {
                if stack { a.mov(rax, qword_ptr(rbp)) } else { a.mov(rax, qword_ptr(rbx)) }?;
                done(a)
            });
            let (v, s) = g.fault(&s);
            assert_eq!(v, vector);
            assert_eq!(g.frame(&s, 0), 0);
            assert_eq!(g.frame(&s, 1), at::CODE);
        });
    }
    each(|mut g| {
        let mut s = g.long();
        s.gpr[gpr::RBX] = bad;
        g.code(64, at::CODE, |a| a.jmp(rbx));
        let (v, s) = g.fault(&s);
        assert_eq!((v, g.frame(&s, 1)), (13, at::CODE), "the jump faults, not its target");
    });
}

#[test]
fn compatibility_mode_and_back() {
    each(|mut g| {
        let s = g.long();
        let (narrow, wide) = (at::CODE + 0x800, at::CODE + 0xc00);
        g.put64(at::DATA, narrow | u64::from(sel::CODE32) << 32);
        g.put64(at::DATA + 8, wide | u64::from(sel::CODE64) << 32);
        g.code(64, at::CODE, |a| {
            a.mov(rax, -1i64 as u64)?;
            a.mov(rbx, -1i64 as u64)?;
            a.jmp(fword_ptr(at::DATA))
        });
        g.code(32, narrow, |a| {
            a.inc(ebx)?; // one byte here, a REX prefix in 64-bit mode
            a.mov(ecx, cs)?;
            a.jmp(fword_ptr(at::DATA as u32 + 8))
        });
        g.code(64, wide, |a| {
            a.mov(edx, cs)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RBX], 0);
        assert_eq!((s.gpr[gpr::RCX], s.gpr[gpr::RDX]), (u64::from(sel::CODE32), u64::from(sel::CODE64)));
    });
}

#[test]
fn bases_of_fs_and_gs() {
    each(|mut g| {
        let mut s = g.long();
        s.cr4 |= 1 << 16;
        s.segments[seg::GS].base = at::DATA;
        s.msrs = vec![(0xc000_0102, at::DATA + 0x100)];
        g.put64(at::DATA, 1);
        g.put64(at::DATA + 0x100, 2);
        g.put64(at::DATA + 0x200, 3);
        g.code(64, at::CODE, |a| {
            a.mov(rax, qword_ptr(0).gs())?;
            a.swapgs()?;
            a.mov(rbx, qword_ptr(0).gs())?;
            a.mov(ecx, at::DATA as u32 + 0x200)?;
            a.wrfsbase(rcx)?;
            a.mov(rdx, qword_ptr(0).fs())?;
            a.rdgsbase(rsi)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!([s.gpr[gpr::RAX], s.gpr[gpr::RBX], s.gpr[gpr::RDX]], [1, 2, 3]);
        assert_eq!(s.gpr[gpr::RSI], at::DATA + 0x100);
    });
}

#[test]
fn from_32_bit_code_into_long_mode() {
    each(|mut g| {
        g.long();
        let mut s = g.protected();
        g.handlers(64);
        s.idtr.limit = 0xfff;
        let wide = at::CODE + 0x800;
        g.put64(at::DATA, wide | u64::from(sel::CODE64) << 32);
        g.code(32, at::CODE, |a| {
            a.mov(eax, 1 << 5)?;
            a.mov(cr4, eax)?;
            a.mov(eax, at::PML4 as u32)?;
            a.mov(cr3, eax)?;
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.or(eax, 0x100)?;
            a.wrmsr()?;
            a.mov(eax, cr0)?;
            a.or(eax, 0x8000_0000u32 as i32)?;
            a.mov(cr0, eax)?;
            a.rdmsr()?;
            a.mov(esi, eax)?;
            a.jmp(fword_ptr(at::DATA as u32))
        });
        g.code(64, wide, |a| {
            a.mov(rdi, 0x1234_5678_9abc_def0u64)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!(s.gpr[gpr::RDI], 0x1234_5678_9abc_def0);
        assert_eq!(s.gpr[gpr::RSI] & 0x500, 0x500);
    });
}
