//! Being told to stop, without being stopped in the middle of a write.

#![allow(unsafe_code)] // signal masks and sigwait(3) have no safe wrapper among the dependencies

/// Signals that ask a server to finish.
fn set() -> libc::sigset_t {
    // SAFETY: `sigset_t` is plain old data, made valid by `sigemptyset`; both calls only write to it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

/// Keeps the signals waiting, in this thread and those it starts from now on.
pub(crate) fn block() {
    let set = set();
    // SAFETY: the set is valid, and no old mask is asked for.
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

/// Returns when one of the signals arrives.
pub(crate) fn wait() {
    let (set, mut signal) = (set(), 0);
    // SAFETY: both pointers are valid for the call.
    unsafe {
        libc::sigwait(&set, &mut signal);
    }
}
