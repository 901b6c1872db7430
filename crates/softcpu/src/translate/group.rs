//! One check for several accesses.
//!
//! Accesses off the same base register that lie close together are nearly always in one page. The first of such a group
//! checks the whole range and keeps the addend; the others just load it. Nothing that happens between them can take the
//! page away: what does is left to the interpreter, and `version` changes with it. If the range crosses into another page
//! the instruction is interpreted, and a block to which that happens often is translated again without groups.
//!
//! Runs of PUSH and POP (and the RET behind them) are checked at once as well; their other way is one by one.

use super::asm::{Label, Mem, Rm, cond, host, op};
use super::emit::{Emitter, Stub};
use super::layout::{GROUP, HOST, STACK_ADDEND, STACK_PAGE, gpr};
use super::memory::{Ea, Shape};
use super::operand::number;
use super::scan::{Inst, Kind};
use super::stack::{RSP, stack_register};
use iced_x86::{Code, Mnemonic, OpAccess, OpKind};

/// Bytes between the ends of a group, at most.
const RANGE: i32 = 128;

/// What an instruction's memory access has to do with those of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Nothing.
    Alone,
    /// It is checked with the following ones: lowest displacement, and length of the range (a power of two).
    First(i32, u8),
    /// It has been checked.
    Member,
}

impl Role {
    /// Whether it is the first of a group.
    pub fn is_first(self) -> bool {
        matches!(self, Role::First(..))
    }
}

/// An access that may be in a group.
#[derive(Clone, Copy)]
struct Access {
    base: usize,
    disp: i32,
    size: i32,
    write: bool,
}

impl Emitter<'_> {
    fn access(&mut self, inst: &Inst) -> Option<Access> {
        let i = &inst.i;
        if !matches!(inst.kind, Kind::Generic | Kind::Vector { align: 1, .. } | Kind::Fp { .. }) {
            return None;
        }
        let k = (0..i.op_count()).find(|k| i.op_kind(*k) == OpKind::Memory)?;
        if i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg {
            return None;
        }
        let ea = Ea::of(i).ok()?;
        let Ea { seg: None, base: Some(base), index: None, disp, absolute: None, .. } = ea else {
            return None;
        };
        HOST[base]?;
        let size = i32::try_from(i.memory_size().size()).ok().filter(|n| (1..=64).contains(n))?;
        let write = !matches!(self.accesses(i)[k as usize], OpAccess::Read | OpAccess::CondRead);
        Some(Access { base, disp, size, write })
    }

    /// Whether a group goes on over an instruction.
    fn transparent(&mut self, inst: &Inst, base: usize) -> bool {
        match inst.kind {
            Kind::Jcc | Kind::Nop => return true,
            Kind::Generic
            | Kind::Lea
            | Kind::ShiftCl
            | Kind::Extend
            | Kind::Vector { .. }
            | Kind::Fp { .. } => {}
            _ => return false,
        }
        let writes = |a: OpAccess| !matches!(a, OpAccess::Read | OpAccess::CondRead | OpAccess::None);
        let access = self.accesses(&inst.i);
        let i = &inst.i;
        let hit = (0..i.op_count()).any(|k| {
            i.op_kind(k) == OpKind::Register
                && i.op_register(k).is_gpr()
                && number(i.op_register(k)) == base
                && writes(access[k as usize])
        });
        let implicit = match inst.kind {
            Kind::Extend => base == 0 || base == 2,
            Kind::Vector { writes_rcx, .. } => writes_rcx && base == 1,
            _ => false,
        };
        !hit && !implicit
    }

    /// The role of each instruction.
    pub(super) fn roles(&mut self, insts: &[Inst]) -> Vec<Role> {
        let mut roles = vec![Role::Alone; insts.len()];
        let mut k = 0;
        while k < insts.len() {
            let Some(first) = self.access(&insts[k]) else {
                k += 1;
                continue;
            };
            let (mut low, mut high) = (first.disp, first.disp.saturating_add(first.size));
            let mut members = Vec::new();
            let mut at = k;
            while self.transparent(&insts[at], first.base) && at + 1 < insts.len() {
                at += 1;
                let Some(a) = self.access(&insts[at]) else { continue };
                if a.base != first.base {
                    continue;
                }
                let (l, h) = (low.min(a.disp), high.max(a.disp.saturating_add(a.size)));
                if a.write && !first.write || h.saturating_sub(l) > RANGE {
                    break;
                }
                (low, high) = (l, h);
                members.push(at);
            }
            let Some(last) = members.last().copied() else {
                k += 1;
                continue;
            };
            roles[k] = Role::First(low, ((high - low) as u32).next_power_of_two() as u8);
            members.iter().for_each(|m| roles[*m] = Role::Member);
            // There is room for one group at a time.
            k = last + 1;
        }
        roles
    }

    /// Checks the range of a group, or uses what was found. `None`: the access is alone.
    pub(super) fn check_group(&mut self, inst: &Inst, ea: &Ea, write: bool, t: u8) -> Option<Mem> {
        if !self.grouped {
            return None;
        }
        match self.role {
            Role::Alone => None,
            Role::Member => {
                self.asm.load(t, Rm::Gs(GROUP));
                Some(self.complete(t, host::RAX + host::RCX - t, ea))
            }
            Role::First(low, size) => {
                let range = Ea { disp: low, ..*ea };
                let shape = Shape { write, size, align: 1, once: false };
                self.role = Role::Alone;
                let r = self.check_range(inst, &range, shape, t);
                self.role = Role::First(low, size);
                r.ok()?;
                self.asm.store(Rm::Gs(GROUP), t);
                Some(self.complete(t, host::RAX + host::RCX - t, ea))
            }
        }
    }

    /// Emits a run of stack instructions at the start of `insts` with one check. Returns how many; 0 if it did not.
    pub(super) fn stack_run(&mut self, insts: &[Inst]) -> usize {
        let register = |i: &Inst| match i.i.op0_kind() {
            OpKind::Register if i.i.op_count() == 1 && number(i.i.op0_register()) != RSP => {
                Some(number(i.i.op0_register()))
            }
            _ => None,
        };
        let pushes = insts
            .iter()
            .take_while(|i| {
                i.kind == Kind::Push
                    && matches!(i.i.code(), Code::Push_r64 | Code::Push_r32)
                    && register(i).is_some()
            })
            .count();
        let mut pops = insts
            .iter()
            .take_while(|i| {
                i.kind == Kind::Pop
                    && matches!(i.i.code(), Code::Pop_r64 | Code::Pop_r32)
                    && register(i).is_some()
            })
            .count();
        let ret =
            pops > 0 && insts.get(pops).is_some_and(|i| matches!(i.i.code(), Code::Retnq | Code::Retnd));
        pops += usize::from(ret);
        let n = pushes.max(pops);
        if !(2..=16).contains(&n) {
            return 0;
        }
        let (insts, bytes) = (&insts[..n], n as i32 * self.word());
        let low = if pushes > 0 { -bytes } else { 0 };
        let (sp, word) = (stack_register(), self.word());
        self.start = self.asm.here();
        self.clobber(insts[0].live_in());
        let mut from = Label::default();
        self.asm.lea(host::RAX, Mem::base(sp, low));
        self.asm.alu(op::SUB, host::RAX, Rm::Gs(STACK_PAGE));
        self.asm.alu_imm(op::CMP, true, Rm::Reg(host::RAX), 4096 - bytes);
        self.asm.jcc_label(cond::A, &mut from);
        self.asm.load(host::RAX, Rm::Gs(STACK_ADDEND));
        let slot = |disp| Rm::Mem(Mem { base: Some(host::RAX), index: Some((sp, 0)), disp });
        for (k, i) in insts.iter().enumerate() {
            let k = k as i32;
            let Some(n) = register(i) else { continue };
            let place = if pushes > 0 { slot(-word * (k + 1)) } else { slot(word * k) };
            match (HOST[n], pushes > 0) {
                (Some(h), true) => self.store_word(place, h),
                (Some(h), false) => self.load_word(h, place),
                (None, true) => {
                    self.asm.load(host::RCX, Rm::Gs(gpr(n)));
                    self.asm.store(place, host::RCX);
                }
                (None, false) => {
                    self.asm.load(host::RCX, place);
                    self.asm.store(Rm::Gs(gpr(n)), host::RCX);
                }
            }
        }
        if ret {
            self.load_word(host::RCX, slot(bytes - word));
        }
        self.set_stack(Mem::base(sp, if pushes > 0 { -bytes } else { bytes }));
        let mut back = Some(self.asm.here());
        if ret {
            self.blame(&insts[n - 1], word as u8);
            self.asm.bytes(&[0xc3]);
            back = None;
        }
        self.stubs.push(Stub::Run { from, insts: insts.to_vec(), back });
        n
    }
}
