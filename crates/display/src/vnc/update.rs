//! Framebuffer updates (RFC 6143, 7.6.1).

use super::encode::{Encoding, header};
use super::pixel::PixelFormat;
use super::session::{Session, Writer};
use crate::{Cursor, Rect};

const COPY: i32 = 1;
const DESKTOP_SIZE: i32 = -223;
const LAST_RECT: i32 = -224;
const CURSOR: i32 = -239;
const POINTER_KIND: i32 = -257;
const EXTENDED_KEYS: i32 = -258;
const LEDS: i32 = -261;
const DESKTOP_NAME: i32 = -307;
const EXTENDED_SIZE: i32 = -308;
const ALPHA_CURSOR: i32 = -314;

/// More rectangles than this are joined.
const MOST_RECTS: usize = 512;

/// A message being put together.
struct Message {
    out: Vec<u8>,
    number: u32,
}

impl Message {
    fn new() -> Self {
        Self { out: vec![0; 4], number: 0 }
    }

    fn rect(&mut self, rect: Rect, encoding: i32) -> &mut Vec<u8> {
        self.number += 1;
        header(rect, encoding, &mut self.out);
        &mut self.out
    }

    fn finish(mut self, last_rect: bool) -> Vec<u8> {
        if self.number == 0 {
            return Vec::new();
        }
        let number = match u16::try_from(self.number) {
            Ok(n) if n < u16::MAX => n,
            _ if last_rect => {
                header(Rect::default(), LAST_RECT, &mut self.out);
                u16::MAX
            }
            // Tight's cells of the largest picture are far fewer.
            _ => u16::MAX,
        };
        self.out[2..4].copy_from_slice(&number.to_be_bytes());
        self.out
    }
}

impl Session {
    /// The next update, if one is due; empty otherwise.
    pub(super) fn update(&self, writer: &mut Writer) -> Vec<u8> {
        let Some(displays) = self.displays.upgrade() else { return Vec::new() };
        let mut message = Message::new();
        // The picture stands still while it is read.
        let canvas = self.console.canvas();
        let mut wants = self.lock();
        let Some(area) = wants.requested.or(wants.continuous) else { return Vec::new() };
        let can = wants.can;
        writer.encoder.format = wants.format;
        writer.encoder.encoding = wants.encoding.unwrap_or(Encoding::Raw);
        (writer.encoder.quality, writer.encoder.level) = (wants.quality, wants.level);

        if std::mem::take(&mut wants.announce) {
            if can.extended_keys {
                message.rect(Rect::default(), EXTENDED_KEYS);
            }
            if can.desktop_name {
                let name = self.options.name.as_bytes();
                let out = message.rect(Rect::default(), DESKTOP_NAME);
                out.extend((name.len() as u32).to_be_bytes());
                out.extend_from_slice(name);
            }
            if can.extended_size && wants.size_answer.is_none() {
                extended_size(&mut message, (0, 0), writer.size);
            }
        }
        let (leds, absolute) = (displays.input().leds(), displays.input().is_absolute());
        if can.leds && wants.leds.replace(leds) != Some(leds) {
            let bits = u8::from(leds.scroll) | u8::from(leds.num) << 1 | u8::from(leds.caps) << 2;
            message.rect(Rect::default(), LEDS).push(bits);
        }
        if can.pointer_kind && wants.absolute.replace(absolute) != Some(absolute) {
            message.rect(Rect { x: absolute.into(), ..Rect::default() }, POINTER_KIND);
        }
        if let Some(answer) = wants.size_answer.take()
            && can.extended_size
        {
            extended_size(&mut message, (1, answer.into()), writer.size);
        }
        let forced = wants.forced.take();
        let size = canvas.size();
        if size.0 > 0 && size != writer.size && (can.desktop_size || can.extended_size) {
            writer.size = size;
            writer.scroll.forget();
            writer.viewer.news(|n| n.resized = false);
            if can.extended_size {
                extended_size(&mut message, (0, 0), size);
            } else {
                message.rect(Rect::new(0, 0, size.0, size.1), DESKTOP_SIZE);
            }
            // The viewer asks again, with its new size; all of it is damaged.
            wants.requested = None;
            return message.finish(can.last_rect);
        }
        if size.0 == 0 {
            return message.finish(can.last_rect);
        }
        drop(wants);
        let shown = Rect::new(0, 0, size.0, size.1).clip(writer.size.0, writer.size.1);
        let area = area.intersect(&shown);
        let (mut rects, cursor) = writer.viewer.news(|n| {
            n.resized = false;
            if let Some(forced) = forced {
                n.damage.add(forced.intersect(&shown));
            }
            if writer.size != size {
                // What a viewer with a smaller picture cannot see is not news to it.
                n.damage.drop_outside(shown);
            }
            (n.damage.take(area), can.cursor_of_any_kind() && std::mem::take(&mut n.cursor))
        });
        if cursor {
            let shape = canvas.cursor();
            match shape {
                // The guest draws its own, or has no pointer: viewers show none.
                None => put_cursor(&mut message, &Cursor::hidden(), can.alpha_cursor, &writer.encoder.format),
                Some(shape) => put_cursor(&mut message, shape, can.alpha_cursor, &writer.encoder.format),
            }
        }
        rects.iter_mut().for_each(|r| *r = r.intersect(&shown));
        rects.retain(|r| !r.is_empty());
        if rects.len() > MOST_RECTS {
            let bottom = rects.iter().map(|r| r.y + r.h).max().unwrap_or(0);
            let (top, left) = (rects[0].y, rects.iter().map(|r| r.x).min().unwrap_or(0));
            let right = rects.iter().map(|r| r.x + r.w).max().unwrap_or(0);
            rects = vec![Rect::new(left, top, right - left, bottom - top)];
        }
        let frame = canvas.frame();
        if can.copy && area == frame.bounds() {
            if forced.is_some() {
                // Everything was asked for and is sent, but remembered.
                writer.scroll.find(frame, &mut rects.clone());
            } else if let Some(moved) = writer.scroll.find(frame, &mut rects) {
                let out = message.rect(Rect::new(0, moved.to, size.0, moved.rows), COPY);
                out.extend([0, 0]);
                out.extend((moved.from as u16).to_be_bytes()); // below 16384
            }
        } else {
            writer.scroll.forget_rows(&rects);
        }
        for rect in rects {
            message.number += writer.encoder.encode(frame, rect, &mut message.out);
        }
        if message.number > 0 {
            self.lock().requested = None;
        }
        message.finish(can.last_rect)
    }
}

/// The screen's layout: one screen of all.
fn extended_size(message: &mut Message, (reason, status): (u32, u32), size: (u32, u32)) {
    let out = message.rect(Rect::new(reason, status, size.0, size.1), EXTENDED_SIZE);
    out.extend([1, 0, 0, 0]);
    out.extend(0u32.to_be_bytes());
    for n in [0, 0, size.0 as u16, size.1 as u16] {
        out.extend(n.to_be_bytes());
    }
    out.extend(0u32.to_be_bytes());
}

fn put_cursor(message: &mut Message, cursor: &Cursor, alpha: bool, format: &PixelFormat) {
    let rect = Rect::new(cursor.hot.0, cursor.hot.1, cursor.width, cursor.height);
    if alpha {
        let out = message.rect(rect, ALPHA_CURSOR);
        out.extend(0u32.to_be_bytes()); // raw
        for p in &cursor.pixels {
            let a = p >> 24;
            // Colours are multiplied with alpha here.
            let part = |at: u32| ((p >> at & 0xff) * a / 255) as u8;
            out.extend([part(16), part(8), part(0), a as u8]);
        }
        return;
    }
    let out = message.rect(rect, CURSOR);
    cursor.pixels.iter().for_each(|p| format.put(format.convert(*p), out));
    for row in cursor.pixels.chunks(cursor.width.max(1) as usize) {
        for group in row.chunks(8) {
            let bits = group.iter().fold(0u8, |all, p| all << 1 | u8::from(p >> 24 >= 0x80));
            out.push(bits << (8 - group.len()));
        }
    }
}
