//! Build results kept by the hash of what they were built from.
//!
//! An entry is a directory `<root>/<kind>/<key>`. It is built under a temporary name
//! beside its place and renamed when it is whole, so that an entry that exists is
//! complete, and two builders of one entry cannot see each other's half.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Why an entry could not be found or made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `TATAMI_CACHE`, `XDG_CACHE_HOME` nor `HOME` says where to keep results.
    #[error("No cache directory: set TATAMI_CACHE, XDG_CACHE_HOME or HOME")]
    NoHome,
    /// A file operation on the cache failed.
    #[error("Cache {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// The hash of everything that decides a build's result.
#[derive(Clone, Debug, Default)]
pub struct Key(Sha256);

impl Key {
    /// A key of nothing yet; `format` changes when the builder's own output format does.
    #[must_use]
    pub fn new(format: &str) -> Self {
        Self::default().with("format", format.as_bytes())
    }

    /// Adds one named input. Names and contents are length-prefixed, so that no two lists of inputs read alike.
    #[must_use]
    pub fn with(mut self, name: &str, content: &[u8]) -> Self {
        for part in [name.as_bytes(), content] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds a file's name and content.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read.
    pub fn with_file(self, path: &Path) -> Result<Self, Error> {
        let content = fs::read(path).map_err(io("read", path))?;
        Ok(self.with(&path.file_name().unwrap_or_default().to_string_lossy(), &content))
    }

    /// The first 32 hexadecimal digits: a directory name.
    #[must_use]
    pub fn name(&self) -> String {
        self.0.clone().finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The user's cache: `$TATAMI_CACHE`, else `$XDG_CACHE_HOME/tatami`, else `~/.cache/tatami`.
    ///
    /// # Errors
    /// [`Error::NoHome`] when none of them is set.
    pub fn open() -> Result<Self, Error> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = set("TATAMI_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| dir.join("tatami")))
            .or_else(|| set("HOME").map(|dir| dir.join(".cache/tatami")))
            .ok_or(Error::NoHome)?;
        Ok(Self { root })
    }

    /// A cache in a directory of the caller's choice.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where the cache lives.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry of `key`, if it was built before.
    #[must_use]
    pub fn get(&self, kind: &str, key: &Key) -> Option<PathBuf> {
        let path = self.root.join(kind).join(key.name());
        path.is_dir().then_some(path)
    }

    /// The entry of `key`, built by `build` in an empty directory if it is not there.
    ///
    /// One builder of a kind runs at a time on this machine (a file lock); the second finds the first one's result.
    ///
    /// # Errors
    /// Whatever `build` answers, or [`Error::Io`]; nothing stays behind then.
    pub fn get_or_build<E: From<Error>>(
        &self,
        kind: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        if let Some(path) = self.get(kind, key) {
            return Ok(path);
        }
        let parent = self.root.join(kind);
        fs::create_dir_all(&parent).map_err(io("create", &parent))?;
        let _lock = lock(&parent.join(".lock"))?;
        if let Some(path) = self.get(kind, key) {
            return Ok(path);
        }
        remove_unfinished(&parent)?;
        let unfinished = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&parent)
            .map_err(io("create a directory in", &parent))?;
        build(unfinished.path())?;
        let path = parent.join(key.name());
        fs::rename(unfinished.path(), &path).map_err(io("publish", &path))?;
        // Renamed away: there is nothing left for the guard to remove.
        let _ = unfinished.keep();
        Ok(path)
    }
}

impl Cache {
    /// Removes the entries of a kind that `keep` does not want; answers their paths.
    ///
    /// # Errors
    /// [`Error::Io`] when one cannot be removed; the others may be gone by then.
    pub fn retain(&self, kind: &str, keep: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>, Error> {
        let parent = self.root.join(kind);
        if !parent.is_dir() {
            return Ok(Vec::new());
        }
        let _lock = lock(&parent.join(".lock"))?;
        remove_unfinished(&parent)?;
        let mut removed = Vec::new();
        for entry in fs::read_dir(&parent).map_err(io("list", &parent))? {
            let path = entry.map_err(io("list", &parent))?.path();
            if path.is_dir() && !keep(&path) {
                fs::remove_dir_all(&path).map_err(io("remove", &path))?;
                removed.push(path);
            }
        }
        Ok(removed)
    }
}

/// What the names of entries that are being built begin with.
const UNFINISHED: &str = ".building-";

/// Removes what killed builders left. The caller holds the kind's lock, so that nobody builds now.
fn remove_unfinished(parent: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(parent).map_err(io("list", parent))? {
        let path = entry.map_err(io("list", parent))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED)) {
            fs::remove_dir_all(&path).map_err(io("remove", &path))?;
        }
    }
    Ok(())
}

fn lock(path: &Path) -> Result<nix::fcntl::Flock<File>, Error> {
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(io("open", path))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive)
        .map_err(|(_, errno)| io("lock", path)(errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_built_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let key = Key::new("1").with("input", b"a");
        let mut built = 0;
        for _ in 0..2 {
            let path = cache
                .get_or_build::<Error>("thing", &key, |dir| {
                    built += 1;
                    fs::write(dir.join("result"), "whole").map_err(io("write", dir))
                })
                .unwrap();
            assert_eq!(fs::read_to_string(path.join("result")).unwrap(), "whole");
        }
        assert_eq!(built, 1);
    }

    #[test]
    fn a_failed_build_leaves_no_entry_and_no_rest() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let key = Key::new("1");
        let failed: Result<PathBuf, Error> = cache.get_or_build("thing", &key, |_| Err(Error::NoHome));
        assert!(failed.is_err());
        assert!(cache.get("thing", &key).is_none());
        let left: Vec<_> =
            fs::read_dir(dir.path().join("thing")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".lock"]);
    }

    #[test]
    fn what_a_killed_builder_left_goes_with_the_next_build() {
        let dir = tempfile::tempdir().unwrap();
        let rest = dir.path().join("thing/.building-abc");
        fs::create_dir_all(rest.join("half")).unwrap();
        Cache::at(dir.path()).get_or_build::<Error>("thing", &Key::new("1"), |_| Ok(())).unwrap();
        assert!(!rest.exists());
    }

    #[test]
    fn an_entry_that_is_not_retained_goes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let [old, new] =
            ["old", "new"].map(|name| cache.get_or_build::<Error>("thing", &Key::new(name), |_| Ok(())).unwrap());
        assert_eq!(cache.retain("thing", |path| path == new).unwrap(), std::slice::from_ref(&old));
        assert!(new.is_dir() && !old.exists());
        assert!(cache.retain("no such kind", |_| false).unwrap().is_empty());
    }

    #[test]
    fn keys_of_shifted_inputs_differ() {
        assert_ne!(Key::new("1").with("ab", b"c").name(), Key::new("1").with("a", b"bc").name());
    }
}
