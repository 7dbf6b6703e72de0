//! The pumps between containerd's FIFOs and the guest's streams.
//!
//! Backpressure is the kernel's: a pump reads only what the other side has taken. A pump holds a buffer only while bytes
//! are on their way, so an idle container costs none.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocols::STREAM_SCHEME;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::streams::{Opening, Streams};
use crate::error::Error;
use crate::host::fifo::{self, Input, Output};

/// One read at most (bytes): half of a pipe, so that a reader that lags by one turn finds room.
const CHUNK: usize = 32 << 10;

/// The stdio of a process as containerd named it.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// `stdin` of the request.
    pub stdin: String,
    /// `stdout` of the request.
    pub stdout: String,
    /// `stderr` of the request; with a terminal there is none.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// After the guest has forgotten a process, a pump that has nothing to write waits for nothing but a descendant that
/// keeps the stream open. containerd's own shim gives it as long.
const QUIET_DEADLINE: Duration = Duration::from_secs(2);
/// A reader that takes nothing for so long has given up.
const READER_DEADLINE: Duration = Duration::from_secs(60);

/// What an output pump is doing.
#[derive(Debug, Default)]
struct Flow {
    /// Bytes that the reader took.
    written: AtomicU64,
    /// Whether bytes wait for the reader.
    writing: AtomicBool,
    /// Told when the output has ended and nobody has come to read it.
    lonely: Notify,
    /// Told when nobody will come.
    unwanted: Notify,
}

/// The moment of the first output byte, in nanoseconds of CLOCK_MONOTONIC; 0 before it.
#[derive(Debug, Default)]
pub struct FirstByte(AtomicU64);

impl FirstByte {
    fn mark(&self) {
        if self.0.load(Ordering::Relaxed) == 0 {
            self.0.store(timeline::now_ns(), Ordering::Relaxed);
        }
    }

    /// When it was, once it was.
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }
}

/// The input of a process.
#[derive(Debug, Default)]
enum Inlet {
    /// There is none, or it is over.
    #[default]
    Closed,
    /// Not opened before the process starts: a client that hits the end of its own input while `Create` is under way has
    /// no task yet that it could call `CloseIO` of, and holds back only as long as nobody reads.
    Waiting { path: PathBuf, opening: Opening, ended: bool },
    /// Being pumped; without `keep_open` to its end.
    Open { keep_open: Option<pipe::Sender>, pump: JoinHandle<()> },
}

/// The running pumps of one process.
#[derive(Debug, Default)]
pub struct Pumps {
    streams: Option<Arc<Streams>>,
    ids: Vec<u64>,
    input: Mutex<Inlet>,
    outputs: Mutex<Vec<(Arc<Flow>, JoinHandle<()>)>>,
}

impl Pumps {
    /// Opens what the names say and starts a pump for each; the pumps wait for the guest's streams. Returns the names
    /// for the guest.
    ///
    /// # Errors
    ///
    /// [`Error`] of the first name that cannot be opened; no pump runs then.
    pub async fn start(names: &Names, streams: &Arc<Streams>, first: &Arc<FirstByte>) -> Result<(Names, Self), Error> {
        let input = fifo::check_input(&names.stdin)?;
        let stdout = fifo::open_output(&names.stdout).await?;
        let stderr = if names.terminal { None } else { fifo::open_output(&names.stderr).await? };

        let mut pumps = Self::default();
        pumps.streams = Some(Arc::clone(streams));
        let mut guest = Names { terminal: names.terminal, ..Names::default() };
        if let Some(path) = input {
            let opening = pumps.expect(streams, &mut guest.stdin);
            *pumps.input() = Inlet::Waiting { path, opening, ended: false };
        }
        for (output, name) in [(stdout, &mut guest.stdout), (stderr, &mut guest.stderr)] {
            if let Some(output) = output {
                let opening = pumps.expect(streams, name);
                let flow = Arc::<Flow>::default();
                let pump = tokio::spawn(pump_out(opening, output, Arc::clone(first), Arc::clone(&flow)));
                pumps.outputs.get_mut().unwrap_or_else(PoisonError::into_inner).push((flow, pump));
            }
        }
        Ok((guest, pumps))
    }

    fn expect(&mut self, streams: &Streams, name: &mut String) -> Opening {
        let (id, opening) = streams.expect();
        *name = format!("{STREAM_SCHEME}{id}");
        self.ids.push(id);
        opening
    }

    /// Begins to read the input of a process that is about to start.
    ///
    /// # Errors
    ///
    /// [`Error`] when it cannot be opened.
    pub fn open_input(&self) -> Result<(), Error> {
        let mut inlet = self.input();
        match std::mem::take(&mut *inlet) {
            Inlet::Waiting { path, opening, ended } => {
                let Input { reader, keep_open } = fifo::open_input(&path)?;
                let pump = tokio::spawn(pump_in(reader, opening));
                *inlet = Inlet::Open { keep_open: Some(keep_open).filter(|_| !ended), pump };
            }
            other => *inlet = other,
        }
        Ok(())
    }

    /// The client has no more input (`CloseIO`): the process sees the end of file once everything is read.
    pub fn close_input(&self) {
        match &mut *self.input() {
            Inlet::Closed => {}
            Inlet::Waiting { ended, .. } => *ended = true,
            Inlet::Open { keep_open, .. } => drop(keep_open.take()),
        }
    }

    fn input(&self) -> MutexGuard<'_, Inlet> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn abort_input(&self) {
        if let Inlet::Open { pump, .. } = std::mem::take(&mut *self.input()) {
            pump.abort();
        }
    }

    /// Waits until all output of a forgotten process is written, for as long as its reader takes any; then everything is
    /// closed.
    pub async fn finish(&self) {
        let outputs = std::mem::take(&mut *self.outputs.lock().unwrap_or_else(PoisonError::into_inner));
        for (flow, pump) in outputs {
            finish_output(&flow, pump).await;
        }
        self.abort_input();
    }
}

async fn finish_output(flow: &Flow, mut pump: JoinHandle<()>) {
    let mut stalled = Duration::ZERO;
    loop {
        let before = flow.written.load(Ordering::Relaxed);
        tokio::select! {
            _ = &mut pump => return,
            // The client wants no more of it, or it would not delete the process.
            () = flow.lonely.notified() => {
                flow.unwanted.notify_one();
                continue;
            }
            () = tokio::time::sleep(QUIET_DEADLINE) => {}
        }
        let progressed = flow.written.load(Ordering::Relaxed) != before;
        stalled = if progressed { Duration::ZERO } else { stalled + QUIET_DEADLINE };
        let writing = flow.writing.load(Ordering::Relaxed);
        if !progressed && (!writing || stalled >= READER_DEADLINE) {
            if writing {
                tracing::warn!("nobody reads the rest of a process's output; it is lost");
            }
            pump.abort();
            return;
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        self.abort_input();
        for (_, pump) in self.outputs.get_mut().unwrap_or_else(PoisonError::into_inner) {
            pump.abort();
        }
        if let Some(streams) = &self.streams {
            for id in &self.ids {
                streams.cancel(*id);
            }
        }
    }
}

async fn pump_in(reader: pipe::Receiver, opening: Opening) {
    let Ok(mut stream) = opening.await else { return };
    let result: std::io::Result<()> = async {
        loop {
            reader.readable().await?;
            let mut buffer = Vec::with_capacity(CHUNK);
            match reader.try_read_buf(&mut buffer) {
                Ok(0) => return stream.shutdown().await,
                Ok(_) => stream.write_all(&buffer).await?,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
    .await;
    // A process that ends or closes its input early is none of our business.
    if let Err(error) = result {
        tracing::debug!(%error, "the input of a process ended");
        return;
    }
    // The guest may still read: the stream lives until the guest closes it.
    wait_closed(&stream).await;
}

/// Waits until the peer has closed the stream; input streams carry nothing towards the host.
async fn wait_closed(stream: &UnixStream) {
    let mut buffer = [0; 64];
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut buffer) {
            Ok(count) if count > 0 => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// Writes all of `bytes`, and counts what was taken.
async fn write(output: &mut Output, mut bytes: &[u8], flow: &Flow) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let count = match output {
            Output::Fifo(fifo) => fifo.write(bytes).await?,
            Output::File(file) => file.write(bytes).await?,
        };
        flow.written.fetch_add(count as u64, Ordering::Relaxed);
        bytes = &bytes[count..];
    }
    Ok(())
}

async fn pump_out(opening: Opening, mut output: Output, first: Arc<FirstByte>, flow: Arc<Flow>) {
    let Ok(stream) = opening.await else { return };
    let result: std::io::Result<()> = async {
        loop {
            stream.readable().await?;
            let mut buffer = Vec::with_capacity(CHUNK);
            match stream.try_read_buf(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {
                    first.mark();
                    flow.writing.store(true, Ordering::Relaxed);
                    write(&mut output, &buffer, &flow).await?;
                    flow.writing.store(false, Ordering::Relaxed);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
    .await;
    if let Err(error) = result {
        tracing::warn!(%error, "the output of a process ended early");
    }
    let closed = match output {
        // Its writes are queued; dropping it would lose the last one.
        Output::File(mut file) => file.flush().await,
        Output::Fifo(fifo) => fifo::leave_to_reader(fifo, &flow.lonely, &flow.unwanted).await,
    };
    if let Err(error) = closed {
        tracing::warn!(%error, "the output of a process was not written whole");
    }
}
