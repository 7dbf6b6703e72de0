//! Block requests (virtio 1.2, §5.2.6): what the guest asks for, checked whole before anything is done.

use super::task::{GuestBytes, Operation, Task};
use crate::virtio::buffers::Request;
use crate::virtio::device::{DeviceError, GuestMemory};

/// Bytes of a sector, the unit of all addresses and lengths.
pub(super) const SECTOR: u64 = 512;
/// Bytes of a disk's serial number (`VIRTIO_BLK_ID_BYTES`).
pub(super) const ID_LENGTH: usize = 20;
/// The longest piece of a request, and the most pieces.
pub(super) const MAX_SEGMENT: u32 = 1 << 20;
pub(super) const MAX_SEGMENTS: u32 = 126;
/// The most sectors that one request discards: 1 GiB.
pub(super) const MAX_DISCARD: u32 = 2 << 20;
/// The most sectors that one request sets to zero. Where the host cannot do that by itself they are written, at once: 4
/// MiB do not hold the device thread for long.
pub(super) const MAX_WRITE_ZEROES: u32 = 8 << 10;

/// Length of `struct virtio_blk_req`'s head, and of `struct virtio_blk_discard_write_zeroes`.
const HEADER: usize = 16;
const SEGMENT: usize = 16;
/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;

/// How a request ended (`VIRTIO_BLK_S_*`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    Failed = 1,
    Unsupported = 2,
}

impl Status {
    /// The status of what the host answered.
    pub(super) fn of(result: &std::io::Result<()>) -> Self {
        match result {
            Ok(()) => Self::Ok,
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Self::Unsupported,
            Err(error) => {
                tracing::debug!(%error, "a disk request failed");
                Self::Failed
            }
        }
    }
}

/// Where the answer to a request goes.
#[derive(Debug)]
pub(super) struct Answer {
    /// The chain to give back.
    pub(super) head: u16,
    status: GuestBytes,
    /// Bytes of data that a success writes.
    length: usize,
}

impl Answer {
    /// Writes the status; returns how many bytes were written in all.
    pub(super) fn finish(&self, status: Status) -> usize {
        self.status.store(status as u8);
        if status == Status::Ok { self.length + 1 } else { 1 }
    }
}

/// A request after it was read.
#[derive(Debug)]
pub(super) enum Parsed {
    /// There is nothing for the host to do.
    Answered(Answer, Status),
    /// The host has to do something.
    Task(Answer, Task),
}

/// Reads `request`.
///
/// # Errors
/// When it has no header, or no room for a status: the driver cannot even be told.
pub(super) fn parse(
    request: &Request<'_>,
    memory: &GuestMemory,
    capacity: u64,
    read_only: bool,
    id: &[u8; ID_LENGTH],
) -> Result<Parsed, DeviceError> {
    let (Some(kind), Some(sector), Some(room)) = (
        request.readable.read_array(0).map(u32::from_le_bytes),
        request.readable.read_array(8).map(u64::from_le_bytes),
        request.writable.len().checked_sub(1),
    ) else {
        return Err(DeviceError::Protocol(format!(
            "a disk request has {} bytes and leaves {} for the answer, at least {HEADER} and 1 are needed",
            request.readable.len(),
            request.writable.len()
        )));
    };
    let payload = request.readable.len() - HEADER;
    let status = GuestBytes::new(memory, request.writable.range(room, 1));
    let mut answer = Answer { head: request.head, status, length: 0 };
    let refused = |answer, status| Ok(Parsed::Answered(answer, status));
    let disk = Disk { capacity, read_only };
    let task = match kind {
        // VIRTIO_BLK_T_IN
        0 => {
            answer.length = room;
            disk.range(sector, room as u64)
                .map(|offset| (Operation::Read(GuestBytes::new(memory, request.writable.range(0, room))), offset))
        }
        // VIRTIO_BLK_T_OUT
        1 => disk
            .writable_range(sector, payload as u64)
            .map(|offset| (Operation::Write(GuestBytes::new(memory, request.readable.range(HEADER, payload))), offset)),
        // VIRTIO_BLK_T_FLUSH
        4 => Some((Operation::Flush, 0)),
        // VIRTIO_BLK_T_GET_ID
        8 => {
            answer.length = request.writable.write_at(0, &id[..room.min(ID_LENGTH)]);
            return refused(answer, Status::Ok);
        }
        // VIRTIO_BLK_T_DISCARD and VIRTIO_BLK_T_WRITE_ZEROES
        11 | 13 => match disk.segment(request, kind == 13) {
            Ok(task) => Some(task),
            Err(status) => return refused(answer, status),
        },
        _ => return refused(answer, Status::Unsupported),
    };
    match task {
        Some((operation, offset)) => Ok(Parsed::Task(answer, Task { operation, offset })),
        None => refused(answer, Status::Failed),
    }
}

/// What requests are checked against.
struct Disk {
    capacity: u64,
    read_only: bool,
}

impl Disk {
    /// The offset of `length` bytes at `sector`, if these are whole sectors of the disk.
    fn range(&self, sector: u64, length: u64) -> Option<u64> {
        let most = u64::from(MAX_SEGMENT) * u64::from(MAX_SEGMENTS);
        let end = sector.checked_add(length / SECTOR)?;
        let fits = length.is_multiple_of(SECTOR) && length <= most && end <= self.capacity;
        fits.then(|| sector.checked_mul(SECTOR)).flatten()
    }

    fn writable_range(&self, sector: u64, length: u64) -> Option<u64> {
        if self.read_only { None } else { self.range(sector, length) }
    }

    /// The one segment of a discard or write-zeroes request.
    fn segment(&self, request: &Request<'_>, zeroes: bool) -> Result<(Operation, u64), Status> {
        let field = |at: usize| request.readable.read_array(HEADER + at).map(u32::from_le_bytes);
        let sector = request.readable.read_array(HEADER).map(u64::from_le_bytes);
        let (Some(sector), Some(count), Some(flags)) = (sector, field(8), field(12)) else {
            return Err(Status::Failed);
        };
        if request.readable.len() != HEADER + SEGMENT || self.read_only {
            return Err(Status::Failed);
        }
        // Discard has no flag, write-zeroes has one; what is not known must be refused (§5.2.6.2).
        if flags & !UNMAP != 0 || (flags != 0 && !zeroes) {
            return Err(Status::Unsupported);
        }
        let limit = if zeroes { MAX_WRITE_ZEROES } else { MAX_DISCARD };
        let end = sector.checked_add(u64::from(count)).filter(|&end| end <= self.capacity && count <= limit);
        let (Some(_), Some(offset)) = (end, sector.checked_mul(SECTOR)) else { return Err(Status::Failed) };
        let length = u64::from(count) * SECTOR;
        let operation =
            if zeroes { Operation::Zero { length, unmap: flags == UNMAP } } else { Operation::Discard { length } };
        Ok((operation, offset))
    }
}
