//! An epoll loop that a test turns by hand.

use std::collections::HashSet;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::virtio::device::EventRegistry;

/// Watches what a device registers.
pub struct EventLoop {
    epoll: Epoll,
    watched: HashSet<RawFd>,
}

impl EventLoop {
    /// A loop that watches nothing.
    pub(super) fn new() -> Self {
        Self { epoll: Epoll::new().expect("epoll"), watched: HashSet::new() }
    }

    /// How many descriptors are watched.
    pub fn watched(&self) -> usize {
        self.watched.len()
    }

    /// The tokens of what is ready, after at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> Vec<(u32, EventSet)> {
        let mut events = [EpollEvent::default(); 16];
        let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll: {error}"),
        };
        events[..count]
            .iter()
            .map(|event| (u32::try_from(event.data()).expect("a device's token"), event.event_set()))
            .collect()
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(events, u64::from(token)))
    }
}

impl EventRegistry for EventLoop {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, token, events)?;
        self.watched.insert(fd);
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, events)
    }

    fn remove(&mut self, fd: RawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, 0, EventSet::empty())?;
        self.watched.remove(&fd);
        Ok(())
    }
}
