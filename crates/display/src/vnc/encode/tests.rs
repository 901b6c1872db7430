//! A viewer's side of the encodings: what was encoded is decoded and compared.

use super::*;
use flate2::{Decompress, FlushDecompress};
use proptest::prelude::*;

/// Decodes what an encoder made.
#[derive(Default)]
pub(in crate::vnc) struct Decoder {
    zlib: Option<Decompress>,
    zrle: Option<Decompress>,
    tight: [Option<Decompress>; 4],
}

fn inflate(stream: &mut Option<Decompress>, input: &[u8], most: usize) -> Vec<u8> {
    let stream = stream.get_or_insert_with(|| Decompress::new(true));
    let mut out = Vec::with_capacity(most + 64);
    let start = stream.total_in();
    while ((stream.total_in() - start) as usize) < input.len() {
        let done = (stream.total_in() - start) as usize;
        out.reserve(4096);
        stream.decompress_vec(&input[done..], &mut out, FlushDecompress::Sync).unwrap();
    }
    out
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (a, b) = self.0.split_at(n);
        self.0 = b;
        a
    }
    fn u8(&mut self) -> u8 {
        self.take(1)[0]
    }
    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }
    fn pixel(&mut self, f: &PixelFormat) -> u32 {
        let raw = self.take(f.bytes());
        let mut all = [0; 4];
        if f.big_endian {
            all[4 - raw.len()..].copy_from_slice(raw);
            u32::from_be_bytes(all)
        } else {
            all[..raw.len()].copy_from_slice(raw);
            u32::from_le_bytes(all)
        }
    }
    fn compact(&mut self, f: &PixelFormat) -> u32 {
        let Some(from) = f.compact() else { return self.pixel(f) };
        let mut all = [0; 4];
        all[from..from + 3].copy_from_slice(self.take(3));
        if f.big_endian { u32::from_be_bytes(all) } else { u32::from_le_bytes(all) }
    }
    fn tight(&mut self, f: &PixelFormat) -> u32 {
        if !f.is_rgb() {
            return self.pixel(f);
        }
        let rgb = self.take(3);
        (0..3).fold(0, |all, i| all | u32::from(rgb[i]) << f.shift[i])
    }
    fn tight_length(&mut self) -> usize {
        let mut n = 0;
        for shift in [0, 7, 14] {
            let b = usize::from(self.u8());
            n |= if shift == 14 { b } else { b & 0x7f } << shift;
            if b & 0x80 == 0 || shift == 14 {
                break;
            }
        }
        n
    }
}

impl Decoder {
    /// Decodes one rectangle into converted pixels of a picture `width` wide; returns what was left of the data.
    pub(in crate::vnc) fn rect<'a>(
        &mut self,
        f: &PixelFormat,
        data: &'a [u8],
        picture: &mut [u32],
        width: usize,
    ) -> &'a [u8] {
        let mut c = Cursor(data);
        let n: Vec<usize> =
            (0..4).map(|_| u16::from_be_bytes(c.take(2).try_into().unwrap()).into()).collect();
        let (x0, y0, w, h) = (n[0], n[1], n[2], n[3]);
        let encoding = c.u32();
        let mut set = |x: usize, y: usize, p: u32| picture[(y0 + y) * width + x0 + x] = p;
        match encoding {
            0 => {
                for i in 0..w * h {
                    set(i % w, i / w, c.pixel(f));
                }
            }
            6 => {
                let length = c.u32() as usize;
                let plain = inflate(&mut self.zlib, c.take(length), w * h * f.bytes());
                let mut p = Cursor(&plain);
                for i in 0..w * h {
                    set(i % w, i / w, p.pixel(f));
                }
                assert!(p.0.is_empty());
            }
            5 => {
                let (mut bg, mut fg) = (None, None);
                for ty in (0..h).step_by(16) {
                    for tx in (0..w).step_by(16) {
                        let (tw, th) = (16.min(w - tx), 16.min(h - ty));
                        let flags = c.u8();
                        if flags & 1 != 0 {
                            for i in 0..tw * th {
                                set(tx + i % tw, ty + i / tw, c.pixel(f));
                            }
                            (bg, fg) = (None, None);
                            continue;
                        }
                        if flags & 2 != 0 {
                            bg = Some(c.pixel(f));
                        }
                        if flags & 4 != 0 {
                            fg = Some(c.pixel(f));
                        }
                        for i in 0..tw * th {
                            set(tx + i % tw, ty + i / tw, bg.unwrap());
                        }
                        if flags & 8 != 0 {
                            for _ in 0..c.u8() {
                                let colour = if flags & 16 != 0 { c.pixel(f) } else { fg.unwrap() };
                                let (xy, wh) = (c.u8(), c.u8());
                                for y in 0..=usize::from(wh & 15) {
                                    for x in 0..=usize::from(wh >> 4) {
                                        set(
                                            tx + usize::from(xy >> 4) + x,
                                            ty + usize::from(xy & 15) + y,
                                            colour,
                                        );
                                    }
                                }
                            }
                        }
                        if flags & 16 != 0 {
                            fg = None;
                        }
                    }
                }
            }
            16 => {
                let length = c.u32() as usize;
                let plain = inflate(&mut self.zrle, c.take(length), w * h * 4);
                let mut p = Cursor(&plain);
                for ty in (0..h).step_by(64) {
                    for tx in (0..w).step_by(64) {
                        let (tw, th) = (64.min(w - tx), 64.min(h - ty));
                        let kind = p.u8();
                        let colours: Vec<u32> = match kind {
                            0 | 128 => vec![],
                            k => (0..k & 127).map(|_| p.compact(f)).collect(),
                        };
                        let mut pixels = Vec::new();
                        let run = |p: &mut Cursor<'_>| {
                            let mut n = 1;
                            loop {
                                let b = p.u8();
                                n += usize::from(b);
                                if b != 255 {
                                    return n;
                                }
                            }
                        };
                        match kind {
                            0 => pixels.extend((0..tw * th).map(|_| p.compact(f))),
                            1 => pixels.extend(vec![colours[0]; tw * th]),
                            2..=16 => {
                                let bits = match kind {
                                    2 => 1,
                                    3 | 4 => 2,
                                    _ => 4,
                                };
                                for _ in 0..th {
                                    let row = p.take((tw * bits).div_ceil(8));
                                    for x in 0..tw {
                                        let at = row[x * bits / 8] >> (8 - bits - x * bits % 8)
                                            & ((1 << bits) - 1);
                                        pixels.push(colours[usize::from(at)]);
                                    }
                                }
                            }
                            128 => {
                                while pixels.len() < tw * th {
                                    let colour = p.compact(f);
                                    let n = run(&mut p);
                                    pixels.extend(vec![colour; n]);
                                }
                            }
                            130.. => {
                                while pixels.len() < tw * th {
                                    let at = p.u8();
                                    let n = if at & 128 != 0 { run(&mut p) } else { 1 };
                                    pixels.extend(vec![colours[usize::from(at & 127)]; n]);
                                }
                            }
                            other => panic!("tile {other}"),
                        }
                        assert_eq!(pixels.len(), tw * th);
                        for (i, pixel) in pixels.into_iter().enumerate() {
                            set(tx + i % tw, ty + i / tw, pixel);
                        }
                    }
                }
                assert!(p.0.is_empty());
            }
            7 => {
                let control = c.u8();
                match control >> 4 {
                    8 => {
                        let colour = c.tight(f);
                        for i in 0..w * h {
                            set(i % w, i / w, colour);
                        }
                    }
                    9 => {
                        let length = c.tight_length();
                        assert_eq!(c.take(length)[..2], [0xff, 0xd8]);
                    }
                    stream => {
                        let mut colours = vec![];
                        if stream & 4 != 0 {
                            assert_eq!(c.u8(), 1);
                            let n = usize::from(c.u8()) + 1;
                            colours.extend((0..n).map(|_| c.tight(f)));
                        }
                        let size = if f.is_rgb() { 3 } else { f.bytes() };
                        let length = match colours.len() {
                            0 => w * h * size,
                            2 => w.div_ceil(8) * h,
                            _ => w * h,
                        };
                        let plain = if length < 12 {
                            c.take(length).to_vec()
                        } else {
                            let packed = c.tight_length();
                            inflate(&mut self.tight[usize::from(stream & 3)], c.take(packed), length)
                        };
                        assert_eq!(plain.len(), length);
                        let mut p = Cursor(&plain);
                        for i in 0..w * h {
                            let (x, y) = (i % w, i / w);
                            let pixel = match colours.len() {
                                0 => p.tight(f),
                                2 => {
                                    colours[usize::from(plain[y * w.div_ceil(8) + x / 8] >> (7 - x % 8) & 1)]
                                }
                                _ => colours[usize::from(plain[i])],
                            };
                            set(x, y, pixel);
                        }
                    }
                }
            }
            other => panic!("encoding {other}"),
        }
        c.0
    }
}

fn formats() -> Vec<PixelFormat> {
    let d = PixelFormat::default();
    vec![
        d,
        PixelFormat { big_endian: true, ..d },
        PixelFormat { shift: [24, 16, 8], ..d },
        PixelFormat { bits: 16, depth: 16, max: [31, 63, 31], shift: [11, 5, 0], ..d },
        PixelFormat { bits: 8, depth: 8, max: [7, 7, 3], shift: [5, 2, 0], ..d },
    ]
}

/// Pictures of several kinds: noise, few colours, drawings, one colour.
fn picture(w: u32, h: u32, seed: u32, kind: u8) -> Frame {
    let mut frame = Frame::new(w, h).unwrap();
    let mut s = seed | 1;
    for y in 0..h {
        for (x, p) in frame.row_mut(y).iter_mut().enumerate() {
            s ^= s << 13;
            s ^= s >> 17;
            s ^= s << 5;
            *p = match kind {
                0 => s & 0xff_ffff,
                1 => [0, 0xff_ffff, 0xff_0000][s as usize % 3],
                2 => {
                    if (x as u32 / 7 + y / 9).is_multiple_of(5) {
                        0x12_3456
                    } else {
                        0xee_eeee
                    }
                }
                3 => 0x33_6699,
                4 => (x as u32 / 3) << 16 | (y / 2) << 8,
                _ => s % 40 * 0x01_0307,
            };
        }
    }
    frame
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn viewers_see_what_was_drawn(
        w in 1u32..150, h in 1u32..140, seed: u32, kinds in proptest::collection::vec(0u8..6, 1..4), level in 0u8..10,
        format in 0usize..5,
    ) {
        for encoding in [Encoding::Raw, Encoding::Hextile, Encoding::Zlib, Encoding::Zrle, Encoding::Tight] {
            let format = formats()[format];
            let mut encoder = Encoder { format, encoding, level: Some(level), ..Encoder::default() };
            let mut decoder = Decoder::default();
            for kind in &kinds {
                let frame = picture(w, h, seed, *kind);
                let rect = Rect::new(w / 3, h / 4, w - w / 3, h - h / 4);
                let mut out = Vec::new();
                let number = encoder.encode(&frame, rect, &mut out);
                let mut seen = vec![0; (w * h) as usize];
                let mut rest = &out[..];
                for _ in 0..number {
                    rest = decoder.rect(&format, rest, &mut seen, w as usize);
                }
                prop_assert!(rest.is_empty());
                for y in rect.y..h {
                    for x in rect.x..w {
                        let want = format.convert(frame.row(y)[x as usize]);
                        prop_assert_eq!(seen[(y * w + x) as usize], want, "{:?} {} {} {}", encoding, kind, x, y);
                    }
                }
            }
        }
    }
}

#[test]
fn pictures_go_as_jpeg_where_wanted() {
    let mut encoder = Encoder { encoding: Encoding::Tight, quality: Some(6), ..Encoder::default() };
    let frame = picture(256, 128, 7, 0);
    let mut out = Vec::new();
    assert_eq!(encoder.encode(&frame, frame.bounds(), &mut out), 2);
    assert_eq!(out[12], JPEG_CONTROL);
    let lossy = out.len();
    encoder.quality = None;
    out.clear();
    encoder.encode(&frame, frame.bounds(), &mut out);
    assert!(out.len() > 2 * lossy);
}

const JPEG_CONTROL: u8 = 0x90;
