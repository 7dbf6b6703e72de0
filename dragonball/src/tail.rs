//! The last bytes of a stream, kept for error reports.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// How many bytes are kept.
const CAPACITY: usize = 8 << 10;

/// Keeps the last 8 KiB written to it. Clones share their content.
#[derive(Clone, Debug, Default)]
pub struct OutputTail(Arc<Mutex<VecDeque<u8>>>);

impl OutputTail {
    /// Appends `bytes`; the oldest ones make room.
    pub fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let excess = (kept.len() + bytes.len()).saturating_sub(CAPACITY);
        kept.drain(..excess);
        kept.extend(bytes);
    }

    /// What is kept, as text; what is no UTF-8 is replaced.
    #[must_use]
    pub fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (front, back) = kept.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_bytes_make_room_for_the_newest() {
        let tail = OutputTail::default();
        tail.push(&[b'a'; CAPACITY]);
        tail.push(b"the end");
        let text = tail.text();
        assert_eq!(text.len(), CAPACITY);
        assert!(text.ends_with("athe end"));
    }

    #[test]
    fn one_write_larger_than_the_capacity_keeps_its_end() {
        let tail = OutputTail::default();
        tail.push(b"start");
        let mut large = vec![b'x'; 3 * CAPACITY];
        large.extend_from_slice(b"end");
        tail.push(&large);
        assert_eq!(tail.text().len(), CAPACITY);
        assert!(tail.text().ends_with("xend"));
    }
}
