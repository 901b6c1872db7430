//! From the instructions of a block to host code.

use super::asm::{Asm, Label, Mem, Rm, cond, host};
use super::cache::{Fixed, Site, site};
use super::group::Role;
use super::layout::{CC, HOST, READY, SIGNALS, VECTORS, gpr};
use super::memory::Ea;
use super::scan::{Inst, Kind, Scan};
use crate::fpu::ready;
use iced_x86::{
    Encoder, Instruction, InstructionInfoFactory, InstructionInfoOptions, OpAccess, OpKind, Register,
};

/// The instruction has a form that is left to the interpreter.
#[derive(Debug)]
pub struct Unsupported;

/// Result of emitting an instruction.
pub type Done = Result<(), Unsupported>;

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// In the host's flags.
    Host,
    /// In [`crate::Cpu::cc`] (or nowhere, if they are dead).
    Saved,
    /// In both.
    Both,
}

/// How a link reaches its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The target is in the same linear page: the link stays good while the code does.
    Page,
    /// Another page of global mappings: good until global translations are dropped.
    Global,
    /// Another page: good while the key in its slot is the current one.
    Slot,
}

/// A link of a block under construction.
#[derive(Clone, Copy, Debug)]
pub struct NewLink {
    /// Offset of the relative offset to patch, or of the slot.
    pub at: usize,
    /// Guest address that it leads to.
    pub target: u64,
    /// Kind.
    pub reach: Reach,
    /// Whether flags are in the host's flags when it is taken.
    pub host_flags: bool,
    /// Offset of the code that leaves to the dispatcher.
    pub stub: usize,
}

/// Code at the end of the block, off the usual path.
#[derive(Debug)]
pub(super) enum Stub {
    /// To the slow path of an access.
    Slow { from: Label, site: usize, ea: Option<Ea> },
    /// To the look-up of a stack access; `t` gets the addend.
    Stack { from: Label, site: usize, ea: Ea, t: u8, to: u64, back: usize },
    /// To a run of stack instructions, one by one.
    Run { from: Label, insts: Vec<Inst>, back: Option<usize> },
    /// To the dispatcher, through link `link`.
    Exit { from: Label, link: usize },
    /// To the dispatcher because of signals.
    Poll { from: Label, ip: u64 },
    /// Forget the return addresses on the host's stack.
    Shallow { from: Label, back: usize },
}

/// A block under construction.
pub struct Emitter<'a> {
    pub(super) asm: Asm,
    encoder: Encoder,
    factory: InstructionInfoFactory,
    pub(super) fixed: &'a Fixed,
    pub(super) sites: &'a mut Vec<Site>,
    pub(super) links: Vec<NewLink>,
    /// Number of the first link.
    pub(super) first_link: usize,
    pub(super) stubs: Vec<Stub>,
    pub(super) slots: Vec<(Label, usize)>,
    pub(super) flags: Flags,
    /// The guest's code is 32-bit code.
    pub(super) narrow: bool,
    /// Level of vector use that has been checked in this block.
    vectors: u8,
    /// Bits of [`ready`] that have been checked in this block.
    x87: u8,
    /// What the running instruction's memory access has to do with those of others.
    pub(super) role: Role,
    /// The check of the first of the group that instructions belong to now is in the code.
    pub(super) grouped: bool,
    /// Further bits of the sites of accesses.
    pub(super) group_bits: u8,
    /// Linear address of the block.
    pub(super) ip: u64,
    /// Whether the block is in a global page.
    pub(super) global: bool,
    /// Offset at which the running instruction's code begins.
    pub(super) start: usize,
}

/// What has been emitted.
#[derive(Debug)]
pub struct Emitted {
    /// Code.
    pub code: Vec<u8>,
    /// Offset of the entry that finds flags in the host's flags. The other entry is at 0.
    pub host_entry: usize,
    /// Links.
    pub links: Vec<NewLink>,
}

impl<'a> Emitter<'a> {
    /// For a block at guest address `ip`, of code of 64 or 32 `bits`, to be placed at `base`.
    #[allow(clippy::too_many_arguments)] // facts about the block
    pub fn new(
        fixed: &'a Fixed,
        sites: &'a mut Vec<Site>,
        first_link: usize,
        ip: u64,
        base: u64,
        global: bool,
        bits: u32,
    ) -> Self {
        Self {
            asm: Asm { buf: Vec::with_capacity(2048), base },
            encoder: Encoder::new(64),
            factory: InstructionInfoFactory::new(),
            fixed,
            sites,
            links: Vec::new(),
            first_link,
            stubs: Vec::new(),
            slots: Vec::new(),
            flags: Flags::Saved,
            narrow: bits == 32,
            vectors: 0,
            x87: 0,
            role: Role::Alone,
            grouped: false,
            group_bits: 0,
            ip,
            global,
            start: 0,
        }
    }

    /// Emits the whole block.
    /// `plain`: each access is checked by itself.
    pub fn block(mut self, scan: &Scan, plain: bool) -> Emitted {
        if scan.insts[0].live_in() != 0 {
            self.restore_flags();
        }
        let host_entry = self.asm.here();
        if scan.insts[0].live_in() != 0 {
            self.flags = Flags::Host;
        }
        let poll = poll_at(scan);
        let roles = if plain { vec![Role::Alone; scan.insts.len()] } else { self.roles(&scan.insts) };
        let mut k = 0;
        while let Some(inst) = scan.insts.get(k) {
            if poll == Some(k) {
                self.poll(inst);
            }
            self.role = Role::Alone;
            let run = self.stack_run(&scan.insts[k..]);
            if run > 1 && poll.is_none_or(|p| p <= k || p >= k + run) {
                k += run;
                continue;
            }
            self.role = roles[k];
            self.instruction(inst);
            k += 1;
        }
        self.end(scan);
        self.finish_stubs();
        Emitted { code: self.asm.buf, host_entry, links: self.links }
    }

    pub(super) fn instruction(&mut self, inst: &Inst) {
        let start = self.asm.here();
        self.start = start;
        let (sites, stubs, links, slots) =
            (self.sites.len(), self.stubs.len(), self.links.len(), self.slots.len());
        let (flags, vectors, x87) = (self.flags, self.vectors, self.x87);
        if self.role.is_first() {
            self.grouped = true;
        }
        if self.try_instruction(inst).is_err() {
            self.asm.buf.truncate(start);
            self.start = start;
            self.sites.truncate(sites);
            self.stubs.truncate(stubs);
            self.links.truncate(links);
            self.slots.truncate(slots);
            (self.flags, self.vectors, self.x87) = (flags, vectors, x87);
            if self.role.is_first() {
                self.grouped = false;
            }
            self.interpret(inst);
        }
        let here = self.asm.here() as u32;
        for s in &mut self.sites[sites..] {
            s.resume = here;
        }
    }

    fn try_instruction(&mut self, inst: &Inst) -> Done {
        match inst.kind {
            Kind::Generic => self.generic(inst, 1, false),
            Kind::Nop => Ok(()),
            Kind::Lea => self.lea(inst),
            Kind::ShiftCl => self.shift_cl(inst),
            Kind::Mul => self.mul(inst),
            Kind::Div => self.div(inst),
            Kind::Idiv => self.idiv(inst),
            Kind::Cmpxchg => self.cmpxchg(inst),
            Kind::Extend => self.extend(inst),
            Kind::Push => self.push(inst),
            Kind::Pop => self.pop(inst),
            Kind::Leave => self.leave(inst),
            Kind::Cli => self.cli(inst),
            Kind::Vector { avx, align, writes_rcx } => {
                self.need_vectors(inst, if avx { 2 } else { 1 });
                self.generic(inst, align, writes_rcx)?;
                if writes_rcx {
                    self.asm.load32(HOST[1].unwrap_or(0), Rm::Reg(host::RCX));
                }
                Ok(())
            }
            Kind::Fp { mmx } => {
                self.need_x87(inst, mmx);
                self.generic(inst, 1, false)
            }
            Kind::Fnstsw => {
                self.need_x87(inst, false);
                self.fnstsw()
            }
            Kind::Jcc => self.jcc(inst),
            Kind::Jmp => self.jump(inst),
            Kind::JmpIndirect => self.jump_indirect(inst),
            Kind::Call => self.call(inst),
            Kind::CallIndirect => self.call_indirect(inst),
            Kind::Ret => self.ret(inst),
            Kind::Sti => self.sti(inst),
            Kind::Pushf => self.pushf(inst),
            Kind::Popf => self.popf(inst),
            Kind::Rdtsc => self.rdtsc(inst),
            Kind::Interpret | Kind::End => Err(Unsupported),
        }
    }

    /// Saves the host's flags. Uses RAX.
    fn save_flags(&mut self) {
        self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.asm.bytes(&[0x66]);
        self.asm.rm(false, &[0x89], host::RAX, Rm::Gs(CC));
    }

    /// Loads the host's flags. Uses RAX.
    fn restore_flags(&mut self) {
        self.asm.rm(false, &[0x0f, 0xb7], host::RAX, Rm::Gs(CC)); // movzx eax, word
        self.asm.bytes(&[0x04, 0x7f, 0x9e]); // add al, 127; sahf
    }

    /// The code that follows destroys the host's flags; `live` are those still needed. Uses RAX.
    pub(super) fn clobber(&mut self, live: u8) {
        if live != 0 && self.flags == Flags::Host {
            self.save_flags();
        }
        self.flags = Flags::Saved;
    }

    /// Makes sure that the flags are in the host's flags. Uses RAX.
    pub(super) fn require(&mut self) {
        if self.flags == Flags::Saved {
            self.restore_flags();
            self.flags = Flags::Both;
        }
    }

    /// An instruction has changed the host's flags as the guest's.
    pub(super) fn wrote(&mut self, inst: &Inst) {
        if inst.modifies != 0 {
            self.flags = Flags::Host;
        }
    }

    /// Whether an instruction needs the guest's flags in the host's, to read or to keep some.
    pub(super) fn needs_flags(inst: &Inst) -> bool {
        inst.reads != 0 || inst.modifies != 0 && inst.live_out & !inst.kills != 0
    }

    /// A new slow path. `size` 0: always the interpreter.
    pub(super) fn site(&mut self, i: &Instruction, size: u8, align: u8, bits: u8) -> usize {
        self.sites.push(Site {
            ip: i.ip(),
            next_ip: i.next_ip(),
            retry: self.start as u32,
            resume: 0,
            size,
            align,
            bits,
        });
        self.sites.len() - 1
    }

    /// Has the interpreter do the instruction.
    fn interpret(&mut self, inst: &Inst) {
        if self.flags == Flags::Host && inst.live_in() != 0 {
            self.save_flags();
        }
        let end = matches!(
            inst.kind,
            Kind::End | Kind::Jmp | Kind::JmpIndirect | Kind::Call | Kind::CallIndirect | Kind::Ret
        );
        let site = self.site(&inst.i, 0, 0, if end { site::END } else { 0 });
        self.asm.mov_imm(host::RAX, site as u64);
        self.asm.jmp(self.fixed.slow);
        self.x87 = 0;
        self.flags = Flags::Both;
    }

    /// A condition under which the interpreter does the instruction.
    pub(super) fn interpret_if(&mut self, cond: u8, i: &Instruction) {
        let site = self.site(i, 0, 0, 0);
        let mut from = Label::default();
        self.asm.jcc_label(cond, &mut from);
        self.stubs.push(Stub::Slow { from, site, ea: None });
    }

    /// Makes sure that the host's vector registers hold the guest's and may be used.
    fn need_vectors(&mut self, inst: &Inst, level: u8) {
        if self.vectors >= level {
            return;
        }
        self.clobber(inst.live_in());
        let retry = self.asm.here();
        self.asm.cmp8_imm(Rm::Gs(VECTORS), level);
        let site = self.site(&inst.i, 0, 0, if level == 2 { site::AVX } else { site::SSE });
        self.sites[site].retry = retry as u32;
        let mut from = Label::default();
        self.asm.jcc_label(cond::B, &mut from);
        self.stubs.push(Stub::Slow { from, site, ea: None });
        self.vectors = level;
        // An access in the same instruction retries after the flags were saved.
        self.start = self.asm.here();
    }

    /// Makes sure that the host's x87 unit holds the guest's registers, and that nothing can come of using it.
    fn need_x87(&mut self, inst: &Inst, mmx: bool) {
        let bit = if mmx { ready::MMX } else { ready::X87 };
        if self.x87 & bit != 0 {
            return;
        }
        self.clobber(inst.live_in());
        self.asm.rm(false, &[0xf6], 0, Rm::Gs(READY)); // test byte, imm
        self.asm.bytes(&[bit]);
        // What follows relies on the unit being ready, so it does not follow if it was not.
        let site = self.site(&inst.i, 0, 0, site::END);
        let mut from = Label::default();
        self.asm.jcc_label(cond::E, &mut from);
        self.stubs.push(Stub::Slow { from, site, ea: None });
        self.x87 |= bit;
    }

    fn fnstsw(&mut self) -> Done {
        self.asm.bytes(&[0xdf, 0xe0, 0x66]); // fnstsw ax; operand size for the MOV
        self.asm.rm(false, &[0x89], host::RAX, Rm::Reg(HOST[0].ok_or(Unsupported)?));
        Ok(())
    }

    /// Leaves if signals are pending, before an instruction.
    fn poll(&mut self, inst: &Inst) {
        self.clobber(inst.live_in());
        self.poll_branch(inst.i.ip());
    }

    /// The branch of a poll. Uses RAX and the host's flags.
    fn poll_branch(&mut self, ip: u64) {
        let mut from = Label::default();
        self.asm.load(host::RAX, Rm::Gs(SIGNALS));
        self.asm.alu_imm(super::asm::op::CMP, false, Rm::Mem(Mem::base(host::RAX, 0)), 0);
        self.asm.jcc_label(cond::NE, &mut from);
        self.stubs.push(Stub::Poll { from, ip });
    }

    /// Encodes an instruction as it is now.
    pub(super) fn encode(&mut self, i: &Instruction) -> Done {
        self.encoder.set_buffer(std::mem::take(&mut self.asm.buf));
        let before = self.asm.base; // position does not matter: nothing that is encoded here is relative
        let r = if self.narrow {
            let mut i = *i;
            i.set_code_size(iced_x86::CodeSize::Code64);
            self.encoder.encode(&i, before)
        } else {
            self.encoder.encode(i, before)
        };
        self.asm.buf = self.encoder.take_buffer();
        r.map(|_| ()).map_err(|_| Unsupported)
    }

    /// How each operand is accessed.
    pub(super) fn accesses(&mut self, i: &Instruction) -> [OpAccess; 5] {
        let options = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        let info = self.factory.info_options(i, options);
        [info.op0_access(), info.op1_access(), info.op2_access(), info.op3_access(), info.op4_access()]
    }

    /// Re-encodes an instruction whose operands are all explicit.
    fn generic(&mut self, inst: &Inst, align: u8, writes_rcx: bool) -> Done {
        let mut i = inst.i;
        if (0..i.op_count())
            .any(|k| i.op_kind(k) == OpKind::Register && super::operand::is_high(i.op_register(k)))
        {
            return self.high_byte(inst);
        }
        let access = self.accesses(&i);
        let memory = (0..i.op_count()).find(|k| i.op_kind(*k) == OpKind::Memory);
        let flags = Self::needs_flags(inst);
        // Scratch registers still free for guest registers in memory.
        let mut free = vec![host::RAX, host::RCX];
        if let Some(k) = memory {
            let write = !matches!(access[k as usize], OpAccess::Read | OpAccess::CondRead);
            let t = if flags { host::RCX } else { host::RAX };
            if writes_rcx && flags {
                return Err(Unsupported);
            }
            let m = self.operand(inst, write, align, t)?;
            set_memory(&mut i, m);
            free.retain(|r| *r != t);
        }
        if flags {
            self.require();
        }
        let mut held: [Option<(usize, u8, bool)>; 3] = [None; 3];
        for k in 0..i.op_count() {
            if i.op_kind(k) != OpKind::Register {
                continue;
            }
            let r = i.op_register(k);
            if !r.is_gpr() {
                continue;
            }
            let n = super::operand::number(r);
            let writes = !matches!(access[k as usize], OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            let h = match HOST[n] {
                Some(h) => h,
                None => match held.iter_mut().flatten().find(|e| e.0 == n) {
                    Some(e) => {
                        e.2 |= writes;
                        e.1
                    }
                    None => {
                        let h = free.pop().ok_or(Unsupported)?;
                        self.asm.load(h, Rm::Gs(gpr(n)));
                        *held.iter_mut().find(|e| e.is_none()).ok_or(Unsupported)? = Some((n, h, writes));
                        h
                    }
                },
            };
            i.set_op_register(k, super::operand::host_register(h, r.size()));
        }
        self.encode(&i)?;
        for (n, h, writes) in held.into_iter().flatten() {
            if writes {
                self.asm.store(Rm::Gs(gpr(n)), h);
            }
        }
        self.wrote(inst);
        Ok(())
    }

    /// Code after the last instruction.
    fn end(&mut self, scan: &Scan) {
        let Some(last) = scan.insts.last() else { return };
        if scan.stopped {
            self.leave_at(scan.end, super::scan::ALL);
            return;
        }
        match last.kind {
            Kind::Jmp | Kind::JmpIndirect | Kind::Call | Kind::CallIndirect | Kind::Ret | Kind::End => {}
            _ => self.link_jump(scan.end, last.live_out),
        }
    }

    /// Leaves to the run loop at a guest address.
    fn leave_at(&mut self, ip: u64, live: u8) {
        self.clobber(live);
        self.asm.mov_imm(host::RCX, ip);
        self.asm.jmp(self.fixed.exit_at);
    }

    fn finish_stubs(&mut self) {
        let mut stubs = std::mem::take(&mut self.stubs);
        while !stubs.is_empty() {
            for stub in stubs {
                self.stub(stub);
            }
            stubs = std::mem::take(&mut self.stubs);
        }
        if !self.slots.is_empty() {
            while !self.asm.here().is_multiple_of(16) {
                self.asm.bytes(&[0xcc]);
            }
            for (label, link) in std::mem::take(&mut self.slots) {
                self.asm.bind(&label);
                self.links[link].at = self.asm.here();
                self.asm.bytes(&[0; 16]);
            }
        }
    }

    fn stub(&mut self, stub: Stub) {
        match stub {
            Stub::Slow { from, site, ea } => {
                self.asm.bind(&from);
                if let Some(ea) = ea {
                    self.address(host::RCX, &ea, 0);
                }
                self.asm.mov_imm(host::RAX, site as u64);
                self.asm.jmp(self.fixed.slow);
            }
            Stub::Stack { from, site, ea, t, to, back } => {
                self.asm.bind(&from);
                self.address(host::RCX, &ea, 0);
                self.asm.mov_imm(host::RAX, site as u64);
                self.asm.call(to);
                if t != host::RAX {
                    self.asm.mov(t, host::RAX);
                }
                let back = self.asm.base + back as u64;
                self.asm.jmp(back);
            }
            Stub::Run { from, insts, back } => {
                self.asm.bind(&from);
                self.flags = Flags::Saved;
                self.role = Role::Alone;
                for inst in &insts {
                    self.instruction(inst);
                }
                if let Some(back) = back {
                    let back = self.asm.base + back as u64;
                    self.asm.jmp(back);
                }
            }
            Stub::Exit { from, link } => {
                self.asm.bind(&from);
                self.links[link].stub = self.asm.here();
                self.asm.mov_imm(host::RCX, (self.first_link + link) as u64);
                let to = if self.links[link].host_flags {
                    self.fixed.exit_link_flags
                } else {
                    self.fixed.exit_link
                };
                self.asm.jmp(to);
            }
            Stub::Poll { from, ip } => {
                self.asm.bind(&from);
                self.asm.mov_imm(host::RCX, ip);
                self.asm.jmp(self.fixed.exit_poll);
            }
            Stub::Shallow { from, back } => {
                self.asm.bind(&from);
                self.asm.load(host::RSP, Rm::Gs(super::layout::HOST_RSP));
                self.asm.mov_imm(host::RAX, self.fixed.base_return);
                self.asm.bytes(&[0x50]); // push rax
                let back = self.asm.base + back as u64;
                self.asm.jmp(back);
            }
        }
    }
}

/// Before which instruction a block polls: where flags are dead, if it has a backward branch at all.
fn poll_at(scan: &Scan) -> Option<usize> {
    let backward = scan.insts.iter().any(|n| {
        matches!(n.kind, Kind::Jcc | Kind::Jmp | Kind::Call) && n.i.near_branch_target() <= n.i.ip()
    });
    backward.then(|| scan.insts.iter().position(|n| n.live_in() == 0).unwrap_or(0))
}

/// Makes `m` the memory operand.
pub(super) fn set_memory(i: &mut Instruction, m: Mem) {
    let register = |r: Option<u8>| r.map_or(Register::None, |r| super::operand::host_register(r, 8));
    i.set_segment_prefix(Register::None);
    i.set_memory_base(register(m.base));
    i.set_memory_index(register(m.index.map(|x| x.0)));
    i.set_memory_index_scale(1 << m.index.map_or(0, |x| x.1));
    i.set_memory_displacement64(i64::from(m.disp) as u64);
    i.set_memory_displ_size(if m.disp == 0 { 0 } else { 1 });
}
