//! Commands in a machine: what to run, while it runs, and what came of it.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lab_guest::wire::{self, Frame, Kind, MAX_PAYLOAD, Size, Status, WINDOW, array};

use crate::connection::Connection;
use crate::error::Error;

/// A command to run in a machine, as root, in `/root`, with the machine's own environment.
#[derive(Clone, Debug)]
pub struct Command {
    pub(crate) wire: wire::Command,
    limit: Option<Duration>,
}

impl Command {
    /// A program, looked up in the machine's search path.
    #[must_use]
    pub fn new(program: impl Into<String>) -> Self {
        let wire = wire::Command { arguments: vec![program.into()], ..wire::Command::default() };
        Self { wire, limit: None }
    }

    /// A script for the machine's bash.
    #[must_use]
    pub fn shell(script: impl Into<String>) -> Self {
        Self::new("bash").arg("-c").arg(script)
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.wire.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.wire.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.wire.environment.insert(name.into(), value.into());
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn directory(mut self, path: impl Into<String>) -> Self {
        self.wire.directory = Some(path.into());
        self
    }

    /// Gives it a terminal; its standard error comes with its standard output then.
    #[must_use]
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.wire.terminal = Some(Size { rows, columns });
        self
    }

    /// Kills it and answers [`Error::Timeout`] when it takes longer than this, in the host's time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.wire.arguments.join(" "))
    }
}

/// A command's standard input.
#[derive(Default)]
pub enum Input {
    /// It ends at once.
    #[default]
    Empty,
    /// These bytes.
    Bytes(Vec<u8>),
    /// What this reads. The reader may be left in the middle of a read when the command ends first.
    Reader(Box<dyn Read + Send>),
}

impl std::fmt::Debug for Input {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Empty => "Empty",
            Self::Bytes(_) => "Bytes",
            Self::Reader(_) => "Reader",
        })
    }
}

impl From<&str> for Input {
    fn from(text: &str) -> Self {
        Self::Bytes(text.as_bytes().to_vec())
    }
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: Status,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// What was run, for messages.
    pub command: String,
}

impl Output {
    /// Whether it exited with 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == Status::Exited(0)
    }

    /// Its standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Itself if it exited with 0.
    ///
    /// # Errors
    /// [`Error::Command`] with its standard error otherwise.
    pub fn check(self) -> Result<Self, Error> {
        if self.success() {
            return Ok(self);
        }
        let stderr = String::from_utf8_lossy(&self.stderr).trim().to_owned();
        Err(Error::Command { command: self.command, code: self.status.code(), stderr })
    }
}

/// What a running command does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It ended; nothing comes after this.
    Ended(Status),
}

/// A running command. When this is dropped before the command has ended, the command's session is killed.
#[derive(Debug)]
pub struct Process {
    connection: Connection,
    handle: Handle,
    credit: Arc<Credit>,
    deadline: Option<(Instant, Duration)>,
    description: String,
}

impl Process {
    pub(crate) fn start(connection: Connection, command: &Command, input: Input) -> Result<Self, Error> {
        let handle = Handle { writer: Arc::new(Mutex::new(connection.writer()?)), session: connection.session() };
        let request = serde_json::to_vec(&command.wire).unwrap_or_default();
        handle.send(Kind::Run, &request)?;
        let credit = Arc::new(Credit::default());
        let process = Self {
            connection,
            handle: handle.clone(),
            credit: Arc::clone(&credit),
            deadline: command.limit.map(|limit| (Instant::now() + limit, limit)),
            description: command.to_string(),
        };
        let pump = Pump { handle, credit };
        match input {
            Input::Empty => pump.handle.send(Kind::StdinEnd, &[])?,
            Input::Bytes(bytes) => pump.spawn(Box::new(std::io::Cursor::new(bytes))),
            Input::Reader(reader) => pump.spawn(reader),
        }
        Ok(process)
    }

    /// Something that sends signals and sizes to the command, from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits for what the command does next.
    ///
    /// # Errors
    /// When the command cannot be run, takes longer than its limit, or the connection breaks.
    pub fn next_event(&mut self) -> Result<Event, Error> {
        loop {
            let (deadline, limit) = self.deadline.unzip();
            let frame = self.connection.receive(deadline)?.ok_or_else(|| Error::Timeout {
                what: format!("`{}` in the machine", self.description),
                limit: limit.unwrap_or_default(),
            })?;
            if let Some(event) = self.event(frame)? {
                return Ok(event);
            }
        }
    }

    fn event(&self, frame: Frame) -> Result<Option<Event>, Error> {
        match frame.kind {
            Kind::Stdout => Ok(Some(Event::Stdout(frame.payload))),
            Kind::Stderr => Ok(Some(Event::Stderr(frame.payload))),
            Kind::Exit => Ok(Some(Event::Ended(Status::from_bytes(&frame.payload)?))),
            Kind::Refused => Err(Connection::refusal(&frame)),
            Kind::Credit => {
                self.credit.grant(u32::from_le_bytes(array(Kind::Credit, &frame.payload)?) as usize);
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Waits for the command's end; calls `on_event` with its output as it comes.
    ///
    /// # Errors
    /// As [`Self::next_event`].
    pub fn stream(mut self, mut on_event: impl FnMut(Event)) -> Result<Status, Error> {
        loop {
            match self.next_event()? {
                Event::Ended(status) => return Ok(status),
                event => on_event(event),
            }
        }
    }

    /// Waits for the command's end and answers all that it wrote.
    ///
    /// # Errors
    /// As [`Self::next_event`].
    pub fn output(self) -> Result<Output, Error> {
        let (mut stdout, mut stderr, command) = (Vec::new(), Vec::new(), self.description.clone());
        let status = self.stream(|event| match event {
            Event::Stdout(bytes) => stdout.extend(bytes),
            Event::Stderr(bytes) => stderr.extend(bytes),
            Event::Ended(_) => {}
        })?;
        Ok(Output { status, stdout, stderr, command })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.credit.close();
        // The pump may still hold the stream, in the middle of a read; the machine must see the end now. An error
        // says that the connection is closed already.
        let _ = self.handle.writer().shutdown(Shutdown::Both);
    }
}

/// Sends signals and terminal sizes to a running command.
#[derive(Clone, Debug)]
pub struct Handle {
    writer: Arc<Mutex<UnixStream>>,
    session: u64,
}

impl Handle {
    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        self.send(Kind::Signal, &signal.to_le_bytes())
    }

    /// Sets the size of the command's terminal.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn resize(&self, size: Size) -> Result<(), Error> {
        self.send(Kind::Resize, &serde_json::to_vec(&size).unwrap_or_default())
    }

    fn writer(&self) -> MutexGuard<'_, UnixStream> {
        // A panic elsewhere leaves the stream as usable as it was.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, kind: Kind, payload: &[u8]) -> Result<(), Error> {
        let frame = Frame::encode(kind, self.session, payload)?;
        std::io::Write::write_all(&mut *self.writer(), &frame).map_err(Error::Connection)
    }
}

/// How many bytes of input the machine takes now.
#[derive(Debug)]
struct Credit {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Default for Credit {
    fn default() -> Self {
        Self { state: Mutex::new((WINDOW, true)), changed: Condvar::new() }
    }
}

impl Credit {
    fn grant(&self, bytes: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = (state.0 + bytes).min(WINDOW);
        self.changed.notify_all();
    }

    fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = false;
        self.changed.notify_all();
    }

    /// Waits until something may be sent and takes up to `most` bytes of it; none when the command has ended.
    fn take(&self, most: usize) -> Option<usize> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self
            .changed
            .wait_while(state, |(bytes, open)| *bytes == 0 && *open)
            .unwrap_or_else(PoisonError::into_inner);
        let (bytes, open) = *state;
        let taken = bytes.min(most);
        state.0 -= taken;
        open.then_some(taken)
    }
}

/// Carries a reader's bytes to the command.
struct Pump {
    handle: Handle,
    credit: Arc<Credit>,
}

impl Pump {
    fn spawn(self, reader: Box<dyn Read + Send>) {
        // Ends with its reader, with the command's credit or with the connection; nobody waits for it.
        std::thread::spawn(move || self.carry(reader));
    }

    fn carry(&self, mut reader: Box<dyn Read + Send>) {
        let mut buffer = vec![0; MAX_PAYLOAD];
        loop {
            let count = match reader.read(&mut buffer) {
                // What cannot be read any more ends as a closed pipe does.
                Ok(0) | Err(_) => break,
                Ok(count) => count,
            };
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let Some(taken) = self.credit.take(rest.len()) else { return };
                let (now, later) = rest.split_at(taken);
                if self.handle.send(Kind::Stdin, now).is_err() {
                    return;
                }
                rest = later;
            }
        }
        // An error says that the command has ended.
        let _ = self.handle.send(Kind::StdinEnd, &[]);
    }
}
