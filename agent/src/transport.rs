//! Connections to the host: vsock in a guest, unix sockets where the agent is tested without one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, socket};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::Notify;

use crate::error::{Error, Result};
use crate::sys;

/// The host listens before it starts the guest, so only a host in trouble takes longer.
const DIAL_DEADLINE: Duration = Duration::from_secs(10);

/// Where the host listens. Written as `vsock:<cid>` or `unix:<path prefix>`: port P of the latter is the socket
/// `<path prefix>_P`, as the VMM's hybrid vsock names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Vsock(u32),
    Unix(PathBuf),
}

impl Default for Endpoint {
    fn default() -> Self {
        Self::Vsock(protocols::HOST_CID)
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vsock", cid)) => {
                cid.parse().map(Self::Vsock).map_err(|e| format!("{text:?}: the CID is a number: {e}"))
            }
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text:?} is neither vsock:<cid> nor unix:</path/prefix>")),
        }
    }
}

impl Endpoint {
    /// Connects to one port of the host.
    pub(crate) async fn dial(&self, port: u32) -> Result<AsyncFd<OwnedFd>> {
        let attempt = async {
            match self {
                Self::Vsock(cid) => dial(AddressFamily::Vsock, &VsockAddr::new(*cid, port)).await,
                Self::Unix(prefix) => {
                    let mut path = prefix.clone().into_os_string();
                    path.push(format!("_{port}"));
                    dial(AddressFamily::Unix, &UnixAddr::new(path.as_os_str())?).await
                }
            }
        };
        let what = || format!("cannot reach the host on port {port}");
        match tokio::time::timeout(DIAL_DEADLINE, attempt).await {
            Ok(connected) => connected.map_err(Error::io(what())),
            Err(_) => Err(Error::Deadline { what: what(), seconds: DIAL_DEADLINE.as_secs() }),
        }
    }
}

async fn dial(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    let pending = match connect(fd.as_raw_fd(), address) {
        Ok(()) => false,
        Err(Errno::EINPROGRESS) => true,
        Err(error) => return Err(error.into()),
    };
    let fd = sys::watch(fd)?;
    if pending {
        let _ = fd.writable().await?;
        match nix::sys::socket::getsockopt(fd.get_ref(), nix::sys::socket::sockopt::SocketError)? {
            0 => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
    Ok(fd)
}

/// The connection that ttrpc is served on: tells when the host is gone.
pub(crate) struct HostConnection {
    fd: AsyncFd<OwnedFd>,
    lost: Arc<Notify>,
}

impl HostConnection {
    /// `lost` is notified once when the host has closed the connection or it broke.
    pub(crate) fn new(fd: AsyncFd<OwnedFd>, lost: Arc<Notify>) -> Self {
        Self { fd, lost }
    }
}

impl AsyncRead for HostConnection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            let room = buf.initialize_unfilled();
            let wanted = room.len();
            let Ok(outcome) = guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), room)?)) else { continue };
            if matches!(outcome, Ok(0) if wanted > 0) || outcome.is_err() {
                self.lost.notify_one();
            }
            return Poll::Ready(outcome.map(|n| buf.advance(n)));
        }
    }
}

impl AsyncWrite for HostConnection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            if let Ok(outcome) = guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), buf)?)) {
                return Poll::Ready(outcome);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(half_close(&self.fd))
    }
}

/// Says that no more bytes follow; a peer that is already gone is no error.
pub(crate) fn half_close(fd: &AsyncFd<OwnedFd>) -> io::Result<()> {
    match nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Write) {
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// One read of what is there: `None` when there is nothing now, 0 at the end of file. A pseudo terminal whose last
/// user is gone says EIO: that is its end of file.
pub(crate) async fn try_read(fd: &AsyncFd<OwnedFd>, buf: &mut [u8]) -> io::Result<Option<usize>> {
    let mut guard = fd.readable().await?;
    match guard.try_io(|fd| match nix::unistd::read(fd.get_ref(), buf) {
        Err(Errno::EIO) => Ok(0),
        other => Ok(other?),
    }) {
        Ok(outcome) => outcome.map(Some),
        Err(_would_block) => Ok(None),
    }
}

/// Writes all of `bytes`.
pub(crate) async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = fd.async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, bytes)?)).await?;
        bytes = &bytes[n..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_from_the_kernel_command_line() {
        assert_eq!("vsock:2".parse(), Ok(Endpoint::default()));
        assert_eq!("unix:/run/x".parse(), Ok(Endpoint::Unix("/run/x".into())));
        for bad in ["", "vsock", "vsock:", "vsock:two", "unix:relative", "tcp:1"] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad:?} must be refused");
        }
    }
}
