//! A running virtual machine as its owner sees it.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::control::{Control, Request};
use crate::manage::{BalloonSize, Manager, MemorySize};
use crate::virtio::balloon::{BalloonControl, BalloonState};
use crate::virtio::console::ConsoleTail;
use crate::virtio::mem::{MemControl, MemState};

/// Why a machine ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a restart.
    Reset,
    /// The guest's kernel panicked and told so through its panic device.
    Panic,
    /// A vCPU met a fault that it could not deliver.
    TripleFault,
    /// [`Vm::stop`] was called.
    Stopped,
    /// The machine could not go on; the text says what happened.
    Failed(String),
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest asked for a restart"),
            Self::Panic => f.write_str("the guest kernel panicked"),
            Self::TripleFault => f.write_str("the guest met a triple fault"),
            Self::Stopped => f.write_str("it was stopped"),
            Self::Failed(what) => write!(f, "it failed: {what}"),
        }
    }
}

/// What the machine's threads and its owner share.
pub(crate) struct Shared {
    /// Readable once the machine has ended; never read, so it stays so.
    exit_event: EventFd,
    /// Readable once the boot timer was written; never read.
    boot_event: EventFd,
    exit_reason: OnceLock<ExitReason>,
    stamps: Mutex<Vec<(&'static str, u64)>>,
    /// What the guest wrote to each of its consoles.
    consoles: Mutex<Vec<ConsoleTail>>,
    /// Memory in bytes that the machine was started with.
    boot_memory: OnceLock<u64>,
    memory: OnceLock<MemControl>,
    balloon: OnceLock<BalloonControl>,
}

impl Shared {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            exit_event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            boot_event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            exit_reason: OnceLock::new(),
            stamps: Mutex::new(Vec::new()),
            consoles: Mutex::default(),
            boot_memory: OnceLock::new(),
            memory: OnceLock::new(),
            balloon: OnceLock::new(),
        })
    }

    /// Another console whose last output is kept.
    pub(crate) fn add_console(&self, tail: ConsoleTail) {
        self.consoles.lock().unwrap_or_else(PoisonError::into_inner).push(tail);
    }

    /// The machine starts with so many bytes of memory.
    pub(crate) fn set_boot_memory(&self, bytes: u64) {
        let _once = self.boot_memory.set(bytes);
    }

    /// The handle on pluggable memory.
    pub(crate) fn memory(&self) -> Option<MemControl> {
        self.memory.get().cloned()
    }

    /// The handle on the balloon.
    pub(crate) fn balloon(&self) -> Option<BalloonControl> {
        self.balloon.get().cloned()
    }

    /// How much memory the guest has.
    pub(crate) fn memory_size(&self) -> MemorySize {
        let boot = self.boot_memory.get().copied().unwrap_or(0);
        let plug = self.memory.get().map(MemControl::state);
        let with = |part: fn(MemState) -> u64| boot + plug.map_or(0, part);
        MemorySize {
            boot,
            asked: with(|state| state.requested),
            present: with(|state| state.plugged),
            max: with(|state| state.max),
        }
    }

    /// How the balloon is.
    pub(crate) fn balloon_size(&self) -> Option<BalloonSize> {
        let BalloonState { target, actual, discarded, stats, .. } = self.balloon.get()?.state();
        Some(BalloonSize { target, actual, discarded, available: stats.available_memory })
    }

    /// Whether the machine has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.exit_reason.get().is_some()
    }

    /// The machine has a memory device.
    pub(crate) fn set_memory(&self, control: MemControl) {
        let _the_only_one = self.memory.set(control);
    }

    /// The machine has a balloon.
    pub(crate) fn set_balloon(&self, control: BalloonControl) {
        let _the_only_one = self.balloon.set(control);
    }

    /// Notes that `name` happened now.
    pub(crate) fn stamp(&self, name: &'static str) {
        self.stamps.lock().unwrap_or_else(PoisonError::into_inner).push((name, monotonic_ns()));
    }

    /// The guest wrote the boot timer's byte. Only the first time counts.
    pub(crate) fn guest_init(&self) {
        let mut stamps = self.stamps.lock().unwrap_or_else(PoisonError::into_inner);
        if !stamps.iter().any(|(name, _)| *name == STAMP_INIT) {
            stamps.push((STAMP_INIT, monotonic_ns()));
            // Cannot fail: the counter is far from its maximum.
            let _ = self.boot_event.write(1);
        }
    }

    /// The machine has ended: every thread of it but the caller is gone.
    pub(crate) fn ended(&self, reason: ExitReason) {
        self.stamp("ended");
        let _ = self.exit_reason.set(reason);
        // Cannot fail: the counter is far from its maximum.
        let _ = self.exit_event.write(1);
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writes; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// A running virtual machine. Dropping it stops it.
pub struct Vm {
    shared: Arc<Shared>,
    control: Control,
    thread: Option<JoinHandle<()>>,
}

/// The stamp of the call of [`start`](crate::start).
pub(crate) const STAMP_START: &str = "start";
/// The stamp of the guest's byte to the boot timer.
pub(crate) const STAMP_INIT: &str = "init";

impl Vm {
    pub(crate) fn new(shared: Arc<Shared>, control: Control, thread: JoinHandle<()>) -> Self {
        Self { shared, control, thread: Some(thread) }
    }

    /// A descriptor that becomes readable when the machine has ended, and stays readable. Do not read from it.
    #[must_use]
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `shared`, which outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.shared.exit_event)) }
    }

    /// A descriptor that becomes readable when the guest has written the boot timer's byte, and stays readable. Do not
    /// read from it.
    #[must_use]
    pub fn boot_event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is owned by `shared`, which outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.shared.boot_event)) }
    }

    /// Why the machine ended; nothing while it runs.
    #[must_use]
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.shared.exit_reason.get().cloned()
    }

    /// What changes the machine while it runs.
    #[must_use]
    pub fn manager(&self) -> Manager {
        Manager::new(self.control.clone(), Arc::clone(&self.shared))
    }

    /// Asks the machine to end at once, as a power cut would. Returns without waiting for it; the exit event tells.
    pub fn stop(&self) {
        self.control.send(Request::End(ExitReason::Stopped));
    }

    /// Waits for the machine's end, without a limit.
    #[must_use]
    pub fn wait(mut self) -> ExitReason {
        self.join();
        self.exit_reason().unwrap_or_else(|| ExitReason::Failed("the vmm thread ended without a reason".to_owned()))
    }

    /// From the call of [`start`](crate::start) to the guest's byte to the boot timer, once that came.
    #[must_use]
    pub fn boot_time(&self) -> Option<Duration> {
        let stamps = self.stamps();
        let at = |name| stamps.iter().find(|(stamp, _)| *stamp == name).map(|(_, time)| *time);
        Some(Duration::from_nanos(at(STAMP_INIT)?.saturating_sub(at(STAMP_START)?)))
    }

    /// What happened when, in nanoseconds of `CLOCK_MONOTONIC`, in the order of happening.
    #[must_use]
    pub fn stamps(&self) -> Vec<(&'static str, u64)> {
        self.shared.stamps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The handle on the memory that the guest can get beside its boot memory; nothing when it can get none.
    #[must_use]
    pub fn memory(&self) -> Option<MemControl> {
        self.shared.memory()
    }

    /// The handle on the balloon; nothing when there is none.
    #[must_use]
    pub fn balloon(&self) -> Option<BalloonControl> {
        self.shared.balloon()
    }

    /// The last few KiB of what the guest wrote to its consoles, for error reports.
    #[must_use]
    pub fn console_tail(&self) -> String {
        let consoles = self.shared.consoles.lock().unwrap_or_else(PoisonError::into_inner);
        consoles.iter().map(ConsoleTail::text).collect()
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the panic hook; the exit reason is missing then.
            let _ = thread.join();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}
