//! The control socket: a running machine is changed by JSON messages over a unix socket, one line each way.
//!
//! A request is an object with one key, the name of the operation: `{"info":{}}`, `{"resize_vcpus":{"count":2}}`,
//! `{"add_device":{"device":{"blk":{"path":"/x.img","read_only":false}}}}`. The answer is `{"ok":…}` or
//! `{"error":"…"}`. A connection may carry many requests, each answered before the next is read; several connections
//! work side by side. Who may write to the socket may do everything: it is made for its owner alone.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};

use crate::causes;
use crate::config::DeviceConfig;
use crate::manage::{
    BalloonSize, ChangeError, DEFAULT_DEADLINE, DeviceInfo, MachineInfo, Manager, MemorySize, MemoryTypesInfo,
    VcpuCount,
};
use crate::threads;

/// The longest request in bytes.
const REQUEST_MAX: u64 = 64 << 10;
/// The longest answer that a client takes, in bytes.
const ANSWER_MAX: u64 = 1 << 20;
/// The most connections at a time.
const CONNECTIONS_MAX: usize = 16;

/// What can be asked of a machine.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ControlRequest {
    /// Add a device.
    AddDevice {
        /// Its name; chosen by the machine where none is given.
        #[serde(default)]
        name: Option<String>,
        /// The device.
        device: DeviceConfig,
        /// How long the guest gets, in milliseconds.
        #[serde(default = "default_deadline_ms")]
        deadline_ms: u32,
    },
    /// Remove a device.
    RemoveDevice {
        /// Its name.
        name: String,
        /// How long the guest gets, in milliseconds.
        #[serde(default = "default_deadline_ms")]
        deadline_ms: u32,
    },
    /// Have this many vCPUs.
    ResizeVcpus {
        /// How many.
        count: u8,
        /// How long the guest gets, in milliseconds.
        #[serde(default = "default_deadline_ms")]
        deadline_ms: u32,
    },
    /// Have this much memory.
    ResizeMemory {
        /// How much, in bytes.
        bytes: u64,
        /// How long the guest gets, in milliseconds.
        #[serde(default = "default_deadline_ms")]
        deadline_ms: u32,
    },
    /// Give this much memory back by the balloon.
    Balloon {
        /// How much, in bytes.
        bytes: u64,
        /// How long the guest gets, in milliseconds.
        #[serde(default = "default_deadline_ms")]
        deadline_ms: u32,
    },
    /// Press the power button.
    PowerButton {},
    /// Let the vCPUs stand still.
    Pause {},
    /// Let them run again.
    Resume {},
    /// Say what the machine consists of.
    Info {},
    /// Say which memory types the vCPUs give to the machine's ranges.
    MemoryTypes {},
}

fn default_deadline_ms() -> u32 {
    u32::try_from(DEFAULT_DEADLINE.as_millis()).unwrap_or(u32::MAX)
}

fn milliseconds(count: u32) -> Duration {
    Duration::from_millis(u64::from(count))
}

/// What a machine answers when it did as asked.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlAnswer {
    /// There is nothing more to say.
    Done,
    /// The device that was added.
    Device(DeviceInfo),
    /// How many vCPUs there are.
    Vcpus(VcpuCount),
    /// How much memory there is.
    Memory(MemorySize),
    /// How the balloon is.
    Balloon(BalloonSize),
    /// What the machine consists of.
    Machine(MachineInfo),
    /// Which memory types there are.
    MemoryTypes(MemoryTypesInfo),
}

/// One line of the answering side.
#[derive(Debug, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Ok(ControlAnswer),
    Error(String),
}

/// Why a request got no answer, or a bad one.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no machine behind the socket.
    #[error("There is no machine at {}: give the path that it was started with by --control", path.display())]
    Connect {
        /// The socket.
        path: std::path::PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("The machine did not answer; it may have ended")]
    Broken(#[source] io::Error),
    /// The machine refused.
    #[error("{0}")]
    Refused(String),
}

/// Listens at `path`, which only this user can connect to.
///
/// # Errors
/// When something exists at the path, or it is too long.
pub fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // The mode of the socket that is not bound yet becomes the file's: nobody else can connect at any instant.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(8)?)?;
    Ok(UnixListener::from(fd))
}

/// Answers at `listener` in a thread of its own, for the rest of the process's life.
///
/// # Errors
/// When the host has no thread left.
pub fn serve(listener: UnixListener, manager: Manager) -> io::Result<()> {
    threads::spawn("control", move || accept_all(&listener, &manager)).map(drop)
}

fn accept_all(listener: &UnixListener, manager: &Manager) {
    let connections = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket takes no more connections");
                return;
            }
        };
        if connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            connections.fetch_sub(1, Ordering::AcqRel);
            let _ = write_line(&stream, &Line::Error(format!("{CONNECTIONS_MAX} clients are connected: try later")));
            continue;
        }
        let (manager, open) = (manager.clone(), Arc::clone(&connections));
        let spawned = threads::spawn("control-client", move || {
            if let Err(error) = answer_all(&stream, &manager) {
                tracing::debug!(%error, "a client of the control socket is gone");
            }
            open.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = spawned {
            connections.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "a client of the control socket is not served");
        }
    }
}

/// Answers one request after the other until the client hangs up or sends something that is none.
fn answer_all(stream: &UnixStream, manager: &Manager) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let count = (&mut reader).take(REQUEST_MAX).read_until(b'\n', &mut line)?;
        if count == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            let text = format!("a request is one line of at most {REQUEST_MAX} bytes");
            return write_line(stream, &Line::Error(text));
        }
        let answer = match serde_json::from_slice(&line) {
            Ok(request) => carry_out(request, manager)
                .map_or_else(|error| Line::Error(causes::joined(&error, "; because: ")), Line::Ok),
            Err(error) => Line::Error(format!("not a request: {error}")),
        };
        write_line(stream, &answer)?;
    }
}

fn carry_out(request: ControlRequest, manager: &Manager) -> Result<ControlAnswer, ChangeError> {
    let done = |result: Result<(), ChangeError>| result.map(|()| ControlAnswer::Done);
    match request {
        ControlRequest::AddDevice { name, device, deadline_ms } => {
            manager.add_device(name, &device, milliseconds(deadline_ms)).map(ControlAnswer::Device)
        }
        ControlRequest::RemoveDevice { name, deadline_ms } => {
            done(manager.remove_device(&name, milliseconds(deadline_ms)))
        }
        ControlRequest::ResizeVcpus { count, deadline_ms } => {
            manager.resize_vcpus(count, milliseconds(deadline_ms)).map(ControlAnswer::Vcpus)
        }
        ControlRequest::ResizeMemory { bytes, deadline_ms } => {
            manager.resize_memory(bytes, milliseconds(deadline_ms)).map(ControlAnswer::Memory)
        }
        ControlRequest::Balloon { bytes, deadline_ms } => {
            manager.set_balloon(bytes, milliseconds(deadline_ms)).map(ControlAnswer::Balloon)
        }
        ControlRequest::PowerButton {} => done(manager.press_power_button()),
        ControlRequest::Pause {} => done(manager.pause()),
        ControlRequest::Resume {} => done(manager.resume()),
        ControlRequest::Info {} => manager.info().map(ControlAnswer::Machine),
        ControlRequest::MemoryTypes {} => manager.memory_types().map(ControlAnswer::MemoryTypes),
    }
}

fn write_line(mut stream: &UnixStream, line: &Line) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    stream.write_all(&bytes)
}

/// Asks the machine behind the socket at `path`, and waits for its answer.
///
/// # Errors
/// [`ControlError`].
pub fn ask(path: &Path, request: &ControlRequest) -> Result<ControlAnswer, ControlError> {
    let mut stream =
        UnixStream::connect(path).map_err(|source| ControlError::Connect { path: path.to_path_buf(), source })?;
    let mut bytes = serde_json::to_vec(request).map_err(|error| ControlError::Broken(error.into()))?;
    bytes.push(b'\n');
    stream.write_all(&bytes).map_err(ControlError::Broken)?;
    let mut line = Vec::new();
    BufReader::new(stream).take(ANSWER_MAX).read_until(b'\n', &mut line).map_err(ControlError::Broken)?;
    match serde_json::from_slice(&line) {
        Ok(Line::Ok(answer)) => Ok(answer),
        Ok(Line::Error(text)) => Err(ControlError::Refused(text)),
        Err(error) => Err(ControlError::Broken(error.into())),
    }
}
