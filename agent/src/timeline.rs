//! The guest's part of the boot timeline.

use nix::time::{ClockId, clock_gettime};
use protocols::agent::GuestStamp;

/// Stamps in the order in which they were taken. The kernel's start is 0 on the clock that they use.
#[derive(Debug, Default)]
pub(crate) struct Timeline(Vec<GuestStamp>);

impl Timeline {
    pub(crate) fn stamp(&mut self, name: &str) {
        self.0.push(GuestStamp { name: name.to_owned(), boottime_ns: now_ns(), ..Default::default() });
    }

    pub(crate) fn stamps(&self) -> Vec<GuestStamp> {
        self.0.clone()
    }
}

/// CLOCK_BOOTTIME in nanoseconds.
pub(crate) fn now_ns() -> i64 {
    // The clock exists since Linux 2.6.39 and the call has no other way to fail.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |now| now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}
