//! Device files with an I/O address space of iommufd: the interface of Linux 6.6 and later, preferred where it is there.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::device::{FdDevice, Keeper};
use super::kvm::KvmVfio;
use super::{HostDevice, Iommu, annotate, inclusive, ioctl};
use crate::memory::layout::Range;

/// Where iommufd is.
pub(super) const IOMMUFD: &str = "/dev/iommu";

/// An I/O address space, which all devices of a machine share.
pub(crate) struct AddressSpace {
    file: File,
    ioas: u32,
    kvm: Option<Arc<KvmVfio>>,
}

/// The device file of a function whose directory in sysfs is `directory`; nothing where the kernel has made none.
pub(crate) fn device_file(directory: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(directory.join("vfio-dev")).ok()?;
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    let name = names.into_iter().find(|name| name.as_encoded_bytes().starts_with(b"vfio"))?;
    Some(Path::new("/dev/vfio/devices").join(name))
}

/// Whether this process may use iommufd.
pub(crate) fn is_usable() -> bool {
    File::options().read(true).write(true).open(IOMMUFD).is_ok()
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path).map_err(|error| annotate(path, &error))
}

impl AddressSpace {
    /// Makes an empty one.
    ///
    /// # Errors
    /// When the kernel has no iommufd.
    pub(crate) fn open(kvm: Option<Arc<KvmVfio>>) -> io::Result<Self> {
        let file = open(Path::new(IOMMUFD))?;
        let ioas = ioctl::allocate_ioas(&file)?;
        Ok(Self { file, ioas, kvm })
    }

    /// Opens a device by its file and puts it behind this address space.
    ///
    /// # Errors
    /// When another process has it, a device of its group has a driver of the host, or it does not answer.
    pub(crate) fn device(self: &Arc<Self>, path: &Path, address: &str) -> io::Result<Arc<dyn HostDevice>> {
        let file = open(path)?;
        let registration = Registration::new(self, &file)?;
        ioctl::bind_iommufd(&file, &self.file)?;
        ioctl::attach_iommufd(&file, self.ioas)?;
        Ok(Arc::new(FdDevice::new(file, Box::new(registration), address.to_owned())?))
    }
}

/// A device's place in KVM. KVM wants it before the device is bound.
struct Registration {
    space: Arc<AddressSpace>,
    /// The device's file, once more: it names the device to KVM until the end.
    file: Option<File>,
}

impl Registration {
    fn new(space: &Arc<AddressSpace>, file: &File) -> io::Result<Self> {
        let file = match &space.kvm {
            Some(kvm) => {
                kvm.add(file)?;
                Some(file.try_clone()?)
            }
            None => None,
        };
        Ok(Self { space: Arc::clone(space), file })
    }
}

impl Keeper for Registration {
    fn reset_proof(&self) -> Vec<RawFd> {
        // With iommufd, the kernel looks at which of its users has the devices, and wants no list.
        Vec::new()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let (Some(kvm), Some(file)) = (&self.space.kvm, &self.file)
            && let Err(error) = kvm.remove(file)
        {
            tracing::warn!(%error, "KVM still holds a device");
        }
    }
}

impl Iommu for AddressSpace {
    unsafe fn map(&self, range: Range, host: u64) -> io::Result<()> {
        // SAFETY: as the caller promises.
        unsafe { ioctl::map_ioas(&self.file, self.ioas, range.start, host, range.length) }
    }

    fn unmap(&self, range: Range) -> io::Result<()> {
        match ioctl::unmap_ioas(&self.file, self.ioas, range.start, range.length)? {
            unmapped if unmapped == range.length => Ok(()),
            unmapped => Err(io::Error::other(format!("{unmapped} bytes were mapped there, not {}", range.length))),
        }
    }

    fn translated(&self) -> io::Result<Vec<Range>> {
        let ranges = ioctl::ioas_ranges(&self.file, self.ioas)?;
        Ok(ranges.into_iter().filter_map(|(first, last)| inclusive(first, last)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_file_is_the_one_that_sysfs_names() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(device_file(directory.path()), None);
        std::fs::create_dir_all(directory.path().join("vfio-dev/vfio7")).unwrap();
        assert_eq!(device_file(directory.path()), Some("/dev/vfio/devices/vfio7".into()));
    }
}
