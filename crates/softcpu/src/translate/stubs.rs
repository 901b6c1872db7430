//! The fixed pieces of code: in, out, slow paths, look-up.

use super::asm::{Asm, Label, Mem, Rm, cond, host, op};
use super::branch::lookup;
use super::cache::Fixed;
use super::layout::*;
use crate::native::features::Host;
use std::mem::offset_of;

/// Why translated code was left; what the code at [`Fixed::enter`] returns.
#[allow(missing_docs)]
pub mod exit {
    /// Through the link whose number is the argument.
    pub const LINK: u32 = 0;
    /// To the guest address in the argument, to be looked up.
    pub const LOOKUP: u32 = 1;
    /// To the guest address in the argument, for the interpreter.
    pub const AT: u32 = 2;
    /// To the guest address in the argument, because signals are pending.
    pub const POLL: u32 = 3;
    /// With what the slow path says.
    pub const NEXT: u32 = 4;
}

/// Builds them for an address.
pub fn build(base: u64) -> (Vec<u8>, Fixed) {
    let mut a = Asm { buf: Vec::new(), base };
    let mut f = Fixed::default();
    let wide = Host::get().has_avx();
    let here = |a: &mut Asm| {
        while !a.here().is_multiple_of(16) {
            a.bytes(&[0xcc]);
        }
        base + a.here() as u64
    };

    // Common way out; EAX is the reason, RCX the argument.
    let leave = here(&mut a);
    a.store(Rm::Gs(ARGUMENT), host::RCX);
    store_registers(&mut a);
    let mut plain = Label::default();
    a.cmp8_imm(Rm::Gs(VECTORS), 0);
    a.jcc_label(cond::E, &mut plain);
    vectors(&mut a, true, wide);
    a.rm(false, &[0xc6], 0, Rm::Gs(VECTORS)); // mov byte, 0
    a.bytes(&[0]);
    a.bind(&plain);
    a.load(host::RSP, Rm::Gs(HOST_RSP));
    a.lea(host::RSP, Mem::base(host::RSP, 8));
    // pop r15, r14, r13, r12, rbp, rbx; ret
    a.bytes(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);

    let reason = |a: &mut Asm, why: u32| {
        let at = here(a);
        a.mov_imm(host::RAX, u64::from(why));
        a.jmp(leave);
        at
    };
    f.exit_link = reason(&mut a, exit::LINK);
    f.lookup_miss = reason(&mut a, exit::LOOKUP);
    f.exit_at = reason(&mut a, exit::AT);
    f.exit_poll = reason(&mut a, exit::POLL);
    f.exit_next = reason(&mut a, exit::NEXT);

    f.exit_link_flags = here(&mut a);
    a.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x66]); // lahf; seto al
    a.rm(false, &[0x89], host::RAX, Rm::Gs(CC));
    a.jmp(f.exit_link);

    // A return that the host's stack did not foresee, or one more than it holds.
    f.base_return = here(&mut a);
    a.mov_imm(host::RAX, f.base_return);
    a.bytes(&[0x50]); // push rax
    f.lookup = base + a.here() as u64;
    // Loops that consist of such returns alone must see signals.
    let mut pending = Label::default();
    a.load(host::RAX, Rm::Gs(SIGNALS));
    a.alu_imm(op::CMP, false, Rm::Mem(Mem::base(host::RAX, 0)), 0);
    a.jcc_label(cond::NE, &mut pending);
    lookup(&mut a, f.lookup_miss);
    a.bind(&pending);
    a.jmp(f.exit_poll);

    // enter(entry): called as a function of the System V ABI. The stack is aligned after six pushes and eight bytes.
    f.enter = here(&mut a);
    a.bytes(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
    a.lea(host::RSP, Mem::base(host::RSP, -8));
    a.store(Rm::Gs(HOST_RSP), host::RSP);
    a.mov_imm(host::RAX, f.base_return);
    a.store(Rm::Gs(BASE_RETURN), host::RAX);
    a.bytes(&[0x50]); // push rax
    a.mov(host::RAX, host::RDI);
    load_registers(&mut a);
    a.bytes(&[0xff, 0xe0]); // jmp rax

    // The slow path: RAX is the number of the site, RCX the linear address.
    f.slow = here(&mut a);
    a.store(Rm::Gs(ARGUMENT), host::RAX);
    a.store(Rm::Gs(LINEAR), host::RCX);
    store_registers(&mut a);
    let mut plain = Label::default();
    a.cmp8_imm(Rm::Gs(VECTORS), 0);
    a.jcc_label(cond::E, &mut plain);
    vectors(&mut a, true, wide);
    a.bind(&plain);
    a.store(Rm::Gs(SAVED_RSP), host::RSP);
    a.alu_imm(op::AND, true, Rm::Reg(host::RSP), -16);
    a.load(host::RDI, Rm::Gs(offset_of!(crate::Cpu, jit) + offset_of!(super::State, me)));
    a.mov_imm(host::RAX, super::run::slow as *const () as u64);
    a.bytes(&[0xff, 0xd0]); // call rax
    a.load(host::RSP, Rm::Gs(SAVED_RSP));
    let mut plain = Label::default();
    a.cmp8_imm(Rm::Gs(VECTORS), 0);
    a.jcc_label(cond::E, &mut plain);
    vectors(&mut a, false, wide);
    a.bind(&plain);
    load_registers(&mut a);
    a.rm(false, &[0x0f, 0xb7], host::RAX, Rm::Gs(CC));
    a.bytes(&[0x04, 0x7f, 0x9e]); // add al, 127; sahf
    a.rm(false, &[0xff], 4, Rm::Gs(TARGET));

    // Continues elsewhere with an empty stack of return addresses. All registers and flags are the guest's.
    f.fresh = here(&mut a);
    a.load(host::RSP, Rm::Gs(HOST_RSP));
    a.rm(false, &[0xff], 6, Rm::Gs(BASE_RETURN)); // push
    a.rm(false, &[0xff], 4, Rm::Gs(FRESH));

    for write in [false, true] {
        for size in 0..8 {
            let at = here(&mut a);
            f.stack[usize::from(write)][size] = at;
            stack(&mut a, write, 1 << size, f.slow);
        }
    }
    (a.buf, f)
}

/// Looks up a stack access at RCX; RAX is the number of its site. Returns the addend in RAX, or goes to the slow path. A
/// page that may be written is remembered.
fn stack(a: &mut Asm, write: bool, size: i32, slow: u64) {
    let (mut readable, mut fail) = (Label::default(), Label::default());
    a.store(Rm::Gs(ARGUMENT), host::RAX);
    a.store(Rm::Gs(LINEAR), host::RCX);
    a.load32(host::RAX, Rm::Reg(host::RCX));
    a.shr32(host::RAX, 12 - TLB_SHIFT);
    a.rm(false, &[0x23], host::RAX, Rm::Gs(TLB_MASK)); // and
    a.alu(op::ADD, host::RAX, Rm::Gs(TLB));
    a.lea(host::RCX, Mem::base(host::RCX, size - 1));
    a.alu_imm(op::AND, true, Rm::Reg(host::RCX), -4096);
    a.alu(op::CMP, host::RCX, Rm::Mem(Mem::base(host::RAX, TLB_WRITE)));
    a.jcc_label(cond::NE, if write { &mut fail } else { &mut readable });
    a.store(Rm::Gs(STACK_PAGE), host::RCX);
    a.load(host::RAX, Rm::Mem(Mem::base(host::RAX, TLB_ADDEND)));
    a.store(Rm::Gs(STACK_ADDEND), host::RAX);
    a.bytes(&[0xc3]);
    if !write {
        a.bind(&readable);
        a.alu(op::CMP, host::RCX, Rm::Mem(Mem::base(host::RAX, TLB_READ)));
        a.jcc_label(cond::NE, &mut fail);
        a.load(host::RAX, Rm::Mem(Mem::base(host::RAX, TLB_ADDEND)));
        a.bytes(&[0xc3]);
    }
    a.bind(&fail);
    a.lea(host::RSP, Mem::base(host::RSP, 8));
    a.load(host::RAX, Rm::Gs(ARGUMENT));
    a.load(host::RCX, Rm::Gs(LINEAR));
    a.jmp(slow);
}

fn store_registers(a: &mut Asm) {
    for (n, h) in HOST.iter().enumerate() {
        if let Some(h) = h {
            a.store(Rm::Gs(gpr(n)), *h);
        }
    }
}

fn load_registers(a: &mut Asm) {
    for (n, h) in HOST.iter().enumerate() {
        if let Some(h) = h {
            a.load(*h, Rm::Gs(gpr(n)));
        }
    }
}

/// Stores or loads all vector registers; after storing, upper halves are clean as Rust code likes them.
fn vectors(a: &mut Asm, store: bool, wide: bool) {
    let opcode = if store { 0x29 } else { 0x28 };
    for n in 0..16u8 {
        if wide {
            // gs vmovaps ymm, [disp32]
            let disp = super::layout::gs_disp(vector(n as usize)).to_le_bytes();
            let two = if n < 8 { 0xfc } else { 0x7c };
            a.bytes(&[0x65, 0xc5, two, opcode, (n & 7) << 3 | 4, 0x25]);
            a.bytes(&disp);
        } else {
            a.rm(false, &[0x0f, opcode], n, Rm::Gs(vector(n as usize)));
        }
    }
    if wide && store {
        a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
}
