//! Text that viewers and the guest's agent copy and paste.

use crate::watchers::{Watch, Watchers};
use std::sync::{Arc, Mutex};

/// Longest text, in bytes.
pub const MOST_TEXT: usize = 1 << 20;

/// What was copied last.
#[derive(Clone, Debug, Default)]
pub struct Clip {
    /// Changes with every copy.
    pub serial: u64,
    /// Who copied it; a number of its own choosing.
    pub owner: u64,
    /// The text, lines ended by a line feed.
    pub text: Arc<str>,
}

/// A clipboard shared by everyone at the machine's screens.
#[derive(Default)]
pub struct Clipboard {
    clip: Mutex<Clip>,
    watchers: Watchers,
}

impl Clipboard {
    /// Copies a text; longer ones than [`MOST_TEXT`] are refused.
    pub fn set(&self, owner: u64, text: &str) {
        if text.len() > MOST_TEXT {
            return;
        }
        {
            let mut clip = self.clip.lock().unwrap_or_else(|e| e.into_inner());
            if *clip.text == *text {
                return;
            }
            *clip = Clip { serial: clip.serial + 1, owner, text: text.into() };
        }
        self.watchers.call();
    }

    /// What was copied last.
    pub fn get(&self) -> Clip {
        self.clip.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Calls `wake`, which must not block, when something is copied.
    pub fn watch(&self, wake: impl Fn() + Send + Sync + 'static) -> Watch {
        self.watchers.add(wake)
    }
}
