//! What a request has the host do, on guest memory that the host reads and writes by itself.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use io_uring::{opcode, squeue, types};
use vm_memory::VolatileSlice;

use crate::virtio::device::GuestMemory;

/// Pieces of guest memory by their addresses in this process.
#[derive(Debug)]
pub(super) struct GuestBytes {
    pieces: Vec<libc::iovec>,
    length: usize,
    /// Keeps the pieces mapped.
    _memory: GuestMemory,
}

// SAFETY: the addresses are those of guest memory, which the value keeps and which any thread may access.
unsafe impl Send for GuestBytes {}

impl GuestBytes {
    /// The `slices`, which are slices of `memory`.
    pub(super) fn new<'m>(memory: &'m GuestMemory, slices: impl Iterator<Item = VolatileSlice<'m>>) -> Self {
        let pieces = slices
            .map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
            .collect::<Vec<_>>();
        let length = pieces.iter().map(|piece| piece.iov_len).sum();
        Self { pieces, length, _memory: GuestMemory::clone(memory) }
    }

    /// Sets the first byte, if there is one.
    pub(super) fn store(&self, byte: u8) {
        if let Some(piece) = self.pieces.first() {
            // SAFETY: the piece is mapped and not empty; the guest may access it at the same time, so the write is
            // volatile and nothing is assumed about the byte.
            unsafe { piece.iov_base.cast::<u8>().write_volatile(byte) };
        }
    }

    /// Leaves out the first `count` bytes.
    fn skip(&mut self, count: usize) {
        self.length = self.length.saturating_sub(count);
        let mut left = count;
        self.pieces.retain_mut(|piece| {
            let cut = left.min(piece.iov_len);
            left -= cut;
            // SAFETY: the result is within the piece or just behind it.
            piece.iov_base = unsafe { piece.iov_base.cast::<u8>().add(cut) }.cast();
            piece.iov_len -= cut;
            piece.iov_len > 0
        });
    }

    fn count(&self) -> u32 {
        // A chain is no longer than its ring.
        u32::try_from(self.pieces.len()).unwrap_or(u32::MAX)
    }
}

/// What to do.
#[derive(Debug)]
pub(super) enum Operation {
    /// Read from the disk into the guest's memory.
    Read(GuestBytes),
    /// Write from the guest's memory to the disk.
    Write(GuestBytes),
    /// Have everything written reach the medium.
    Flush,
    /// Give bytes up; what is read there later does not matter.
    Discard {
        /// How many.
        length: u64,
    },
    /// Set bytes to zero.
    Zero {
        /// How many.
        length: u64,
        /// Whether the space may be given up.
        unmap: bool,
    },
}

/// What to do, and where on the disk.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) operation: Operation,
    /// In bytes. The disk's length was checked, so that it fits `off_t`.
    pub(super) offset: u64,
}

impl Task {
    /// Does it now.
    pub(super) fn run(mut self, file: &File) -> io::Result<()> {
        loop {
            let result = self.attempt(file);
            if let Some(done) = self.absorb(result) {
                return done;
            }
        }
    }

    /// Takes the result of an attempt, here or in the ring, into account: `None` when there is something left to do.
    pub(super) fn absorb(&mut self, result: io::Result<usize>) -> Option<io::Result<()>> {
        let moved = match result {
            Ok(moved) => moved,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => return None,
            Err(error) => return Some(Err(error)),
        };
        match &mut self.operation {
            Operation::Read(bytes) | Operation::Write(bytes) => {
                if moved >= bytes.length {
                    return Some(Ok(()));
                }
                if moved == 0 {
                    // The file ends here: it became shorter since the request was checked.
                    return Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof)));
                }
                bytes.skip(moved);
                self.offset += moved as u64;
                None
            }
            Operation::Flush | Operation::Discard { .. } | Operation::Zero { .. } => Some(Ok(())),
        }
    }

    fn attempt(&self, file: &File) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), offset(self.offset)?);
        match &self.operation {
            Operation::Read(bytes) => {
                let count = i32::try_from(bytes.count()).unwrap_or(i32::MAX);
                // SAFETY: the pieces are mapped guest memory, of which nothing is assumed.
                result(unsafe { libc::preadv(fd, bytes.pieces.as_ptr(), count, offset) })
            }
            Operation::Write(bytes) => {
                let count = i32::try_from(bytes.count()).unwrap_or(i32::MAX);
                // SAFETY: the pieces are mapped guest memory; what the guest changes meanwhile is its own affair.
                result(unsafe { libc::pwritev(fd, bytes.pieces.as_ptr(), count, offset) })
            }
            Operation::Flush => file.sync_data().map(|()| 0),
            Operation::Discard { length } => allocate(file, self.mode(), offset, *length),
            Operation::Zero { length, .. } => match allocate(file, self.mode(), offset, *length) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_zeroes(file, *length),
                done => done,
            },
        }
    }

    /// `fallocate`'s mode for a discard or for zeroes.
    fn mode(&self) -> i32 {
        let how = match self.operation {
            Operation::Zero { unmap: false, .. } => libc::FALLOC_FL_ZERO_RANGE,
            _ => libc::FALLOC_FL_PUNCH_HOLE,
        };
        how | libc::FALLOC_FL_KEEP_SIZE
    }

    fn write_zeroes(&self, file: &File, length: u64) -> io::Result<usize> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).unwrap_or(usize::MAX).min(ZEROES.len());
            file.write_all_at(&ZEROES[..part], self.offset + done)?;
            done += part as u64;
        }
        Ok(0)
    }

    /// The task as an entry of a submission queue.
    pub(super) fn entry(&self, file: &File) -> squeue::Entry {
        let fd = types::Fd(file.as_raw_fd());
        match &self.operation {
            Operation::Read(bytes) => {
                opcode::Readv::new(fd, bytes.pieces.as_ptr(), bytes.count()).offset(self.offset).build()
            }
            Operation::Write(bytes) => {
                opcode::Writev::new(fd, bytes.pieces.as_ptr(), bytes.count()).offset(self.offset).build()
            }
            Operation::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Discard { length } | Operation::Zero { length, .. } => {
                opcode::Fallocate::new(fd, *length).offset(self.offset).mode(self.mode()).build()
            }
        }
    }

    /// Whether a failure of the entry is to be tried again by [`Self::run`], which knows another way.
    pub(super) fn has_another_way(&self, error: &io::Error) -> bool {
        matches!(self.operation, Operation::Zero { .. }) && error.raw_os_error() == Some(libc::EOPNOTSUPP)
    }
}

fn offset(bytes: u64) -> io::Result<i64> {
    i64::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn allocate(file: &File, mode: i32, start: i64, length: u64) -> io::Result<usize> {
    // Nothing is an error to `fallocate`, and a legal request to a disk.
    if length == 0 {
        return Ok(0);
    }
    // SAFETY: no pointers.
    result(unsafe { libc::fallocate(file.as_raw_fd(), mode, start, offset(length)?) } as isize)
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}
