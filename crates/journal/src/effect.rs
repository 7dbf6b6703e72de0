//! The kinds of side effect that the journal knows, and how each is undone.

use std::path::PathBuf;

use network::NamespaceId;
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};

use crate::process::ProcessId;
use crate::tree;

/// A change of the host that must not outlive its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Effect {
    /// A mount on this directory or file.
    Mount {
        /// The mount point.
        target: PathBuf,
    },
    /// A directory that is empty once all later effects are undone.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// A directory that a guest or a peer may fill: removed with all that is in it, but never across a mount.
    Tree {
        /// Absolute path.
        path: PathBuf,
    },
    /// A file or a socket.
    File {
        /// Absolute path.
        path: PathBuf,
    },
    /// A cgroup v2 directory. Undone without error while it is still in use by somebody else's child or process.
    Cgroup {
        /// Absolute path below the cgroup mount.
        path: PathBuf,
    },
    /// Packets that an interface of a network namespace receives go to a tap.
    Redirection {
        /// The namespace's file.
        namespace: PathBuf,
        /// Which namespace that was: the file may be another's by the time of undoing.
        id: NamespaceId,
        /// The interface's name.
        interface: String,
    },
    /// A running process, named so that a later process with the same number is not mistaken for it.
    Process {
        /// Number and start time.
        #[serde(flatten)]
        process: ProcessId,
    },
}

/// An effect that still stands.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// The kernel refused.
    #[error("could not undo {effect:?}: {source}; end whatever still uses it and delete the container again")]
    Refused {
        /// What still stands.
        effect: Effect,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A network namespace did not give back what it was given.
    #[error("could not undo {effect:?}; end whatever still uses the namespace and delete the container again")]
    Network {
        /// What still stands.
        effect: Effect,
        /// What was refused.
        #[source]
        source: network::NetworkError,
    },
}

impl Effect {
    /// Undoes the effect; nothing to undo is success.
    ///
    /// # Errors
    ///
    /// [`UndoError`] with the kernel's answer.
    pub fn undo(&self) -> Result<(), UndoError> {
        let result = match self {
            Self::Redirection { namespace, id, interface } => {
                let parted = network::part(namespace, *id, interface);
                return parted.map_err(|source| UndoError::Network { effect: self.clone(), source });
            }
            Self::Mount { target } => unmount(target),
            Self::Directory { path } => std::fs::remove_dir(path),
            Self::Tree { path } => tree::remove(path),
            Self::File { path } => std::fs::remove_file(path),
            Self::Cgroup { path } => remove_cgroup(path),
            Self::Process { process } => process.end(),
        };
        match result {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(UndoError::Refused { effect: self.clone(), source }),
            Ok(()) => Ok(()),
        }
    }
}

/// Unmounts every layer that is stacked on `target`. Lazily: a guest's open file must not keep a host mount alive.
fn unmount(target: &std::path::Path) -> std::io::Result<()> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more).
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn remove_cgroup(path: &std::path::Path) -> std::io::Result<()> {
    match std::fs::remove_dir(path) {
        // A parent that was made here can serve others by now: its last user is not known to us.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY)) => {
            tracing::debug!(path = %path.display(), "the cgroup is in use by others and stays");
            Ok(())
        }
        result => result,
    }
}
