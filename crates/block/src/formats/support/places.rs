//! Which places of a file are in use, for checks.

use crate::{Error, Result};

/// Most places that are kept apart: 256 MiB of bits. A file may claim any length; memory must not follow it.
const MOST: u64 = 1 << 31;

/// One bit for each place.
pub(crate) struct Places {
    bits: Vec<u64>,
    claimed: u64,
}

impl Places {
    /// `count` places, all free.
    pub(crate) fn new(count: u64) -> Result<Self> {
        if count > MOST {
            return Err(Error::unsupported(format!(
                "The file has {count} clusters; checks are limited to {MOST}"
            )));
        }
        Ok(Places { bits: vec![0; count.div_ceil(64) as usize], claimed: 0 })
    }

    /// Claims a place; `false` if it was claimed before. What lies behind the last place is nobody's.
    pub(crate) fn claim(&mut self, place: u64) -> bool {
        let Some(word) = usize::try_from(place / 64).ok().and_then(|i| self.bits.get_mut(i)) else {
            return true;
        };
        let bit = 1 << (place % 64);
        let free = *word & bit == 0;
        *word |= bit;
        self.claimed += u64::from(free);
        free
    }

    /// How many are claimed.
    pub(crate) fn claimed(&self) -> u64 {
        self.claimed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_claimed_once() {
        let mut places = Places::new(65).unwrap();
        assert!(places.claim(64) && !places.claim(64) && places.claim(0) && places.claim(1 << 40));
        assert_eq!(places.claimed(), 2);
        assert!(Places::new(u64::MAX).is_err());
    }
}
