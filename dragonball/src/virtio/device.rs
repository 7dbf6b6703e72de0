//! What a virtio device is, apart from the transport that carries it.
//!
//! A device is owned by the `vmm` thread: every method here is called on that thread, so a device needs no lock.
//! Its transport keeps the registers (feature negotiation, ring addresses, MSI-X) and answers the vCPUs from them; it
//! calls the device only to activate, to reset, to write device configuration, to save and to restore. Once activated,
//! a device lives on its file descriptors: ring kicks and whatever it registered with [`EventRegistry`].
//!
//! The guest is hostile. A device never panics on what a ring holds; it answers an error to the request where the
//! protocol has one, and returns [`DeviceError`] otherwise: the transport then sets `DEVICE_NEEDS_RESET` (virtio 1.2,
//! §2.1.2) and stops calling the device until the guest resets it.

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

pub use crate::memory::{GuestRegions, Region};

/// Guest memory as devices see it. Taken at activation, it shows what is plugged later too, and refuses what is unplugged.
pub type GuestMemory = Arc<GuestRegions>;

/// Device types this VMM has; the value is the virtio device id (virtio 1.2, §5).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Memory device.
    Mem = 24,
    /// File system device.
    Fs = 26,
    /// Persistent memory.
    Pmem = 27,
}

/// A shared memory region that a device shows through a PCI BAR (virtio 1.2, §2.10).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SharedMemory {
    /// The region's id, of the device type's own numbering.
    pub id: u8,
    /// Length in bytes, a power of two.
    pub length: u64,
}

/// Tells the guest that something happened. Cheap and callable from any thread.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used. Does nothing for a queue that has no vector.
    fn signal_queue(&self, index: u16);
    /// The device configuration changed.
    fn signal_config(&self);
    /// The driver reads `config` as the device configuration from now on. For a change that the driver itself asked for by
    /// a request: it may look as soon as that is answered, and no signal tells it.
    fn set_config(&self, config: Vec<u8>);
}

/// The event loop as a device sees it. Tokens are the device's own numbers; they come back in
/// [`VirtioDevice::handle_event`]. A descriptor must be removed before it is closed.
pub trait EventRegistry {
    /// Watches `fd` (level-triggered unless `events` says otherwise).
    ///
    /// # Errors
    /// When epoll refuses.
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()>;
    /// Changes what is watched of `fd`.
    ///
    /// # Errors
    /// When it is not watched.
    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()>;
    /// Watches `fd` no longer.
    ///
    /// # Errors
    /// When it is not watched.
    fn remove(&mut self, fd: RawFd) -> std::io::Result<()>;
}

/// One ring, set up by the driver and checked by the transport.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its index among the device's queues.
    pub index: u16,
    /// The ring. Its addresses were checked to lie in guest memory.
    pub queue: Queue,
    /// Readable when the driver rang the doorbell.
    pub kick: EventFd,
}

/// What a device gets when the driver sets `DRIVER_OK`.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues that the driver enabled, in index order; one that it left out is missing.
    pub queues: Vec<ActiveQueue>,
    /// The feature bits that both sides agreed on, transport bits included.
    pub features: u64,
    /// How to interrupt the guest.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A device's saved state: versioned, opaque to everyone else, hostile when it comes back.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct SavedState {
    /// Format version of `data`, the device's own.
    pub version: u16,
    /// The state in postcard format.
    pub data: Vec<u8>,
}

/// Why a device stopped working.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the protocol in a way that no request status can tell.
    #[error("The driver broke the protocol: {0}")]
    Protocol(String),
    /// The driver left out a queue that the device cannot work without.
    #[error("Queue {0} is missing")]
    MissingQueue(u16),
    /// A ring could not be read or written.
    #[error("Ring access failed")]
    Ring(#[from] virtio_queue::Error),
    /// The host side failed.
    #[error("Cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A saved state does not fit this device.
    #[error("Saved state: {0}")]
    InvalidState(String),
}

/// A virtio device.
pub trait VirtioDevice: Send {
    /// The device type.
    fn kind(&self) -> DeviceKind;

    /// The feature bits offered: the device type's own, plus `RING_EVENT_IDX` and `RING_INDIRECT_DESC` where the device
    /// handles them. `VERSION_1` is the transport's.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two: how many queues there are.
    fn queue_sizes(&self) -> &[u16];

    /// The whole device configuration space as the driver reads it now. The transport keeps a copy and asks again
    /// after `activate`, `write_config`, `reset`, `restore` and each `handle_event` that said so.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver wrote `data` at `offset` of the configuration space. Whatever is read-only or out of range is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The shared memory regions of the device, for which the transport sets up a BAR.
    fn shared_memory(&self) -> Option<SharedMemory> {
        None
    }

    /// Starts working on the rings. Called once, until `reset`.
    ///
    /// # Errors
    /// The device then holds nothing: no descriptor is registered.
    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError>;

    /// A registered descriptor is ready.
    ///
    /// # Errors
    /// The device needs a reset.
    fn handle_event(
        &mut self,
        token: u32,
        ready: EventSet,
        events: &mut dyn EventRegistry,
    ) -> Result<Outcome, DeviceError>;

    /// Stops and forgets the rings; every descriptor is unregistered. Idempotent. The device can be activated again.
    fn reset(&mut self, events: &mut dyn EventRegistry);

    /// The state of the device, taken while the vCPUs stand still; requests in flight are finished or part of it.
    /// Ring positions are in it, ring addresses are the transport's.
    ///
    /// # Errors
    /// When the device cannot stop now.
    fn save(&mut self) -> Result<SavedState, DeviceError>;

    /// Takes a saved state, before `activate`, which then continues from it.
    ///
    /// # Errors
    /// [`DeviceError::InvalidState`] when it does not fit; the device is as it was before.
    fn restore(&mut self, state: &SavedState) -> Result<(), DeviceError>;
}

/// What the transport must do after an event.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Outcome {
    /// Nothing.
    #[default]
    Done,
    /// Read the configuration again and signal the guest.
    ConfigChanged,
}
