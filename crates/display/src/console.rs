//! A console: the picture a display device shows, and who watches it.

use crate::damage::UNIT;
use crate::{Cursor, Damage, Frame, Rect, TextScreen};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, Weak};

/// What draws a console: a display device.
pub trait Source: Send + Sync {
    /// Brings the canvas up to date. Called only while somebody watches, or for a screenshot; takes the device's
    /// lock. A source that finds nothing changed does next to nothing.
    fn refresh(&self, canvas: &mut Canvas);
    /// The screen as text, in text modes.
    fn text(&self) -> Option<TextScreen> {
        None
    }
    /// A viewer would like the guest to use this size. Returns whether the guest has been told.
    fn suggest_size(&self, _width: u32, _height: u32) -> bool {
        false
    }
}

/// Where a source draws.
#[derive(Debug, Default)]
pub struct Canvas {
    frame: Frame,
    damage: Damage,
    cursor: Option<Arc<Cursor>>,
    cursor_changed: bool,
    full: bool,
    resized: bool,
    /// Position to which the guest has moved its own pointer, if it says so.
    pointer: Option<(u32, u32)>,
}

impl Canvas {
    /// A canvas on which nothing has been drawn yet.
    pub fn new() -> Self {
        Self { full: true, ..Self::default() }
    }

    /// Whether the source is to draw everything, whatever it thinks has changed.
    pub fn wants_all(&self) -> bool {
        self.full
    }

    /// Size of the picture; 0 by 0 before the first [`Self::set_size`].
    pub fn size(&self) -> (u32, u32) {
        (self.frame.width(), self.frame.height())
    }

    /// Sets the size. If it changes, the picture becomes black, everything counts as changed, and the source must
    /// draw all of it. A size that no picture can have is refused, and leaves the old one.
    pub fn set_size(&mut self, width: u32, height: u32) -> bool {
        if self.size() == (width, height) {
            return true;
        }
        let Some(frame) = Frame::new(width, height) else { return false };
        self.frame = frame;
        self.damage = Damage::new(width, height);
        self.damage.add_all();
        self.full = true;
        self.resized = true;
        true
    }

    /// Draws pixels at `x` of row `y`; only what differs counts as changed.
    pub fn draw(&mut self, x: u32, y: u32, pixels: &[u32]) {
        if x >= self.frame.width() || y >= self.frame.height() {
            return;
        }
        let row = self.frame.row_mut(y);
        let n = pixels.len().min(row.len() - x as usize);
        let (mut at, end) = (x as usize, x as usize + n);
        while at < end {
            let stop = ((at / UNIT as usize + 1) * UNIT as usize).min(end);
            let (new, old) = (&pixels[at - x as usize..stop - x as usize], &mut row[at..stop]);
            if *old != *new {
                old.copy_from_slice(new);
                self.damage.mark(at as u32, y);
            }
            at = stop;
        }
    }

    /// Fills everything with one colour.
    pub fn clear(&mut self, colour: u32) {
        let row = vec![colour; self.frame.width() as usize];
        for y in 0..self.frame.height() {
            self.draw(0, y, &row);
        }
    }

    /// Sets the shape of the pointer that viewers draw; `None` where the guest draws its own.
    pub fn set_cursor(&mut self, cursor: Option<Arc<Cursor>>) {
        if self.cursor != cursor {
            self.cursor = cursor;
            self.cursor_changed = true;
        }
    }

    /// Notes where the guest has put the pointer.
    pub fn set_pointer(&mut self, at: (u32, u32)) {
        self.pointer = Some(at);
    }

    /// The picture.
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// The pointer's shape.
    pub fn cursor(&self) -> Option<&Arc<Cursor>> {
        self.cursor.as_ref()
    }

    /// Forgets and returns the damage: for sources' own tests.
    pub fn take_damage(&mut self) -> Vec<Rect> {
        self.full = false;
        let all = self.frame.bounds();
        self.damage.take(all)
    }
}

/// What a viewer has not seen yet.
#[derive(Debug, Default)]
pub struct News {
    /// Changed pixels.
    pub damage: Damage,
    /// The size changed.
    pub resized: bool,
    /// The pointer's shape changed.
    pub cursor: bool,
}

impl News {
    /// Whether there is nothing new.
    pub fn is_empty(&self) -> bool {
        self.damage.is_empty() && !self.resized && !self.cursor
    }
}

struct Watcher {
    news: Mutex<News>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// Wakes the thread that refreshes the consoles.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    condvar: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        let mut rung = self.rung.lock().unwrap_or_else(|e| e.into_inner());
        if !*rung {
            *rung = true;
            self.condvar.notify_all();
        }
    }

    /// Waits until it is rung or the time has passed (`None`: for ever).
    pub(crate) fn wait(&self, most: Option<std::time::Duration>) {
        let rung = self.rung.lock().unwrap_or_else(|e| e.into_inner());
        let mut rung = match most {
            Some(most) => {
                self.condvar.wait_timeout_while(rung, most, |r| !*r).unwrap_or_else(|e| e.into_inner()).0
            }
            None => self.condvar.wait_while(rung, |r| !*r).unwrap_or_else(|e| e.into_inner()),
        };
        *rung = false;
    }
}

/// A console (a head): what one screen shows.
pub struct Console {
    name: String,
    source: Arc<dyn Source>,
    canvas: RwLock<Canvas>,
    watchers: Mutex<Vec<Weak<Watcher>>>,
    watched: AtomicBool,
    refreshed: AtomicU64,
    bell: Arc<Bell>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Console {
    pub(crate) fn new(name: &str, source: Arc<dyn Source>, bell: Arc<Bell>) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            source,
            canvas: RwLock::new(Canvas::new()),
            watchers: Mutex::default(),
            watched: AtomicBool::new(false),
            refreshed: AtomicU64::new(0),
            bell,
        })
    }

    /// The device's name, `VGA`; further heads have a number.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether anybody watches: a device may spare itself work for nobody.
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed)
    }

    /// Asks for a refresh now rather than at the next tick. For devices that know when something changed; takes no
    /// lock that is ever held for long.
    pub fn kick(&self) {
        if self.is_watched() {
            self.bell.ring();
        }
    }

    /// Number of refreshes that found something changed.
    pub fn generation(&self) -> u64 {
        self.refreshed.load(Ordering::Relaxed)
    }

    fn lock_watchers(&self) -> MutexGuard<'_, Vec<Weak<Watcher>>> {
        self.watchers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Brings the picture up to date and tells the viewers.
    pub fn refresh(&self) {
        let mut canvas = self.canvas.write().unwrap_or_else(|e| e.into_inner());
        let canvas = &mut *canvas;
        self.source.refresh(canvas);
        canvas.full = false;
        if canvas.damage.is_empty() && !canvas.cursor_changed && !canvas.resized {
            return;
        }
        self.refreshed.fetch_add(1, Ordering::Relaxed);
        let mut wake = Vec::new();
        {
            let mut watchers = self.lock_watchers();
            watchers.retain(|w| w.strong_count() > 0);
            for watcher in watchers.iter().filter_map(Weak::upgrade) {
                {
                    let mut news = watcher.news.lock().unwrap_or_else(|e| e.into_inner());
                    news.damage.merge(&canvas.damage);
                    news.resized |= canvas.resized;
                    news.cursor |= canvas.cursor_changed;
                }
                wake.push(watcher);
            }
        }
        canvas.damage.clear();
        (canvas.resized, canvas.cursor_changed) = (false, false);
        for watcher in wake {
            (watcher.wake)();
        }
    }

    /// The picture as of the last refresh. Do not keep it long: the next refresh waits.
    pub fn canvas(&self) -> RwLockReadGuard<'_, Canvas> {
        self.canvas.read().unwrap_or_else(|e| e.into_inner())
    }

    /// The picture as it is now; `None` if the device shows none.
    pub fn capture(&self) -> Option<Frame> {
        self.refresh();
        let canvas = self.canvas();
        (canvas.size() != (0, 0)).then(|| canvas.frame.clone())
    }

    /// The screen as text, in text modes.
    pub fn text(&self) -> Option<TextScreen> {
        self.source.text()
    }

    /// Asks the guest to use another size. Returns whether it has been told.
    pub fn suggest_size(&self, width: u32, height: u32) -> bool {
        self.source.suggest_size(width, height)
    }

    /// Begins to watch. `wake` is called, from the refreshing thread, whenever there is news; it must not block.
    pub fn watch(self: &Arc<Self>, wake: impl Fn() + Send + Sync + 'static) -> Viewer {
        let (w, h) = self.canvas().size();
        let mut damage = Damage::new(w, h);
        damage.add_all();
        let news = News { damage, resized: false, cursor: true };
        let watcher = Arc::new(Watcher { news: Mutex::new(news), wake: Box::new(wake) });
        self.lock_watchers().push(Arc::downgrade(&watcher));
        self.watched.store(true, Ordering::SeqCst);
        self.bell.ring();
        Viewer { console: self.clone(), watcher }
    }

    fn unwatch(&self) {
        let mut watchers = self.lock_watchers();
        watchers.retain(|w| w.strong_count() > 0);
        self.watched.store(!watchers.is_empty(), Ordering::SeqCst);
    }
}

/// Somebody who watches a console; stops when dropped.
pub struct Viewer {
    console: Arc<Console>,
    watcher: Arc<Watcher>,
}

impl Viewer {
    /// What is watched.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// Looks at, and may take out of, what is new.
    pub fn news<R>(&self, f: impl FnOnce(&mut News) -> R) -> R {
        f(&mut self.watcher.news.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        // The one strong reference is replaced first, so that it no longer counts.
        let none = Arc::new(Watcher { news: Mutex::default(), wake: Box::new(|| {}) });
        drop(std::mem::replace(&mut self.watcher, none));
        self.console.unwatch();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    struct Pattern(AtomicU32);

    impl Source for Pattern {
        fn refresh(&self, canvas: &mut Canvas) {
            let n = self.0.load(Ordering::SeqCst);
            canvas.set_size(64, 32 + n / 100);
            canvas.draw(20, 5, &[n; 4]);
        }
    }

    #[test]
    fn only_differences_are_news() {
        let source = Arc::new(Pattern(AtomicU32::new(1)));
        let console = Console::new("test", source.clone(), Arc::default());
        let woken = Arc::new(AtomicU32::new(0));
        let w = woken.clone();
        console.refresh();
        let viewer = console.watch(move || {
            w.fetch_add(1, Ordering::SeqCst);
        });
        assert!(console.is_watched());
        let all = Rect::new(0, 0, 64, 33);
        assert_eq!(viewer.news(|n| n.damage.take(all)), [Rect::new(0, 0, 64, 32)]);
        console.refresh();
        assert_eq!(woken.load(Ordering::SeqCst), 0, "nothing changed");
        source.0.store(2, Ordering::SeqCst);
        console.refresh();
        assert_eq!(viewer.news(|n| n.damage.take(all)), [Rect::new(16, 5, 16, 1)]);
        assert_eq!((woken.load(Ordering::SeqCst), console.generation()), (1, 2));
        source.0.store(100, Ordering::SeqCst);
        console.refresh();
        assert!(viewer.news(|n| n.resized));
        assert_eq!(viewer.news(|n| n.damage.take(all)), [all]);
        drop(viewer);
        assert!(!console.is_watched());
        assert_eq!(console.capture().unwrap().row(5)[20], 100);
    }
}
