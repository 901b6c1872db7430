//! The window at 0xa0000: four planes behind latches, write modes and address foldings.

use super::Vga;
use super::core::{gfx, seq};

impl Vga {
    /// Where an address of the window (an offset from 0xa0000) lies in the part of it that is decoded, if it is.
    fn decode(&self, offset: u64) -> Option<u64> {
        let bank = if self.r.vbe.is_enabled() { self.r.vbe.bank_offset() } else { 0 };
        match self.r.gfx[gfx::MISC] >> 2 & 3 {
            0 => Some(offset),
            1 => (offset < 0x1_0000).then_some(offset + bank),
            2 => offset.checked_sub(0x1_0000).filter(|o| *o < 0x8000),
            _ => offset.checked_sub(0x1_8000).filter(|o| *o < 0x8000),
        }
    }

    fn chained(&self) -> bool {
        self.r.vbe.is_enabled() && self.r.vbe.is_packed() || self.r.seq[seq::MEMORY] & seq::MEMORY_CHAIN4 != 0
    }

    fn odd_even(&self) -> bool {
        self.r.gfx[gfx::MODE] & 0x10 != 0
    }

    /// A read at `offset` from 0xa0000.
    pub fn read_window(&mut self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_window_byte(offset + i as u64);
        }
    }

    fn read_window_byte(&mut self, offset: u64) -> u8 {
        let Some(at) = self.decode(offset) else { return 0xff };
        let mut byte = [0];
        if self.chained() {
            self.load(at, &mut byte);
            return byte[0];
        }
        if self.odd_even() {
            let plane = u64::from(self.r.gfx[gfx::READ_MAP] & 2) | at & 1;
            self.load((at & !1) << 1 | plane, &mut byte);
            return byte[0];
        }
        let mut latch = [0; 4];
        self.load(at * 4, &mut latch);
        self.r.latch = latch;
        if self.r.gfx[gfx::MODE] & 8 == 0 {
            return latch[usize::from(self.r.gfx[gfx::READ_MAP] & 3)];
        }
        // Read mode 1: which pixels have the colour to compare with, in the planes that matter.
        let (compare, care) = (self.r.gfx[gfx::COMPARE], self.r.gfx[gfx::DONT_CARE]);
        let differ =
            latch.iter().enumerate().filter(|(p, _)| care >> p & 1 != 0).fold(0, |all, (p, byte)| {
                let wanted = if compare >> p & 1 != 0 { 0xff } else { 0 };
                all | (byte ^ wanted)
            });
        !differ
    }

    /// A write at `offset` from 0xa0000.
    pub fn write_window(&mut self, offset: u64, data: &[u8]) {
        if self.chained() && self.r.seq[seq::MAP_MASK] & 0xf == 0xf && data.len() > 1 {
            let (first, last) = (self.decode(offset), self.decode(offset + data.len() as u64 - 1));
            if let (Some(first), Some(last)) = (first, last)
                && last - first == data.len() as u64 - 1
            {
                return self.store(first, data);
            }
        }
        for (i, byte) in data.iter().enumerate() {
            self.write_window_byte(offset + i as u64, *byte);
        }
    }

    fn write_window_byte(&mut self, offset: u64, value: u8) {
        let Some(at) = self.decode(offset) else { return };
        let map = self.r.seq[seq::MAP_MASK];
        if self.chained() {
            if map >> (at & 3) & 1 != 0 {
                self.store(at, &[value]);
            }
        } else if self.odd_even() {
            let plane = u64::from(self.r.gfx[gfx::READ_MAP] & 2) | at & 1;
            if map >> plane & 1 != 0 {
                self.store((at & !1) << 1 | plane, &[value]);
            }
        } else {
            self.write_planes(at * 4, value, map);
        }
    }

    fn write_planes(&mut self, at: u64, value: u8, map: u8) {
        let g = &self.r.gfx;
        let spread =
            |bits: u8| -> [u8; 4] { std::array::from_fn(|p| if bits >> p & 1 != 0 { 0xff } else { 0 }) };
        let rotated = value.rotate_right(u32::from(g[gfx::ROTATE] & 7));
        let mut mask = g[gfx::BIT_MASK];
        let mut planes = match g[gfx::MODE] & 3 {
            0 => {
                let (set, enable) = (spread(g[gfx::SET_RESET]), spread(g[gfx::ENABLE_SET_RESET]));
                std::array::from_fn(|p| rotated & !enable[p] | set[p] & enable[p])
            }
            1 => self.r.latch,
            2 => spread(value),
            _ => {
                mask &= rotated;
                spread(g[gfx::SET_RESET])
            }
        };
        if g[gfx::MODE] & 3 != 1 {
            for (plane, latch) in planes.iter_mut().zip(self.r.latch) {
                let combined = match g[gfx::ROTATE] >> 3 & 3 {
                    0 => *plane,
                    1 => *plane & latch,
                    2 => *plane | latch,
                    _ => *plane ^ latch,
                };
                *plane = combined & mask | latch & !mask;
            }
        }
        if map & 0xf == 0xf {
            return self.store(at, &planes);
        }
        for (p, byte) in planes.iter().enumerate().filter(|(p, _)| map >> p & 1 != 0) {
            self.store(at + p as u64, &[*byte]);
        }
    }
}
