//! Getting a vCPU's thread out of the kernel.
//!
//! A kick is a request flag and a signal to the thread that runs the vCPU. The signal's handler, on that thread, sets
//! `immediate_exit` in the vCPU's run page: whether it arrives before, in or after `KVM_RUN`, the next or current
//! `KVM_RUN` returns, and the run loop sees the request. The signal is sent under the lock with which the thread
//! leaves the run loop, so it never goes to a thread that has ended, and nobody but the thread touches the run page.
#![allow(unsafe_code)] // signals

use crate::{Error, Result};
use std::cell::Cell;
use std::io;
use std::ptr::null;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread is running. Constant initialisation and no destructor, so that
    /// the signal handler may use it.
    static RUNNING: Cell<*const AtomicU8> = const { Cell::new(null()) };
    /// The signal is unblocked on this thread.
    static UNBLOCKED: Cell<bool> = const { Cell::new(false) };
}

/// The request to leave the run loop of one vCPU.
#[derive(Debug, Default)]
pub(super) struct Kick {
    requested: AtomicBool,
    /// Thread in the run loop.
    thread: Mutex<Option<libc::pid_t>>,
}

impl Kick {
    /// Makes the vCPU leave its run loop now or, if it is not in it, at its next entry.
    pub(super) fn kick(&self) {
        if self.requested.swap(true, Ordering::SeqCst) {
            return; // Whoever set it has sent the signal, or is about to.
        }
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(tid) = *thread {
            // SAFETY: the thread is alive: it takes this lock before it leaves the run loop.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal()) };
        }
    }

    /// Whether a kick is waiting to be taken.
    #[inline]
    pub(super) fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Takes the request.
    pub(super) fn take(&self) {
        self.requested.store(false, Ordering::SeqCst);
    }

    /// Enters the run loop on this thread until the guard goes.
    ///
    /// # Safety
    /// `immediate_exit`, the flag of the run page, stays valid until the guard is dropped, and is only accessed
    /// atomically.
    pub(super) unsafe fn enter(&self, immediate_exit: *const AtomicU8) -> Result<Running<'_>> {
        unblock()?;
        RUNNING.set(immediate_exit);
        // SAFETY: no arguments, cannot fail.
        let tid = unsafe { libc::gettid() };
        *self.thread.lock().unwrap_or_else(|e| e.into_inner()) = Some(tid);
        Ok(Running(self))
    }
}

/// This thread is in the run loop.
pub(super) struct Running<'a>(&'a Kick);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.thread.lock().unwrap_or_else(|e| e.into_inner()) = None;
        RUNNING.set(null());
    }
}

/// The signal of kicks: the first real-time signal that the C library leaves free.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn handler(_: libc::c_int) {
    let flag = RUNNING.get();
    // SAFETY: set by this very thread to a flag that outlives the guard, and null otherwise.
    if let Some(flag) = unsafe { flag.as_ref() } {
        flag.store(1, Ordering::SeqCst);
    }
}

/// Installs the handler, once for the process.
pub(super) fn install() -> Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            // SAFETY: an all-zero sigaction is valid; the handler only does what is async-signal-safe.
            let done = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal(), &action, std::ptr::null_mut())
            };
            if done == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
        })
        .map_err(|code| failed(io::Error::from_raw_os_error(code)))
}

/// Threads inherit the mask of their creator, which may block every signal.
fn unblock() -> Result<()> {
    if UNBLOCKED.get() {
        return Ok(());
    }
    // SAFETY: an all-zero set is valid memory for sigemptyset to fill.
    let code = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if code != 0 {
        return Err(failed(io::Error::from_raw_os_error(code)));
    }
    UNBLOCKED.set(true);
    Ok(())
}

fn failed(source: io::Error) -> Error {
    Error::Host { what: "cannot set up the signal that stops vCPUs".into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// Sleeps as KVM_RUN would: until a signal has set the flag. Panics rather than hang.
    fn run_like_kvm(flag: &AtomicU8) {
        for _ in 0..2000 {
            if flag.load(Ordering::SeqCst) != 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the kick was lost");
    }

    #[test]
    fn interrupts_the_thread_in_the_loop() {
        install().unwrap();
        let kick = Arc::new(Kick::default());
        let (inside, wait) = channel();
        let theirs = kick.clone();
        let thread = std::thread::spawn(move || {
            let flag = AtomicU8::new(0);
            // SAFETY: the flag is dropped after the guard.
            let _running = unsafe { theirs.enter(&flag) }.unwrap();
            inside.send(()).unwrap();
            run_like_kvm(&flag);
            assert!(theirs.requested());
            theirs.take();
        });
        wait.recv().unwrap();
        kick.kick();
        thread.join().unwrap();
        assert!(!kick.requested());
        // The thread is gone: the request stays, and nothing is signalled.
        kick.kick();
        kick.kick();
        assert!(kick.requested());
    }

    #[test]
    fn a_request_made_outside_is_seen_on_entry() {
        install().unwrap();
        let kick = Kick::default();
        kick.kick();
        let flag = AtomicU8::new(0);
        // SAFETY: the flag is dropped after the guard.
        let running = unsafe { kick.enter(&flag) }.unwrap();
        assert!(kick.requested());
        drop(running);
        assert!(RUNNING.get().is_null());
        assert_eq!(flag.load(Ordering::SeqCst), 0);
    }
}
