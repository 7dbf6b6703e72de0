//! Root file systems that the guest mounts itself, from a disk: those of the snapshotters blockfile and devmapper.
//!
//! What such a disk holds is looked at by nobody on the host, and its files are cached once, by the guest.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use protocols::containerd::api::Mount;
use protocols::{BUNDLES_DIR, DISK_BY_PATH};

use crate::machine::HostDevice;

/// File systems that the guest's kernel has a driver for (kernel-config/fragments/filesystems.toml).
const IN_GUEST: [&str; 5] = ["ext4", "ext3", "ext2", "xfs", "erofs"];
/// The mount option for a file that shall be a disk.
const LOOP: &str = "loop";

/// A root file system that is on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDisk {
    /// The disk.
    pub device: HostDevice,
    kind: String,
    options: Vec<String>,
}

impl RootDisk {
    /// The disk that `rootfs` is on; nothing for a root file system that the host has to mount.
    #[must_use]
    pub fn of(rootfs: &[Mount]) -> Option<Self> {
        let [mount] = rootfs else { return None };
        if !IN_GUEST.contains(&mount.type_.as_str()) {
            return None;
        }
        let (loops, options): (Vec<_>, Vec<_>) = mount.options.iter().cloned().partition(|option| option == LOOP);
        // A device may have several names, and is one disk by all of them.
        let path = std::fs::canonicalize(&mount.source).ok()?;
        let found = std::fs::metadata(&path).ok()?.file_type();
        let is_disk = found.is_block_device() || (found.is_file() && !loops.is_empty());
        let read_only = options.iter().any(|option| option == "ro");
        let device = HostDevice::Disk { path, read_only };
        is_disk.then(|| Self { device, kind: mount.type_.clone(), options })
    }

    /// The mount for container `id` in the guest, where the disk is at `address` of the PCI bus.
    #[must_use]
    pub fn mount(&self, id: &str, address: &str) -> Mount {
        Mount {
            type_: self.kind.clone(),
            source: format!("{DISK_BY_PATH}{address}"),
            target: Path::new(BUNDLES_DIR).join(id).join("rootfs").to_string_lossy().into_owned(),
            options: self.options.clone(),
            ..Mount::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Mount { type_: kind.to_owned(), source: source.display().to_string(), options, ..Mount::default() }
    }

    #[test]
    fn a_file_that_is_to_be_a_disk_is_one_by_its_real_name() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let disk = RootDisk::of(&[mount("ext4", &link, &["loop", "noatime"])]).unwrap();
        let path = file.canonicalize().unwrap();
        assert_eq!(disk.device, HostDevice::Disk { path, read_only: false });
        let mounted = disk.mount("c", "0000:00:07.0");
        assert_eq!(mounted.source, "/dev/disk/by-path/pci-0000:00:07.0");
        assert_eq!(
            (mounted.target.as_str(), &mounted.options[..]),
            ("/run/kata-containers/bundles/c/rootfs", &["noatime".to_owned()][..])
        );
        let view = RootDisk::of(&[mount("ext4", &file, &["ro", "loop"])]).unwrap();
        assert!(matches!(view.device, HostDevice::Disk { read_only: true, .. }));
    }

    #[test]
    fn what_the_guest_cannot_mount_from_a_disk_is_left_to_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let ext4 = mount("ext4", &file, &["loop"]);
        for rootfs in [
            vec![],
            vec![mount("overlay", &file, &["loop"])],
            vec![mount("ext4", &file, &[])],
            vec![mount("ext4", directory.path(), &["loop"])],
            vec![mount("ext4", &directory.path().join("none"), &["loop"])],
            vec![ext4.clone(), ext4],
        ] {
            assert_eq!(RootDisk::of(&rootfs), None, "{rootfs:?}");
        }
    }
}
