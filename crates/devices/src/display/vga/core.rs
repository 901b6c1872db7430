//! Registers of the VGA and its ports (IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem"; Ferraro,
//! Programmer's Guide to the EGA, VGA and Super VGA Cards).

use super::vbe::Vbe;
use bus::RamWindow;
use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Ranges of ports: first and number.
pub struct Ports;

impl Ports {
    /// The VGA's own.
    pub const VGA: [(u16, u16); 5] = [(0x3b4, 2), (0x3ba, 1), (0x3c0, 16), (0x3d4, 2), (0x3da, 1)];
    /// The VBE extensions' (index, data, data where words must be aligned).
    pub const VBE: (u16, u16) = (0x1ce, 4);
}

/// Sequencer registers.
pub(super) mod seq {
    pub(crate) const CLOCKING: usize = 1;
    pub(crate) const MAP_MASK: usize = 2;
    pub(crate) const FONTS: usize = 3;
    pub(crate) const MEMORY: usize = 4;
    pub(crate) const MEMORY_CHAIN4: u8 = 8;
}

/// Graphics controller registers.
pub(super) mod gfx {
    pub(crate) const SET_RESET: usize = 0;
    pub(crate) const ENABLE_SET_RESET: usize = 1;
    pub(crate) const COMPARE: usize = 2;
    pub(crate) const ROTATE: usize = 3;
    pub(crate) const READ_MAP: usize = 4;
    pub(crate) const MODE: usize = 5;
    pub(crate) const MISC: usize = 6;
    pub(crate) const DONT_CARE: usize = 7;
    pub(crate) const BIT_MASK: usize = 8;
}

/// Attribute controller registers.
pub(super) mod attr {
    pub(crate) const MODE: usize = 0x10;
    pub(crate) const OVERSCAN: usize = 0x11;
    pub(crate) const PLANES: usize = 0x12;
    pub(crate) const PANNING: usize = 0x13;
    pub(crate) const COLOUR_SELECT: usize = 0x14;
}

/// CRT controller registers.
pub(super) mod crtc {
    pub(crate) const HORIZONTAL_END: usize = 0x01;
    pub(crate) const OVERFLOW: usize = 0x07;
    pub(crate) const MAX_SCAN: usize = 0x09;
    pub(crate) const CURSOR_START: usize = 0x0a;
    pub(crate) const CURSOR_END: usize = 0x0b;
    pub(crate) const START_HIGH: usize = 0x0c;
    pub(crate) const START_LOW: usize = 0x0d;
    pub(crate) const CURSOR_HIGH: usize = 0x0e;
    pub(crate) const CURSOR_LOW: usize = 0x0f;
    pub(crate) const SYNC_END: usize = 0x11;
    pub(crate) const VERTICAL_END: usize = 0x12;
    pub(crate) const OFFSET: usize = 0x13;
    pub(crate) const MODE: usize = 0x17;
    pub(crate) const LINE_COMPARE: usize = 0x18;
}

/// Attribute index: the palette is the screen's, not the program's.
pub(super) const ATTRIBUTE_SCREEN_ON: u8 = 0x20;
const MISC_COLOUR: u8 = 1;

/// Registers that the guest sees or could infer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Registers {
    pub(super) misc: u8,
    feature: u8,
    pub(super) seq_index: u8,
    pub(super) seq: [u8; 8],
    pub(super) gfx_index: u8,
    pub(super) gfx: [u8; 16],
    /// Index of the attribute controller, with the bit that turns the screen on.
    pub(super) attr_index: u8,
    /// The next write to the attribute controller is data.
    attr_data: bool,
    pub(super) attr: [u8; 21],
    pub(super) crtc_index: u8,
    pub(super) crtc: [u8; 25],
    status1: u8,
    pub(super) dac_mask: u8,
    dac_read: u8,
    dac_write: u8,
    /// Which of the three colours comes next.
    dac_part: u8,
    dac_state: u8,
    dac_latch: [u8; 3],
    /// Red, green and blue of 256 colours, of six bits (eight if VBE says so).
    pub(super) palette: Vec<u8>,
    /// The four planes' bytes that were read last.
    pub(super) latch: [u8; 4],
    pub(super) vbe: Vbe,
}

impl Registers {
    fn new(vram: u64) -> Self {
        Self {
            misc: MISC_COLOUR,
            feature: 0,
            seq_index: 0,
            seq: [0; 8],
            gfx_index: 0,
            gfx: [0; 16],
            attr_index: 0,
            attr_data: false,
            attr: [0; 21],
            crtc_index: 0,
            crtc: [0; 25],
            status1: 0,
            dac_mask: 0xff,
            dac_read: 0,
            dac_write: 0,
            dac_part: 0,
            dac_state: 0,
            dac_latch: [0; 3],
            palette: vec![0; 768],
            latch: [0; 4],
            vbe: Vbe::new(vram),
        }
    }

    /// Whether the state is one that accesses could have led to, for `load`.
    pub(super) fn is_valid(&self) -> bool {
        self.palette.len() == 768 && self.dac_part < 3
    }
}

/// The VGA: registers and video memory. How the guest reaches them is its owner's business.
///
/// The four planes lie interleaved in memory, byte by byte, so that chained and linear modes are linear there.
pub struct Vga {
    pub(super) r: Registers,
    pub(super) vram: GuestMemory,
    pub(super) size: u64,
    pub(super) window: Arc<RamWindow>,
    /// Changes whenever a register changes that changes the whole picture.
    pub(super) generation: u64,
}

impl Vga {
    /// A VGA whose memory is that of `window`.
    pub fn new(window: Arc<RamWindow>) -> Self {
        let size = window.len();
        Self { r: Registers::new(size), vram: window.memory(), size, window, generation: 0 }
    }

    /// Back to power-on; memory keeps its contents.
    pub fn reset(&mut self) {
        self.r = Registers::new(self.size);
        self.generation += 1;
    }

    /// A read of one of the [`Ports::VGA`].
    pub fn read_port(&mut self, port: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            if let Some(value) = self.read_byte(port.wrapping_add(i as u16)) {
                *byte = value;
            }
        }
    }

    /// A write to one of the [`Ports::VGA`].
    pub fn write_port(&mut self, port: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            self.write_byte(port.wrapping_add(i as u16), *byte);
        }
    }

    /// CRT controller and status are at 3Bx for monochrome, at 3Dx for colour.
    fn answers(&self, port: u16) -> bool {
        match port {
            0x3b0..=0x3bf => self.r.misc & MISC_COLOUR == 0,
            0x3d0..=0x3df => self.r.misc & MISC_COLOUR != 0,
            _ => true,
        }
    }

    fn read_byte(&mut self, port: u16) -> Option<u8> {
        if !self.answers(port) {
            return None;
        }
        let r = &mut self.r;
        Some(match port {
            0x3c0 if r.attr_data => 0,
            0x3c0 => r.attr_index,
            0x3c1 => r.attr.get(usize::from(r.attr_index & 0x1f)).copied().unwrap_or(0),
            0x3c2 => 0x10, // a monitor is there
            0x3c3 => 1,
            0x3c4 => r.seq_index,
            0x3c5 => r.seq[usize::from(r.seq_index & 7)],
            0x3c6 => r.dac_mask,
            0x3c7 => r.dac_state,
            0x3c8 => r.dac_write,
            0x3c9 => {
                let value = r.palette[usize::from(r.dac_read) * 3 + usize::from(r.dac_part)];
                r.dac_part += 1;
                if r.dac_part == 3 {
                    r.dac_part = 0;
                    r.dac_read = r.dac_read.wrapping_add(1);
                }
                value
            }
            0x3ca => r.feature,
            0x3cc => r.misc,
            0x3ce => r.gfx_index,
            0x3cf => r.gfx[usize::from(r.gfx_index & 0xf)],
            0x3b4 | 0x3d4 => r.crtc_index,
            0x3b5 | 0x3d5 => r.crtc.get(usize::from(r.crtc_index)).copied().unwrap_or(0),
            0x3ba | 0x3da => {
                r.attr_data = false;
                // Retrace comes and goes with every look: programs that wait for it never wait long.
                r.status1 ^= 0x09;
                r.status1
            }
            _ => return None,
        })
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        if !self.answers(port) {
            return;
        }
        match port {
            0x3c0 => self.write_attribute(value),
            0x3c2 => {
                self.changes(self.r.misc != value);
                self.r.misc = value;
            }
            0x3c4 => self.r.seq_index = value & 7,
            0x3c5 => {
                const MASKS: [u8; 8] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e, 0, 0, 0xff];
                let at = usize::from(self.r.seq_index & 7);
                let value = value & MASKS[at];
                self.changes(self.r.seq[at] != value && at != seq::MAP_MASK);
                self.r.seq[at] = value;
            }
            0x3c6 => {
                self.changes(self.r.dac_mask != value);
                self.r.dac_mask = value;
            }
            0x3c7 => {
                self.r.dac_read = value;
                self.r.dac_part = 0;
                self.r.dac_state = 3;
            }
            0x3c8 => {
                self.r.dac_write = value;
                self.r.dac_part = 0;
                self.r.dac_state = 0;
            }
            0x3c9 => self.write_palette(value),
            0x3ba | 0x3da => self.r.feature = value & 0x10,
            0x3ce => self.r.gfx_index = value & 0xf,
            0x3cf => {
                const MASKS: [u8; 16] = [0xf, 0xf, 0xf, 0x1f, 3, 0x7b, 0xf, 0xf, 0xff, 0, 0, 0, 0, 0, 0, 0];
                let at = usize::from(self.r.gfx_index & 0xf);
                let value = value & MASKS[at];
                self.changes(self.r.gfx[at] != value && matches!(at, gfx::MODE | gfx::MISC));
                self.r.gfx[at] = value;
            }
            0x3b4 | 0x3d4 => self.r.crtc_index = value,
            0x3b5 | 0x3d5 => self.write_crtc(value),
            _ => {}
        }
    }

    fn write_attribute(&mut self, value: u8) {
        let r = &mut self.r;
        let is_data = r.attr_data;
        r.attr_data = !is_data;
        if !is_data {
            let new = value & 0x3f;
            let changed = (r.attr_index ^ new) & ATTRIBUTE_SCREEN_ON != 0;
            r.attr_index = new;
            return self.changes(changed);
        }
        let at = usize::from(r.attr_index & 0x1f);
        let mask = match at {
            0..0x10 => 0x3f,
            attr::MODE => !0x10,
            attr::OVERSCAN => 0xff,
            attr::PLANES => !0xc0,
            attr::PANNING | attr::COLOUR_SELECT => 0x0f,
            _ => return,
        };
        let changed = r.attr[at] != value & mask;
        r.attr[at] = value & mask;
        self.changes(changed);
    }

    fn write_palette(&mut self, value: u8) {
        let r = &mut self.r;
        r.dac_latch[usize::from(r.dac_part)] = value;
        r.dac_part += 1;
        if r.dac_part < 3 {
            return;
        }
        r.dac_part = 0;
        let entry = &mut r.palette[usize::from(r.dac_write) * 3..][..3];
        let changed = entry != r.dac_latch;
        entry.copy_from_slice(&r.dac_latch);
        r.dac_write = r.dac_write.wrapping_add(1);
        self.changes(changed);
    }

    fn write_crtc(&mut self, value: u8) {
        let at = usize::from(self.r.crtc_index);
        let r = &mut self.r;
        // Registers 0 to 7 can be locked, but for the line compare bit of 7.
        let new = if r.crtc[crtc::SYNC_END] & 0x80 != 0 && at <= crtc::OVERFLOW {
            if at != crtc::OVERFLOW {
                return;
            }
            r.crtc[at] & !0x10 | value & 0x10
        } else {
            value
        };
        let Some(old) = r.crtc.get_mut(at) else { return };
        let changed = std::mem::replace(old, new) != new;
        // Where the picture begins is compared with what is shown; the cursor changes its own cells only.
        self.changes(changed && !(crtc::START_HIGH..=crtc::CURSOR_LOW).contains(&at));
    }

    pub(super) fn changes(&mut self, changed: bool) {
        self.generation += u64::from(changed);
    }

    /// Colour 0x00RRGGBB of the palette.
    pub(super) fn colour(&self, index: u8) -> u32 {
        let at = usize::from(index & self.r.dac_mask) * 3;
        let wide = self.r.vbe.is_wide_dac();
        self.r.palette[at..at + 3].iter().fold(0, |all, part| {
            let part = if wide { *part } else { (part & 0x3f) << 2 | (part & 0x3f) >> 4 };
            all << 8 | u32::from(part)
        })
    }

    /// Colour of one of the 16 that text and planes choose from.
    pub(super) fn colour16(&self, index: u8) -> u32 {
        let a = &self.r.attr;
        let value = a[usize::from(index & 0xf)];
        let select = a[attr::COLOUR_SELECT];
        let entry = if a[attr::MODE] & 0x80 != 0 {
            (select & 0xf) << 4 | value & 0xf
        } else {
            (select & 0xc) << 4 | value & 0x3f
        };
        self.colour(entry)
    }

    /// Reads video memory; what is not there reads as zero.
    pub(super) fn load(&self, at: u64, buf: &mut [u8]) {
        buf.fill(0);
        let have = self.size.saturating_sub(at).min(buf.len() as u64) as usize;
        if have > 0 {
            // The range was just cut to what there is.
            let _ = self.vram.read(at, &mut buf[..have]);
        }
    }

    /// Writes video memory; what is not there is dropped.
    pub(super) fn store(&self, at: u64, buf: &[u8]) {
        let have = self.size.saturating_sub(at).min(buf.len() as u64) as usize;
        if have > 0 {
            let _ = self.vram.write(at, &buf[..have]); // as above
        }
    }
}
