//! The entropy device (virtio 1.2, §5.4): fills the driver's buffers from the host's `getrandom`.
//!
//! A guest decides how much it asks for, so a request is cut at [`MAX_REQUEST`] bytes; the driver sees how many it got
//! and asks again.

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::buffers::Buffers;
use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Outcome, SavedState, VirtioDevice};
use super::ring::{Life, RING_FEATURES, RingPosition};
use super::state;

/// The most bytes that one request gets, so that no request holds the device thread for long.
pub const MAX_REQUEST: usize = 64 << 10;

const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u16 = 1;

/// An entropy device.
pub struct Rng {
    life: Life<1>,
}

#[derive(Deserialize, Serialize)]
struct State {
    rings: Option<[RingPosition; 1]>,
}

impl Rng {
    /// An entropy device that is not activated yet.
    #[must_use]
    pub fn new() -> Self {
        Self { life: Life::NEW }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        self.life.activate(activation, events)
    }

    fn handle_event(&mut self, _: u32, _: EventSet, _: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        if let Some(work) = self.life.work() {
            let ring = &mut work.rings[0];
            ring.acknowledge_kick();
            ring.serve(&work.memory, |request| fill(&request.writable))?;
        }
        Ok(Outcome::Done)
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        self.life.reset(events);
    }

    fn save(&mut self) -> Result<SavedState, DeviceError> {
        state::encode(STATE_VERSION, &State { rings: self.life.positions() })
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { rings } = state::decode(STATE_VERSION, saved)?;
        self.life.resume_from(rings)
    }
}

/// Fills `buffers` with random bytes, up to the limit; returns how many.
fn fill(buffers: &Buffers<'_>) -> Result<usize, DeviceError> {
    let wanted = buffers.len().min(MAX_REQUEST);
    let mut chunk = [0; 1024];
    let mut done = 0;
    while done < wanted {
        let part = (wanted - done).min(chunk.len());
        let part = &mut chunk[..part];
        entropy(part).map_err(|source| DeviceError::Host { action: "get random bytes", source })?;
        done += buffers.write_at(done, part);
    }
    Ok(done)
}

/// Fills `bytes` from the host's random number generator, which is seeded long before a VM can start.
fn entropy(bytes: &mut [u8]) -> std::io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: pointer and length are those of a live, writable slice.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
