//! The ends of a command's pipes or terminal that the server holds.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::reactor::Reactor;

/// Bytes that may still wait in a pipe or terminal when its command has ended: the kernel's default pipe size.
const PIPE_SIZE: usize = 64 * 1024;

/// Makes reads and writes on `fd` answer instead of wait.
fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// What a try to read brought.
pub(crate) enum Output {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing any more.
    Ended,
}

/// Where a command's output is read.
pub(crate) struct Source {
    file: File,
    /// Bytes still taken after the command's end.
    remaining: Option<usize>,
}

impl Source {
    pub(crate) fn new(fd: OwnedFd, reactor: &Reactor) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        reactor.watch(&fd)?;
        Ok(Self { file: File::from(fd), remaining: None })
    }

    /// The command has ended: what it wrote is in the pipe already. A child that it left behind may hold the pipe
    /// open and go on writing; no more than a pipe's worth is read from now on.
    pub(crate) fn command_ended(&mut self) {
        self.remaining = Some(PIPE_SIZE);
    }

    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Output> {
        let limit = self.remaining.unwrap_or(buffer.len()).min(buffer.len());
        if limit == 0 {
            return Ok(Output::Ended);
        }
        match self.file.read(&mut buffer[..limit]) {
            Ok(0) => Ok(Output::Ended),
            Ok(count) => {
                self.remaining = self.remaining.map(|remaining| remaining - count);
                Ok(Output::Bytes(count))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok(if self.remaining.is_some() { Output::Ended } else { Output::Nothing })
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Output::Nothing),
            // How a terminal says that its last process has closed it.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Output::Ended),
            Err(error) => Err(error),
        }
    }
}

/// Where a command's input is written.
pub(crate) struct Sink {
    file: Option<File>,
    queue: VecDeque<u8>,
    ending: bool,
}

impl Sink {
    pub(crate) fn new(fd: OwnedFd, reactor: &Reactor) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        reactor.watch(&fd)?;
        Ok(Self { file: Some(File::from(fd)), queue: VecDeque::new(), ending: false })
    }

    /// Queues input.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.queue.extend(bytes);
    }

    /// Ends the input once the queue is empty.
    pub(crate) fn end(&mut self) {
        self.ending = true;
    }

    /// How much waits for the command to take it.
    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Writes what the command takes; answers the number of bytes that left the queue.
    pub(crate) fn feed(&mut self) -> io::Result<usize> {
        let mut taken = 0;
        while let (Some(file), false) = (&mut self.file, self.queue.is_empty()) {
            match file.write(self.queue.as_slices().0) {
                Ok(count) => {
                    self.queue.drain(..count);
                    taken += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody reads any more; that is the command's right.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EIO)) => self.file = None,
                Err(error) => return Err(error),
            }
        }
        if self.file.is_none() {
            taken += self.queue.len();
            self.queue.clear();
        }
        if self.ending && self.queue.is_empty() {
            self.file = None;
        }
        Ok(taken)
    }
}
