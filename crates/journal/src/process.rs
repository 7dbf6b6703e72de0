//! Processes that are named by number and start time, and ended through a pidfd.

use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// How long a killed process may take to end (milliseconds). It has no say in it; only an uninterruptible system call
/// can delay the end.
const END_DEADLINE_MS: u16 = 10_000;

/// One particular process: numbers are reused, a number with its start time is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process number in this PID namespace.
    pub pid: i32,
    /// Start after boot in clock ticks (proc(5), `/proc/<pid>/stat` field 22).
    pub start_time: u64,
}

impl ProcessId {
    /// The calling process.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read.
    pub fn current() -> std::io::Result<Self> {
        let pid = i32::try_from(std::process::id()).map_err(Error::other)?;
        Self::of(pid)
    }

    /// The process that has this number now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] when there is none.
    pub fn of(pid: i32) -> std::io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = start_time(&stat)
            .ok_or_else(|| Error::new(ErrorKind::InvalidData, format!("/proc/{pid}/stat has no start time")))?;
        Ok(Self { pid, start_time })
    }

    /// Whether exactly this process still exists and is no zombie.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        std::fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| start_time(&stat) == Some(self.start_time) && !is_zombie(&stat))
    }

    /// Kills the process and waits for its end; success when it is gone already.
    ///
    /// # Errors
    ///
    /// When it cannot be signalled, or does not end in ten seconds.
    pub fn end(&self) -> std::io::Result<()> {
        let pidfd = match open_pidfd(self.pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            result => result?,
        };
        // Checked while the pidfd holds the number: what is signalled below is what was recorded. A zombie is waited for
        // as well: its main thread is dead, but others of a killed process may still hold its cgroup and its mounts.
        match Self::of(self.pid) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            found => {
                if found? != *self {
                    return Ok(());
                }
            }
        }
        match send_kill(pidfd.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            result => result?,
        }
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::from(END_DEADLINE_MS)) {
                Ok(0) => {
                    let text = format!("process {} was killed but did not end in {END_DEADLINE_MS} ms", self.pid);
                    return Err(Error::new(ErrorKind::TimedOut, text));
                }
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn open_pidfd(pid: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory of this process.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor, nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Error::last_os_error()),
    }
}

fn send_kill(pidfd: BorrowedFd<'_>) -> std::io::Result<()> {
    let fd = std::os::fd::AsRawFd::as_raw_fd(&pidfd);
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open for the whole call; a null siginfo is allowed (pidfd_send_signal(2)).
    match unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// The fields after the command name, which may itself hold spaces and parentheses.
fn fields(stat: &str) -> Option<std::str::SplitAsciiWhitespace<'_>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace())
}

fn start_time(stat: &str) -> Option<u64> {
    // Field 22; the first one after the command name is field 3.
    fields(stat)?.nth(19)?.parse().ok()
}

fn is_zombie(stat: &str) -> bool {
    fields(stat).and_then(|mut fields| fields.next()).is_some_and(|state| matches!(state, "Z" | "X"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let mut stat = String::from("42 (a) b (c) S");
        for field in 4..=22 {
            stat.push_str(&format!(" {field}"));
        }
        assert_eq!(start_time(&stat), Some(22));
    }

    #[test]
    fn a_process_with_another_start_time_is_not_signalled() {
        let mut child = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let real = ProcessId::of(pid).unwrap();
        let other = ProcessId { start_time: real.start_time + 1, ..real };
        other.end().unwrap();
        assert!(real.is_alive());
        real.end().unwrap();
        assert!(!real.is_alive());
        assert!(!child.wait().unwrap().success());
        real.end().unwrap();
    }

    #[test]
    fn the_end_of_a_process_is_the_end_of_its_last_thread() {
        // The main thread ends by itself and leaves a zombie behind; the other one sleeps on.
        let program = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); \
                       print(flush=True); ctypes.CDLL(None).syscall(60, 0)";
        let mut command = std::process::Command::new("python3");
        let mut child = command.args(["-c", program]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let process = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        process.end().unwrap();
        let threads = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().count();
        assert_eq!(threads, 1, "threads left beside the zombie");
        assert!(!child.wait().unwrap().success());
    }
}
