//! Frames to the guest: read from the port straight into the driver's buffers.
//!
//! How long a frame is shows only when it is read, so that buffers for the longest one are taken from the ring first;
//! those that a frame leaves are kept for the next one. Where the driver has less to give, the frame is read into memory
//! of this process and copied, and held back if it still does not fit. While the driver has no buffers, nothing is read.

use std::collections::VecDeque;
use std::io;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::pieces::{self, PIECES_MAX, Pieces};
use super::port::Port;
use super::{FRAME_MAX, HEADER_LENGTH};
use crate::virtio::device::{DeviceError, GuestMemory};
use crate::virtio::ring::{Ring, RingPosition, TURN};

/// Offset of `num_buffers` in the header.
const BUFFER_COUNT: usize = 10;

/// The receive side of a queue pair.
pub(super) struct Receiver {
    pub(super) ring: Ring,
    memory: GuestMemory,
    /// Whether a frame may lie in several buffers.
    mergeable: bool,
    /// Buffers that were taken from the ring and are empty.
    buffers: VecDeque<Buffer>,
    /// Their pieces of guest memory, in the same order.
    pieces: Pieces,
    /// How many bytes they have room for.
    room: usize,
    /// Where a frame is read that may not fit into the buffers. Empty until there is one.
    spill: Vec<u8>,
    /// Length of the frame in `spill`, if there is one.
    held: Option<usize>,
}

/// A descriptor chain.
struct Buffer {
    head: u16,
    room: usize,
    pieces: usize,
}

/// What the receive side waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Waits {
    /// A frame.
    ForFrames,
    /// Buffers of the driver.
    ForBuffers,
    /// Nothing: there is no host any more.
    Forever,
}

impl Receiver {
    pub(super) fn new(ring: Ring, memory: GuestMemory, features: u64) -> Self {
        Self {
            ring,
            mergeable: features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0,
            buffers: VecDeque::new(),
            pieces: Pieces::new(GuestMemory::clone(&memory)),
            memory,
            room: 0,
            spill: Vec::new(),
            held: None,
        }
    }

    /// Where the device is in the ring; buffers that were taken and not used count as not taken.
    pub(super) fn position(&self) -> RingPosition {
        let mut position = self.ring.position();
        // A ring has at most 32768 entries.
        position.next_avail = position.next_avail.wrapping_sub(u16::try_from(self.buffers.len()).unwrap_or(0));
        position
    }

    /// Hands the driver frames, until there are none or it has no buffers, for one turn at most.
    pub(super) fn receive(&mut self, port: &dyn Port) -> Result<Waits, DeviceError> {
        let mut waits = None;
        for _ in 0..TURN {
            waits = self.one_frame(port)?;
            if waits.is_some() {
                break;
            }
        }
        if waits.is_none() {
            self.ring.call_again()?;
        }
        self.ring.signal_used(&self.memory)?;
        Ok(waits.unwrap_or(Waits::ForFrames))
    }

    /// Reads a frame, or delivers the one that was held back. `None` when that went well.
    fn one_frame(&mut self, port: &dyn Port) -> Result<Option<Waits>, DeviceError> {
        self.take_buffers()?;
        if self.buffers.is_empty() {
            return Ok(Some(Waits::ForBuffers));
        }
        if let Some(length) = self.held {
            return self.deliver_held(length);
        }
        let direct = self.room >= FRAME_MAX && self.pieces.count() <= PIECES_MAX;
        let result = if direct {
            self.pieces.read_from(port.fd())
        } else {
            self.spill.resize(FRAME_MAX, 0);
            pieces::read(port.fd(), &mut self.spill)
        };
        match result {
            Ok(0) => Ok(Some(Waits::Forever)),
            // No frame can be this short.
            Ok(length) if length <= HEADER_LENGTH => Ok(None),
            Ok(length) if direct => self.use_buffers(length).map(|()| None),
            Ok(length) => {
                self.held = Some(length);
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Some(Waits::ForFrames)),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                Err(DeviceError::Host { action: "write a frame into the driver's buffers", source: error })
            }
            Err(error) => {
                tracing::debug!(%error, "the tap gives no frames any more");
                Ok(Some(Waits::Forever))
            }
        }
    }

    fn deliver_held(&mut self, length: usize) -> Result<Option<Waits>, DeviceError> {
        if self.room >= length {
            self.pieces.write_at(0, &self.spill[..length]);
            self.use_buffers(length)?;
        } else if self.mergeable {
            return Ok(Some(Waits::ForBuffers));
        }
        // One that is too long for a driver's buffers is lost, as on a wire.
        self.held = None;
        Ok(None)
    }

    /// Takes buffers from the ring: as many as a frame may need, or one where each frame has to fit into one.
    fn take_buffers(&mut self) -> Result<(), DeviceError> {
        let needed = match (self.mergeable, self.held) {
            (false, _) => 1,
            (true, Some(length)) => length,
            (true, None) => FRAME_MAX,
        };
        while self.room < needed && (self.held.is_some() || self.pieces.count() < PIECES_MAX) {
            let Some(request) = self.ring.next(&self.memory)? else { break };
            let (room, before) = (request.writable.len(), self.pieces.count());
            if room < HEADER_LENGTH {
                return Err(DeviceError::Protocol(format!(
                    "a receive buffer has {room} bytes, a header alone has {HEADER_LENGTH}"
                )));
            }
            self.pieces.extend(request.writable.range(0, room));
            self.buffers.push_back(Buffer { head: request.head, room, pieces: self.pieces.count() - before });
            self.room = self.room.saturating_add(room);
        }
        Ok(())
    }

    /// Gives the driver the buffers that the frame of `length` bytes lies in, all at once.
    fn use_buffers(&mut self, length: usize) -> Result<(), DeviceError> {
        let (mut left, mut pieces, mut count) = (length, 0, 0_u16);
        while left > 0
            && let Some(buffer) = self.buffers.pop_front()
        {
            let written = left.min(buffer.room);
            self.ring.stage_used(&self.memory, buffer.head, written)?;
            left -= written;
            pieces += buffer.pieces;
            self.room -= buffer.room;
            count += 1;
        }
        self.pieces.write_at(BUFFER_COUNT, &count.to_le_bytes());
        self.pieces.forget_first(pieces);
        self.ring.publish_used(&self.memory)
    }
}
