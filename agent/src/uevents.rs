//! The kernel's events about devices (netlink(7), NETLINK_KOBJECT_UEVENT): what wakes those who wait for a device.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use netlink_sys::protocols::NETLINK_KOBJECT_UEVENT;
use netlink_sys::{Socket, SocketAddr};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// The kernel's own events; group 2 has those of udev, which no guest runs.
const KERNEL_GROUP: u32 = 1;
/// An event holds a path and a few words (linux/kobject.h, `UEVENT_BUFFER_SIZE` is 2048).
const EVENT: usize = 4096;

/// Events from the moment of its making on.
pub(crate) struct Uevents {
    socket: Socket,
    /// The same open socket, for the event loop.
    readiness: AsyncFd<OwnedFd>,
}

impl Uevents {
    /// Begins to listen.
    pub(crate) fn listen() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_KOBJECT_UEVENT)?;
        socket.bind(&SocketAddr::new(0, KERNEL_GROUP))?;
        socket.set_non_blocking(true)?;
        let readiness = sys::watch(socket.as_fd().try_clone_to_owned()?)?;
        Ok(Self { socket, readiness })
    }

    /// Looks until `check` has an answer: once at first, and again after each event.
    pub(crate) async fn until<T>(&self, mut check: impl FnMut() -> io::Result<Option<T>>) -> io::Result<T> {
        loop {
            if let Some(answer) = check()? {
                return Ok(answer);
            }
            self.next().await?;
        }
    }

    /// Takes all events that there are, and waits for one where there is none.
    async fn next(&self) -> io::Result<()> {
        let receive = || self.socket.recv(&mut vec![0; EVENT].as_mut_slice(), 0).map(drop);
        match self.readiness.async_io(Interest::READABLE, |_| receive()).await {
            // Events were lost: as good as one.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            other => other,
        }?;
        while receive().is_ok() {}
        Ok(())
    }
}
