//! Translation look-aside buffers.

use super::PAGE_MASK;

/// Entries of a table at first: direct-mapped by linear page number.
pub const TLB_SIZE: usize = 1 << 10;
/// Most entries of a table.
const TLB_MOST: usize = 1 << 14;
/// log2 of the size of an entry.
pub const ENTRY_SHIFT: u32 = size_of::<TlbEntry>().trailing_zeros();
/// Entries that remember where pages are writable.
const WRITERS: usize = 1 << 12;
/// Entries of a table for instruction fetch.
const EXEC_SIZE: usize = 256;
/// Address spaces (PCIDs) held at a time.
const CONTEXTS: usize = 6;
/// Fills that a table remembers, to undo them one by one.
const REMEMBERED: usize = 96;

/// A tag that no page has.
pub const NO_TAG: u64 = u64::MAX;
/// Set in a tag: the entry is valid, but the access goes the slow way (device registers, watched pages).
pub const SLOW: u64 = 1;

/// Bits of [`TlbEntry::info`], below the physical page address.
pub mod info {
    /// The page is global.
    pub const GLOBAL: u64 = 1;
    /// There is no host memory behind it.
    pub const MMIO: u64 = 2;
    /// Host memory, but writes go to the devices.
    pub const ROM: u64 = 4;
}

/// Translation of a page for data accesses.
///
/// An access of `size` bytes at `linear` may use the host address `linear + addend` if
/// `(linear + size - 1) & !0xfff == tag`, where the tag is `read` or `write`, and the entry is that of `linear`'s page.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct TlbEntry {
    /// Linear page address if it may be read; other values never match.
    pub read: u64,
    /// Linear page address if it may be written without further ado.
    pub write: u64,
    /// Host address minus linear address.
    pub addend: u64,
    /// Physical page address and [`info`] bits.
    pub info: u64,
}

impl TlbEntry {
    /// Holds nothing.
    pub const EMPTY: TlbEntry = TlbEntry { read: NO_TAG, write: NO_TAG, addend: 0, info: 0 };
}

/// Translation of a page for instruction fetch.
#[derive(Clone, Copy, Debug)]
pub struct ExecEntry {
    /// Linear page address, or [`NO_TAG`].
    pub tag: u64,
    /// Host address of the page.
    pub host: usize,
    /// Whether the page is global.
    pub global: bool,
}

const NO_EXEC: ExecEntry = ExecEntry { tag: NO_TAG, host: 0, global: false };

/// Whose privileges an access has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Privilege {
    /// CPL 3.
    User = 0,
    /// Supervisor, kept from user pages if SMAP is on.
    Supervisor = 1,
    /// Supervisor with EFLAGS.AC set.
    SupervisorAc = 2,
}

/// One table with the list of its latest fills.
#[derive(Debug)]
struct TableOf<E: Copy> {
    entries: Box<[E]>,
    fills: Vec<u16>,
    overflow: bool,
    /// Fills since the table was cleared.
    count: usize,
    /// Valid entries that others took the place of, since the table has its size.
    evicted: usize,
}

impl<E: Copy> TableOf<E> {
    fn new(size: usize, empty: E) -> Self {
        Self {
            entries: vec![empty; size].into_boxed_slice(),
            fills: Vec::with_capacity(REMEMBERED),
            overflow: false,
            count: 0,
            evicted: 0,
        }
    }

    fn filled(&mut self, index: usize) {
        self.count += 1;
        if self.fills.len() < REMEMBERED {
            self.fills.push(index as u16);
        } else {
            self.overflow = true;
        }
    }

    fn clear(&mut self, empty: E) {
        if self.overflow {
            self.entries.fill(empty);
        } else {
            for i in &self.fills {
                self.entries[*i as usize] = empty;
            }
        }
        self.fills.clear();
        self.overflow = false;
        self.count = 0;
    }

    /// Index for a linear address.
    fn slot(&self, lin: u64) -> usize {
        (lin >> 12) as usize & (self.entries.len() - 1)
    }
}

impl TableOf<TlbEntry> {
    /// Enters a translation. A table in which entries keep driving out each other grows.
    fn fill(&mut self, lin: u64, entry: TlbEntry) {
        let i = self.slot(lin);
        let old = self.entries[i];
        let page = lin & PAGE_MASK;
        if old.read != NO_TAG && old.read & !SLOW != page {
            self.evicted += 1;
            if self.evicted > self.entries.len() && self.entries.len() < TLB_MOST {
                self.grow();
                return self.fill(lin, entry);
            }
        }
        self.entries[i] = entry;
        self.filled(i);
    }

    fn grow(&mut self) {
        let size = self.entries.len() * 4;
        let old = std::mem::replace(&mut self.entries, vec![TlbEntry::EMPTY; size].into_boxed_slice());
        for e in old.iter().filter(|e| e.read != NO_TAG) {
            let i = self.slot(e.read);
            self.entries[i] = *e;
        }
        self.evicted = 0;
        self.overflow = true;
    }

    /// Empties the table. One that has become large for nothing shrinks.
    fn empty(&mut self) {
        if self.entries.len() > TLB_SIZE && self.count < self.entries.len() / 16 {
            *self = Self::new(TLB_SIZE, TlbEntry::EMPTY);
            return;
        }
        self.clear(TlbEntry::EMPTY);
    }
}

/// Where a physical page may be written through: the two translations entered last.
#[derive(Clone, Copy, Debug)]
struct Writers {
    /// Host address of the page.
    host: u64,
    /// Linear page addresses; in the low bits, table and context.
    at: [u64; 2],
}

const NO_WRITERS: Writers = Writers { host: 0, at: [NO_TAG; 2] };

fn writers_slot(host: u64) -> usize {
    (host >> 12 ^ host >> 24) as usize & (WRITERS - 1)
}

/// The translations of one address space.
#[derive(Debug)]
pub struct Context {
    /// Process-context identifier.
    pub pcid: u16,
    /// Changes whenever translations are dropped; tags what is derived from them.
    pub generation: u32,
    last_use: u64,
    data: [TableOf<TlbEntry>; 3],
    exec: [TableOf<ExecEntry>; 2],
    /// Which large pages may have parts in the tables.
    large: [u64; 64],
}

fn exec_slot(lin: u64) -> usize {
    (lin >> 12) as usize & (EXEC_SIZE - 1)
}

fn large_bit(lin: u64, shift: u32) -> (usize, u64) {
    let h = ((lin >> shift) ^ shift as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    ((h >> 6) as usize & 63, 1 << (h & 63))
}

impl Context {
    fn new(pcid: u16) -> Self {
        Self {
            pcid,
            generation: 0,
            last_use: 0,
            data: std::array::from_fn(|_| TableOf::new(TLB_SIZE, TlbEntry::EMPTY)),
            exec: std::array::from_fn(|_| TableOf::new(EXEC_SIZE, NO_EXEC)),
            large: [0; 64],
        }
    }

    fn clear(&mut self) {
        self.data.iter_mut().for_each(TableOf::empty);
        self.exec.iter_mut().for_each(|t| t.clear(NO_EXEC));
        self.large = [0; 64];
    }

    fn has_large(&self, lin: u64) -> bool {
        [21, 22, 30].iter().any(|s| {
            let (i, b) = large_bit(lin, *s);
            self.large[i] & b != 0
        })
    }
}

/// All TLBs of a vCPU.
#[derive(Debug)]
pub struct Tlb {
    contexts: Vec<Context>,
    current: usize,
    clock: u64,
    generations: u32,
    global_epoch: u64,
    /// Every entry that allows writing is in here.
    writers: Box<[Writers]>,
}

impl Tlb {
    /// Empty.
    pub fn new() -> Self {
        let mut t = Self {
            contexts: vec![Context::new(0)],
            current: 0,
            clock: 0,
            generations: 0,
            global_epoch: 0,
            writers: vec![NO_WRITERS; WRITERS].into_boxed_slice(),
        };
        t.contexts[0].generation = t.fresh();
        t
    }

    fn fresh(&mut self) -> u32 {
        self.generations = self.generations.wrapping_add(1);
        self.generations
    }

    /// Changes whenever global translations may have been dropped, single pages aside.
    pub fn global_epoch(&self) -> u64 {
        self.global_epoch
    }

    /// Number of the current address space's generation.
    pub fn generation(&self) -> u32 {
        self.contexts[self.current].generation
    }

    /// The table for data accesses of a privilege, in the current address space.
    /// Its size is a power of two.
    pub fn table(&mut self, p: Privilege) -> &mut [TlbEntry] {
        &mut self.contexts[self.current].data[p as usize].entries
    }

    /// The entry for a linear address.
    #[inline]
    pub fn get(&self, p: Privilege, lin: u64) -> TlbEntry {
        let t = &self.contexts[self.current].data[p as usize];
        t.entries[t.slot(lin)]
    }

    /// Sets the entry for a linear address. `large` is log2 of the page's size if it is a large page. The table may move.
    pub fn fill(&mut self, p: Privilege, lin: u64, entry: TlbEntry, large: Option<u32>) {
        if entry.write & SLOW == 0 {
            self.note_writer(p, entry);
        }
        let c = &mut self.contexts[self.current];
        c.data[p as usize].fill(lin, entry);
        if let Some(shift) = large {
            let (i, b) = large_bit(lin, shift);
            c.large[i] |= b;
        }
    }

    /// The translation of a linear address for fetching.
    #[inline]
    pub fn exec(&self, user: bool, lin: u64) -> Option<ExecEntry> {
        let e = self.contexts[self.current].exec[user as usize].entries[exec_slot(lin)];
        (e.tag == lin & PAGE_MASK).then_some(e)
    }

    /// Sets the translation of a linear address for fetching.
    pub fn fill_exec(&mut self, user: bool, lin: u64, host: usize, global: bool, large: Option<u32>) {
        let c = &mut self.contexts[self.current];
        let i = exec_slot(lin);
        c.exec[user as usize].entries[i] = ExecEntry { tag: lin & PAGE_MASK, host, global };
        c.exec[user as usize].filled(i);
        if let Some(shift) = large {
            let (i, b) = large_bit(lin, shift);
            c.large[i] |= b;
        }
    }

    /// Drops every translation of every address space.
    pub fn flush_all(&mut self) {
        self.global_epoch += 1;
        for i in 0..self.contexts.len() {
            self.contexts[i].clear();
            self.contexts[i].generation = self.fresh();
        }
    }

    /// Drops the translations of the current address space (global ones too, which is allowed).
    pub fn flush_current(&mut self) {
        let g = self.fresh();
        let c = &mut self.contexts[self.current];
        c.clear();
        c.generation = g;
    }

    /// Drops the translations of one address space.
    pub fn flush_pcid(&mut self, pcid: u16) {
        if let Some(i) = self.contexts.iter().position(|c| c.pcid == pcid) {
            self.contexts[i].clear();
            self.contexts[i].generation = self.fresh();
        }
    }

    /// Makes an address space current, with the translations it had.
    pub fn switch(&mut self, pcid: u16) {
        self.clock += 1;
        let found = self.contexts.iter().position(|c| c.pcid == pcid);
        self.current = found.unwrap_or_else(|| {
            if self.contexts.len() < CONTEXTS {
                let mut c = Context::new(pcid);
                c.generation = self.fresh();
                self.contexts.push(c);
                return self.contexts.len() - 1;
            }
            let (oldest, _) = self
                .contexts
                .iter()
                .enumerate()
                .min_by_key(|(_, c)| c.last_use)
                .unwrap_or((0, &self.contexts[0]));
            let g = self.fresh();
            let c = &mut self.contexts[oldest];
            c.clear();
            c.pcid = pcid;
            c.generation = g;
            oldest
        });
        self.contexts[self.current].last_use = self.clock;
    }

    /// INVLPG: drops the translations of one page in the current address space, and global ones in all.
    /// Returns whether more than that page's was dropped.
    pub fn flush_page(&mut self, lin: u64) -> bool {
        let mut more = false;
        for i in 0..self.contexts.len() {
            let current = i == self.current;
            if self.contexts[i].has_large(lin) {
                // The page's siblings in the large page have entries of their own; rare enough to drop everything.
                let g = self.fresh();
                self.contexts[i].clear();
                self.contexts[i].generation = g;
                self.global_epoch += 1;
                more |= current;
                continue;
            }
            let page = lin & PAGE_MASK;
            let c = &mut self.contexts[i];
            for t in &mut c.data {
                let e = &mut t.entries[(lin >> 12) as usize & (t.entries.len() - 1)];
                let held = e.read & PAGE_MASK == page || e.write & PAGE_MASK == page;
                if held && (current || e.info & info::GLOBAL != 0) {
                    *e = TlbEntry::EMPTY;
                }
            }
            for t in &mut c.exec {
                let e = &mut t.entries[exec_slot(lin)];
                if e.tag == page && (current || e.global) {
                    *e = NO_EXEC;
                }
            }
        }
        more
    }

    /// Drops the translations of one page in one address space (INVPCID).
    pub fn flush_page_pcid(&mut self, pcid: u16, lin: u64) {
        if self.contexts[self.current].pcid == pcid {
            self.flush_page(lin);
        } else {
            self.flush_pcid(pcid);
        }
    }

    /// Remembers an entry that allows writing, so that [`Self::protect`] finds it. What cannot be remembered any more
    /// loses the right.
    fn note_writer(&mut self, p: Privilege, entry: TlbEntry) {
        let host = entry.write.wrapping_add(entry.addend);
        let at = entry.write | (self.current as u64) << 4 | p as u64;
        let w = &mut self.writers[writers_slot(host)];
        let old = *w;
        if old.host != host {
            *w = Writers { host, at: [at, NO_TAG] };
            self.forbid(old.host, old.at[0]);
            self.forbid(old.host, old.at[1]);
        } else if !old.at.contains(&at) {
            w.at = [at, old.at[0]];
            self.forbid(host, old.at[1]);
        }
    }

    /// Takes the right to write from an entry, if it is still that of the page.
    fn forbid(&mut self, host: u64, at: u64) {
        let Some(c) = self.contexts.get_mut((at >> 4 & 0xff) as usize) else { return };
        let Some(t) = c.data.get_mut((at & 0xf) as usize) else { return };
        let i = t.slot(at);
        let e = &mut t.entries[i];
        if e.write == at & PAGE_MASK && e.write.wrapping_add(e.addend) == host {
            e.write = NO_TAG;
        }
    }

    /// Takes the right to write a physical page (by host address) without further ado from all entries.
    pub fn protect(&mut self, host: usize) {
        let w = &mut self.writers[writers_slot(host as u64)];
        if w.host == host as u64 {
            let at = std::mem::replace(w, NO_WRITERS).at;
            self.forbid(host as u64, at[0]);
            self.forbid(host as u64, at[1]);
        }
    }
}

impl Default for Tlb {
    fn default() -> Self {
        Self::new()
    }
}
