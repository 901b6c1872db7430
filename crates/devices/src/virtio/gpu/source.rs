//! A screen of the adapter as what draws a console.

use super::adapter::Adapter;
use ::display::{Canvas, Source};
use std::sync::{Arc, Mutex};

/// A head.
pub(super) struct Head {
    adapter: Arc<Mutex<Adapter>>,
    index: usize,
}

impl Head {
    pub(super) fn new(adapter: Arc<Mutex<Adapter>>, index: usize) -> Self {
        Self { adapter, index }
    }
}

impl Source for Head {
    fn refresh(&self, canvas: &mut Canvas) {
        let mut adapter = self.adapter.lock().unwrap_or_else(|e| e.into_inner());
        let Adapter { resources, scanouts, .. } = &mut *adapter;
        let s = &mut scanouts[self.index];
        canvas.set_cursor(s.cursor.clone());
        canvas.set_pointer(s.pointer);
        let shown = s.shown.and_then(|(id, part)| Some((resources.get(&id)?, part)));
        let Some((resource, part)) = shown else {
            if canvas.size() == (0, 0) {
                canvas.set_size(s.wanted.0, s.wanted.1);
            }
            if std::mem::take(&mut s.all) || canvas.wants_all() {
                canvas.clear(0);
            }
            return;
        };
        if !canvas.set_size(part.w, part.h) {
            return;
        }
        let whole = ::display::Rect::new(0, 0, part.w, part.h);
        if std::mem::take(&mut s.all) || canvas.wants_all() {
            s.damage.add(whole);
        }
        let mut row = Vec::new();
        for r in s.damage.take(whole) {
            for y in r.y..r.y + r.h {
                let start = (part.y + y) as usize * resource.width as usize + (part.x + r.x) as usize;
                row.clear();
                row.extend(resource.pixels[start..start + r.w as usize].iter().map(|p| p & 0xff_ffff));
                canvas.draw(r.x, y, &row);
            }
        }
    }

    fn suggest_size(&self, width: u32, height: u32) -> bool {
        self.adapter.lock().unwrap_or_else(|e| e.into_inner()).suggest(self.index, width, height)
    }
}
