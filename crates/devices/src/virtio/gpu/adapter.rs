//! What the adapter holds: pictures, screens, pointers.

use super::resource::{Format, Resource};
use crate::display::{pack, unpack};
use ::display::{Console, Cursor, Damage, Rect};
use bus::virtio::Interrupt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Most screens.
pub(super) const MOST_HEADS: usize = 16;
/// Most pictures.
const MOST_RESOURCES: usize = 4096;
/// Side of a pointer's picture.
const CURSOR_SIDE: u32 = 64;

const EVENT_DISPLAY: u32 = 1;

/// A screen.
pub(super) struct Scanout {
    /// The picture it shows, and the part of it.
    pub(super) shown: Option<(u32, Rect)>,
    /// The size that the viewer would like.
    pub(super) wanted: (u32, u32),
    pub(super) enabled: bool,
    /// What changed since it was drawn; in the picture's part.
    pub(super) damage: Damage,
    pub(super) all: bool,
    pub(super) cursor: Option<Arc<Cursor>>,
    pub(super) pointer: (u32, u32),
    console: Option<Arc<Console>>,
    kicked: bool,
}

/// The adapter.
pub(super) struct Adapter {
    pub(super) resources: BTreeMap<u32, Resource>,
    pub(super) scanouts: Vec<Scanout>,
    events: u32,
    interrupt: Option<Interrupt>,
    most_bytes: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedResource {
    id: u32,
    format: Format,
    size: (u32, u32),
    backing: Vec<(u64, u32)>,
    /// Compressed by zlib, in Base64.
    pixels: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedScanout {
    shown: Option<(u32, [u32; 4])>,
    wanted: (u32, u32),
    enabled: bool,
}

/// Guest-visible state.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Saved {
    events: u32,
    resources: Vec<SavedResource>,
    scanouts: Vec<SavedScanout>,
}

impl Adapter {
    pub(super) fn new(heads: usize, size: (u32, u32), most_bytes: u64) -> Self {
        let scanout = |i: usize| Scanout {
            shown: None,
            wanted: size,
            enabled: i == 0,
            damage: Damage::default(),
            all: true,
            cursor: None,
            pointer: (0, 0),
            console: None,
            kicked: false,
        };
        let scanouts = (0..heads).map(scanout).collect();
        Self { resources: BTreeMap::new(), scanouts, events: 0, interrupt: None, most_bytes }
    }

    pub(super) fn heads(&self) -> usize {
        self.scanouts.len()
    }

    pub(super) fn set_console(&mut self, head: usize, console: Arc<Console>) {
        self.scanouts[head].console = Some(console);
    }

    pub(super) fn set_interrupt(&mut self, interrupt: Option<Interrupt>) {
        self.interrupt = interrupt;
    }

    pub(super) fn interrupt(&self) -> Option<&Interrupt> {
        self.interrupt.as_ref()
    }

    pub(super) fn events(&self) -> u32 {
        self.events
    }

    pub(super) fn clear_events(&mut self, bits: u32) {
        self.events &= !bits;
    }

    /// Consoles that have something new.
    pub(super) fn take_kicks(&mut self) -> Vec<Arc<Console>> {
        let kicked = |s: &mut Scanout| std::mem::take(&mut s.kicked).then(|| s.console.clone()).flatten();
        self.scanouts.iter_mut().filter_map(kicked).collect()
    }

    pub(super) fn reset(&mut self) {
        self.resources.clear();
        self.interrupt = None;
        self.events = 0;
        for s in &mut self.scanouts {
            (s.shown, s.cursor, s.all, s.kicked) = (None, None, true, true);
        }
    }

    /// A viewer would like another size.
    pub(super) fn suggest(&mut self, head: usize, width: u32, height: u32) -> bool {
        let Some(interrupt) = self.interrupt.clone() else { return false };
        let Some(s) = self.scanouts.get_mut(head) else { return false };
        // Even sizes: modes are in steps of eight and two.
        s.wanted = ((width & !7).clamp(64, 16384), (height & !1).clamp(64, 16384));
        s.enabled = true;
        self.events |= EVENT_DISPLAY;
        interrupt.config_changed();
        true
    }

    /// Adds a picture if there is memory for it.
    pub(super) fn add(&mut self, id: u32, format: Format, width: u32, height: u32) -> Result<(), bool> {
        let used: u64 = self.resources.values().map(|r| Resource::bytes(r.width, r.height)).sum();
        if used.saturating_add(Resource::bytes(width, height)) > self.most_bytes
            || self.resources.len() >= MOST_RESOURCES
        {
            return Err(true);
        }
        let resource = Resource::new(format, width, height).ok_or(false)?;
        self.resources.insert(id, resource);
        Ok(())
    }

    pub(super) fn remove(&mut self, id: u32) -> bool {
        for head in 0..self.scanouts.len() {
            if self.scanouts[head].shown.is_some_and(|(shown, _)| shown == id) {
                self.show(head, None);
            }
        }
        self.resources.remove(&id).is_some()
    }

    /// Shows a part of a picture on a screen, or nothing.
    pub(super) fn show(&mut self, head: usize, what: Option<(u32, Rect)>) {
        let s = &mut self.scanouts[head];
        if s.shown != what {
            let (w, h) = what.map_or((0, 0), |(_, r)| (r.w, r.h));
            s.shown = what;
            s.damage = Damage::new(w, h);
            s.all = true;
        }
        s.kicked = true;
    }

    /// A part of a picture has changed.
    pub(super) fn flush(&mut self, id: u32, rect: Rect) {
        for s in &mut self.scanouts {
            let Some((_, part)) = s.shown.filter(|(shown, _)| *shown == id) else { continue };
            let r = rect.intersect(&part);
            if !r.is_empty() {
                s.damage.add(Rect { x: r.x - part.x, y: r.y - part.y, ..r });
                s.kicked = true;
            }
        }
    }

    /// Sets a screen's pointer from a picture (0: none).
    pub(super) fn set_cursor(&mut self, head: usize, id: u32, hot: (u32, u32)) {
        let cursor = match self.resources.get(&id) {
            Some(r) if r.width <= CURSOR_SIDE && r.height <= CURSOR_SIDE => {
                let hot = (hot.0.min(r.width - 1), hot.1.min(r.height - 1));
                Cursor::new(r.width, r.height, hot, r.pixels.clone()).unwrap_or_else(Cursor::hidden)
            }
            _ => Cursor::hidden(),
        };
        let s = &mut self.scanouts[head];
        s.cursor = Some(Arc::new(cursor));
        s.kicked = true;
    }

    pub(super) fn save(&self) -> Saved {
        let resources = self.resources.iter().map(|(id, r)| SavedResource {
            id: *id,
            format: r.format,
            size: (r.width, r.height),
            backing: r.backing.clone(),
            pixels: pack(&r.pixels.iter().flat_map(|p| p.to_le_bytes()).collect::<Vec<_>>()),
        });
        let scanouts = self.scanouts.iter().map(|s| SavedScanout {
            shown: s.shown.map(|(id, r)| (id, [r.x, r.y, r.w, r.h])),
            wanted: s.wanted,
            enabled: s.enabled,
        });
        Saved { events: self.events, resources: resources.collect(), scanouts: scanouts.collect() }
    }

    pub(super) fn load(&mut self, saved: Saved) -> Result<(), &'static str> {
        if saved.scanouts.len() != self.scanouts.len() {
            return Err("another number of screens");
        }
        self.resources.clear();
        for r in saved.resources {
            let (width, height) = r.size;
            self.add(r.id, r.format, width, height).map_err(|_| "more pictures than there is memory for")?;
            let raw = unpack(&r.pixels, Resource::bytes(width, height) as usize)
                .ok_or("a picture of another size")?;
            if let Some(resource) = self.resources.get_mut(&r.id) {
                resource.pixels = raw.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
                resource.backing = r.backing;
            }
        }
        for (head, s) in saved.scanouts.into_iter().enumerate() {
            let shown = s.shown.map(|(id, [x, y, w, h])| (id, Rect::new(x, y, w, h)));
            if shown.is_some_and(|(id, r)| !self.resources.get(&id).is_some_and(|p| p.contains(r))) {
                return Err("a screen that shows what is not there");
            }
            self.show(head, shown);
            (self.scanouts[head].wanted, self.scanouts[head].enabled) = (s.wanted, s.enabled);
        }
        self.events = saved.events;
        Ok(())
    }
}
