//! The cable of a card, which the host can pull and plug while the machine runs.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Pulls and plugs the cable of a card, from any thread.
#[derive(Clone, Debug)]
pub struct Link(Arc<Cable>);

#[derive(Debug)]
struct Cable {
    up: AtomicBool,
    changed: EventFd,
}

impl Link {
    /// A plugged cable.
    pub(super) fn new() -> io::Result<Self> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Cable { up: AtomicBool::new(true), changed })))
    }

    /// Plugs or pulls the cable. The guest sees its card's carrier change; nothing passes without it.
    ///
    /// # Errors
    /// When the device cannot be woken.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        self.0.up.store(up, Ordering::Release);
        self.0.changed.write(1)
    }

    /// Whether the cable is plugged.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.up.load(Ordering::Acquire)
    }

    /// Readable after a change.
    pub(super) fn event(&self) -> RawFd {
        self.0.changed.as_raw_fd()
    }

    /// Forgets the changes up to now.
    pub(super) fn acknowledge(&self) {
        // Nothing to read is as good as read.
        let _ = self.0.changed.read();
    }
}
