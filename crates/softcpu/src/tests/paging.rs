//! Paging in all its forms.

use super::*;

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PGE: u64 = 1 << 7;
const PCIDE: u64 = 1 << 17;

/// The linear page that tests remap, and the physical pages behind it.
const PAGE: u64 = 0x10_0000;
const FIRST: u64 = 0x12_0000;
const SECOND: u64 = 0x13_0000;

fn pte(lin: u64) -> u64 {
    at::PT + (lin >> 12) * 8
}

/// What an access with RBX = PAGE gives: vector and error code of the page fault, or neither.
fn access(g: &mut Guest, mut s: CpuState, entry: u64, code: &[u8]) -> (u32, u64) {
    g.put64(pte(PAGE), entry);
    g.memory.write(at::CODE, code).unwrap();
    g.memory.write(at::CODE + code.len() as u64, &[0xcc]).unwrap(); // INT3: no fault
    s.gpr[gpr::RBX] = PAGE;
    let (v, s) = g.fault(&s);
    if v == 14 {
        assert_eq!(s.cr2, PAGE);
        assert_eq!(g.frame(&s, 1), if code == JUMP { PAGE } else { at::CODE });
        (v, g.frame(&s, 0))
    } else {
        (v, 0)
    }
}

const LOAD: &[u8] = &[0x48, 0x8b, 0x03];
const STORE: &[u8] = &[0x48, 0x89, 0x03];
const RMW: &[u8] = &[0xf0, 0x48, 0xff, 0x03];
const JUMP: &[u8] = &[0xff, 0xe3];

#[test]
fn error_codes() {
    each(|mut g| {
        let (user, kernel) = (g.long_user(), g.long());
        assert_eq!(access(&mut g, user.clone(), 0, LOAD), (14, 4));
        assert_eq!(access(&mut g, user.clone(), 0, STORE), (14, 6));
        assert_eq!(access(&mut g, kernel.clone(), 0, RMW), (14, 2));
        assert_eq!(access(&mut g, kernel.clone(), 0, JUMP), (14, 0x10));
        assert_eq!(access(&mut g, user.clone(), FIRST | P | RW, LOAD), (14, 5));
        assert_eq!(access(&mut g, user.clone(), FIRST | P | US, STORE), (14, 7));
        assert_eq!(access(&mut g, user.clone(), FIRST | P | US, LOAD), (3, 0));
        assert_eq!(access(&mut g, kernel.clone(), FIRST | P | US, STORE), (14, 3), "WP");
        assert_eq!(access(&mut g, user.clone(), FIRST | P | US | RW | NX, JUMP), (14, 0x15));
        assert_eq!(
            access(&mut g, kernel.clone(), FIRST | P | RW | 1 << 51, LOAD),
            (14, 9),
            "reserved address bit"
        );
        let mut open = kernel.clone();
        open.cr0 &= !(1 << 16);
        assert_eq!(
            access(&mut g, open, FIRST | P | US, STORE),
            (3, 0),
            "without WP the kernel writes anywhere"
        );
        let mut old = kernel.clone();
        old.efer &= !(1 << 11);
        assert_eq!(access(&mut g, old, FIRST | P | NX, LOAD), (14, 9), "bit 63 is reserved without NXE");
    });
}

#[test]
fn smep_and_smap() {
    each(|mut g| {
        let mut s = g.long();
        // The test's own code and stack are supervisor pages now.
        for n in 0..0x100 {
            g.put64(at::PT + n * 8, n << 12 | P | RW);
        }
        s.cr4 |= SMEP | SMAP;
        assert_eq!(access(&mut g, s.clone(), FIRST | P | RW | US, LOAD), (14, 1));
        assert_eq!(access(&mut g, s.clone(), FIRST | P | RW | US, STORE), (14, 3));
        assert_eq!(access(&mut g, s.clone(), FIRST | P | RW | US, JUMP), (14, 0x11));
        assert_eq!(access(&mut g, s.clone(), FIRST | P | RW, LOAD), (3, 0));
        s.rflags |= 1 << 18;
        assert_eq!(access(&mut g, s.clone(), FIRST | P | RW | US, LOAD), (3, 0));
        // STAC and CLAC change it in the middle of a block.
        let mut code = vec![0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x03, 0x0f, 0x01, 0xca];
        code.extend(LOAD);
        g.memory.write(at::CODE, &code).unwrap();
        s.rflags &= !(1 << 18);
        s.gpr[gpr::RBX] = PAGE;
        let (v, s) = g.fault(&s);
        assert_eq!((v, g.frame(&s, 1)), (14, at::CODE + 9));
    });
}

#[test]
fn accessed_and_dirty_bits() {
    each(|mut g| {
        let s = g.long();
        access(&mut g, s.clone(), FIRST | P | RW, LOAD);
        assert_eq!(g.get64(pte(PAGE)) & (A | D), A);
        access(&mut g, s.clone(), FIRST | P | RW, STORE);
        assert_eq!(g.get64(pte(PAGE)) & (A | D), A | D);
        access(&mut g, s.clone(), FIRST | P, STORE);
        assert_eq!(g.get64(pte(PAGE)) & D, 0, "a faulting write leaves it");
        assert_ne!(g.get64(at::PML4) & A, 0);
        // A read first, then a write through the same translation.
        g.put64(pte(PAGE), FIRST | P | RW);
        g.memory.write(at::CODE, &[LOAD, STORE, &[0xcc]].concat()).unwrap();
        let mut s = s;
        s.gpr[gpr::RBX] = PAGE;
        g.fault(&s);
        assert_eq!(g.get64(pte(PAGE)) & (A | D), A | D);
    });
}

#[test]
fn invlpg_makes_changes_visible() {
    each(|mut g| {
        let s = g.long();
        g.put64(FIRST, 1);
        g.put64(SECOND, 2);
        g.put64(pte(PAGE), FIRST | P | RW);
        g.code(64, at::CODE, |a| {
            a.mov(rbx, PAGE)?;
            a.mov(rsi, qword_ptr(rbx))?;
            a.mov(dword_ptr(pte(PAGE)), (SECOND | P | RW) as u32)?;
            a.invlpg(ptr(rbx))?;
            a.mov(rdi, qword_ptr(rbx))?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RSI], s.gpr[gpr::RDI]), (1, 2));
    });
}

#[test]
fn invlpg_reaches_into_large_pages() {
    each(|mut g| {
        let s = g.long();
        g.put64(0x40_0010, 4);
        g.put64(0x60_0010, 6);
        g.code(64, at::CODE, |a| {
            a.mov(rsi, qword_ptr(0x40_0010))?;
            a.mov(dword_ptr(at::PD + 16), 0x60_0087)?;
            a.invlpg(ptr(0x5f_f000))?; // another 4 KiB of the same large page
            a.mov(rdi, qword_ptr(0x40_0010))?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RSI], s.gpr[gpr::RDI]), (4, 6));
    });
}

#[test]
fn address_spaces_and_their_translations() {
    each(|mut g| {
        let mut s = g.long();
        s.cr4 |= PCIDE | PGE;
        s.cr3 |= 1;
        // A second set of tables where PAGE is SECOND; the kernel half is shared.
        let (pml4, pdpt, pd, pt) = (0x30_0000, 0x30_1000, 0x30_2000, 0x30_3000);
        g.put64(pml4, pdpt | 7);
        g.put64(pdpt, pd | 7);
        g.put64(pd, pt | 7);
        for n in 0..512 {
            g.put64(pt + n * 8, n << 12 | 7);
        }
        g.put64(pt + (PAGE >> 12) * 8, SECOND | 7);
        g.put64(pte(PAGE), FIRST | 7);
        g.put64(FIRST, 1);
        g.put64(SECOND, 2);
        g.put64(at::DATA, 99);
        let keep = 1u64 << 63;
        g.code(64, at::CODE, |a| {
            a.mov(rbx, PAGE)?;
            a.mov(rsi, qword_ptr(rbx))?;
            a.mov(rax, pml4 | 2)?;
            a.mov(cr3, rax)?;
            a.mov(rdi, qword_ptr(rbx))?;
            a.mov(rax, at::PML4 | 1 | keep)?;
            a.mov(cr3, rax)?;
            a.mov(r8, qword_ptr(rbx))?;
            // INVPCID of one address in the other space; then change its entry and look.
            a.mov(dword_ptr(pt + (PAGE >> 12) * 8), FIRST as u32 | 7)?;
            a.mov(qword_ptr(at::DATA), 2)?;
            a.mov(qword_ptr(at::DATA + 8), rbx)?;
            a.xor(eax, eax)?;
            a.invpcid(rax, xmmword_ptr(at::DATA))?;
            a.mov(rax, pml4 | 2 | keep)?;
            a.mov(cr3, rax)?;
            a.mov(r9, qword_ptr(rbx))?;
            a.mov(r10, cr3)?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!([s.gpr[gpr::RSI], s.gpr[gpr::RDI], s.gpr[8], s.gpr[9]], [1, 2, 1, 1]);
        assert_eq!(s.gpr[10], pml4 | 2, "bit 63 is not kept");
    });
}

#[test]
fn global_pages_go_with_invlpg_and_pge() {
    each(|mut g| {
        let mut s = g.long();
        s.cr4 |= PGE;
        g.put64(pte(PAGE), FIRST | 7 | G);
        g.put64(FIRST, 1);
        g.put64(SECOND, 2);
        g.code(64, at::CODE, |a| {
            a.mov(rbx, PAGE)?;
            a.mov(rsi, qword_ptr(rbx))?;
            a.mov(dword_ptr(pte(PAGE)), (SECOND | 7 | G) as u32)?;
            a.mov(rax, cr4)?;
            a.xor(eax, PGE as i32)?;
            a.mov(cr4, rax)?;
            a.mov(rdi, qword_ptr(rbx))?;
            done(a)
        });
        let s = g.run(&s);
        assert_eq!((s.gpr[gpr::RSI], s.gpr[gpr::RDI]), (1, 2));
    });
}

#[test]
fn an_access_over_two_pages_happens_whole_or_not_at_all() {
    each(|mut g| {
        let mut s = g.long();
        g.put64(pte(PAGE), FIRST | 7);
        g.put64(pte(PAGE + 0x1000), 0);
        g.put64(FIRST + 0xff8, 0x5555_5555_5555_5555);
        g.code(64, at::CODE, |a| {
            a.mov(qword_ptr(rbx), rax)?;
            done(a)
        });
        s.gpr[gpr::RBX] = PAGE + 0xffc;
        let (v, t) = g.fault(&s);
        assert_eq!((v, t.cr2), (14, PAGE + 0x1000));
        assert_eq!(g.get64(FIRST + 0xff8), 0x5555_5555_5555_5555);
        // With the page there, the halves go to different frames.
        g.put64(pte(PAGE + 0x1000), SECOND | 7);
        s.gpr[gpr::RAX] = 0x8877_6655_4433_2211;
        g.run(&s);
        assert_eq!((g.get32(FIRST + 0xffc), g.get32(SECOND)), (0x4433_2211, 0x8877_6655));
        // A locked one too.
        g.code(64, at::CODE, |a| {
            a.lock().add(qword_ptr(rbx), 1)?;
            done(a)
        });
        g.memory.write_obj(FIRST + 0xffc, &u32::MAX).unwrap();
        let t = g.run(&s);
        assert_eq!((g.get32(FIRST + 0xffc), g.get32(SECOND)), (0, 0x8877_6656));
        assert_ne!(t.rflags & 0x80, 0);
    });
}

#[test]
fn string_instructions_stop_where_the_fault_is() {
    each(|mut g| {
        let mut s = g.long();
        g.put64(pte(PAGE), FIRST | 7);
        g.put64(pte(PAGE + 0x1000), 0);
        g.code(64, at::CODE, |a| {
            a.rep().stosd()?;
            done(a)
        });
        s.gpr[gpr::RDI] = PAGE + 0xff0;
        s.gpr[gpr::RCX] = 100;
        let (v, s) = g.fault(&s);
        assert_eq!((v, s.cr2), (14, PAGE + 0x1000));
        assert_eq!((s.gpr[gpr::RDI], s.gpr[gpr::RCX]), (PAGE + 0x1000, 96));
    });
}

#[test]
fn two_level_paging_with_large_pages() {
    each(|mut g| {
        let mut s = g.protected();
        let (pd, pt) = (0x30_0000u64, 0x30_1000u64);
        let put = |at: u64, v: u32| g.memory.write_obj(at, &v).unwrap();
        put(pd, pt as u32 | 7);
        put(pd + 4, 0x87); // 4 MiB at 0 again
        for n in 0..1024 {
            put(pt + n * 4, (n as u32) << 12 | 7);
        }
        put(pt + (PAGE >> 12) * 4, FIRST as u32 | 5);
        s.cr0 |= 1 << 31 | 1 << 16;
        s.cr3 = pd;
        s.cr4 = 1 << 4;
        put(FIRST, 0x1234);
        g.code(32, at::CODE, |a| {
            a.mov(eax, dword_ptr(PAGE))?;
            a.mov(ebx, dword_ptr(0x40_0000 + FIRST))?;
            a.mov(dword_ptr(PAGE), eax)?;
            done(a)
        });
        let (v, s) = g.fault(&s);
        assert_eq!((v, s.cr2), (14, PAGE));
        assert_eq!((s.gpr[gpr::RBX], g.get32(s.gpr[gpr::RSP] + 4)), (0x1234, 3));
    });
}

#[test]
fn pae_paging() {
    each(|mut g| {
        let mut s = g.protected();
        let (pdpt, pd, pt) = (0x30_0020u64, 0x30_1000u64, 0x30_2000u64);
        g.put64(pdpt, pd | 1);
        g.put64(pdpt + 24, pd | 1); // at 3 GiB again
        g.put64(pd, pt | 7);
        g.put64(pd + 8, 0x20_0087);
        for n in 0..512 {
            g.put64(pt + n * 8, n << 12 | 7);
        }
        g.put64(pt + (PAGE >> 12) * 8, FIRST | 7 | NX);
        s.cr0 |= 1 << 31;
        s.cr3 = pdpt;
        s.cr4 = 1 << 5;
        s.efer = 1 << 11;
        g.put64(FIRST, 0x77);
        g.code(32, at::CODE, |a| {
            a.mov(eax, dword_ptr(0xc000_0000u64 + PAGE))?;
            a.mov(ebx, PAGE as u32)?;
            a.jmp(ebx)
        });
        let (v, s) = g.fault(&s);
        assert_eq!((v, s.cr2, s.gpr[gpr::RBX]), (14, PAGE, PAGE));
        assert_eq!((g.get32(s.gpr[gpr::RSP]), g.get32(s.gpr[gpr::RSP] + 4)), (0x77, 0x11));
    });
}

#[test]
fn paging_structures_that_are_not_memory() {
    each(|mut g| {
        let s = g.long();
        g.put64(at::PDPT + 16, 0x3000_0000 | 7); // nothing there: reads as ones, so reserved bits are set
        g.code(64, at::CODE, |a| {
            a.mov(rbx, 0x8000_0000u64)?;
            a.mov(rax, qword_ptr(rbx))?;
            done(a)
        });
        let (v, s) = g.fault(&s);
        assert_eq!((v, g.frame(&s, 0)), (14, 9));
    });
}
