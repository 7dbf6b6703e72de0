//! Pieces of guest memory by their addresses in this process, for `readv` and `writev`.
//!
//! This is where frames enter and leave guest memory; all of this device's unsafe accesses to it are here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use crate::virtio::device::GuestMemory;

/// The most pieces that one system call takes (`UIO_MAXIOV` of `linux/uio.h`).
pub(super) const PIECES_MAX: usize = 1024;

/// A list of pieces, seen as one run of bytes.
pub(super) struct Pieces {
    list: Vec<libc::iovec>,
    /// Keeps the pieces mapped.
    _memory: GuestMemory,
}

// SAFETY: the addresses are those of guest memory, which the value keeps and which any thread may access.
unsafe impl Send for Pieces {}

impl Pieces {
    /// An empty list of pieces of `memory`.
    pub(super) fn new(memory: GuestMemory) -> Self {
        Self { list: Vec::new(), _memory: memory }
    }

    /// How many pieces there are.
    pub(super) fn count(&self) -> usize {
        self.list.len()
    }

    /// Forgets all pieces.
    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    /// Forgets the first `count` pieces.
    pub(super) fn forget_first(&mut self, count: usize) {
        self.list.drain(..count);
    }

    /// Appends `slices`, which are slices of the list's memory.
    pub(super) fn extend<'m>(&mut self, slices: impl Iterator<Item = VolatileSlice<'m>>) {
        self.list.extend(
            slices.map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }),
        );
    }

    /// Reads one frame into the pieces, as many as a call takes.
    ///
    /// # Errors
    /// The descriptor's own; `WouldBlock` when there is none for now.
    pub(super) fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (list, count) = self.vector(self.list.len().min(PIECES_MAX));
        // SAFETY: the pieces lie in guest memory, which `self` keeps mapped; the guest may access it at the same time,
        // which is no worse for the kernel's copy than for a device's. `count` is within the list.
        retry(|| unsafe { libc::readv(fd.as_raw_fd(), list, count) })
    }

    /// Writes the pieces as one frame.
    ///
    /// # Errors
    /// The descriptor's own; `WouldBlock` when it takes none for now. `InvalidInput` when there are too many pieces.
    pub(super) fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        if self.list.len() > PIECES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (list, count) = self.vector(self.list.len());
        // SAFETY: as above; the kernel only reads.
        retry(|| unsafe { libc::writev(fd.as_raw_fd(), list, count) })
    }

    /// The first `count` pieces, at most [`PIECES_MAX`], as the system calls take them.
    fn vector(&self, count: usize) -> (*const libc::iovec, libc::c_int) {
        (self.list.as_ptr(), libc::c_int::try_from(count).unwrap_or(0))
    }

    /// Copies `bytes` to `offset`; what lies behind the last piece is left out.
    pub(super) fn write_at(&self, offset: usize, bytes: &[u8]) {
        let (mut skip, mut rest) = (offset, bytes);
        for piece in &self.list {
            let start = skip.min(piece.iov_len);
            skip -= start;
            let (now, later) = rest.split_at(rest.len().min(piece.iov_len - start));
            // SAFETY: the destination is within the piece, which `self` keeps mapped, and `now` lies in this process's own
            // memory, so that they do not overlap. The guest may access the piece at the same time; nothing is assumed of
            // what it holds.
            unsafe { piece.iov_base.cast::<u8>().add(start).copy_from_nonoverlapping(now.as_ptr(), now.len()) };
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
    }
}

/// Reads one frame into memory of this process.
///
/// # Errors
/// The descriptor's own; `WouldBlock` when there is none for now.
pub(super) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for writes of its length.
    retry(|| unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
