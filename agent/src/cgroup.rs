//! A container's cgroup (v2): its processes, freezing, killing, and the wait until it is empty.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};
use crate::sys;

/// Where the unified hierarchy is mounted.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Freezing and dying take milliseconds; a process stuck in the kernel can hold them up.
const EVENT_DEADLINE: Duration = Duration::from_secs(10);

/// One container's cgroup. Holds no resource: the directory is made by the helper and removed by [`Cgroup::remove`].
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// The cgroup of a container, whose id is a valid file name.
    pub(crate) fn of(container: &str) -> Self {
        Self { directory: Path::new(CGROUP_ROOT).join(container) }
    }

    /// A directory that stands for a cgroup.
    #[cfg(test)]
    pub(crate) fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Its path as the OCI specification writes it: below the hierarchy's root.
    pub(crate) fn oci_path(container: &str) -> PathBuf {
        Path::new("/").join(container)
    }

    /// Its directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Every process, those of nested cgroups included.
    pub(crate) fn processes(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect_processes(&self.directory, &mut pids)
            .map_err(Error::io(format!("cannot list the processes of {}", self.directory.display())))?;
        Ok(pids)
    }

    /// Kills every process at once (cgroup.kill, since Linux 5.14). No cgroup means no process.
    pub(crate) fn kill(&self) -> Result<()> {
        match self.write("cgroup.kill", "1") {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Stops or continues every process; returns when the kernel says that it is so.
    pub(crate) async fn set_frozen(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        self.wait_event("frozen", value).await
    }

    /// Waits until no process is left, in it or below.
    pub(crate) async fn wait_empty(&self) -> Result<()> {
        if !self.directory.exists() {
            return Ok(());
        }
        self.wait_event("populated", "0").await
    }

    /// Removes the empty cgroup and the empty ones below it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match remove_tree(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// One control file's text; `None` when its controller is not there.
    pub(crate) fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.directory.join(file)).ok()
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.directory.join(file);
        fs::write(&path, value).map_err(Error::io(format!("cannot write {value:?} to {}", path.display())))
    }

    /// Waits until `cgroup.events` says `key value`; the kernel reports each change of that file to inotify.
    async fn wait_event(&self, key: &str, value: &str) -> Result<()> {
        let path = self.directory.join("cgroup.events");
        let watch = FileWatch::new(&path).map_err(Error::io(format!("cannot watch {}", path.display())))?;
        let reached = async {
            while flat_value(&fs::read_to_string(&path)?, key).is_some_and(|now| now != value) {
                watch.changed().await?;
            }
            Ok(())
        };
        match tokio::time::timeout(EVENT_DEADLINE, reached).await {
            Ok(outcome) => outcome.map_err(Error::io::<io::Error>(format!("cannot watch {}", path.display()))),
            Err(_) => Err(Error::Deadline {
                what: format!("{} does not become {value:?} in {}", key, path.display()),
                seconds: EVENT_DEADLINE.as_secs(),
            }),
        }
    }
}

/// Watches one file of the cgroup file system for changes.
pub(crate) struct FileWatch {
    inotify: Inotify,
    /// The same open file, for the event loop.
    readiness: AsyncFd<OwnedFd>,
}

impl FileWatch {
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
        let readiness = sys::watch(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { inotify, readiness })
    }

    /// Returns after the next change; an error means that the file is gone.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        let events =
            self.readiness.async_io(tokio::io::Interest::READABLE, |_| Ok(self.inotify.read_events()?)).await?;
        if events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_IGNORED)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(())
    }
}

/// The value of a key in a "flat keyed" control file (cgroup-v2, "Interface Files").
pub(crate) fn flat_value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.split_once(' ').filter(|(k, _)| *k == key).map(|(_, v)| v.trim()))
}

fn collect_processes(directory: &Path, pids: &mut Vec<u32>) -> io::Result<()> {
    let text = fs::read_to_string(directory.join("cgroup.procs"))?;
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    for_each_child(directory, |child| collect_processes(child, pids))
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for_each_child(directory, remove_tree)?;
    fs::remove_dir(directory)
}

fn for_each_child(directory: &Path, mut visit: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            visit(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_keyed_files_are_read_by_whole_key() {
        let text = "populated 1\nfrozen 0\n";
        assert_eq!(flat_value(text, "populated"), Some("1"));
        assert_eq!(flat_value(text, "frozen"), Some("0"));
        assert_eq!(flat_value(text, "pop"), None);
    }
}
