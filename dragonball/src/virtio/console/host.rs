//! A descriptor of the host that the console prints to or reads from, without ever blocking on it.
//!
//! The descriptor may be shared with other processes (a terminal, a pipe of the caller), so that it cannot be made
//! non-blocking: readiness is asked for before each transfer, and a transfer is small enough for a ready one.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use vmm_sys_util::epoll::EventSet;

use crate::virtio::device::{DeviceError, EventRegistry};

/// One end of the console.
pub(super) struct HostEnd {
    file: File,
    token: u32,
    direction: EventSet,
    watched: bool,
    /// It failed, or came to its end: it is never used again.
    given_up: bool,
}

impl HostEnd {
    /// An end whose readiness in `direction` is reported under `token`.
    pub(super) fn new(fd: OwnedFd, token: u32, direction: EventSet) -> Self {
        Self { file: File::from(fd), token, direction, watched: false, given_up: false }
    }

    /// Whether a small transfer would not block.
    pub(super) fn is_ready(&self) -> bool {
        let flags = if self.direction == EventSet::IN { PollFlags::POLLIN } else { PollFlags::POLLOUT };
        let mut entry = [PollFd::new(self.file.as_fd(), flags)];
        !self.given_up && matches!(nix::poll::poll(&mut entry, PollTimeout::ZERO), Ok(1))
    }

    /// Writes the beginning of `bytes`, at most `PIPE_BUF` of them; returns how many, 0 when none would go for now.
    /// An end that was given up takes all.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        if self.given_up {
            return bytes.len();
        }
        if !self.is_ready() {
            return 0;
        }
        match self.file.write(bytes) {
            Ok(count) => count,
            Err(error) if is_temporary(&error) => 0,
            Err(error) => {
                tracing::warn!(%error, "the console's output failed: what the guest prints is dropped from now on");
                self.given_up = true;
                bytes.len()
            }
        }
    }

    /// Reads with `read`; returns how many bytes came, `None` when none did.
    pub(super) fn read(&mut self, read: impl FnOnce(&File) -> io::Result<usize>) -> Option<usize> {
        match read(&self.file) {
            Ok(0) => self.given_up = true,
            Ok(count) => return Some(count),
            Err(error) if is_temporary(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "the console's input failed: the guest gets no more of it");
                self.given_up = true;
            }
        }
        None
    }

    /// Watches for readiness, or watches no longer. What epoll cannot watch (a regular file) is always ready.
    pub(super) fn watch(&mut self, wanted: bool, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let wanted = wanted && !self.given_up;
        if wanted && !self.watched {
            match events.add(self.file.as_raw_fd(), self.token, self.direction) {
                Ok(()) => self.watched = true,
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
                Err(source) => return Err(DeviceError::Host { action: "watch the console's descriptor", source }),
            }
        } else if !wanted {
            self.unwatch(events);
        }
        Ok(())
    }

    /// Watches no longer.
    pub(super) fn unwatch(&mut self, events: &mut dyn EventRegistry) {
        if std::mem::take(&mut self.watched)
            && let Err(error) = events.remove(self.file.as_raw_fd())
        {
            tracing::debug!(%error, "the console's descriptor was not watched");
        }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
