//! News of a network namespace: that something in it has changed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

/// `RTNLGRP_*` of linux/rtnetlink.h: links, and addresses and routes of both families.
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];

/// A socket that is readable when a link, an address or a route has come, gone or changed since the last look. What it was
/// is asked for: it may be another by then.
#[derive(Debug)]
pub struct News(Socket);

impl News {
    /// Listens in this thread's network namespace.
    ///
    /// # Errors
    /// When the kernel has no such socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        GROUPS.iter().try_for_each(|group| socket.add_membership(*group))?;
        Ok(Self(socket))
    }

    /// Takes all news that there are, and tells whether there were any. It does not wait.
    ///
    /// # Errors
    /// When the socket cannot be read any more.
    pub fn take(&self) -> io::Result<bool> {
        let mut any = false;
        loop {
            // The rest of a message goes with its beginning.
            match self.0.recv(&mut [0; 16].as_mut_slice(), 0) {
                Ok(_) => any = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Some were lost: as good as one.
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => any = true,
                Err(error) => return Err(error),
            }
        }
    }
}

/// "No buffer space available" of asm-generic/errno.h.
const ENOBUFS: i32 = 105;

impl AsFd for News {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
