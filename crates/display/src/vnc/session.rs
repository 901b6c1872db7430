//! A viewer that has been let in.

use super::clipboard;
use super::encode::{Encoder, Encoding};
use super::keyboard::Keyboard;
use super::message::{ClientMessage, read_message};
use super::pixel::PixelFormat;
use super::scroll::Scroll;
use super::server::Options;
use super::transport::{Link, Rx};
use crate::input::{Button, Event, Leds};
use crate::{Clipboard, Console, Displays, Rect, Viewer, Watch};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};

/// Most bytes of answers that wait for a viewer to read.
const MOST_QUEUED: usize = 4 << 20;

/// What a viewer understands beyond the basics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Abilities {
    pub(super) copy: bool,
    pub(super) last_rect: bool,
    pub(super) desktop_size: bool,
    pub(super) extended_size: bool,
    pub(super) desktop_name: bool,
    pub(super) cursor: bool,
    pub(super) alpha_cursor: bool,
    pub(super) extended_keys: bool,
    pub(super) pointer_kind: bool,
    pub(super) leds: bool,
    pub(super) fence: bool,
    pub(super) continuous: bool,
    pub(super) clipboard: bool,
}

/// What the viewer wants and what waits for it.
#[derive(Default)]
pub(super) struct Wants {
    pub(super) closed: bool,
    /// Messages that are ready to be sent.
    pub(super) queue: Vec<u8>,
    pub(super) format: PixelFormat,
    pub(super) encoding: Option<Encoding>,
    pub(super) quality: Option<u8>,
    pub(super) level: Option<u8>,
    pub(super) can: Abilities,
    /// Pseudo-rectangles that tell of the server's abilities are due.
    pub(super) announce: bool,
    pub(super) requested: Option<Rect>,
    /// Area that is to be sent whether or not it changed.
    pub(super) forced: Option<Rect>,
    pub(super) continuous: Option<Rect>,
    /// Reason and result of a change of size that the viewer asked for.
    pub(super) size_answer: Option<u16>,
    pub(super) leds: Option<Leds>,
    pub(super) absolute: Option<bool>,
    clip: u64,
}

pub(super) struct Session {
    id: u64,
    peer: String,
    pub(super) link: Arc<Link>,
    pub(super) console: Arc<Console>,
    pub(super) displays: Weak<Displays>,
    clipboard: Arc<Clipboard>,
    pub(super) options: Options,
    pub(super) wants: Mutex<Wants>,
    wake: Condvar,
}

/// What the writing thread has to itself.
pub(super) struct Writer {
    pub(super) viewer: Viewer,
    pub(super) encoder: Encoder,
    pub(super) scroll: Scroll,
    /// Size of the picture as the viewer knows it.
    pub(super) size: (u32, u32),
    _watches: [Watch; 2],
}

impl Session {
    pub(super) fn new(
        id: u64,
        link: Link,
        displays: &Arc<Displays>,
        console: Arc<Console>,
        options: Options,
        peer: &str,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            peer: peer.into(),
            link: Arc::new(link),
            console,
            displays: Arc::downgrade(displays),
            clipboard: displays.clipboard().clone(),
            options,
            wants: Mutex::default(),
            wake: Condvar::new(),
        })
    }

    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Wants> {
        self.wants.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Ends the session, from any thread.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_all();
        self.link.socket().close();
    }

    fn poke(&self) {
        // Under the lock, so that a writer that has just looked does not miss it.
        let _wants = self.lock();
        self.wake.notify_all();
    }

    /// Serves the viewer until it leaves.
    pub(super) fn run(self: &Arc<Self>) -> io::Result<()> {
        self.console.refresh();
        let (width, height) = self.console.canvas().size();
        let size = (width.max(1), height.max(1));
        let mut init = Vec::new();
        init.extend((size.0 as u16).to_be_bytes()); // at most 16384
        init.extend((size.1 as u16).to_be_bytes());
        init.extend(PixelFormat::default().to_bytes());
        init.extend((self.options.name.len() as u32).to_be_bytes());
        init.extend_from_slice(self.options.name.as_bytes());
        self.link.send(&init)?;

        let waker = || {
            let me = Arc::downgrade(self);
            move || {
                if let Some(session) = me.upgrade() {
                    session.poke();
                }
            }
        };
        let Some(displays) = self.displays.upgrade() else { return Ok(()) };
        let watches = [displays.input().watch(waker()), self.clipboard.watch(waker())];
        drop(displays);
        self.lock().clip = self.clipboard.get().serial;
        let writer = Writer {
            viewer: self.console.watch(waker()),
            encoder: Encoder::default(),
            scroll: Scroll::default(),
            size,
            _watches: watches,
        };
        let me = self.clone();
        let thread = std::thread::Builder::new()
            .name("vnc-update".into())
            .stack_size(512 << 10)
            .spawn(move || me.write(writer))?;
        let result = self.read();
        self.close();
        // It ends because the connection is closed; a panic in it has been reported.
        let _ = thread.join();
        result
    }

    // --- writing ----------------------------------------------------------------------------------------------------

    fn write(&self, mut writer: Writer) {
        let result = self.write_until_closed(&mut writer);
        if let Err(e) = result {
            tracing::debug!("VNC viewer {}: {e}", self.peer);
        }
        self.close();
    }

    fn write_until_closed(&self, writer: &mut Writer) -> io::Result<()> {
        loop {
            let queue = {
                let mut wants = self.lock();
                loop {
                    if wants.closed {
                        return Ok(());
                    }
                    self.note_clipboard(&mut wants);
                    if !wants.queue.is_empty() || self.update_is_due(&wants, writer) {
                        break;
                    }
                    wants = self.wake.wait(wants).unwrap_or_else(|e| e.into_inner());
                }
                std::mem::take(&mut wants.queue)
            };
            if !queue.is_empty() {
                self.link.send(&queue)?;
            }
            let update = self.update(writer);
            if !update.is_empty() {
                self.link.send(&update)?;
            }
        }
    }

    /// Queues what others have copied.
    fn note_clipboard(&self, wants: &mut Wants) {
        let clip = self.clipboard.get();
        if clip.serial == wants.clip {
            return;
        }
        wants.clip = clip.serial;
        if clip.owner == self.id {
            return;
        }
        let message = if wants.can.clipboard {
            clipboard::action(clipboard::NOTIFY | clipboard::TEXT)
        } else {
            clipboard::plain(&clip.text)
        };
        wants.queue.extend(message);
    }

    fn update_is_due(&self, wants: &Wants, writer: &Writer) -> bool {
        let Some(area) = wants.requested.or(wants.continuous) else { return false };
        let area = area.clip(writer.size.0, writer.size.1);
        let Some(displays) = self.displays.upgrade() else { return false };
        let input = displays.input();
        wants.announce
            || wants.forced.is_some()
            || wants.size_answer.is_some()
            || wants.can.leds && wants.leds != Some(input.leds())
            || wants.can.pointer_kind && wants.absolute != Some(input.is_absolute())
            || writer
                .viewer
                .news(|n| n.damage.touches(area) || n.resized || n.cursor && wants.can.cursor_of_any_kind())
    }

    // --- reading ----------------------------------------------------------------------------------------------------

    fn read(&self) -> io::Result<()> {
        let mut rx = Rx::new(self.link.clone());
        let mut keyboard = Keyboard::new(self.options.keymap);
        let mut buttons = 0u8;
        let result = loop {
            let message = match read_message(&mut rx) {
                Ok(message) => message,
                Err(e) => break Err(e),
            };
            if let Err(e) = self.handle(message, &mut keyboard, &mut buttons) {
                break Err(e);
            }
            if self.lock().closed {
                break Ok(());
            }
        };
        if let Some(displays) = self.displays.upgrade() {
            keyboard.release(displays.input());
            self.buttons(&displays, buttons, 0, None);
        }
        result
    }

    fn handle(&self, message: ClientMessage, keyboard: &mut Keyboard, buttons: &mut u8) -> io::Result<()> {
        let Some(displays) = self.displays.upgrade() else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        match message {
            ClientMessage::SetPixelFormat(format) => {
                let mut wants = self.lock();
                wants.format = format;
                if format.mapped {
                    wants.queue.extend([1, 0, 0, 0, 1, 0]);
                    let colours: Vec<u8> =
                        PixelFormat::colour_map().flatten().flat_map(u16::to_be_bytes).collect();
                    wants.queue.extend(colours);
                }
            }
            ClientMessage::SetEncodings(list) => self.set_encodings(&list),
            ClientMessage::UpdateRequest { incremental, area } => {
                if !incremental {
                    self.console_damage(area);
                }
                let mut wants = self.lock();
                wants.requested = Some(match wants.requested {
                    Some(old) => hull(old, area),
                    None => area,
                });
            }
            ClientMessage::Key { down, keysym, code } => keyboard.event(down, keysym, code, displays.input()),
            ClientMessage::Pointer { buttons: now, at } => {
                let before = std::mem::replace(buttons, now);
                self.buttons(&displays, before, now, Some(at));
            }
            ClientMessage::CutText(text) => displays.clipboard().set(self.id, &clipboard::from_plain(&text)),
            ClientMessage::Clipboard(flags, payload) => self.clipboard_message(flags, &payload),
            ClientMessage::ContinuousUpdates(on, area) => {
                let mut wants = self.lock();
                wants.continuous = on.then_some(area);
                if !on {
                    wants.queue.push(150);
                }
            }
            ClientMessage::Fence(flags, payload) => self.fence(flags, &payload),
            ClientMessage::SetDesktopSize(w, h) => {
                let told = w > 0 && h > 0 && self.console.suggest_size(w.into(), h.into());
                // 1: not allowed, 3: impossible.
                let answer = if told {
                    0
                } else if w == 0 || h == 0 {
                    3
                } else {
                    1
                };
                self.lock().size_answer = Some(answer);
            }
            ClientMessage::Ignored => {}
        }
        let mut wants = self.lock();
        if wants.queue.len() > MOST_QUEUED {
            wants.closed = true;
            return Err(io::Error::other("does not read the answers to what it asks"));
        }
        self.wake.notify_all();
        Ok(())
    }

    fn console_damage(&self, area: Rect) {
        let mut wants = self.lock();
        let all = wants.forced.map_or(area, |old| hull(old, area));
        wants.forced = Some(all);
    }

    fn set_encodings(&self, list: &[i32]) {
        let mut wants = self.lock();
        let mut can = Abilities::default();
        let (mut encoding, mut quality, mut level) = (None, None, None);
        for number in list {
            match *number {
                1 => can.copy = true,
                -32..=-23 => quality = Some((*number + 32) as u8), // 0 to 9
                -256..=-247 => level = Some((*number + 256) as u8), // 0 to 9
                -223 => can.desktop_size = true,
                -224 => can.last_rect = true,
                -239 => can.cursor = true,
                -257 => can.pointer_kind = true,
                -258 => can.extended_keys = true,
                -261 => can.leds = true,
                -307 => can.desktop_name = true,
                -308 => can.extended_size = true,
                -312 => can.fence = true,
                -313 => can.continuous = true,
                -314 => can.alpha_cursor = true,
                n if n as u32 == 0xc0a1_e5ce => can.clipboard = true,
                n => encoding = encoding.or_else(|| Encoding::from_number(n)),
            }
        }
        // Each ability of the server is announced once the viewer has shown that it understands.
        let had = std::mem::replace(&mut wants.can, can);
        (wants.encoding, wants.level) = (encoding, level);
        wants.quality = quality.filter(|_| self.options.lossy);
        if can.fence && !had.fence {
            let mut fence = vec![248, 0, 0, 0];
            fence.extend(0x8000_0000u32.to_be_bytes());
            fence.push(0);
            wants.queue.extend(fence);
        }
        if can.continuous && !had.continuous {
            wants.queue.push(150);
        }
        if can.clipboard && !had.clipboard {
            wants.queue.extend(clipboard::capabilities());
        }
        wants.announce |= can != had && (can.extended_keys || can.extended_size || can.desktop_name);
        (wants.leds, wants.absolute) = (None, None);
    }

    fn fence(&self, flags: u32, payload: &[u8]) {
        const REQUEST: u32 = 1 << 31;
        // All three conditions are met by answering after everything that was asked before.
        const KNOWN: u32 = 7;
        if flags & REQUEST == 0 {
            return; // the answer to ours
        }
        let mut out = vec![248, 0, 0, 0];
        out.extend((flags & KNOWN).to_be_bytes());
        out.push(payload.len() as u8); // at most 64
        out.extend_from_slice(payload);
        self.lock().queue.extend(out);
    }

    fn clipboard_message(&self, flags: u32, payload: &[u8]) {
        use clipboard::{NOTIFY, PEEK, PROVIDE, REQUEST, TEXT};
        let answer = if flags & PROVIDE != 0 {
            if let Some(text) = clipboard::provided(flags, payload) {
                self.clipboard.set(self.id, &text);
            }
            None
        } else if flags & REQUEST != 0 {
            (flags & TEXT != 0).then(|| clipboard::provide(&self.clipboard.get().text))
        } else if flags & PEEK != 0 {
            let has = !self.clipboard.get().text.is_empty();
            Some(clipboard::action(NOTIFY | if has { TEXT } else { 0 }))
        } else if flags & NOTIFY != 0 {
            (flags & TEXT != 0).then(|| clipboard::action(REQUEST | TEXT))
        } else {
            None
        };
        if let Some(answer) = answer {
            self.lock().queue.extend(answer);
        }
    }

    /// Passes the pointer on: where it is, and what changed of its buttons.
    fn buttons(&self, displays: &Displays, before: u8, now: u8, at: Option<(u16, u16)>) {
        const BUTTONS: [(u8, Button); 4] =
            [(0, Button::Left), (1, Button::Middle), (2, Button::Right), (7, Button::Side)];
        const WHEEL: [(u8, i32, i32); 4] = [(3, 0, 1), (4, 0, -1), (5, -1, 0), (6, 1, 0)];
        let input = displays.input();
        let mut events = Vec::new();
        if let Some((x, y)) = at {
            let told_relative = { self.lock().absolute == Some(false) };
            if told_relative {
                let d = |v: u16| i32::from(v) - 0x7fff;
                if (d(x), d(y)) != (0, 0) {
                    events.push(Event::Move(d(x), d(y)));
                }
            } else {
                let size = self.console.canvas().size();
                events.push(Event::Position { at: (x.into(), y.into()), size });
            }
        }
        for (bit, button) in BUTTONS {
            if (before ^ now) >> bit & 1 != 0 {
                events.push(Event::Button(button, now >> bit & 1 != 0));
            }
        }
        for (bit, x, y) in WHEEL {
            if !before & now & 1 << bit != 0 {
                events.push(Event::Wheel(x, y));
            }
        }
        if !events.is_empty() {
            input.send(&events);
        }
    }
}

impl Abilities {
    pub(super) fn cursor_of_any_kind(&self) -> bool {
        self.cursor || self.alpha_cursor
    }
}

fn hull(a: Rect, b: Rect) -> Rect {
    let (x, y) = (a.x.min(b.x), a.y.min(b.y));
    let (right, bottom) = ((a.x + a.w).max(b.x + b.w), (a.y + a.h).max(b.y + b.h));
    Rect::new(x, y, right - x, bottom - y)
}
