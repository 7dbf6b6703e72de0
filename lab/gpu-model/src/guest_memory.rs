//! Guest memory as the device sees it: bus addresses that the client has mapped, each a range of a file.
//!
//! It is reached by `pread` and `pwrite`, not by mappings: a client that truncates its file then gets a fault of the
//! command instead of killing the model, and half a million mappings of one file cost one descriptor.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Most mappings that a client may have: 4 GiB in pages of 4 KiB.
pub const MAX_MAPPINGS: usize = 1 << 20;

/// What a command wants of a bus address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// The bus address that could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault(pub(crate) u64);

/// What the device may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Permissions {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

#[derive(Debug)]
struct Mapping {
    size: u64,
    offset: u64,
    permissions: Permissions,
    /// None for memory that the client has no file of, as another device's BAR: it faults when reached.
    file: Option<Arc<File>>,
}

/// The last address of a range, which may be the last one there is.
fn last_address(address: u64, size: u64) -> Result<u64, Errno> {
    size.checked_sub(1).and_then(|rest| address.checked_add(rest)).ok_or(Errno::EINVAL)
}

impl Mapping {
    /// Its last address, when it begins at `start`.
    fn last(&self, start: u64) -> u64 {
        start + (self.size - 1)
    }

    fn allows(&self, access: Access) -> bool {
        match access {
            Access::Read => self.permissions.read,
            Access::Write => self.permissions.write,
        }
    }
}

/// Device and inode of a file, and the flags that it was opened with.
type FileIdentity = (u64, u64, i32);

/// All mappings of a client.
#[derive(Debug, Default)]
pub(crate) struct GuestMemory {
    mappings: BTreeMap<u64, Mapping>,
    files: HashMap<FileIdentity, Weak<File>>,
}

impl GuestMemory {
    /// Maps `size` bytes of `file` from `offset` at the bus address `address`.
    pub(crate) fn map(
        &mut self,
        address: u64,
        size: u64,
        permissions: Permissions,
        file: Option<(OwnedFd, u64)>,
    ) -> Result<(), Errno> {
        let last = last_address(address, size)?;
        if self.mappings.len() >= MAX_MAPPINGS {
            return Err(Errno::ENOSPC);
        }
        if self.range(address, last).next().is_some() {
            return Err(Errno::EEXIST);
        }
        let (file, offset) = match file {
            None => (None, 0),
            Some((descriptor, offset)) => {
                offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok()).ok_or(Errno::EINVAL)?;
                (Some(self.known_file(descriptor)?), offset)
            }
        };
        self.mappings.insert(address, Mapping { size, offset, permissions, file });
        Ok(())
    }

    /// The same open file for each descriptor of one file, so that a client's many mappings use up no descriptors.
    fn known_file(&mut self, descriptor: OwnedFd) -> Result<Arc<File>, Errno> {
        let flags = fcntl(&descriptor, FcntlArg::F_GETFL)? & OFlag::O_ACCMODE.bits();
        let file = File::from(descriptor);
        let data = file.metadata().map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        if !data.is_file() {
            return Err(Errno::EINVAL);
        }
        let identity = (data.dev(), data.ino(), flags);
        if let Some(known) = self.files.get(&identity).and_then(Weak::upgrade) {
            return Ok(known);
        }
        self.files.retain(|_, file| file.strong_count() > 0);
        let file = Arc::new(file);
        self.files.insert(identity, Arc::downgrade(&file));
        Ok(file)
    }

    /// Removes all mappings in a range; answers how many bytes they were. A mapping that is only partly in the range
    /// is an error, and nothing is removed then.
    pub(crate) fn unmap(&mut self, address: u64, size: u64) -> Result<u64, Errno> {
        let last = last_address(address, size)?;
        let mut found = Vec::new();
        let mut bytes = 0;
        for (start, mapping) in self.range(address, last) {
            if start < address || mapping.last(start) > last {
                return Err(Errno::EINVAL);
            }
            found.push(start);
            bytes += mapping.size;
        }
        for start in found {
            self.mappings.remove(&start);
        }
        Ok(bytes)
    }

    /// Removes all mappings.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Number of mappings.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.mappings.len()
    }

    /// The mappings that have a byte in `address..=last`.
    fn range(&self, address: u64, last: u64) -> impl Iterator<Item = (u64, &Mapping)> {
        let before = self.mappings.range(..address).next_back().filter(move |(start, it)| it.last(**start) >= address);
        before.into_iter().chain(self.mappings.range(address..=last)).map(|(start, mapping)| (*start, mapping))
    }

    /// Reads from guest memory.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < data.len() {
            let here = address.checked_add(done as u64).ok_or(Fault(address))?;
            let (file, offset, length) = self.find(here, data.len() - done, Access::Read)?;
            file.read_exact_at(&mut data[done..done + length], offset).map_err(|_| Fault(here))?;
            done += length;
        }
        Ok(())
    }

    /// Writes to guest memory.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < data.len() {
            let here = address.checked_add(done as u64).ok_or(Fault(address))?;
            let (file, offset, length) = self.find(here, data.len() - done, Access::Write)?;
            // Not past the file's end, which would make a truncated file grow again.
            let inside = file.metadata().is_ok_and(|data| offset + length as u64 <= data.len());
            if !inside || file.write_all_at(&data[done..done + length], offset).is_err() {
                return Err(Fault(here));
            }
            done += length;
        }
        Ok(())
    }

    /// The file at a bus address, the offset in it, and how many of `wanted` bytes the mapping has from there.
    fn find(&self, address: u64, wanted: usize, access: Access) -> Result<(&File, u64, usize), Fault> {
        let (start, mapping) = self.mappings.range(..=address).next_back().ok_or(Fault(address))?;
        let inside = address - start;
        let file = mapping.file.as_ref().filter(|_| inside < mapping.size && mapping.allows(access));
        let left = usize::try_from(mapping.size.saturating_sub(inside)).unwrap_or(usize::MAX);
        Ok((file.ok_or(Fault(address))?, mapping.offset + inside, left.min(wanted)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;

    use super::*;

    const BOTH: Permissions = Permissions { read: true, write: true };

    fn memory(size: i64) -> OwnedFd {
        let file = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        file
    }

    fn copy(file: &OwnedFd) -> OwnedFd {
        file.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_copy_goes_over_mappings_that_touch() {
        let file = memory(0x3000);
        let mut guest = GuestMemory::default();
        guest.map(0x1000, 0x1000, BOTH, Some((copy(&file), 0x2000))).unwrap();
        guest.map(0x2000, 0x1000, BOTH, Some((copy(&file), 0))).unwrap();
        let data: Vec<u8> = (0..=255).cycle().take(0x1800).collect();
        guest.write(0x1400, &data).unwrap();
        let mut back = vec![0; data.len()];
        guest.read(0x1400, &mut back).unwrap();
        assert_eq!(back, data);
        let mut first = [0; 4];
        File::from(file).read_exact_at(&mut first, 0x2400).unwrap();
        assert_eq!(first, data[..4]);
    }

    #[test]
    fn an_address_that_is_not_mapped_faults_where_it_is() {
        let mut guest = GuestMemory::default();
        guest.map(0x1000, 0x1000, BOTH, Some((memory(0x1000), 0))).unwrap();
        assert_eq!(guest.read(0x1800, &mut [0; 0x1000]), Err(Fault(0x2000)));
        assert_eq!(guest.read(0xfff, &mut [0]), Err(Fault(0xfff)));
        assert_eq!(guest.write(u64::MAX, &[0; 2]), Err(Fault(u64::MAX)));
    }

    #[test]
    fn permissions_hold_in_both_directions() {
        let mut guest = GuestMemory::default();
        let read = Permissions { read: true, write: false };
        guest.map(0, 0x1000, read, Some((memory(0x1000), 0))).unwrap();
        guest.map(0x1000, 0x1000, Permissions { read: false, write: true }, Some((memory(0x1000), 0))).unwrap();
        assert!(guest.read(0, &mut [0; 8]).is_ok() && guest.write(0x1000, &[0; 8]).is_ok());
        assert_eq!(guest.write(8, &[0]), Err(Fault(8)));
        assert_eq!(guest.read(0x1008, &mut [0]), Err(Fault(0x1008)));
    }

    #[test]
    fn a_truncated_file_faults_and_does_not_grow() {
        let file = memory(0x2000);
        let mut guest = GuestMemory::default();
        guest.map(0, 0x2000, BOTH, Some((copy(&file), 0))).unwrap();
        ftruncate(&file, 0x1000).unwrap();
        assert_eq!(guest.read(0x1800, &mut [0; 4]), Err(Fault(0x1800)));
        assert_eq!(guest.write(0x1800, &[0; 4]), Err(Fault(0x1800)));
        assert_eq!(File::from(file).metadata().unwrap().len(), 0x1000);
    }

    #[test]
    fn ranges_that_wrap_overlap_or_are_empty_are_refused() {
        let mut guest = GuestMemory::default();
        guest.map(0x1000, 0x2000, BOTH, None).unwrap();
        for (address, size, error) in [
            (0x2000, 0x1000, Errno::EEXIST),
            (0x0, 0x1001, Errno::EEXIST),
            (0x2fff, 1, Errno::EEXIST),
            (0x5000, 0, Errno::EINVAL),
            (u64::MAX, 2, Errno::EINVAL),
        ] {
            assert_eq!(guest.map(address, size, BOTH, None), Err(error), "{address:#x}+{size:#x}");
        }
        assert_eq!(guest.map(0x5000, 0x1000, BOTH, Some((memory(0), u64::MAX))), Err(Errno::EINVAL));
        assert_eq!(guest.len(), 1);
    }

    #[test]
    fn unmapping_takes_whole_mappings_only() {
        let mut guest = GuestMemory::default();
        for page in 1..4 {
            guest.map(page << 12, 0x1000, BOTH, None).unwrap();
        }
        assert_eq!(guest.unmap(0x1800, 0x1000), Err(Errno::EINVAL));
        assert_eq!(guest.len(), 3);
        assert_eq!(guest.unmap(0, 0), Err(Errno::EINVAL));
        assert_eq!(guest.unmap(0, 0x3000), Ok(0x2000));
        assert_eq!(guest.unmap(0, 0x3000), Ok(0));
        assert_eq!(guest.len(), 1);
    }

    #[test]
    fn the_last_page_there_is_can_be_mapped() {
        let mut guest = GuestMemory::default();
        let page = u64::MAX - 0xfff;
        guest.map(page, 0x1000, BOTH, Some((memory(0x1000), 0))).unwrap();
        assert_eq!(guest.map(u64::MAX, 1, BOTH, None), Err(Errno::EEXIST));
        guest.write(u64::MAX - 3, b"last").unwrap();
        assert_eq!(guest.write(u64::MAX - 2, b"last"), Err(Fault(u64::MAX - 2)));
        assert_eq!(guest.unmap(1 << 63, 1 << 63), Ok(0x1000));
    }

    #[test]
    fn many_mappings_of_a_file_keep_one_descriptor() {
        let file = memory(0x10_0000);
        let mut guest = GuestMemory::default();
        for page in 0..256_u64 {
            guest.map(page << 12, 0x1000, BOTH, Some((copy(&file), page << 12))).unwrap();
        }
        assert_eq!(guest.files.len(), 1);
        assert_eq!(Arc::strong_count(&guest.files.values().next().unwrap().upgrade().unwrap()), 257);
    }
}
