//! The table of MSI-X: a message and a mask for each vector, written by the guest.
//!
//! Source: PCI Local Bus Specification 3.0, §6.8.2.

use super::overlay::MsixControl;
use crate::irq::Message;

/// Bytes of an entry: address, data, control.
pub(super) const ENTRY: usize = 16;
const CONTROL: usize = 12;
const MASKED: u8 = 1;

/// The table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Table {
    entries: Vec<[u8; ENTRY]>,
}

impl Table {
    /// A table of `vectors` masked vectors.
    pub(super) fn new(vectors: u16) -> Self {
        let mut masked = [0; ENTRY];
        masked[CONTROL] = MASKED;
        Self { entries: vec![masked; usize::from(vectors)] }
    }

    /// Its length in bytes.
    pub(super) fn length(&self) -> u64 {
        (self.entries.len() * ENTRY) as u64
    }

    /// How many vectors there are.
    pub(super) fn vectors(&self) -> usize {
        self.entries.len()
    }

    /// Answers a read at `offset`.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.entries.get(at / ENTRY).map_or(0, |entry| entry[at % ENTRY]);
        }
    }

    /// Takes a write at `offset`. Of the control word only the mask exists.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, value) in (offset..).zip(data) {
            let Some(entry) = self.entries.get_mut(at / ENTRY) else { return };
            entry[at % ENTRY] = match at % ENTRY {
                CONTROL => value & MASKED,
                13..=15 => 0,
                _ => *value,
            };
        }
    }

    /// The message of each vector, nothing for a masked one; no vector at all while MSI-X is off.
    pub(super) fn wanted(&self, control: MsixControl) -> Vec<Option<Message>> {
        if !control.enabled {
            return Vec::new();
        }
        self.entries.iter().map(|entry| message(entry).filter(|_| !control.masked)).collect()
    }
}

fn message(entry: &[u8; ENTRY]) -> Option<Message> {
    let [a, b, c, d, e, f, g, h, i, j, k, l, control, ..] = *entry;
    let message =
        Message { address: u64::from_le_bytes([a, b, c, d, e, f, g, h]), data: u32::from_le_bytes([i, j, k, l]) };
    (control & MASKED == 0).then_some(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ON: MsixControl = MsixControl { enabled: true, masked: false };

    #[test]
    fn a_vector_has_a_message_when_nothing_masks_it() {
        let mut table = Table::new(2);
        assert_eq!(table.wanted(ON), [None, None]);
        table.write(16, &0xfee0_1000_u64.to_le_bytes());
        table.write(24, &[0x41, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(table.wanted(ON), [None, Some(Message { address: 0xfee0_1000, data: 0x41 })]);
        assert_eq!(table.wanted(MsixControl { masked: true, ..ON }), [None, None]);
        assert_eq!(table.wanted(MsixControl::default()), []);
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_but_for_reserved_bits(
            writes in prop::collection::vec((0_usize..80, prop::collection::vec(any::<u8>(), 1..9)), 0..20)
        ) {
            let mut table = Table::new(4);
            for (offset, data) in &writes {
                table.write(*offset, data);
                let mut seen = vec![0; data.len()];
                table.read(*offset, &mut seen);
                for (at, (seen, written)) in (*offset..).zip(seen.into_iter().zip(data)) {
                    let expected = match (at < 64, at % ENTRY) {
                        (false, _) | (true, 13..=15) => 0,
                        (true, CONTROL) => written & 1,
                        (true, _) => *written,
                    };
                    prop_assert_eq!(seen, expected);
                }
            }
        }
    }
}
