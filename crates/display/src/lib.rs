//! Screens, keyboards and pointers between guests and people; no virtual machine in sight.
//!
//! A display device publishes a [`Console`] (a [`Source`] that draws what changed into a frame the host keeps), input
//! devices register [`input::Sink`]s, and front ends (VNC, the terminal, a window, screenshots) watch consoles through
//! a [`Viewer`] and send [`input::Event`]s. [`Displays`] holds a machine's consoles and its input, and has the
//! thread that refreshes consoles that somebody watches.
//!
//! Lock order: a console's frame, then the source's device. Devices never take a console's lock: they only
//! [`Console::kick`].

mod clipboard;
mod console;
mod cursor;
mod damage;
mod displays;
mod frame;
mod frontend;
pub mod input;
mod rect;
mod screenshot;
pub mod terminal;
mod text;
pub mod vnc;
mod watchers;

pub use clipboard::{Clip, Clipboard, MOST_TEXT};
pub use console::{Canvas, Console, News, Source, Viewer};
pub use cursor::Cursor;
pub use damage::Damage;
pub use displays::Displays;
pub use frame::{Frame, MAX_SIDE};
pub use frontend::{FrontEnd, FrontEndError, VncSpec};
pub use rect::Rect;
pub use screenshot::{PictureFormat, encode_picture, write_picture};
pub use text::{Cell, TextScreen, from_cp437};
pub use watchers::Watch;
