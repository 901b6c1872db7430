//! The VGA as what draws a console.

use super::Vga;
use super::draw::Mode;
use display::{Canvas, Source, TextScreen};
use memory::PAGE_SIZE;
use std::sync::{Arc, Mutex, MutexGuard};

/// What has been drawn.
#[derive(Default)]
struct Shown {
    generation: u64,
    mode: Option<Mode>,
    cells: Vec<([u8; 2], bool)>,
    /// Pages of video memory written since they were drawn.
    dirty: Vec<bool>,
}

/// Draws a VGA.
pub(crate) struct VgaSource {
    vga: Arc<Mutex<Vga>>,
    shown: Mutex<Shown>,
}

impl VgaSource {
    pub(crate) fn new(vga: Arc<Mutex<Vga>>) -> Self {
        Self { vga, shown: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vga> {
        self.vga.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Source for VgaSource {
    fn refresh(&self, canvas: &mut Canvas) {
        let shown = &mut *self.shown.lock().unwrap_or_else(|e| e.into_inner());
        // Not under the VGA's lock: vCPUs are asked to note their writes afresh, and one may be waiting for it.
        let window = self.lock().window.clone();
        shown.dirty.resize((window.len() / PAGE_SIZE) as usize, true);
        let mut written = false;
        window.take_written(|page| {
            written = true;
            if let Some(flag) = shown.dirty.get_mut(page as usize) {
                *flag = true;
            }
        });
        let vga = self.lock();
        let mode = vga.mode();
        let changed =
            shown.generation != vga.generation || shown.mode.as_ref() != Some(&mode) || canvas.wants_all();
        let dirty = std::mem::take(&mut shown.dirty);
        let is_dirty = |start: u64, length: u64| {
            let first = (start / PAGE_SIZE) as usize;
            let last = (start.saturating_add(length.max(1) - 1) / PAGE_SIZE) as usize;
            dirty.get(first.min(dirty.len())..(last + 1).min(dirty.len())).is_some_and(|d| d.contains(&true))
        };
        match &mode {
            Mode::Blank => {
                if changed {
                    // A screen that is off keeps its size.
                    if canvas.size() == (0, 0) {
                        canvas.set_size(720, 400);
                    }
                    canvas.clear(0);
                }
            }
            Mode::Text(text) => {
                let [screen, a, b] = Vga::text_ranges(text);
                let fonts = is_dirty(a.0, a.1) || is_dirty(b.0, b.1);
                let cursor = vga.text_cells(text).1;
                let moved = shown.cells.iter().position(|(_, c)| *c).map(|c| c as u64) != cursor;
                if changed || fonts || moved || is_dirty(screen.0, screen.1) {
                    // Scrolling by the start address leaves most cells as they are.
                    let same = matches!(&shown.mode, Some(Mode::Text(old)) if old.is_like(text));
                    let all = shown.generation != vga.generation || !same || fonts;
                    vga.draw_text(text, canvas, &mut shown.cells, all);
                }
            }
            Mode::Graphics(graphics) => {
                if changed || written {
                    vga.draw_graphics(graphics, canvas, |start, length| changed || is_dirty(start, length));
                }
            }
        }
        shown.generation = vga.generation;
        shown.mode = Some(mode);
        shown.dirty = dirty;
        shown.dirty.fill(false);
    }

    fn text(&self) -> Option<TextScreen> {
        let vga = self.lock();
        match vga.mode() {
            Mode::Text(text) => Some(vga.text_screen(&text)),
            _ => None,
        }
    }
}
