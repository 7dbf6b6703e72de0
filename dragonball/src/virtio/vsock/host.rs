//! The host's end: the unix socket that the host's programs connect to, and those that they listen on.
//!
//! Host → guest: a program connects to `<socket>` and writes `CONNECT <port>\n`; it gets `OK <host port>\n` once the
//! guest granted the connection, and the end of the stream if the guest did not. Guest → host: a connection to host port
//! P goes to whoever listens on `<socket>_P`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket};

use super::VsockError;
use super::connection::is_temporary;

/// The longest `CONNECT` line: the word, a space, ten digits and the line's end, with some slack for spaces.
const MAX_LINE: usize = 32;
/// The longest suffix of a listening program's socket: `_` and ten digits.
const MAX_SUFFIX: usize = 11;
/// What fits into `sockaddr_un.sun_path`, without the terminating zero.
const MAX_PATH: usize = 107;

/// The socket that the host's programs connect to. Its file is removed when the value is dropped.
#[derive(Debug)]
pub(super) struct HostSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Given up for a moment when the process is out of descriptors, to accept and refuse who waits: a listener with
    /// someone waiting stays ready, and the event loop would spin.
    spare: Option<File>,
}

impl HostSocket {
    /// Listens on `path`.
    pub(super) fn bind(path: &Path) -> Result<Self, VsockError> {
        let length = path.as_os_str().len();
        if length + MAX_SUFFIX > MAX_PATH {
            return Err(VsockError::PathTooLong { path: path.to_owned(), length, limit: MAX_PATH - MAX_SUFFIX });
        }
        let failed = |source| VsockError::Bind { path: path.to_owned(), source };
        let listener = UnixListener::bind(path).map_err(failed)?;
        let socket = Self { listener, path: path.to_owned(), spare: spare() };
        socket.listener.set_nonblocking(true).map_err(failed)?;
        Ok(socket)
    }

    /// The next program that connected, if there is one.
    pub(super) fn accept(&mut self) -> Option<UnixStream> {
        match self.listener.accept() {
            Ok((stream, _)) => stream.set_nonblocking(true).is_ok().then_some(stream),
            Err(error) => {
                if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                    tracing::warn!(%error, "out of descriptors: a connection to the vsock socket is refused");
                    self.spare = None;
                    drop(self.listener.accept());
                    self.spare = spare();
                }
                None
            }
        }
    }

    /// Connects to who listens for host port `port`, without waiting: a listener whose queue is full refuses.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(Path::new(&path))?)?;
        Ok(UnixStream::from(socket))
    }
}

impl AsRawFd for HostSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the vsock socket was removed already");
        }
    }
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// A program that connected and has not said yet where to.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) stream: UnixStream,
    line: Vec<u8>,
}

/// What a greeting led to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Greeted {
    /// The line has not ended yet.
    Unfinished,
    /// The program wants this port of the guest.
    Port(u32),
    /// It wants nothing that can be understood.
    Nonsense,
}

impl Greeting {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on, up to the end of the line and not a byte further: what follows is the guest's.
    pub(super) fn read_on(&mut self) -> Greeted {
        let mut peeked = [0; MAX_LINE];
        let count = match recv(self.stream.as_raw_fd(), &mut peeked, MsgFlags::MSG_PEEK) {
            Ok(0) => return Greeted::Nonsense,
            Ok(count) => count,
            Err(error) if is_temporary(&error.into()) => return Greeted::Unfinished,
            Err(_) => return Greeted::Nonsense,
        };
        let end = peeked[..count].iter().position(|&byte| byte == b'\n');
        let taken = &mut peeked[..end.map_or(count, |end| end + 1)];
        if self.line.len() + taken.len() > MAX_LINE || self.stream.read_exact(taken).is_err() {
            return Greeted::Nonsense;
        }
        self.line.extend_from_slice(taken);
        match end {
            None => Greeted::Unfinished,
            Some(_) => parse(&self.line).map_or(Greeted::Nonsense, Greeted::Port),
        }
    }
}

/// The port of a `CONNECT <port>` line.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let command = words.next()?;
    let port = words.next()?;
    let plain = port.bytes().all(|byte| byte.is_ascii_digit());
    (command.eq_ignore_ascii_case("CONNECT") && plain && words.next().is_none()).then(|| port.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(b"CONNECT 1024\n", Some(1024))]
    #[case(b"connect 0\r\n", Some(0))]
    #[case(b"CONNECT 4294967295\n", Some(u32::MAX))]
    #[case(b"CONNECT 4294967296\n", None)]
    #[case(b"CONNECT +1\n", None)]
    #[case(b"CONNECT -1\n", None)]
    #[case(b"CONNECT\n", None)]
    #[case(b"CONNECT 1 2\n", None)]
    #[case(b"DISCONNECT 1\n", None)]
    #[case(b"\xff\n", None)]
    #[case(b"\n", None)]
    fn a_connect_line_names_one_port(#[case] line: &[u8], #[case] port: Option<u32>) {
        assert_eq!(parse(line), port);
    }
}
