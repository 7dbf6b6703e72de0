//! A driver's connection to one of a machine's command ports.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lab_guest::wire::{Decoder, Frame, Kind, PADDING, Refusal};
use tool::io;

use crate::error::Error;
use crate::qemu::PORTS;
use crate::rundir::RunDir;

/// A session on a port. The port is this session's alone until it is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    buffer: Vec<u8>,
    session: u64,
    /// Unlocks when it is closed.
    _lock: File,
}

impl Connection {
    /// Begins a session on a free port; waits for a port when all are in use, and up to `limit` for the machine's
    /// answer.
    pub(crate) fn open(dir: &RunDir, limit: Duration) -> Result<Self, Error> {
        let (index, lock) = free_port(dir)?;
        let path = dir.port(index);
        let stream = UnixStream::connect(&path).map_err(|_| Error::NotRunning(dir.name().to_owned()))?;
        let mut connection = Self {
            stream,
            decoder: Decoder::default(),
            buffer: vec![0; 64 * 1024],
            session: new_session(),
            _lock: lock,
        };
        connection.stream.write_all(&[0; PADDING]).map_err(Error::Connection)?;
        connection.request(Kind::Hello, &[], limit)?;
        Ok(connection)
    }

    /// The session's number.
    pub(crate) fn session(&self) -> u64 {
        self.session
    }

    /// Another end of the same stream, to write to.
    pub(crate) fn writer(&self) -> Result<UnixStream, Error> {
        self.stream.try_clone().map_err(Error::Connection)
    }

    /// Sets the machine's clock to the host's.
    pub(crate) fn set_clock(&mut self, limit: Duration) -> Result<(), Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.request(Kind::SetClock, &nanoseconds.to_le_bytes(), limit)
    }

    /// Sends a request and waits until it is done.
    fn request(&mut self, kind: Kind, payload: &[u8], limit: Duration) -> Result<(), Error> {
        let frame = Frame::encode(kind, self.session, payload)?;
        self.stream.write_all(&frame).map_err(Error::Connection)?;
        let deadline = Instant::now() + limit;
        loop {
            let frame = self
                .receive(Some(deadline))?
                .ok_or_else(|| Error::Timeout { what: "The machine's command server".to_owned(), limit })?;
            match frame.kind {
                Kind::Ready => return Ok(()),
                Kind::Refused => return Err(Self::refusal(&frame)),
                _ => {}
            }
        }
    }

    /// The next frame of this session, or none by the deadline.
    pub(crate) fn receive(&mut self, deadline: Option<Instant>) -> Result<Option<Frame>, Error> {
        loop {
            match self.decoder.next_frame()? {
                Some(frame) if frame.session == self.session => return Ok(Some(frame)),
                // The end of what an earlier driver did not wait for.
                Some(_) => continue,
                None => {}
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.stream.set_read_timeout(left).map_err(Error::Connection)?;
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(Error::Connection(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.decoder.push(&self.buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Connection(error)),
            }
        }
    }

    /// The machine's reason in a refusing frame.
    pub(crate) fn refusal(frame: &Frame) -> Error {
        match serde_json::from_slice::<Refusal>(&frame.payload) {
            Ok(refusal) => Error::Refused { message: refusal.message, errno: refusal.errno },
            Err(error) => {
                Error::Refused { message: format!("The machine refuses without a reason: {error}"), errno: None }
            }
        }
    }
}

/// A port that no other driver uses, and the lock on it.
fn free_port(dir: &RunDir) -> Result<(usize, File), Error> {
    let open = |index| {
        let path = dir.port_lock(index);
        match File::options().create(true).truncate(false).write(true).open(&path) {
            Ok(file) => Ok(file),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::NotRunning(dir.name().to_owned())),
            Err(error) => Err(io("open", &path)(error).into()),
        }
    };
    for index in 0..PORTS {
        let lock = open(index)?;
        if lock.try_lock().is_ok() {
            return Ok((index, lock));
        }
    }
    // All are in use. Drivers that wait spread over the ports by their process number.
    let index = std::process::id() as usize % PORTS;
    let lock = open(index)?;
    lock.lock().map_err(io("lock", &dir.port_lock(index)))?;
    Ok((index, lock))
}

/// A number that no other session of the machine has: the hasher's keys are random.
fn new_session() -> u64 {
    RandomState::new().hash_one(std::process::id())
}
