//! What a driver asks of a memory device, and what it is answered (virtio 1.2, §5.15.6; `linux/virtio_mem.h`).

use crate::memory::plug::{BLOCK, Run};
use crate::virtio::buffers::Buffers;

/// Length of a request.
const LENGTH: usize = 24;
/// Length of a response.
pub(super) const RESPONSE_LENGTH: usize = 10;

/// A request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Request {
    /// Give these blocks to the guest.
    Plug(Run),
    /// Take these blocks from the guest.
    Unplug(Run),
    /// Take all blocks from the guest.
    UnplugAll,
    /// Say what these blocks are.
    State(Run),
}

/// An answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Response {
    /// It was done.
    Ack,
    /// It was done; the blocks are of this state.
    State(BlockState),
    /// It cannot be done as things are: more memory than the guest shall have.
    Nack,
    /// The host cannot do it now.
    Busy,
    /// The request is wrong.
    Error,
}

/// What blocks are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub(super) enum BlockState {
    /// All are plugged.
    Plugged = 0,
    /// None is plugged.
    Unplugged = 1,
    /// Some are plugged.
    Mixed = 2,
}

impl Request {
    /// Reads a request about the region at guest address `start`; `None` when it is none that a device can carry out,
    /// whatever its blocks are.
    pub(super) fn read(readable: &Buffers<'_>, start: u64) -> Option<Self> {
        let raw: [u8; LENGTH] = readable.read_array(0)?;
        let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let address = u64::from_le_bytes([raw[8], raw[9], raw[10], raw[11], raw[12], raw[13], raw[14], raw[15]]);
        let run = || {
            let offset = address.checked_sub(start).filter(|offset| offset.is_multiple_of(BLOCK))?;
            let count = u64::from(half(16));
            (count > 0).then_some(Run { first: offset / BLOCK, count })
        };
        match half(0) {
            0 => run().map(Self::Plug),
            1 => run().map(Self::Unplug),
            2 => Some(Self::UnplugAll),
            3 => run().map(Self::State),
            _ => None,
        }
    }
}

impl Response {
    /// The response as it is written.
    pub(super) fn bytes(self) -> [u8; RESPONSE_LENGTH] {
        let (kind, state) = match self {
            Self::Ack => (0_u16, 0),
            Self::State(state) => (0, state as u16),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        let mut bytes = [0; RESPONSE_LENGTH];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}
