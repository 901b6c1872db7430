//! Those who want to be told of changes.

use std::sync::{Arc, Mutex, Weak};

type Call = dyn Fn() + Send + Sync;

/// A list of functions to call; each stays as long as its [`Watch`].
#[derive(Default)]
pub(crate) struct Watchers(Mutex<Vec<Weak<Call>>>);

/// Keeps a watcher on its list.
pub struct Watch(#[allow(dead_code)] Arc<Call>); // held, never called through

impl Watchers {
    pub(crate) fn add(&self, wake: impl Fn() + Send + Sync + 'static) -> Watch {
        let call: Arc<Call> = Arc::new(wake);
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(Arc::downgrade(&call));
        Watch(call)
    }

    pub(crate) fn call(&self) {
        let all: Vec<_> = {
            let mut list = self.0.lock().unwrap_or_else(|e| e.into_inner());
            list.retain(|w| w.strong_count() > 0);
            list.iter().filter_map(Weak::upgrade).collect()
        };
        all.iter().for_each(|w| w());
    }
}
