//! From guest bytes to blocks of operations. The decoder proper is iced-x86; this is about where blocks begin and end,
//! and about operands.
#![allow(unsafe_code)] // copies code out of guest memory

mod lower;
pub mod operand;

pub use operand::Ctx;

use crate::block::{Block, MAX_OPS};
use crate::fault::Res;
use crate::interp;
use crate::mmu::copy_out;
use crate::op::{Handler, Op};
use crate::state::{Cpu, Mode, reg, seg};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

/// Longest instruction in bytes.
const MAX_LEN: usize = 15;
/// Bytes looked at for a block.
const WINDOW: usize = 512;

/// Whether an operation continues with the one behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    Continue,
    /// It ends the block.
    End,
}

/// An operation that does nothing yet.
fn blank(off: u16) -> Op {
    Op {
        handler: interp::undefined,
        imm: 0,
        disp: 0,
        dst: reg::ZERO,
        src: reg::ZERO,
        base: reg::ZERO,
        index: reg::ZERO,
        scale: 0,
        ea: seg::DS as u8,
        off,
    }
}

fn pseudo(handler: Handler, off: u16) -> Op {
    Op { handler, imm: off as u64, ..blank(off) }
}

/// Code bytes of a block to be.
struct Window {
    bytes: [u8; WINDOW],
    len: usize,
    /// The end is where the page ends.
    page_end: bool,
    /// The end is where the code segment ends.
    limit_end: bool,
}

impl Window {
    fn at(cpu: &Cpu, page: usize, lin: u64) -> Self {
        let start = (lin & 0xfff) as usize;
        let mut len = (4096 - start).min(WINDOW);
        let page_end = start + len == 4096;
        let mut limit_end = false;
        if cpu.mode.contains(Mode::LIMITED) {
            let room = (cpu.seg[seg::CS].limit as u64 + 1).saturating_sub(cpu.rip);
            if room <= len as u64 {
                (len, limit_end) = (room as usize, true);
            }
        }
        let mut w = Self { bytes: [0; WINDOW], len, page_end: page_end && !limit_end, limit_end };
        // SAFETY: within the page, which the memory map keeps alive.
        unsafe { copy_out((page + start) as *const u8, &mut w.bytes[..len]) };
        w
    }

    /// Appends the beginning of the next page.
    fn extend(&mut self, next_page: usize) {
        let n = MAX_LEN.min(WINDOW - self.len);
        // SAFETY: as in `at`.
        unsafe { copy_out(next_page as *const u8, &mut self.bytes[self.len..self.len + n]) };
        self.len += n;
        self.page_end = false;
    }
}

/// Decodes the block at RIP, whose linear address is `lin`, in the page at host address `page`, and adds it to the
/// cache. The page has been guarded ([`Cpu::guard_code`]).
///
/// # Errors
/// The first instruction cannot be fetched.
pub(crate) fn block(cpu: &mut Cpu, page: usize, lin: u64) -> Res<*const Block> {
    let mut window = Window::at(cpu, page, lin);
    let mut second_page = None;
    let mut attempt = build(cpu, &window, lin);
    if let Err(Short) = attempt {
        if window.limit_end || !window.page_end {
            // Ran into the end of the code segment.
            return Err(cpu.gp(0));
        }
        let next = cpu.fetch_address(cpu.rip.wrapping_add(window.len as u64));
        let next_page = cpu.fetch_page(next)?;
        if !cpu.guard_code(next_page) {
            // Everything may have changed: start over through the run loop.
            return Err(cpu.retry_fetch());
        }
        second_page = Some(next_page);
        window.extend(next_page);
        if cpu.mode.contains(Mode::LIMITED) {
            let room = (cpu.seg[seg::CS].limit as u64 + 1).saturating_sub(cpu.rip);
            if room < window.len as u64 {
                (window.len, window.limit_end) = (room as usize, true);
            }
        }
        // One instruction, the one that reaches over.
        let mode = cpu.mode;
        cpu.mode |= Mode::STEP;
        attempt = build(cpu, &window, lin);
        cpu.mode = mode;
        if let Err(Short) = attempt {
            return Err(cpu.gp(0));
        }
    }
    let Ok((ops, count, len)) = attempt else { return Err(cpu.gp(0)) };
    cpu.stats.blocks_decoded += 1;
    cpu.stats.ops_decoded += count as u64;
    let mode = cpu.mode.difference(Mode::USER);
    let host = page + (lin & 0xfff) as usize;
    Ok(cpu.code.add(Block::new(ops, count, len, host, mode, second_page)))
}

/// The first instruction does not fit into the window.
struct Short;

fn build(cpu: &Cpu, window: &Window, lin: u64) -> Result<(Vec<Op>, u32, u32), Short> {
    let mode = cpu.mode;
    let bits = if mode.is64() {
        64
    } else if mode.contains(Mode::CODE32) {
        32
    } else {
        16
    };
    let bytes = &window.bytes[..window.len];
    let mut decoder = Decoder::with_ip(bits, bytes, cpu.rip, DecoderOptions::NONE);
    let most = if mode.contains(Mode::STEP) { 1 } else { MAX_OPS };
    let mut ops = Vec::with_capacity(16);
    let mut ctx = Ctx { mode, rip: cpu.rip, page_offset: (lin & 0xfff) as u32, end: 0, arena: &cpu.vm.arena };
    let mut ins = Instruction::default();
    let mut count = 0;
    let mut ended = false;
    loop {
        let off = decoder.position();
        decoder.decode_out(&mut ins);
        if ins.is_invalid() {
            let short = decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() - off < MAX_LEN;
            if short {
                if count == 0 {
                    return Err(Short);
                }
                break;
            }
            // A prefix too many is #GP, anything else #UD.
            let long = decoder.position() - off >= MAX_LEN;
            let mut op = blank(off as u16);
            op.handler = if long { interp::too_long } else { interp::undefined };
            ops.push(op);
            ops.push(pseudo(interp::fallthrough_far, off as u16 + 1));
            return Ok((ops, count + 1, (off + 1) as u32));
        }
        let end = decoder.position();
        ctx.end = end as u16;
        let mut op = blank(off as u16);
        let flow = lower::lower(&ctx, &ins, &bytes[off..end], &mut op);
        ops.push(op);
        count += 1;
        if flow == Flow::End {
            ops.push(pseudo(interp::fallthrough_far, end as u16));
            ended = true;
            break;
        }
        if count as usize >= most || end == window.len {
            break;
        }
    }
    if !ended {
        ops.push(pseudo(ctx.fallthrough(), ctx.end));
    }
    let len = ctx.end as u32;
    Ok((ops, count, len))
}

impl Cpu {
    /// Marks a page (host address) as holding decoded code, so that every write to it is seen. Returns `false` if the
    /// memory map changed meanwhile, so that the address means nothing any more.
    pub(crate) fn guard_code(&mut self, page: usize) -> bool {
        let map = self.mmu.phys.clone();
        let Some(p) = map.by_host(page) else { return true };
        let mut known = self.code.has_page(page);
        loop {
            let fresh = p.region.tracker.mark_code(p.offset);
            if !fresh && known {
                return true;
            }
            if self.me.may_write(page) {
                self.mmu.tlb.protect(page);
                self.forget_checks();
            }
            if self.vm.writable_elsewhere(&self.me, page) {
                let (vm, me, epoch) = (self.vm.clone(), self.me.clone(), self.map_epoch);
                self.paused(|| vm.protect(&me, page));
                if self.map_epoch != epoch {
                    return false;
                }
            }
            // Somebody may have written to the page, and so taken the mark away, while we waited.
            known = true;
            if p.region.tracker.is_code(p.offset) {
                return true;
            }
        }
    }
}
