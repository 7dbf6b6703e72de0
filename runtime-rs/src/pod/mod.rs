//! The pod process: serves the Task API, owns the sandbox, and undoes everything at the end.

pub mod containers;
pub mod copies;
pub mod create;
pub mod devices;
pub mod events;
pub mod follow;
mod forward;
pub mod gate;
pub mod lifetime;
pub mod operations;
mod outlet;
pub mod process;
pub mod resize;
mod resolver;
pub mod sandbox;
mod sandbox_service;
pub mod service;
pub mod stdio;
pub mod streams;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use journal::{Effect, Journal, ProcessId};
use timeline::Timeline;
use tokio::sync::{Notify, OnceCell};

use crate::args::Args;
use crate::error::Error;
use crate::host::cgroup::PodCgroup;
use crate::host::files::PodFiles;
use crate::machine::Launcher;
use crate::paths::Paths;
use containers::Containers;
use events::Publisher;
use follow::Follower;
use gate::Gate;
use sandbox::Sandbox;
use stdio::FirstByte;
use streams::Streams;

pub use lifetime::run;

/// Everything that the requests of one pod share.
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    /// Where it keeps its state.
    pub paths: Paths,
    /// What it did to the host.
    pub journal: Journal,
    /// Makes its machine.
    pub launcher: Arc<dyn Launcher>,
    /// To containerd.
    pub events: Publisher,
    /// From the guest.
    pub streams: Arc<Streams>,
    /// The machine, once the first request made it.
    pub sandbox: OnceCell<Arc<Sandbox>>,
    /// Keeps the guest's network as that of this process is, where the pod has no other.
    pub follower: OnceLock<Follower>,
    /// What its containers come without: set where no container stands for the pod, but the Sandbox API made it.
    pub files: OnceLock<PodFiles>,
    /// By id.
    pub containers: Containers,
    /// When the first byte of output came.
    pub first_byte: Arc<FirstByte>,
    /// Tells the pod process to end.
    pub end: Notify,
    /// Ends what is being made when the pod ends.
    pub gate: Gate,
    timeline: Mutex<Timeline>,
    facts: Mutex<Facts>,
}

/// What is known once the configuration is read.
#[derive(Debug, Default)]
pub struct Facts {
    /// Where the timeline goes.
    pub timeline_dir: Option<PathBuf>,
    /// The pod's cgroup.
    pub cgroup: Option<PodCgroup>,
}

impl Pod {
    /// The number that the Task API gives for every process of the sandbox: the guest's own mean nothing on the host.
    #[must_use]
    pub fn pid() -> u32 {
        std::process::id()
    }

    /// Stamps a hop of the first container; later containers are not part of the sandbox's start.
    pub fn stamp(&self, name: &'static str) {
        let mut timeline = self.timeline();
        if !timeline.has(name) {
            timeline.stamp(name);
        }
    }

    /// The timeline, for several stamps at once.
    pub fn timeline(&self) -> MutexGuard<'_, Timeline> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the configuration decided.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running sandbox.
    ///
    /// # Errors
    ///
    /// [`Error::State`] before its first container, [`Error::GuestGone`] after its end.
    pub fn sandbox(&self) -> Result<&Arc<Sandbox>, Error> {
        let sandbox = self.sandbox.get().ok_or_else(|| Error::State("the sandbox has not been started".to_owned()))?;
        if sandbox.has_ended() {
            return Err(Error::GuestGone("see the events of its containers".to_owned()));
        }
        Ok(sandbox)
    }
}

/// What exists on the host from the first moment of a pod process.
#[derive(Debug)]
pub struct Foundation {
    paths: Paths,
    journal: Journal,
    listener: UnixListener,
}

impl Foundation {
    /// Makes the state directory, the journal, the socket directory and the Task API's socket.
    ///
    /// # Errors
    ///
    /// [`Error`]; what was done by then is undone.
    pub fn lay(args: &Args, root: &Path) -> Result<Self, Error> {
        let paths = Paths::new(root, &args.namespace, &args.id)?;
        let journal = match claim(&paths) {
            Err(Error::Journal(journal::JournalError::Io { source, .. }))
                if source.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                reclaim(&paths)?;
                claim(&paths)?
            }
            result => result?,
        };
        match lay_sockets(&paths, &journal) {
            Ok(listener) => Ok(Self { paths, journal, listener }),
            Err(error) => {
                for failure in journal.finish() {
                    tracing::warn!(%failure, "left behind");
                }
                paths.remove_empty();
                Err(error)
            }
        }
    }
}

/// Makes the state directory and takes possession of it by its journal.
fn claim(paths: &Paths) -> Result<Journal, Error> {
    std::fs::create_dir_all(&paths.state).map_err(Error::host("make the directory", &paths.state))?;
    let journal = match Journal::create(&paths.journal()) {
        // The end of another sandbox of the namespace removed the common parent meanwhile.
        Err(journal::JournalError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(&paths.state).map_err(Error::host("make the directory", &paths.state))?;
            Journal::create(&paths.journal())?
        }
        result => result?,
    };
    let process = ProcessId::current().map_err(Error::host("read", "/proc/self/stat"))?;
    journal.record(Effect::Process { process })?;
    Ok(journal)
}

/// The journal of a pod process that died is replayed; that of a living one is respected.
fn reclaim(paths: &Paths) -> Result<(), Error> {
    if journal::owners(&paths.journal())?.iter().any(ProcessId::is_alive) {
        return Err(Error::AlreadyExists(format!("sandbox {}", paths.state.display())));
    }
    let replay = journal::replay(&paths.journal())?;
    match replay.failures.into_iter().next() {
        Some(failure) => Err(Error::State(failure.to_string())),
        None => Ok(()),
    }
}

fn lay_sockets(paths: &Paths, journal: &Journal) -> Result<UnixListener, Error> {
    // A tree, not a directory: the VMM's and the guest's sockets come and go in it.
    journal.record(Effect::Tree { path: paths.sockets.clone() })?;
    std::fs::create_dir_all(&paths.sockets).map_err(Error::host("make the directory", &paths.sockets))?;
    let socket = paths.task_socket();
    UnixListener::bind(&socket).map_err(Error::host("listen on", socket))
}

/// Why the pod process could not begin.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// It was not `start` that executed it.
    #[error("the action pod is for the runtime itself: its standard input must be the socket of `start`")]
    NoChannel,
    /// The foundation could not be laid; `start` has been told why.
    #[error(transparent)]
    Foundation(#[from] Error),
    /// No event loop.
    #[error("could not make the event loop: {0}")]
    Runtime(#[from] std::io::Error),
}
