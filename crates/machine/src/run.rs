//! The running machine: its control loop, lifecycle and ends.

use crate::blueprint::Blueprint;
use crate::board::{self, Built};
use crate::control::{
    Actions, Cause, ErrorAction, Event, Notice, PanicAction, RebootAction, Remote, RunState, Shared,
    ShutdownAction, WatchdogAction,
};
use crate::vcpu::VcpuThread;
use crate::{Acceleration, Error, NetdevInfo, Result, kernel};
use accel::{CpuState, Exit, SystemEvent};
use bus::{Chardev, SystemRequest};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, mpsc};

/// Character devices by id, made by the front door.
pub type Chardevs = HashMap<String, Arc<dyn Chardev>>;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset (or triple-faulted), and resets end the machine (`--no-reboot`).
    Reset,
    /// The guest said that it panicked.
    Panicked,
    /// The guest wrote an exit status to the debug exit device.
    Exited(u8),
    /// The user quit.
    Quit,
    /// The accelerator could not go on; the text says why, with a register dump.
    Broken(String),
}

/// A virtual machine.
pub struct Machine {
    // Dropped in this order: vCPUs stop before the devices that they call go.
    vcpus: Vec<VcpuThread>,
    reset_states: Vec<CpuState>,
    built: Built,
    blueprint: Blueprint,
    accel_name: &'static str,
    events: mpsc::Receiver<Event>,
    /// Events that arrived while older ones were dropped.
    deferred: VecDeque<Event>,
    remote: Remote,
    shared: Arc<Shared>,
    /// What to do at the guest's ends; changes take effect at once.
    pub actions: Actions,
    ending: Option<Outcome>,
    saved_bytes: BTreeMap<u64, u8>,
}

impl Machine {
    /// Builds the machine that `blueprint` describes, ready to [`run`](Self::run).
    ///
    /// # Errors
    /// Anything wrong with the description, the files it names or the host.
    pub fn new(mut blueprint: Blueprint, acceleration: &Acceleration, chardevs: Chardevs) -> Result<Self> {
        for bag in &mut blueprint.devices {
            *bag = crate::objects::resolve(bag, &blueprint.objects)?;
        }
        let (sender, events) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let remote = Remote::new(sender.clone(), shared.clone());
        let requests = sender.clone();
        let system = bus::System::new(move |request| {
            // The machine outlives its devices; while it goes away nobody needs to hear.
            let _ = requests.send(Event::System(request));
        });
        let (mut built, cpus) = board::build(&blueprint, acceleration.accel.as_ref(), system, chardevs)?;
        let mut vcpus = Vec::with_capacity(cpus.len());
        let mut reset_states = Vec::with_capacity(cpus.len());
        for (index, mut vcpu) in cpus.into_iter().enumerate() {
            reset_states.push(vcpu.save()?);
            if index == 0 {
                let mut state = reset_states[0].clone();
                built.load_kernel(&blueprint)?.apply(&mut state, &built.memory)?;
                vcpu.load(&state)?;
            }
            let sender = sender.clone();
            let stopped = move |index, stop| {
                let _ = sender.send(Event::Stopped(index, stop)); // as above
            };
            let thread = VcpuThread::spawn(index as u32, vcpu, built.bus.clone(), stopped)
                .map_err(|source| Error::Host { what: "cannot start a vCPU thread".into(), source })?;
            vcpus.push(thread);
        }
        let actions = blueprint.actions;
        Ok(Self {
            vcpus,
            reset_states,
            built,
            blueprint,
            accel_name: acceleration.accel.name(),
            events,
            deferred: VecDeque::new(),
            remote,
            shared,
            actions,
            ending: None,
            saved_bytes: BTreeMap::new(),
        })
    }

    /// The machine's balloon, if it has one.
    pub fn balloon(&self) -> Option<&Arc<devices::virtio::balloon::Balloon>> {
        self.built.balloon.as_ref()
    }

    /// The machine's screens, keyboards and pointers.
    pub fn displays(&self) -> &Arc<display::Displays> {
        &self.built.displays
    }

    /// A handle for other threads.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }

    /// Runs the machine until it ends; a blueprint that says `paused` waits for [`Self::resume`] first.
    ///
    /// # Errors
    /// The host failed.
    pub fn run(&mut self) -> Result<Outcome> {
        let outcome = self.events_until_the_end();
        self.stop();
        outcome
    }

    fn events_until_the_end(&mut self) -> Result<Outcome> {
        if !self.blueprint.paused {
            self.resume()?;
        }
        loop {
            let event = match self.deferred.pop_front() {
                Some(event) => event,
                // The machine holds a sender itself, so this never fails.
                None => match self.events.recv() {
                    Ok(event) => event,
                    Err(_) => return Ok(Outcome::Quit),
                },
            };
            if let Some(outcome) = self.handle(event)? {
                return Ok(outcome);
            }
            if let Some(outcome) = self.ending.take() {
                return Ok(outcome);
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<Option<Outcome>> {
        Ok(match event {
            Event::Call(call) => {
                call(self);
                None
            }
            Event::Quit(cause) => {
                self.shared.tell(&Notice::Shutdown(cause));
                Some(Outcome::Quit)
            }
            Event::PowerButton => {
                self.power_button();
                None
            }
            Event::Reset(cause) => self.reset_or_end(cause)?,
            Event::System(request) => self.requested(request)?,
            Event::Stopped(index, Ok(exit)) => self.stopped(index, exit)?,
            Event::Stopped(index, Err(e)) => {
                tracing::error!("vCPU {index}: {e}");
                return Err(e.into());
            }
        })
    }

    /// A device's request.
    fn requested(&mut self, request: SystemRequest) -> Result<Option<Outcome>> {
        Ok(match request {
            SystemRequest::PowerOff => self.shut_down(Cause::GuestShutdown, Outcome::PoweredOff),
            SystemRequest::Exit(status) => {
                self.shared.tell(&Notice::Shutdown(Cause::GuestShutdown));
                Some(Outcome::Exited(status))
            }
            SystemRequest::GuestPanicked => self.panicked(),
            SystemRequest::Reset => self.reset_or_end(Cause::GuestReset)?,
            SystemRequest::IoError(drive) => {
                tracing::warn!("stopped by an I/O error on '{drive}'; continue when its cause is removed");
                self.halt(RunState::IoError);
                None
            }
            SystemRequest::Watchdog => self.watchdog()?,
            SystemRequest::Notice(name, data) => {
                self.shared.tell(&Notice::Device(name, data));
                None
            }
        })
    }

    /// A vCPU has stopped by itself.
    fn stopped(&mut self, index: u32, exit: Exit) -> Result<Option<Outcome>> {
        Ok(match exit {
            Exit::Shutdown | Exit::SystemEvent(SystemEvent::Reset) => {
                tracing::info!("vCPU {index}: triple fault or reset request");
                self.reset_or_end(Cause::GuestReset)?
            }
            Exit::SystemEvent(SystemEvent::PowerOff) => {
                self.shut_down(Cause::GuestShutdown, Outcome::PoweredOff)
            }
            Exit::SystemEvent(SystemEvent::Crash) => self.panicked(),
            Exit::InternalError(text) => {
                let text = format!("vCPU {index}: {text}");
                match self.actions.error {
                    ErrorAction::End => Some(Outcome::Broken(text)),
                    ErrorAction::Pause => {
                        tracing::error!("{text}");
                        self.halt(RunState::InternalError);
                        None
                    }
                }
            }
            Exit::Debug(stop) => {
                self.halt(RunState::Debug);
                self.shared.tell(&Notice::Debug(index, stop));
                None
            }
            Exit::Kicked => None,
        })
    }

    fn reset_or_end(&mut self, cause: Cause) -> Result<Option<Outcome>> {
        if self.actions.reboot == RebootAction::Shutdown {
            return Ok(self.shut_down(cause, Outcome::Reset));
        }
        self.reset(cause)?;
        Ok(None)
    }

    fn shut_down(&mut self, cause: Cause, outcome: Outcome) -> Option<Outcome> {
        self.shared.tell(&Notice::Shutdown(cause));
        if self.actions.shutdown == ShutdownAction::Pause {
            self.halt(RunState::Shutdown);
            return None;
        }
        Some(outcome)
    }

    /// A watchdog ran out.
    fn watchdog(&mut self) -> Result<Option<Outcome>> {
        let action = self.actions.watchdog;
        tracing::warn!("the guest let its watchdog run out");
        self.shared.tell(&Notice::Device("WATCHDOG", serde_json::json!({ "action": action })));
        Ok(match action {
            WatchdogAction::Reset => self.reset_or_end(Cause::GuestReset)?,
            WatchdogAction::Shutdown => {
                self.power_button();
                None
            }
            WatchdogAction::Poweroff => self.shut_down(Cause::GuestShutdown, Outcome::PoweredOff),
            WatchdogAction::Pause => {
                self.halt(RunState::Watchdog);
                None
            }
            WatchdogAction::InjectNmi => {
                self.inject_nmi()?;
                None
            }
            WatchdogAction::Debug | WatchdogAction::None => None,
        })
    }

    fn panicked(&mut self) -> Option<Outcome> {
        let action = match self.actions.panic {
            PanicAction::Pause => "pause",
            PanicAction::Shutdown | PanicAction::ExitFailure => "poweroff",
            PanicAction::None => "run",
        };
        self.shared.tell(&Notice::GuestPanicked(action));
        match self.actions.panic {
            PanicAction::None => None,
            PanicAction::Pause => {
                self.halt(RunState::GuestPanicked);
                None
            }
            PanicAction::Shutdown => self.shut_down(Cause::GuestPanic, Outcome::Panicked),
            PanicAction::ExitFailure => {
                self.shared.tell(&Notice::Shutdown(Cause::GuestPanic));
                Some(Outcome::Panicked)
            }
        }
    }

    /// What the machine is doing.
    pub fn state(&self) -> RunState {
        self.shared.state()
    }

    /// The blueprint it was built from.
    pub fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    /// Short name of the accelerator: `kvm` or `soft`.
    pub fn accel_name(&self) -> &'static str {
        self.accel_name
    }

    /// Lets the vCPUs run. Does nothing if they do.
    ///
    /// # Errors
    /// A machine that must be reset first, or the host's refusal.
    pub fn resume(&mut self) -> Result<()> {
        let state = self.state();
        if state == RunState::Running {
            return Ok(());
        }
        if state.needs_reset() {
            return Err(Error::Config("Resetting the Virtual Machine is required".into()));
        }
        self.built.start()?;
        self.shared.set_state(RunState::Running);
        self.shared.tell(&Notice::Resume);
        self.vcpus.iter().for_each(VcpuThread::run);
        Ok(())
    }

    /// As [`Self::resume`], but only one vCPU runs, for a debugger's step.
    ///
    /// # Errors
    /// As for [`Self::resume`].
    pub fn resume_only(&mut self, index: Option<u32>) -> Result<()> {
        let Some(index) = index else { return self.resume() };
        let state = self.state();
        if state == RunState::Running || state.needs_reset() {
            return Err(Error::Config(format!("a step is not possible in state '{}'", state.name())));
        }
        let thread = self.vcpus.get(index as usize);
        if thread.is_none() {
            return Err(Error::Config(format!("there is no vCPU {index}")));
        }
        self.built.start()?;
        self.shared.set_state(RunState::Running);
        self.shared.tell(&Notice::Resume);
        thread.into_iter().for_each(VcpuThread::run);
        Ok(())
    }

    /// What debuggers' software breakpoints have replaced, by linear address.
    pub fn saved_bytes(&mut self) -> &mut BTreeMap<u64, u8> {
        &mut self.saved_bytes
    }

    /// Stops vCPUs, devices and the guest's time. A machine that is stopped already only changes from prelaunch.
    pub fn pause(&mut self) {
        if self.state() == RunState::Running {
            self.halt(RunState::Paused);
        }
    }

    /// Stops everything, and says why.
    pub fn halt(&mut self, state: RunState) {
        let was = self.state();
        if was == RunState::Running {
            self.stop();
        }
        self.shared.set_state(state);
        if was == RunState::Running {
            self.shared.tell(&Notice::Stop);
        }
    }

    /// Presses the power button.
    pub fn power_button(&mut self) {
        self.shared.tell(&Notice::Powerdown);
        self.built.power_button();
    }

    /// Ends the machine when the present event has been dealt with.
    pub fn end(&mut self, cause: Cause) {
        self.shared.tell(&Notice::Shutdown(cause));
        self.ending = Some(Outcome::Quit);
    }

    /// The network backends.
    pub fn netdevs(&self) -> &[NetdevInfo] {
        self.built.netdevs.infos()
    }

    /// Accelerator counters, for `--stats`.
    pub fn stats(&self) -> Vec<(String, u64)> {
        self.built.vm.stats()
    }

    fn stop(&mut self) {
        self.vcpus.iter().for_each(VcpuThread::park);
        self.vcpus.iter().for_each(VcpuThread::wait_parked);
        self.built.pause();
    }

    /// Back to power-on: RAM cleared, devices and vCPUs reset, the kernel loaded anew. A stopped machine stays so.
    ///
    /// # Errors
    /// The kernel cannot be loaded any more, or the host failed.
    pub fn reset(&mut self, cause: Cause) -> Result<()> {
        let running = self.state() == RunState::Running;
        if running {
            self.stop();
        }
        // What the guest requested before the reset is void.
        while let Ok(event) = self.events.try_recv() {
            match event {
                Event::System(SystemRequest::Notice(..)) => self.deferred.push_back(event),
                Event::System(_) | Event::Stopped(..) => {}
                other => self.deferred.push_back(other),
            }
        }
        self.built.reset();
        if !self.vcpus.is_empty() {
            let entry = self.built.load_kernel(&self.blueprint)?;
            for (index, thread) in self.vcpus.iter().enumerate() {
                let mut state = self.reset_states[index].clone();
                if index == 0 {
                    entry.apply(&mut state, &self.built.memory)?;
                }
                if let Some(result) = thread.with(move |vcpu| vcpu.load(&state)) {
                    result?;
                }
            }
        }
        self.shared.tell(&Notice::Reset(cause));
        if running {
            self.built.start()?;
            self.vcpus.iter().for_each(VcpuThread::run);
        } else {
            self.shared.set_state(RunState::Prelaunch);
        }
        Ok(())
    }

    /// The vCPU threads.
    pub(crate) fn vcpus(&self) -> &[VcpuThread] {
        &self.vcpus
    }

    /// What the board put together.
    pub(crate) fn built(&self) -> &Built {
        &self.built
    }

    /// The same, to be changed.
    pub(crate) fn built_mut(&mut self) -> &mut Built {
        &mut self.built
    }

    /// The description, which follows what is added later.
    pub(crate) fn blueprint_mut(&mut self) -> &mut Blueprint {
        &mut self.blueprint
    }
}

impl Built {
    /// Loads the kernel and the tables that firmware would make.
    fn load_kernel(&mut self, blueprint: &Blueprint) -> Result<kernel::Entry> {
        // With both, firmware is handed the kernel.
        if self.starts_in_firmware() {
            return Ok(kernel::Entry::Reset);
        }
        let Some(spec) = &blueprint.kernel else {
            return Err(Error::Config("nothing to boot: give a kernel with --kernel".into()));
        };
        let tables = self.write_tables()?;
        Ok(kernel::load(spec, &self.memory, &tables)?)
    }
}
