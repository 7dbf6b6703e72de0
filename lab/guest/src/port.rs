//! One command port: frames in, frames out, and whether a driver is there.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use lab_guest::wire::{Decoder, Frame, Kind};

/// What a try to receive brought.
pub(crate) enum Received {
    /// A frame.
    Frame(Frame),
    /// Nothing yet.
    Nothing,
    /// No driver is connected.
    Closed,
}

/// A virtio-serial port.
pub(crate) struct Port {
    file: File,
    decoder: Decoder,
    outgoing: VecDeque<Vec<u8>>,
    buffer: Vec<u8>,
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Port {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(Self { file, decoder: Decoder::default(), outgoing: VecDeque::new(), buffer: vec![0; 64 * 1024] })
    }

    /// The next frame if it is there.
    pub(crate) fn receive(&mut self) -> io::Result<Received> {
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) => return Ok(Received::Frame(frame)),
                Ok(None) => {}
                // Not ours: whatever sent it will not understand an answer either.
                Err(error) => eprintln!("lab-guest: {error}"),
            }
            match self.file.read(&mut self.buffer) {
                // The driver in the kernel reads nothing only while the other side is closed. It may also be just
                // opening: its first bytes can come before the news that it is open. So what is queued stays.
                Ok(0) => return Ok(Received::Closed),
                Ok(count) => self.decoder.push(&self.buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Queues a frame; [`Self::flush`] sends it.
    pub(crate) fn queue(&mut self, kind: Kind, session: u64, payload: &[u8]) {
        match Frame::encode(kind, session, payload) {
            Ok(bytes) => self.outgoing.push_back(bytes),
            Err(error) => eprintln!("lab-guest: {error}"),
        }
    }

    /// Forgets queued frames: their driver has gone.
    pub(crate) fn forget(&mut self) {
        self.outgoing.clear();
    }

    /// Sends queued frames; true when none is left, false when the port is full.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        while let Some(frame) = self.outgoing.front() {
            match self.file.write(frame) {
                // A full port takes nothing; a frame goes whole or not at all (see `wire::MAX_FRAME`).
                Ok(0) => return Ok(false),
                Ok(_) => drop(self.outgoing.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
