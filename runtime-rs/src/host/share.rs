//! The directory that a sandbox's containers share with the guest.
//!
//! `mounts` is a small tmpfs that holds nothing but mount points; `shared` is a read-only view of it, which the guest
//! gets through virtio-fs. Mounts made in `mounts` appear in `shared` by propagation. So a guest can neither fill the
//! host's memory with files here, nor put a symbolic link where the host is about to mount. What a container may write
//! to are the mounts themselves.

use std::path::{Path, PathBuf};

use journal::{Effect, EffectId, Journal};
use nix::mount::{MsFlags, mount};
use protocols::containerd::api::Mount;

use crate::error::Error;
use crate::host::mount::carry_out;
use crate::paths::Paths;

/// A mount point costs one inode; a sandbox has a few for each of its containers.
const TMPFS_OPTIONS: &str = "mode=0700,size=1m,nr_inodes=16384";

/// Name of a container's root file system in its directory. Only the guest changes it; volumes are others' too.
pub const ROOT: &str = "rootfs";

/// Makes the shared directory of a sandbox.
///
/// # Errors
///
/// [`Error`]; what was done by then is in the journal.
pub fn prepare(paths: &Paths, journal: &Journal) -> Result<(), Error> {
    let (mounts, shared) = (paths.mounts(), paths.shared());
    for path in [&mounts, &shared] {
        journal.record(Effect::Directory { path: path.clone() })?;
        std::fs::create_dir(path).map_err(Error::host("make the directory", path))?;
        journal.record(Effect::Mount { target: path.clone() })?;
    }
    let step = |source: Option<&Path>, on: &Path, fstype: Option<&str>, flags, data: Option<&str>| {
        mount(source, on, fstype, flags, data).map_err(|errno| Error::host("mount", on)(errno.into()))
    };
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    step(Some(Path::new("kata")), &mounts, Some("tmpfs"), plain, Some(TMPFS_OPTIONS))?;
    // A peer group of its own: what is mounted in one appears in the other, and nowhere else.
    step(None, &mounts, None, MsFlags::MS_PRIVATE, None)?;
    step(None, &mounts, None, MsFlags::MS_SHARED, None)?;
    step(Some(&mounts), &shared, None, MsFlags::MS_BIND, None)?;
    step(None, &shared, None, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | plain, None)
}

/// What one container shares with the guest.
#[derive(Debug)]
pub struct Share<'a> {
    journal: &'a Journal,
    directory: PathBuf,
    /// In the order in which they happened.
    pub effects: Vec<EffectId>,
}

impl<'a> Share<'a> {
    /// Makes the container's directory in the shared one.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn create(paths: &Paths, container: &str, journal: &'a Journal) -> Result<Self, Error> {
        let directory = paths.mounts().join(container);
        let mut share = Self { journal, directory: directory.clone(), effects: Vec::new() };
        share.make_directory(&directory)?;
        Ok(share)
    }

    /// Mounts the container's root file system; without mounts, `fallback` is shared as it is.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn rootfs(&mut self, mounts: &[Mount], fallback: &Path) -> Result<(), Error> {
        let target = self.directory.join(ROOT);
        self.make_directory(&target)?;
        let bind;
        let mounts = if mounts.is_empty() {
            bind = [bind_of(fallback, true)];
            &bind
        } else {
            mounts
        };
        for what in mounts {
            // Each layer is mounted over the one before.
            self.effects.push(self.journal.record(Effect::Mount { target: target.clone() })?);
            carry_out(what, &target)?;
        }
        Ok(())
    }

    /// Shares a file or directory of the host as `mounts/<number>`, with the mounts below it if `recursive`.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn bind(&mut self, number: usize, source: &Path, recursive: bool) -> Result<(), Error> {
        let parent = self.directory.join("mounts");
        if !parent.exists() {
            self.make_directory(&parent)?;
        }
        let target = parent.join(number.to_string());
        let is_directory = std::fs::metadata(source).map_err(Error::host("find the mount source", source))?.is_dir();
        if is_directory {
            self.make_directory(&target)?;
        } else {
            self.effects.push(self.journal.record(Effect::File { path: target.clone() })?);
            std::fs::File::create_new(&target).map_err(Error::host("make the mount point", &target))?;
        }
        self.effects.push(self.journal.record(Effect::Mount { target: target.clone() })?);
        Ok(carry_out(&bind_of(source, recursive), &target)?)
    }

    fn make_directory(&mut self, path: &Path) -> Result<(), Error> {
        self.effects.push(self.journal.record(Effect::Directory { path: path.to_owned() })?);
        std::fs::create_dir(path).map_err(Error::host("make the directory", path))
    }
}

fn bind_of(source: &Path, recursive: bool) -> Mount {
    Mount {
        type_: "bind".to_owned(),
        source: source.to_string_lossy().into_owned(),
        options: vec![if recursive { "rbind" } else { "bind" }.to_owned()],
        ..Mount::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sandbox's paths in a directory of its own, with its shared directory; nothing without the right to mount.
    fn sandbox() -> Option<(tempfile::TempDir, Paths, Journal)> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: this test needs the right to mount");
            return None;
        }
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(root.path(), "ns", "id").unwrap();
        std::fs::create_dir_all(&paths.state).unwrap();
        let journal = Journal::create(&paths.journal()).unwrap();
        prepare(&paths, &journal).unwrap();
        Some((root, paths, journal))
    }

    fn mounts_below(path: &Path) -> usize {
        let text = std::fs::read_to_string("/proc/self/mounts").unwrap();
        text.lines().filter(|line| line.contains(&path.display().to_string())).count()
    }

    #[test]
    fn what_is_mounted_appears_in_the_view_that_the_guest_cannot_change() {
        let Some((root, paths, journal)) = sandbox() else { return };
        let source = root.path().join("source");
        std::fs::create_dir(&source).unwrap();
        let mut share = Share::create(&paths, "c", &journal).unwrap();
        share.rootfs(&[], &source).unwrap();
        share.bind(0, Path::new("/etc/hostname"), false).unwrap();

        let view = paths.shared().join("c");
        std::fs::write(view.join("rootfs/file"), "written by the container").unwrap();
        assert!(source.join("file").exists());
        assert!(view.join("mounts/0").metadata().unwrap().is_file());
        for forbidden in [paths.shared().join("x"), view.join("x")] {
            let error = std::fs::create_dir(forbidden).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        }
        assert!(journal.undo_all(&share.effects).is_empty());
        assert!(!view.exists());
        assert!(journal.finish().is_empty());
        assert_eq!(mounts_below(root.path()), 0);
        assert_eq!(std::fs::read_dir(&paths.state).unwrap().count(), 0);
    }

    #[test]
    fn unmounting_a_shared_copy_leaves_the_mounts_of_the_original() {
        let Some((root, paths, journal)) = sandbox() else { return };
        let source = root.path().join("source");
        std::fs::create_dir(&source).unwrap();
        let tmpfs = |on: &Path| mount(Some("t"), on, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        tmpfs(&source);
        mount(None::<&str>, &source, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        std::fs::create_dir(source.join("inner")).unwrap();
        tmpfs(&source.join("inner"));
        std::fs::write(source.join("inner/precious"), "x").unwrap();

        let mut share = Share::create(&paths, "c", &journal).unwrap();
        share.bind(0, &source, true).unwrap();
        assert!(paths.shared().join("c/mounts/0/inner/precious").exists());
        assert!(journal.finish().is_empty());
        assert!(source.join("inner/precious").exists());
        for path in [source.join("inner"), source] {
            nix::mount::umount(&path).unwrap();
        }
        assert_eq!(mounts_below(root.path()), 0);
    }
}
