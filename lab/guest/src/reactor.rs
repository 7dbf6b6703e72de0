//! Waits for file descriptors, edge-triggered.
//!
//! Edges, because a port whose driver has gone reports a hang-up for as long as that lasts: a level-triggered wait
//! would spin until the next driver comes. The port's driver in the kernel wakes its waiters when the other side
//! opens or closes, and each such wake is one edge.

use std::io;
use std::os::fd::AsFd;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// An epoll instance. Whoever waits must first have tried all of its descriptors until they would block.
pub(crate) struct Reactor {
    epoll: Epoll,
}

impl Reactor {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Watches `fd` until it is closed.
    pub(crate) fn watch(&self, fd: impl AsFd) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        Ok(self.epoll.add(fd, EpollEvent::new(flags, 0))?)
    }

    /// Waits until something has changed on any of the descriptors.
    pub(crate) fn wait(&self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 8];
        match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
