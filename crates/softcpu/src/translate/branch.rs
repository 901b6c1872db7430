//! Branches: links between blocks, look-up of computed targets, calls and returns.
//!
//! A guest call is a call of the host as well: the host's stack holds the address of code that continues after the
//! call. A guest return takes the guest's return address from the guest's stack into RCX and returns on the host; the code
//! there compares RCX with the address it was made for, and looks RCX up if it is another. So the host's own return
//! prediction serves the guest. The stack of such addresses is dropped whenever translated code is left.

use super::asm::{Label, Mem, Rm, cond, host, op};
use super::cache::{JUMP_BITS, JUMP_SHIFT};
use super::emit::{Done, Emitter, Flags, NewLink, Reach, Stub};
use super::layout::{BRANCH, DEPTH_LIMIT, JUMPS, KEY, SPILL};
use super::operand::number;
use super::scan::{ALL, Inst};
use super::stack::{Pushed, RSP, stack_register};
use iced_x86::OpKind;

/// Emits the look-up of the guest address in RCX, and a jump to the block there. Flags are in [`crate::Cpu::cc`].
pub(super) fn lookup(asm: &mut super::asm::Asm, fixed_miss: u64) {
    let mut miss = Label::default();
    let mut other = Label::default();
    asm.load32(host::RAX, Rm::Reg(host::RCX));
    asm.shr32(host::RAX, 12);
    asm.rm(false, &[0x33], host::RAX, Rm::Reg(host::RCX)); // xor eax, ecx
    asm.alu_imm(op::AND, false, Rm::Reg(host::RAX), (1 << JUMP_BITS) - 1);
    asm.rm(false, &[0xc1], 4, Rm::Reg(host::RAX)); // shl eax
    asm.bytes(&[JUMP_SHIFT]);
    asm.alu(op::ADD, host::RAX, Rm::Gs(JUMPS));
    asm.alu(op::CMP, host::RCX, Rm::Mem(Mem::base(host::RAX, 0)));
    asm.jcc_label(cond::NE, &mut miss);
    asm.load(host::RCX, Rm::Gs(KEY));
    asm.alu(op::CMP, host::RCX, Rm::Mem(Mem::base(host::RAX, 8)));
    asm.jcc_label(cond::NE, &mut other);
    asm.rm(false, &[0xff], 4, Rm::Mem(Mem::base(host::RAX, 16))); // jmp [rax + 16]
    asm.bind(&other);
    asm.load(host::RCX, Rm::Mem(Mem::base(host::RAX, 0)));
    asm.bind(&miss);
    asm.jmp(fixed_miss);
}

impl Emitter<'_> {
    fn reach(&self, target: u64) -> Reach {
        if (target ^ self.ip) >> 12 == 0 {
            Reach::Page
        } else if self.global {
            Reach::Global
        } else {
            Reach::Slot
        }
    }

    fn new_link(&mut self, target: u64, reach: Reach) -> usize {
        let host_flags = self.flags != Flags::Saved;
        self.links.push(NewLink { at: 0, target, reach, host_flags, stub: 0 });
        self.links.len() - 1
    }

    /// A jump (`opcode` is that of JMP, CALL or, in two bytes, Jcc) with a relative offset that is a link.
    fn link_here(&mut self, opcode: &[u8], target: u64, reach: Reach) {
        let link = self.new_link(target, reach);
        let mut from = Label::default();
        match opcode {
            [0xe9] => self.asm.jmp_label(&mut from),
            [0xe8] => self.asm.call_label(&mut from),
            [_, c] => self.asm.jcc_label(c & 15, &mut from),
            _ => unreachable!("only branches"),
        }
        self.links[link].at = self.asm.here() - 4;
        self.stubs.push(Stub::Exit { from, link });
    }

    /// Goes through a slot: a key and an address. `call`: with a call of the host.
    fn link_slot(&mut self, target: u64, live: u8, call: bool) {
        self.clobber(live);
        let link = self.new_link(target, Reach::Slot);
        let (mut slot, mut from) = (Label::default(), Label::default());
        self.asm.load(host::RAX, Rm::Gs(KEY));
        self.asm.rip_label(true, &[0x3b], host::RAX, &mut slot); // cmp rax, [slot]
        self.asm.jcc_label(cond::NE, &mut from);
        // The label is bound to the slot's start; the address follows the key.
        self.asm.rip_label_plus8(&[0xff], if call { 2 } else { 4 }, &mut slot);
        self.stubs.push(Stub::Exit { from, link });
        self.slots.push((slot, link));
    }

    /// Continues at a guest address.
    pub(super) fn link_jump(&mut self, target: u64, live: u8) {
        match self.reach(target) {
            Reach::Slot => self.link_slot(target, live, false),
            reach => self.link_here(&[0xe9], target, reach),
        }
    }

    pub(super) fn jcc(&mut self, inst: &Inst) -> Done {
        self.require();
        let target = inst.i.near_branch_target();
        let code = inst.i.condition_code() as u8;
        // iced counts O, NO, B, AE, E, NE, BE, A, S, NS, P, NP, L, GE, LE, G from 1, as the processor does from 0.
        let code = code - 1;
        match self.reach(target) {
            Reach::Slot => {
                let mut around = Label::default();
                self.asm.jcc_label(code ^ 1, &mut around);
                let flags = self.flags;
                self.link_slot(target, inst.live_out, false);
                self.asm.bind(&around);
                self.flags = flags;
            }
            reach => self.link_here(&[0x0f, 0x80 | code], target, reach),
        }
        Ok(())
    }

    pub(super) fn jump(&mut self, inst: &Inst) -> Done {
        self.link_jump(inst.i.near_branch_target(), inst.live_out);
        Ok(())
    }

    /// A branch to a non-canonical address in RCX faults where it is, and changes nothing. Uses RAX and the host's flags.
    fn canonical_target(&mut self, inst: &Inst) {
        if self.narrow {
            return;
        }
        self.asm.mov(host::RAX, host::RCX);
        self.asm.shl64(host::RAX, 16);
        self.asm.rm(true, &[0xc1], 7, Rm::Reg(host::RAX)); // sar rax, 16
        self.asm.bytes(&[16]);
        self.asm.alu(op::CMP, host::RAX, Rm::Reg(host::RCX));
        self.interpret_if(cond::NE, &inst.i);
    }

    /// The target of an indirect branch into RCX.
    fn target(&mut self, inst: &Inst) -> Done {
        if inst.i.op_kind(0) == OpKind::Memory {
            let m = self.operand(inst, false, 1, host::RAX)?;
            self.load_word(host::RCX, Rm::Mem(m));
        } else {
            let n = number(inst.i.op_register(0));
            let r = self.hold(n, host::RCX);
            if r != host::RCX {
                self.load_word(host::RCX, Rm::Reg(r));
            }
            self.clobber(inst.live_in());
        }
        Ok(())
    }

    /// Should the target in RCX not be canonical, the look-up finds the branch to blame by this; `popped` is what it has
    /// added to RSP.
    pub(super) fn blame(&mut self, inst: &Inst, popped: u8) {
        let site = self.site(&inst.i, popped, 1, 0);
        self.asm.rm(true, &[0xc7], 0, Rm::Gs(BRANCH));
        self.asm.bytes(&(site as u32).to_le_bytes());
    }

    pub(super) fn jump_indirect(&mut self, inst: &Inst) -> Done {
        self.target(inst)?;
        self.blame(inst, 0);
        lookup(&mut self.asm, self.fixed.lookup_miss);
        Ok(())
    }

    /// A word as an immediate operand.
    fn constant(&self, v: u64) -> Result<i32, std::num::TryFromIntError> {
        if self.narrow { Ok(v as i32) } else { i32::try_from(v as i64) }
    }

    /// Pushes the return address; its slot has been checked.
    fn push_return(&mut self, inst: &Inst, slot: Mem) {
        let back = inst.i.next_ip();
        let what = match self.constant(back) {
            Ok(v) => Pushed::Constant(v),
            Err(_) => {
                self.asm.mov_imm(host::RCX, back);
                Pushed::Register(host::RCX)
            }
        };
        self.store_push(slot, what);
        let mut from = Label::default();
        self.asm.alu(op::CMP, host::RSP, Rm::Gs(DEPTH_LIMIT));
        self.asm.jcc_label(cond::B, &mut from);
        let back = self.asm.here();
        self.stubs.push(Stub::Shallow { from, back });
    }

    /// The code that the host returns to: RCX is where the guest returns to, flags are in [`crate::Cpu::cc`].
    fn landing(&mut self, inst: &Inst) {
        let back = inst.i.next_ip();
        match self.constant(back) {
            Ok(v) => self.asm.alu_imm(op::CMP, !self.narrow, Rm::Reg(host::RCX), v),
            Err(_) => {
                self.asm.mov_imm(host::RAX, back);
                self.asm.alu(op::CMP, host::RCX, Rm::Reg(host::RAX));
            }
        }
        self.asm.jcc(cond::NE, self.fixed.lookup);
        self.flags = Flags::Saved;
        self.link_jump(back, ALL);
    }

    pub(super) fn call(&mut self, inst: &Inst) -> Done {
        let slot = self.check_push(inst, false)?;
        self.push_return(inst, slot);
        let target = inst.i.near_branch_target();
        match self.reach(target) {
            Reach::Slot => self.link_slot(target, inst.live_out, true),
            reach => self.link_here(&[0xe8], target, reach),
        }
        self.landing(inst);
        Ok(())
    }

    pub(super) fn call_indirect(&mut self, inst: &Inst) -> Done {
        self.target(inst)?;
        self.canonical_target(inst);
        self.asm.store(Rm::Gs(SPILL), host::RCX);
        let slot = self.check_push(inst, inst.i.op_kind(0) == OpKind::Memory)?;
        self.push_return(inst, slot);
        let mut to = Label::default();
        let mut over = Label::default();
        self.asm.load(host::RCX, Rm::Gs(SPILL));
        self.asm.call_label(&mut to);
        self.asm.jmp_label(&mut over);
        self.asm.bind(&to);
        lookup(&mut self.asm, self.fixed.lookup_miss);
        self.asm.bind(&over);
        self.landing(inst);
        Ok(())
    }

    pub(super) fn ret(&mut self, inst: &Inst) -> Done {
        let m = self.check_pop(inst, RSP)?;
        let more = if inst.i.op_count() == 1 { i32::from(inst.i.immediate16()) } else { 0 };
        self.load_word(host::RCX, Rm::Mem(m));
        let word = self.word();
        match u8::try_from(word + more) {
            Ok(popped) => self.blame(inst, popped),
            Err(_) => self.canonical_target(inst),
        }
        let sp = stack_register();
        self.set_stack(Mem::base(sp, word + more));
        self.asm.bytes(&[0xc3]);
        Ok(())
    }
}
