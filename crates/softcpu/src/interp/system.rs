//! HLT, control and debug registers, MSRs, CPUID, time-stamp counter, TLB and cache control, FSGSBASE, SWAPGS, RDRAND.

use super::tables::store16;
use super::{ending, h, sized_wide};
use crate::alu;
use crate::decode::operand::{Kind, dst, gpr, kind, size, src};
use crate::decode::{Ctx, Flow};
use crate::fault::Res;
use crate::flags::cc;
use crate::mmu::canonical;
use crate::op::{Next, Op, asize};
use crate::state::{Cpu, Int, Request, cr, reg, seg};
use iced_x86::{Code, Instruction, Mnemonic, Register};

fn hlt(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    cpu.request = Request::Halt;
    Ok(Next::REQUEST)
}

/// MOV from CRn: `op.src` is n, `op.imm` whether the operand is 64 bits wide.
fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_cpl0()?;
    let v = match op.src {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => cpu.apic.as_ref().map_or(0, |a| a.cr8() as u64),
        _ => return Err(cpu.ud()),
    };
    if cpu.mode.is64() {
        cpu.set(op.dst, v)
    } else {
        cpu.set(op.dst, v as u32)
    }
    Ok(())
}

/// MOV to CRn: `op.dst` is n.
fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    let v = if cpu.mode.is64() { cpu.get::<u64>(op.src) } else { cpu.get::<u32>(op.src) as u64 };
    match op.dst {
        0 => cpu.set_cr0(v)?,
        2 => cpu.cr2 = v,
        3 => cpu.set_cr3(v)?,
        4 => cpu.set_cr4(v)?,
        8 => {
            if v > 15 {
                return Err(cpu.gp(0));
            }
            if let Some(apic) = cpu.apic.clone() {
                apic.set_cr8(v as u8);
                cpu.check_interrupts();
            }
        }
        _ => return Err(cpu.ud()),
    }
    Ok(cpu.next_block())
}

fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.need_cpl0()?;
    let v = cpu.read_dr(op.src)?;
    if cpu.mode.is64() {
        cpu.set(op.dst, v)
    } else {
        cpu.set(op.dst, v as u32)
    }
    Ok(())
}

fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    let v = if cpu.mode.is64() { cpu.get::<u64>(op.src) } else { cpu.get::<u32>(op.src) as u64 };
    cpu.write_dr(op.dst, v)?;
    Ok(cpu.next_block())
}

fn smsw(cpu: &mut Cpu, op: &Op) -> Res<()> {
    cpu.check_umip()?;
    store16(cpu, op, cpu.cr0)
}

fn lmsw<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    let v = cpu.operand16::<MEM>(op)? as u64;
    // PE can be set, but not cleared.
    let new = cpu.cr0 & !0xe | v & 0xf;
    cpu.set_cr0(new)?;
    Ok(cpu.next_block())
}

fn clts(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    cpu.need_cpl0()?;
    cpu.cr0 &= !cr::CR0_TS;
    cpu.fpu_access_changed();
    Ok(())
}

fn rdmsr(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    cpu.need_cpl0()?;
    let n = cpu.get::<u32>(reg::RCX);
    let v = cpu.read_msr(n)?;
    cpu.set(reg::RAX, v as u32);
    cpu.set(reg::RDX, (v >> 32) as u32);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    let n = cpu.get::<u32>(reg::RCX);
    let v = (cpu.get::<u32>(reg::RDX) as u64) << 32 | cpu.get::<u32>(reg::RAX) as u64;
    cpu.write_msr(n, v)?;
    cpu.update_mode();
    Ok(cpu.next_block())
}

fn cpuid(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    cpu.stats.cpuids += 1;
    let [a, b, c, d] = crate::cpuid::query(cpu, cpu.get(reg::RAX), cpu.get(reg::RCX));
    cpu.set(reg::RAX, a);
    cpu.set(reg::RBX, b);
    cpu.set(reg::RCX, c);
    cpu.set(reg::RDX, d);
    // Serialising: ends its block, so that code written elsewhere is seen.
    Ok(cpu.next_block())
}

fn check_tsd(cpu: &mut Cpu) -> Res<()> {
    if cpu.cr4 & cr::CR4_TSD != 0 && cpu.cpl != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

fn rdtsc<const AUX: bool>(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    check_tsd(cpu)?;
    let t = cpu.tsc();
    cpu.set(reg::RAX, t as u32);
    cpu.set(reg::RDX, (t >> 32) as u32);
    if AUX {
        let aux = cpu.msr.tsc_aux;
        cpu.set(reg::RCX, aux as u32);
    }
    Ok(())
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let aux = cpu.msr.tsc_aux;
    if cpu.mode.is64() {
        cpu.set(op.dst, aux)
    } else {
        cpu.set(op.dst, aux as u32)
    }
    Ok(())
}

/// There are no performance counters.
fn rdpmc(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    Err(cpu.gp(0))
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    let offset = cpu.offset(op);
    let lin = if cpu.mode.is64() {
        let base = if op.seg() >= seg::FS { cpu.seg[op.seg()].base } else { 0 };
        base.wrapping_add(offset)
    } else {
        cpu.seg[op.seg()].base.wrapping_add(offset) as u32 as u64
    };
    // A non-canonical address is no operation.
    if !cpu.long_mode() || canonical(lin) {
        cpu.flush_page(lin);
    }
    Ok(cpu.next_block())
}

fn invpcid(cpu: &mut Cpu, op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    let kind = if cpu.mode.is64() { cpu.get::<u64>(op.dst) } else { cpu.get::<u32>(op.dst) as u64 };
    let at = cpu.address(op, 16, false)?;
    let (pcid, lin) = (cpu.read::<u64>(op.seg(), at)?, cpu.read::<u64>(op.seg(), at.wrapping_add(8))?);
    let enabled = cpu.cr4 & cr::CR4_PCIDE != 0;
    if pcid >> 12 != 0 || kind > 3 || !enabled && pcid != 0 && kind < 2 || kind == 0 && !canonical(lin) {
        return Err(cpu.gp(0));
    }
    match kind {
        0 if pcid as u16 == cpu.pcid() => cpu.flush_page(lin),
        0 => {
            cpu.mmu.tlb.flush_page_pcid(pcid as u16, lin);
            cpu.retable();
        }
        1 => cpu.flush_pcid(pcid as u16),
        _ => cpu.flush_tlb(),
    }
    Ok(cpu.next_block())
}

fn wbinvd(cpu: &mut Cpu, _op: &Op) -> Res<Next> {
    cpu.need_cpl0()?;
    Ok(cpu.next_block())
}

/// CLFLUSH and relatives: the address must be readable, otherwise nothing happens here.
fn clflush(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let lin = cpu.address(op, 1, false)?;
    cpu.host_read(op.seg(), lin, 1)?;
    Ok(())
}

fn check_fsgsbase(cpu: &mut Cpu) -> Res<()> {
    if cpu.cr4 & cr::CR4_FSGSBASE == 0 || !cpu.mode.is64() { Err(cpu.ud()) } else { Ok(()) }
}

/// RDFSBASE, RDGSBASE: the segment is `op.imm`.
fn rd_base<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    check_fsgsbase(cpu)?;
    let v = cpu.seg[op.imm as usize % 6].base;
    cpu.set(op.dst, T::from_u64(v));
    Ok(())
}

fn wr_base<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    check_fsgsbase(cpu)?;
    let v = cpu.get::<T>(op.dst).to_u64();
    if !canonical(v) {
        return Err(cpu.gp(0));
    }
    cpu.seg[op.imm as usize % 6].base = v;
    Ok(())
}

fn swapgs(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    cpu.need_cpl0()?;
    std::mem::swap(&mut cpu.seg[seg::GS].base, &mut cpu.msr.kernel_gs_base);
    Ok(())
}

/// RDRAND and RDSEED.
fn random<T: Int, const SEED: bool>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    let v = if SEED { alu::rdseed() } else { alu::rdrand() };
    cpu.cc = 0x200 | if v.is_some() { cc::CF } else { 0 };
    cpu.set(op.dst, T::from_u64(v.unwrap_or(0)));
    Ok(())
}

fn random_d<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    random::<T, false>(cpu, op)
}

fn random_s<T: Int>(cpu: &mut Cpu, op: &Op) -> Res<()> {
    random::<T, true>(cpu, op)
}

/// A hypercall: none is offered, which is what the answer says (-ENOSYS as KVM has it). Only the kernel may ask.
fn hypercall(cpu: &mut Cpu, _op: &Op) -> Res<()> {
    let answer = if cpu.cpl == 0 { -1000i64 } else { -1 };
    if cpu.mode.is64() {
        cpu.set(reg::RAX, answer as u64)
    } else {
        cpu.set(reg::RAX, answer as u32)
    }
    Ok(())
}

/// Lowers the instructions of this family.
pub(super) fn lower(ctx: &Ctx<'_>, i: &Instruction, op: &mut Op) -> Option<Flow> {
    let go = |op: &mut Op, handler| {
        op.handler = handler;
        Some(Flow::Continue)
    };
    let end = |op: &mut Op, handler| {
        op.handler = handler;
        Some(Flow::End)
    };
    match i.mnemonic() {
        Mnemonic::Mov => lower_mov(i, op),
        Mnemonic::Hlt => end(op, ending!(hlt)),
        Mnemonic::Smsw => {
            if kind(i, 0) == Kind::Reg {
                dst(i, 0, op);
                op.imm = size(i, 0) as u64;
            }
            go(op, h!(smsw))
        }
        Mnemonic::Lmsw => {
            if kind(i, 0) == Kind::Mem {
                return end(op, ending!(lmsw::<true>));
            }
            src(i, 0, op);
            end(op, ending!(lmsw::<false>))
        }
        Mnemonic::Clts => go(op, h!(clts)),
        Mnemonic::Rdmsr => go(op, h!(rdmsr)),
        Mnemonic::Wrmsr => end(op, ending!(wrmsr)),
        Mnemonic::Cpuid => end(op, ending!(cpuid)),
        Mnemonic::Rdtsc => go(op, h!(rdtsc::<false>)),
        Mnemonic::Rdtscp => go(op, h!(rdtsc::<true>)),
        Mnemonic::Rdpid => {
            dst(i, 0, op);
            go(op, h!(rdpid))
        }
        Mnemonic::Rdpmc => go(op, h!(rdpmc)),
        Mnemonic::Invlpg => end(op, ending!(invlpg)),
        Mnemonic::Invpcid => {
            dst(i, 0, op);
            end(op, ending!(invpcid))
        }
        Mnemonic::Wbinvd | Mnemonic::Invd => end(op, ending!(wbinvd)),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => go(op, h!(clflush)),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            dst(i, 0, op);
            let fs = matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase);
            op.imm = if fs { seg::FS } else { seg::GS } as u64;
            let read = matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase);
            let handler = match (read, size(i, 0)) {
                (true, 4) => h!(rd_base::<u32>),
                (true, _) => h!(rd_base::<u64>),
                (false, 4) => h!(wr_base::<u32>),
                (false, _) => h!(wr_base::<u64>),
            };
            go(op, handler)
        }
        Mnemonic::Swapgs if ctx.mode.is64() => go(op, h!(swapgs)),
        Mnemonic::Rdrand => {
            dst(i, 0, op);
            let n = size(i, 0);
            op.handler = sized_wide!(n, random_d);
            Some(Flow::Continue)
        }
        Mnemonic::Rdseed => {
            dst(i, 0, op);
            let n = size(i, 0);
            op.handler = sized_wide!(n, random_s);
            Some(Flow::Continue)
        }
        Mnemonic::Vmcall | Mnemonic::Vmmcall => {
            op.ea = asize::A64;
            go(op, h!(hypercall))
        }
        _ => None,
    }
}

fn lower_mov(i: &Instruction, op: &mut Op) -> Option<Flow> {
    let number = |r: Register| r.number() as u8;
    match i.code() {
        Code::Mov_r32_cr | Code::Mov_r64_cr => {
            op.dst = gpr(i.op0_register());
            op.src = number(i.op1_register());
            op.handler = h!(mov_from_cr);
            Some(Flow::Continue)
        }
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => {
            op.dst = number(i.op0_register());
            op.src = gpr(i.op1_register());
            op.handler = ending!(mov_to_cr);
            Some(Flow::End)
        }
        Code::Mov_r32_dr | Code::Mov_r64_dr => {
            op.dst = gpr(i.op0_register());
            op.src = number(i.op1_register());
            op.handler = h!(mov_from_dr);
            Some(Flow::Continue)
        }
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => {
            op.dst = number(i.op0_register());
            op.src = gpr(i.op1_register());
            op.handler = ending!(mov_to_dr);
            Some(Flow::End)
        }
        _ => None,
    }
}
