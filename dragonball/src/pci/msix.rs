//! MSI-X: a table of messages, one per vector, that the guest programs and masks.
//!
//! A vector costs nothing until its first interrupt: only then an eventfd and a route are made for it, together with
//! those of all other unmasked vectors of the function, because a change of routes costs KVM the same for one or many.
//! Source: PCI Local Bus Specification 3.0, §6.8.2.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::irq::Message;
use crate::irq::router::{Gsi, IrqRouter};

/// Bytes of a table entry: address, data, control.
const ENTRY: usize = 16;
const CONTROL: usize = 12;
const ENTRY_MASKED: u8 = 1;
/// Message control, upper byte: enable, function mask.
const ENABLE: u8 = 1 << 7;
const FUNCTION_MASK: u8 = 1 << 6;

/// The MSI-X state of a function.
pub(crate) struct Msix {
    router: Arc<IrqRouter>,
    state: Mutex<State>,
}

struct State {
    enabled: bool,
    masked: bool,
    vectors: Vec<Vector>,
}

#[derive(Default)]
struct Vector {
    /// The table entry as the guest wrote it.
    entry: [u8; ENTRY],
    pending: bool,
    line: Option<Line>,
}

/// What carries a vector's interrupts into KVM.
struct Line {
    event: EventFd,
    gsi: Gsi,
    routed: Option<Message>,
}

/// What the guest programmed and what is pending.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct MsixState {
    enabled: bool,
    masked: bool,
    entries: Vec<([u8; ENTRY], bool)>,
}

impl Vector {
    fn masked(&self) -> bool {
        self.entry[CONTROL] & ENTRY_MASKED != 0
    }

    fn message(&self) -> Message {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.entry;
        Message { address: u64::from_le_bytes([a, b, c, d, e, f, g, h]), data: u32::from_le_bytes([i, j, k, l]) }
    }

    /// Whether its next interrupt needs a change of routes first.
    fn unrouted(&self) -> bool {
        self.line.as_ref().is_none_or(|line| line.routed != Some(self.message()))
    }
}

impl Msix {
    /// `vectors` vectors, 1 to 2048, all masked.
    pub(crate) fn new(router: Arc<IrqRouter>, vectors: u16) -> Self {
        let masked = || {
            let mut vector = Vector::default();
            vector.entry[CONTROL] = ENTRY_MASKED;
            vector
        };
        let vectors = std::iter::repeat_with(masked).take(usize::from(vectors)).collect();
        Self { router, state: Mutex::new(State { enabled: false, masked: false, vectors }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest wrote message control; its upper byte is given.
    pub(crate) fn set_control(&self, upper: u8) {
        let mut state = self.state();
        state.enabled = upper & ENABLE != 0;
        state.masked = upper & FUNCTION_MASK != 0;
        self.deliver_pending(&mut state);
    }

    /// Whether the function interrupts by MSI-X.
    pub(crate) fn enabled(&self) -> bool {
        self.state().enabled
    }

    /// Answers a read of the table.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset..).zip(data) {
            let position = usize::try_from(at).ok();
            *byte = position.and_then(|at| Some(state.vectors.get(at / ENTRY)?.entry[at % ENTRY])).unwrap_or(0);
        }
    }

    /// Takes a write to the table.
    pub(crate) fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        for (at, value) in (offset..).zip(data) {
            let Ok(at) = usize::try_from(at) else { return };
            let Some(vector) = state.vectors.get_mut(at / ENTRY) else { return };
            // Of the control word only the mask bit exists.
            vector.entry[at % ENTRY] = match at % ENTRY {
                CONTROL => value & ENTRY_MASKED,
                13..=15 => 0,
                _ => *value,
            };
        }
        self.deliver_pending(&mut state);
    }

    /// Answers a read of the pending bits.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let bit =
                |index: usize| state.vectors.get(first.saturating_add(index)).is_some_and(|vector| vector.pending);
            *byte = (0..8).fold(0, |bits, index| bits | u8::from(bit(index)) << index);
        }
    }

    /// Raises the interrupt of `vector`, or notes it as pending while it is masked. Unknown vectors are ignored.
    pub(crate) fn signal(&self, vector: u16) {
        let mut state = self.state();
        let index = usize::from(vector);
        if !state.enabled || index >= state.vectors.len() {
            return;
        }
        if state.masked || state.vectors[index].masked() {
            state.vectors[index].pending = true;
            return;
        }
        if let Err(error) = self.raise(&mut state, index) {
            tracing::warn!(%error, vector, "an interrupt could not be raised");
        }
    }

    fn raise(&self, state: &mut State, index: usize) -> io::Result<()> {
        if state.vectors[index].unrouted() {
            self.route_unmasked(state)?;
        }
        match &state.vectors[index].line {
            Some(line) => line.event.write(1),
            None => Ok(()),
        }
    }

    /// Gives every unmasked vector its line and its route.
    fn route_unmasked(&self, state: &mut State) -> io::Result<()> {
        let mut changes = Vec::new();
        let mut fresh = Vec::new();
        for (index, vector) in state.vectors.iter_mut().enumerate().filter(|(_, vector)| !vector.masked()) {
            let message = vector.message();
            let line = match &mut vector.line {
                Some(line) => line,
                none => {
                    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
                    fresh.push(index);
                    none.insert(Line { event, gsi: self.router.allocate()?, routed: None })
                }
            };
            if line.routed != Some(message) {
                changes.push((line.gsi, message));
                line.routed = Some(message);
            }
        }
        let result = self.router.route(&changes).and_then(|()| self.attach(state, &fresh));
        if result.is_err() {
            for vector in &mut state.vectors {
                self.drop_line(vector);
            }
        }
        result
    }

    fn attach(&self, state: &State, fresh: &[usize]) -> io::Result<()> {
        for line in fresh.iter().filter_map(|index| state.vectors[*index].line.as_ref()) {
            self.router.attach(&line.event, line.gsi)?;
        }
        Ok(())
    }

    fn drop_line(&self, vector: &mut Vector) {
        if let Some(line) = vector.line.take() {
            // Not attached when attaching it is what failed.
            let _ = self.router.detach(&line.event, line.gsi);
            self.router.release(line.gsi);
        }
    }

    fn deliver_pending(&self, state: &mut State) {
        if !state.enabled || state.masked {
            return;
        }
        for index in 0..state.vectors.len() {
            let vector = &mut state.vectors[index];
            if vector.pending && !vector.masked() {
                vector.pending = false;
                if let Err(error) = self.raise(state, index) {
                    tracing::warn!(%error, index, "a pending interrupt could not be raised");
                }
            }
        }
    }

    /// The interrupt routes that are in use.
    pub(crate) fn routes(&self) -> Vec<u32> {
        let state = self.state();
        state.vectors.iter().filter_map(|vector| Some(vector.line.as_ref()?.gsi.number())).collect()
    }

    /// The state to be saved.
    pub(crate) fn save(&self) -> MsixState {
        let state = self.state();
        MsixState {
            enabled: state.enabled,
            masked: state.masked,
            entries: state.vectors.iter().map(|vector| (vector.entry, vector.pending)).collect(),
        }
    }

    /// Takes a saved state; false when it is of another number of vectors.
    pub(crate) fn restore(&self, saved: &MsixState) -> bool {
        let mut state = self.state();
        if saved.entries.len() != state.vectors.len() {
            return false;
        }
        for (vector, (entry, pending)) in state.vectors.iter_mut().zip(&saved.entries) {
            vector.entry = *entry;
            vector.entry[CONTROL] &= ENTRY_MASKED;
            vector.pending = *pending;
        }
        (state.enabled, state.masked) = (saved.enabled, saved.masked);
        self.deliver_pending(&mut state);
        true
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for vector in &mut state.vectors {
            if let Some(line) = vector.line.take() {
                let _ = self.router.detach(&line.event, line.gsi);
                self.router.release(line.gsi);
            }
        }
    }
}
