//! A device by its file descriptor, whichever way it was opened.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use vfio_bindings::bindings::vfio;
use vmm_sys_util::eventfd::EventFd;

use super::ioctl::{self, u32_at, u64_at};
use super::{CONFIG_REGION, HostDevice, IrqInfo, IrqKind, Region};
use crate::memory::layout::Range;
use crate::vfio::mapping::Mapping;

/// What keeps a device usable beside its own descriptor. Dropped after that was closed.
pub(super) trait Keeper: Send + Sync {
    /// The descriptors by which the host sees that all devices on a bus are ours.
    fn reset_proof(&self) -> Vec<RawFd>;
}

/// A device of the host.
pub(super) struct FdDevice {
    // The order is the order in which they are dropped: the kernel wants the device to be closed first.
    file: File,
    keeper: Box<dyn Keeper>,
    name: String,
    can_reset: bool,
    regions: Vec<(Region, u64)>,
    irqs: [IrqInfo; 3],
}

impl FdDevice {
    /// Takes an open device and learns what it has.
    pub(super) fn new(file: File, keeper: Box<dyn Keeper>, name: String) -> io::Result<Self> {
        let info = ioctl::device_info(&file)?;
        if info.flags & vfio::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::other("it is no PCI device"));
        }
        let last = u32::try_from(CONFIG_REGION).unwrap_or(u32::MAX);
        let regions = (0..=last).map(|index| region(&file, index)).collect::<io::Result<_>>()?;
        let irqs = [IrqKind::Intx, IrqKind::Msi, IrqKind::Msix].map(|kind| irq(&file, kind));
        let can_reset = info.flags & vfio::VFIO_DEVICE_FLAGS_RESET != 0;
        Ok(Self { file, keeper, name, can_reset, regions, irqs })
    }

    /// The place of an access in the file.
    fn offset(&self, region: usize, offset: u64, size: usize) -> io::Result<u64> {
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "outside of the region");
        let (region, start) = self.regions.get(region).ok_or_else(outside)?;
        let end = offset.checked_add(size as u64).ok_or_else(outside)?;
        if end > region.size {
            return Err(outside());
        }
        start.checked_add(offset).ok_or_else(outside)
    }
}

/// `offsetof` of the fields of `struct vfio_region_info`.
mod field {
    pub(super) const FLAGS: usize = 4;
    pub(super) const CAPABILITIES: usize = 12;
    pub(super) const SIZE: usize = 16;
    pub(super) const OFFSET: usize = 24;
}

/// A region and where it begins in the file.
fn region(file: &File, index: u32) -> io::Result<(Region, u64)> {
    Ok(parse_region(&ioctl::region_info(file, index)?))
}

fn parse_region(info: &[u8]) -> (Region, u64) {
    let (flags, size) = (u32_at(info, field::FLAGS), u64_at(info, field::SIZE));
    let mut mappable = Vec::new();
    if flags & vfio::VFIO_REGION_INFO_FLAG_MMAP != 0 && size > 0 {
        let listed = if flags & vfio::VFIO_REGION_INFO_FLAG_CAPS != 0 { sparse_areas(info) } else { None };
        mappable = listed.unwrap_or_else(|| vec![Range { start: 0, length: size }]);
        mappable.retain(|area| area.end() <= size);
    }
    (Region { size, mappable }, u64_at(info, field::OFFSET))
}

/// The areas of `struct vfio_region_info_cap_sparse_mmap`; nothing when the region has no such capability.
fn sparse_areas(info: &[u8]) -> Option<Vec<Range>> {
    const COUNT: usize = 8;
    const AREAS: usize = 16;
    const AREA: usize = 16;
    let at = capabilities(info, field::CAPABILITIES).find(|(id, _)| *id == vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP)?.1;
    let count = usize::try_from(u32_at(info, at + COUNT)).ok()?.min(info.len() / AREA);
    let areas = (0..count).map(|index| at + AREAS + index * AREA);
    let areas = areas.map(|area| Range { start: u64_at(info, area), length: u64_at(info, area + 8) });
    Some(areas.filter(|area| area.length > 0 && area.start.checked_add(area.length).is_some()).collect())
}

/// Id and offset of each `struct vfio_info_cap_header` of the list whose first offset is in the field at `first`.
pub(super) fn capabilities(info: &[u8], first: usize) -> impl Iterator<Item = (u32, usize)> {
    let mut next = usize::try_from(u32_at(info, first)).unwrap_or(0);
    let mut left = 64;
    std::iter::from_fn(move || {
        if next == 0 || next >= info.len() || left == 0 {
            return None;
        }
        let at = next;
        left -= 1;
        next = usize::try_from(u32_at(info, at + 4)).unwrap_or(0);
        Some((u32_at(info, at) & 0xffff, at))
    })
}

fn irq(file: &File, kind: IrqKind) -> IrqInfo {
    // A device without this kind of interrupt has no information about it.
    let Ok(info) = ioctl::irq_info(file, kind as u32) else { return IrqInfo::default() };
    let usable = info.flags & vfio::VFIO_IRQ_INFO_EVENTFD != 0;
    let grows = kind == IrqKind::Msix && info.flags & vfio::VFIO_IRQ_INFO_NORESIZE == 0;
    IrqInfo { count: if usable { info.count } else { 0 }, grows }
}

impl HostDevice for FdDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn region(&self, number: usize) -> Region {
        self.regions.get(number).map(|(region, _)| region.clone()).unwrap_or_default()
    }

    fn irq(&self, kind: IrqKind) -> IrqInfo {
        self.irqs[kind as usize]
    }

    fn read(&self, region: usize, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, self.offset(region, offset, data.len())?)
    }

    fn write(&self, region: usize, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.offset(region, offset, data.len())?)
    }

    fn map(&self, region: usize, part: Range) -> io::Result<Mapping> {
        let length = usize::try_from(part.length).map_err(io::Error::other)?;
        Mapping::new(self.file.as_fd(), self.offset(region, part.start, length)?, length)
    }

    fn set_events(&self, kind: IrqKind, first: u32, events: &[Option<&EventFd>]) -> io::Result<()> {
        let descriptors: Vec<RawFd> = events.iter().map(|event| event.map_or(-1, AsRawFd::as_raw_fd)).collect();
        let flags = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        ioctl::set_irqs(&self.file, flags, kind as u32, first, &descriptors)
    }

    fn stop_events(&self, kind: IrqKind) -> io::Result<()> {
        let flags = vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        ioctl::set_irqs(&self.file, flags, kind as u32, 0, &[])
    }

    fn unmask_pin(&self) -> io::Result<()> {
        let flags = vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_UNMASK;
        ioctl::set_irq(&self.file, flags, IrqKind::Intx as u32)
    }

    fn reset(&self) -> io::Result<()> {
        if self.can_reset { ioctl::reset(&self.file) } else { ioctl::reset_bus(&self.file, &self.keeper.reset_proof()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct vfio_region_info` of a region of `size` bytes with a list of areas.
    fn info(flags: u32, size: u64, areas: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        [0_u32, flags, 0, 32].iter().for_each(|field| bytes.extend(field.to_ne_bytes()));
        [size, 0x10_0000].iter().for_each(|field| bytes.extend(field.to_ne_bytes()));
        // One capability of another kind first.
        bytes.extend([3, 0, 1, 0, 40, 0, 0, 0]);
        bytes.extend([1, 0, 1, 0, 0, 0, 0, 0]);
        bytes.extend(u32::try_from(areas.len()).unwrap().to_ne_bytes());
        bytes.extend([0; 4]);
        areas.iter().for_each(|(offset, size)| bytes.extend([offset.to_ne_bytes(), size.to_ne_bytes()].concat()));
        bytes
    }

    #[test]
    fn a_region_without_a_list_is_mappable_as_a_whole() {
        let (region, offset) = parse_region(&info(vfio::VFIO_REGION_INFO_FLAG_MMAP, 0x4000, &[]));
        assert_eq!((region.mappable, offset), (vec![Range { start: 0, length: 0x4000 }], 0x10_0000));
        assert_eq!(parse_region(&info(0, 0x4000, &[])).0.mappable, []);
        assert_eq!(parse_region(&[]).0, Region::default());
    }

    #[test]
    fn listed_areas_are_taken_when_they_lie_inside() {
        let flags = vfio::VFIO_REGION_INFO_FLAG_MMAP | vfio::VFIO_REGION_INFO_FLAG_CAPS;
        let areas = [(0, 0x1000), (0x2000, 0x2000), (0x3000, 0x9000), (0, 0), (u64::MAX, 4096)];
        let (region, _) = parse_region(&info(flags, 0x4000, &areas));
        assert_eq!(region.mappable, [Range { start: 0, length: 0x1000 }, Range { start: 0x2000, length: 0x2000 }]);
    }

    #[test]
    fn a_list_that_goes_round_ends() {
        let mut bytes = info(vfio::VFIO_REGION_INFO_FLAG_CAPS, 0x4000, &[]);
        bytes[36..40].copy_from_slice(&32_u32.to_ne_bytes());
        assert_eq!(capabilities(&bytes, field::CAPABILITIES).count(), 64);
    }
}
