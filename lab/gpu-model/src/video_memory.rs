//! Memory of the device: files without a name whose size nobody can change, which clients map.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

/// A part of the device's memory, zero at first. Only what was written takes memory of the host.
#[derive(Debug)]
pub(crate) struct VideoMemory {
    file: File,
    size: u64,
}

impl VideoMemory {
    /// Memory of `size` bytes.
    pub(crate) fn new(name: &str, size: u64) -> Result<Self, Errno> {
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&file, i64::try_from(size).map_err(|_| Errno::EINVAL)?)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        Ok(Self { file: file.into(), size })
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The file, for a client to map.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether a range lies in it.
    pub(crate) fn holds(&self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.size)
    }

    /// Reads from `offset`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Writes at `offset`.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes all of it zero and gives it back to the host.
    pub(crate) fn clear(&self) -> Result<(), Errno> {
        let size = i64::try_from(self.size).map_err(|_| Errno::EINVAL)?;
        fallocate(&self.file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, size)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn it_takes_memory_for_what_was_written_until_it_is_cleared() {
        let memory = VideoMemory::new("test", 8 << 30).unwrap();
        memory.write((8 << 30) - 4, b"last").unwrap();
        assert!(memory.file.metadata().unwrap().blocks() < 8192);
        memory.clear().unwrap();
        let mut last = [1; 4];
        memory.read((8 << 30) - 4, &mut last).unwrap();
        assert_eq!((last, memory.file.metadata().unwrap().blocks()), ([0; 4], 0));
    }

    #[test]
    fn a_client_cannot_change_its_size() {
        let memory = VideoMemory::new("test", 1 << 20).unwrap();
        assert_eq!(ftruncate(memory.descriptor(), 0), Err(Errno::EPERM));
        assert_eq!(ftruncate(memory.descriptor(), 2 << 20), Err(Errno::EPERM));
    }
}
