//! Where things are in a virtio function: its one memory region, its capabilities, and who it says it is.
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x0100 | interrupt status |
//! | 0x0200 | device configuration |
//! | 0x1000 | doorbells, four bytes apart |
//! | 0x2000 | MSI-X table |
//! | 0x3000 | MSI-X pending bits |

use crate::memory::layout::Range;
use crate::pci::config::{ConfigSpace, Identity};
use crate::virtio::device::DeviceKind;

/// The base address register of the region.
pub(super) const BAR: u8 = 0;
/// Its length.
pub(crate) const LENGTH: u32 = 0x4000;
pub(super) const COMMON: Range = Range { start: 0, length: 0x38 };
pub(super) const INTERRUPT_STATUS: Range = Range { start: 0x100, length: 4 };
pub(super) const DEVICE: Range = Range { start: 0x200, length: 0xe00 };
pub(super) const DOORBELLS: Range = Range { start: 0x1000, length: 0x1000 };
pub(super) const DOORBELL_DISTANCE: u32 = 4;
pub(super) const MSIX_TABLE: Range = Range { start: 0x2000, length: 0x1000 };
pub(super) const MSIX_PENDING: Range = Range { start: 0x3000, length: 0x1000 };

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// `cfg_type` of a virtio capability (virtio 1.2, §4.1.4).
#[derive(Clone, Copy)]
#[repr(u8)]
enum Kind {
    Common = 1,
    Notify = 2,
    InterruptStatus = 3,
    Device = 4,
    ConfigAccess = 5,
}

/// Where the bodies of the two capabilities with writable fields are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    /// Message control of MSI-X.
    pub(super) msix: u16,
    /// The window into the region: its body, and behind it the data.
    pub(super) window: u16,
}

/// Bytes from the body of the window's capability to its data.
pub(super) const WINDOW_DATA: u16 = 14;

/// The configuration space of a function of this kind with its region at `address`.
///
/// Gives nothing when the capabilities do not fit, which their number here rules out.
pub(super) fn config_space(kind: DeviceKind, address: u32, vectors: u16) -> Option<(ConfigSpace, Capabilities)> {
    let mut space = ConfigSpace::new(identity(kind));
    space.add_memory_bar(BAR, address, LENGTH);
    let offset = |range: Range| u32::try_from(range.start).unwrap_or_default() | u32::from(BAR);
    let mut msix = Vec::from((vectors - 1).to_le_bytes());
    msix.extend(offset(MSIX_TABLE).to_le_bytes());
    msix.extend(offset(MSIX_PENDING).to_le_bytes());
    // Of message control the guest writes enable and function mask.
    let msix = space.add_capability(CAPABILITY_MSIX, &msix, &[0, 0xc0])?;

    for (kind, range) in [(Kind::Common, COMMON), (Kind::InterruptStatus, INTERRUPT_STATUS), (Kind::Device, DEVICE)] {
        space.add_capability(CAPABILITY_VENDOR, &virtio_capability(kind, range, &[]), &[])?;
    }
    let doorbells = virtio_capability(Kind::Notify, DOORBELLS, &DOORBELL_DISTANCE.to_le_bytes());
    space.add_capability(CAPABILITY_VENDOR, &doorbells, &[])?;
    let window = virtio_capability(Kind::ConfigAccess, Range { start: 0, length: 0 }, &[0; 4]);
    // The guest writes which region, offset and length it wants to access; the data is handled by the transport.
    let window = space.add_capability(
        CAPABILITY_VENDOR,
        &window,
        &[0, 0, 0xff, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255],
    )?;
    Some((space, Capabilities { msix, window }))
}

/// `struct virtio_pci_cap` without its id and link, and what follows it.
fn virtio_capability(kind: Kind, range: Range, rest: &[u8]) -> Vec<u8> {
    const FIXED: usize = 16;
    let length = u8::try_from(FIXED + rest.len()).unwrap_or(u8::MAX);
    let mut body = vec![length, kind as u8, BAR, 0, 0, 0];
    body.extend(u32::try_from(range.start).unwrap_or_default().to_le_bytes());
    body.extend(u32::try_from(range.length).unwrap_or_default().to_le_bytes());
    body.extend(rest);
    body
}

fn identity(kind: DeviceKind) -> Identity {
    const VENDOR: u16 = 0x1af4;
    const MODERN: u16 = 0x1040;
    const SUBSYSTEM: u16 = 0x1100;
    Identity {
        vendor: VENDOR,
        device: MODERN + kind as u16,
        revision: 1,
        class: class(kind),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

/// PCI class codes (PCI Code and ID Assignment Specification).
fn class(kind: DeviceKind) -> [u8; 3] {
    match kind {
        DeviceKind::Net => [0x02, 0x00, 0x00],
        DeviceKind::Block | DeviceKind::Fs => [0x01, 0x80, 0x00],
        DeviceKind::Console => [0x07, 0x80, 0x00],
        DeviceKind::Pmem | DeviceKind::Mem => [0x05, 0x80, 0x00],
        DeviceKind::Rng | DeviceKind::Balloon | DeviceKind::Vsock => [0xff, 0x00, 0x00],
    }
}
