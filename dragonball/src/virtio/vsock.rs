//! The socket device (virtio 1.2, §5.10): stream sockets between the guest and unix sockets of the host.
//!
//! All of it is in user space, in the way that Firecracker introduced: no vhost module, no context ids that all VMs of
//! a host share, and a path in the file system decides who may connect. [`host`] tells the protocol.
//!
//! A connection does not survive save and restore, as its other end is a program of the host: the restored device tells
//! the guest by a transport reset event, upon which the guest's driver closes every socket and reads its context id
//! again.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Outcome, SavedState, VirtioDevice};
use super::ring::{Life, RING_FEATURES, RingPosition, TURN, Work};
use super::state;

mod connection;
mod host;
mod muxer;
mod packet;

use host::HostSocket;
use muxer::Muxer;
use packet::HEADER_LENGTH;

/// Linux fills the whole receive ring with buffers of a page: 64 of them keep 256 KiB of guest memory busy.
const QUEUE_SIZES: [u16; 3] = [64, 64, 8];
const STATE_VERSION: u16 = 1;
/// Host → guest.
const RECEIVE: usize = 0;
/// Guest → host.
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const TOKEN_TRANSMIT: u32 = 1;
const TOKEN_EVENT: u32 = 2;
const TOKEN_LISTENER: u32 = 3;
const FIRST_FREE_TOKEN: u32 = 4;
/// The lowest context id that a guest may have; 0 to 2 have a meaning of their own.
const FIRST_GUEST_CID: u64 = 3;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Why there can be no socket device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The path leaves no room for the sockets next to it.
    #[error("{path} has {length} bytes, a vsock socket's path at most {limit}; choose a shorter directory")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
        /// The longest that works.
        limit: usize,
    },
    /// The socket cannot be made.
    #[error("Cannot listen on {path}; remove what is left there of an earlier VM, or choose another path")]
    Bind {
        /// The path.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The context id is not one of a guest.
    #[error("Context id {0} is reserved; a guest's is between 3 and 4294967294")]
    ReservedCid(u64),
}

/// A socket device.
pub struct Vsock {
    muxer: Muxer,
    life: Life<3>,
    /// Packets of the guest wait until it takes some.
    congested: bool,
    /// The guest must be told that its connections are gone.
    owes_reset_event: bool,
}

#[derive(Deserialize, Serialize)]
struct State {
    rings: Option<[RingPosition; 3]>,
}

impl Vsock {
    /// A device for the guest with context id `guest_cid`, whose host side is the unix socket `path`.
    ///
    /// The socket is made here, so that a program can connect before the guest is up; it then waits. It is removed when
    /// the device is dropped.
    ///
    /// # Errors
    /// When the context id is reserved, or the socket cannot be made.
    pub fn new(guest_cid: u64, path: &Path) -> Result<Self, VsockError> {
        if !(FIRST_GUEST_CID..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::ReservedCid(guest_cid));
        }
        let muxer = Muxer::new(guest_cid, HostSocket::bind(path)?);
        Ok(Self { muxer, life: Life::NEW, congested: false, owes_reset_event: false })
    }

    /// How many bytes of memory the connections' buffers take.
    #[cfg(test)]
    fn buffered_bytes(&self) -> usize {
        self.muxer.buffered_bytes()
    }

    /// Handles the guest's packets, unless it has to take some first.
    fn transmit(&mut self, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let Some(Work { rings, memory }) = self.life.work() else { return Ok(()) };
        let ring = &mut rings[TRANSMIT];
        for turn in 0.. {
            self.congested = self.muxer.is_congested();
            if self.congested {
                break;
            }
            if turn == TURN {
                ring.call_again()?;
                break;
            }
            let Some(request) = ring.next(memory)? else { break };
            self.muxer.receive(&request.readable, events)?;
            ring.push_used(memory, request.head, 0)?;
        }
        ring.signal_used(memory)
    }

    /// Gives the guest its packets, as far as it has buffers for them.
    fn deliver(&mut self, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let Some(Work { rings, memory }) = self.life.work() else { return Ok(()) };
        let ring = &mut rings[RECEIVE];
        for turn in 0.. {
            if !self.muxer.has_packets() {
                break;
            }
            if turn == TURN {
                ring.call_again()?;
                break;
            }
            let Some(request) = ring.next(memory)? else { break };
            if request.writable.len() <= HEADER_LENGTH {
                return Err(DeviceError::Protocol(format!(
                    "a vsock receive buffer has {} bytes, a header alone has {HEADER_LENGTH}",
                    request.writable.len()
                )));
            }
            match self.muxer.produce(&request.writable, events) {
                Some(length) => ring.push_used(memory, request.head, length)?,
                None => ring.unpop(),
            }
        }
        ring.signal_used(memory)?;
        self.muxer.suspend(events);
        Ok(())
    }

    /// Tells the guest that its connections are gone, once it has a buffer for that.
    fn tell_reset(&mut self) -> Result<(), DeviceError> {
        let Some(Work { rings, memory }) = self.life.work() else { return Ok(()) };
        let ring = &mut rings[EVENT];
        if !self.owes_reset_event {
            return Ok(());
        }
        if let Some(request) = ring.next(memory)? {
            let written = request.writable.write_at(0, &EVENT_TRANSPORT_RESET.to_le_bytes());
            ring.push_used(memory, request.head, written)?;
            self.owes_reset_event = false;
        }
        ring.signal_used(memory)
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_vsock_config`: the guest's context id.
    fn config(&self) -> Vec<u8> {
        self.muxer.guest_cid().to_le_bytes().to_vec()
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        self.life.activate(activation, events)?;
        self.muxer.start(events).inspect_err(|_| self.life.reset(events))
    }

    fn handle_event(
        &mut self,
        token: u32,
        ready: EventSet,
        events: &mut dyn EventRegistry,
    ) -> Result<Outcome, DeviceError> {
        let Some(work) = self.life.work() else { return Ok(Outcome::Done) };
        match token {
            0..TOKEN_LISTENER => work.rings[token as usize].acknowledge_kick(),
            TOKEN_LISTENER => self.muxer.accept(events),
            _ => self.muxer.host_ready(token, ready, events),
        }
        match token {
            TOKEN_EVENT => self.tell_reset()?,
            TOKEN_TRANSMIT => self.transmit(events)?,
            _ => {}
        }
        self.deliver(events)?;
        if self.congested && !self.muxer.is_congested() {
            self.transmit(events)?;
            self.deliver(events)?;
        }
        Ok(Outcome::Done)
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        if self.life.work().is_some() {
            self.muxer.stop(events);
        }
        self.life.reset(events);
        self.congested = false;
        self.owes_reset_event = false;
    }

    fn save(&mut self) -> Result<SavedState, DeviceError> {
        state::encode(STATE_VERSION, &State { rings: self.life.positions() })
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { rings } = state::decode(STATE_VERSION, saved)?;
        self.life.resume_from(rings)?;
        self.owes_reset_event = rings.is_some();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
