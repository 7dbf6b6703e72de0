//! A ring as a device works on it: requests out, used buffers in, and interrupts only where the driver wants one.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::buffers::Request;
use super::device::{Activation, ActiveQueue, DeviceError, EventRegistry, GuestMemory, GuestRegions, Interrupt};

/// Feature bits of the ring layout that every device here handles.
pub(crate) const RING_FEATURES: u64 = (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << VIRTIO_RING_F_INDIRECT_DESC);

/// Requests served in one go before the other devices get their turn: a driver that adds them as fast as they are
/// served must not own the thread.
pub(crate) const TURN: usize = 256;

/// How far a device has come in a ring: what a saved device keeps of it.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct RingPosition {
    /// The next entry of the available ring to look at, free running.
    pub(crate) next_avail: u16,
    /// The next entry of the used ring to write, free running.
    pub(crate) next_used: u16,
}

/// Where a ring lies, for a device that has to look at it by other means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct RingLayout {
    /// Entries.
    pub(crate) size: u16,
    /// Guest address of the descriptor table.
    pub(crate) descriptors: u64,
    /// Guest address of the available ring.
    pub(crate) available: u64,
    /// Guest address of the used ring.
    pub(crate) used: u64,
    /// The next entry of the available ring to look at, free running.
    pub(crate) next_available: u16,
}

/// One ring at work.
pub(crate) struct Ring {
    index: u16,
    queue: Queue,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    /// Used buffers that the driver does not see yet.
    staged: u16,
    /// The used index when it was last considered whether to interrupt the driver.
    considered: u16,
}

/// Bytes of a used ring's header and of an element (virtio 1.2, §2.7.8).
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
/// Offset of the index in both rings.
const INDEX: u64 = 2;
/// Flag of the available ring: no interrupts, please (virtio 1.2, §2.7.7).
const NO_INTERRUPT: u16 = 1;

impl Ring {
    /// A ring with the agreed `features`.
    pub(crate) fn new(active: ActiveQueue, features: u64, interrupt: Arc<dyn Interrupt>) -> Self {
        let ActiveQueue { index, mut queue, kick } = active;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        Self { index, queue, kick, interrupt, staged: 0, considered: 0 }
    }

    /// Continues from where a saved device was. Kicks and interrupts of that time are lost: both are made up for.
    pub(crate) fn resume(&mut self, position: RingPosition) -> Result<(), DeviceError> {
        self.queue.set_next_avail(position.next_avail);
        self.queue.set_next_used(position.next_used);
        self.considered = position.next_used;
        self.call_again()?;
        self.interrupt.signal_queue(self.index);
        Ok(())
    }

    /// Where the device is in the ring.
    pub(crate) fn position(&self) -> RingPosition {
        RingPosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Where the ring lies.
    pub(crate) fn layout(&self) -> RingLayout {
        RingLayout {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            next_available: self.queue.next_avail(),
        }
    }

    /// Forgets the doorbell's rings up to now.
    pub(crate) fn acknowledge_kick(&self) {
        // Nothing to read is as good as read: the transport's descriptor does not block.
        let _ = self.kick.read();
    }

    /// Makes the event loop come back to this ring after the others.
    pub(crate) fn call_again(&self) -> Result<(), DeviceError> {
        self.kick.write(1).map_err(|source| DeviceError::Host { action: "ring a doorbell", source })
    }

    /// The next request. When there is none the doorbell stays as it is: the device has yet to [`Self::rest`].
    pub(crate) fn pop<'m>(&mut self, memory: &'m GuestRegions) -> Result<Option<Request<'m>>, DeviceError> {
        let limit = self.queue.size();
        match self.queue.iter(memory)?.next() {
            Some(chain) => Request::new(memory, chain, limit).map(Some),
            None => Ok(None),
        }
    }

    /// Has the doorbell ring for the next request; false when that one is there already, and the doorbell does not ring.
    pub(crate) fn rest(&mut self, memory: &GuestRegions) -> Result<bool, DeviceError> {
        let arrived = self.queue.enable_notification(memory)?;
        if arrived {
            self.queue.disable_notification(memory)?;
        }
        Ok(!arrived)
    }

    /// The next request; when there is none, the doorbell will ring for the next one.
    ///
    /// A device that stops before there is none has to come back by itself.
    pub(crate) fn next<'m>(&mut self, memory: &'m GuestRegions) -> Result<Option<Request<'m>>, DeviceError> {
        if let Some(request) = self.pop(memory)? {
            return Ok(Some(request));
        }
        if self.rest(memory)? { Ok(None) } else { self.pop(memory) }
    }

    /// Puts the last popped request back, as if it had not been looked at.
    pub(crate) fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back with `written` bytes in its writable part.
    pub(crate) fn push_used(&mut self, memory: &GuestRegions, head: u16, written: usize) -> Result<(), DeviceError> {
        self.stage_used(memory, head, written)?;
        self.publish_used(memory)
    }

    /// As [`Self::push_used`], but the driver does not see it until [`Self::publish_used`] shows it all that was staged,
    /// at once.
    pub(crate) fn stage_used(&mut self, memory: &GuestRegions, head: u16, written: usize) -> Result<(), DeviceError> {
        if head >= self.queue.size() {
            return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
        }
        let slot = self.queue.next_used().wrapping_add(self.staged) % self.queue.size();
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        let address = self.queue.used_ring() + USED_HEADER + USED_ELEMENT * u64::from(slot);
        memory.write_slice(&element, GuestAddress(address)).map_err(virtio_queue::Error::GuestMemory)?;
        self.staged = self.staged.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was staged.
    pub(crate) fn publish_used(&mut self, memory: &GuestRegions) -> Result<(), DeviceError> {
        let staged = std::mem::take(&mut self.staged);
        if staged == 0 {
            return Ok(());
        }
        let next = self.queue.next_used().wrapping_add(staged);
        self.queue.set_next_used(next);
        let address = GuestAddress(self.queue.used_ring() + INDEX);
        memory.store(next.to_le(), address, Ordering::Release).map_err(virtio_queue::Error::GuestMemory)?;
        Ok(())
    }

    /// Shows the driver what was staged, and interrupts it if buffers were used and it wants to know.
    pub(crate) fn signal_used(&mut self, memory: &GuestRegions) -> Result<(), DeviceError> {
        self.publish_used(memory)?;
        let now = self.queue.next_used();
        let before = std::mem::replace(&mut self.considered, now);
        if now != before && self.wants_interrupt(memory, before, now)? {
            self.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for the step of the used index from `before` to `now` (virtio 1.2, §2.7.7.2
    /// and §2.7.10).
    fn wants_interrupt(&self, memory: &GuestRegions, before: u16, now: u16) -> Result<bool, DeviceError> {
        // The driver sets its wish and then looks at the used index: here it is the other way round, in this order.
        fence(Ordering::SeqCst);
        let event_index = self.queue.event_idx_enabled();
        let offset = if event_index { 4 + 2 * u64::from(self.queue.size()) } else { 0 };
        let address = GuestAddress(self.queue.avail_ring() + offset);
        let wish =
            memory.load(address, Ordering::Relaxed).map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)?;
        Ok(if event_index {
            now.wrapping_sub(wish).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            wish & NO_INTERRUPT == 0
        })
    }

    /// Interrupts the driver on behalf of somebody who has asked it already.
    pub(crate) fn signal(&self) {
        self.interrupt.signal_queue(self.index);
    }

    /// An event by which the host kernel interrupts the driver, where there is such a thing.
    pub(crate) fn interrupt_event(&self) -> Option<EventFd> {
        self.interrupt.queue_event(self.index)
    }

    /// The doorbell.
    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The ring's index among the device's queues.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Serves what is in the ring, at most one turn of it; `serve` says how many bytes it wrote.
    pub(crate) fn serve(
        &mut self,
        memory: &GuestRegions,
        mut serve: impl FnMut(&Request<'_>) -> Result<usize, DeviceError>,
    ) -> Result<(), DeviceError> {
        for turn in 0.. {
            if turn == TURN {
                self.call_again()?;
                break;
            }
            let Some(request) = self.next(memory)? else { break };
            let written = serve(&request)?;
            self.push_used(memory, request.head, written)?;
        }
        self.signal_used(memory)
    }
}

/// All rings of a device that needs every one of its `N`.
pub(crate) struct Rings<const N: usize> {
    rings: [Ring; N],
}

impl<const N: usize> Rings<N> {
    /// Takes the rings out of `activation` and watches their doorbells under the tokens 0 to `N` - 1.
    ///
    /// `positions` are those of a saved device to continue.
    pub(crate) fn start(
        activation: Activation,
        positions: Option<[RingPosition; N]>,
        events: &mut dyn EventRegistry,
    ) -> Result<(Self, GuestMemory), DeviceError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let mut found = queues.into_iter().peekable();
        let mut rings = Vec::with_capacity(N);
        for index in 0..N {
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            let active = found.next_if(|queue| queue.index == index).ok_or(DeviceError::MissingQueue(index))?;
            rings.push(Ring::new(active, features, Arc::clone(&interrupt)));
        }
        let Ok(rings) = <[Ring; N]>::try_from(rings) else { return Err(DeviceError::MissingQueue(0)) };
        let mut started = Self { rings };
        for (ring, position) in started.rings.iter_mut().zip(positions.into_iter().flatten()) {
            ring.resume(position)?;
        }
        started.watch(events)?;
        Ok((started, memory))
    }

    fn watch(&self, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        for (done, ring) in self.rings.iter().enumerate() {
            if let Err(source) = events.add(ring.kick.as_raw_fd(), u32::from(ring.index), EventSet::IN) {
                for watched in &self.rings[..done] {
                    // It was added a moment ago; the error to report is the first one.
                    let _ = events.remove(watched.kick.as_raw_fd());
                }
                return Err(DeviceError::Host { action: "watch a doorbell", source });
            }
        }
        Ok(())
    }

    /// Watches the doorbells no longer.
    pub(crate) fn stop(&self, events: &mut dyn EventRegistry) {
        for ring in &self.rings {
            if let Err(error) = events.remove(ring.kick.as_raw_fd()) {
                tracing::debug!(queue = ring.index, %error, "a doorbell was not watched");
            }
        }
    }

    /// Where the device is in each ring.
    pub(crate) fn positions(&self) -> [RingPosition; N] {
        self.rings.each_ref().map(Ring::position)
    }
}

impl<const N: usize> std::ops::Index<usize> for Rings<N> {
    type Output = Ring;

    fn index(&self, index: usize) -> &Ring {
        &self.rings[index]
    }
}

impl<const N: usize> std::ops::IndexMut<usize> for Rings<N> {
    fn index_mut(&mut self, index: usize) -> &mut Ring {
        &mut self.rings[index]
    }
}

/// What a device that only answers requests has at work: its rings and the memory they lie in.
pub(crate) struct Work<const N: usize> {
    /// The rings.
    pub(crate) rings: Rings<N>,
    /// The guest's memory.
    pub(crate) memory: GuestMemory,
}

/// The life of a device's rings: not yet set up, maybe with positions to continue from, or at work.
pub(crate) enum Life<const N: usize> {
    /// Waiting for `activate`.
    Idle {
        /// Where a restored device goes on.
        resume: Option<[RingPosition; N]>,
    },
    /// Between `activate` and `reset`.
    Active(Work<N>),
}

impl<const N: usize> Life<N> {
    /// A device that was never used.
    pub(crate) const NEW: Self = Self::Idle { resume: None };

    /// Starts the rings.
    pub(crate) fn activate(
        &mut self,
        activation: Activation,
        events: &mut dyn EventRegistry,
    ) -> Result<(), DeviceError> {
        let resume = match self {
            Self::Idle { resume } => *resume,
            Self::Active(_) => return Err(DeviceError::Protocol(String::from("it is active already"))),
        };
        let (rings, memory) = Rings::start(activation, resume, events)?;
        *self = Self::Active(Work { rings, memory });
        Ok(())
    }

    /// Stops the rings and forgets them.
    pub(crate) fn reset(&mut self, events: &mut dyn EventRegistry) {
        if let Self::Active(work) = self {
            work.rings.stop(events);
        }
        *self = Self::NEW;
    }

    /// The rings, if the device is active. An event of an inactive device is a late one, of a batch that a reset cut.
    pub(crate) fn work(&mut self) -> Option<&mut Work<N>> {
        match self {
            Self::Idle { .. } => None,
            Self::Active(work) => Some(work),
        }
    }

    /// Where the device is in its rings, or would continue.
    pub(crate) fn positions(&self) -> Option<[RingPosition; N]> {
        match self {
            Self::Idle { resume } => *resume,
            Self::Active(work) => Some(work.rings.positions()),
        }
    }

    /// Takes positions to continue from at the next `activate`.
    pub(crate) fn resume_from(&mut self, positions: Option<[RingPosition; N]>) -> Result<(), DeviceError> {
        match self {
            Self::Idle { resume } => {
                *resume = positions;
                Ok(())
            }
            Self::Active(_) => Err(DeviceError::InvalidState(String::from("the device is in use; reset it first"))),
        }
    }
}
