//! What user code cannot be used to test: control registers that gate the floating-point and vector units, the
//! privileged members of the XSAVE family, and state kept across runs and vCPUs.
#![allow(clippy::unwrap_used)] // what must not fail, panics

mod common;

use accel::state::{Segment, Table, gpr, seg};
use accel::{CpuState, Exit};
use common::{Bare, NONE};
use iced_x86::code_asm::*;

const RAM: u64 = 4 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const HANDLERS: u64 = 0x7000;
const STACK: u64 = 0x1_0000;
const CODE: u64 = 0x2_0000;
const DATA: u64 = 0x3_0000;
/// Port that says that the code came to its end.
const DONE: u32 = 0x80;

const MP: u64 = 1 << 1;
const EM: u64 = 1 << 2;
const TS: u64 = 1 << 3;
const NE: u64 = 1 << 5;
const OSFXSR: u64 = 1 << 9;
const OSXMMEXCPT: u64 = 1 << 10;
const OSXSAVE: u64 = 1 << 18;

const UD: u32 = 6;
const NM: u32 = 7;
const GP: u32 = 13;
const MF: u32 = 16;
const XM: u32 = 19;

/// A guest in 64-bit mode at CPL 0 (or 3), with 4 MiB mapped one to one.
struct Guest {
    bare: Bare,
    state: CpuState,
}

impl Guest {
    fn new() -> Self {
        let bare = Bare::new(RAM, softcpu::SoftSpec::default());
        let put = |at: u64, value: u64| bare.memory.write_obj(at, &value).unwrap();
        put(PML4, PDPT | 7);
        put(PDPT, PD | 7);
        for n in 0..2 {
            put(PD + n * 8, n << 21 | 0x87);
        }
        put(GDT + 0x08, 0x00af_9b00_0000_ffff);
        put(GDT + 0x28, 0x00cf_f300_0000_ffff);
        put(GDT + 0x30, 0x00af_fb00_0000_ffff);
        for v in 0..32 {
            let at = HANDLERS + v * 16;
            bare.memory.write(at, &[0xe6, v as u8, 0xeb, 0xfe]).unwrap();
            put(IDT + v * 16, at & 0xffff | 8 << 16 | 0x8e << 40 | (at >> 16) << 48);
        }
        put(TSS + 4, STACK);
        let segment = |selector, attributes| Segment { selector, base: 0, limit: u32::MAX, attributes };
        let mut state = CpuState {
            rip: CODE,
            rflags: 2,
            cr0: 0x8001_0013 | NE | MP,
            cr3: PML4,
            cr4: 1 << 5 | OSFXSR | OSXMMEXCPT | OSXSAVE,
            efer: 1 << 8 | 1 << 10,
            apic_base: 0xfee0_0900,
            xcr0: 7,
            dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            gdtr: Table { base: GDT, limit: 0x3f },
            idtr: Table { base: IDT, limit: 0x1ff },
            tr: Segment { selector: 0, base: TSS, limit: 0x67, attributes: 0x8b },
            ldtr: Segment { attributes: Segment::UNUSABLE, ..Default::default() },
            xsave: vec![0; 832],
            ..Default::default()
        };
        let data = segment(0x10, 0xc093);
        state.segments = [data, segment(0x08, 0xa09b), data, data, data, data];
        state.gpr[gpr::RSP] = STACK;
        state.gpr[gpr::RBX] = DATA;
        state.xsave[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        state.xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        state.xsave[512] = 7;
        Self { bare, state }
    }

    /// Runs code from the state as it is; the exception that ended it, or [`DONE`]. The state is the one afterwards.
    fn run(&mut self, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u32 {
        let mut a = CodeAssembler::new(64).unwrap();
        code(&mut a).unwrap();
        a.db(&[0xe6, DONE as u8, 0xeb, 0xfe]).unwrap();
        self.bare.memory.write(CODE, &a.assemble(CODE).unwrap()).unwrap();
        self.state.rip = CODE;
        self.state.gpr[gpr::RSP] = STACK;
        self.bare.vcpu.load(&self.state).unwrap();
        self.resume()
    }

    /// Goes on with what the vCPU holds.
    fn resume(&mut self) -> u32 {
        self.bare.ports.clear();
        let exit = self.bare.vcpu.run(&self.bare.ports).unwrap();
        assert_eq!(exit, Exit::Kicked);
        assert_ne!(self.bare.ports.last(), NONE);
        self.state = self.bare.vcpu.save().unwrap();
        self.bare.ports.last()
    }

    /// As [`Self::run`], and forgets what it did to the state.
    fn try_run(&mut self, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u32 {
        let before = self.state.clone();
        let r = self.run(code);
        self.state = before;
        r
    }

    fn word(&self, at: u64) -> u64 {
        self.bare.memory.read_obj(DATA + at).unwrap()
    }
}

/// One instruction of each unit.
type Instruction = fn(&mut CodeAssembler) -> Result<(), IcedError>;
const X87: Instruction = |a| a.fld1();
const MMX: Instruction = |a| a.paddb(mm0, mm1);
const SSE: Instruction = |a| a.addps(xmm0, xmm1);
const AVX: Instruction = |a| a.vaddps(ymm0, ymm1, ymm2);
const FXSAVE: Instruction = |a| a.fxsave(ptr(rbx));
const XSAVE: Instruction = |a| a.xsave(ptr(rbx));

#[test]
fn control_registers_gate_the_units() {
    let mut g = Guest::new();
    let all = [X87, MMX, SSE, AVX, FXSAVE, XSAVE];
    let mut check = |name: &str, change: &dyn Fn(&mut CpuState), expected: [u32; 6]| {
        let before = g.state.clone();
        change(&mut g.state);
        assert_eq!(all.map(|i| g.try_run(i)), expected, "{name}");
        g.state = before;
    };
    check("all on", &|_| {}, [DONE; 6]);
    check("CR0.TS", &|s| s.cr0 |= TS, [NM; 6]);
    check("CR0.EM", &|s| s.cr0 |= EM, [NM, UD, UD, DONE, NM, DONE]);
    check("no CR4.OSFXSR", &|s| s.cr4 &= !OSFXSR, [DONE, DONE, UD, DONE, DONE, DONE]);
    check("no CR4.OSXSAVE", &|s| s.cr4 &= !OSXSAVE, [DONE, DONE, DONE, UD, DONE, UD]);
    check("XCR0 without AVX", &|s| s.xcr0 = 3, [DONE, DONE, DONE, UD, DONE, DONE]);
}

#[test]
fn clts_opens_the_units_again() {
    let mut g = Guest::new();
    g.state.cr0 |= TS;
    assert_eq!(g.try_run(SSE), NM);
    let r = g.run(|a| {
        a.clts()?;
        a.addps(xmm0, xmm1)?;
        a.fld1()?;
        a.mov(rax, cr0)?;
        a.or(rax, TS as i32)?;
        a.mov(cr0, rax)?;
        a.addps(xmm0, xmm1)
    });
    assert_eq!(r, NM);
}

#[test]
fn wait_looks_at_mp_and_ts() {
    let mut g = Guest::new();
    g.state.cr0 |= TS;
    assert_eq!(g.try_run(|a| a.wait()), NM);
    g.state.cr0 &= !MP;
    assert_eq!(g.try_run(|a| a.wait()), DONE);
}

/// 1 / 0 with the exception unmasked, then a waiting instruction.
fn divide_by_zero(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(word_ptr(rbx), 0x37b)?;
    a.fldcw(word_ptr(rbx))?;
    a.fld1()?;
    a.fldz()?;
    a.fdivp(st1, st0)?;
    a.fnstsw(ax)?;
    a.mov(word_ptr(rbx + 8), ax)?;
    a.fld1()
}

#[test]
fn x87_exceptions_wait_for_the_next_instruction() {
    let mut g = Guest::new();
    assert_eq!(g.run(divide_by_zero), MF);
    // ES and ZE were there before the instruction that faulted.
    assert_eq!(g.word(8) & 0x84, 0x84);
    let mut g = Guest::new();
    // Without CR0.NE nobody is told.
    g.state.cr0 &= !NE;
    assert_eq!(g.run(divide_by_zero), DONE);
}

#[test]
fn unmasked_sse_exceptions_need_osxmmexcpt() {
    let divide: Instruction = |a| a.divss(xmm0, xmm1);
    let mut g = Guest::new();
    g.state.xsave[24..28].copy_from_slice(&0x1d80u32.to_le_bytes()); // division by zero unmasked
    g.state.xsave[160..164].copy_from_slice(&1.0f32.to_bits().to_le_bytes());
    assert_eq!(g.try_run(divide), XM);
    g.state.cr4 &= !OSXMMEXCPT;
    assert_eq!(g.try_run(divide), UD);
}

fn xsetbv(g: &mut Guest, index: u32, value: u64) -> u32 {
    g.run(|a| {
        a.mov(ecx, index)?;
        a.mov(rax, value)?;
        a.mov(rdx, value >> 32)?;
        a.xsetbv()
    })
}

#[test]
fn xsetbv_takes_what_there_is() {
    let mut g = Guest::new();
    for bad in [0, 2, 5, 0xf, 0xe7, 1 << 63 | 7] {
        assert_eq!(xsetbv(&mut g, 0, bad), GP, "{bad:#x}");
    }
    assert_eq!(xsetbv(&mut g, 1, 7), GP);
    for good in [1, 3, 7] {
        assert_eq!(xsetbv(&mut g, 0, good), DONE);
        assert_eq!(g.state.xcr0, good);
        // CPUID shows the size of what is enabled.
        let r = g.run(|a| {
            a.mov(eax, 0xd)?;
            a.xor(ecx, ecx)?;
            a.push(rbx)?;
            a.cpuid()?;
            a.mov(r8, rbx)?;
            a.pop(rbx)
        });
        assert_eq!((r, g.state.gpr[8]), (DONE, if good == 7 { 832 } else { 576 }));
    }
}

#[test]
fn cpuid_shows_osxsave() {
    let mut g = Guest::new();
    let osxsave = |g: &mut Guest| {
        let r = g.run(|a| {
            a.mov(eax, 1)?;
            a.push(rbx)?;
            a.cpuid()?;
            a.pop(rbx)
        });
        assert_eq!(r, DONE);
        g.state.gpr[gpr::RCX] >> 27 & 1
    };
    assert_eq!(osxsave(&mut g), 1);
    g.state.cr4 &= !OSXSAVE;
    assert_eq!(osxsave(&mut g), 0);
}

#[test]
fn xsaves_and_xrstors() {
    let mut g = Guest::new();
    let masks: Instruction = |a| {
        a.mov(eax, -1)?;
        a.mov(edx, -1)
    };
    let r = g.run(|a| {
        masks(a)?;
        a.pcmpeqd(xmm3, xmm3)?;
        a.xsaves(ptr(rbx))?;
        a.pxor(xmm3, xmm3)?;
        a.xrstors(ptr(rbx))?;
        a.movq(r8, xmm3)
    });
    assert_eq!((r, g.state.gpr[8]), (DONE, u64::MAX));
    // Only SSE was in use; every component has its place in the format.
    assert_eq!((g.word(512), g.word(520)), (2, 1 << 63 | 7));
    // The standard format is not for XRSTORS.
    g.bare.memory.write_obj(DATA + 520, &0u64).unwrap();
    let restore: Instruction = |a| a.xrstors(ptr(rbx));
    assert_eq!(g.try_run(restore), GP);
    // User code may not.
    g.bare.memory.write_obj(DATA + 520, &(1u64 << 63 | 7)).unwrap();
    assert_eq!(g.try_run(restore), DONE);
    user(&mut g);
    assert_eq!(g.try_run(restore), GP);
    assert_eq!(g.try_run(|a| a.xsaves(ptr(rbx))), GP);
    assert_eq!(g.try_run(|a| a.xsetbv()), GP);
}

/// Makes the state one of user code.
fn user(g: &mut Guest) {
    g.state.segments[seg::CS] = Segment { selector: 0x33, base: 0, limit: u32::MAX, attributes: 0xa0fb };
    let data = Segment { selector: 0x2b, base: 0, limit: u32::MAX, attributes: 0xc0f3 };
    for s in [seg::SS, seg::DS, seg::ES] {
        g.state.segments[s] = data;
    }
    // So that OUT, with which code says that it is done, is allowed.
    g.state.rflags |= 3 << 12;
}

/// The x87 and MXCSR state that lives in the host's units while a vCPU runs survives leaving and coming back, moving to
/// another vCPU, and another vCPU running on the same thread in between.
#[test]
fn state_survives_runs() {
    let begin: Instruction = |a| {
        a.mov(dword_ptr(rbx), 0x7f80)?; // round towards zero
        a.ldmxcsr(dword_ptr(rbx))?;
        a.fldpi()?;
        a.fld1()?;
        a.mov(eax, 0x3f80_0000)?;
        a.movd(xmm1, eax)?;
        a.mov(eax, 0x4040_0000)?;
        a.movd(xmm2, eax)?;
        a.divss(xmm1, xmm2) // inexact
    };
    let end: Instruction = |a| {
        a.stmxcsr(dword_ptr(rbx))?;
        a.faddp(st1, st0)?;
        a.fstp(tbyte_ptr(rbx + 16))
    };
    let mut whole = Guest::new();
    assert_eq!(
        whole.run(|a| {
            begin(a)?;
            end(a)
        }),
        DONE
    );
    let mut first = Guest::new();
    assert_eq!(first.run(begin), DONE);
    let mut other = Guest::new();
    assert_eq!(other.run(divide_by_zero), MF);
    let mut second = Guest::new();
    second.state = first.state.clone();
    assert_eq!(second.run(end), DONE);
    for at in [0, 16, 24] {
        assert_eq!(second.word(at) & 0xffff_ffff, whole.word(at) & 0xffff_ffff);
    }
    assert_eq!(second.word(0) as u32, 0x7fa0);
    // Rust still rounds to nearest.
    assert_eq!((std::hint::black_box(1.0f32) / 3.0).to_bits(), 0x3eaa_aaab);
}
