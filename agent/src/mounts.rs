//! Mounts that the host asks for: storages and container root file systems.

use std::ffi::CString;
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use protocols::agent::Storage;
use protocols::containerd::types::mount::Mount;

use crate::error::{Error, Result};

/// Storages may be mounted below here and nowhere else.
pub(crate) const STORAGE_ROOT: &str = "/run/kata-containers";

/// More than any container needs; each costs kernel memory.
const LIMIT: usize = 256;

/// Longest option string that the kernel takes: one page (mount(2)).
const OPTIONS_LIMIT: usize = 4095;

/// Mounts of one owner, undone in reverse order.
#[derive(Debug, Default)]
pub(crate) struct Mounts(Vec<PathBuf>);

impl Mounts {
    /// Mounts storages in their order.
    pub(crate) fn add_storages(&mut self, storages: &[Storage]) -> Result<()> {
        if storages.len() > LIMIT {
            return Err(Error::invalid(format!("{} storages: the limit is {LIMIT}", storages.len())));
        }
        storages.iter().try_for_each(|s| self.add(&s.fstype, &s.source, Path::new(&s.target), &s.options))
    }

    /// Mounts the layers of a root file system at `rootfs`. A mount's own target is a place below it: as containerd
    /// writes it, relative to the root file system, or whole.
    pub(crate) fn add_rootfs(&mut self, mounts: &[Mount], rootfs: &Path) -> Result<()> {
        if mounts.len() > LIMIT {
            return Err(Error::invalid(format!("{} rootfs mounts: the limit is {LIMIT}", mounts.len())));
        }
        for mount in mounts {
            self.add(&mount.type_, &mount.source, &rootfs_target(&mount.target, rootfs), &mount.options)?;
        }
        Ok(())
    }

    fn add(&mut self, fstype: &str, source: &str, target: &Path, options: &[String]) -> Result<()> {
        let below = storage_target(target)?;
        let options = parse_options(options)?;
        let failed = |source_error: io::Error| Error::Mount {
            fstype: fstype.to_owned(),
            source_name: source.to_owned(),
            target: target.to_owned(),
            source: source_error,
        };
        mount_below(&below, fstype, source, &options).map_err(failed)?;
        self.0.push(target.to_owned());
        Ok(())
    }

    /// Undoes all, newest first, and says what could not be undone.
    pub(crate) fn undo(&mut self) -> Vec<String> {
        let mut failures = Vec::new();
        while let Some(target) = self.0.pop() {
            // Lazily: a process that hangs in the file system must not keep the container from going.
            match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(error) => failures.push(format!("cannot unmount {}: {error}", target.display())),
            }
        }
        failures
    }
}

fn rootfs_target(target: &str, rootfs: &Path) -> PathBuf {
    if Path::new(target).starts_with(rootfs) {
        return PathBuf::from(target);
    }
    match target.trim_start_matches('/') {
        "" => rootfs.to_owned(),
        below => rootfs.join(below),
    }
}

/// The part of a target below [`STORAGE_ROOT`].
fn storage_target(target: &Path) -> Result<PathBuf> {
    let refuse = || {
        Error::invalid(format!(
            "mount target {:?} is not a plain path below {STORAGE_ROOT}",
            target.display().to_string()
        ))
    };
    let below = target.strip_prefix(STORAGE_ROOT).map_err(|_| refuse())?;
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    if plain && below.components().next().is_some() { Ok(below.to_owned()) } else { Err(refuse()) }
}

/// Makes the target and mounts there. Paths are resolved with [`STORAGE_ROOT`] as their root, and every mount goes to
/// what was resolved: symlinks that a container left on the way lead nowhere else.
fn mount_below(below: &Path, fstype: &str, source: &str, options: &Options) -> io::Result<()> {
    let root = pathrs::Root::open(STORAGE_ROOT).map_err(io::Error::other)?;
    let directory = root.mkdir_all(below, &Permissions::from_mode(0o755)).map_err(io::Error::other)?;
    let propagation = options.flags & PROPAGATION;
    let recursive = options.flags & MsFlags::MS_REC;
    let flags = options.flags - PROPAGATION;
    // A new mount covers the directory; to change it, it is looked up again.
    let change = |flags| {
        let mounted = root.resolve(below).map_err(io::Error::other)?;
        Ok::<_, io::Error>(mount(None::<&str>, &handle_path(&mounted), None::<&str>, flags, None::<&str>)?)
    };
    if flags.contains(MsFlags::MS_BIND) || fstype == "bind" {
        mount(Some(source), &handle_path(&directory), None::<&str>, MsFlags::MS_BIND | recursive, None::<&str>)?;
        let restrictions = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
        if !restrictions.is_empty() {
            change(MsFlags::MS_REMOUNT | MsFlags::MS_BIND | restrictions)?;
        }
    } else {
        let data = CString::new(options.data.as_str())?;
        mount(Some(source), &handle_path(&directory), Some(fstype), flags, Some(data.as_c_str()))?;
    }
    if !propagation.is_empty() {
        change(propagation | recursive)?;
    }
    Ok(())
}

fn handle_path(handle: &pathrs::Handle) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", handle.as_fd().as_raw_fd()))
}

/// Options of mount(8), split as mount(2) takes them.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    data: String,
}

const PROPAGATION: MsFlags =
    MsFlags::MS_SHARED.union(MsFlags::MS_SLAVE).union(MsFlags::MS_PRIVATE).union(MsFlags::MS_UNBINDABLE);

/// Options that are flags of mount(2): name, flag, whether the name clears it.
const FLAGS: &[(&str, MsFlags, bool)] = &[
    ("ro", MsFlags::MS_RDONLY, false),
    ("rw", MsFlags::MS_RDONLY, true),
    ("nosuid", MsFlags::MS_NOSUID, false),
    ("suid", MsFlags::MS_NOSUID, true),
    ("nodev", MsFlags::MS_NODEV, false),
    ("dev", MsFlags::MS_NODEV, true),
    ("noexec", MsFlags::MS_NOEXEC, false),
    ("exec", MsFlags::MS_NOEXEC, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, false),
    ("async", MsFlags::MS_SYNCHRONOUS, true),
    ("dirsync", MsFlags::MS_DIRSYNC, false),
    ("noatime", MsFlags::MS_NOATIME, false),
    ("atime", MsFlags::MS_NOATIME, true),
    ("nodiratime", MsFlags::MS_NODIRATIME, false),
    ("diratime", MsFlags::MS_NODIRATIME, true),
    ("relatime", MsFlags::MS_RELATIME, false),
    ("norelatime", MsFlags::MS_RELATIME, true),
    ("strictatime", MsFlags::MS_STRICTATIME, false),
    ("bind", MsFlags::MS_BIND, false),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
    ("shared", MsFlags::MS_SHARED, false),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC), false),
    ("slave", MsFlags::MS_SLAVE, false),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC), false),
    ("private", MsFlags::MS_PRIVATE, false),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC), false),
    ("defaults", MsFlags::empty(), false),
];

fn parse_options(options: &[String]) -> Result<Options> {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options.iter().flat_map(|option| option.split(',')).filter(|option| !option.is_empty()) {
        match FLAGS.iter().find(|(name, ..)| *name == option) {
            Some((_, flag, false)) => flags.insert(*flag),
            Some((_, flag, true)) => flags.remove(*flag),
            None => data.push(option),
        }
    }
    let data = data.join(",");
    if data.len() > OPTIONS_LIMIT {
        return Err(Error::invalid(format!("mount options of {} bytes: the limit is {OPTIONS_LIMIT}", data.len())));
    }
    Ok(Options { flags, data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_into_flags_and_data() {
        let parsed =
            |options: &[&str]| parse_options(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>()).ok();
        let expect = |flags, data: &str| Some(Options { flags, data: data.to_owned() });
        assert_eq!(parsed(&["ro", "size=64m"]), expect(MsFlags::MS_RDONLY, "size=64m"));
        assert_eq!(parsed(&["ro,rw", "mode=700,uid=5"]), expect(MsFlags::empty(), "mode=700,uid=5"));
        assert_eq!(parsed(&["rbind"]), expect(MsFlags::MS_BIND | MsFlags::MS_REC, ""));
        assert_eq!(parsed(&["defaults", ""]), expect(MsFlags::empty(), ""));
        assert_eq!(parsed(&["x".repeat(5000).as_str()]), None, "longer than the kernel takes");
    }

    #[test]
    fn rootfs_mounts_go_to_the_rootfs_or_below_it() {
        let rootfs = Path::new("/run/kata-containers/bundles/a/rootfs");
        let cases = [
            ("", "/run/kata-containers/bundles/a/rootfs"),
            ("/", "/run/kata-containers/bundles/a/rootfs"),
            ("/run/kata-containers/bundles/a/rootfs", "/run/kata-containers/bundles/a/rootfs"),
            ("/run/kata-containers/bundles/a/rootfs/x", "/run/kata-containers/bundles/a/rootfs/x"),
            ("/var/lib", "/run/kata-containers/bundles/a/rootfs/var/lib"),
            ("var/lib", "/run/kata-containers/bundles/a/rootfs/var/lib"),
        ];
        for (target, expected) in cases {
            assert_eq!(rootfs_target(target, rootfs), Path::new(expected), "{target:?}");
        }
    }

    #[test]
    fn targets_outside_of_the_storage_root_are_refused() {
        for bad in [
            "/",
            "/etc",
            "relative",
            "/run/kata-containers",
            "/run/kata-containers/../../etc",
            "/run/kata-containersX/a",
            "",
        ] {
            assert!(storage_target(Path::new(bad)).is_err(), "{bad:?} must be refused");
        }
        let good = storage_target(Path::new("/run/kata-containers/shared/containers")).ok();
        assert_eq!(good, Some("shared/containers".into()));
    }
}
