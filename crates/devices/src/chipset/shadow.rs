//! Firmware ROM and the memory below 1 MiB that can stand in its place (Intel 3 Series datasheet, 5.1.18 to 5.1.24,
//! programmable attribute map; the 82441FX has the same registers).

use accel::{Slot, SlotId, Vm};
use memory::Region;
use std::ops::Range;
use std::sync::Arc;

/// The legacy area: video memory, option ROMs, BIOS. RAM lies under all of it.
pub const LEGACY_AREA: Range<u64> = 0xa_0000..0x10_0000;
/// What of it the attribute map covers.
const MAPPED: Range<u64> = 0xc_0000..0x10_0000;
/// The end of the ROM is shown below 1 MiB too, so much of it.
const LOW_ROM: u64 = 128 << 10;

/// How one part of the area is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// ROM; writes go nowhere.
    Rom,
    /// RAM that cannot be written.
    ReadOnly,
    /// RAM.
    Ram,
}

impl Mode {
    /// From the two enable bits of an attribute: reads and writes go to RAM. Writing RAM while reading ROM cannot be
    /// had from memory slots; firmware copies with both on.
    fn of(bits: u8) -> Self {
        match bits & 3 {
            1 => Mode::ReadOnly,
            3 => Mode::Ram,
            _ => Mode::Rom,
        }
    }
}

/// A stretch of addresses in one mode.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stretch {
    place: Range<u64>,
    mode: Mode,
}

/// The parts of the area and their attributes, joined where neighbours agree.
fn stretches(pam: [u8; 7]) -> Vec<Stretch> {
    let mut parts = vec![];
    for (register, start) in pam[1..].iter().zip((0xc_0000u64..0xf_0000).step_by(0x8000)) {
        parts.push(Stretch { place: start..start + 0x4000, mode: Mode::of(*register) });
        parts.push(Stretch { place: start + 0x4000..start + 0x8000, mode: Mode::of(register >> 4) });
    }
    parts.push(Stretch { place: 0xf_0000..0x10_0000, mode: Mode::of(pam[0] >> 4) });
    parts.into_iter().fold(Vec::new(), |mut all: Vec<Stretch>, next| {
        match all.last_mut() {
            Some(last) if last.mode == next.mode => last.place.end = next.place.end,
            _ => all.push(next),
        }
        all
    })
}

/// Shows the guest firmware's ROM, and RAM in its place as the attribute map says.
pub struct Shadow {
    vm: Arc<dyn Vm>,
    ram: Region,
    rom: Region,
    shown: Vec<(Stretch, Vec<SlotId>)>,
}

impl Shadow {
    /// Shows the last 128 KiB of `rom` (a multiple of 4 KiB, at least 64 KiB) below 1 MiB. `ram` is the guest's lowest
    /// memory, which the caller has shown except for [`LEGACY_AREA`]. The ROM's own place is the caller's affair.
    ///
    /// # Errors
    /// The accelerator's refusal.
    pub fn new(vm: Arc<dyn Vm>, ram: Region, rom: Region) -> accel::Result<Self> {
        let mut shadow = Self { vm, ram, rom, shown: Vec::new() };
        shadow.apply([0; 7])?;
        Ok(shadow)
    }

    /// Follows attribute registers PAM0 to PAM6.
    pub fn set(&mut self, pam: [u8; 7]) {
        if let Err(e) = self.apply(pam) {
            tracing::error!("cannot show the guest its memory below 1 MiB: {e}");
        }
    }

    fn apply(&mut self, pam: [u8; 7]) -> accel::Result<()> {
        let wanted = stretches(pam);
        let (keep, drop) = std::mem::take(&mut self.shown).into_iter().partition(|(s, _)| wanted.contains(s));
        self.shown = keep;
        for id in drop.into_iter().flat_map(|(_, ids): (Stretch, Vec<SlotId>)| ids) {
            self.vm.unmap(id)?;
        }
        for stretch in wanted {
            if self.shown.iter().all(|(s, _)| *s != stretch) {
                let ids = self.slots(&stretch).into_iter().map(|s| self.vm.map(s));
                let ids = ids.collect::<accel::Result<_>>()?;
                self.shown.push((stretch, ids));
            }
        }
        Ok(())
    }

    fn slots(&self, stretch: &Stretch) -> Vec<Slot> {
        let Stretch { place, mode } = stretch;
        if *mode != Mode::Rom {
            return vec![Slot {
                gpa: place.start,
                len: place.end - place.start,
                region: self.ram.clone(),
                offset: place.start - self.ram.start,
                readonly: *mode == Mode::ReadOnly,
            }];
        }
        // Below the BIOS nothing answers: option ROMs are shadowed before they run.
        let rom_start = MAPPED.end - self.rom.len().min(LOW_ROM);
        let start = place.start.max(rom_start);
        if start >= place.end {
            return vec![];
        }
        vec![Slot {
            gpa: start,
            len: place.end - start,
            region: self.rom.clone(),
            offset: self.rom.len() - (MAPPED.end - start),
            readonly: true,
        }]
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Slots;
    use super::*;
    use memory::{Backing, GuestMemory};

    #[test]
    fn attributes_choose_between_ram_and_rom() {
        let region = |start, len, byte| {
            let r = Region::new(start, len, &Backing::Anonymous, false).unwrap();
            GuestMemory::from_regions(vec![r.clone()]).fill(start, len, byte).unwrap();
            r
        };
        let vm = Arc::new(Slots::default());
        let rom = region(0xfffc_0000, 256 << 10, 0x60);
        GuestMemory::from_regions(vec![rom.clone()]).write(0xfffe_0000, &[0x61]).unwrap();
        let mut shadow = Shadow::new(vm.clone(), region(0, 1 << 20, 0x30), rom).unwrap();
        assert_eq!((vm.at(0xe_0000), vm.at(0xf_ffff)), (Some((0x61, false)), Some((0x60, false))));
        assert_eq!((vm.at(0xd_ffff), vm.at(0xc_0000), vm.at(0xa_0000)), (None, None, None));
        shadow.set([0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        assert_eq!((vm.at(0xc_0000), vm.at(0xf_ffff)), (Some((0x30, true)), Some((0x30, true))));
        assert_eq!(vm.0.lock().unwrap().iter().flatten().count(), 1, "one stretch");
        shadow.set([0x10, 0x13, 0x31, 0, 0, 0, 0x20]);
        let ram = |writable| Some((0x30, writable));
        assert_eq!((vm.at(0xf_0000), vm.at(0xc_0000), vm.at(0xc_4000)), (ram(false), ram(true), ram(false)));
        assert_eq!(
            (vm.at(0xc_8000), vm.at(0xc_c000), vm.at(0xe_c000)),
            (ram(false), ram(true), Some((0x60, false)))
        );
        shadow.set([0; 7]);
        assert_eq!(vm.at(0xe_0000), Some((0x61, false)));
    }
}
