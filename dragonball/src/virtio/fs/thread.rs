//! What the device thread needs before it makes files on the guest's behalf.

use std::sync::Once;

/// `SECBIT_NO_SETUID_FIXUP` (`linux/securebits.h`).
const NO_SETUID_FIXUP: libc::c_int = 1 << 2;

thread_local! {
    static PREPARED: Once = const { Once::new() };
}

/// Prepares this thread, and this thread only:
///
/// - Its umask becomes its own, as the guest's processes have theirs and the library sets this one to 0.
/// - It keeps its capabilities while it takes on the user of a guest process to make a file: that user decides only
///   whom the file belongs to. Whether it may was decided by the guest's kernel, which knows the groups of the process.
///
/// Where the process is not privileged both are refused, and files are made with what rights there are.
pub(super) fn prepare() {
    PREPARED.with(|prepared| prepared.call_once(prepare_once));
}

fn prepare_once() {
    // SAFETY: no pointers; the effect is limited to this thread.
    if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "the umask of the whole process will be 0, as the device thread cannot have its own");
    }
    // SAFETY: no pointers; the effect is limited to this thread.
    let set = unsafe {
        let bits = libc::prctl(libc::PR_GET_SECUREBITS);
        libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP)
    };
    if set != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "the device thread is not privileged");
    }
}
