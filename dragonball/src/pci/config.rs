//! Configuration space of a function: a header of type 0, base address registers and a list of capabilities.
//!
//! Everything is two arrays: what the registers hold, and which of their bits the guest may write. That one rule gives
//! read-only fields, sizing of base address registers and bounds. Source: PCI Local Bus Specification 3.0, chapter 6.

use std::ops::Range as Span;

use crate::memory::layout::Range;

/// Conventional configuration space in bytes; what lies behind it reads as zero: no extended capabilities.
const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: Span<usize> = 0x10..0x28;
const CAPABILITY_POINTER: usize = 0x34;
const CAPABILITIES: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory space, bus master; interrupt disable is the upper byte's bit 2.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Base class, subclass, interface.
    pub(crate) class: [u8; 3],
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
}

/// A configuration space.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Length of the memory behind each base address register, 0 where there is none.
    lengths: [u32; 6],
    /// Where the next capability goes, and where its number has to be written.
    end: usize,
    link: usize,
}

/// The guest's part of a configuration space: the writable bits of all registers, in order.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct ConfigState(Vec<u8>);

impl ConfigSpace {
    pub(crate) fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            lengths: [0; 6],
            end: CAPABILITIES,
            link: CAPABILITY_POINTER,
        };
        let [base, sub, interface] = identity.class;
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision, interface, sub, base]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Interrupt line: a scratch register.
        space.writable[0x3c] = 0xff;
        space
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds a 32-bit memory base address register: `length` bytes, a power of two of at least 16, at `address`.
    pub(crate) fn add_memory_bar(&mut self, index: u8, address: u32, length: u32) {
        debug_assert!(index < 6 && length.is_power_of_two() && length >= 16 && address.is_multiple_of(length));
        let offset = BARS.start + 4 * usize::from(index);
        self.set(offset, &address.to_le_bytes());
        self.writable[offset..offset + 4].copy_from_slice(&(!(length - 1)).to_le_bytes());
        self.lengths[usize::from(index)] = length;
    }

    /// Adds a capability: `body` follows its id and link; `writable` says which of the body's bits the guest may write.
    /// Gives the offset of the body, or nothing when the space is full.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let start = self.end;
        let body_start = start + 2;
        let end = (body_start + body.len()).next_multiple_of(4);
        if end > SIZE || writable.len() > body.len() {
            return None;
        }
        let number = u8::try_from(start).ok()?;
        self.set(start, &[id, 0]);
        self.set(body_start, body);
        self.writable[body_start..body_start + writable.len()].copy_from_slice(writable);
        self.bytes[self.link] = number;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = start + 1;
        self.end = end;
        u16::try_from(body_start).ok()
    }

    /// What all registers hold.
    pub(crate) fn registers(&self) -> &[u8] {
        &self.bytes
    }

    /// Answers a read.
    pub(crate) fn read(&self, register: u16, data: &mut [u8]) {
        for (offset, byte) in (usize::from(register)..).zip(data) {
            *byte = self.bytes.get(offset).copied().unwrap_or(0);
        }
    }

    /// Takes a write and says whether memory decoding may have changed.
    pub(crate) fn write(&mut self, register: u16, data: &[u8]) -> bool {
        let start = usize::from(register);
        for (offset, value) in (start..).zip(data) {
            let Some(byte) = self.bytes.get_mut(offset) else { break };
            let mask = self.writable[offset];
            *byte = *byte & !mask | value & mask;
        }
        let written = start..start + data.len();
        let touches = |span: Span<usize>| written.start < span.end && span.start < written.end;
        touches(COMMAND..COMMAND + 1) || touches(BARS)
    }

    /// The `N` bytes from `offset` on, which was given by [`Self::add_capability`].
    pub(crate) fn bytes_at<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Where the memory of base address register `index` is; nothing while the guest has memory decoding off.
    pub(crate) fn bar(&self, index: u8) -> Option<Range> {
        let length = *self.lengths.get(usize::from(index))?;
        if length == 0 || self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        let register: [u8; 4] = self.bytes_at(u16::try_from(BARS.start).ok()? + 4 * u16::from(index));
        Some(Range { start: u64::from(u32::from_le_bytes(register)), length: u64::from(length) })
    }

    /// What the guest wrote.
    pub(crate) fn save(&self) -> ConfigState {
        ConfigState(self.bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & mask).collect())
    }

    /// Takes what a guest wrote; nothing else changes, whatever `state` holds. False when it is of another size.
    pub(crate) fn restore(&mut self, state: &ConfigState) -> bool {
        let fits = state.0.len() == SIZE;
        if fits {
            self.write(0, &state.0);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [0x01, 0x80, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        };
        let mut space = ConfigSpace::new(identity);
        space.add_memory_bar(0, 0xC010_0000, 0x4000);
        space.add_capability(0x11, &[1, 2, 3, 4], &[0, 0xff]).unwrap();
        space.add_capability(0x09, &[5; 14], &[]).unwrap();
        space
    }

    fn word(space: &ConfigSpace, register: u16) -> u32 {
        u32::from_le_bytes(space.bytes_at(register))
    }

    #[test]
    fn the_identity_and_the_list_of_capabilities_can_be_read() {
        let space = space();
        assert_eq!([word(&space, 0), word(&space, 8), word(&space, 0x2c)], [0x1042_1af4, 0x0180_0001, 0x0040_1af4]);
        assert_ne!(word(&space, 4) & 0x10_0000, 0, "has capabilities");
        assert_eq!([word(&space, 0x34), word(&space, 0x40) & 0xffff, word(&space, 0x48) & 0xffff], [0x40, 0x4811, 9]);
    }

    #[test]
    fn a_base_address_register_tells_its_size_and_moves() {
        let mut space = space();
        assert_eq!(space.bar(0), None, "decoding is off");
        assert!(space.write(0x10, &[0xff; 4]));
        assert_eq!(word(&space, 0x10), 0xffff_c000);
        space.write(0x10, &0xD000_0000_u32.to_le_bytes());
        assert!(space.write(4, &[6, 0]));
        assert_eq!(space.bar(0), Some(Range { start: 0xD000_0000, length: 0x4000 }));
        assert_eq!((space.bar(1), space.bar(6)), (None, None));
    }

    #[test]
    fn a_full_space_takes_no_more_capabilities() {
        let mut space = space();
        while space.add_capability(0x09, &[0; 30], &[]).is_some() {}
        assert!(space.add_capability(0x09, &[0; 255], &[]).is_none());
    }

    proptest! {
        #[test]
        fn writes_change_only_writable_bits(writes in prop::collection::vec((0_u16..0x1004, prop::collection::vec(any::<u8>(), 1..9)), 0..32)) {
            let mut space = space();
            let before = space.clone();
            for (register, data) in &writes {
                space.write(*register, data);
            }
            for offset in 0..SIZE {
                prop_assert_eq!(space.bytes[offset] & !space.writable[offset], before.bytes[offset] & !before.writable[offset]);
            }
            if let Some(range) = space.bar(0) {
                prop_assert!(range.start.is_multiple_of(0x4000) && range.end() <= 1 << 32);
            }
            let saved = postcard::to_stdvec(&space.save()).unwrap();
            let mut other = before;
            prop_assert!(other.restore(&postcard::from_bytes(&saved).unwrap()));
            prop_assert_eq!(other.bytes, space.bytes);
        }

        #[test]
        fn a_state_of_another_size_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..255)) {
            let mut other = space();
            prop_assert!(!other.restore(&ConfigState(bytes)));
            prop_assert_eq!(other.bytes, space().bytes);
        }
    }
}
