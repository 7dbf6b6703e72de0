//! Copies of small volumes of the host, for programs that wait for changes.
//!
//! The kernel tells a program of changes to a directory (inotify(7)) when they are made by way of this kernel. What the host
//! changes in a shared directory is not. So a volume that somebody keeps up to date (a config map, a secret) is a copy in
//! the guest, which is changed in the same way as the volume: a kubelet makes a new directory of files, then replaces the
//! link `..data`, which all names lead through, and so does [`refresh`].

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use protocols::{MAX_COPY_BYTES, MAX_COPY_ENTRIES};

use crate::error::{Error, Result};

/// The name under which an entry is made before it takes its place.
const UNFINISHED: &str = "..unfinished";
/// The link of a kubelet's volume that is replaced when all else is ready.
const DATA: &str = "..data";

/// Makes `target` a copy of the directory `source`, or makes it one again. It runs on a thread of its own.
///
/// # Errors
/// [`Error::Io`], also for a volume that is larger than [`MAX_COPY_BYTES`] or has more than [`MAX_COPY_ENTRIES`]; what of it is
/// copied by then stays.
pub(crate) async fn refresh(source: PathBuf, target: PathBuf) -> Result<()> {
    let what = format!("cannot copy the volume {} to {}", source.display(), target.display());
    let copied = tokio::task::spawn_blocking(move || Budget::default().directory(&source, &target)).await;
    copied.map_err(io::Error::other).and_then(|result| result).map_err(Error::io(what))
}

/// What a copy has taken so far.
#[derive(Default)]
struct Budget {
    bytes: u64,
    entries: usize,
}

impl Budget {
    fn take(&mut self, entry: &Metadata) -> io::Result<()> {
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(if entry.is_file() { entry.len() } else { 0 });
        if self.entries > MAX_COPY_ENTRIES || self.bytes > MAX_COPY_BYTES {
            let limits = format!("the limits are {MAX_COPY_ENTRIES} entries and {MAX_COPY_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, limits));
        }
        Ok(())
    }

    /// Makes `target` like `source`, what is missing first and what is too much last.
    fn directory(&mut self, source: &Path, target: &Path) -> io::Result<()> {
        if let Err(error) = fs::create_dir(target)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error);
        }
        let wanted = entries(source)?;
        let mut order: Vec<_> = wanted.iter().collect();
        order.sort_by_key(|(name, metadata)| turn(name, metadata));
        for (name, metadata) in order {
            self.take(metadata)?;
            self.entry(&source.join(name), metadata, target, name)?;
        }
        let mut surplus = entries(target)?;
        surplus.retain(|name, _| !wanted.contains_key(name));
        let mut order: Vec<_> = surplus.iter().collect();
        order.sort_by_key(|(name, metadata)| Reverse(turn(name, metadata)));
        for (name, metadata) in order {
            remove(&target.join(name), metadata)?;
        }
        dress(target, &fs::symlink_metadata(source)?)
    }

    /// Makes the entry `name` of `directory` like `source`.
    fn entry(&mut self, source: &Path, metadata: &Metadata, directory: &Path, name: &OsString) -> io::Result<()> {
        let target = directory.join(name);
        let present = fs::symlink_metadata(&target).ok();
        if metadata.is_dir() && present.as_ref().is_some_and(Metadata::is_dir) {
            return self.directory(source, &target);
        }
        if present.as_ref().is_some_and(|present| is_same((source, metadata), (&target, present))) {
            return Ok(());
        }
        let unfinished = directory.join(UNFINISHED);
        if let Ok(left) = fs::symlink_metadata(&unfinished) {
            remove(&unfinished, &left)?;
        }
        if metadata.is_dir() {
            self.directory(source, &unfinished)?;
        } else if metadata.is_symlink() {
            symlink(fs::read_link(source)?, &unfinished)?;
        } else {
            fs::copy(source, &unfinished)?;
        }
        dress(&unfinished, metadata)?;
        // Nothing but a directory takes the place of a directory.
        if let Some(present) = present.filter(|present| present.is_dir() != metadata.is_dir()) {
            remove(&target, &present)?;
        }
        fs::rename(&unfinished, &target)
    }
}

/// Directories, files and links of a directory; a volume has nothing else.
fn entries(directory: &Path) -> io::Result<BTreeMap<OsString, Metadata>> {
    let mut entries = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() || metadata.is_file() || metadata.is_symlink() {
            entries.insert(entry.file_name(), metadata);
        }
        if entries.len() > MAX_COPY_ENTRIES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
    Ok(entries)
}

/// When an entry is made: what is led to before what leads there.
fn turn(name: &OsString, metadata: &Metadata) -> u8 {
    match () {
        () if metadata.is_dir() => 0,
        () if metadata.is_file() => 1,
        () if name == DATA => 2,
        () => 3,
    }
}

/// Whether two files or links are alike; a copy has the time of what it was made from.
fn is_same((source, a): (&Path, &Metadata), (target, b): (&Path, &Metadata)) -> bool {
    let alike = (a.mode(), a.uid(), a.gid()) == (b.mode(), b.uid(), b.gid());
    if a.is_symlink() {
        return alike && fs::read_link(source).ok() == fs::read_link(target).ok();
    }
    alike && (a.len(), a.mtime(), a.mtime_nsec()) == (b.len(), b.mtime(), b.mtime_nsec())
}

/// Gives what was made the owner, mode and times of what it was made from.
fn dress(path: &Path, metadata: &Metadata) -> io::Result<()> {
    lchown(path, Some(metadata.uid()), Some(metadata.gid()))?;
    if !metadata.is_symlink() {
        fs::set_permissions(path, Permissions::from_mode(metadata.mode() & 0o7777))?;
    }
    let changed = TimeSpec::new(metadata.mtime(), metadata.mtime_nsec());
    Ok(utimensat(AT_FDCWD, path, &changed, &changed, UtimensatFlags::NoFollowSymlink)?)
}

fn remove(path: &Path, metadata: &Metadata) -> io::Result<()> {
    if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

#[cfg(test)]
mod tests {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

    use super::*;

    /// A kubelet's volume whose only key has this value.
    fn update(volume: &Path, version: &str, value: &str) {
        fs::create_dir(volume.join(version)).unwrap();
        fs::write(volume.join(version).join("key"), value).unwrap();
        symlink(version, volume.join("..data_tmp")).unwrap();
        let before = fs::read_link(volume.join(DATA)).ok();
        fs::rename(volume.join("..data_tmp"), volume.join(DATA)).unwrap();
        match before {
            Some(before) => fs::remove_dir_all(volume.join(before)).unwrap(),
            None => symlink("..data/key", volume.join("key")).unwrap(),
        }
    }

    fn directories() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("volume"), directory.path().join("copy"));
        fs::create_dir(&source).unwrap();
        (directory, source, target)
    }

    fn copy(source: &Path, target: &Path) -> io::Result<()> {
        Budget::default().directory(source, target)
    }

    #[test]
    fn a_copy_is_as_the_volume_was_and_becomes_as_it_is() {
        let (_keep, source, target) = directories();
        update(&source, "..one", "old");
        fs::set_permissions(source.join("..one/key"), Permissions::from_mode(0o440)).unwrap();
        copy(&source, &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("key")).unwrap(), "old");
        assert_eq!(fs::metadata(target.join("key")).unwrap().mode() & 0o7777, 0o440);
        update(&source, "..two", "new");
        copy(&source, &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("key")).unwrap(), "new");
        let names: Vec<_> = entries(&target).unwrap().into_keys().collect();
        assert_eq!(names, ["..data", "..two", "key"]);
    }

    #[test]
    fn who_waits_for_changes_is_told_of_the_link_after_its_directory_and_of_nothing_when_nothing_changed() {
        let (_keep, source, target) = directories();
        update(&source, "..one", "old");
        copy(&source, &target).unwrap();
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        inotify.add_watch(&target, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE).unwrap();
        copy(&source, &target).unwrap();
        assert!(inotify.read_events().is_err());
        update(&source, "..two", "new");
        copy(&source, &target).unwrap();
        let names: Vec<_> = inotify.read_events().unwrap().into_iter().filter_map(|event| event.name).collect();
        assert_eq!(names, ["..two", "..data", "..one"]);
    }

    #[test]
    fn kinds_may_change_and_an_unfinished_entry_is_no_obstacle() {
        let (_keep, source, target) = directories();
        fs::create_dir(source.join("a")).unwrap();
        fs::write(source.join("b"), "file").unwrap();
        copy(&source, &target).unwrap();
        fs::create_dir(target.join(UNFINISHED)).unwrap();
        fs::remove_dir(source.join("a")).unwrap();
        fs::write(source.join("a"), "file").unwrap();
        fs::remove_file(source.join("b")).unwrap();
        fs::create_dir(source.join("b")).unwrap();
        copy(&source, &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "file");
        assert!(target.join("b").is_dir() && !target.join(UNFINISHED).exists());
    }

    #[test]
    fn a_volume_that_is_too_large_is_refused() {
        let (_keep, source, target) = directories();
        fs::File::create(source.join("large")).unwrap().set_len(MAX_COPY_BYTES + 1).unwrap();
        assert_eq!(copy(&source, &target).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
