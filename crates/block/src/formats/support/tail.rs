//! New space at the end of a file.

use crate::{Error, Result, storage::Storage};
use std::sync::{Arc, Mutex, MutexGuard};

/// Hands out space from the end of the used part of a file upwards. Space is never handed out twice while the image is open,
/// so what is given back after a failed write is lost until the next check; it is never shared by accident.
pub(crate) struct Tail {
    storage: Arc<dyn Storage>,
    next: Mutex<u64>,
    limit: u64,
    fresh_from: u64,
}

impl Tail {
    /// Allocates from `next` up to `limit` (what the format's tables can address).
    pub(crate) fn new(storage: Arc<dyn Storage>, next: u64, limit: u64) -> Result<Self> {
        let fresh_from = if storage.grows_with_zeros() { storage.size()? } else { u64::MAX };
        Ok(Tail { storage, next: Mutex::new(next), limit, fresh_from })
    }

    fn next(&self) -> MutexGuard<'_, u64> {
        self.next.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// `len` bytes at the end.
    pub(crate) fn take(&self, len: u64) -> Result<u64> {
        self.take_aligned(len, 1)
    }

    /// `len` bytes at the next multiple of `align`.
    pub(crate) fn take_aligned(&self, len: u64, align: u64) -> Result<u64> {
        let mut next = self.next();
        let start = next.checked_next_multiple_of(align);
        let end = start.and_then(|s| s.checked_add(len)).filter(|&end| end <= self.limit);
        match (start, end) {
            (Some(start), Some(end)) => {
                *next = end;
                Ok(start)
            }
            _ => Err(Error::io(
                format!(
                    "'{}' cannot grow: its format addresses no more than {} bytes",
                    self.storage.name(),
                    self.limit
                ),
                std::io::Error::from_raw_os_error(libc::EFBIG),
            )),
        }
    }

    /// Where the used part ends.
    pub(crate) fn end(&self) -> u64 {
        *self.next()
    }

    /// Whether space at `at` is known to read as zeros until it is written.
    pub(crate) fn is_fresh(&self, at: u64) -> bool {
        at >= self.fresh_from
    }

    /// Makes the file reach to the end of what was handed out: the last unit may have been written only in part.
    pub(crate) fn pad(&self) -> Result<()> {
        // Nobody gets space meanwhile: what is written there would be behind the new end and cut off.
        let end = self.next();
        if self.storage.grows_with_zeros() && self.storage.size()? < *end {
            self.storage.set_size(*end)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn hands_out_disjoint_space_up_to_the_limit() {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![1; 100]));
        let tail = Tail::new(Arc::clone(&storage), 64, 256).unwrap();
        assert_eq!(tail.take(64).unwrap(), 64);
        assert_eq!(tail.take(60).unwrap(), 128);
        assert!(!tail.is_fresh(64) && tail.is_fresh(128));
        assert!(tail.take(69).is_err());
        assert_eq!(tail.take_aligned(60, 64).unwrap(), 192);
        tail.pad().unwrap();
        assert_eq!(storage.size().unwrap(), 252);
        assert!(tail.take_aligned(1, 1 << 63).is_err());
    }
}
