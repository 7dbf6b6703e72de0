//! The host's side of a memory device: how much memory the guest shall have, and how much it has.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::memory::plug::BLOCK;
use crate::virtio::observed::Observed;

/// How long a guest that somebody waits for may change nothing before it is told again; the next time, twice as long. Linux
/// waits 50 seconds by itself when memory that it should give back was in use for a moment, then twice as long
/// (`drivers/virtio/virtio_mem.c`).
const PATIENCE: Duration = Duration::from_secs(2);

/// How much pluggable memory a guest may have, shall have and has, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemState {
    /// The most that it can be asked to have.
    pub max: u64,
    /// What it is asked to have.
    pub requested: u64,
    /// What it has.
    pub plugged: u64,
    /// Whether its driver is at work: without one, nothing changes.
    pub driver: bool,
}

/// The handle on a memory device; clones are the same. Callable from any thread.
#[derive(Clone)]
pub struct MemControl {
    pub(super) state: Arc<Observed<MemState>>,
    /// Readable when the guest has to be told.
    pub(super) changed: Arc<EventFd>,
}

impl MemControl {
    pub(super) fn new(max: u64) -> io::Result<Self> {
        let state = MemState { max, requested: 0, plugged: 0, driver: false };
        let changed = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { state: Arc::new(Observed::new(state)), changed: Arc::new(changed) })
    }

    /// Asks the guest to have `bytes` of pluggable memory beside the memory that it was booted with. Returns what it was
    /// asked for: `bytes` rounded up to 2 MiB, at most the device's maximum. The guest takes its time, and may not be able
    /// to give back all that it should: see [`Self::wait`].
    ///
    /// # Errors
    /// When the event that tells the guest cannot be raised; the guest then learns of it when it next asks.
    pub fn set_requested(&self, bytes: u64) -> io::Result<u64> {
        let max = self.state.get().max;
        let requested = bytes.checked_next_multiple_of(BLOCK).map_or(max, |bytes| bytes.min(max));
        self.state.update(|state| state.requested = requested);
        self.changed.write(1)?;
        Ok(requested)
    }

    /// How things are.
    #[must_use]
    pub fn state(&self) -> MemState {
        self.state.get()
    }

    /// Calls `watcher` with each new state from now on, on the thread that changes it (mostly `vmm`): it must not block.
    pub fn watch(&self, watcher: impl Fn(MemState) + Send + 'static) {
        self.state.watch(watcher);
    }

    /// Waits until `reached` is true of the state, at most until `deadline`; returns the state then. A guest that has another
    /// size than it shall have and comes no nearer is told again meanwhile. Not for the `vmm` thread, which the guest is
    /// served by.
    #[must_use]
    pub fn wait(&self, deadline: Instant, reached: impl FnMut(MemState) -> bool) -> MemState {
        self.wait_patiently(deadline, PATIENCE, reached)
    }

    /// [`Self::wait`], with the time after which the guest is first told again.
    pub(super) fn wait_patiently(
        &self,
        deadline: Instant,
        mut patience: Duration,
        mut reached: impl FnMut(MemState) -> bool,
    ) -> MemState {
        loop {
            let before = self.state.get();
            let pause = deadline.min(Instant::now() + patience);
            let state = self.state.wait(pause, |state| reached(state) || state != before);
            if reached(state) || Instant::now() >= deadline {
                return state;
            }
            if state == before && state.driver && state.plugged != state.requested {
                if let Err(error) = self.changed.write(1) {
                    tracing::debug!(%error, "the guest is not told again of its memory");
                }
                patience = patience.saturating_mul(2);
            }
        }
    }
}
