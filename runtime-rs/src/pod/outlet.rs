//! One output of a process: the pump from the guest's stream to containerd's FIFO or file, and how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::stdio::{CHUNK, FirstByte};
use super::streams::Opening;
use crate::host::fifo::{self, Output, Reading};

/// After the guest has forgotten a process, a pump that has nothing to write waits for nothing but a descendant that
/// keeps the stream open. containerd's own shim gives it as long.
const QUIET_DEADLINE: Duration = Duration::from_secs(2);
/// The end of a process is told without a reader that takes nothing for so long.
const STALL_DEADLINE: Duration = Duration::from_secs(2);
/// A reader that takes nothing for so long has given up.
const READER_DEADLINE: Duration = Duration::from_secs(60);

/// How far an output is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// The guest may send more.
    #[default]
    Flowing,
    /// All of it is in the FIFO, and a reader is at it.
    BeingRead,
    /// All of it is in the FIFO, which nobody reads yet.
    Lonely,
    /// It is closed.
    Over,
}

/// What an output pump is doing.
#[derive(Debug, Default)]
pub(super) struct Flow {
    stage: watch::Sender<Stage>,
    /// Rises whenever bytes move.
    moves: AtomicU64,
    /// Whether bytes wait for the reader.
    writing: AtomicBool,
    /// Told when nobody waits for the reader any more.
    unwanted: Notify,
}

/// Why somebody who watched a flow gave it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stall {
    /// Nothing comes from the guest, and nothing waits.
    Quiet,
    /// The reader takes nothing.
    Reader,
}

impl Flow {
    /// Waits for a stage, for as long as bytes move: `quiet` is how long they may not come, `patience` how long they
    /// may not be taken.
    async fn reach(&self, wanted: impl Fn(Stage) -> bool, quiet: Duration, patience: Duration) -> Result<(), Stall> {
        let mut stage = self.stage.subscribe();
        let mut stalled = Duration::ZERO;
        loop {
            let before = self.moves.load(Ordering::Relaxed);
            match tokio::time::timeout(quiet, stage.wait_for(|stage| wanted(*stage))).await {
                // The sender lives as long as `self`.
                Ok(_) => return Ok(()),
                Err(_) if self.moves.load(Ordering::Relaxed) != before => stalled = Duration::ZERO,
                Err(_) if !self.awaits_reader() => return Err(Stall::Quiet),
                Err(_) => stalled += quiet,
            }
            if stalled >= patience {
                return Err(Stall::Reader);
            }
        }
    }

    fn awaits_reader(&self) -> bool {
        self.writing.load(Ordering::Relaxed) || *self.stage.borrow() == Stage::BeingRead
    }

    /// Waits until the reader has everything, if there is a reader and it takes any.
    pub(super) async fn handed_over(&self, quiet: Duration) {
        let handed_over = |stage| matches!(stage, Stage::Lonely | Stage::Over);
        if let Err(stall) = self.reach(handed_over, quiet, STALL_DEADLINE).await {
            tracing::debug!(?stall, "the end of a process is told before all of its output is read");
        }
    }

    fn moved(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }
}

impl Reading for Flow {
    fn nobody_reads(&self) {
        self.stage.send_replace(Stage::Lonely);
    }

    fn progressed(&self) {
        self.moved();
    }

    fn unwanted(&self) -> &Notify {
        &self.unwanted
    }
}

/// A running pump.
#[derive(Debug)]
pub(super) struct Outlet {
    flow: Arc<Flow>,
    pump: JoinHandle<()>,
}

impl Outlet {
    /// Pumps what comes by `opening` to `output`.
    pub(super) fn start(opening: Opening, output: Output, first: Arc<FirstByte>) -> Self {
        let flow = Arc::<Flow>::default();
        let pumped = Arc::clone(&flow);
        let pump = tokio::spawn(async move {
            if let Ok(stream) = opening.await {
                pump(stream, output, &first, &pumped).await;
            }
            pumped.stage.send_replace(Stage::Over);
        });
        Self { flow, pump }
    }

    /// How far it is.
    pub(super) fn flow(&self) -> Arc<Flow> {
        Arc::clone(&self.flow)
    }

    /// Waits until everything is written, for as long as the reader takes any, and closes it: what is in the FIFO then
    /// is its reader's.
    pub(super) async fn finish(mut self) {
        let written = |stage| stage != Stage::Flowing;
        match self.flow.reach(written, QUIET_DEADLINE, READER_DEADLINE).await {
            Ok(()) => {
                // Whoever deletes a process wants no more of its output.
                self.flow.unwanted.notify_one();
                if let Err(error) = (&mut self.pump).await {
                    tracing::warn!(%error, "an output of a process could not be closed");
                }
            }
            Err(Stall::Quiet) => {}
            Err(Stall::Reader) => tracing::warn!("nobody reads the rest of a process's output; it is lost"),
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

async fn pump(stream: tokio::net::UnixStream, mut output: Output, first: &FirstByte, flow: &Flow) {
    if let Err(error) = forward(&stream, &mut output, first, flow).await {
        tracing::warn!(%error, "the output of a process ended early");
    }
    let closed = match output {
        // Its writes are queued; dropping it would lose the last one.
        Output::File(mut file) => file.flush().await,
        Output::Fifo(fifo) => {
            flow.stage.send_replace(Stage::BeingRead);
            fifo::leave_to_reader(fifo, flow).await
        }
    };
    if let Err(error) = closed {
        tracing::warn!(%error, "the output of a process was not written whole");
    }
}

/// Writes what comes, until the guest ends it.
async fn forward(
    stream: &tokio::net::UnixStream,
    output: &mut Output,
    first: &FirstByte,
    flow: &Flow,
) -> std::io::Result<()> {
    loop {
        stream.readable().await?;
        let mut buffer = Vec::with_capacity(CHUNK);
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                first.mark();
                flow.writing.store(true, Ordering::Relaxed);
                write(output, &buffer, flow).await?;
                flow.writing.store(false, Ordering::Relaxed);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Writes all of `bytes`.
async fn write(output: &mut Output, mut bytes: &[u8], flow: &Flow) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let count = match output {
            Output::Fifo(fifo) => fifo.write(bytes).await?,
            Output::File(file) => file.write(bytes).await?,
        };
        flow.moved();
        bytes = &bytes[count..];
    }
    Ok(())
}
