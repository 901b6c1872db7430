//! The code cache of a vCPU: blocks, links between them, look-up, invalidation.
//!
//! Each vCPU has its own, so nothing here is locked and code is patched by the thread that executes it. The cache's memory
//! is mapped twice, writable and executable; a page is never both at one address. When it is full everything is dropped.
#![allow(unsafe_code)] // memory mapping, and patching of code in it

use super::Counters;
use super::emit::{Emitter, Reach};
use super::scan;
use crate::block::AddressHasher;
use crate::state::Mode;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::BuildHasherDefault;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// log2 of the entries of the jump table.
pub const JUMP_BITS: u32 = 12;
/// log2 of the size of an entry.
pub const JUMP_SHIFT: u8 = 5;
/// Times that a group of accesses may cross pages.
const CROSSINGS: u32 = 32;
/// Room left for one more block.
const RESERVE: usize = 1 << 17;
/// Least size of a cache in bytes.
pub const LEAST: usize = 1 << 20;
/// Largest size of a cache in bytes: relative jumps reach everywhere.
pub const MOST: usize = 1 << 30;

/// An entry of the jump table.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Jump {
    ip: u64,
    key: u64,
    code: u64,
}

const NO_JUMP: Jump = Jump { ip: 0, key: u64::MAX, code: 0 };

/// Bits of [`Site::bits`].
pub mod site {
    /// The access writes.
    pub const WRITE: u8 = 1;
    /// Fill the TLB, but have the interpreter do the instruction.
    pub const ONCE: u8 = 2;
    /// The vector registers must be loaded for SSE.
    pub const SSE: u8 = 4;
    /// The vector registers must be loaded for AVX.
    pub const AVX: u8 = 8;
    /// The instruction is the block's last, and may lead anywhere.
    pub const END: u8 = 16;
    /// The check is for following accesses as well.
    pub const GROUP: u8 = 32;
}

/// A place in translated code that may take the slow path.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// The guest instruction.
    pub ip: u64,
    /// The one after it.
    pub next_ip: u64,
    /// Where to try again (first an offset in the block, later one in the cache).
    pub retry: u32,
    /// Where the instruction after it begins (likewise).
    pub resume: u32,
    /// Bytes accessed; 0: the interpreter is wanted.
    pub size: u8,
    /// Required alignment.
    pub align: u8,
    /// See [`site`].
    pub bits: u8,
}

/// Addresses of the fixed pieces of code (see `stubs`).
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Fixed {
    pub enter: u64,
    pub slow: u64,
    pub exit_link: u64,
    pub exit_link_flags: u64,
    pub exit_at: u64,
    pub exit_poll: u64,
    pub exit_next: u64,
    pub lookup: u64,
    pub lookup_miss: u64,
    pub base_return: u64,
    pub fresh: u64,
    /// Look-ups of stack accesses, by log2 of their size: reads and writes.
    pub stack: [[u64; 8]; 2],
}

/// A translated block.
#[derive(Debug)]
struct Native {
    ip: u64,
    host: usize,
    mode: u32,
    /// Entry with flags in [`crate::Cpu::cc`].
    entry: u64,
    /// Entry with flags in the host's flags.
    host_entry: u64,
    dead: bool,
    /// Links that lead here.
    incoming: Vec<u32>,
}

/// A link out of a block.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Offset in the cache of what to patch.
    at: u32,
    /// Offset of the code that leaves to the dispatcher.
    stub: u32,
    /// Guest address.
    pub target: u64,
    reach: Reach,
    host_flags: bool,
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// A translator with its code cache.
#[derive(Debug)]
pub struct Translator {
    write: *mut u8,
    exec: u64,
    size: usize,
    used: usize,
    /// Where blocks begin, behind the fixed code.
    floor: usize,
    /// Fixed code.
    pub fixed: Fixed,
    blocks: Vec<Native>,
    by_code: Map<(u64, usize, u32), u32>,
    by_page: Map<usize, Vec<u32>>,
    links: Vec<Link>,
    sites: Vec<Site>,
    jumps: Box<[Jump]>,
    /// Links to other pages that rely on global translations.
    crossing: Vec<u32>,
    /// Groups of accesses that crossed pages: how often, by the address of the instruction.
    crossed: Map<u64, u32>,
    /// Blocks to be translated without groups of accesses.
    plain: HashSet<u64>,
    /// Linear pages with entries in the jump table or in slots.
    linear: HashSet<u64>,
    /// Part of every key: changes when entries of unknown places must go.
    salt: u32,
    /// All flags count as live where instructions may fault.
    pub exact: bool,
    /// Changes whenever running code may have become stale.
    pub version: u64,
    /// Global translations of the MMU as of which `crossing` is good.
    pub global_epoch: u64,
    /// Counters.
    pub counters: Counters,
}

// SAFETY: the raw pointer is to a mapping that the translator owns alone.
unsafe impl Send for Translator {}

fn jump_slot(ip: u64) -> usize {
    // As `branch::lookup` computes it: on the low 32 bits.
    let low = ip as u32;
    (low >> 12 ^ low) as usize & ((1 << JUMP_BITS) - 1)
}

impl Translator {
    /// With an empty cache of `size` bytes (clamped to what is possible).
    ///
    /// # Errors
    /// The host refuses the memory, or to execute it.
    pub fn new(size: usize) -> io::Result<Self> {
        let size = size.clamp(LEAST, MOST).next_multiple_of(4096);
        let (write, exec) = map_twice(size)?;
        let mut t = Self {
            write,
            exec: exec as u64,
            size,
            used: 0,
            floor: 0,
            fixed: Fixed::default(),
            blocks: Vec::new(),
            by_code: Map::default(),
            by_page: Map::default(),
            links: Vec::new(),
            sites: Vec::new(),
            jumps: vec![NO_JUMP; 1 << JUMP_BITS].into_boxed_slice(),
            crossing: Vec::new(),
            crossed: Map::default(),
            plain: HashSet::new(),
            linear: HashSet::new(),
            salt: 0,
            exact: false,
            version: 0,
            global_epoch: 0,
            counters: Counters::default(),
        };
        let (code, fixed) = super::stubs::build(t.exec);
        t.put(0, &code);
        t.fixed = fixed;
        t.used = code.len().next_multiple_of(64);
        t.floor = t.used;
        Ok(t)
    }

    /// The jump table.
    pub fn jumps(&self) -> *const Jump {
        self.jumps.as_ptr()
    }

    /// Key of what is valid under a jump key of the interpreter's cache.
    pub fn key(&self, jump_key: u64) -> u64 {
        // Mode bits need a byte; generations have 32 bits.
        jump_key ^ u64::from(self.salt) << 8
    }

    /// Whether it is time to drop everything.
    pub fn full(&self) -> bool {
        self.size - self.used < RESERVE || self.sites.len() > 1 << 26
    }

    /// Drops everything. Only while no translated code runs.
    pub fn flush(&mut self) {
        self.counters.flushes += 1;
        self.version += 1;
        self.used = self.floor;
        self.blocks.clear();
        self.by_code.clear();
        self.by_page.clear();
        self.links.clear();
        self.sites.clear();
        self.jumps.fill(NO_JUMP);
        self.crossing.clear();
        self.linear.clear();
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size, "code cache overrun");
        // SAFETY: within the writable mapping, as just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.add(at), bytes.len()) };
    }

    /// The block of the code at linear address `ip` and host address `host`.
    pub fn find(&self, ip: u64, host: usize, mode: Mode) -> Option<u32> {
        self.by_code.get(&(ip, host, mode.bits())).copied()
    }

    /// Entry of a block, for flags in [`crate::Cpu::cc`].
    pub fn entry(&self, block: u32) -> u64 {
        self.blocks[block as usize].entry
    }

    /// The entry that the jump table has for `ip`.
    #[inline]
    pub fn jump(&self, ip: u64, key: u64) -> Option<u64> {
        let j = &self.jumps[jump_slot(ip)];
        (j.ip == ip && j.key == key).then_some(j.code)
    }

    /// Enters a block into the jump table.
    pub fn set_jump(&mut self, key: u64, block: u32) {
        let b = &self.blocks[block as usize];
        self.jumps[jump_slot(b.ip)] = Jump { ip: b.ip, key, code: b.entry };
        self.linear.insert(b.ip & !0xfff);
    }

    /// The link of that number.
    pub fn link(&self, n: u32) -> Option<Link> {
        self.links.get(n as usize).copied()
    }

    /// Site of that number, with offsets in the cache.
    pub fn site(&self, n: u64) -> Option<Site> {
        self.sites.get(n as usize).copied()
    }

    /// Address of an offset in the cache.
    pub fn address(&self, offset: u32) -> u64 {
        self.exec + u64::from(offset)
    }

    /// Translates the block at `ip`, whose code is at `host` (an address in a page of guest memory that is marked as code).
    /// `page` is a copy of that page. `None`: there is nothing to translate.
    pub fn translate(
        &mut self,
        page: &[u8; 4096],
        ip: u64,
        host: usize,
        mode: Mode,
        global: bool,
    ) -> Option<u32> {
        if self.full() {
            return None;
        }
        let bits = if mode.is64() { 64 } else { 32 };
        let scan = scan::scan(page, ip, bits, self.exact);
        if scan.insts.is_empty() {
            return None;
        }
        let at = self.used;
        let base = self.exec + at as u64;
        let first_site = self.sites.len();
        let first_link = self.links.len();
        let out = Emitter::new(&self.fixed, &mut self.sites, first_link, ip, base, global, bits)
            .block(&scan, self.plain.contains(&ip));
        if at + out.code.len() + 4096 > self.size {
            self.sites.truncate(first_site);
            return None;
        }
        for s in &mut self.sites[first_site..] {
            s.retry += at as u32;
            s.resume += at as u32;
        }
        for l in &out.links {
            self.links.push(Link {
                at: (at + l.at) as u32,
                stub: (at + l.stub) as u32,
                target: l.target,
                reach: l.reach,
                host_flags: l.host_flags,
            });
        }
        self.put(at, &out.code);
        self.used = (at + out.code.len()).next_multiple_of(16);
        let id = self.blocks.len() as u32;
        self.blocks.push(Native {
            ip,
            host,
            mode: mode.bits(),
            entry: base,
            host_entry: base + out.host_entry as u64,
            dead: false,
            incoming: Vec::new(),
        });
        self.by_code.insert((ip, host, mode.bits()), id);
        self.by_page.entry(host & !0xfff).or_default().push(id);
        self.counters.blocks += 1;
        self.counters.instructions += scan.insts.len() as u64;
        self.counters.bytes += out.code.len() as u64;
        Some(id)
    }

    /// Lets link `n` lead to a block directly. `key` is the current one; `global` tells whether the target's page has a
    /// global translation.
    pub fn connect(&mut self, n: u32, block: u32, key: u64, global: bool) {
        let l = self.links[n as usize];
        let b = &mut self.blocks[block as usize];
        if b.dead || b.ip != l.target {
            return;
        }
        let entry = if l.host_flags { b.host_entry } else { b.entry };
        let page = b.ip & !0xfff;
        match l.reach {
            Reach::Global if !global => return,
            Reach::Slot => {
                b.incoming.push(n);
                self.linear.insert(page);
                self.put(l.at as usize + 8, &entry.to_le_bytes());
                self.put(l.at as usize, &key.to_le_bytes());
                return;
            }
            Reach::Global => {
                b.incoming.push(n);
                self.crossing.push(n);
            }
            Reach::Page => b.incoming.push(n),
        }
        self.patch(l.at, entry);
    }

    /// Points a relative offset at an address.
    fn patch(&mut self, at: u32, to: u64) {
        let next = self.exec + u64::from(at) + 4;
        self.put(at as usize, &(to.wrapping_sub(next) as i32).to_le_bytes());
    }

    fn disconnect(&mut self, n: u32) {
        let l = self.links[n as usize];
        self.counters.unlinked += 1;
        match l.reach {
            Reach::Slot => self.put(l.at as usize, &[0; 8]),
            _ => self.patch(l.at, self.exec + u64::from(l.stub)),
        }
    }

    /// The group of accesses that begins with the instruction at `ip` crosses pages. If that happens often, the blocks with
    /// the instruction are to be made again, without groups.
    pub fn group_crossed(&mut self, ip: u64) {
        let n = self.crossed.entry(ip).or_default();
        *n += 1;
        if *n != CROSSINGS {
            return;
        }
        // Blocks are short, and lie in one page.
        let near = |b: &&mut Native| !b.dead && b.ip <= ip && ip - b.ip < 64 * 15 && b.ip >> 12 == ip >> 12;
        let pages: Vec<usize> = self
            .blocks
            .iter_mut()
            .filter(near)
            .map(|b| (self.plain.insert(b.ip), b.host & !0xfff).1)
            .collect();
        for page in pages {
            self.drop_page(page);
        }
        if self.crossed.len() > 1 << 16 {
            self.crossed.clear();
            self.plain.clear();
        }
    }

    /// Drops the blocks of a page (host address). One that runs now goes on until it leaves, which its slow paths do when
    /// they see a new [`Self::version`].
    pub fn drop_page(&mut self, page: usize) {
        let Some(ids) = self.by_page.remove(&page) else { return };
        self.version += 1;
        for id in ids {
            self.counters.dropped += 1;
            let b = &mut self.blocks[id as usize];
            b.dead = true;
            let key = (b.ip, b.host, b.mode);
            let (ip, entry) = (b.ip, b.entry);
            let incoming = std::mem::take(&mut b.incoming);
            self.by_code.remove(&key);
            let j = &mut self.jumps[jump_slot(ip)];
            if j.code == entry {
                *j = NO_JUMP;
            }
            for n in incoming {
                self.disconnect(n);
            }
        }
    }

    /// Drops everything, running code included, as [`Self::drop_page`] does.
    pub fn drop_all(&mut self) {
        let pages: Vec<usize> = self.by_page.keys().copied().collect();
        for p in pages {
            self.drop_page(p);
        }
    }

    /// A translation of the linear page of `lin` was dropped.
    pub fn drop_linear(&mut self, lin: u64) {
        let page = lin & !0xfff;
        if self.linear.contains(&page) {
            self.salt = (self.salt + 1) & 0xff_ffff;
            self.version += 1;
            self.linear.clear();
            if self.salt == 0 {
                // Keys would repeat.
                self.drop_all();
            }
        }
        let crossing = self.crossing.iter().any(|n| self.links[*n as usize].target & !0xfff == page);
        if crossing {
            self.uncross();
        }
    }

    /// Global translations were dropped.
    pub fn uncross(&mut self) {
        self.version += 1;
        for n in std::mem::take(&mut self.crossing) {
            self.disconnect(n);
        }
    }

    /// Bytes in use, and blocks.
    pub fn usage(&self) -> (usize, usize) {
        (self.used, self.blocks.iter().filter(|b| !b.dead).count())
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `map_twice` with this size, and nothing executes in them: the vCPU that did
        // is being dropped.
        unsafe {
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.exec as *mut libc::c_void, self.size);
        }
    }
}

fn map_twice(size: usize) -> io::Result<(*mut u8, *mut u8)> {
    // SAFETY: the name is a NUL-terminated literal; the result is checked.
    let fd = unsafe { libc::memfd_create(c"kvasir-code".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, owned by nothing else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size as u64)?;
    let map = |protection| {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel likes; the result is checked.
        let p = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, file.as_raw_fd(), 0) };
        if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p.cast::<u8>()) }
    };
    let write = map(libc::PROT_READ | libc::PROT_WRITE)?;
    match map(libc::PROT_READ | libc::PROT_EXEC) {
        Ok(exec) => Ok((write, exec)),
        Err(e) => {
            // SAFETY: made above with this size.
            unsafe { libc::munmap(write.cast(), size) };
            Err(e)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(code: &[u8]) -> [u8; 4096] {
        let mut p = [0x90; 4096];
        p[..code.len()].copy_from_slice(code);
        p
    }

    #[test]
    fn blocks_are_found_linked_and_dropped() {
        let mut t = Translator::new(LEAST).unwrap();
        // inc eax; jmp 0x1010
        let p = page(&[0xff, 0xc0, 0xeb, 0x0c]);
        let a = t.translate(&p, 0x1000, 0x7000_0000, Mode::CODE64, false).unwrap();
        let b = t.translate(&p, 0x1010, 0x7000_0010, Mode::CODE64, false).unwrap();
        assert_eq!(t.find(0x1000, 0x7000_0000, Mode::CODE64), Some(a));
        let n = t.links.iter().position(|l| l.target == 0x1010).unwrap() as u32;
        let read = |t: &Translator, at: u32| {
            // SAFETY: within the cache.
            i32::from_le_bytes(unsafe { t.write.add(at as usize).cast::<[u8; 4]>().read() })
        };
        let at = t.links[n as usize].at;
        let unlinked = read(&t, at);
        t.connect(n, b, 0, false);
        let to = t.exec.wrapping_add(u64::from(at) + 4).wrapping_add(read(&t, at) as u64);
        assert_eq!(to, t.blocks[b as usize].host_entry);
        t.set_jump(7, b);
        assert_eq!(t.jump(0x1010, 7), Some(t.entry(b)));
        t.drop_page(0x7000_0000);
        assert_eq!(read(&t, at), unlinked);
        assert_eq!(t.jump(0x1010, 7), None);
        assert_eq!(t.find(0x1000, 0x7000_0000, Mode::CODE64), None);
        assert_eq!(t.usage().1, 0);
    }

    #[test]
    fn keys_change_when_a_page_with_entries_goes() {
        let mut t = Translator::new(LEAST).unwrap();
        let a = t.translate(&page(&[0xff, 0xc0, 0xc3]), 0x40_1000, 0x7000_0000, Mode::CODE64, false).unwrap();
        let key = t.key(5 << 32 | 2);
        t.set_jump(key, a);
        t.drop_linear(0x40_2000);
        assert_eq!(t.key(5 << 32 | 2), key);
        t.drop_linear(0x40_1008);
        assert_ne!(t.key(5 << 32 | 2), key);
    }
}
