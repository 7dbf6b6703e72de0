//! The mapping of a part of a device's memory into this process.

use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::reservation::Reservation;

/// The largest page that a processor maps at once (1 GiB). A mapping that is aligned to its own size, up to this, lets
/// the kernel use pages as large as they get: 256 GiB in pages of 4 KiB would need 512 MiB of tables.
const ALIGNMENT_MAX: usize = 1 << 30;
const PAGE: usize = 4096;

/// Memory of a device in the address space of this process. This process never touches it: it is there for KVM and the
/// IOMMU.
#[derive(Debug)]
pub(crate) struct Mapping(Reservation);

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` on, for reading and writing.
    ///
    /// # Errors
    /// When the range is no multiple of the page size, or the host refuses.
    pub(crate) fn new(file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        if length == 0 || !length.is_multiple_of(PAGE) {
            return Err(invalid());
        }
        let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
        let alignment = length.checked_next_power_of_two().unwrap_or(ALIGNMENT_MAX).min(ALIGNMENT_MAX);
        let reservation = Reservation::new(length, alignment, libc::PROT_NONE)?;
        reservation.place((file, offset), length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)?;
        Ok(Self(reservation))
    }

    /// Where it begins in this process.
    pub(crate) fn address(&self) -> u64 {
        self.0.start().as_ptr() as u64
    }

    /// Its length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.0.length()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    fn file(length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file
    }

    #[test]
    fn a_mapping_is_aligned_to_its_size_up_to_1_gib() {
        for (length, alignment) in [(0x1000, 0x1000), (0x3000, 0x4000), (16 << 20, 16 << 20), (3 << 30, 1 << 30)] {
            let mapping = Mapping::new(file(length).as_fd(), 0, usize::try_from(length).unwrap()).unwrap();
            assert!(mapping.address().is_multiple_of(alignment), "{length:x}: {:x}", mapping.address());
            assert_eq!(mapping.length(), length);
        }
    }

    #[test]
    fn parts_of_pages_are_refused() {
        for (offset, length) in [(0, 0), (0, 100), (1, 4096), (u64::MAX, 4096), (0, usize::MAX - 4095)] {
            assert!(Mapping::new(file(8192).as_fd(), offset, length).is_err(), "{offset} {length}");
        }
    }
}
