//! Frames from the guest: written to the port straight from the driver's buffers.

use std::io;

use super::pieces::Pieces;
use super::port::Port;
use super::{FRAME_MAX, HEADER_LENGTH};
use crate::virtio::device::{DeviceError, GuestMemory};
use crate::virtio::ring::{Ring, TURN};

/// Bytes of an Ethernet header: what is shorter is no frame.
const ETHERNET_HEADER: usize = 14;

/// The transmit side of a queue pair.
pub(super) struct Transmitter {
    pub(super) ring: Ring,
    memory: GuestMemory,
    /// The pieces of the frame at hand; kept for its allocation.
    pieces: Pieces,
}

/// How far the transmit side came.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sent {
    /// The ring is empty, or its turn is over.
    All,
    /// The port takes no more for now.
    UntilFull,
    /// There is no host any more.
    Nothing,
}

enum Fate {
    Gone,
    Full,
    Lost,
}

impl Transmitter {
    pub(super) fn new(ring: Ring, memory: GuestMemory) -> Self {
        Self { ring, pieces: Pieces::new(GuestMemory::clone(&memory)), memory }
    }

    /// Sends the frames in the ring, for one turn at most. Without a `port`, they are lost.
    pub(super) fn transmit(&mut self, port: Option<&dyn Port>) -> Result<Sent, DeviceError> {
        let Self { ring, memory, pieces } = self;
        let mut sent = Sent::All;
        for turn in 0.. {
            if turn == TURN {
                ring.call_again()?;
                break;
            }
            let Some(request) = ring.next(memory)? else { break };
            let length = request.readable.len();
            let fate = match port {
                Some(port) if (HEADER_LENGTH + ETHERNET_HEADER..=FRAME_MAX).contains(&length) => {
                    pieces.clear();
                    pieces.extend(request.readable.range(0, length));
                    send(pieces, port)
                }
                _ => Fate::Gone,
            };
            match fate {
                Fate::Gone => ring.stage_used(memory, request.head, 0)?,
                Fate::Full => {
                    ring.unpop();
                    sent = Sent::UntilFull;
                    break;
                }
                Fate::Lost => {
                    ring.stage_used(memory, request.head, 0)?;
                    sent = Sent::Nothing;
                    break;
                }
            }
        }
        ring.signal_used(memory)?;
        Ok(sent)
    }
}

/// Sends one frame. One that the host refuses is lost, as on a wire: its header or length is wrong, the interface is
/// down, or memory is short.
fn send(pieces: &Pieces, port: &dyn Port) -> Fate {
    match pieces.write_to(port.fd()) {
        Ok(_) => Fate::Gone,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Fate::Full,
        Err(error) if matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ECONNREFUSED)) => {
            tracing::debug!(%error, "the tap takes no frames any more");
            Fate::Lost
        }
        Err(error) => {
            tracing::trace!(%error, "the host refused a frame");
            Fate::Gone
        }
    }
}
