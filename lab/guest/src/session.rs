//! One command between its start and its end: input in, output out, signals, and the status.

use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};

use lab_guest::wire::{Command, Frame, Kind, MAX_PAYLOAD, Size, Status, WINDOW, array};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::port::{Port, Received};
use crate::reactor::Reactor;
use crate::spawn::{kill_session, resize, spawn};
use crate::stream::{Output, Sink, Source};

/// Ends a terminal's input line, as if typed (Ctrl-D).
const END_OF_TRANSMISSION: u8 = 4;

/// A running command.
pub(crate) struct Running {
    session: u64,
    leader: Pid,
    reactor: Reactor,
    stdin: Sink,
    sources: Vec<(Kind, Source)>,
    terminal: Option<OwnedFd>,
    ending: Ending,
    status: Option<Status>,
    buffer: Vec<u8>,
}

/// How the driver's part in a command goes on.
enum Next {
    /// Something was done; look again.
    Progress,
    /// Everything would block.
    Wait,
    /// The driver has gone, or another one has come with this frame.
    Abandoned(Option<Frame>),
}

impl Running {
    /// Starts a command for a driver's session.
    pub(crate) fn start(session: u64, command: &Command) -> io::Result<Self> {
        let spawned = spawn(command)?;
        let reactor = Reactor::new()?;
        let leader = Pid::from_raw(i32::try_from(spawned.child.id()).map_err(io::Error::other)?);
        let ending = Ending::watch(spawned.child)?;
        reactor.watch(&ending.pipe)?;
        let mut sources = vec![(Kind::Stdout, Source::new(spawned.stdout, &reactor)?)];
        if let Some(stderr) = spawned.stderr {
            sources.push((Kind::Stderr, Source::new(stderr, &reactor)?));
        }
        Ok(Self {
            session,
            leader,
            stdin: Sink::new(spawned.stdin, &reactor)?,
            reactor,
            sources,
            terminal: spawned.terminal,
            ending,
            status: None,
            buffer: vec![0; MAX_PAYLOAD],
        })
    }

    /// Stays with the command until it has ended and all was reported, or until its driver has gone: then its
    /// session is killed. Answers the frame by which another driver took the port.
    pub(crate) fn attend(mut self, port: &mut Port) -> io::Result<Option<Frame>> {
        self.reactor.watch(&*port)?;
        loop {
            match self.step(port)? {
                Next::Abandoned(by) => {
                    if self.status.is_none() {
                        kill_session(self.leader);
                    }
                    port.forget();
                    return Ok(by);
                }
                Next::Progress => {}
                Next::Wait if self.sources.is_empty() && self.status.is_some() => {
                    let status = self.status.map(Status::to_bytes).unwrap_or_default();
                    port.queue(Kind::Exit, self.session, &status);
                    return Ok(None);
                }
                Next::Wait => self.reactor.wait()?,
            }
        }
    }

    fn step(&mut self, port: &mut Port) -> io::Result<Next> {
        let mut progress = false;
        match port.receive()? {
            Received::Frame(frame) if frame.kind == Kind::Hello => return Ok(Next::Abandoned(Some(frame))),
            Received::Frame(frame) if frame.session == self.session => {
                if !self.obey(&frame) {
                    return Ok(Next::Abandoned(None));
                }
                progress = true;
            }
            Received::Frame(_) => progress = true,
            Received::Nothing => {}
            Received::Closed => return Ok(Next::Abandoned(None)),
        }
        progress |= self.feed(port)?;
        progress |= self.note_ending();
        progress |= self.forward(port)?;
        Ok(if progress { Next::Progress } else { Next::Wait })
    }

    /// Does what the driver asks; false when it breaks the rules.
    fn obey(&mut self, frame: &Frame) -> bool {
        match frame.kind {
            Kind::Stdin => self.stdin.push(&frame.payload),
            Kind::StdinEnd if self.terminal.is_some() => self.stdin.push(&[END_OF_TRANSMISSION]),
            Kind::StdinEnd => self.stdin.end(),
            Kind::Signal => self.signal(&frame.payload),
            Kind::Resize => self.resize(&frame.payload),
            _ => {}
        }
        self.stdin.queued() <= WINDOW
    }

    fn signal(&self, payload: &[u8]) {
        let signal = array(Kind::Signal, payload).ok().map(i32::from_le_bytes).and_then(|n| Signal::try_from(n).ok());
        if let (Some(signal), None) = (signal, self.status) {
            // An error says that nobody is left to get it.
            let _ = killpg(self.leader, signal);
        }
    }

    fn resize(&self, payload: &[u8]) {
        if let (Some(terminal), Ok(size)) = (&self.terminal, serde_json::from_slice::<Size>(payload))
            && let Err(error) = resize(terminal, size)
        {
            eprintln!("lab-guest: Cannot resize a terminal: {error}");
        }
    }

    fn feed(&mut self, port: &mut Port) -> io::Result<bool> {
        let taken = u32::try_from(self.stdin.feed()?).unwrap_or(u32::MAX);
        if taken > 0 {
            port.queue(Kind::Credit, self.session, &taken.to_le_bytes());
        }
        Ok(taken > 0)
    }

    fn note_ending(&mut self) -> bool {
        if self.status.is_some() {
            return false;
        }
        self.status = self.ending.status();
        if self.status.is_none() {
            return false;
        }
        for (_, source) in &mut self.sources {
            source.command_ended();
        }
        true
    }

    /// Takes one piece of each output, once the port has taken the pieces before.
    fn forward(&mut self, port: &mut Port) -> io::Result<bool> {
        if !port.flush()? {
            return Ok(false);
        }
        let mut progress = false;
        let mut at = 0;
        while at < self.sources.len() {
            let (kind, source) = &mut self.sources[at];
            match source.read(&mut self.buffer)? {
                Output::Bytes(count) => {
                    port.queue(*kind, self.session, &self.buffer[..count]);
                    progress = true;
                }
                Output::Nothing => {}
                Output::Ended => {
                    drop(self.sources.remove(at));
                    progress = true;
                    continue;
                }
            }
            at += 1;
        }
        Ok(progress)
    }
}

/// Tells when a child has ended and how: a pipe becomes readable (its end) after the status is there.
struct Ending {
    statuses: Receiver<Status>,
    pipe: PipeReader,
}

impl Ending {
    fn watch(mut child: Child) -> io::Result<Self> {
        let (pipe, done) = io::pipe()?;
        let (report, statuses) = channel();
        std::thread::Builder::new().name("wait".to_owned()).spawn(move || {
            let status = match child.wait() {
                Ok(status) => {
                    status.code().map_or_else(|| Status::Signalled(status.signal().unwrap_or_default()), Status::Exited)
                }
                // Only when somebody else has reaped it, which nobody in this process does.
                Err(_) => Status::Exited(255),
            };
            // No receiver: the driver has gone, and nobody asks any more.
            let _ = report.send(status);
            drop(done);
        })?;
        Ok(Self { statuses, pipe })
    }

    fn status(&self) -> Option<Status> {
        self.statuses.try_recv().ok()
    }
}
