//! The last of what a guest printed, kept for whoever has to report why it stopped.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many bytes are kept: the screenful that a kernel panic needs, twice over.
pub const TAIL_BYTES: usize = 8 << 10;

/// A handle to the last [`TAIL_BYTES`] bytes; clones share them, on any thread.
#[derive(Clone, Debug, Default)]
pub struct ConsoleTail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl ConsoleTail {
    /// The bytes, oldest first.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().iter().copied().collect()
    }

    /// The bytes as text for a report: what is no UTF-8 or no printable character but a line feed or tab is replaced,
    /// so that a guest cannot send escape sequences to an operator's terminal.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes())
            .chars()
            .filter(|&character| character != '\r')
            .map(|character| match character {
                '\n' | '\t' => character,
                control if control.is_control() => char::REPLACEMENT_CHARACTER,
                printable => printable,
            })
            .collect()
    }

    /// Appends what the guest printed.
    pub(crate) fn append(&self, printed: &[u8]) {
        let mut bytes = self.lock();
        let kept = &printed[printed.len().saturating_sub(TAIL_BYTES)..];
        let excess = (bytes.len() + kept.len()).saturating_sub(TAIL_BYTES);
        bytes.drain(..excess);
        bytes.extend(kept);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // A queue of bytes is whole at any point at which a holder could have panicked.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_bytes_are_kept_however_they_came() {
        let whole = (0..3 * TAIL_BYTES).map(|at| at.to_le_bytes()[0]).collect::<Vec<_>>();
        for piece in [1, 1000, TAIL_BYTES, TAIL_BYTES + 1, whole.len()] {
            let tail = ConsoleTail::default();
            whole.chunks(piece).for_each(|printed| tail.append(printed));
            assert_eq!(tail.bytes(), whole[whole.len() - TAIL_BYTES..], "in pieces of {piece}");
        }
    }

    #[test]
    fn the_text_of_a_hostile_guest_holds_no_escape_sequence() {
        let tail = ConsoleTail::default();
        tail.append(b"panic:\t\x1b[2J\xff\r\nend");
        assert_eq!(tail.text(), "panic:\t\u{fffd}[2J\u{fffd}\nend");
    }
}
