//! A network namespace that somebody else made.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use netlink::Connection;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// This process's own namespace, which is the host's.
const OWN: &str = "/proc/self/ns/net";

/// Tells namespaces apart while they exist: device and inode number of the file (namespaces(7)).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

/// A network namespace, held by its open file, and a socket in it.
#[derive(Debug)]
pub struct Namespace {
    path: PathBuf,
    file: File,
    id: NamespaceId,
    pub(crate) connection: Connection,
}

impl Namespace {
    /// Opens the namespace of the file `path`.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`] when there is none, [`NetworkError::OfHost`] when it is this process's own.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let failed = |source| NetworkError::Namespace { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let id = id(&file).map_err(failed)?;
        if id == File::open(OWN).and_then(|own| self::id(&own)).map_err(failed)? {
            return Err(NetworkError::OfHost { path: path.to_owned() });
        }
        Self::enter(path, file, id)
    }

    /// Opens the namespace of the file `path` if it still is the one of `id`. The file may be gone by now, be no namespace's
    /// any more, or be another's, even the host's.
    pub(crate) fn reopen(path: &Path, id: NamespaceId) -> Result<Option<Self>, NetworkError> {
        let failed = |source| NetworkError::Namespace { path: path.to_owned(), source };
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        if self::id(&file).map_err(failed)? != id {
            return Ok(None);
        }
        Self::enter(path, file, id).map(Some)
    }

    fn enter(path: &Path, file: File, id: NamespaceId) -> Result<Self, NetworkError> {
        let connection = within(&file, Connection::open)
            .map_err(|source| NetworkError::Namespace { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file, id, connection })
    }

    /// The file that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which namespace it is.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Does `work` in a thread of its own that is in the namespace.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`] when no thread can enter, else what `work` fails with.
    pub fn within<T, E>(&self, work: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E>
    where
        T: Send,
        E: From<NetworkError> + Send,
    {
        within(&self.file, || Ok(work()))
            .map_err(|source| NetworkError::Namespace { path: self.path.clone(), source })?
    }
}

fn id(file: &File) -> io::Result<NamespaceId> {
    let metadata = file.metadata()?;
    Ok(NamespaceId { device: metadata.dev(), inode: metadata.ino() })
}

/// Only a thread changes its namespace, and this one ends with it.
fn within<T: Send>(file: &File, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
