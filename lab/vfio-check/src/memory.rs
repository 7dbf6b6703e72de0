//! Memory that a device shares with this process: buffers for DMA, and BARs.

use std::io;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, ensure};

/// A mapping. What is in it can change at any time, so that it is only copied from and to.
#[derive(Debug)]
pub(crate) struct Shared {
    start: NonNull<u8>,
    size: usize,
}

impl Shared {
    /// Zeroed memory for DMA.
    pub(crate) fn anonymous(size: usize) -> Result<Self> {
        Self::map(size, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0).context("Cannot get memory for DMA")
    }

    /// A part of a file, as a BAR.
    pub(crate) fn of_file(file: RawFd, offset: u64, size: usize) -> Result<Self> {
        Self::map(size, libc::MAP_SHARED, file, libc::off_t::try_from(offset)?).context("Cannot map a BAR")
    }

    fn map(size: usize, flags: i32, file: RawFd, offset: libc::off_t) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, file, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { start, size })
    }

    /// Where it begins in this process.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Copies from it.
    pub(crate) fn read(&self, offset: usize, length: usize) -> Result<Vec<u8>> {
        self.check(offset, length)?;
        let mut data = vec![0; length];
        // SAFETY: the range lies in the mapping, and the vector is memory of its own.
        unsafe { ptr::copy_nonoverlapping(self.start.as_ptr().add(offset), data.as_mut_ptr(), length) };
        Ok(data)
    }

    /// Copies to it.
    pub(crate) fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.check(offset, data.len())?;
        // SAFETY: the range lies in the mapping, and no reference to it is ever made.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), self.start.as_ptr().add(offset), data.len()) };
        Ok(())
    }

    fn check(&self, offset: usize, length: usize) -> Result<()> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.size);
        ensure!(inside, "{length} bytes at {offset:#x} leave a mapping of {:#x} bytes", self.size);
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's own and nothing points into it any more. An error would leave it there.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size) };
    }
}
