//! The two lists of capabilities in a configuration space, read from bytes that a device gave and that may be wrong.
//!
//! Source: PCI Local Bus Specification 3.0, §6.7, and PCI Express Base Specification 5.0, §7.6 and §7.9.

/// Bytes of conventional configuration space, and of the whole one of PCI Express.
pub(super) const CONVENTIONAL: usize = 0x100;
pub(super) const EXTENDED: usize = 0x1000;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Where the first number of the list is.
pub(super) const POINTER: usize = 0x34;
const FIRST: usize = 0x40;

/// Ids of the first list.
pub(super) mod id {
    pub(in crate::vfio) const POWER: u8 = 0x01;
    pub(in crate::vfio) const VITAL_PRODUCT_DATA: u8 = 0x03;
    pub(in crate::vfio) const MSI: u8 = 0x05;
    pub(in crate::vfio) const VENDOR: u8 = 0x09;
    pub(in crate::vfio) const SUBSYSTEM: u8 = 0x0d;
    pub(in crate::vfio) const EXPRESS: u8 = 0x10;
    pub(in crate::vfio) const MSIX: u8 = 0x11;
    pub(in crate::vfio) const ADVANCED_FEATURES: u8 = 0x13;
}

/// Ids of the list behind the first 256 bytes.
pub(super) mod extended_id {
    /// Alternative routing of functions: names the next function of the host's device.
    pub(in crate::vfio) const ROUTING: u16 = 0x0e;
    /// Address translation by the device itself.
    pub(in crate::vfio) const TRANSLATION: u16 = 0x0f;
    pub(in crate::vfio) const VIRTUAL_FUNCTIONS: u16 = 0x10;
    pub(in crate::vfio) const PAGE_REQUESTS: u16 = 0x13;
    pub(in crate::vfio) const RESIZABLE_BAR: u16 = 0x15;
    pub(in crate::vfio) const PROCESS_ADDRESS_SPACES: u16 = 0x1b;
    pub(in crate::vfio) const PRECISION_TIME: u16 = 0x1f;
    pub(in crate::vfio) const RESIZABLE_BAR_OF_VIRTUAL_FUNCTIONS: u16 = 0x24;
}

/// A capability.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Capability {
    /// What it is.
    pub(super) id: u16,
    /// Where it begins.
    pub(super) offset: usize,
    /// The first byte that is not its own.
    pub(super) end: usize,
    /// Where the link to it is: in the first list a byte, in the second one the upper 12 bits of a word.
    pub(super) link: usize,
}

fn byte(bytes: &[u8], offset: usize) -> u8 {
    bytes.get(offset).copied().unwrap_or(0)
}

fn half(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([byte(bytes, offset), byte(bytes, offset + 1)])
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from(half(bytes, offset)) | u32::from(half(bytes, offset + 2)) << 16
}

/// The first list, in the order of its links. It ends at a link that leads nowhere or back.
pub(super) fn conventional(bytes: &[u8]) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    if byte(bytes, STATUS) & STATUS_CAPABILITIES == 0 {
        return found;
    }
    let mut link = POINTER;
    loop {
        let offset = usize::from(byte(bytes, link) & !3);
        if offset < FIRST || found.iter().any(|known| known.offset == offset) {
            break;
        }
        found.push(Capability { id: u16::from(byte(bytes, offset)), offset, end: CONVENTIONAL, link });
        link = offset + 1;
    }
    bound(bytes, &mut found, |bytes, capability| offset_end(capability, known_length(bytes, capability)));
    found
}

fn offset_end(capability: &Capability, length: Option<usize>) -> Option<usize> {
    length.map(|length| capability.offset + length)
}

/// Ends each capability where it says, and where it does not, where the next one begins.
fn bound(bytes: &[u8], found: &mut [Capability], end: impl Fn(&[u8], &Capability) -> Option<usize>) {
    let starts: Vec<usize> = found.iter().map(|capability| capability.offset).collect();
    for capability in found {
        let next = starts.iter().copied().filter(|start| *start > capability.offset).min().unwrap_or(capability.end);
        capability.end = end(bytes, capability).unwrap_or(next).min(next);
    }
}

/// The length of a capability that has one by its specification.
fn known_length(bytes: &[u8], capability: &Capability) -> Option<usize> {
    let offset = capability.offset;
    let length = match u8::try_from(capability.id).ok()? {
        id::POWER | id::VITAL_PRODUCT_DATA | id::SUBSYSTEM => 8,
        id::ADVANCED_FEATURES => 6,
        id::MSIX => 12,
        id::MSI => msi_length(half(bytes, offset + 2)),
        id::VENDOR => usize::from(byte(bytes, offset + 2)).max(3),
        id::EXPRESS if half(bytes, offset + 2) & 0xf >= 2 => 0x3c,
        id::EXPRESS => 0x14,
        _ => return None,
    };
    Some(length)
}

/// The length of the MSI capability by its message control: with 64-bit addresses, with masks.
pub(super) fn msi_length(control: u16) -> usize {
    match (control & 1 << 7 != 0, control & 1 << 8 != 0) {
        (false, false) => 0x0a,
        (true, false) => 0x0e,
        (false, true) => 0x14,
        (true, true) => 0x18,
    }
}

/// The list of PCI Express, in the order of its links.
pub(super) fn extended(bytes: &[u8]) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    let (mut link, mut offset) = (CONVENTIONAL, CONVENTIONAL);
    while offset >= CONVENTIONAL && offset + 4 <= bytes.len() {
        let header = word(bytes, offset);
        let known = found.iter().any(|known| known.offset == offset);
        if header == 0 || header == u32::MAX || known {
            break;
        }
        found.push(Capability { id: half(bytes, offset), offset, end: EXTENDED, link });
        link = offset;
        offset = usize::try_from(header >> 20).unwrap_or(0) & !3;
    }
    bound(bytes, &mut found, |_, _| None);
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_lists_are_followed_and_bounded() {
        let mut bytes = vec![0; EXTENDED];
        bytes[STATUS] = STATUS_CAPABILITIES;
        bytes[POINTER] = 0x60;
        bytes[0x60..0x62].copy_from_slice(&[id::POWER, 0x80]);
        bytes[0x80..0x84].copy_from_slice(&[id::MSI, 0x40, 0x80, 0x01]);
        bytes[0x40..0x43].copy_from_slice(&[id::VENDOR, 0, 0x10]);
        bytes[0x100..0x104].copy_from_slice(&0x1481_0001_u32.to_le_bytes());
        bytes[0x148..0x14c].copy_from_slice(&0x0001_0010_u32.to_le_bytes());
        let list: Vec<_> = conventional(&bytes).iter().map(|one| (one.id, one.offset, one.end, one.link)).collect();
        assert_eq!(list, [(1, 0x60, 0x68, POINTER), (5, 0x80, 0x98, 0x61), (9, 0x40, 0x50, 0x81)]);
        let list: Vec<_> = extended(&bytes).iter().map(|one| (one.id, one.offset, one.end, one.link)).collect();
        assert_eq!(list, [(1, 0x100, 0x148, 0x100), (0x10, 0x148, EXTENDED, 0x100)]);
    }

    #[test]
    fn a_device_without_lists_has_none() {
        assert_eq!((conventional(&[0; 64]), extended(&[0; 64])), (vec![], vec![]));
        assert_eq!(extended(&[0xff; EXTENDED]), []);
    }

    proptest! {
        #[test]
        fn lists_of_any_bytes_end_and_stay_inside(bytes in prop::collection::vec(any::<u8>(), 0..EXTENDED)) {
            for capability in conventional(&bytes) {
                prop_assert!(capability.offset >= FIRST && capability.end <= CONVENTIONAL);
                prop_assert!(capability.offset < capability.end);
            }
            for capability in extended(&bytes) {
                prop_assert!(capability.offset >= CONVENTIONAL && capability.offset < capability.end);
                prop_assert!(capability.end <= EXTENDED);
            }
        }
    }
}
