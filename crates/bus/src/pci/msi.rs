//! Message-signalled interrupts (PCI 3.0, 6.8.1): 64-bit addresses, per-vector masking.

use super::config::Config;
use accel::Irqs;
use std::sync::{Arc, Mutex, MutexGuard};

const ENABLE: u16 = 1;
/// Offsets in the capability.
const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;
const DATA: u16 = 12;
const MASK: u16 = 16;
const PENDING: u16 = 20;
/// Length of the capability.
pub(super) const LEN: u16 = 24;

/// MSI of a function. Clones are the same interrupts; any thread may raise them.
#[derive(Clone)]
pub struct Msi(Arc<Inner>);

struct Inner {
    irqs: Arc<dyn Irqs>,
    log2_vectors: u8,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    enabled: bool,
    log2_enabled: u8,
    address: u64,
    data: u16,
    mask: u32,
    pending: u32,
}

impl std::fmt::Debug for Msi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Msi({})", 1u32 << self.0.log2_vectors)
    }
}

impl Msi {
    pub(super) fn new(irqs: Arc<dyn Irqs>, log2_vectors: u8) -> Self {
        Self(Arc::new(Inner { irqs, log2_vectors, state: Mutex::default() }))
    }

    /// Body of the capability (after ID and next pointer) and its write mask.
    pub(super) fn capability(&self) -> (Vec<u8>, Vec<u8>) {
        let mut body = vec![0; usize::from(LEN) - 2];
        let mut mask = body.clone();
        // Multiple message capable in bits 3:1; 64-bit; per-vector masking. Writable: enable, multiple message enable.
        let control = u16::from(self.0.log2_vectors) << 1 | 1 << 7 | 1 << 8;
        body[..2].copy_from_slice(&control.to_le_bytes());
        mask[..2].copy_from_slice(&0x0071u16.to_le_bytes());
        mask[2..10].copy_from_slice(&(!3u64).to_le_bytes());
        mask[10..12].fill(0xff);
        let vectors = u32::MAX >> (32 - (1 << self.0.log2_vectors));
        mask[14..18].copy_from_slice(&vectors.to_le_bytes());
        (body, mask)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes over what the registers say.
    pub(super) fn sync(&self, config: &Config, cap: u16) {
        let control = config.get_u16(cap + CONTROL);
        let mut s = self.lock();
        s.enabled = control & ENABLE != 0;
        // More than was offered is not possible in hardware either.
        s.log2_enabled = ((control >> 4 & 7) as u8).min(self.0.log2_vectors);
        s.address =
            u64::from(config.get_u32(cap + ADDRESS)) | u64::from(config.get_u32(cap + ADDRESS + 4)) << 32;
        s.data = config.get_u16(cap + DATA);
        s.mask = config.get_u32(cap + MASK);
        if s.enabled {
            let ready = s.pending & !s.mask;
            s.pending &= s.mask;
            for vector in (0..32).filter(|v| ready >> v & 1 != 0) {
                self.send(&s, vector);
            }
        } else {
            s.pending = 0;
        }
    }

    fn send(&self, s: &State, vector: u32) {
        let mask = (1u32 << s.log2_enabled) - 1;
        self.0.irqs.msi(s.address, u32::from(s.data) & !mask | vector & mask);
    }

    /// Whether the driver has turned MSI on.
    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Raises a vector. Those beyond what the driver enabled fold onto the first ones.
    pub fn notify(&self, vector: u8) {
        let mut s = self.lock();
        if !s.enabled {
            return;
        }
        let vector = u32::from(vector) & ((1u32 << s.log2_enabled) - 1);
        if s.mask >> vector & 1 != 0 {
            s.pending |= 1 << vector;
        } else {
            self.send(&s, vector);
        }
    }

    pub(super) fn pending(&self) -> u32 {
        self.lock().pending
    }

    pub(super) fn set_pending(&self, pending: u32) {
        self.lock().pending = pending;
    }

    /// Offset of the pending bits from the start of the capability.
    pub(super) const PENDING: u16 = PENDING;
}
