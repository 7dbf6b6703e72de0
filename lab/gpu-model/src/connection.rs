//! A stream of messages with descriptors.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::protocol::{HEADER, Header, MAX_DESCRIPTORS};

/// A message as it came.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A client's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Waits for the next message; none when the client has gone. An error says that what comes is no message.
    pub(crate) fn receive(&mut self) -> io::Result<Option<Message>> {
        let mut bytes = [0; HEADER];
        let (count, descriptors) = self.receive_some(&mut bytes)?;
        if count == 0 {
            return Ok(None);
        }
        self.stream.read_exact(&mut bytes[count..])?;
        let header = Header::parse(&bytes);
        let length = header.payload().ok_or_else(|| bad("a message of impossible size"))?;
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload)?;
        Ok(Some(Message { header, payload, descriptors }))
    }

    /// The first bytes of a message, which its descriptors come with.
    fn receive_some(&self, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = loop {
            match recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut control), flags) {
                Err(nix::errno::Errno::EINTR) => {}
                received => break received?,
            }
        };
        let mut descriptors = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows them.
                descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        if received.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(bad("a message with too many descriptors"));
        }
        Ok((received.bytes, descriptors))
    }

    /// Sends a message, with a descriptor if there is one.
    pub(crate) fn send(&mut self, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let sent = match descriptor {
            None => 0,
            Some(descriptor) => {
                let numbers = [descriptor.as_raw_fd()];
                let control = [ControlMessage::ScmRights(&numbers)];
                let parts = [IoSlice::new(message)];
                sendmsg::<()>(self.stream.as_raw_fd(), &parts, &control, MsgFlags::MSG_NOSIGNAL, None)?
            }
        };
        self.stream.write_all(&message[sent..])
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
