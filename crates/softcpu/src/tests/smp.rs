//! vCPUs that run at the same time.

use super::*;

/// Runs code on two vCPUs at once; RBX is the number of the vCPU.
fn both(g: &mut Guest, s: &CpuState) -> Vec<CpuState> {
    for (n, core) in g.cores.iter_mut().enumerate() {
        let mut s = s.clone();
        s.gpr[gpr::RBX] = n as u64;
        s.gpr[gpr::RSP] = at::STACK - 0x400 * n as u64;
        core.vcpu.load(&s).unwrap();
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = g.cores.iter_mut().map(|c| scope.spawn(|| c.run())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn locked_arithmetic_loses_nothing() {
    for spec in executors() {
        let mut g = Guest::new(spec, 2);
        let s = g.long();
        let rounds = 50_000;
        let split = at::DATA + 0x1ffe; // over two pages
        g.code(64, at::CODE, |a| {
            let mut top = a.create_label();
            let mut retry = a.create_label();
            a.mov(ecx, rounds)?;
            a.set_label(&mut top)?;
            a.lock().inc(dword_ptr(at::DATA))?;
            a.mov(eax, 3)?;
            a.lock().xadd(qword_ptr(at::DATA + 8), rax)?;
            a.mov(eax, dword_ptr(at::DATA + 16))?;
            a.set_label(&mut retry)?;
            a.lea(edx, dword_ptr(rax + 1))?;
            a.lock().cmpxchg(dword_ptr(at::DATA + 16), edx)?;
            a.jnz(retry)?;
            a.dec(ecx)?;
            a.jnz(top)?;
            let mut slow = a.create_label();
            a.mov(ecx, 1000)?;
            a.set_label(&mut slow)?;
            a.lock().add(dword_ptr(split), 1)?;
            a.dec(ecx)?;
            a.jnz(slow)?;
            done(a)
        });
        both(&mut g, &s);
        let n = rounds as u64 * 2;
        assert_eq!(u64::from(g.get32(at::DATA)), n);
        assert_eq!(g.get64(at::DATA + 8), 3 * n);
        assert_eq!(u64::from(g.get32(at::DATA + 16)), n);
        assert_eq!(g.get32(split), 2000);
    }
}

/// One vCPU rewrites a function and then raises a flag; the other waits for the flag, serialises and calls it.
#[test]
fn code_written_by_another_processor() {
    for spec in executors() {
        let mut g = Guest::new(spec, 2);
        let s = g.long();
        let function = at::CODE + 0x2000;
        g.code(64, function, |a| {
            a.mov(eax, 0)?;
            a.ret()
        });
        let rounds = 2000;
        let (flag, answer) = (at::DATA, at::DATA + 64);
        g.code(64, at::CODE, |a| {
            let mut reader = a.create_label();
            let mut write = a.create_label();
            let mut wait = a.create_label();
            let mut read = a.create_label();
            let mut bad = a.create_label();
            a.mov(r8d, 1)?;
            a.test(ebx, ebx)?;
            a.jnz(reader)?;
            a.set_label(&mut write)?;
            a.mov(dword_ptr(function + 1), r8d)?;
            a.mov(dword_ptr(flag), r8d)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(answer), r8d)?;
            a.jne(wait)?;
            a.inc(r8d)?;
            a.cmp(r8d, rounds)?;
            a.jne(write)?;
            done(a)?;
            a.set_label(&mut reader)?;
            a.xor(r10d, r10d)?;
            a.set_label(&mut read)?;
            a.pause()?;
            a.cmp(dword_ptr(flag), r8d)?;
            a.jne(read)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.call(function)?;
            a.cmp(eax, r8d)?;
            a.je(bad)?;
            a.inc(r10d)?;
            a.set_label(&mut bad)?;
            a.mov(dword_ptr(answer), r8d)?;
            a.inc(r8d)?;
            a.cmp(r8d, rounds)?;
            a.jne(read)?;
            done(a)
        });
        let states = both(&mut g, &s);
        assert_eq!(states[1].gpr[10], 0, "calls that ran old code");
    }
}

#[test]
fn memory_comes_and_goes_while_everyone_runs() {
    for spec in executors() {
        let mut g = Guest::new(spec, 2);
        let s = g.long();
        // Reads device or RAM, whatever is there, until told to stop.
        g.code(64, at::CODE, |a| {
            let mut top = a.create_label();
            a.mov(rsi, DEVICE)?;
            a.set_label(&mut top)?;
            a.mov(eax, dword_ptr(rsi))?;
            a.mov(dword_ptr(rsi), eax)?;
            a.cmp(byte_ptr(at::DATA), 0)?;
            a.je(top)?;
            done(a)
        });
        let (vm, memory) = (g.vm.clone(), g.memory.clone());
        let changer = std::thread::spawn(move || {
            for _ in 0..50 {
                let region = Region::new(DEVICE, 0x1000, &Backing::Anonymous, false).unwrap();
                let slot = Slot { gpa: DEVICE, len: 0x1000, region, offset: 0, readonly: false };
                let id = vm.map(slot).unwrap();
                std::thread::yield_now();
                vm.unmap(id).unwrap();
            }
            memory.write(at::DATA, &[1]).unwrap();
        });
        both(&mut g, &s);
        changer.join().unwrap();
    }
}

#[test]
fn the_dirty_log_misses_nothing() {
    for spec in executors() {
        let mut g = Guest::new(spec, 1);
        let s = g.long();
        let tracker = g.memory.regions()[0].tracker.clone();
        let slot = accel::SlotId(0);
        g.code(64, at::CODE, |a| {
            a.inc(dword_ptr(at::DATA))?;
            a.inc(dword_ptr(at::DATA + 0x3000))?;
            done(a)
        });
        let dirty = |g: &Guest| {
            let mut pages = vec![];
            tracker.take_dirty(|p| pages.push(p));
            g.vm.take_dirty(slot, &mut |_| ()).unwrap();
            pages
        };
        g.run(&s); // the TLB holds the pages as writable now
        g.vm.set_dirty_log(slot, true).unwrap();
        for _ in 0..2 {
            // The same vCPU, without a new load that would flush.
            let core = g.core();
            let mut t = core.vcpu.save().unwrap();
            (t.rip, t.mp_state) = (at::CODE, MpState::Runnable);
            core.vcpu.load(&t).unwrap();
            core.run();
            let pages = dirty(&g);
            assert!(
                pages.contains(&(at::DATA >> 12)) && pages.contains(&((at::DATA + 0x3000) >> 12)),
                "{pages:?}"
            );
        }
        assert!(dirty(&g).is_empty());
        assert!(g.vm.take_dirty(accel::SlotId(9), &mut |_| ()).is_err());
    }
}
