//! A virtual machine of software vCPUs: memory map, and what vCPUs tell each other.
//!
//! Three things cross from one vCPU to another, besides guest memory itself:
//!
//! * The memory map changed ([`Shared::map_epoch`]): everyone flushes TLBs and code before touching guest memory again.
//! * A page with decoded code was written: everyone drops its blocks before the next block starts.
//! * A page is about to hold decoded code: everyone who may have a TLB entry that lets it write the page unseen drops
//!   the entry first; the one who decodes waits for that.
//!
//! A vCPU is *inside* while it may touch guest memory through its TLB, and *outside* while it sleeps, calls a device or
//! waits for others. It looks at its mailbox whenever it goes back inside and before each block.

use crate::mmu::phys::PhysMap;
use crate::state::Stats;
use crate::vcpu::SoftVcpu;
use accel::{CpuSignals, Error, Irqs, Result, Signal, Slot, SlotId, Vcpu, VcpuConfig, Vm};
use memory::{PAGE_SIZE, Region};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};

/// Words of the filter of writable pages.
const FILTER_WORDS: usize = 1024;

/// What one vCPU asks of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Drop the blocks of a page (host address).
    Drop(usize),
    /// Give up unseen writes to a page (host address).
    Protect(usize),
    /// Give up unseen writes to all pages.
    ProtectAll,
}

/// A vCPU as its siblings see it.
#[derive(Debug)]
pub struct Sibling {
    /// Number.
    pub index: u32,
    /// Mailbox.
    pub signals: Arc<CpuSignals>,
    /// Whether the vCPU may touch guest memory.
    inside: AtomicBool,
    /// What was asked and not taken yet, and the number of questions so far.
    asks: Mutex<(u64, Vec<Ask>)>,
    /// Number of questions answered.
    answered: AtomicU64,
    /// Which pages (hashed host addresses) may have entries in the TLB that allow writing.
    filter: Box<[AtomicU64]>,
    /// Counters, as of the last time outside.
    pub stats: Mutex<(u64, Stats)>,
}

fn filter_bit(host: usize) -> (usize, u64) {
    let h = (host as u64 >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
    ((h >> 6) as usize % FILTER_WORDS, 1 << (h & 63))
}

impl Sibling {
    fn new(index: u32, signals: Arc<CpuSignals>) -> Self {
        Self {
            index,
            signals,
            inside: AtomicBool::new(false),
            asks: Mutex::default(),
            answered: AtomicU64::new(0),
            filter: (0..FILTER_WORDS).map(|_| AtomicU64::new(0)).collect(),
            stats: Mutex::default(),
        }
    }

    /// Notes that the vCPU's TLB may let it write a page. Ordered before any later look at the page's code mark.
    pub fn note_writable(&self, host: usize) {
        let (i, b) = filter_bit(host);
        if self.filter[i].load(Ordering::Relaxed) & b == 0 {
            self.filter[i].fetch_or(b, Ordering::SeqCst);
        } else {
            std::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    /// Whether the TLB may let the vCPU write a page.
    pub fn may_write(&self, host: usize) -> bool {
        let (i, b) = filter_bit(host);
        self.filter[i].load(Ordering::SeqCst) & b != 0
    }

    /// Forgets all pages; to be called by the vCPU when it has flushed all its TLBs.
    pub fn forget_writable(&self) {
        for w in &self.filter {
            w.store(0, Ordering::SeqCst);
        }
    }

    /// Marks the vCPU as inside or outside.
    pub fn set_inside(&self, inside: bool) {
        self.inside.store(inside, Ordering::SeqCst);
    }

    /// Takes what was asked, and the number to give to [`Self::answer`].
    pub fn take_asks(&self) -> (u64, Vec<Ask>) {
        let mut asks = self.asks.lock().unwrap_or_else(|e| e.into_inner());
        (asks.0, std::mem::take(&mut asks.1))
    }

    /// Says that everything up to a question has been done.
    pub fn answer(&self, number: u64) {
        self.answered.fetch_max(number, Ordering::SeqCst);
    }

    /// Asks (`None`: only to look at the epoch of the memory map); returns the number of the question.
    fn ask(&self, ask: Option<Ask>) -> u64 {
        let number = {
            let mut asks = self.asks.lock().unwrap_or_else(|e| e.into_inner());
            asks.0 += 1;
            asks.1.extend(ask);
            asks.0
        };
        self.signals.raise(Signal::FLUSH);
        number
    }

    /// Waits until the vCPU has answered, or is outside (and will answer before it comes back).
    fn wait(&self, number: u64) {
        let mut spins = 0u32;
        while self.inside.load(Ordering::SeqCst) && self.answered.load(Ordering::SeqCst) < number {
            spins += 1;
            if spins < 200 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// What the vCPUs of a VM share.
#[derive(Debug)]
pub struct Shared {
    /// Clock.
    pub clock: crate::clock::Clock,
    /// Thunks of the native units.
    pub arena: crate::native::Arena,
    map: RwLock<Arc<PhysMap>>,
    /// Changes with the memory map, and when dirty logs are turned on or taken.
    pub map_epoch: AtomicU64,
    siblings: RwLock<Vec<Arc<Sibling>>>,
    /// Serialises locked accesses that no host instruction can do.
    pub split_lock: Mutex<()>,
    next_slot: AtomicU32,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            arena: crate::native::Arena::new(),
            clock: crate::clock::Clock::default(),
            map: RwLock::default(),
            map_epoch: AtomicU64::new(0),
            siblings: RwLock::default(),
            split_lock: Mutex::default(),
            next_slot: AtomicU32::new(0),
        }
    }
}

impl Shared {
    /// The current memory map.
    pub fn map(&self) -> Arc<PhysMap> {
        self.map.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn siblings(&self) -> Vec<Arc<Sibling>> {
        self.siblings.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Makes every vCPU flush what it derived from the memory map, and waits for it. Must not be called by a vCPU
    /// that is inside.
    pub fn flush(&self) {
        self.map_epoch.fetch_add(1, Ordering::SeqCst);
        for s in self.siblings() {
            let number = s.ask(None);
            s.wait(number);
        }
    }

    /// Makes all vCPUs but `me` drop the blocks of a page.
    pub fn drop_code(&self, me: Option<&Sibling>, host: usize) {
        for s in self.siblings.read().unwrap_or_else(|e| e.into_inner()).iter() {
            if me.is_none_or(|m| m.index != s.index) {
                s.ask(Some(Ask::Drop(host)));
            }
        }
    }

    /// Whether any vCPU but `me` may have the right to write a page.
    pub fn writable_elsewhere(&self, me: &Sibling, host: usize) -> bool {
        let all = self.siblings.read().unwrap_or_else(|e| e.into_inner());
        all.iter().any(|s| s.index != me.index && s.may_write(host))
    }

    /// Takes the right to write a page unseen from all vCPUs but `me`, and waits for it. The caller is outside.
    pub fn protect(&self, me: &Sibling, host: usize) {
        for s in self.siblings() {
            if s.index != me.index && s.may_write(host) {
                let number = s.ask(Some(Ask::Protect(host)));
                s.wait(number);
            }
        }
    }

    /// Takes the right to write pages unseen from all vCPUs, and waits for it. Must not be called by a vCPU that is
    /// inside.
    fn protect_pages(&self, hosts: &[usize]) {
        /// From so many pages on, forgetting all is cheaper than looking for each.
        const MANY: usize = 16;
        let siblings = self.siblings();
        let mut asked = Vec::with_capacity(siblings.len());
        for s in &siblings {
            let some: Vec<_> = hosts.iter().copied().filter(|h| s.may_write(*h)).collect();
            let number = if some.len() < MANY {
                some.into_iter().map(|h| s.ask(Some(Ask::Protect(h)))).max()
            } else {
                Some(s.ask(Some(Ask::ProtectAll)))
            };
            asked.extend(number.map(|n| (s, n)));
        }
        for (s, number) in asked {
            s.wait(number);
        }
    }

    /// Adds a vCPU.
    pub fn join(&self, index: u32, signals: Arc<CpuSignals>) -> Result<Arc<Sibling>> {
        let mut all = self.siblings.write().unwrap_or_else(|e| e.into_inner());
        if all.iter().any(|s| s.index == index) {
            return Err(Error::Unsupported(format!("vCPU {index} exists already")));
        }
        let me = Arc::new(Sibling::new(index, signals));
        all.push(me.clone());
        Ok(me)
    }

    /// Takes a vCPU out.
    pub fn leave(&self, me: &Sibling) {
        self.siblings.write().unwrap_or_else(|e| e.into_inner()).retain(|s| s.index != me.index);
    }
}

/// A virtual machine of the software CPU.
#[derive(Debug, Default)]
pub struct SoftVm {
    shared: Arc<Shared>,
    spec: crate::SoftSpec,
}

impl SoftVm {
    /// Without memory and vCPUs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Without memory and vCPUs.
    pub fn with(spec: crate::SoftSpec) -> Self {
        Self { spec, ..Self::default() }
    }

    fn check(&self, id: SlotId) -> Result<()> {
        let known = self.shared.map().slot(id).is_some();
        known.then_some(()).ok_or_else(|| Error::Unsupported(format!("there is no memory slot {}", id.0)))
    }
}

impl Vm for SoftVm {
    fn vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>> {
        if config.apic.is_none() {
            return Err(Error::Unsupported("the software CPU needs a local APIC for each vCPU".into()));
        }
        let mut vcpu = SoftVcpu::new(self.shared.clone(), config)?;
        vcpu.cpu().set_up_translator(&self.spec)?;
        Ok(Box::new(vcpu))
    }

    fn map(&self, slot: Slot) -> Result<SlotId> {
        let id = SlotId(self.shared.next_slot.fetch_add(1, Ordering::Relaxed));
        let region = slot.region.clone();
        {
            let mut map = self.shared.map.write().unwrap_or_else(|e| e.into_inner());
            *map = Arc::new(map.with(id, slot).map_err(Error::Unsupported)?);
        }
        let shared: Weak<Shared> = Arc::downgrade(&self.shared);
        let tracker = Arc::downgrade(&region.tracker);
        let base = region.mapping.as_ptr() as usize;
        // A region shown twice has its listener already.
        let _ = region.tracker.set_code_listener(Box::new(move |offset| {
            if let (Some(shared), Some(tracker)) = (shared.upgrade(), tracker.upgrade()) {
                tracker.clear_code(offset);
                shared.drop_code(None, base + offset as usize);
            }
        }));
        self.shared.flush();
        Ok(id)
    }

    fn unmap(&self, slot: SlotId) -> Result<()> {
        {
            let mut map = self.shared.map.write().unwrap_or_else(|e| e.into_inner());
            let without = map.without(slot);
            *map = Arc::new(
                without.ok_or_else(|| Error::Unsupported(format!("there is no memory slot {}", slot.0)))?,
            );
        }
        self.shared.flush();
        Ok(())
    }

    /// All that vCPUs write is in the region's tracker. To be called after the tracker's own `take_dirty`, and before
    /// the pages are copied: from here on, vCPUs note their writes afresh.
    fn take_dirty(&self, slot: SlotId, _page: &mut dyn FnMut(u64)) -> Result<()> {
        self.check(slot)?;
        self.shared.flush();
        Ok(())
    }

    fn take_written(&self, slot: SlotId, region: &Region, page: &mut dyn FnMut(u64)) -> Result<()> {
        self.check(slot)?;
        let mut pages = Vec::new();
        region.tracker.take_dirty(|p| pages.push(p));
        if !pages.is_empty() {
            let base = region.mapping.as_ptr() as usize;
            let hosts: Vec<_> = pages.iter().map(|p| base + (*p as usize) * PAGE_SIZE as usize).collect();
            self.shared.protect_pages(&hosts);
            pages.into_iter().for_each(page);
        }
        Ok(())
    }

    fn set_dirty_log(&self, slot: SlotId, on: bool) -> Result<()> {
        self.check(slot)?;
        let map = self.shared.map();
        if let Some(s) = map.slot(slot) {
            s.region.tracker.set_log(on);
        }
        self.shared.flush();
        Ok(())
    }

    fn irqs(&self) -> Option<Arc<dyn Irqs>> {
        None
    }

    fn save(&self) -> Result<Vec<u8>> {
        Ok(self.shared.clock.save())
    }

    fn load(&self, state: &[u8]) -> Result<()> {
        self.shared.clock.load(state)
    }

    fn stats(&self) -> Vec<(String, u64)> {
        let mut sum = crate::stats::Sum::default();
        for s in self.shared.siblings() {
            let (retired, stats) = *s.stats.lock().unwrap_or_else(|e| e.into_inner());
            sum.add(retired, &stats);
        }
        sum.rows()
    }
}
