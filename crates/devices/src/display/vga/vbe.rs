//! The Bochs VBE extensions ("dispi"): linear modes by a handful of registers.

use super::Vga;
use super::core::{crtc, gfx, seq};
use serde::{Deserialize, Serialize};

const ID: usize = 0;
const WIDTH: usize = 1;
const HEIGHT: usize = 2;
const BPP: usize = 3;
const ENABLE: usize = 4;
const BANK: usize = 5;
const VIRTUAL_WIDTH: usize = 6;
const VIRTUAL_HEIGHT: usize = 7;
const X: usize = 8;
const Y: usize = 9;
const MEMORY_64K: u16 = 10;

const ID_FIRST: u16 = 0xb0c0;
const ID_LAST: u16 = 0xb0c5;

const ENABLED: u16 = 1;
const GET_CAPABILITIES: u16 = 2;
const WIDE_DAC: u16 = 0x20;
const NO_CLEAR: u16 = 0x80;

const MOST_WIDTH: u16 = 16000;
const MOST_HEIGHT: u16 = 12000;
const MOST_BPP: u16 = 32;

/// The registers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Vbe {
    index: u16,
    regs: [u16; 10],
    /// Bytes from a line to the next.
    pub(super) stride: u32,
    /// Where the picture begins.
    pub(super) start: u64,
    banks: u16,
}

impl Vbe {
    pub(super) fn new(vram: u64) -> Self {
        let mut regs = [0; 10];
        regs[ID] = ID_LAST;
        Self { index: 0, regs, stride: 0, start: 0, banks: (vram >> 16) as u16 }
    }

    /// Brings a loaded state into the limits.
    pub(super) fn loaded(&mut self, vram: u64) {
        self.banks = (vram >> 16) as u16;
        self.regs[BANK] %= self.banks.max(1);
        (self.stride, self.start) = (0, 0);
        if self.is_enabled() || self.regs[BPP] != 0 {
            self.fix(vram);
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.regs[ENABLE] & ENABLED != 0
    }

    pub(super) fn is_wide_dac(&self) -> bool {
        self.regs[ENABLE] & WIDE_DAC != 0
    }

    /// Whether pixels lie one after the other.
    pub(super) fn is_packed(&self) -> bool {
        self.regs[BPP] != 4
    }

    pub(super) fn bank_offset(&self) -> u64 {
        u64::from(self.regs[BANK]) << 16
    }

    /// Width, height and bits a pixel.
    pub(super) fn mode(&self) -> (u32, u32, u16) {
        (self.regs[WIDTH].into(), self.regs[HEIGHT].into(), self.regs[BPP])
    }

    /// Brings everything into the limits that the mode and the memory set.
    fn fix(&mut self, vram: u64) {
        let r = &mut self.regs;
        if !matches!(r[BPP], 4 | 8 | 15 | 16 | 24 | 32) {
            r[BPP] = 8;
        }
        r[WIDTH] = (r[WIDTH] & !7).clamp(8, MOST_WIDTH);
        r[VIRTUAL_WIDTH] = r[VIRTUAL_WIDTH].clamp(r[WIDTH], MOST_WIDTH);
        let bits = if r[BPP] == 15 { 16 } else { r[BPP] };
        let stride = |width: u16| match bits {
            // Planes of a bit each, interleaved byte by byte.
            4 => u32::from(width).div_ceil(8) * 4,
            _ => u32::from(width) * u32::from(bits) / 8,
        };
        let mut line = stride(r[VIRTUAL_WIDTH]);
        let mut lines = vram / u64::from(line.max(1));
        if lines < u64::from(r[HEIGHT]) {
            r[VIRTUAL_WIDTH] = r[WIDTH];
            line = stride(r[WIDTH]);
            lines = vram / u64::from(line.max(1));
        }
        let lines = lines.clamp(1, MOST_HEIGHT.into()) as u16;
        r[HEIGHT] = r[HEIGHT].clamp(1, lines);
        r[VIRTUAL_HEIGHT] = lines;
        r[X] = r[X].min(MOST_WIDTH);
        r[Y] = r[Y].min(MOST_HEIGHT);
        let start = match bits {
            4 => u64::from(r[X] / 8) * 4,
            _ => u64::from(r[X]) * u64::from(bits) / 8,
        } + u64::from(r[Y]) * u64::from(line);
        if start + u64::from(r[HEIGHT]) * u64::from(line) > vram {
            r[X] = 0;
            r[Y] = 0;
            self.start = 0;
        } else {
            self.start = start;
        }
        self.stride = line;
    }
}

impl Vga {
    /// A read of the VBE ports; `port` is 0x1ce for the index, 0x1cf or 0x1d0 for data.
    pub fn read_vbe_port(&mut self, port: u16, data: &mut [u8]) {
        let index = self.r.vbe.index;
        let value = if port == 0x1ce { index } else { self.read_vbe(index) };
        // Bytes of a word, for those who read bytes.
        for (d, v) in data.iter_mut().zip(value.to_le_bytes().into_iter().chain([0, 0])) {
            *d = v;
        }
    }

    /// A write to the VBE ports.
    pub fn write_vbe_port(&mut self, port: u16, data: &[u8]) {
        let value =
            u16::from_le_bytes([data.first().copied().unwrap_or(0), data.get(1).copied().unwrap_or(0)]);
        if port == 0x1ce {
            self.r.vbe.index = value;
        } else {
            self.write_vbe(self.r.vbe.index, value);
        }
    }

    /// A VBE register by its index.
    pub fn read_vbe(&self, index: u16) -> u16 {
        let v = &self.r.vbe;
        if v.regs[ENABLE] & GET_CAPABILITIES != 0 {
            match usize::from(index) {
                WIDTH => return MOST_WIDTH,
                HEIGHT => return MOST_HEIGHT,
                BPP => return MOST_BPP,
                _ => {}
            }
        }
        match index {
            MEMORY_64K => v.banks,
            _ => v.regs.get(usize::from(index)).copied().unwrap_or(0),
        }
    }

    /// Writes a VBE register.
    pub fn write_vbe(&mut self, index: u16, value: u16) {
        let vram = self.size;
        let v = &mut self.r.vbe;
        let before = v.clone();
        match usize::from(index) {
            ID if (ID_FIRST..=ID_LAST).contains(&value) => v.regs[ID] = value,
            WIDTH | HEIGHT | BPP | VIRTUAL_WIDTH | X | Y => {
                v.regs[usize::from(index)] = value;
                v.fix(vram);
            }
            BANK => v.regs[BANK] = value % v.banks.max(1),
            ENABLE => return self.enable_vbe(value),
            _ => {}
        }
        self.changes(self.r.vbe != before && usize::from(index) != BANK);
    }

    fn enable_vbe(&mut self, value: u16) {
        let vram = self.size;
        let v = &mut self.r.vbe;
        let was = v.is_enabled();
        let before = v.clone();
        v.regs[ENABLE] = value;
        if v.is_enabled() && !was {
            v.regs[VIRTUAL_WIDTH] = 0;
            (v.regs[X], v.regs[Y]) = (0, 0);
            v.fix(vram);
            let (stride, height) = (u64::from(v.stride), u64::from(v.regs[HEIGHT]));
            if value & NO_CLEAR == 0 {
                let length = (stride * height).min(vram);
                let _ = self.vram.fill(0, length, 0); // within the memory
            }
            self.set_registers_for_vbe();
        } else if !v.is_enabled() {
            v.regs[BANK] = 0;
        }
        self.changes(self.r.vbe != before);
    }

    /// The VGA's registers as a BIOS that sets the mode would leave them; programs look at some.
    fn set_registers_for_vbe(&mut self) {
        let (width, height, bpp) = self.r.vbe.mode();
        let stride = self.r.vbe.stride;
        let r = &mut self.r;
        r.gfx[gfx::MISC] = r.gfx[gfx::MISC] & !0x0c | 0x05; // graphics, 64 KiB at 0xa0000
        r.crtc[crtc::MODE] |= 3;
        r.crtc[crtc::OFFSET] = (stride >> 3) as u8;
        r.crtc[crtc::HORIZONTAL_END] = ((width >> 3) as u8).wrapping_sub(1);
        let h = height - 1;
        r.crtc[crtc::VERTICAL_END] = h as u8;
        r.crtc[crtc::OVERFLOW] =
            r.crtc[crtc::OVERFLOW] & !0x42 | (h >> 7 & 0x02) as u8 | (h >> 3 & 0x40) as u8 | 0x10;
        r.crtc[crtc::LINE_COMPARE] = 0xff;
        r.crtc[crtc::MAX_SCAN] |= 0x40;
        if bpp == 4 {
            r.gfx[gfx::MODE] &= !0x60;
            r.seq[seq::MEMORY] &= !seq::MEMORY_CHAIN4;
        } else {
            r.gfx[gfx::MODE] = r.gfx[gfx::MODE] & !0x60 | 0x40;
            r.seq[seq::MEMORY] |= seq::MEMORY_CHAIN4;
        }
        r.seq[seq::MAP_MASK] |= 0x0f;
        r.crtc[crtc::MAX_SCAN] &= !0x9f;
    }
}
