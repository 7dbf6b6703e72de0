//! The memory device (virtio 1.2, §5.15): the guest's memory grows and shrinks while it runs, in blocks of 2 MiB.
//!
//! The host says how much the guest shall have ([`MemControl::set_requested`]), and the driver plugs and unplugs blocks of
//! its choice until it has that much; it never gets more. A block that the guest does not have is inaccessible to it and to
//! its devices, and holds no memory of the host.
//!
//! The blocks stay plugged when the driver resets the device (virtio 1.2, §5.15.5.2): they are in use. A driver that
//! starts anew unplugs them all first.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::buffers::Request as Chain;
use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Interrupt, Outcome, SavedState, VirtioDevice};
use super::ring::{Life, RING_FEATURES, RingPosition};
use super::state;
use crate::memory::PluggableMemory;
use crate::memory::plug::{BLOCK, PluggedBlocks, Run};

mod control;
mod request;

pub use control::{MemControl, MemState};
use request::{BlockState, RESPONSE_LENGTH, Request, Response};

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver knows that it must not touch what is not plugged (Linux 5.16 and on).
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u16 = 1;
/// The ring's token, which [`Life`] gives it.
const RING: u32 = 0;
/// The token of the host's wish for another size.
const REQUESTED: u32 = 1;

/// A memory device.
pub struct Mem {
    memory: PluggableMemory,
    control: MemControl,
    life: Life<1>,
    interrupt: Option<Arc<dyn Interrupt>>,
}

#[derive(Deserialize, Serialize)]
struct State {
    start: u64,
    length: u64,
    requested: u64,
    /// A bit for each block, the first one's lowest.
    plugged: Vec<u64>,
    rings: Option<[RingPosition; 1]>,
}

impl Mem {
    /// A device for `memory`, of which the guest shall never have more than `max` bytes.
    ///
    /// # Errors
    /// When there are no file descriptors left.
    pub(crate) fn new(memory: PluggableMemory, max: u64) -> io::Result<Self> {
        let control = MemControl::new(max.min(memory.range().length))?;
        Ok(Self { memory, control, life: Life::NEW, interrupt: None })
    }

    /// The host's handle on it.
    #[must_use]
    pub fn control(&self) -> MemControl {
        self.control.clone()
    }

    /// Serves the ring, at most one turn of it.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(work) = self.life.work() else { return Ok(()) };
        let (memory, control, interrupt) = (&mut self.memory, &self.control, &self.interrupt);
        let ring = &mut work.rings[0];
        ring.acknowledge_kick();
        ring.serve(&work.memory, |chain| {
            let written = answer(chain, memory, control)?;
            // Before the answer is seen: the driver compares the size with its own.
            if let Some(interrupt) = interrupt {
                interrupt.set_config(config(memory, control));
            }
            Ok(written)
        })
    }

    fn note(&self, driver: bool) {
        let plugged = self.memory.plugged();
        self.control.state.update(|state| (state.plugged, state.driver) = (plugged, driver));
    }

    /// Plugs `blocks` into a guest that has none, all of them or none.
    fn plug_all(&mut self, blocks: &PluggedBlocks) -> Result<(), DeviceError> {
        let plugged = blocks.runs().into_iter().try_for_each(|run| self.memory.plug(run));
        plugged.map_err(|source| {
            // The first error is the one to report; what cannot be closed again is logged, and no device reaches it.
            let _ = self.memory.unplug_all();
            DeviceError::Host { action: "plug the memory that a saved guest had", source }
        })
    }
}

/// `struct virtio_mem_config`. All of the region is usable at any time: what the guest gets is limited by size alone.
fn config(memory: &PluggableMemory, control: &MemControl) -> Vec<u8> {
    let range = memory.range();
    // No node: `VIRTIO_MEM_F_ACPI_PXM` is not offered.
    let node = 0;
    let words = [BLOCK, node, range.start, range.length, range.length, memory.plugged(), control.state().requested];
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Carries out the request of `chain`; returns the length of the answer.
fn answer(chain: &Chain<'_>, memory: &mut PluggableMemory, control: &MemControl) -> Result<usize, DeviceError> {
    if chain.writable.len() < RESPONSE_LENGTH {
        return Err(DeviceError::Protocol(format!(
            "a memory request leaves {} bytes for the response, which has {RESPONSE_LENGTH}",
            chain.writable.len()
        )));
    }
    let request = Request::read(&chain.readable, memory.range().start);
    let response = request.map_or(Response::Error, |request| carry_out(request, memory, control.state().requested));
    let plugged = memory.plugged();
    control.state.update(|state| state.plugged = plugged);
    Ok(chain.writable.write_at(0, &response.bytes()))
}

fn carry_out(request: Request, memory: &mut PluggableMemory, requested: u64) -> Response {
    match request {
        Request::Plug(run) => plug(run, memory, requested),
        Request::Unplug(run) if !memory.blocks().all(run) => Response::Error,
        Request::Unplug(run) => done("unplug", memory.unplug(run)),
        Request::UnplugAll => done("unplug all", memory.unplug_all()),
        Request::State(run) if !memory.blocks().exist(run) => Response::Error,
        Request::State(run) if memory.blocks().all(run) => Response::State(BlockState::Plugged),
        Request::State(run) if memory.blocks().any(run) => Response::State(BlockState::Mixed),
        Request::State(_) => Response::State(BlockState::Unplugged),
    }
}

fn plug(run: Run, memory: &mut PluggableMemory, requested: u64) -> Response {
    if !memory.blocks().exist(run) || memory.blocks().any(run) {
        return Response::Error;
    }
    // A count of 16 bits in blocks of 2 MiB stays far below 64 bits.
    if memory.plugged() + run.count * BLOCK > requested {
        return Response::Nack;
    }
    done("plug", memory.plug(run))
}

/// The guest tries again later what the host refuses.
fn done(action: &str, result: io::Result<()>) -> Response {
    match result {
        Ok(()) => Response::Ack,
        Err(error) => {
            tracing::warn!(action, %error, "the host refuses a memory request of the guest");
            Response::Busy
        }
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Mem
    }

    fn features(&self) -> u64 {
        RING_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        config(&self.memory, &self.control)
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        if activation.features & UNPLUGGED_INACCESSIBLE == 0 {
            return Err(DeviceError::Protocol(String::from(
                "the driver of the memory device does not know that unplugged memory is inaccessible; give the guest a \
                 kernel from version 5.16 on",
            )));
        }
        let interrupt = Arc::clone(&activation.interrupt);
        self.life.activate(activation, events)?;
        let changed = self.control.changed.as_raw_fd();
        if let Err(source) = events.add(changed, REQUESTED, EventSet::IN) {
            self.life.reset(events);
            return Err(DeviceError::Host { action: "watch the size of memory", source });
        }
        self.interrupt = Some(interrupt);
        self.note(true);
        Ok(())
    }

    fn handle_event(&mut self, token: u32, _: EventSet, _: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        match token {
            RING => self.serve().map(|()| Outcome::Done),
            _ => {
                // Nothing to read is as good as read.
                let _ = self.control.changed.read();
                Ok(Outcome::ConfigChanged)
            }
        }
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        if self.interrupt.take().is_some()
            && let Err(error) = events.remove(self.control.changed.as_raw_fd())
        {
            tracing::debug!(%error, "the size of memory was not watched");
        }
        self.life.reset(events);
        self.note(false);
    }

    /// The blocks are saved, not what is in them: guest memory is saved by whoever saves the machine.
    fn save(&mut self) -> Result<SavedState, DeviceError> {
        let range = self.memory.range();
        let plugged = self.memory.blocks().to_words();
        let requested = self.control.state().requested;
        let rings = self.life.positions();
        state::encode(STATE_VERSION, &State { start: range.start, length: range.length, requested, plugged, rings })
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { start, length, requested, plugged, rings } = state::decode(STATE_VERSION, saved)?;
        let (range, max) = (self.memory.range(), self.control.state().max);
        let invalid = |what: String| Err(DeviceError::InvalidState(what));
        if (start, length) != (range.start, range.length) {
            return invalid(format!(
                "its memory is {length:#x} bytes at {start:#x}, this machine's is {:#x} bytes at {:#x}; give the same sizes",
                range.length, range.start
            ));
        }
        if requested > max || !requested.is_multiple_of(BLOCK) {
            return invalid(format!("the guest shall have {requested:#x} bytes, of at most {max:#x} in whole blocks"));
        }
        let Some(plugged) = PluggedBlocks::from_words(length, &plugged) else {
            return invalid(String::from("its plugged blocks are not those of its memory"));
        };
        if self.memory.plugged() > 0 {
            return invalid(String::from("this guest has memory already; restore into a new machine"));
        }
        self.life.resume_from(rings)?;
        if let Err(error) = self.plug_all(&plugged) {
            return self.life.resume_from(None).and(Err(error));
        }
        self.control.state.update(|state| state.requested = requested);
        self.note(false);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
