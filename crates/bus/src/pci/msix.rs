//! MSI-X (PCI 3.0, 6.8.2): table, pending bits, masking.

use accel::{Doorbells, IrqFd, Irqs};
use base::EventFd;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes of a table entry.
const ENTRY: u64 = 16;
/// Function-wide state is message control's top two bits: enable, and below it the function mask. Vectors are
/// delivered only when the first is set and the second is not.
const ENABLED: u8 = 2;
/// Vector control: mask bit.
const VECTOR_MASKED: u32 = 1;

/// The vectors of a function. Clones are the same vectors; any thread may raise them, and takes no lock but the
/// vector's own.
#[derive(Clone)]
pub struct MsixVectors(Arc<Inner>);

struct Inner {
    irqs: Arc<dyn Irqs>,
    doorbells: Option<Arc<dyn Doorbells>>,
    function: AtomicU8,
    vectors: Box<[Mutex<Vector>]>,
}

struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    direct: Option<Direct>,
}

/// An eventfd that delivers the vector inside the kernel while it is not masked.
struct Direct {
    fd: EventFd,
    route: Box<dyn IrqFd>,
    routed: Option<(u64, u32)>,
}

/// A table entry as saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedVector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Default for Vector {
    fn default() -> Self {
        Self { address: 0, data: 0, control: VECTOR_MASKED, pending: false, direct: None }
    }
}

impl std::fmt::Debug for MsixVectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MsixVectors({})", self.0.vectors.len())
    }
}

fn lock(vector: &Mutex<Vector>) -> MutexGuard<'_, Vector> {
    vector.lock().unwrap_or_else(|e| e.into_inner())
}

impl Inner {
    fn active(&self, v: &Vector) -> bool {
        self.function.load(Ordering::SeqCst) == ENABLED && v.control & VECTOR_MASKED == 0
    }

    /// After a change of masks, address or data: brings the kernel's route up to date and delivers what waited.
    fn refresh(&self, v: &mut Vector) {
        let active = self.active(v);
        let message = active.then_some((v.address, v.data));
        if let Some(direct) = &mut v.direct
            && direct.routed != message
        {
            match direct.route.route(message) {
                Ok(()) => direct.routed = message,
                Err(e) => tracing::warn!("MSI-X route: {e}; the interrupt stays where it was"),
            }
        }
        if active && std::mem::take(&mut v.pending) {
            self.irqs.msi(v.address, v.data);
        }
    }
}

impl MsixVectors {
    /// `count` masked vectors (at most 2048, PCI 3.0, 6.8.2.3).
    pub fn new(irqs: Arc<dyn Irqs>, doorbells: Option<Arc<dyn Doorbells>>, count: u16) -> Self {
        let vectors = (0..count.clamp(1, 2048)).map(|_| Mutex::default()).collect();
        Self(Arc::new(Inner { irqs, doorbells, function: AtomicU8::new(0), vectors }))
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.0.vectors.len() as u16 // at most 2048
    }

    /// Whether the driver has turned MSI-X on (INTx must then stay quiet).
    pub fn enabled(&self) -> bool {
        self.0.function.load(Ordering::SeqCst) & ENABLED != 0
    }

    /// Raises a vector; a masked one becomes pending. Vectors that do not exist are ignored.
    pub fn notify(&self, vector: u16) {
        let Some(vector) = self.0.vectors.get(usize::from(vector)) else { return };
        let mut v = lock(vector);
        if self.0.active(&v) {
            self.0.irqs.msi(v.address, v.data);
        } else if self.enabled() {
            v.pending = true;
        }
    }

    /// An eventfd that raises the vector when signalled, for those who cannot call [`Self::notify`] (kernel back
    /// ends, other processes). The kernel delivers it directly; while the vector is masked the signal stays in the
    /// eventfd as the vector's pending bit.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where the accelerator has no such shortcut, or the host's refusal.
    pub fn eventfd(&self, vector: u16) -> io::Result<EventFd> {
        let doorbells = self.0.doorbells.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let slot = self.0.vectors.get(usize::from(vector)).ok_or(io::ErrorKind::InvalidInput)?;
        let mut v = lock(slot);
        if v.direct.is_none() {
            let fd = EventFd::new()?;
            let route = doorbells.irqfd(&fd).map_err(io::Error::other)?;
            v.direct = Some(Direct { fd, route, routed: None });
            self.0.refresh(&mut v);
        }
        match &v.direct {
            Some(direct) => direct.fd.try_clone(),
            None => Err(io::ErrorKind::Unsupported.into()), // set just above
        }
    }

    /// Takes back what [`Self::eventfd`] gave.
    pub fn drop_eventfd(&self, vector: u16) {
        if let Some(slot) = self.0.vectors.get(usize::from(vector)) {
            lock(slot).direct = None;
        }
    }

    /// Function-wide enable and mask, bits 15 and 14 of message control.
    pub(super) fn set_function(&self, control: u16) {
        let new = (control >> 14) as u8;
        let old = self.0.function.swap(new, Ordering::SeqCst);
        if new == old {
            return;
        }
        for vector in &self.0.vectors {
            let mut v = lock(vector);
            if new & ENABLED == 0 {
                v.pending = false;
            }
            self.0.refresh(&mut v);
        }
    }

    fn pending(&self, index: usize) -> bool {
        let Some(vector) = self.0.vectors.get(index) else { return false };
        let mut v = lock(vector);
        if !v.pending && !self.0.active(&v) && v.direct.as_ref().is_some_and(|d| d.fd.clear()) {
            v.pending = true;
        }
        v.pending
    }

    fn read_table(&self, offset: u64, data: &mut [u8]) {
        let Some(vector) = self.0.vectors.get((offset / ENTRY) as usize) else {
            data.fill(0);
            return;
        };
        let v = lock(vector);
        let mut entry = [0; ENTRY as usize];
        entry[..8].copy_from_slice(&v.address.to_le_bytes());
        entry[8..12].copy_from_slice(&v.data.to_le_bytes());
        entry[12..].copy_from_slice(&v.control.to_le_bytes());
        drop(v);
        copy_from(&entry, (offset % ENTRY) as usize, data);
    }

    fn write_table(&self, offset: u64, data: &[u8]) {
        let Some(vector) = self.0.vectors.get((offset / ENTRY) as usize) else { return };
        // Aligned double words, or quad words as a pair of them (PCI 3.0, 6.8.2); others are undefined.
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut v = lock(vector);
        for (i, dword) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([dword[0], dword[1], dword[2], dword[3]]);
            match offset % ENTRY + 4 * i as u64 {
                0 => v.address = v.address & !0xffff_ffff | u64::from(value & !3),
                4 => v.address = v.address & 0xffff_ffff | u64::from(value) << 32,
                8 => v.data = value,
                _ => v.control = value & VECTOR_MASKED,
            }
        }
        self.0.refresh(&mut v);
    }

    fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize + i) * 8;
            *byte = (0..8).fold(0, |b, bit| b | u8::from(self.pending(first + bit)) << bit);
        }
    }

    pub(super) fn save(&self) -> Vec<SavedVector> {
        let one = |index| {
            let pending = self.pending(index);
            let v = lock(&self.0.vectors[index]);
            SavedVector { address: v.address, data: v.data, control: v.control, pending }
        };
        (0..self.0.vectors.len()).map(one).collect()
    }

    /// Takes a saved table. `false` if it is of another size.
    pub(super) fn load(&self, saved: Vec<SavedVector>) -> bool {
        if saved.len() != self.0.vectors.len() {
            return false;
        }
        for (vector, s) in self.0.vectors.iter().zip(saved) {
            let mut v = lock(vector);
            v.address = s.address & !3;
            v.data = s.data;
            v.control = s.control & VECTOR_MASKED;
            v.pending = s.pending;
            self.0.refresh(&mut v);
        }
        true
    }

    pub(super) fn reset(&self) {
        self.0.function.store(0, Ordering::SeqCst);
        for vector in &self.0.vectors {
            let mut v = lock(vector);
            (v.address, v.data, v.control, v.pending) = (0, 0, VECTOR_MASKED, false);
            self.0.refresh(&mut v);
        }
    }
}

/// Copies the part of `from` that starts at `at` into `data`; what lies past the end reads as zero.
fn copy_from(from: &[u8], at: usize, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = from.get(at + i).copied().unwrap_or(0);
    }
}

/// MSI-X of a function: its vectors, and where table and pending bits lie.
#[derive(Clone, Debug)]
pub struct Msix {
    /// The vectors.
    pub vectors: MsixVectors,
    /// BAR with the table and the pending bits.
    pub bar: u8,
    /// Offset of the table in the BAR (a multiple of 8).
    pub table: u32,
    /// Offset of the pending bits in the BAR (a multiple of 8).
    pub pba: u32,
}

impl Msix {
    /// Body of the capability (after ID and next pointer) and its write mask.
    pub(super) fn capability(&self) -> (Vec<u8>, Vec<u8>) {
        let mut body = (self.vectors.count() - 1).to_le_bytes().to_vec();
        body.extend((self.table | u32::from(self.bar)).to_le_bytes());
        body.extend((self.pba | u32::from(self.bar)).to_le_bytes());
        let mut mask = vec![0; body.len()];
        mask[1] = 0xc0; // enable, function mask
        (body, mask)
    }

    /// Bytes that the table takes.
    pub fn table_len(&self) -> u64 {
        u64::from(self.vectors.count()) * ENTRY
    }

    /// Bytes that the pending bits take.
    pub fn pba_len(&self) -> u64 {
        u64::from(self.vectors.count()).div_ceil(64) * 8
    }

    /// Serves a read of BAR `bar`, if it is of the table or the pending bits.
    pub fn read(&self, bar: u32, offset: u64, data: &mut [u8]) -> bool {
        if bar != u32::from(self.bar) {
            return false;
        }
        if let Some(o) = offset.checked_sub(self.table.into()).filter(|o| *o < self.table_len()) {
            self.vectors.read_table(o, data);
            true
        } else if let Some(o) = offset.checked_sub(self.pba.into()).filter(|o| *o < self.pba_len()) {
            self.vectors.read_pending(o, data);
            true
        } else {
            false
        }
    }

    /// Serves a write to BAR `bar`, if it is to the table or the (read-only) pending bits.
    pub fn write(&self, bar: u32, offset: u64, data: &[u8]) -> bool {
        if bar != u32::from(self.bar) {
            return false;
        }
        if let Some(o) = offset.checked_sub(self.table.into()).filter(|o| *o < self.table_len()) {
            self.vectors.write_table(o, data);
            true
        } else {
            offset.checked_sub(self.pba.into()).is_some_and(|o| o < self.pba_len())
        }
    }
}
