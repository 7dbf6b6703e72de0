//! Waiting for changes to files, by inotify(7).

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Room for the notices that are taken at once.
const ROOM: usize = 4096;

/// Begins to notice `changes` to the file or directory `path`.
///
/// # Errors
///
/// The kernel's.
pub fn watch(path: &Path, changes: AddWatchFlags) -> io::Result<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(path, changes)?;
    Ok(inotify)
}

/// What was noticed, for the async thread to wait for.
#[derive(Debug)]
pub struct Notices(AsyncFd<OwnedFd>);

impl Notices {
    /// What `inotify` notices; within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the runtime cannot watch it.
    pub fn of(inotify: Inotify) -> io::Result<Self> {
        // SAFETY: an inotify instance has one descriptor of its own, which the `AsyncFd` owns and never hands out.
        let registered = unsafe { AsyncFd::register(OwnedFd::from(inotify)) };
        Ok(Self(registered.map_err(|error| error.into_parts().1)?))
    }

    /// Waits for a change, and takes all notices that there are by then.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn changed(&self) -> io::Result<()> {
        let mut room = [0; ROOM];
        let mut any = false;
        while !any {
            let mut ready = self.0.readable().await?;
            while let Ok(read) = ready.try_io(|inotify| Ok(nix::unistd::read(inotify, &mut room)?)) {
                any |= read? > 0;
            }
        }
        Ok(())
    }
}
