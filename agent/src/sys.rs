//! System calls that no library wraps for this agent: all of its `unsafe` lives here and in [`crate::devices`].

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, signal};
use tokio::io::unix::AsyncFd;

/// One child that ended, as wait(2) encodes it.
pub(crate) struct Ended {
    pub(crate) pid: i32,
    /// Exit code, or 128 + the number of the signal.
    pub(crate) status: u32,
}

/// Reaps one child that has ended; `None` when there is none. Unlike nix's, it knows real-time signals.
pub(crate) fn reap_one() -> io::Result<Option<Ended>> {
    let mut raw = 0;
    // SAFETY: `raw` outlives the call, which writes nothing else.
    match Errno::result(unsafe { libc::waitpid(-1, &raw mut raw, libc::WNOHANG) }) {
        Ok(0) | Err(Errno::ECHILD) => Ok(None),
        Ok(pid) => {
            let status = if libc::WIFSIGNALED(raw) { 128 + libc::WTERMSIG(raw) } else { libc::WEXITSTATUS(raw) };
            Ok(Some(Ended { pid, status: status.cast_unsigned() }))
        }
        Err(error) => Err(error.into()),
    }
}

/// Sends a signal by number: real-time signals have no name in nix.
pub(crate) fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes two integers.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Puts every signal back to its default action and unblocks all, for a program that is about to be executed: Rust's
/// runtime ignores SIGPIPE, and ignored signals survive execve(2).
pub(crate) fn reset_signals() {
    /// The kernel's own structure and set size (linux/signal_types.h), all zero: SIG_DFL, no flags, nothing blocked.
    const DEFAULT: [u64; 4] = [0; 4];
    const SET_SIZE: usize = 8;
    for signal in 1..=libc::SIGRTMAX() {
        // Not through the C library, which keeps two real-time signals for itself and refuses to touch them. Signals
        // that the kernel refuses (KILL, STOP) have their default anyway.
        // SAFETY: the kernel reads 32 bytes of `DEFAULT` and writes nothing; SIG_DFL installs no code.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, DEFAULT.as_ptr(), std::ptr::null::<u64>(), SET_SIZE) };
    }
    // SAFETY: the kernel reads 8 bytes of `DEFAULT` and writes nothing. It can fail only for a wrong argument.
    unsafe {
        let how = libc::SIG_SETMASK;
        libc::syscall(libc::SYS_rt_sigprocmask, how, DEFAULT.as_ptr(), std::ptr::null::<u64>(), SET_SIZE);
    }
}

/// Has a program lead a session of its own when it is executed and, if its standard input is a terminal, own that.
pub(crate) fn lead_session(command: &mut Command, terminal: bool) {
    let lead = move || {
        nix::unistd::setsid()?;
        if terminal {
            // SAFETY: TIOCSCTTY takes an integer.
            Errno::result(unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) })?;
        }
        Ok(())
    };
    // SAFETY: between fork(2) and execve(2), it makes two system calls and nothing else.
    unsafe { command.pre_exec(lead) };
}

/// Lets the kernel reap this process's children: it does so for whoever ignores their end (wait(2), "NOTES").
pub(crate) fn leave_children_to_kernel() -> io::Result<()> {
    // SAFETY: SIG_IGN installs no code.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    Ok(())
}

/// Mounts a file system where nobody sees it: it is in no namespace, and goes with the descriptor of its root.
pub(crate) fn mount_detached(fstype: &CStr) -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: i32 = 1;
    const FSCONFIG_CMD_CREATE: i32 = 6;
    const FSMOUNT_CLOEXEC: i32 = 1;
    /// MOUNT_ATTR_RDONLY, _NOSUID, _NODEV and _NOEXEC (linux/mount.h).
    const ATTRIBUTES: i32 = 1 | 2 | 4 | 8;
    let descriptor = |result: libc::c_long| -> io::Result<OwnedFd> {
        let fd = RawFd::try_from(Errno::result(result)?).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made it, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: the kernel reads the name, which ends with a zero.
    let context = descriptor(unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), FSOPEN_CLOEXEC) })?;
    let null = std::ptr::null::<u8>();
    // SAFETY: this command takes no key and no value.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0)
    })?;
    // SAFETY: takes integers.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, ATTRIBUTES) })
}

/// Has the event loop watch a descriptor, which must not block.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor as long as it lives, which is inside of the `AsyncFd`.
    unsafe { AsyncFd::register(fd) }.map_err(|error| error.into_parts().1)
}

/// Sets the size of a terminal, in character cells.
pub(crate) fn set_window_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

/// Gives the other end of a pseudo terminal to a user, without a path through the container's file system
/// (ioctl_tty(2), TIOCGPTPEER).
pub(crate) fn chown_terminal(master: impl AsFd, uid: u32) -> io::Result<()> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and returns a new descriptor.
    let raw = Errno::result(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    let peer = unsafe { OwnedFd::from_raw_fd(raw) };
    nix::unistd::fchown(&peer, Some(uid.into()), None)?;
    Ok(())
}

/// Owns a descriptor that came in a control message (unix(7), SCM_RIGHTS).
pub(crate) fn received_fd(number: RawFd) -> OwnedFd {
    // SAFETY: recvmsg(2) has just installed it for this process, and its number was handed out once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Adds bytes to the kernel's entropy pool and credits them in full (random(4), RNDADDENTROPY).
pub(crate) fn add_entropy(random: impl AsFd, bytes: &[u8; 64], length: usize) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        length: libc::c_int,
        bytes: [u8; 64],
    }
    let length = length.min(bytes.len());
    let length_int = libc::c_int::try_from(length).unwrap_or(0);
    let info = PoolInfo { entropy_bits: length_int * 8, length: length_int, bytes: *bytes };
    nix::ioctl_write_ptr_bad!(rnd_add_entropy, nix::request_code_write!(b'R', 0x03, 8), PoolInfo);
    // SAFETY: RNDADDENTROPY reads two integers and `length` bytes behind them, all inside `info`.
    unsafe { rnd_add_entropy(random.as_fd().as_raw_fd(), &raw const info) }?;
    Ok(())
}
