//! Threads of the machine.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

/// Their stack: plenty for what they do; only what is touched costs memory.
const STACK: usize = 256 << 10;

/// Starts a thread that gets no signals but those sent to it: the others are its process's concern.
///
/// # Errors
/// When the host has no thread left.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // The mask is inherited, so that there is no instant at which the new thread could take a signal.
    let before = block_signals()?;
    let thread = Builder::new().name(name.to_owned()).stack_size(STACK).spawn(body);
    // SAFETY: `before` is a signal set that the kernel filled.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    thread
}

/// Does something that may take long on a thread of its own; here and now where the host has no thread left.
pub(crate) fn aside(name: &str, body: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    let body = Arc::new(Mutex::new(Some(body)));
    let take = |body: &Mutex<Option<_>>| body.lock().unwrap_or_else(PoisonError::into_inner).take();
    let theirs = Arc::clone(&body);
    let run = move || {
        if let Some(body) = take(&theirs) {
            body();
        }
    };
    match spawn(name, run) {
        Ok(thread) => Some(thread),
        Err(error) => {
            tracing::warn!(%error, name, "no thread can be started");
            if let Some(body) = take(&body) {
                body();
            }
            None
        }
    }
}

/// How many descriptors a machine with many devices uses, and the power of two that the kernel rounds it to.
const DESCRIPTORS: libc::c_int = 256;

/// Grows this process's table of file descriptors while it has few threads: growing it later, under running vCPUs, waits
/// for an RCU grace period each time.
pub(crate) fn reserve_descriptors() {
    // SAFETY: duplicates standard input to the first free number from there on, and closes what that gave.
    unsafe {
        let descriptor = libc::fcntl(libc::STDIN_FILENO, libc::F_DUPFD_CLOEXEC, DESCRIPTORS - 1);
        if descriptor >= 0 {
            libc::close(descriptor);
        }
    }
}

/// Blocks every signal but the kick signal and those of faults, and gives the mask from before.
fn block_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: a signal set of zeroes is valid; the calls only touch the two sets.
    let (result, before) = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        for signal in [libc::SIGRTMIN(), libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS] {
            libc::sigdelset(&raw mut all, signal);
        }
        (libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before), before)
    };
    if result == 0 { Ok(before) } else { Err(io::Error::from_raw_os_error(result)) }
}
