//! containerd's mounts, carried out on the host.

use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use protocols::containerd::api::Mount;
use protocols::containerd::ttrpc::Code;

use crate::host::detached;

/// mount(2) takes one page of data, its NUL included (bytes).
const MAX_DATA: usize = 4095;

/// A mount that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// An option that needs help beyond mount(2).
    #[error(
        "mount of type {fstype:?} on {target}: option {option:?} is not supported; use a snapshotter that mounts without it"
    )]
    Option {
        /// The option.
        option: String,
        /// Type of the mount.
        fstype: String,
        /// Mount point.
        target: PathBuf,
    },
    /// Options that do not fit mount(2), even when shortened.
    #[error(
        "mount on {target}: the options take {size} bytes, the kernel takes {MAX_DATA}; the image has too many layers, squash it"
    )]
    TooLong {
        /// Mount point.
        target: PathBuf,
        /// Their size.
        size: usize,
    },
    /// The kernel refused.
    #[error(
        "mount of {source_path:?} (type {fstype:?}) on {target}: {source}; check that the source exists and is intact"
    )]
    Refused {
        /// What was mounted.
        source_path: String,
        /// Type of the mount.
        fstype: String,
        /// Mount point.
        target: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl MountError {
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Option { .. } => Code::UNIMPLEMENTED,
            Self::TooLong { .. } => Code::INVALID_ARGUMENT,
            Self::Refused { .. } => Code::FAILED_PRECONDITION,
        }
    }
}

/// How many bytes the tmpfs at `path` may have; 0 if it is none, or has no limit.
///
/// # Errors
///
/// [`MountError::Refused`] if there is nothing at `path`.
pub fn tmpfs_size(path: &Path) -> Result<u64, MountError> {
    let found = statfs(path).map_err(|errno| MountError::Refused {
        source_path: path.display().to_string(),
        fstype: "tmpfs".to_owned(),
        target: PathBuf::from("/dev/shm"),
        source: errno.into(),
    })?;
    let is_tmpfs = found.filesystem_type() == TMPFS_MAGIC;
    Ok(if is_tmpfs { found.blocks().saturating_mul(found.block_size().cast_unsigned()) } else { 0 })
}

/// Mounts `what` on `target`, which exists. Must run on a thread that ends afterwards: long overlay options are
/// shortened by changing that thread's own working directory.
///
/// # Errors
///
/// [`MountError`].
pub fn carry_out(what: &Mount, target: &Path) -> Result<(), MountError> {
    let options = parse(what, target)?;
    let refused = |source: std::io::Error| MountError::Refused {
        source_path: what.source.clone(),
        fstype: what.type_.clone(),
        target: target.to_owned(),
        source,
    };
    if options.flags.contains(MsFlags::MS_BIND) {
        return detached::bind(Path::new(&what.source), target, options.flags).map_err(refused);
    }
    let data = match options.data.len() {
        0..=MAX_DATA => options.data,
        size => {
            let (directory, data) = shorten(&options.data).unwrap_or_default();
            if data.is_empty() || data.len() > MAX_DATA {
                return Err(MountError::TooLong { target: target.to_owned(), size });
            }
            // From here on this thread alone has a working directory of its own.
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).map_err(|errno| refused(errno.into()))?;
            nix::unistd::chdir(&directory).map_err(|errno| refused(errno.into()))?;
            data
        }
    };
    let (source, fstype) = (Some(what.source.as_str()), Some(what.type_.as_str()));
    mount(source, target, fstype, options.flags, Some(data.as_str())).map_err(|errno| refused(errno.into()))
}

/// Options of mount(8) as mount(2) takes them.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    data: String,
}

fn parse(what: &Mount, target: &Path) -> Result<Options, MountError> {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    if what.type_ == "bind" {
        flags |= MsFlags::MS_BIND;
    }
    for option in &what.options {
        match option.as_str() {
            "loop" | "async_discard" => {
                let (option, fstype, target) = (option.clone(), what.type_.clone(), target.to_owned());
                return Err(MountError::Option { option, fstype, target });
            }
            option if option.starts_with("uidmap=") || option.starts_with("gidmap=") => {
                let (option, fstype, target) = (option.to_owned(), what.type_.clone(), target.to_owned());
                return Err(MountError::Option { option, fstype, target });
            }
            // Notes between containerd's own components.
            option if option.starts_with("X-") || option.starts_with("x-") => {}
            option => match flag(option) {
                Some((flag, true)) => flags |= flag,
                Some((flag, false)) => flags &= !flag,
                None => data.push(option),
            },
        }
    }
    Ok(Options { flags, data: data.join(",") })
}

/// A named flag, and whether the name sets or clears it.
fn flag(name: &str) -> Option<(MsFlags, bool)> {
    Some(match name {
        "bind" => (MsFlags::MS_BIND, true),
        "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, true),
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "defaults" => (MsFlags::empty(), true),
        _ => return None,
    })
}

/// Overlay options with the layers' common directory taken out of `lowerdir`: that directory, and the options.
fn shorten(data: &str) -> Option<(PathBuf, String)> {
    let lower = data.split(',').find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = layers.first()?.parent()?;
    while !layers.iter().all(|layer| layer.starts_with(common)) {
        common = common.parent()?;
    }
    let short: Vec<&str> =
        layers.iter().map(|layer| layer.strip_prefix(common).ok()?.to_str()).collect::<Option<_>>()?;
    let short = format!("lowerdir={}", short.join(":"));
    let options = data.split(',').map(|option| if option.starts_with("lowerdir=") { short.as_str() } else { option });
    Some((common.to_owned(), options.collect::<Vec<_>>().join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(fstype: &str, options: &[&str]) -> Mount {
        Mount {
            type_: fstype.to_owned(),
            source: "/s".to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn options_are_split_into_flags_and_data() {
        let what = mount_of("overlay", &["ro", "nodev", "rw", "X-containerd.mkdir=1", "workdir=/w", "lowerdir=/a:/b"]);
        let options = parse(&what, Path::new("/t")).unwrap();
        assert_eq!(options, Options { flags: MsFlags::MS_NODEV, data: "workdir=/w,lowerdir=/a:/b".to_owned() });
        let bind = parse(&mount_of("bind", &["rbind", "ro"]), Path::new("/t")).unwrap();
        assert_eq!(bind.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
    }

    #[test]
    fn an_option_that_would_be_lost_is_refused_by_name() {
        for option in ["loop", "uidmap=0:1000:1"] {
            let message = parse(&mount_of("ext4", &[option]), Path::new("/t")).unwrap_err().to_string();
            assert!(message.contains(option) && message.contains("/t"), "{message}");
        }
    }

    #[test]
    fn many_layers_are_named_relative_to_their_common_directory() {
        let layers: Vec<String> = (0..120).map(|n| format!("/var/lib/containerd/snapshots/{n}/fs")).collect();
        let (directory, data) = shorten(&format!("workdir=/w,lowerdir={},upperdir=/u", layers.join(":"))).unwrap();
        assert_eq!(directory, Path::new("/var/lib/containerd/snapshots"));
        assert!(data.starts_with("workdir=/w,lowerdir=0/fs:1/fs:") && data.ends_with(":119/fs,upperdir=/u"), "{data}");
        assert!(data.len() < MAX_DATA);
        let one = shorten("lowerdir=/a/b").unwrap();
        assert_eq!(one, (PathBuf::from("/a"), "lowerdir=b".to_owned()));
    }

    #[test]
    fn an_overlay_of_more_layers_than_a_page_names_is_mounted() {
        let root = tempfile::tempdir().unwrap();
        let layers: Vec<String> =
            (0..60).map(|n| root.path().join(format!("{:0>60}/fs", n)).display().to_string()).collect();
        for (n, layer) in layers.iter().enumerate() {
            std::fs::create_dir_all(layer).unwrap();
            std::fs::write(format!("{layer}/{n}"), "x").unwrap();
        }
        let target = root.path().join("target");
        std::fs::create_dir(&target).unwrap();
        let what = mount_of("overlay", &[&format!("lowerdir={}", layers.join(":"))]);
        let on = target.clone();
        match std::thread::spawn(move || carry_out(&what, &on)).join().unwrap() {
            Err(error) if nix::unistd::geteuid().is_root() => panic!("{error}"),
            Err(error) => return eprintln!("SKIPPED: this test needs the right to mount ({error})"),
            Ok(()) => {}
        }
        let entries = std::fs::read_dir(&target).unwrap().count();
        nix::mount::umount(&target).unwrap();
        assert_eq!(entries, 60);
    }
}
