//! What front doors ask of a running machine, and what it tells them.

use crate::Machine;
use bus::SystemRequest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};

/// What a machine is doing; the names are QMP's `RunState`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Stopped by a debugger.
    Debug,
    /// Waits for an incoming migration.
    Inmigrate,
    /// The accelerator could not go on.
    InternalError,
    /// Stopped because of an I/O error.
    IoError,
    /// Stopped by the user.
    Paused,
    /// Its state has gone to another host.
    Postmigrate,
    /// Built, and not started yet.
    #[default]
    Prelaunch,
    /// Stopped for the last part of a migration.
    FinishMigrate,
    /// Stopped while a snapshot is loaded.
    RestoreVm,
    /// Runs.
    Running,
    /// Stopped while a snapshot is saved.
    SaveVm,
    /// The guest has powered off, and the machine stays.
    Shutdown,
    /// The guest sleeps (ACPI S3).
    Suspended,
    /// Stopped by the watchdog.
    Watchdog,
    /// The guest has panicked.
    GuestPanicked,
}

impl RunState {
    /// QMP's name.
    pub fn name(self) -> &'static str {
        match self {
            RunState::Debug => "debug",
            RunState::Inmigrate => "inmigrate",
            RunState::InternalError => "internal-error",
            RunState::IoError => "io-error",
            RunState::Paused => "paused",
            RunState::Postmigrate => "postmigrate",
            RunState::Prelaunch => "prelaunch",
            RunState::FinishMigrate => "finish-migrate",
            RunState::RestoreVm => "restore-vm",
            RunState::Running => "running",
            RunState::SaveVm => "save-vm",
            RunState::Shutdown => "shutdown",
            RunState::Suspended => "suspended",
            RunState::Watchdog => "watchdog",
            RunState::GuestPanicked => "guest-panicked",
        }
    }

    /// Whether a machine in this state must be reset before it can run.
    pub fn needs_reset(self) -> bool {
        matches!(self, RunState::InternalError | RunState::Shutdown | RunState::GuestPanicked)
    }
}

/// Why a machine resets or shuts down; the names are QMP's `ShutdownCause`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The host failed.
    HostError,
    /// `quit` on a monitor.
    HostQmpQuit,
    /// `system_reset` on a monitor.
    HostQmpSystemReset,
    /// A signal.
    HostSignal,
    /// The user interface, such as a closed window or a key.
    HostUi,
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset itself.
    GuestReset,
    /// The guest panicked.
    GuestPanic,
}

impl Cause {
    /// Whether the guest did it.
    pub fn is_guest(self) -> bool {
        matches!(self, Cause::GuestShutdown | Cause::GuestReset | Cause::GuestPanic)
    }
}

/// What happens when the guest resets itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RebootAction {
    /// It is reset.
    #[default]
    Reset,
    /// It shuts down.
    Shutdown,
}

/// What happens when the guest powers off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownAction {
    /// The machine ends.
    #[default]
    Poweroff,
    /// The machine stays, stopped.
    Pause,
}

/// What happens when the guest panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PanicAction {
    /// The machine stays, stopped.
    Pause,
    /// It shuts down (as `shutdown` says).
    #[default]
    Shutdown,
    /// It ends, with a status that says so.
    ExitFailure,
    /// Nothing.
    None,
}

/// What the watchdog does when the guest lets it expire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogAction {
    /// Resets the guest.
    #[default]
    Reset,
    /// Asks the guest to shut down, by the power button.
    Shutdown,
    /// Powers off.
    Poweroff,
    /// Stops the guest.
    Pause,
    /// Logs it.
    Debug,
    /// Nothing.
    None,
    /// Sends a non-maskable interrupt.
    InjectNmi,
}

/// What happens when the accelerator cannot go on with the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorAction {
    /// The machine ends.
    #[default]
    End,
    /// The machine stays, stopped.
    Pause,
}

/// What the machine does at the guest's ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Actions {
    /// When the guest resets itself.
    pub reboot: RebootAction,
    /// When the guest powers off.
    pub shutdown: ShutdownAction,
    /// When the guest panics.
    pub panic: PanicAction,
    /// When the watchdog expires.
    pub watchdog: WatchdogAction,
    /// When the accelerator cannot go on.
    pub error: ErrorAction,
}

/// Something that happened to the machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// vCPUs run.
    Resume,
    /// vCPUs have stopped.
    Stop,
    /// It was reset.
    Reset(Cause),
    /// It shuts down.
    Shutdown(Cause),
    /// The power button was pressed.
    Powerdown,
    /// The guest has panicked; what was done about it (`pause`, `poweroff`, `run`).
    GuestPanicked(&'static str),
    /// A debugger's stop, on a vCPU.
    Debug(u32, accel::DebugExit),
    /// A device's: the event's name in QMP, and its data.
    Device(&'static str, serde_json::Value),
}

impl Notice {
    /// Name of the event in QMP, and its data. Debugger's stops have none.
    pub fn event(&self) -> Option<(&'static str, serde_json::Value)> {
        use serde_json::{Value, json};
        let cause = |c: &Cause| json!({ "guest": c.is_guest(), "reason": c });
        Some(match self {
            Notice::Resume => ("RESUME", Value::Null),
            Notice::Stop => ("STOP", Value::Null),
            Notice::Reset(c) => ("RESET", cause(c)),
            Notice::Shutdown(c) => ("SHUTDOWN", cause(c)),
            Notice::Powerdown => ("POWERDOWN", Value::Null),
            Notice::GuestPanicked(action) => ("GUEST_PANICKED", json!({ "action": action })),
            Notice::Debug(..) => return None,
            Notice::Device(name, data) => (name, data.clone()),
        })
    }
}

pub(crate) type Call = Box<dyn FnOnce(&mut Machine) + Send>;

pub(crate) enum Event {
    System(SystemRequest),
    Stopped(u32, crate::vcpu::Stop),
    Quit(Cause),
    PowerButton,
    Reset(Cause),
    Call(Call),
}

type Subscriber = Arc<dyn Fn(&Notice) + Send + Sync>;

#[derive(Default)]
pub(crate) struct Shared {
    state: Mutex<RunState>,
    subscribers: Mutex<Vec<(u64, Subscriber)>>,
    next: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Shared {
    pub(crate) fn state(&self) -> RunState {
        *lock(&self.state)
    }

    pub(crate) fn set_state(&self, state: RunState) {
        *lock(&self.state) = state;
    }

    /// Tells all subscribers. No lock is held meanwhile, so they may subscribe and unsubscribe.
    pub(crate) fn tell(&self, notice: &Notice) {
        let all: Vec<Subscriber> = lock(&self.subscribers).iter().map(|(_, s)| s.clone()).collect();
        all.iter().for_each(|s| s(notice));
    }
}

/// A handle to control a running machine from any thread.
#[derive(Clone)]
pub struct Remote {
    events: mpsc::Sender<Event>,
    shared: Arc<Shared>,
}

/// The machine has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has ended")]
pub struct Ended;

/// Keeps a subscription; it ends when this is dropped.
#[must_use = "the subscription ends when this is dropped"]
pub struct Subscription {
    id: u64,
    shared: Arc<Shared>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.shared.subscribers).retain(|(id, _)| *id != self.id);
    }
}

impl Remote {
    pub(crate) fn new(events: mpsc::Sender<Event>, shared: Arc<Shared>) -> Self {
        Self { events, shared }
    }

    /// Ends the machine at once, as pulling the plug.
    pub fn quit(&self) {
        self.quit_because(Cause::HostUi);
    }

    /// As [`Self::quit`], saying why.
    pub fn quit_because(&self, cause: Cause) {
        self.send(Event::Quit(cause));
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.send(Event::PowerButton);
    }

    /// Presses the reset button.
    pub fn reset(&self) {
        self.reset_because(Cause::HostUi);
    }

    /// As [`Self::reset`], saying why.
    pub fn reset_because(&self, cause: Cause) {
        self.send(Event::Reset(cause));
    }

    /// What the machine is doing now. Asks nobody, so it is cheap.
    pub fn state(&self) -> RunState {
        self.shared.state()
    }

    /// Does something on the machine's control thread, between two events, and waits for the result. It must not be
    /// called from there (a subscriber, for one), and waits until [`Machine::run`] is called.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Machine) -> R + Send + 'static,
    ) -> Result<R, Ended> {
        let (tx, rx) = mpsc::sync_channel(1);
        let call: Call = Box::new(move |machine| {
            // The receiver waits below; if its thread died, nobody needs the result.
            let _ = tx.send(f(machine));
        });
        self.events.send(Event::Call(call)).map_err(|_| Ended)?;
        rx.recv().map_err(|_| Ended)
    }

    /// As [`Self::call`], without waiting.
    pub fn post(&self, f: impl FnOnce(&mut Machine) + Send + 'static) {
        self.send(Event::Call(Box::new(f)));
    }

    /// Calls `f` at everything that happens, in order, mostly on the control thread: it must not block nor use
    /// [`Self::call`].
    pub fn subscribe(&self, f: impl Fn(&Notice) + Send + Sync + 'static) -> Subscription {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.subscribers).push((id, Arc::new(f)));
        Subscription { id, shared: self.shared.clone() }
    }

    /// Tells the subscribers about something, such as a display's client or a disk's job.
    pub fn tell(&self, notice: &Notice) {
        self.shared.tell(notice);
    }

    fn send(&self, event: Event) {
        // A machine that has ended already needs no control.
        let _ = self.events.send(event);
    }
}
