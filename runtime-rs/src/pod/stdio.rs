//! The pumps between containerd's FIFOs and the guest's streams.
//!
//! Backpressure is the kernel's: a pump reads only what the other side has taken. A pump holds a buffer only while bytes
//! are on their way, so an idle container costs none.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocols::STREAM_SCHEME;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use super::outlet::Outlet;
use super::streams::{Opening, Streams};
use crate::error::Error;
use crate::host::fifo::{self, Input};

/// One read at most (bytes): half of a pipe, so that a reader that lags by one turn finds room.
pub(super) const CHUNK: usize = 32 << 10;

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

/// The moment of the first output byte, in nanoseconds of CLOCK_MONOTONIC; 0 before it.
#[derive(Debug, Default)]
pub struct FirstByte(AtomicU64);

impl FirstByte {
    pub(super) fn mark(&self) {
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
    outputs: Mutex<Vec<Outlet>>,
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
                pumps.outputs().push(Outlet::start(opening, output, Arc::clone(first)));
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
        let outputs = std::mem::take(&mut *self.outputs());
        for outlet in outputs {
            outlet.finish().await;
        }
        self.abort_input();
    }

    /// Waits until the readers have what an ended process wrote, for as long as they take any: a client closes its end
    /// of the FIFOs as soon as it hears of the end, and what is still in them would be lost.
    ///
    /// What is left behind by an init ends with it, so that its streams end; an exec's descendants may hold theirs for
    /// ever, so that silence says as much.
    pub async fn hand_over(&self, quiet: Duration) {
        let flows: Vec<_> = self.outputs().iter().map(Outlet::flow).collect();
        futures::future::join_all(flows.iter().map(|flow| flow.handed_over(quiet))).await;
    }

    fn outputs(&self) -> MutexGuard<'_, Vec<Outlet>> {
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        self.abort_input();
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
