//! Decoded code: basic blocks, where to find them, and when to forget them.
#![allow(unsafe_code)] // blocks are reached through raw pointers from links and the jump cache

use crate::op::{Next, Op, OpPtr};
use crate::state::{Cpu, Mode};
use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Instructions in a block, at most.
pub const MAX_OPS: usize = 48;
/// Operations held, at most (32 bytes each), before everything is forgotten.
const CAPACITY: usize = 1 << 21;
/// Jump cache entries a page.
const JUMP_PER_PAGE: usize = 64;
/// Page groups of the jump cache.
const JUMP_PAGES: usize = 64;

/// A run of instructions, entered only at the top.
#[repr(C)]
#[derive(Debug)]
pub struct Block {
    /// The operations; the last is a terminator.
    ops: Box<[Op]>,
    /// Successors: fall-through (or the only one), branch taken. Null until known. Only ever blocks of the same page.
    pub links: [Cell<*const Block>; 2],
    /// Guest instructions.
    pub count: u32,
    /// Bytes of guest code.
    pub len: u32,
    /// Host address of the first byte of code.
    pub host: usize,
    /// Mode that it was decoded for, without [`Mode::USER`].
    pub mode: Mode,
    /// Host address of the page that holds the end of the last instruction, if it is not the first one.
    pub second_page: Option<usize>,
    /// Set when forgotten; the operations then only lead back to the run loop.
    dead: Cell<bool>,
    /// Executions by the interpreter, as far as the translator wants to know ([`crate::translate::HOT`]).
    pub heat: Cell<u32>,
}

impl Block {
    /// A block of the given operations.
    pub fn new(
        ops: Vec<Op>,
        count: u32,
        len: u32,
        host: usize,
        mode: Mode,
        second_page: Option<usize>,
    ) -> Self {
        Self {
            ops: ops.into_boxed_slice(),
            links: [Cell::new(std::ptr::null()), Cell::new(std::ptr::null())],
            count,
            len,
            host,
            mode,
            second_page,
            dead: Cell::new(false),
            heat: Cell::new(0),
        }
    }

    /// The first operation.
    #[inline(always)]
    pub fn first(&self) -> OpPtr {
        // SAFETY: blocks are made with a terminator at the end, and live until no execution is in them.
        unsafe { OpPtr::new(self.ops.as_ptr()) }
    }

    /// Whether it was forgotten: it leads back to the run loop, and its page need not be guarded any more.
    pub fn is_dead(&self) -> bool {
        self.dead.get()
    }

    /// The operations.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Index of an operation of this block.
    pub fn index_of(&self, op: *const Op) -> Option<usize> {
        let at = (op as usize).wrapping_sub(self.ops.as_ptr() as usize) / size_of::<Op>();
        (at < self.ops.len()).then_some(at)
    }
}

/// Hashes the keys of blocks: addresses, whose entropy is in the low bits.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(*b as u64);
        }
    }

    fn write_u32(&mut self, n: u32) {
        self.write_u64(n as u64);
    }

    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Jump {
    ip: u64,
    key: u64,
    block: *const Block,
}

/// A vCPU's blocks.
#[derive(Debug)]
pub struct Cache {
    /// Every block ever made since the last flush, dead ones too: whoever still points at one finds it.
    #[allow(clippy::vec_box)] // blocks must not move
    all: Vec<Box<Block>>,
    ops: usize,
    by_code: AddressMap<(usize, u32), *const Block>,
    by_page: AddressMap<usize, Vec<*const Block>>,
    jumps: Box<[Jump]>,
    wants_flush: bool,
    /// The translator, if there is one: what it made of code goes when the code's blocks go.
    pub translator: Option<Box<crate::translate::Translator>>,
}

// SAFETY: the raw pointers point into `all`, which moves along with them; only the owning thread follows them.
unsafe impl Send for Cache {}

const NO_JUMP: Jump = Jump { ip: 0, key: u64::MAX, block: std::ptr::null() };

#[inline(always)]
fn jump_slot(ip: u64) -> usize {
    let page = (ip >> 12 ^ ip >> 18) as usize % JUMP_PAGES;
    let within = (ip ^ ip >> 6) as usize % JUMP_PER_PAGE;
    page * JUMP_PER_PAGE + within
}

impl Cache {
    /// Empty.
    pub fn new() -> Self {
        Self {
            all: Vec::new(),
            ops: 0,
            by_code: AddressMap::default(),
            by_page: AddressMap::default(),
            jumps: vec![NO_JUMP; JUMP_PAGES * JUMP_PER_PAGE].into_boxed_slice(),
            wants_flush: false,
            translator: None,
        }
    }

    /// Operations held.
    pub fn ops(&self) -> usize {
        self.ops
    }

    /// Whether it is time to forget everything.
    pub fn full(&self) -> bool {
        self.ops > CAPACITY
    }

    /// The block of the code at a host address.
    pub fn find(&self, host: usize, mode: Mode) -> Option<*const Block> {
        self.by_code.get(&(host, mode.bits())).copied()
    }

    /// Adds a block and returns where it is now.
    pub fn add(&mut self, block: Block) -> *const Block {
        let block = Box::new(block);
        let p: *const Block = &*block;
        self.ops += block.ops.len();
        self.by_code.insert((block.host, block.mode.bits()), p);
        self.by_page.entry(block.host & !0xfff).or_default().push(p);
        if let Some(second) = block.second_page {
            self.by_page.entry(second).or_default().push(p);
        }
        self.all.push(block);
        p
    }

    /// Whether blocks of a page (host address) exist.
    pub fn has_page(&self, page: usize) -> bool {
        self.by_page.contains_key(&page)
    }

    /// Drops the blocks of a page (host address); returns how many. One that runs now leads back to the run loop
    /// after the current instruction.
    pub fn drop_page(&mut self, page: usize) -> usize {
        if let Some(t) = &mut self.translator {
            t.drop_page(page);
        }
        let Some(blocks) = self.by_page.remove(&page) else { return 0 };
        for p in &blocks {
            // SAFETY: everything in `by_page` is in `all`.
            let b = unsafe { &**p };
            if b.dead.replace(true) {
                continue;
            }
            self.by_code.remove(&(b.host, b.mode.bits()));
            let ops = b.ops.as_ptr().cast_mut();
            for i in 0..b.ops.len() {
                // SAFETY: within the block. References to operations are short-lived (`OpPtr`), none is held by the
                // code that leads here beyond fields already read, and handlers are read through raw pointers.
                unsafe { (&raw mut (*ops.add(i)).handler).write(stale) };
            }
            b.links.iter().for_each(|l| l.set(std::ptr::null()));
        }
        blocks.len()
    }

    /// Drops all blocks: none is entered again, and one that runs ends after the current instruction. The memory is
    /// freed by [`Self::flush`].
    pub fn drop_all(&mut self) {
        let pages: Vec<usize> = self.by_page.keys().copied().collect();
        for page in pages {
            self.drop_page(page);
        }
        if let Some(t) = &mut self.translator {
            t.drop_all();
        }
        self.jumps.fill(NO_JUMP);
        self.wants_flush = true;
    }

    /// Asks for [`Self::flush`] when no block runs.
    pub fn request_flush(&mut self) {
        self.wants_flush = true;
    }

    /// Whether [`Self::flush`] should be called when no block runs.
    pub fn wants_flush(&self) -> bool {
        self.wants_flush
    }

    /// Forgets everything. Only while no block runs and nothing points at one.
    pub fn flush(&mut self) {
        self.by_code.clear();
        self.by_page.clear();
        self.all.clear();
        self.ops = 0;
        self.wants_flush = false;
        if let Some(t) = &mut self.translator {
            t.flush();
        }
        self.jumps.fill(NO_JUMP);
    }

    /// Pages (host addresses) that hold code.
    pub fn pages(&self) -> impl Iterator<Item = usize> + '_ {
        self.by_page.keys().copied()
    }

    /// Looks up the block that starts at `ip`, if it was entered before with the same key.
    #[inline(always)]
    pub fn jump(&self, ip: u64, key: u64) -> Option<*const Block> {
        // SAFETY: `jump_slot` is below the number of entries.
        let j = unsafe { self.jumps.get_unchecked(jump_slot(ip)) };
        (j.ip == ip && j.key == key).then_some(j.block)
    }

    /// Remembers the block that starts at `ip`.
    pub fn set_jump(&mut self, ip: u64, key: u64, block: *const Block) {
        self.jumps[jump_slot(ip)] = Jump { ip, key, block };
    }

    /// Forgets what is remembered for an entry point.
    fn forget_jump(&mut self, ip: u64) {
        self.jumps[jump_slot(ip)] = NO_JUMP;
    }

    /// Forgets the entry points in a linear page, and in the one before (an instruction may reach over).
    pub fn drop_jumps(&mut self, lin: u64) {
        if let Some(t) = &mut self.translator {
            t.drop_linear(lin);
        }
        for page in [lin, lin.wrapping_sub(0x1000)] {
            let group = jump_slot(page & !0xfff) / JUMP_PER_PAGE * JUMP_PER_PAGE;
            self.jumps[group..group + JUMP_PER_PAGE].fill(NO_JUMP);
        }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self::new()
    }
}

/// Handler of operations in blocks that were dropped: back to the run loop, which decodes afresh.
fn stale(cpu: &mut Cpu, op: OpPtr) -> Next {
    cpu.rip = cpu.ip_at(op.off);
    cpu.unretire(op);
    cpu.link = std::ptr::null();
    // It may be what led here.
    cpu.code.forget_jump(cpu.rip);
    Next::LOOKUP
}

impl Cpu {
    /// Key that tells jump cache entries of different modes and address spaces apart.
    #[inline(always)]
    pub fn jump_key(&self) -> u64 {
        (self.mmu.tlb.generation() as u64) << 32 | self.mode.bits() as u64
    }

    /// The instruction at `op` and those after it in the running block were not executed.
    pub fn unretire(&mut self, op: OpPtr) {
        if self.block.is_null() {
            return;
        }
        // SAFETY: `block` is the block that runs; it lives until the cache is flushed, which happens between blocks.
        let b = unsafe { &*self.block };
        if let Some(i) = b.index_of(op.as_ptr()) {
            self.retired -= (b.count as u64).saturating_sub(i as u64);
        }
    }

    /// Drops the blocks of a page (host address) on this and all other vCPUs.
    #[cold]
    pub fn drop_code_everywhere(&mut self, page: usize) {
        self.stats.blocks_dropped += self.code.drop_page(page) as u64;
        self.vm.clone().drop_code(Some(&self.me), page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jump_slots_of_a_page_are_one_group() {
        let group = |ip: u64| jump_slot(ip) / JUMP_PER_PAGE;
        for page in [0u64, 0xffff_ffff_8100_0000, 0x7fff_1234_5000] {
            for at in 0..4096 {
                assert_eq!(group(page + at), group(page));
            }
        }
    }
}
