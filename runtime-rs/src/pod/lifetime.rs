//! From the first instant of the pod process to its last: it never outlives its purpose, and leaves nothing.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use nix::unistd::{dup2_stdin, setsid};
use protocols::containerd::ttrpc;
use timeline::{Lane, Timeline};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, OnceCell};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use super::containers::Containers;
use super::events::{ADDRESS_VARIABLE, Publisher};
use super::gate::Gate;
use super::{Facts, Foundation, Pod, PodError};
use super::{sandbox_service, service};
use crate::args::Args;
use crate::error::chain;
use crate::host::{blocking, log};
use crate::machine::Launcher;
use crate::start::{CONNECTED, PRINTED, READY, STAMPS_VARIABLE};

/// containerd connects at once after `start`; a pod process that nobody wants ends after this.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// What is being made when the pod ends is given up within this.
const GIVE_UP_DEADLINE: Duration = Duration::from_secs(10);
/// Events that containerd does not take at the end are dropped after this.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);

/// Is the pod process: tells `start` that it listens, serves until the end, and undoes everything.
///
/// # Errors
///
/// [`PodError`]; nothing is left then.
pub fn run(args: Args, root: &Path, launcher: Arc<dyn Launcher>) -> Result<(), PodError> {
    tame_allocator();
    let mut channel = detach()?;
    let foundation = match Foundation::lay(&args, root) {
        Ok(foundation) => foundation,
        Err(error) => {
            // `start` may be gone; then nobody is left to be told.
            let _ = channel.write_all(chain(&error).as_bytes());
            return Err(error.into());
        }
    };
    log::init(&args.bundle, args.debug);
    let timeline = begin_timeline(&args.id);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(2).build()?;
    runtime.block_on(live(args, foundation, launcher, timeline, channel))
}

/// One arena: the threads of a pod are idle, and each arena would keep pages of its own.
fn tame_allocator() {
    // SAFETY: only this thread runs, and the call changes nothing but a parameter of the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Leaves containerd's session and directory, and takes the channel from standard input.
fn detach() -> Result<StdUnixStream, PodError> {
    let channel = std::io::stdin().as_fd().try_clone_to_owned()?;
    if !is_socket(&channel) {
        return Err(PodError::NoChannel);
    }
    let null = std::fs::File::open("/dev/null")?;
    dup2_stdin(&null).map_err(std::io::Error::from)?;
    // Fails only for the leader of a session, which then needs no other.
    let _ = setsid();
    std::env::set_current_dir("/")?;
    Ok(StdUnixStream::from(channel))
}

fn is_socket(fd: &OwnedFd) -> bool {
    nix::sys::socket::getsockopt(fd, nix::sys::socket::sockopt::SockType).is_ok()
}

/// The stamps of `start`, and the one of this process.
fn begin_timeline(id: &str) -> Timeline {
    let mut timeline = Timeline::new(id);
    let stamps = std::env::var(STAMPS_VARIABLE).unwrap_or_default();
    for (name, at) in stamps.split(',').filter_map(|stamp| stamp.split_once('=')) {
        if let Ok(at) = at.parse() {
            timeline.stamp_at(name.to_owned(), Lane::Host, at);
        }
    }
    timeline.stamp("pod process");
    timeline
}

async fn live(
    args: Args,
    foundation: Foundation,
    launcher: Arc<dyn Launcher>,
    timeline: Timeline,
    channel: StdUnixStream,
) -> Result<(), PodError> {
    let Foundation { paths, journal, listener } = foundation;
    let pod = Arc::new(Pod {
        events: Publisher::start(std::env::var(ADDRESS_VARIABLE).ok(), args.namespace),
        id: args.id,
        paths,
        journal,
        launcher,
        streams: Arc::default(),
        sandbox: OnceCell::new(),
        follower: OnceLock::new(),
        files: OnceLock::new(),
        containers: Containers::default(),
        first_byte: Arc::default(),
        end: Notify::new(),
        gate: Gate::default(),
        timeline: Mutex::new(timeline),
        facts: Mutex::new(Facts::default()),
    });
    let result = serve(&pod, listener, channel).await;
    wind_up(&pod).await;
    result
}

/// Serves until the pod is to end: by `Shutdown`, by a signal, or because nobody wants it.
async fn serve(
    pod: &Arc<Pod>,
    listener: std::os::unix::net::UnixListener,
    channel: StdUnixStream,
) -> Result<(), PodError> {
    listener.set_nonblocking(true)?;
    channel.set_nonblocking(true)?;
    let connected = Arc::new(Notify::new());
    let mut server = Server::new()
        .add_listener(announcing(UnixListener::from_std(listener)?, Arc::clone(&connected)))
        .register_service(service::v2(pod))
        .register_service(service::v3(pod))
        .register_service(sandbox_service::service(pod));
    server.start().await.map_err(std::io::Error::other)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let wanted = wanted(UnixStream::from_std(channel)?, connected);
    tokio::pin!(wanted);
    let mut undecided = true;
    loop {
        tokio::select! {
            () = pod.end.notified() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            wanted = &mut wanted, if undecided => {
                if !wanted {
                    tracing::warn!("nobody wants this sandbox: `start` was killed, or containerd did not connect");
                    return Ok(());
                }
                undecided = false;
            }
        }
    }
}

/// A listener that tells of every connection.
fn announcing(listener: UnixListener, connected: Arc<Notify>) -> Listener {
    Listener::new(futures::stream::unfold((listener, connected), |(listener, connected)| async move {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        connected.notify_one();
        Some((accepted, (listener, connected)))
    }))
}

/// Whether `start` printed the address and somebody connected to it.
async fn wanted(mut channel: UnixStream, connected: Arc<Notify>) -> bool {
    use tokio::io::AsyncWriteExt;
    let mut answer = [0; PRINTED.len()];
    if channel.write_all(READY).await.is_err() || channel.read_exact(&mut answer).await.is_err() {
        return false;
    }
    let wanted = tokio::time::timeout(CONNECT_DEADLINE, connected.notified()).await.is_ok();
    if wanted {
        // From here on containerd knows this process, and its `delete` is the one that cleans up.
        let _ = channel.write_all(CONNECTED).await;
    }
    wanted
}

/// Ends the machine and undoes everything; each step is tried whatever the others do.
async fn wind_up(pod: &Arc<Pod>) {
    pod.streams.close();
    pod.gate.close(GIVE_UP_DEADLINE).await;
    if let Some(sandbox) = pod.sandbox.get() {
        sandbox.stop().await;
    }
    pod.events.flush(FLUSH_DEADLINE).await;
    let undone = Arc::clone(pod);
    let undo = move || {
        if let Some(cgroup) = undone.facts().cgroup.take()
            && let Err(error) = cgroup.leave()
        {
            tracing::warn!(error = %chain(&error), "the pod's cgroup stays");
        }
        let failures = undone.journal.finish();
        for failure in &failures {
            tracing::error!(%failure, "left behind; `delete` tries again");
        }
        if failures.is_empty() {
            undone.paths.remove_empty();
        }
    };
    if let Err(error) = blocking::run("undo", undo).await {
        tracing::error!(error = %chain(&error), "not everything was undone; `delete` tries again");
    }
}

/// Writes the timeline where the configuration wants it.
///
/// Before `Shutdown` is answered: containerd then runs `delete`, which ends this process wherever it is.
pub(crate) async fn store_timeline(pod: &Arc<Pod>) {
    let Some(directory) = pod.facts().timeline_dir.clone() else { return };
    let pod = Arc::clone(pod);
    if let Err(error) = blocking::run("timeline", move || write_timeline(&pod, &directory)).await {
        tracing::warn!(error = %chain(&error), "the timeline was not written");
    }
}

fn write_timeline(pod: &Pod, directory: &Path) {
    let mut timeline = pod.timeline().clone();
    if let Some(at) = pod.first_byte.get() {
        timeline.stamp_at("first output", Lane::Host, at);
    }
    timeline.sort();
    let path = directory.join(format!("{}.json", pod.id));
    let stored = timeline.to_json().map_err(std::io::Error::other).and_then(|text| {
        std::fs::create_dir_all(directory)?;
        std::fs::write(&path, text)
    });
    if let Err(error) = stored {
        tracing::warn!(%error, path = %path.display(), "the timeline was not written");
    }
}
