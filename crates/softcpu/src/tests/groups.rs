//! Accesses that the translator checks together: structures and stack frames, at every place around a page's end.

use super::*;

/// First and last place, around the end of a page.
const FIRST: u32 = (at::DATA + 0xf60) as u32;
const LAST: u32 = (at::DATA + 0x1020) as u32;

/// The same state and memory with every executor.
fn agree(run: impl Fn(&mut Guest) -> CpuState) {
    let [a, b] = executors().map(|spec| {
        let mut g = Guest::new(spec, 1);
        let s = run(&mut g);
        let mut data = vec![0u8; 0x4000];
        g.memory.read(at::DATA, &mut data).unwrap();
        (s.gpr, s.rflags, data)
    });
    assert_eq!((a.0, a.1), (b.0, b.1));
    assert!(a.2 == b.2, "memory differs");
}

#[test]
fn structures_that_cross_pages() {
    agree(|g| {
        let s = g.long();
        g.code(64, at::CODE, |a| {
            let mut again = a.create_label();
            let mut place = a.create_label();
            a.mov(r12d, 40)?;
            a.set_label(&mut again)?;
            a.mov(ebx, FIRST)?;
            a.set_label(&mut place)?;
            a.mov(rax, qword_ptr(rbx + 8))?;
            a.mov(ecx, dword_ptr(rbx + 24))?;
            a.add(rdx, qword_ptr(rbx + 40))?;
            a.movzx(esi, byte_ptr(rbx + 3))?;
            a.lea(rax, qword_ptr(rax + rsi + 1))?;
            a.mov(qword_ptr(rbx + 16), rax)?;
            a.add(dword_ptr(rbx + 64), ecx)?;
            a.adc(rdx, qword_ptr(rbx + 32))?;
            a.mov(qword_ptr(rbx), rdx)?;
            a.add(rbx, 3)?;
            a.cmp(rbx, LAST as i32)?;
            a.jb(place)?;
            a.dec(r12d)?;
            a.jnz(again)?;
            done(a)
        });
        g.run(&s)
    });
}

#[test]
fn stack_frames_that_cross_pages() {
    agree(|g| {
        let s = g.long();
        g.code(64, at::CODE, |a| {
            let mut again = a.create_label();
            let mut place = a.create_label();
            let mut function = a.create_label();
            a.mov(r8d, 40)?;
            a.set_label(&mut again)?;
            a.mov(esp, LAST)?;
            a.set_label(&mut place)?;
            a.call(function)?;
            a.sub(rsp, 5)?;
            a.cmp(rsp, FIRST as i32)?;
            a.ja(place)?;
            a.dec(r8d)?;
            a.jnz(again)?;
            done(a)?;
            a.set_label(&mut function)?;
            a.push(rbx)?;
            a.push(r15)?;
            a.push(rbp)?;
            a.push(r10)?;
            a.sub(rsp, 24)?;
            a.mov(qword_ptr(rsp), rdx)?;
            a.mov(dword_ptr(rsp + 12), r8d)?;
            a.add(rdx, qword_ptr(rsp + 24))?;
            a.xor(rdx, qword_ptr(rsp + 8))?;
            a.inc(r10)?;
            a.lea(r15, qword_ptr(r15 + rdx))?;
            a.add(rbx, r15)?;
            a.add(rsp, 24)?;
            a.pop(r10)?;
            a.pop(rbp)?;
            a.pop(rdi)?;
            a.pop(rbx)?;
            a.ret()
        });
        g.run(&s)
    });
}

#[test]
fn frames_of_32_bit_code() {
    agree(|g| {
        let s = g.protected();
        g.code(32, at::CODE, |a| {
            let mut again = a.create_label();
            let mut place = a.create_label();
            let mut function = a.create_label();
            a.mov(ebp, 40)?;
            a.set_label(&mut again)?;
            a.mov(esp, LAST)?;
            a.set_label(&mut place)?;
            a.call(function)?;
            a.sub(esp, 3)?;
            a.cmp(esp, FIRST)?;
            a.ja(place)?;
            a.dec(ebp)?;
            a.jnz(again)?;
            done(a)?;
            a.set_label(&mut function)?;
            a.push(ebx)?;
            a.push(esi)?;
            a.push(edi)?;
            a.sub(esp, 12)?;
            a.mov(dword_ptr(esp + 4), edx)?;
            a.add(edx, dword_ptr(esp + 8))?;
            a.xor(edx, dword_ptr(esp))?;
            a.lea(eax, ptr(edx + ebx * 4 - 7))?;
            a.mov(dword_ptr(esp + 8), eax)?;
            a.add(ebx, eax)?;
            a.mov(ecx, dword_ptr(at::DATA as u32 + 0x40))?;
            a.mov(eax, dword_ptr(ecx + ebp + at::DATA as u32))?;
            a.mov(dword_ptr(ecx * 2 + at::DATA as u32), eax)?;
            a.add(esp, 12)?;
            a.pop(esi)?;
            a.pop(edi)?;
            a.pop(ecx)?;
            a.ret()
        });
        g.run(&s)
    });
}
