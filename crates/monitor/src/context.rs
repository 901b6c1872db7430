//! What monitor commands work on.

use crate::output::Output;
use bus::Chardev;
use machine::control::Subscription;
use machine::{Machine, Remote};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

/// What the front door knows beside the machine.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Name given to the guest, if any.
    pub name: Option<String>,
    /// UUID as given, or zeroes.
    pub uuid: String,
    /// Whether the accelerator is KVM.
    pub kvm: bool,
    /// Whether KVM could be used on this host.
    pub kvm_present: bool,
    /// Result of `query-command-line-options`.
    pub command_line: serde_json::Value,
    /// Do not end when the guest does.
    pub no_shutdown: bool,
}

/// A character device as monitors list it.
pub struct CharEntry {
    /// The device.
    pub chardev: Arc<dyn Chardev>,
    /// Something of the machine is connected to it.
    pub used: bool,
}

/// Descriptors handed over by clients.
#[derive(Default)]
pub struct Fds {
    /// By name, from `getfd`.
    pub named: BTreeMap<String, OwnedFd>,
    /// Sets, from `add-fd`: (descriptor number shown, opaque text, descriptor).
    pub sets: BTreeMap<i64, Vec<(i32, Option<String>, OwnedFd)>>,
}

/// Shared by the monitors of a machine.
pub struct Context {
    /// The machine.
    pub remote: Remote,
    /// What the front door knows.
    pub settings: Settings,
    /// Character devices by id.
    pub chardevs: Mutex<BTreeMap<String, CharEntry>>,
    /// Descriptors handed over.
    pub fds: Mutex<Fds>,
    /// Block nodes as they were described.
    pub block_graph: Mutex<machine::graph::Graph>,
    /// The VNC server, if there is one.
    pub vnc: Mutex<Option<display::vnc::Server>>,
    sessions: Mutex<Vec<Weak<Output>>>,
    subscription: OnceLock<Subscription>,
}

impl Context {
    /// A context for the machine of `remote`. Events go to its monitors from now on.
    pub fn new(remote: Remote, settings: Settings) -> Arc<Self> {
        let context = Arc::new(Self {
            remote: remote.clone(),
            settings,
            chardevs: Mutex::default(),
            fds: Mutex::default(),
            block_graph: Mutex::default(),
            vnc: Mutex::default(),
            sessions: Mutex::default(),
            subscription: OnceLock::new(),
        });
        let weak = Arc::downgrade(&context);
        let subscription = remote.subscribe(move |notice| {
            if let (Some(context), Some((name, data))) = (weak.upgrade(), notice.event()) {
                context.emit(name, &data);
            }
        });
        // It was made just above, so it is empty.
        let _ = context.subscription.set(subscription);
        context
    }

    pub(crate) fn add_session(&self, output: &Arc<Output>) {
        let mut all = lock(&self.sessions);
        all.retain(|s| s.strong_count() > 0);
        all.push(Arc::downgrade(output));
    }

    pub(crate) fn remove_session(&self, output: &Arc<Output>) {
        lock(&self.sessions).retain(|s| s.upgrade().is_some_and(|s| !Arc::ptr_eq(&s, output)));
    }

    /// Sends an event to every QMP monitor that has finished its negotiation.
    pub fn emit(&self, name: &str, data: &serde_json::Value) {
        let text = crate::qmp::event_text(name, data);
        for session in lock(&self.sessions).iter().filter_map(Weak::upgrade) {
            session.event(text.clone().into_bytes());
        }
    }

    /// Waits until the monitors' clients have been sent everything, for a short time at most. Before the end.
    pub fn flush(&self) {
        let all: Vec<_> = lock(&self.sessions).iter().filter_map(Weak::upgrade).collect();
        all.iter().for_each(|s| s.flush());
    }

    /// Does something on the machine's control thread.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn machine<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Machine) -> R + Send + 'static,
    ) -> Result<R, crate::qmp::Error> {
        self.remote.call(f).map_err(|e| crate::qmp::Error::generic(e.to_string()))
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
