//! The host's side: devices that the kernel's VFIO gives to this process, and the IOMMUs that they are behind.
//!
//! What is above works with the two traits here, so that a synthetic device can stand in for a real one. Two ways lead
//! to a real one: IOMMU groups in a container of type 1 ([`type1`]), which every kernel with VFIO has, and device files
//! with an I/O address space of iommufd ([`iommufd`]), from Linux 6.6 on.
//! Source: `linux/vfio.h`, `linux/iommufd.h`, and the kernel's `Documentation/driver-api/vfio.rst`.

use std::io;
use std::path::Path;

use vmm_sys_util::eventfd::EventFd;

use super::mapping::Mapping;
use crate::memory::layout::Range;

pub(crate) mod device;
mod ioctl;
pub(crate) mod iommufd;
pub(crate) mod kvm;
pub(crate) mod sysfs;
pub(crate) mod type1;

/// The region of configuration space; the regions before it are the six BARs and the ROM.
pub(crate) const CONFIG_REGION: usize = 7;
/// How many BARs a function has.
pub(crate) const BARS: usize = 6;

/// A region of a device: a BAR, or its configuration space.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Region {
    /// Length in bytes, 0 where the device has no such region.
    pub(crate) size: u64,
    /// The parts that can be mapped, as offsets in the region.
    pub(crate) mappable: Vec<Range>,
}

/// How a device interrupts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(crate) enum IrqKind {
    /// By a level on a pin.
    Intx = 0,
    /// By messages whose address is in configuration space.
    Msi = 1,
    /// By messages whose addresses are in a table in a BAR.
    Msix = 2,
}

/// The interrupts of one kind.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct IrqInfo {
    /// How many there are, 0 when the device does not interrupt that way.
    pub(crate) count: u32,
    /// Whether vectors can be added while others are in use (Linux 6.5 and later, MSI-X only).
    pub(crate) grows: bool,
}

/// A device that belongs to this process.
pub(crate) trait HostDevice: Send + Sync {
    /// Its address on the host's bus, for messages.
    fn name(&self) -> &str;

    /// The region with this number; an empty one where there is none.
    fn region(&self, number: usize) -> Region;

    /// What it can do of a kind of interrupt.
    fn irq(&self, kind: IrqKind) -> IrqInfo;

    /// Reads from a region.
    ///
    /// # Errors
    /// When the range is outside of the region, or the device does not answer.
    fn read(&self, region: usize, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes to a region.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn write(&self, region: usize, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Maps a part of a region that the region says can be mapped.
    ///
    /// # Errors
    /// When the host refuses.
    fn map(&self, region: usize, part: Range) -> io::Result<Mapping>;

    /// Lets the interrupts from `first` on write to these events; a vector without an event is switched off.
    ///
    /// # Errors
    /// When the host has no interrupts left or refuses.
    fn set_events(&self, kind: IrqKind, first: u32, events: &[Option<&EventFd>]) -> io::Result<()>;

    /// Switches all interrupts of a kind off.
    ///
    /// # Errors
    /// When the host refuses.
    fn stop_events(&self, kind: IrqKind) -> io::Result<()>;

    /// Lets the pin interrupt again: the host masks it each time that its event comes. Comes at once if the cause is still
    /// there.
    ///
    /// # Errors
    /// When the pin is not switched on.
    fn unmask_pin(&self) -> io::Result<()>;

    /// Brings the device into the state after power-on.
    ///
    /// # Errors
    /// When it can be reset in no way that the host knows.
    fn reset(&self) -> io::Result<()>;
}

/// What translates the addresses of device accesses.
pub(crate) trait Iommu: Send + Sync {
    /// Lets devices access the `range.length` bytes at `host` by the addresses of `range`.
    ///
    /// # Errors
    /// When the range is taken or reserved, or the host has a limit that this would exceed.
    ///
    /// # Safety
    /// `host` must be a mapping of that length, and nobody in this process may rely on its content staying as it is.
    unsafe fn map(&self, range: Range, host: u64) -> io::Result<()>;

    /// Ends that, for exactly a range that was mapped. A device that accesses it afterwards meets a fault.
    ///
    /// # Errors
    /// When nothing or something else was mapped there.
    fn unmap(&self, range: Range) -> io::Result<()>;

    /// The addresses that the IOMMU translates; all where it does not say.
    ///
    /// # Errors
    /// When the host refuses.
    fn translated(&self) -> io::Result<Vec<Range>>;
}

/// Says which file the host refused to open, and what that means.
fn annotate(path: &Path, error: &io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::EBUSY) => " (a machine has it already)",
        Some(libc::ENOENT) => " (load vfio-pci, or give the device to it)",
        _ => "",
    };
    io::Error::new(error.kind(), format!("{}: {error}{why}", path.display()))
}

/// Makes a range of a first and a last address; the very last address is left out where the length would not fit.
fn inclusive(first: u64, last: u64) -> Option<Range> {
    let length = last.checked_sub(first)?.saturating_add(1).min(u64::MAX - first);
    (length > 0).then_some(Range { start: first, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inclusive_ranges_never_overflow() {
        assert_eq!(inclusive(0, 0xfedf_ffff), Some(Range { start: 0, length: 0xfee0_0000 }));
        assert_eq!(inclusive(0, u64::MAX).map(Range::end), Some(u64::MAX));
        assert_eq!(inclusive(1 << 40, u64::MAX).map(Range::end), Some(u64::MAX));
        assert_eq!(inclusive(5, 4), None);
        assert_eq!(inclusive(u64::MAX, u64::MAX), None);
    }
}
