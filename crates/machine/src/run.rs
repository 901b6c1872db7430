//! The running machine: its control loop, lifecycle and ends.

use crate::blueprint::Blueprint;
use crate::board::{self, Built};
use crate::vcpu::{Stop, VcpuThread};
use crate::{Acceleration, Error, Result, kernel};
use accel::{CpuState, Exit, SystemEvent};
use bus::{Chardev, SystemRequest};
use std::collections::HashMap;
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

pub(crate) enum Event {
    System(SystemRequest),
    Stopped(u32, Stop),
    Control(Control),
}

/// What front doors ask of a running machine.
pub(crate) enum Control {
    Quit,
    PowerButton,
    Reset,
}

/// A handle to control a running machine from any thread.
#[derive(Clone)]
pub struct Remote(mpsc::Sender<Event>);

impl Remote {
    /// Ends the machine at once, as pulling the plug.
    pub fn quit(&self) {
        self.send(Control::Quit);
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.send(Control::PowerButton);
    }

    /// Presses the reset button.
    pub fn reset(&self) {
        self.send(Control::Reset);
    }

    fn send(&self, control: Control) {
        // A machine that has ended already needs no control.
        let _ = self.0.send(Event::Control(control));
    }
}

/// A virtual machine.
pub struct Machine {
    // Dropped in this order: vCPUs stop before the devices that they call go.
    vcpus: Vec<VcpuThread>,
    reset_states: Vec<CpuState>,
    built: Built,
    blueprint: Blueprint,
    events: mpsc::Receiver<Event>,
    remote: Remote,
}

impl Machine {
    /// Builds the machine that `blueprint` describes, ready to [`run`](Self::run).
    ///
    /// # Errors
    /// Anything wrong with the description, the files it names or the host.
    pub fn new(blueprint: Blueprint, acceleration: &Acceleration, chardevs: Chardevs) -> Result<Self> {
        let (sender, events) = mpsc::channel();
        let remote = Remote(sender.clone());
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
        Ok(Self { vcpus, reset_states, built, blueprint, events, remote })
    }

    /// A handle for other threads.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }

    /// Runs the machine until it ends.
    ///
    /// # Errors
    /// The host failed.
    pub fn run(&mut self) -> Result<Outcome> {
        self.built.start()?;
        self.vcpus.iter().for_each(VcpuThread::run);
        let outcome = loop {
            // The machine holds a sender itself, so this never fails.
            let Ok(event) = self.events.recv() else { break Outcome::Quit };
            match event {
                Event::Control(Control::Quit) => break Outcome::Quit,
                Event::Control(Control::PowerButton) => self.built.power_button(),
                Event::System(SystemRequest::PowerOff) => break Outcome::PoweredOff,
                Event::System(SystemRequest::Exit(status)) => break Outcome::Exited(status),
                Event::System(SystemRequest::GuestPanicked) => break Outcome::Panicked,
                Event::System(SystemRequest::Reset) | Event::Control(Control::Reset) => {
                    if self.blueprint.no_reboot {
                        break Outcome::Reset;
                    }
                    self.reset()?;
                }
                Event::Stopped(index, Ok(exit)) => match exit {
                    Exit::Shutdown | Exit::SystemEvent(SystemEvent::Reset) => {
                        tracing::info!("vCPU {index}: triple fault or reset request");
                        if self.blueprint.no_reboot {
                            break Outcome::Reset;
                        }
                        self.reset()?;
                    }
                    Exit::SystemEvent(SystemEvent::PowerOff) => break Outcome::PoweredOff,
                    Exit::SystemEvent(SystemEvent::Crash) => break Outcome::Panicked,
                    Exit::InternalError(text) => break Outcome::Broken(format!("vCPU {index}: {text}")),
                    Exit::Debug(stop) => {
                        break Outcome::Broken(format!("vCPU {index}: unexpected debug stop {stop:?}"));
                    }
                    Exit::Kicked => {}
                },
                Event::Stopped(index, Err(e)) => {
                    tracing::error!("vCPU {index}: {e}");
                    self.stop();
                    return Err(e.into());
                }
            }
        };
        self.stop();
        Ok(outcome)
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

    /// Back to power-on: RAM cleared, devices and vCPUs reset, the kernel loaded anew.
    fn reset(&mut self) -> Result<()> {
        self.stop();
        // What was requested before the reset is void.
        while let Ok(event) = self.events.try_recv() {
            if matches!(event, Event::Control(Control::Quit)) {
                self.remote.quit();
                break;
            }
        }
        self.built.reset();
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
        self.built.start()?;
        self.vcpus.iter().for_each(VcpuThread::run);
        Ok(())
    }
}

impl Built {
    /// Loads the kernel and the tables that firmware would make.
    fn load_kernel(&mut self, blueprint: &Blueprint) -> Result<kernel::Entry> {
        let Some(spec) = &blueprint.kernel else {
            return Err(Error::Config("nothing to boot: give a kernel with --kernel".into()));
        };
        let tables = self.write_tables()?;
        Ok(kernel::load(spec, &self.memory, &tables)?)
    }
}
