//! How a vCPU is made to leave the guest from another thread.
//!
//! `KVM_RUN` returns when a signal arrives, or at once when `immediate_exit` is set in the page that it shares with us
//! (Linux's `Documentation/virt/kvm/api.rst`). The kicker does both, in the other order: a vCPU that is about to enter
//! sees the flag, one that is inside gets the signal.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

/// The signal that interrupts `KVM_RUN`; its handler does nothing.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore(_signal: libc::c_int) {}

/// Installs the handler, once per process. Without `SA_RESTART`, as the point is to interrupt.
pub(crate) fn install_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: all zeroes is a valid `sigaction`; the handler does nothing, so it is safe at any instant.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigaction(signal(), &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            tracing::error!(error = %io::Error::last_os_error(), "the kick signal has no handler");
        }
    });
}

/// The `immediate_exit` byte of the page that a vCPU shares with KVM.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunPage(*const AtomicU8);

// SAFETY: the byte is only written through an atomic; who keeps the page mapped is `Vcpu`'s concern, see `Kicker`.
unsafe impl Send for RunPage {}

impl RunPage {
    pub(super) fn of(fd: &mut VcpuFd) -> Self {
        Self((&raw mut fd.get_kvm_run().immediate_exit).cast_const().cast())
    }
}

/// Kicks one vCPU.
#[derive(Debug)]
pub(super) struct Kicker {
    page: RunPage,
    thread: libc::pthread_t,
}

impl Kicker {
    /// The thread must own the vCPU of `page` and hand it back by its join handle, so that the page is mapped until then.
    pub(super) fn new(page: RunPage, thread: &JoinHandle<VcpuFd>) -> Self {
        Self { page, thread: thread.as_pthread_t() }
    }

    pub(super) fn kick(&self) {
        // SAFETY: the page stays mapped and the thread joinable until `Vcpu::join`, which consumes this.
        unsafe {
            (*self.page.0).store(1, Ordering::Release);
            libc::pthread_kill(self.thread, signal());
        }
    }
}
