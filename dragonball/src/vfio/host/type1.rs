//! IOMMU groups in a container: the interface that every kernel with VFIO has.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{FdDevice, Keeper, capabilities};
use super::ioctl::{self, u32_at, u64_at};
use super::kvm::KvmVfio;
use super::{HostDevice, Iommu, annotate, inclusive};
use crate::memory::layout::Range;

/// Where the container is.
pub(super) const CONTAINER: &str = "/dev/vfio/vfio";

/// An I/O address space of type 1, which all groups of a machine share.
pub(crate) struct Container {
    file: File,
    kvm: Option<Arc<KvmVfio>>,
    /// Groups in it. The first one gives it its IOMMU.
    groups: Mutex<usize>,
}

impl Container {
    /// Opens an empty one.
    ///
    /// # Errors
    /// When the kernel has no VFIO, or another version of it.
    pub(crate) fn open(kvm: Option<Arc<KvmVfio>>) -> io::Result<Self> {
        let file = open(Path::new(CONTAINER))?;
        if !ioctl::is_type1(&file) {
            return Err(io::Error::other("VFIO of this kernel has no IOMMU of type 1: load vfio_iommu_type1"));
        }
        Ok(Self { file, kvm, groups: Mutex::new(0) })
    }

    /// Puts a group into it.
    ///
    /// # Errors
    /// When another process has the group, a device of it has a driver of the host, or the IOMMU does not isolate it.
    pub(crate) fn add(self: &Arc<Self>, number: u32) -> io::Result<Arc<Group>> {
        let path = PathBuf::from(format!("/dev/vfio/{number}"));
        let file = open(&path)?;
        if !ioctl::is_viable(&file)? {
            return Err(io::Error::other("the kernel says that a driver of the host uses a device of the group"));
        }
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        ioctl::set_container(&file, &self.file)?;
        let group = Group { file, container: Arc::clone(self), registered: false };
        *groups += 1;
        let first = *groups == 1;
        drop(groups);
        // From here on, dropping the group takes it out again.
        if first {
            ioctl::set_type1(&self.file).map_err(explain_refusal)?;
        }
        group.register().map(Arc::new)
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path).map_err(|error| annotate(path, &error))
}

/// What the kernel means by its answer to the first group's IOMMU.
fn explain_refusal(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EPERM) => io::Error::new(
            error.kind(),
            "the IOMMU cannot isolate interrupts; where every guest is trusted, load vfio_iommu_type1 with \
             allow_unsafe_interrupts=1",
        ),
        _ => error,
    }
}

/// A group that belongs to this process.
pub(crate) struct Group {
    file: File,
    container: Arc<Container>,
    /// Whether KVM knows of it.
    registered: bool,
}

impl Group {
    fn register(mut self) -> io::Result<Self> {
        if let Some(kvm) = &self.container.kvm {
            kvm.add(&self.file)?;
            self.registered = true;
        }
        Ok(self)
    }

    /// Opens a device of the group by its address.
    ///
    /// # Errors
    /// When it is not one of the group, or does not answer.
    pub(crate) fn device(self: &Arc<Self>, address: &str) -> io::Result<Arc<dyn HostDevice>> {
        let name = CString::new(address).map_err(io::Error::other)?;
        let file = ioctl::device_of_group(&self.file, &name)?;
        Ok(Arc::new(FdDevice::new(file, Box::new(Member(Arc::clone(self))), address.to_owned())?))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(kvm) = self.container.kvm.as_ref().filter(|_| self.registered)
            && let Err(error) = kvm.remove(&self.file)
        {
            tracing::warn!(%error, "KVM still holds an IOMMU group");
        }
        let mut groups = self.container.groups.lock().unwrap_or_else(PoisonError::into_inner);
        *groups -= 1;
        if let Err(error) = ioctl::unset_container(&self.file) {
            tracing::warn!(%error, "an IOMMU group stays in its container");
        }
    }
}

/// A device's hold on its group.
struct Member(Arc<Group>);

impl Keeper for Member {
    fn reset_proof(&self) -> Vec<RawFd> {
        vec![self.0.file.as_raw_fd()]
    }
}

impl Iommu for Container {
    unsafe fn map(&self, range: Range, host: u64) -> io::Result<()> {
        // SAFETY: as the caller promises.
        unsafe { ioctl::map_dma(&self.file, range.start, host, range.length) }.map_err(explain_limit)
    }

    fn unmap(&self, range: Range) -> io::Result<()> {
        match ioctl::unmap_dma(&self.file, range.start, range.length)? {
            unmapped if unmapped == range.length => Ok(()),
            unmapped => Err(io::Error::other(format!("{unmapped} bytes were mapped there, not {}", range.length))),
        }
    }

    fn translated(&self) -> io::Result<Vec<Range>> {
        Ok(parse_ranges(&ioctl::type1_info(&self.file)?))
    }
}

/// What the kernel means by its answer to a map.
fn explain_limit(error: io::Error) -> io::Error {
    let text = match error.raw_os_error() {
        Some(libc::ENOSPC) => "all maps of the IOMMU are taken: load vfio_iommu_type1 with a larger dma_entry_limit",
        Some(libc::ENOMEM) => "the memory cannot be pinned: raise the limit of locked memory (ulimit -l)",
        _ => return error,
    };
    io::Error::new(error.kind(), text)
}

/// The address ranges of `struct vfio_iommu_type1_info`; all addresses when it has none.
fn parse_ranges(info: &[u8]) -> Vec<Range> {
    const CAPABILITIES: usize = 16;
    const IOVA_RANGE: u32 = vfio_bindings::bindings::vfio::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE;
    const COUNT: usize = 8;
    const RANGES: usize = 16;
    let Some((_, at)) = capabilities(info, CAPABILITIES).find(|(id, _)| *id == IOVA_RANGE) else {
        return inclusive(0, u64::MAX).into_iter().collect();
    };
    let count = usize::try_from(u32_at(info, at + COUNT)).unwrap_or(0).min(info.len() / 16);
    let entries = (0..count).map(|index| at + RANGES + 16 * index);
    entries.filter_map(|entry| inclusive(u64_at(info, entry), u64_at(info, entry + 8))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_translated_ranges_are_those_of_the_kernels_list() {
        let mut info = vec![0; 24];
        info[16..20].copy_from_slice(&24_u32.to_ne_bytes());
        info.extend([1, 0, 1, 0, 0, 0, 0, 0]);
        info.extend([2_u32.to_ne_bytes(), [0; 4]].concat());
        for end in [0_u64, 0xfedf_ffff, 0xfef0_0000, (1 << 39) - 1] {
            info.extend(end.to_ne_bytes());
        }
        let second = Range { start: 0xfef0_0000, length: (1 << 39) - 0xfef0_0000 };
        assert_eq!(parse_ranges(&info), [Range { start: 0, length: 0xfee0_0000 }, second]);
        assert_eq!(parse_ranges(&[0; 24]), [Range { start: 0, length: u64::MAX }]);
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let text = |errno| explain_limit(io::Error::from_raw_os_error(errno)).to_string();
        assert!(text(libc::ENOSPC).contains("dma_entry_limit") && text(libc::ENOMEM).contains("ulimit"));
        assert!(explain_refusal(io::Error::from_raw_os_error(libc::EPERM)).to_string().contains("unsafe_interrupts"));
    }
}
