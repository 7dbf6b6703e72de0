//! The system calls of VFIO and iommufd, each as a function of safe types.
//!
//! Nearly all of them take one structure that begins with its own size; those of a fixed size are the types of the
//! bindings, those that the kernel extends by a list are byte buffers, read by offset.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use iommufd_bindings::iommufd as iommu;
use vfio_bindings::bindings::vfio;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_ptr, ioctl_with_val};

/// The longest answer that the kernel is asked for: a list of a few thousand entries.
const ANSWER_MAX: usize = 1 << 16;

/// Number of a request without a size in it, as VFIO and iommufd have them.
const fn request(number: u32) -> libc::c_ulong {
    // Both use the same letter, and neither of these casts loses a bit.
    ((vfio::VFIO_TYPE as u32) << 8 | number) as libc::c_ulong
}

const fn vfio_request(offset: u32) -> libc::c_ulong {
    request(vfio::VFIO_BASE + offset)
}

const GET_API_VERSION: libc::c_ulong = vfio_request(0);
const CHECK_EXTENSION: libc::c_ulong = vfio_request(1);
const SET_IOMMU: libc::c_ulong = vfio_request(2);
const GROUP_GET_STATUS: libc::c_ulong = vfio_request(3);
const GROUP_SET_CONTAINER: libc::c_ulong = vfio_request(4);
const GROUP_UNSET_CONTAINER: libc::c_ulong = vfio_request(5);
const GROUP_GET_DEVICE: libc::c_ulong = vfio_request(6);
const DEVICE_GET_INFO: libc::c_ulong = vfio_request(7);
const DEVICE_GET_REGION_INFO: libc::c_ulong = vfio_request(8);
const DEVICE_GET_IRQ_INFO: libc::c_ulong = vfio_request(9);
const DEVICE_SET_IRQS: libc::c_ulong = vfio_request(10);
const DEVICE_RESET: libc::c_ulong = vfio_request(11);
const DEVICE_PCI_HOT_RESET: libc::c_ulong = vfio_request(13);
const IOMMU_GET_INFO: libc::c_ulong = vfio_request(12);
const IOMMU_MAP_DMA: libc::c_ulong = vfio_request(13);
const IOMMU_UNMAP_DMA: libc::c_ulong = vfio_request(14);
const DEVICE_BIND_IOMMUFD: libc::c_ulong = vfio_request(18);
const DEVICE_ATTACH_IOMMUFD: libc::c_ulong = vfio_request(19);
const IOAS_ALLOC: libc::c_ulong = request(iommu::IOMMUFD_CMD_IOAS_ALLOC);
const IOAS_IOVA_RANGES: libc::c_ulong = request(iommu::IOMMUFD_CMD_IOAS_IOVA_RANGES);
const IOAS_MAP: libc::c_ulong = request(iommu::IOMMUFD_CMD_IOAS_MAP);
const IOAS_UNMAP: libc::c_ulong = request(iommu::IOMMUFD_CMD_IOAS_UNMAP);

fn check(result: libc::c_int) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The size field of a structure.
const fn size<T>() -> u32 {
    assert!(size_of::<T>() < ANSWER_MAX, "a structure of the kernel's interface");
    #[expect(clippy::cast_possible_truncation, reason = "checked in the line above")]
    let size = size_of::<T>() as u32;
    size
}

/// Hands the kernel a structure of plain integers that begins with its own size.
///
/// # Safety
/// `T` must be that structure of `request`; pointers and descriptors in it must be what the request asks for.
unsafe fn exchange<T>(file: &File, request: libc::c_ulong, argument: &mut T) -> io::Result<u32> {
    // SAFETY: the kernel accesses as many bytes as the structure's size field says, which are all its own.
    check(unsafe { ioctl_with_mut_ptr(file, request, std::ptr::from_mut(argument)) })
}

/// Asks for a structure that the kernel may continue with a list: the first answer says how long it is.
fn extended(file: &File, request: libc::c_ulong, fixed: &[u8]) -> io::Result<Vec<u8>> {
    let mut answer = fixed.to_vec();
    for _ in 0..2 {
        let length = u32::try_from(answer.len()).map_err(io::Error::other)?;
        answer[..4].copy_from_slice(&length.to_ne_bytes());
        // SAFETY: the kernel writes no more bytes than the size in the first four says, which is the buffer's length.
        check(unsafe { ioctl_with_mut_ptr(file, request, answer.as_mut_ptr()) })?;
        let wanted = usize::try_from(u32_at(&answer, 0)).map_err(io::Error::other)?;
        if wanted <= answer.len() || wanted > ANSWER_MAX {
            break;
        }
        answer = fixed.to_vec();
        answer.resize(wanted, 0);
    }
    Ok(answer)
}

/// The number at `offset`, 0 behind the end.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let field = offset.checked_add(4).and_then(|end| bytes.get(offset..end));
    field.and_then(|field| field.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// The number at `offset`, 0 behind the end.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let field = offset.checked_add(8).and_then(|end| bytes.get(offset..end));
    field.and_then(|field| field.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// Whether a container speaks the version of this interface and has IOMMUs of type 1, version 2.
pub(super) fn is_type1(container: &File) -> bool {
    // SAFETY: neither request takes a pointer.
    let (version, extension) = unsafe {
        let extension = libc::c_ulong::from(vfio::VFIO_TYPE1v2_IOMMU);
        (ioctl(container, GET_API_VERSION), ioctl_with_val(container, CHECK_EXTENSION, extension))
    };
    u32::try_from(version) == Ok(vfio::VFIO_API_VERSION) && extension == 1
}

pub(super) fn set_type1(container: &File) -> io::Result<()> {
    // SAFETY: the request takes a number.
    check(unsafe { ioctl_with_val(container, SET_IOMMU, libc::c_ulong::from(vfio::VFIO_TYPE1v2_IOMMU)) }).map(drop)
}

/// Whether all devices of a group have drivers that stay away from their memory accesses.
pub(super) fn is_viable(group: &File) -> io::Result<bool> {
    let mut status = vfio::vfio_group_status { argsz: size::<vfio::vfio_group_status>(), flags: 0 };
    // SAFETY: the structure of this request, which has no pointers.
    unsafe { exchange(group, GROUP_GET_STATUS, &mut status)? };
    Ok(status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE != 0)
}

pub(super) fn set_container(group: &File, container: &File) -> io::Result<()> {
    let descriptor: RawFd = container.as_raw_fd();
    // SAFETY: the request reads one descriptor, which is open.
    check(unsafe { ioctl_with_ptr(group, GROUP_SET_CONTAINER, &raw const descriptor) }).map(drop)
}

pub(super) fn unset_container(group: &File) -> io::Result<()> {
    // SAFETY: the request takes nothing.
    check(unsafe { ioctl(group, GROUP_UNSET_CONTAINER) }).map(drop)
}

/// Opens a device of a group by its address.
pub(super) fn device_of_group(group: &File, address: &CStr) -> io::Result<File> {
    // SAFETY: the request reads a string that ends with a NUL.
    let descriptor = unsafe { ioctl_with_ptr(group, GROUP_GET_DEVICE, address.as_ptr()) };
    check(descriptor)?;
    // SAFETY: the kernel has just opened this descriptor for us.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// Flags and numbers of regions and interrupts of a device.
pub(super) fn device_info(device: &File) -> io::Result<vfio::vfio_device_info> {
    let mut info = vfio::vfio_device_info { argsz: size::<vfio::vfio_device_info>(), ..Default::default() };
    // SAFETY: the structure of this request, which has no pointers.
    unsafe { exchange(device, DEVICE_GET_INFO, &mut info)? };
    Ok(info)
}

/// `struct vfio_region_info` with its list of capabilities.
pub(super) fn region_info(device: &File, index: u32) -> io::Result<Vec<u8>> {
    let mut fixed = [0; size_of::<vfio::vfio_region_info>()];
    fixed[8..12].copy_from_slice(&index.to_ne_bytes());
    extended(device, DEVICE_GET_REGION_INFO, &fixed)
}

pub(super) fn irq_info(device: &File, index: u32) -> io::Result<vfio::vfio_irq_info> {
    let mut info = vfio::vfio_irq_info { argsz: size::<vfio::vfio_irq_info>(), index, ..Default::default() };
    // SAFETY: the structure of this request, which has no pointers.
    unsafe { exchange(device, DEVICE_GET_IRQ_INFO, &mut info)? };
    Ok(info)
}

/// Sets what happens at an interrupt: `descriptors` are eventfds, or -1 for none.
pub(super) fn set_irqs(device: &File, flags: u32, index: u32, start: u32, descriptors: &[RawFd]) -> io::Result<()> {
    let count = u32::try_from(descriptors.len()).map_err(io::Error::other)?;
    irq_set(device, [flags, index, start, count], descriptors)
}

/// Does something with one interrupt that takes no data, as `flags` says.
pub(super) fn set_irq(device: &File, flags: u32, index: u32) -> io::Result<()> {
    irq_set(device, [flags, index, 0, 1], &[])
}

/// `struct vfio_irq_set`: its fields but for the first, which is its length, and its data.
fn irq_set(device: &File, fields: [u32; 4], data: &[RawFd]) -> io::Result<()> {
    const FIXED: usize = 20;
    let length = u32::try_from(FIXED + 4 * data.len()).map_err(io::Error::other)?;
    let mut bytes = length.to_ne_bytes().to_vec();
    fields.iter().for_each(|field| bytes.extend(field.to_ne_bytes()));
    data.iter().for_each(|descriptor| bytes.extend(descriptor.to_ne_bytes()));
    // SAFETY: the kernel reads as many bytes as the first field says, which is the buffer's length.
    match check(unsafe { ioctl_with_ptr(device, DEVICE_SET_IRQS, bytes.as_ptr()) })? {
        0 => Ok(()),
        available => Err(io::Error::other(format!("the host has only {available} interrupt vectors for it"))),
    }
}

/// Resets one function.
pub(super) fn reset(device: &File) -> io::Result<()> {
    // SAFETY: the request takes nothing.
    check(unsafe { ioctl(device, DEVICE_RESET) }).map(drop)
}

/// Resets everything on the device's bus, which must all belong to `groups`, or with no group, to its iommufd.
pub(super) fn reset_bus(device: &File, groups: &[RawFd]) -> io::Result<()> {
    let length = u32::try_from(12 + 4 * groups.len()).map_err(io::Error::other)?;
    let count = u32::try_from(groups.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    [length, 0, count].iter().for_each(|field| bytes.extend(field.to_ne_bytes()));
    groups.iter().for_each(|group| bytes.extend(group.to_ne_bytes()));
    // SAFETY: the kernel reads as many bytes as the first field says, which is the buffer's length.
    check(unsafe { ioctl_with_ptr(device, DEVICE_PCI_HOT_RESET, bytes.as_ptr()) }).map(drop)
}

/// `struct vfio_iommu_type1_info` with its list of capabilities.
pub(super) fn type1_info(container: &File) -> io::Result<Vec<u8>> {
    extended(container, IOMMU_GET_INFO, &[0; size_of::<vfio::vfio_iommu_type1_info>()])
}

/// # Safety
/// The kernel makes the `size` bytes at `vaddr` accessible to devices: nobody may rely on their content.
pub(super) unsafe fn map_dma(container: &File, iova: u64, vaddr: u64, size_: u64) -> io::Result<()> {
    let mut map = vfio::vfio_iommu_type1_dma_map {
        argsz: size::<vfio::vfio_iommu_type1_dma_map>(),
        flags: vfio::VFIO_DMA_MAP_FLAG_READ | vfio::VFIO_DMA_MAP_FLAG_WRITE,
        vaddr,
        iova,
        size: size_,
    };
    // SAFETY: the structure of this request; the address is as the caller promises.
    unsafe { exchange(container, IOMMU_MAP_DMA, &mut map) }.map(drop)
}

/// Gives the number of bytes that were unmapped.
pub(super) fn unmap_dma(container: &File, iova: u64, size_: u64) -> io::Result<u64> {
    let mut unmap = vfio::vfio_iommu_type1_dma_unmap {
        argsz: size::<vfio::vfio_iommu_type1_dma_unmap>(),
        iova,
        size: size_,
        ..Default::default()
    };
    // SAFETY: the structure of this request; without flags it has no pointers.
    unsafe { exchange(container, IOMMU_UNMAP_DMA, &mut unmap)? };
    Ok(unmap.size)
}

pub(super) fn bind_iommufd(device: &File, iommufd: &File) -> io::Result<()> {
    let mut bind = vfio::vfio_device_bind_iommufd {
        // Without the last field, which kernels before 6.17 do not have.
        argsz: size::<vfio::vfio_device_bind_iommufd>() - 8,
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the structure of this request; the descriptor is open.
    unsafe { exchange(device, DEVICE_BIND_IOMMUFD, &mut bind) }.map(drop)
}

pub(super) fn attach_iommufd(device: &File, ioas: u32) -> io::Result<()> {
    let mut attach = vfio::vfio_device_attach_iommufd_pt {
        // Without the last field, which kernels before 6.15 do not have.
        argsz: size::<vfio::vfio_device_attach_iommufd_pt>() - 4,
        pt_id: ioas,
        ..Default::default()
    };
    // SAFETY: the structure of this request, which has no pointers.
    unsafe { exchange(device, DEVICE_ATTACH_IOMMUFD, &mut attach) }.map(drop)
}

/// Makes an I/O address space and gives its id.
pub(super) fn allocate_ioas(iommufd: &File) -> io::Result<u32> {
    let mut ioas = iommu::iommu_ioas_alloc { size: size::<iommu::iommu_ioas_alloc>(), ..Default::default() };
    // SAFETY: the structure of this request, which has no pointers.
    unsafe { exchange(iommufd, IOAS_ALLOC, &mut ioas)? };
    Ok(ioas.out_ioas_id)
}

/// # Safety
/// As [`map_dma`].
pub(super) unsafe fn map_ioas(iommufd: &File, ioas: u32, iova: u64, user_va: u64, length: u64) -> io::Result<()> {
    let mut map = iommu::iommu_ioas_map {
        size: size::<iommu::iommu_ioas_map>(),
        flags: iommu::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
            | iommu::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE
            | iommu::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
        ioas_id: ioas,
        user_va,
        length,
        iova,
        ..Default::default()
    };
    // SAFETY: the structure of this request; the address is as the caller promises.
    unsafe { exchange(iommufd, IOAS_MAP, &mut map) }.map(drop)
}

/// Gives the number of bytes that were unmapped.
pub(super) fn unmap_ioas(iommufd: &File, ioas: u32, iova: u64, length: u64) -> io::Result<u64> {
    let mut unmap = iommu::iommu_ioas_unmap { size: size::<iommu::iommu_ioas_unmap>(), ioas_id: ioas, iova, length };
    // SAFETY: the structure of this request, which has no pointers.
    unsafe { exchange(iommufd, IOAS_UNMAP, &mut unmap)? };
    Ok(unmap.length)
}

/// First and last address of each range that an I/O address space can map.
pub(super) fn ioas_ranges(iommufd: &File, ioas: u32) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = vec![iommu::iommu_iova_range::default(); 64];
    let mut query = iommu::iommu_ioas_iova_ranges {
        size: size::<iommu::iommu_ioas_iova_ranges>(),
        ioas_id: ioas,
        num_iovas: u32::try_from(ranges.len()).map_err(io::Error::other)?,
        allowed_iovas: ranges.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the structure of this request; its pointer is to as many ranges as it says.
    unsafe { exchange(iommufd, IOAS_IOVA_RANGES, &mut query)? };
    ranges.truncate(usize::try_from(query.num_iovas).map_err(io::Error::other)?);
    Ok(ranges.into_iter().map(|range| (range.start, range.last)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel() {
        // _IO(';', 100) and _IO(';', 133).
        assert_eq!((GET_API_VERSION, DEVICE_SET_IRQS, IOAS_MAP), (0x3b64, 0x3b6e, 0x3b85));
    }

    #[test]
    fn numbers_behind_the_end_are_zero() {
        let bytes = 7_u64.to_ne_bytes();
        assert_eq!((u64_at(&bytes, 0), u32_at(&bytes, 0), u32_at(&bytes, 4)), (7, 7, 0));
        assert_eq!((u64_at(&bytes, 1), u32_at(&bytes, 6), u32_at(&bytes, usize::MAX)), (0, 0, 0));
    }

    #[test]
    fn a_file_that_is_no_device_gives_the_systems_error() {
        let file = File::open("/dev/null").unwrap();
        assert!(!is_type1(&file));
        assert!(region_info(&file, 0).is_err() && is_viable(&file).is_err() && allocate_ioas(&file).is_err());
        assert!(set_irqs(&file, 0, 0, 0, &[-1]).is_err());
    }
}
