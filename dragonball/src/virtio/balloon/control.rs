//! The host's side of a balloon: how much the guest shall give back, how much it has, and what it says of its memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::PAGE;
use super::stats::BalloonStats;
use crate::virtio::observed::Observed;

/// How a balloon is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BalloonState {
    /// The most that the guest can be asked to give back, in bytes.
    pub max: u64,
    /// What it is asked to give back, in bytes.
    pub target: u64,
    /// What it says that it has given back, in bytes. It takes some again when it is out of memory.
    pub actual: u64,
    /// Bytes of memory that went back to the host in the device's life: out of the balloon, and free pages that the guest
    /// reported. What it touches again counts again when it goes back again.
    pub discarded: u64,
    /// Whether its driver is at work: without one, nothing changes.
    pub driver: bool,
    /// How often the guest has said something of its memory.
    pub reports: u64,
    /// What it said last.
    pub stats: BalloonStats,
}

/// The handle on a balloon; clones are the same. Callable from any thread.
#[derive(Clone)]
pub struct BalloonControl {
    pub(super) state: Arc<Observed<BalloonState>>,
    /// The guest shall be asked for statistics.
    pub(super) stats_wanted: Arc<AtomicBool>,
    /// Readable when the device has to look at either.
    pub(super) changed: Arc<EventFd>,
}

impl BalloonControl {
    pub(super) fn new(max: u64) -> io::Result<Self> {
        let state = Observed::new(BalloonState { max, ..BalloonState::default() });
        let changed = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok(Self { state: Arc::new(state), stats_wanted: Arc::default(), changed })
    }

    /// Asks the guest to give `bytes` of its memory back. Returns what it was asked for: `bytes` rounded down to whole
    /// pages, at most the device's maximum. The guest takes its time, and gives back what it can: see [`Self::wait`].
    ///
    /// # Errors
    /// When the event that tells the guest cannot be raised; the guest then learns of it when it next asks.
    pub fn set_target(&self, bytes: u64) -> io::Result<u64> {
        let target = bytes.min(self.state.get().max) / PAGE * PAGE;
        self.state.update(|state| state.target = target);
        self.changed.write(1)?;
        Ok(target)
    }

    /// Asks the guest what it has to say of its memory. Returns the number of reports so far: the answer has come when
    /// [`BalloonState::reports`] is above that. A guest that is asleep answers when it wakes up.
    ///
    /// # Errors
    /// When the event that tells the device cannot be raised.
    pub fn request_stats(&self) -> io::Result<u64> {
        let reports = self.state.get().reports;
        self.stats_wanted.store(true, Ordering::Release);
        self.changed.write(1)?;
        Ok(reports)
    }

    /// How things are.
    #[must_use]
    pub fn state(&self) -> BalloonState {
        self.state.get()
    }

    /// Calls `watcher` with each new state from now on, on the thread that changes it (mostly `vmm`): it must not block.
    pub fn watch(&self, watcher: impl Fn(BalloonState) + Send + 'static) {
        self.state.watch(watcher);
    }

    /// Waits until `reached` is true of the state, at most until `deadline`; returns the state then. Not for the `vmm`
    /// thread, which the guest is served by.
    #[must_use]
    pub fn wait(&self, deadline: Instant, reached: impl FnMut(BalloonState) -> bool) -> BalloonState {
        self.state.wait(deadline, reached)
    }
}
