//! The console device (virtio 1.2, §5.3), with one port.
//!
//! What the guest prints goes to a file descriptor of the host, or nowhere, and its last [`TAIL_BYTES`] are kept for
//! error reports ([`ConsoleTail`]). A descriptor that takes no more for now (a full pipe, a stopped terminal) holds the
//! guest back through its ring; one that fails is given up, the tail is still kept.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::buffers::Request;
use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Outcome, SavedState, VirtioDevice};
use super::ring::{Life, RING_FEATURES, RingPosition, TURN, Work};
use super::state;

mod host;
mod tail;

use host::HostEnd;
pub use tail::{ConsoleTail, TAIL_BYTES};

const QUEUE_SIZES: [u16; 2] = [32, 32];
const STATE_VERSION: u16 = 1;
/// Guest ← host.
const RECEIVE: usize = 0;
/// Guest → host.
const TRANSMIT: usize = 1;
const TOKEN_RECEIVE: u32 = 0;
const TOKEN_TRANSMIT: u32 = 1;
const TOKEN_INPUT: u32 = 2;
const TOKEN_OUTPUT: u32 = 3;
/// The most that is written to the host at once: a pipe that is ready takes this much without blocking (`PIPE_BUF`).
const CHUNK: usize = libc::PIPE_BUF;

/// A console device.
pub struct Console {
    output: Option<HostEnd>,
    input: Option<HostEnd>,
    tail: ConsoleTail,
    /// Bytes of the first request in the transmit ring that the host has already.
    transmitted: usize,
    life: Life<2>,
}

#[derive(Deserialize, Serialize)]
struct State {
    transmitted: u64,
    rings: Option<[RingPosition; 2]>,
}

impl Console {
    /// A console that prints to `output` and reads from `input`, or does not.
    ///
    /// Both may be shared with other processes: the device never makes them non-blocking.
    #[must_use]
    pub fn new(output: Option<OwnedFd>, input: Option<OwnedFd>) -> Self {
        Self {
            output: output.map(|fd| HostEnd::new(fd, TOKEN_OUTPUT, EventSet::OUT)),
            input: input.map(|fd| HostEnd::new(fd, TOKEN_INPUT, EventSet::IN)),
            tail: ConsoleTail::default(),
            transmitted: 0,
            life: Life::NEW,
        }
    }

    /// A handle to the last bytes that the guest printed; it outlives the device.
    #[must_use]
    pub fn tail(&self) -> ConsoleTail {
        self.tail.clone()
    }

    /// Prints what is in the transmit ring, as far as the host takes it.
    fn transmit(&mut self, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let Self { output, tail, transmitted, life, .. } = self;
        let Some(Work { rings, memory }) = life.work() else { return Ok(()) };
        let ring = &mut rings[TRANSMIT];
        let mut blocked = false;
        for turn in 0.. {
            if turn == TURN {
                ring.call_again()?;
                break;
            }
            let Some(request) = ring.next(memory)? else { break };
            if !print(&request, transmitted, output.as_mut(), tail) {
                ring.unpop();
                blocked = true;
                break;
            }
            *transmitted = 0;
            ring.push_used(memory, request.head, 0)?;
        }
        ring.signal_used(memory)?;
        match output {
            Some(host) => host.watch(blocked, events),
            None => Ok(()),
        }
    }

    /// Hands the guest what the host typed, as far as it has buffers for it.
    fn receive(&mut self, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let Some(host) = &mut self.input else { return Ok(()) };
        let Some(Work { rings, memory }) = self.life.work() else { return Ok(()) };
        let ring = &mut rings[RECEIVE];
        let mut waiting = true;
        for turn in 0.. {
            if !host.is_ready() {
                break;
            }
            if turn == TURN {
                ring.call_again()?;
                break;
            }
            let Some(request) = ring.next(memory)? else {
                waiting = false;
                break;
            };
            match type_in(&request, host) {
                Some(count) => ring.push_used(memory, request.head, count)?,
                None => {
                    ring.unpop();
                    break;
                }
            }
        }
        ring.signal_used(memory)?;
        host.watch(waiting, events)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_console_config`: columns, rows, ports and emergency write, none of which is offered.
    fn config(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        self.life.activate(activation, events)
    }

    fn handle_event(
        &mut self,
        token: u32,
        _: EventSet,
        events: &mut dyn EventRegistry,
    ) -> Result<Outcome, DeviceError> {
        if let Some(work) = self.life.work()
            && let TOKEN_RECEIVE | TOKEN_TRANSMIT = token
        {
            work.rings[token as usize].acknowledge_kick();
        }
        match token {
            TOKEN_RECEIVE | TOKEN_INPUT => self.receive(events)?,
            _ => self.transmit(events)?,
        }
        Ok(Outcome::Done)
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        for host in [&mut self.input, &mut self.output].into_iter().flatten() {
            host.unwatch(events);
        }
        self.transmitted = 0;
        self.life.reset(events);
    }

    fn save(&mut self) -> Result<SavedState, DeviceError> {
        let state = State { transmitted: self.transmitted as u64, rings: self.life.positions() };
        state::encode(STATE_VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { transmitted, rings } = state::decode(STATE_VERSION, saved)?;
        let transmitted = usize::try_from(transmitted)
            .map_err(|_| DeviceError::InvalidState(format!("{transmitted} bytes of one request were printed")))?;
        self.life.resume_from(rings)?;
        self.transmitted = transmitted;
        Ok(())
    }
}

/// Prints `request` from byte `done` on. False when the host takes no more for now.
fn print(request: &Request<'_>, done: &mut usize, mut output: Option<&mut HostEnd>, tail: &ConsoleTail) -> bool {
    let mut chunk = [0; CHUNK];
    loop {
        let count = request.readable.read_at(*done, &mut chunk);
        if count == 0 {
            return true;
        }
        let written = match output.as_mut() {
            Some(host) => host.write(&chunk[..count]),
            None => count,
        };
        if written == 0 {
            return false;
        }
        tail.append(&chunk[..written]);
        *done += written;
    }
}

/// Reads what was typed into `request`; returns how many bytes, or `None` when there is none for now, or ever.
fn type_in(request: &Request<'_>, host: &mut HostEnd) -> Option<usize> {
    match request.writable.len() {
        0 => Some(0),
        room => host.read(|mut fd| request.writable.fill_from(0, room, &mut fd)),
    }
}

#[cfg(test)]
mod tests;
