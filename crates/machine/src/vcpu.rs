//! vCPU threads: one each, which run, park, and do jobs while parked.

use accel::{CpuIo, Exit, Kicker, Vcpu};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Park,
    Run,
    Quit,
}

struct Control {
    wanted: Wanted,
    parked: bool,
    job: Option<Job>,
}

struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Why a vCPU stopped by itself; it is parked then.
pub(crate) type Stop = Result<Exit, accel::Error>;

/// A vCPU with its thread. Created parked.
pub(crate) struct VcpuThread {
    shared: Arc<Shared>,
    kicker: Kicker,
    thread_id: i32,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`; `stopped` hears when the guest makes it stop.
    pub(crate) fn spawn(
        index: u32,
        mut vcpu: Box<dyn Vcpu>,
        io: Arc<dyn CpuIo>,
        stopped: impl Fn(u32, Stop) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            control: Mutex::new(Control { wanted: Wanted::Park, parked: false, job: None }),
            changed: Condvar::new(),
        });
        let kicker = vcpu.kicker();
        let mine = shared.clone();
        let (tell_id, id) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(1 << 20).spawn(
            move || {
                // The creator waits for it.
                let _ = tell_id.send(rustix::thread::gettid().as_raw_nonzero().get());
                while wait_for_work(&mine, vcpu.as_mut()) {
                    match vcpu.run(&*io) {
                        Ok(Exit::Kicked) => {}
                        stop => {
                            let mut c = mine.lock();
                            if c.wanted == Wanted::Run {
                                c.wanted = Wanted::Park;
                            }
                            drop(c);
                            stopped(index, stop);
                        }
                    }
                }
            },
        )?;
        let thread_id = id.recv().map_err(io::Error::other)?;
        Ok(Self { shared, kicker, thread_id, thread: Some(thread) })
    }

    /// The host's id of the thread.
    pub(crate) fn thread_id(&self) -> i32 {
        self.thread_id
    }

    /// Lets it run.
    pub(crate) fn run(&self) {
        self.shared.lock().wanted = Wanted::Run;
        self.shared.changed.notify_all();
    }

    /// Asks it to park, without waiting.
    pub(crate) fn park(&self) {
        self.interrupt();
    }

    /// As [`Self::park`]; returns whether it was to run.
    fn interrupt(&self) -> bool {
        let before = std::mem::replace(&mut self.shared.lock().wanted, Wanted::Park);
        self.kicker.kick();
        before == Wanted::Run
    }

    /// Does something with the vCPU on its own thread, between two instructions of the guest if it runs.
    pub(crate) fn visit<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Option<R> {
        let ran = self.interrupt();
        let result = self.with(f);
        if ran {
            self.run();
        }
        result
    }

    /// Waits until it is parked.
    pub(crate) fn wait_parked(&self) {
        let mut c = self.shared.lock();
        while !c.parked {
            c = self.shared.changed.wait(c).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Does something with the vCPU on its own thread; it must be asked to park first.
    pub(crate) fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut dyn Vcpu) -> R + Send + 'static,
    ) -> Option<R> {
        let (tx, rx) = mpsc::channel();
        self.shared.lock().job = Some(Box::new(move |vcpu| {
            // The receiver waits below; it cannot be gone.
            let _ = tx.send(f(vcpu));
        }));
        self.shared.changed.notify_all();
        rx.recv().ok()
    }
}

/// Parks while that is wanted, doing jobs. Returns false when the thread is to end.
fn wait_for_work(shared: &Shared, vcpu: &mut dyn Vcpu) -> bool {
    let mut c = shared.lock();
    loop {
        if let Some(job) = c.job.take() {
            drop(c);
            job(vcpu);
            c = shared.lock();
            continue;
        }
        match c.wanted {
            Wanted::Run => break,
            Wanted::Quit => return false,
            Wanted::Park => {
                c.parked = true;
                shared.changed.notify_all();
                c = shared.changed.wait(c).unwrap_or_else(|e| e.into_inner());
            }
        }
    }
    c.parked = false;
    true
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.shared.lock().wanted = Wanted::Quit;
        self.shared.changed.notify_all();
        self.kicker.kick();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the panic hook already.
            let _ = thread.join();
        }
    }
}
