//! Devices of the host that belong to the guest (VFIO).
//!
//! | file | what |
//! |---|---|
//! | `host/` | the kernel's interfaces: groups of type 1, iommufd, sysfs, and the traits that stand for them |
//! | `capabilities.rs`, `overlay.rs` | what the guest sees of a device's configuration space |
//! | `bars.rs`, `mapping.rs` | the device's memory: where the guest has it, and how it is mapped |
//! | `table.rs`, `vectors.rs` | its interrupts by message: what the guest programs, and their way into KVM |
//! | `pin.rs` | its interrupts by a pin |
//! | `device.rs` | a PCI function made of these |
//! | `dma.rs` | the guest's memory as the device sees it |
//! | `attach.rs` | a whole IOMMU group as functions of the machine |
//! | `testing.rs`, `scene.rs` | a synthetic device and KVM, and a hostile driver of them |

use std::io;
use std::path::PathBuf;

use crate::pci::windows::NoRoom;

mod attach;
mod bars;
mod capabilities;
mod device;
mod dma;
mod host;
mod mapping;
mod overlay;
mod pin;
#[cfg(any(test, feature = "testing"))]
pub mod scene;
mod table;
#[cfg(any(test, feature = "testing"))]
mod testing;
mod vectors;

pub(crate) use attach::{Passthrough, PrepareTimes, PreparedGroup};
pub(crate) use device::{Services, VfioFunction};

/// Why a device of the host cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VfioError {
    /// The path names nothing that can be given.
    #[error(
        "{} is no PCI device or IOMMU group: give /sys/bus/pci/devices/ADDRESS, /dev/vfio/GROUP or \
         /dev/vfio/devices/vfioN", path.display()
    )]
    Unknown {
        /// The path as given.
        path: PathBuf,
    },
    /// No IOMMU stands between the device and memory.
    #[error(
        "{device} is behind no IOMMU: turn the IOMMU on in the firmware and in the kernel (intel_iommu=on or amd_iommu=on)"
    )]
    NoIommu {
        /// The device as given.
        device: String,
    },
    /// The host uses a function that the IOMMU cannot tell from the one that was asked for.
    #[error(
        "IOMMU group {group} is in use by the host; its devices are {devices}. Give all of them to vfio-pci, for instance: \
         echo vfio-pci > /sys/bus/pci/devices/{example}/driver_override; \
         echo {example} > /sys/bus/pci/devices/{example}/driver/unbind; echo {example} > /sys/bus/pci/drivers_probe"
    )]
    NotViable {
        /// The group's number.
        group: u32,
        /// Its functions with their drivers.
        devices: String,
        /// One that is in the way.
        example: String,
    },
    /// The device's addresses would not be the guest's.
    #[error(
        "guest memory at {start:#x}-{last:#x} cannot be reached by devices: the IOMMU translates {translated}. Give the \
         machine less memory"
    )]
    NotTranslated {
        /// First guest-physical address.
        start: u64,
        /// Last guest-physical address.
        last: u64,
        /// The ranges that it translates.
        translated: String,
    },
    /// The IOMMU did not take memory.
    #[error("{length} bytes of guest memory at {start:#x} cannot be given to devices")]
    Map {
        /// First guest-physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Devices that were given by iommufd cannot reach others.
    #[error(
        "peer-to-peer is not possible beside devices that the host gives by iommufd, which maps memory of no device: add the \
         devices that reach each other first, or all with peer-to-peer"
    )]
    NoPeers,
    /// A slot has no place for all functions of a group.
    #[error(
        "IOMMU group {group} has {count} functions, a slot of the guest has eight: use a slot of the host that isolates its \
         devices (PCI Express with ACS)"
    )]
    TooManyFunctions {
        /// The group's number.
        group: u32,
        /// How many it has.
        count: usize,
    },
    /// The windows have no room.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The host did not do something with a device.
    #[error("{device}: the host refused to {action}")]
    Host {
        /// The device or group.
        device: String,
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}
