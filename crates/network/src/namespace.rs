//! A network namespace that somebody else made.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use netlink::{Connection, News};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getpid, gettid};
use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// This process's own namespace, which is the host's unless the process has left that.
const OWN: &str = "/proc/self/ns/net";
/// The host's.
static HOST: OnceLock<NamespaceId> = OnceLock::new();

fn host() -> io::Result<NamespaceId> {
    if let Some(known) = HOST.get() {
        return Ok(*known);
    }
    let found = id(&File::open(OWN)?)?;
    Ok(*HOST.get_or_init(|| found))
}

/// Moves this process from the host's network namespace into a new one of its own, unless it has one already. Whoever knows
/// the process by its number then finds that one as its network namespace, and can put interfaces into it. Threads that
/// exist already stay behind, but for the caller, which must be the first.
///
/// # Errors
/// [`NetworkError::Thread`] for another thread, [`NetworkError::Kernel`] when the kernel refuses.
pub fn leave_host() -> Result<(), NetworkError> {
    let own = || File::open(OWN).and_then(|own| id(&own));
    let known = host().and_then(|host| Ok((host, own()?)));
    let (host, own) = known.map_err(NetworkError::kernel(format!("look at {OWN}")))?;
    if own != host {
        return Ok(());
    }
    if gettid() != getpid() {
        return Err(NetworkError::Thread);
    }
    let refused = NetworkError::kernel("make a network namespace for the pod");
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| refused(errno.into()))
}

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
    /// [`NetworkError::Namespace`] when there is none, [`NetworkError::OfHost`] when it is the one that this process began in.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let failed = |source| NetworkError::Namespace { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let id = id(&file).map_err(failed)?;
        if id == host().map_err(failed)? {
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

    /// Hears of what changes in it from now on.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`].
    pub fn news(&self) -> Result<News, NetworkError> {
        within(&self.file, News::open).map_err(|source| NetworkError::Namespace { path: self.path.clone(), source })
    }

    /// Whether a process has a UDP socket at `address`, whatever the port.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`].
    pub fn serves(&self, address: Ipv4Addr) -> Result<bool, NetworkError> {
        let sockets = || {
            let listed = std::fs::read_to_string("/proc/thread-self/net/udp");
            listed.map_err(NetworkError::kernel(format!("list the sockets of {}", self.path.display())))
        };
        Ok(lists(&self.within(sockets)?, address))
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

/// Whether a list of sockets as proc_net_udp(5) has it names the local address: its bytes as one number of this machine.
fn lists(sockets: &str, address: Ipv4Addr) -> bool {
    let local = format!("{:08X}:", u32::from_ne_bytes(address.octets()));
    let is_at = |line: &str| line.split_ascii_whitespace().nth(1).is_some_and(|field| field.starts_with(&local));
    sockets.lines().skip(1).any(is_at)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_found_by_its_local_address() {
        let list = "  sl  local_address rem_address   st tx_queue\n\
                    1234: 0B00007F:A3F1 00000000:0000 07 00000000:00000000\n\
                    1235: 00000000:0044 0C00007F:0000 07 00000000:00000000\n";
        assert!(lists(list, Ipv4Addr::new(127, 0, 0, 11)));
        assert!(!lists(list, Ipv4Addr::new(127, 0, 0, 12)));
        assert!(!lists("", Ipv4Addr::LOCALHOST));
    }
}
