//! All that can be told of this node's sandboxes at one time.

use std::path::PathBuf;

use futures::StreamExt;
use journal::ProcessId;
use serde::Serialize;

use super::CtlError;
use super::node::{self, Owner, Sandbox};
use super::process::Usage;
use super::task::{self, Ask, Container};

/// Sandboxes that are asked at the same time.
const AT_ONCE: usize = 32;

/// One sandbox as it was seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Seen {
    pub(super) namespace: String,
    pub(super) id: String,
    pub(super) state: State,
    /// Of the pod process, the last one's if it has ended.
    pub(super) pid: Option<i32>,
    /// What the kernel tells of the pod process; none when it has ended.
    pub(super) usage: Option<Usage>,
    /// None when the pod process does not answer, or has ended.
    pub(super) containers: Option<Vec<Container>>,
}

/// Whether a sandbox lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// Its pod process runs.
    Running,
    /// Its pod process has ended and left something.
    Dead,
    /// It is being made.
    Starting,
}

impl State {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Dead => "dead",
            Self::Starting => "starting",
        }
    }
}

impl Seen {
    /// Bytes of the host that the sandbox holds, about.
    pub(super) fn memory(&self) -> u64 {
        self.usage.as_ref().map_or(0, Usage::total)
    }
}

/// Looks at every sandbox below `root`. One that ends meanwhile is left out, or told as it was.
pub(super) async fn survey(root: PathBuf, ask: Ask) -> Result<Vec<Seen>, CtlError> {
    // A file of /proc can take its time, because the process may hold its memory map at the moment.
    let found = tokio::task::spawn_blocking(move || -> Result<Vec<(Sandbox, Option<Usage>)>, CtlError> {
        let measured = node::sandboxes(&root)?.into_iter().map(|sandbox| {
            let usage = sandbox.process().and_then(measure);
            (sandbox, usage)
        });
        Ok(measured.collect())
    });
    let found = found.await.map_err(std::io::Error::other)??;
    let seen = futures::stream::iter(found).map(|(sandbox, usage)| see(sandbox, usage, ask)).buffered(AT_ONCE);
    Ok(seen.collect().await)
}

/// Nothing when it has ended, or when this user may not look.
fn measure(process: ProcessId) -> Option<Usage> {
    Usage::of(process).ok().flatten()
}

async fn see(sandbox: Sandbox, usage: Option<Usage>, ask: Ask) -> Seen {
    let (state, pid) = match sandbox.owner {
        Owner::Alive(process) => (State::Running, Some(process.pid)),
        Owner::Dead(process) => (State::Dead, Some(process.pid)),
        Owner::Nobody => (State::Starting, None),
    };
    let containers = if state == State::Running { task::containers(&sandbox, ask).await } else { None };
    Seen { namespace: sandbox.namespace, id: sandbox.id, state, pid, usage, containers }
}
