//! Saving and loading, model-specific registers, identification.

use super::*;

#[test]
fn what_is_loaded_is_saved() {
    let mut g = Guest::new(executors()[0].clone(), 1);
    let mut s = g.long();
    for (n, r) in s.gpr.iter_mut().enumerate() {
        *r = n as u64 * 0x0101_0101_0101;
    }
    s.rflags = 0x4_0ed7 & !0x28 | 2;
    (s.cr2, s.cr8) = (0x1234, 5);
    s.dr = [1, 2, 3, 4, 0xffff_0ff0, 0x400];
    s.mp_state = MpState::Halted;
    s.events.interrupt = Some(0x77);
    s.events.nmi_masked = true;
    s.msrs = vec![(0xc000_0082, 0xffff_8000_0000_1000), (0x277, 0x0407_0105_0007_0106), (0xc000_0103, 3)];
    let core = g.core();
    core.vcpu.load(&s).unwrap();
    let t = core.vcpu.save().unwrap();
    assert_eq!((t.gpr, t.rip, t.rflags), (s.gpr, s.rip, s.rflags));
    assert_eq!((t.segments, t.ldtr, t.tr), (s.segments, s.ldtr, s.tr));
    assert_eq!((t.gdtr, t.idtr, t.cr0, t.cr2, t.cr3, t.cr4), (s.gdtr, s.idtr, s.cr0, s.cr2, s.cr3, s.cr4));
    assert_eq!((t.cr8, t.efer, t.dr, t.mp_state, t.events), (5, s.efer, s.dr, s.mp_state, s.events));
    for m in &s.msrs {
        assert!(t.msrs.contains(m), "{m:x?}");
    }
    // The saved state loads again.
    core.vcpu.load(&t).unwrap();
    let bad = CpuState { cr0: 0x8000_0000, ..t.clone() };
    assert!(core.vcpu.load(&bad).is_err());
    let bad = CpuState { msrs: vec![(0x12345, 0)], ..t };
    assert!(core.vcpu.load(&bad).unwrap_err().to_string().contains("0x12345"));
}

#[test]
fn the_time_stamp_counter_goes_on_after_a_load() {
    let mut g = Guest::new(executors()[0].clone(), 2);
    let mut s = g.cores[0].vcpu.save().unwrap();
    let tsc = |s: &CpuState| s.msrs.iter().find(|m| m.0 == 0x10).unwrap().1;
    let adjust = |s: &CpuState| s.msrs.iter().find(|m| m.0 == 0x3b).unwrap().1;
    s.msrs = vec![(0x10, 1 << 50), (0x3b, 7)];
    g.cores[0].vcpu.load(&s).unwrap();
    // The second was saved a little later, and is loaded a little later.
    s.msrs = vec![(0x10, (1 << 50) + 1000), (0x3b, 7)];
    g.cores[1].vcpu.load(&s).unwrap();
    let (a, b) = (g.cores[0].vcpu.save().unwrap(), g.cores[1].vcpu.save().unwrap());
    let second = base::tsc::frequency();
    assert!(tsc(&a) > 1 << 50 && tsc(&a) < (1 << 50) + second);
    assert!(tsc(&b) > tsc(&a) && tsc(&b) - tsc(&a) < second / 10, "the counters stay together");
    assert_eq!((adjust(&a), adjust(&b)), (7, 7));
}

#[test]
fn msrs_that_do_not_exist_fault() {
    each(|mut g| {
        let mut s = g.long();
        g.code(64, at::CODE, |a| {
            a.mov(ecx, 0xc000_0082u32)?;
            a.xor(eax, eax)?;
            a.mov(edx, 0x0001_0000)?;
            a.wrmsr()
        });
        let (v, t) = g.fault(&s);
        assert_eq!((v, g.frame(&t, 1)), (13, at::CODE + 12), "LSTAR must be canonical");
        g.code(64, at::CODE, |a| a.rdmsr());
        s.gpr[gpr::RCX] = 0x9999;
        assert_eq!(g.fault(&s).0, 13);
        // And only the kernel has them.
        let mut u = g.long_user();
        u.gpr[gpr::RCX] = 0x10;
        assert_eq!(g.fault(&u).0, 13);
    });
}

#[test]
fn the_paravirtual_clock_counts_nanoseconds() {
    let mut g = Guest::new(executors()[0].clone(), 1);
    let s = g.long();
    let (clock, wall) = (at::DATA + 0x40, at::DATA + 0x100);
    g.code(64, at::CODE, |a| {
        a.xor(edx, edx)?;
        a.mov(ecx, 0x4b56_4d01u32)?;
        a.mov(eax, clock as u32 | 1)?;
        a.wrmsr()?;
        a.mov(ecx, 0x4b56_4d00u32)?;
        a.mov(eax, wall as u32)?;
        a.wrmsr()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        done(a)
    });
    let t = g.run(&s);
    let since = t.gpr[gpr::RAX].wrapping_sub(g.get64(clock + 8));
    let (multiplier, shift) = (g.get32(clock + 24), g.memory.read_obj::<u8>(clock + 28).unwrap() as i8);
    let shifted = if shift < 0 { since >> -shift } else { since << shift };
    let ns = (u128::from(shifted) * u128::from(multiplier)) >> 32;
    assert!(ns < 100_000_000_000, "since the VM was made: {ns} ns");
    assert_eq!(g.get32(clock) % 2, 0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(now.as_secs().abs_diff(u64::from(g.get32(wall + 4))) < 100);
}

#[test]
fn reset_state() {
    let mut g = Guest::new(executors()[0].clone(), 1);
    let s = g.core().vcpu.save().unwrap();
    assert_eq!((s.rip, s.rflags, s.cr0), (0xfff0, 2, 0x6000_0010));
    assert_eq!(
        s.segments[seg::CS],
        Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b }
    );
    assert_ne!(s.gpr[gpr::RDX], 0, "the processor's signature");
    assert_eq!(s.mp_state, MpState::Runnable);
}
