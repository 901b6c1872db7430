//! From video memory and registers to pixels.

use super::Vga;
use super::core::{ATTRIBUTE_SCREEN_ON, attr, crtc, gfx, seq};
use display::{Canvas, Cell, TextScreen, from_cp437};

/// Most bytes of a line of a picture (16384 pixels of four bytes).
const MOST_LINE: u64 = 1 << 16;

/// What the registers say is to be seen.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Mode {
    Blank,
    Text(Text),
    Graphics(Graphics),
}

/// A text mode.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Text {
    pub(super) columns: u32,
    pub(super) rows: u32,
    cell: (u32, u32),
    start: u64,
    stride: u64,
    /// Fonts for characters without and with the intensity bit.
    fonts: [u64; 2],
}

impl Text {
    /// Whether cells look the same in both.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        Self { start: other.start, ..self.clone() } == *other
    }
}

/// A graphics mode.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Graphics {
    width: u32,
    height: u32,
    start: u64,
    stride: u64,
    pixels: Pixels,
    /// Each pixel is shown twice.
    double: bool,
    /// Each line is shown so many times more.
    repeat: u32,
    line_compare: u32,
    /// The CRT controller's mode register, which folds addresses.
    folding: u8,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Pixels {
    /// Four planes of a bit each.
    Planes,
    /// Two bits (CGA).
    Pairs,
    /// Colours of the palette.
    Bytes,
    Rgb555,
    Rgb565,
    Rgb888,
    Xrgb8888,
}

impl Pixels {
    /// Bytes of video memory that `width` pixels take.
    fn bytes(self, width: u32) -> u64 {
        let width = u64::from(width);
        match self {
            Self::Planes => width.div_ceil(8) * 4,
            // Chained pairs of bytes lie in two of the four planes.
            Self::Pairs => width.div_ceil(8) * 4,
            Self::Bytes => width,
            Self::Rgb555 | Self::Rgb565 => width * 2,
            Self::Rgb888 => width * 3,
            Self::Xrgb8888 => width * 4,
        }
    }
}

impl Vga {
    pub(super) fn mode(&self) -> Mode {
        let r = &self.r;
        let v = &r.vbe;
        // With VBE the screen is on whatever the attribute controller thinks: drivers do not program it.
        if v.is_enabled() {
            let (width, height, bpp) = v.mode();
            let pixels = match bpp {
                4 => Pixels::Planes,
                8 => Pixels::Bytes,
                15 => Pixels::Rgb555,
                16 => Pixels::Rgb565,
                24 => Pixels::Rgb888,
                _ => Pixels::Xrgb8888,
            };
            return Mode::Graphics(Graphics {
                width,
                height,
                start: v.start,
                stride: v.stride.into(),
                pixels,
                double: false,
                repeat: 0,
                line_compare: u32::MAX,
                folding: 3,
            });
        }
        if r.attr_index & ATTRIBUTE_SCREEN_ON == 0 || r.seq[seq::CLOCKING] & 0x20 != 0 {
            return Mode::Blank;
        }
        let c = &r.crtc;
        let columns = u32::from(c[crtc::HORIZONTAL_END]) + 1;
        let overflow = u32::from(c[crtc::OVERFLOW]);
        let height = (u32::from(c[crtc::VERTICAL_END]) | (overflow & 2) << 7 | (overflow & 0x40) << 3) + 1;
        let start = (u64::from(c[crtc::START_HIGH]) << 8 | u64::from(c[crtc::START_LOW])) * 4;
        let stride = u64::from(c[crtc::OFFSET]) << 3;
        if r.gfx[gfx::MISC] & 1 == 0 {
            let clocking = r.seq[seq::CLOCKING];
            let cell_width = if clocking & 1 != 0 { 8 } else { 9 };
            let cell_height = u32::from(c[crtc::MAX_SCAN] & 0x1f) + 1;
            let scans = height >> (c[crtc::MAX_SCAN] >> 7);
            let rows = (scans / cell_height).max(1);
            if columns * cell_width > 4096 || rows * cell_height > 2048 || columns < 2 {
                return Mode::Blank;
            }
            let f = u64::from(r.seq[seq::FONTS]);
            let font = |high: u64, low: u64| (high | low << 1) * 8192 * 4 + 2;
            let fonts = [font(f >> 4 & 1, f & 3), font(f >> 5 & 1, f >> 2 & 3)];
            return Mode::Text(Text { columns, rows, cell: (cell_width, cell_height), start, stride, fonts });
        }
        let scan = c[crtc::MAX_SCAN];
        let (pixels, double, repeat) = match r.gfx[gfx::MODE] >> 5 & 3 {
            0 => (
                Pixels::Planes,
                r.seq[seq::CLOCKING] & 8 != 0,
                ((u32::from(scan & 0x1f) + 1) << (scan >> 7)) - 1,
            ),
            // The CGA's modes use the scan lines for their own folding.
            1 => (Pixels::Pairs, r.seq[seq::CLOCKING] & 8 != 0, u32::from(scan >> 7)),
            _ => (Pixels::Bytes, true, ((u32::from(scan & 0x1f) + 1) << (scan >> 7)) - 1),
        };
        let width = match (pixels, double) {
            (Pixels::Bytes, _) => columns * 8,
            (_, true) => columns * 16,
            _ => columns * 8,
        };
        let high = u32::from(c[crtc::OVERFLOW] >> 4 & 1) << 8 | u32::from(c[crtc::MAX_SCAN] >> 6 & 1) << 9;
        let line_compare = u32::from(c[crtc::LINE_COMPARE]) | high;
        let folding = c[crtc::MODE];
        Mode::Graphics(Graphics {
            width,
            height,
            start,
            stride,
            pixels,
            double,
            repeat,
            line_compare,
            folding,
        })
    }

    /// Draws everything that is to be seen now.
    pub fn draw(&self, canvas: &mut Canvas) {
        match self.mode() {
            Mode::Blank => {
                canvas.set_size(720, 400);
                canvas.clear(0);
            }
            Mode::Text(text) => self.draw_text(&text, canvas, &mut Vec::new(), true),
            Mode::Graphics(graphics) => self.draw_graphics(&graphics, canvas, |_, _| true),
        }
    }

    /// Draws a graphics mode. `dirty` says whether any page of a range of video memory was written.
    pub(super) fn draw_graphics(&self, g: &Graphics, canvas: &mut Canvas, dirty: impl Fn(u64, u64) -> bool) {
        if !canvas.set_size(g.width, g.height) {
            return;
        }
        let all = canvas.wants_all();
        let own = if g.double { g.width.div_ceil(2) } else { g.width };
        let bytes = g.pixels.bytes(own).min(MOST_LINE);
        let colours = self.colours(g.pixels);
        let mut raw = vec![0; bytes as usize + 8];
        let mut line = vec![0u32; g.width as usize + 32];
        let (mut from, mut row, mut left) = (g.start, 0u32, g.repeat);
        let mut drawn = None;
        for y in 0..g.height {
            let at = fold(from, row, g.folding);
            if all || dirty(at, bytes) {
                if drawn != Some(at) {
                    drawn = Some(at);
                    self.load(at, &mut raw[..bytes as usize]);
                    self.convert(g.pixels, &raw, &colours, &mut line, own as usize);
                    if g.double {
                        for x in (0..own as usize).rev() {
                            let pixel = line[x];
                            line[2 * x] = pixel;
                            line[2 * x + 1] = pixel;
                        }
                    }
                }
                canvas.draw(0, y, &line[..g.width as usize]);
            }
            if left == 0 {
                let mask = u32::from(g.folding & 3 ^ 3);
                if row & mask == mask {
                    from += g.stride;
                }
                row += 1;
                left = g.repeat;
            } else {
                left -= 1;
            }
            if y == g.line_compare {
                (from, row, left) = (0, 0, g.repeat);
            }
        }
    }

    fn colours(&self, pixels: Pixels) -> Vec<u32> {
        match pixels {
            Pixels::Planes => (0..16).map(|i| self.colour16(i & self.r.attr[attr::PLANES])).collect(),
            Pixels::Pairs => (0..4).map(|i| self.colour16(i)).collect(),
            Pixels::Bytes => (0..=255).map(|i| self.colour(i)).collect(),
            _ => Vec::new(),
        }
    }

    fn convert(&self, pixels: Pixels, raw: &[u8], colours: &[u32], line: &mut [u32], width: usize) {
        let wide = |v: u32, bits: u32| v << (8 - bits) | v >> (2 * bits - 8);
        match pixels {
            Pixels::Planes => {
                for (planes, out) in raw.chunks_exact(4).zip(line.chunks_mut(8)) {
                    for (x, pixel) in out.iter_mut().enumerate() {
                        let bit = |p: usize| usize::from(planes[p] >> (7 - x) & 1) << p;
                        *pixel = colours[bit(0) | bit(1) | bit(2) | bit(3)];
                    }
                }
            }
            Pixels::Pairs => {
                for (planes, out) in raw.chunks_exact(4).zip(line.chunks_mut(8)) {
                    for (x, pixel) in out.iter_mut().enumerate() {
                        *pixel = colours[usize::from(planes[x / 4] >> (6 - 2 * (x % 4)) & 3)];
                    }
                }
            }
            Pixels::Bytes => {
                for (byte, out) in raw.iter().zip(&mut line[..width]) {
                    *out = colours[usize::from(*byte)];
                }
            }
            Pixels::Rgb555 | Pixels::Rgb565 => {
                let green = if pixels == Pixels::Rgb555 { 5 } else { 6 };
                for (pair, out) in raw.as_chunks::<2>().0.iter().zip(&mut line[..width]) {
                    let v = u32::from(u16::from_le_bytes(*pair));
                    let (b, g, r) = (v & 0x1f, v >> 5 & ((1 << green) - 1), v >> (5 + green) & 0x1f);
                    *out = wide(r, 5) << 16 | wide(g, green) << 8 | wide(b, 5);
                }
            }
            Pixels::Rgb888 => {
                for (rgb, out) in raw.as_chunks::<3>().0.iter().zip(&mut line[..width]) {
                    *out = u32::from_le_bytes([rgb[0], rgb[1], rgb[2], 0]);
                }
            }
            Pixels::Xrgb8888 => {
                for (bytes, out) in raw.as_chunks::<4>().0.iter().zip(&mut line[..width]) {
                    *out = u32::from_le_bytes(*bytes) & 0xff_ffff;
                }
            }
        }
    }

    /// Character and attribute of every cell, and where the cursor is.
    pub(super) fn text_cells(&self, t: &Text) -> (Vec<[u8; 2]>, Option<u64>) {
        let mut cells = Vec::with_capacity((t.columns * t.rows) as usize);
        let mut raw = vec![0; t.columns as usize * 4];
        for row in 0..t.rows {
            self.load(t.start + u64::from(row) * t.stride, &mut raw);
            cells.extend(raw.as_chunks::<4>().0.iter().map(|c| [c[0], c[1]]));
        }
        let c = &self.r.crtc;
        let place = (u64::from(c[crtc::CURSOR_HIGH]) << 8 | u64::from(c[crtc::CURSOR_LOW])) * 4;
        let shown = c[crtc::CURSOR_START] & 0x20 == 0 && t.stride != 0;
        let cursor = place.checked_sub(t.start).filter(|_| shown).and_then(|at| {
            let (row, column) = (at / t.stride, at % t.stride / 4);
            (row < t.rows.into() && column < t.columns.into()).then_some(row * u64::from(t.columns) + column)
        });
        (cells, cursor)
    }

    /// Foreground and background of an attribute.
    fn attribute(&self, attribute: u8) -> (u32, u32) {
        // Blinking is shown as steady: a screen that is left alone costs nothing.
        let blinks = self.r.attr[attr::MODE] & 8 != 0;
        let background = if blinks { attribute >> 4 & 7 } else { attribute >> 4 };
        (self.colour16(attribute & 0xf), self.colour16(background))
    }

    /// The screen as text.
    pub(super) fn text_screen(&self, t: &Text) -> TextScreen {
        let (raw, cursor) = self.text_cells(t);
        let cells = raw.iter().map(|[ch, attribute]| {
            let (fg, bg) = self.attribute(*attribute);
            Cell { ch: from_cp437(*ch), fg, bg }
        });
        let columns = u64::from(t.columns);
        TextScreen {
            columns: t.columns,
            rows: t.rows,
            cells: cells.collect(),
            cursor: cursor.map(|c| ((c % columns) as u32, (c / columns) as u32)),
        }
    }

    /// Draws the cells that differ from `shown`, which becomes what is shown.
    pub(super) fn draw_text(
        &self,
        t: &Text,
        canvas: &mut Canvas,
        shown: &mut Vec<([u8; 2], bool)>,
        all: bool,
    ) {
        let (cw, ch) = t.cell;
        if !canvas.set_size(t.columns * cw, t.rows * ch) {
            return;
        }
        let all = all || canvas.wants_all();
        let (cells, cursor) = self.text_cells(t);
        let new: Vec<_> =
            cells.into_iter().enumerate().map(|(i, cell)| (cell, cursor == Some(i as u64))).collect();
        let mut fonts = [vec![0; 256 * 32 * 4], Vec::new()];
        let mut loaded = false;
        let mut rows = vec![0u32; (cw * ch) as usize];
        for (i, (cell, has_cursor)) in new.iter().enumerate() {
            if !all && shown.get(i) == Some(&(*cell, *has_cursor)) {
                continue;
            }
            if !loaded {
                self.load(t.fonts[0], &mut fonts[0]);
                if t.fonts[1] != t.fonts[0] {
                    fonts[1] = vec![0; 256 * 32 * 4];
                    self.load(t.fonts[1], &mut fonts[1]);
                }
                loaded = true;
            }
            self.draw_cell(t, *cell, *has_cursor, &fonts, &mut rows);
            let (column, row) = (i as u32 % t.columns, i as u32 / t.columns);
            for (y, pixels) in (0..ch).zip(rows.chunks(cw as usize)) {
                canvas.draw(column * cw, row * ch + y, pixels);
            }
        }
        *shown = new;
    }

    fn draw_cell(
        &self,
        t: &Text,
        [ch, attribute]: [u8; 2],
        has_cursor: bool,
        fonts: &[Vec<u8>; 2],
        out: &mut [u32],
    ) {
        let (cw, height) = t.cell;
        let (fg, bg) = self.attribute(attribute);
        // The intensity bit chooses the font where there are two.
        let font = if fonts[1].is_empty() || attribute & 8 != 0 { &fonts[0] } else { &fonts[1] };
        let wide = self.r.attr[attr::MODE] & 4 != 0 && (0xc0..0xe0).contains(&ch);
        let c = &self.r.crtc;
        let (first, last) = (u32::from(c[crtc::CURSOR_START] & 0x1f), u32::from(c[crtc::CURSOR_END] & 0x1f));
        // Monochrome text: attribute 1 is underlined where the CRT controller says.
        for y in 0..height {
            let bits = font.get(usize::from(ch) * 128 + y as usize * 4).copied().unwrap_or(0);
            let cursor = has_cursor && (first..=last).contains(&y);
            for x in 0..cw {
                let on = match x {
                    0..8 => bits >> (7 - x) & 1 != 0,
                    _ => wide && bits & 1 != 0,
                };
                out[(y * cw + x) as usize] = if on || cursor { fg } else { bg };
            }
        }
    }

    /// Ranges of video memory (start, length) that a text mode shows.
    pub(super) fn text_ranges(t: &Text) -> [(u64, u64); 3] {
        let font = 256 * 32 * 4;
        let text = t.stride * u64::from(t.rows.saturating_sub(1)) + u64::from(t.columns) * 4;
        [(t.start, text), (t.fonts[0], font), (t.fonts[1], font)]
    }
}

/// The address of a line, as the CRT controller folds it (IBM: "select row scan counter", "compatibility mode").
fn fold(from: u64, row: u32, folding: u8) -> u64 {
    let mut at = from;
    if folding & 1 == 0 {
        let shift = 14 + (folding >> 6 & 1);
        at = at & !(1 << shift) | u64::from(row & 1) << shift;
    }
    if folding & 2 == 0 {
        at = at & !0x8000 | u64::from(row & 2) << 14;
    }
    at
}
