//! Waiting for events with a deadline: no case sleeps and none polls.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// A moment after which a wait gives up. It guards against hangs; no case measures time by it.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// `duration` from now.
    #[must_use]
    pub fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    /// What is left of it.
    #[must_use]
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has come.
    #[must_use]
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}

/// Waits until one of `fds` has one of its events; answers which have, or `None` at the deadline.
///
/// # Errors
/// When poll(2) fails.
pub fn wait(fds: &[(BorrowedFd<'_>, PollFlags)], deadline: Deadline) -> Result<Option<Vec<bool>>> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)).collect();
    loop {
        // Rounded up, so that the last wait does not spin.
        let left = deadline.left().as_millis() + u128::from(!deadline.passed());
        let timeout = PollTimeout::try_from(left.min(i32::MAX as u128)).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(0) if deadline.passed() => return Ok(None),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(Some(polled.iter().map(|fd| fd.any().unwrap_or(true)).collect())),
            Err(error) => return Err(error).context("poll"),
        }
    }
}

/// Waits until `fd` is readable or at its end.
///
/// # Errors
/// At the deadline; `what` is being waited for.
pub fn readable(fd: BorrowedFd<'_>, what: &str, deadline: Deadline) -> Result<()> {
    match wait(&[(fd, PollFlags::POLLIN)], deadline)? {
        Some(_) => Ok(()),
        None => bail!("Waited in vain for {what}"),
    }
}

/// Waits until `name` is in `directory`.
///
/// # Errors
/// At the deadline, and when there is no such directory.
pub fn appears(directory: &Path, name: &str, deadline: Deadline) -> Result<()> {
    let watch = Watch::new()?;
    ensure!(watch.add(directory)?, "There is no {}", directory.display());
    while !directory.join(name).exists() {
        readable(watch.as_fd(), name, deadline)?;
        watch.drain();
    }
    Ok(())
}

/// Changes of the files in a set of directories (inotify(7)).
#[derive(Debug)]
pub struct Watch(Inotify);

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// When the kernel refuses an inotify instance.
    pub fn new() -> Result<Self> {
        Ok(Self(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("inotify_init1")?))
    }

    /// Adds a file or directory; `false` when it does not exist.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn add(&self, path: &Path) -> Result<bool> {
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO;
        match self.0.add_watch(path, changes) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("inotify_add_watch {}", path.display())),
        }
    }

    /// Forgets the changes seen so far; answers how many there were.
    pub fn drain(&self) -> usize {
        let mut seen = 0;
        while let Ok(events) = self.0.read_events() {
            seen += events.len();
        }
        seen
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
