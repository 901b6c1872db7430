//! CLI and STI, PUSHF and POPF in the kernel, RDTSC and RDTSCP. Anything out of the ordinary is the interpreter's.

use super::asm::{Mem, Rm, cond, host, op};
use super::emit::{Done, Emitter, Flags, Unsupported};
use super::layout::{CC, HOST, SPILL};
use super::scan::Inst;
use super::stack::{Pushed, RSP, stack_register};
use crate::Cpu;
use crate::flags::cc;
use crate::msr::Msrs;
use crate::state::{cr, fl};
use iced_x86::Mnemonic;
use std::mem::offset_of;

const FLAGS: usize = offset_of!(Cpu, flags);

impl Emitter<'_> {
    /// The interpreter does the instruction unless CPL is 0.
    fn kernel_only(&mut self, inst: &Inst) {
        self.clobber(inst.live_in());
        self.asm.cmp8_imm(Rm::Gs(offset_of!(Cpu, cpl)), 0);
        self.interpret_if(cond::NE, &inst.i);
    }

    pub(super) fn cli(&mut self, inst: &Inst) -> Done {
        self.kernel_only(inst);
        self.asm.alu_imm(op::AND, true, Rm::Gs(FLAGS), !(fl::IF as i32));
        Ok(())
    }

    /// STI. Where no interrupt waits, it makes no difference that interrupts come one instruction later.
    pub(super) fn sti(&mut self, inst: &Inst) -> Done {
        self.kernel_only(inst);
        self.asm.cmp8_imm(Rm::Gs(offset_of!(Cpu, irq_latched)), 0);
        self.interpret_if(cond::NE, &inst.i);
        self.asm.alu_imm(op::OR, true, Rm::Gs(FLAGS), fl::IF as i32);
        Ok(())
    }

    pub(super) fn pushf(&mut self, inst: &Inst) -> Done {
        if inst.i.stack_pointer_increment() != -8 {
            return Err(Unsupported);
        }
        self.require();
        self.asm.bytes(&[0x9c, 0x59]); // pushfq; pop rcx
        self.clobber(inst.live_in());
        self.asm.alu_imm(op::AND, false, Rm::Reg(host::RCX), fl::ARITH as i32);
        self.asm.alu(op::OR, host::RCX, Rm::Gs(FLAGS));
        self.asm.alu_imm(op::AND, false, Rm::Reg(host::RCX), !((fl::RF | fl::VM) as i32));
        self.asm.store(Rm::Gs(SPILL), host::RCX);
        let slot = self.check_push(inst, false)?;
        self.asm.load(host::RCX, Rm::Gs(SPILL));
        self.store_push(slot, Pushed::Register(host::RCX));
        Ok(())
    }

    /// POPF that changes nothing but arithmetic flags and IF, while no interrupt waits.
    pub(super) fn popf(&mut self, inst: &Inst) -> Done {
        if inst.i.stack_pointer_increment() != 8 {
            return Err(Unsupported);
        }
        self.kernel_only(inst);
        self.asm.cmp8_imm(Rm::Gs(offset_of!(Cpu, irq_latched)), 0);
        self.interpret_if(cond::NE, &inst.i);
        let m = self.check_pop(inst, RSP)?;
        self.asm.load(host::RCX, Rm::Mem(m));
        self.asm.mov(host::RAX, host::RCX);
        self.asm.rm(true, &[0x33], host::RCX, Rm::Gs(FLAGS)); // xor
        let rest = fl::ALL & !fl::ARITH & !fl::IF;
        self.asm.rm(false, &[0xf7], 0, Rm::Reg(host::RCX)); // test ecx, imm
        self.asm.bytes(&(rest as u32).to_le_bytes());
        self.interpret_if(cond::NE, &inst.i);
        // The bit that differs is IF.
        self.asm.alu_imm(op::AND, false, Rm::Reg(host::RCX), fl::IF as i32);
        self.asm.rm(true, &[0x31], host::RCX, Rm::Gs(FLAGS)); // xor [flags], rcx
        self.asm.load32(host::RCX, Rm::Reg(host::RAX));
        self.asm.shr32(host::RCX, 11);
        self.asm.alu_imm(op::AND, false, Rm::Reg(host::RCX), 1);
        self.asm.bytes(&[0xc1, 0xe0, 8]); // shl eax, 8
        self.asm.alu_imm(op::AND, false, Rm::Reg(host::RAX), (fl::ARITH as i32 & 0xff) << 8);
        self.asm.rm(false, &[0x09], host::RCX, Rm::Reg(host::RAX)); // or eax, ecx
        self.asm.alu_imm(op::OR, false, Rm::Reg(host::RAX), 0x200);
        self.asm.bytes(&[0x66]);
        self.asm.rm(false, &[0x89], host::RAX, Rm::Gs(CC));
        self.asm.lea(stack_register(), Mem::base(stack_register(), 8));
        self.flags = Flags::Saved;
        debug_assert_eq!(cc::CF, 0x100);
        Ok(())
    }

    pub(super) fn rdtsc(&mut self, inst: &Inst) -> Done {
        let (Some(ax), Some(cx)) = (HOST[0], HOST[1]) else { return Err(Unsupported) };
        self.clobber(inst.live_in());
        self.asm.rm(false, &[0xf6], 0, Rm::Gs(offset_of!(Cpu, cr4))); // test byte, imm
        self.asm.bytes(&[cr::CR4_TSD as u8]);
        self.interpret_if(cond::NE, &inst.i);
        self.asm.bytes(&[0x0f, 0xae, 0xe8, 0x0f, 0x31]); // lfence; rdtsc
        self.asm.shl64(host::RDX, 32);
        self.asm.alu(op::OR, host::RAX, Rm::Reg(host::RDX));
        self.asm.alu(op::ADD, host::RAX, Rm::Gs(offset_of!(Cpu, msr) + offset_of!(Msrs, tsc_offset)));
        self.asm.load32(ax, Rm::Reg(host::RAX));
        self.asm.rm(true, &[0xc1], 5, Rm::Reg(host::RAX)); // shr rax, 32
        self.asm.bytes(&[32]);
        self.asm.load32(host::RDX, Rm::Reg(host::RAX));
        if inst.i.mnemonic() == Mnemonic::Rdtscp {
            self.asm.load32(cx, Rm::Gs(offset_of!(Cpu, msr) + offset_of!(Msrs, tsc_aux)));
        }
        Ok(())
    }
}
