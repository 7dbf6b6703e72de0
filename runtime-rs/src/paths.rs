//! Where a sandbox keeps its state and its sockets.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Parent of everything that exists while sandboxes run.
pub const RUN_DIR: &str = "/run/kata";
/// containerd's own limit for identifiers (bytes).
const MAX_NAME: usize = 76;
/// Bytes of the hash in a socket's path: `sun_path` holds 108 bytes in all (unix(7)).
const HASH_BYTES: usize = 10;

/// A name that containerd would not give, and that could leave the state directory.
#[derive(Debug, thiserror::Error)]
#[error(
    "{what} {name:?} is not valid; use 1 to {MAX_NAME} letters, digits, '.', '_' and '-', beginning with a letter or digit"
)]
pub struct NameError {
    what: &'static str,
    name: String,
}

/// The paths of one sandbox.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Parent of all sandboxes.
    pub root: PathBuf,
    /// Parent of the sandboxes of this namespace.
    pub namespace: PathBuf,
    /// State of this sandbox.
    pub state: PathBuf,
    /// Parent of all socket directories. containerd's namespaces never begin with a dot.
    pub all_sockets: PathBuf,
    /// Sockets of this sandbox, under a short hash of namespace and id.
    pub sockets: PathBuf,
}

impl Paths {
    /// The paths of sandbox `id` in `namespace` below `root`.
    ///
    /// # Errors
    ///
    /// [`NameError`].
    pub fn new(root: &Path, namespace: &str, id: &str) -> Result<Self, NameError> {
        check("namespace", namespace)?;
        check("id", id)?;
        let hash = Sha256::new().chain_update(namespace).chain_update([0]).chain_update(id).finalize();
        let hash: String = hash.iter().take(HASH_BYTES).map(|byte| format!("{byte:02x}")).collect();
        let all_sockets = root.join(".s");
        Ok(Self {
            root: root.to_owned(),
            namespace: root.join(namespace),
            state: root.join(namespace).join(id),
            sockets: all_sockets.join(hash),
            all_sockets,
        })
    }

    /// The undo journal.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.state.join("journal")
    }

    /// The Task API.
    #[must_use]
    pub fn task_socket(&self) -> PathBuf {
        self.sockets.join("task")
    }

    /// The VMM's vsock device; a guest's dial to port P arrives at this path with `_P` appended.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.sockets.join("vsock")
    }

    /// Where a guest's dial to this host port arrives.
    #[must_use]
    pub fn vsock_port(&self, port: u32) -> PathBuf {
        self.sockets.join(format!("vsock_{port}"))
    }

    /// The FIFOs of a command in the guest itself, which the process of this number executes.
    #[must_use]
    pub fn console_fifos(&self, process: u32) -> PathBuf {
        self.sockets.join(format!("console_{process}"))
    }

    /// The host's side of what the containers share with the guest.
    #[must_use]
    pub fn mounts(&self) -> PathBuf {
        self.state.join("mounts")
    }

    /// The guest's read-only view of [`Paths::mounts`].
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.state.join("shared")
    }

    /// The files that the pod's containers get, where no container stands for the pod.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.state.join("files")
    }

    /// What the guest's debug UART printed, with `enable_debug`.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.state.join("console.log")
    }

    /// Removes the sandbox's own directories, and the parents that are empty then. Those of others stay.
    pub fn remove_empty(&self) {
        for path in [&self.sockets, &self.state, &self.namespace, &self.all_sockets, &self.root] {
            if let Err(error) = std::fs::remove_dir(path) {
                tracing::debug!(%error, path = %path.display(), "directory stays");
            }
        }
    }
}

/// Whether `name` can be a directory's name here.
///
/// # Errors
///
/// [`NameError`].
pub fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins && name.len() <= MAX_NAME && name.bytes().all(legal) {
        return Ok(());
    }
    Err(NameError { what, name: name.chars().take(2 * MAX_NAME).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_names_give_sockets_that_fit_sun_path() {
        let paths = Paths::new(Path::new(RUN_DIR), &"n".repeat(76), &"i".repeat(76)).unwrap();
        assert!(paths.vsock_port(u32::MAX).as_os_str().len() < 108);
    }

    #[test]
    fn the_same_id_in_two_namespaces_is_two_sandboxes() {
        let root = Path::new(RUN_DIR);
        let (one, other) = (Paths::new(root, "a", "x").unwrap(), Paths::new(root, "b", "x").unwrap());
        assert_ne!(one.state, other.state);
        assert_ne!(one.sockets, other.sockets);
        assert_ne!(Paths::new(root, "ab", "c").unwrap().sockets, Paths::new(root, "a", "bc").unwrap().sockets);
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for name in ["", "..", ".s", "a/b", "a\0b", "-x", &"a".repeat(77), "ä"] {
            assert!(Paths::new(Path::new(RUN_DIR), "ns", name).is_err(), "{name:?}");
            assert!(Paths::new(Path::new(RUN_DIR), name, "id").is_err(), "{name:?}");
        }
    }
}
