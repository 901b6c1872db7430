//! The port and memory buses: which device answers where.

use crate::{Device, RegionId, SharedDevice};
use accel::CpuIo;
use base::RateLimit;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::Duration;

/// One of the two address spaces devices live in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// I/O ports, 0..0x10000.
    Port,
    /// Guest physical memory addresses.
    Memory,
}

/// A mapping that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Something is there already.
    #[error("{name}: {space:?} range {start:#x}+{len:#x} overlaps that of {other}")]
    Overlap {
        /// Who asked.
        name: String,
        /// Address space.
        space: Space,
        /// First address.
        start: u64,
        /// Length.
        len: u64,
        /// Who is there.
        other: String,
    },
    /// Empty, or past the end of the space.
    #[error("{space:?} range {start:#x}+{len:#x} is not possible")]
    Range {
        /// Address space.
        space: Space,
        /// First address.
        start: u64,
        /// Length.
        len: u64,
    },
}

#[derive(Clone)]
struct Entry {
    start: u64,
    len: u64,
    region: RegionId,
    name: Arc<str>,
    device: SharedDevice,
}

/// The port and memory buses of a machine.
///
/// Look-up takes a read lock for as long as it takes to clone a handle; the device then runs under its own lock only.
pub struct Bus {
    ports: RwLock<Vec<Entry>>,
    memory: RwLock<Vec<Entry>>,
    stray: RateLimit,
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut map = f.debug_map();
        for space in [Space::Port, Space::Memory] {
            for e in self.map_of(space).read().unwrap_or_else(|e| e.into_inner()).iter() {
                map.entry(&format_args!("{space:?} {:#x}+{:#x}", e.start, e.len), &e.name);
            }
        }
        map.finish()
    }
}

fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn Device + 'static> {
    // A device that panicked is a bug, but its siblings and the guest go on; its state is as it was left.
    device.lock().unwrap_or_else(|e| e.into_inner())
}

impl Bus {
    /// Empty buses.
    pub fn new() -> Self {
        Self {
            ports: RwLock::new(Vec::new()),
            memory: RwLock::new(Vec::new()),
            stray: RateLimit::new(20, Duration::from_secs(1)),
        }
    }

    fn map_of(&self, space: Space) -> &RwLock<Vec<Entry>> {
        match space {
            Space::Port => &self.ports,
            Space::Memory => &self.memory,
        }
    }

    /// Lets `device` answer at `start..start+len` as its region `region`. `name` is for messages; the device's lock
    /// is not taken.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map<D: Device + 'static>(
        &self,
        space: Space,
        start: u64,
        len: u64,
        name: &str,
        device: &Arc<Mutex<D>>,
        region: RegionId,
    ) -> Result<(), MapError> {
        self.map_shared(space, start, len, name, device.clone(), region)
    }

    /// [`Self::map`] for a device whose type is erased.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map_shared(
        &self,
        space: Space,
        start: u64,
        len: u64,
        name: &str,
        device: SharedDevice,
        region: RegionId,
    ) -> Result<(), MapError> {
        let limit = match space {
            Space::Port => 0x1_0000,
            Space::Memory => 1 << 52,
        };
        if len == 0 || start.checked_add(len).is_none_or(|end| end > limit) {
            return Err(MapError::Range { space, start, len });
        }
        let mut map = self.map_of(space).write().unwrap_or_else(|e| e.into_inner());
        let at = map.partition_point(|e| e.start < start);
        let next = map.get(at).filter(|e| e.start < start + len);
        let previous = at.checked_sub(1).map(|i| &map[i]).filter(|e| e.start + e.len > start);
        if let Some(other) = next.or(previous) {
            let other = other.name.to_string();
            return Err(MapError::Overlap { name: name.into(), space, start, len, other });
        }
        map.insert(at, Entry { start, len, region, name: name.into(), device });
        Ok(())
    }

    /// Removes the mapping that starts at `start`. Returns whether there was one.
    pub fn unmap(&self, space: Space, start: u64) -> bool {
        let mut map = self.map_of(space).write().unwrap_or_else(|e| e.into_inner());
        match map.binary_search_by_key(&start, |e| e.start) {
            Ok(i) => {
                map.remove(i);
                true
            }
            Err(_) => false,
        }
    }

    /// Who answers at an address: name, first address, length.
    pub fn find(&self, space: Space, addr: u64) -> Option<(Arc<str>, u64, u64)> {
        self.look_up(space, addr).map(|e| (e.name.clone(), e.start, e.len))
    }

    /// All mappings of a space: first address, length, name.
    pub fn mappings(&self, space: Space) -> Vec<(u64, u64, Arc<str>)> {
        let map = self.map_of(space).read().unwrap_or_else(|e| e.into_inner());
        map.iter().map(|e| (e.start, e.len, e.name.clone())).collect()
    }

    #[inline]
    fn look_up(&self, space: Space, addr: u64) -> Option<Entry> {
        let map = self.map_of(space).read().unwrap_or_else(|e| e.into_inner());
        let i = map.partition_point(|e| e.start <= addr).checked_sub(1)?;
        let e = &map[i];
        (addr - e.start < e.len).then(|| e.clone())
    }

    /// A guest read. An access that straddles the end of a device's range is split into bytes.
    pub fn read(&self, space: Space, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        match self.look_up(space, addr) {
            Some(e) if addr - e.start + data.len() as u64 <= e.len => {
                lock(&e.device).read(e.region, addr - e.start, data);
            }
            None if data.len() == 1 => self.log_stray("read", space, addr),
            _ => {
                for (i, byte) in data.chunks_mut(1).enumerate() {
                    self.read(space, addr.wrapping_add(i as u64), byte);
                }
            }
        }
    }

    /// A guest write; see [`Self::read`].
    pub fn write(&self, space: Space, addr: u64, data: &[u8]) {
        match self.look_up(space, addr) {
            Some(e) if addr - e.start + data.len() as u64 <= e.len => {
                lock(&e.device).write(e.region, addr - e.start, data);
            }
            None if data.len() == 1 => self.log_stray("write", space, addr),
            _ => {
                for (i, byte) in data.chunks(1).enumerate() {
                    self.write(space, addr.wrapping_add(i as u64), byte);
                }
            }
        }
    }

    #[cold]
    fn log_stray(&self, what: &str, space: Space, addr: u64) {
        if tracing::enabled!(tracing::Level::DEBUG)
            && let Some(suppressed) = self.stray.allow()
        {
            tracing::debug!(suppressed, "{what} of {space:?} {addr:#x}: nothing there");
        }
    }
}

impl CpuIo for Bus {
    fn port_in(&self, port: u16, data: &mut [u8]) {
        self.read(Space::Port, port.into(), data);
    }
    fn port_out(&self, port: u16, data: &[u8]) {
        self.write(Space::Port, port.into(), data);
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.read(Space::Memory, gpa, data);
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.write(Space::Memory, gpa, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{State, StateError, shared};

    struct Scratch([u8; 4]);

    impl Device for Scratch {
        fn name(&self) -> &str {
            "scratch"
        }
        fn read(&mut self, at: RegionId, offset: u64, data: &mut [u8]) {
            assert_eq!(at, RegionId(7));
            data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
        }
        fn write(&mut self, _: RegionId, offset: u64, data: &[u8]) {
            self.0[offset as usize..][..data.len()].copy_from_slice(data);
        }
        fn reset(&mut self) {
            self.0 = [0; 4];
        }
        fn save(&self) -> Result<State, StateError> {
            State::new("scratch", 1, &self.0)
        }
        fn load(&mut self, state: State) -> Result<(), StateError> {
            self.0 = state.unpack("scratch", 1)?;
            Ok(())
        }
    }

    #[test]
    fn dispatch_split_and_float() {
        let bus = Bus::new();
        let d = shared(Scratch([0; 4]));
        bus.map(Space::Port, 0x10, 4, "scratch", &d, RegionId(7)).unwrap();
        bus.write(Space::Port, 0x10, &[1, 2, 3, 4]);
        let mut b = [0; 4];
        bus.read(Space::Port, 0x12, &mut b);
        assert_eq!(b, [3, 4, 0xff, 0xff]);
        bus.read(Space::Memory, 0x12, &mut b);
        assert_eq!(b, [0xff; 4]);
        bus.read(Space::Memory, u64::MAX, &mut b);
        assert!(bus.unmap(Space::Port, 0x10));
        assert!(!bus.unmap(Space::Port, 0x10));
    }

    #[test]
    fn overlaps_and_impossible_ranges_are_refused() {
        let bus = Bus::new();
        let d = shared(Scratch([0; 4]));
        let map = |start, len| bus.map(Space::Port, start, len, "s", &d, RegionId(7));
        map(0x10, 4).unwrap();
        map(0x14, 4).unwrap();
        for (start, len) in [(0xf, 2), (0x13, 1), (0x10, 4), (0, 0x100)] {
            assert!(matches!(map(start, len), Err(MapError::Overlap { .. })), "{start:#x}");
        }
        for (start, len) in [(0x10000, 1), (0xffff, 2), (1, 0), (u64::MAX, 2)] {
            assert!(matches!(map(start, len), Err(MapError::Range { .. })), "{start:#x}");
        }
    }
}
