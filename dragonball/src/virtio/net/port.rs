//! The host's side of a card: where its frames go and come from, and what it can be told.

use std::io;
use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

/// The host's end of one queue pair: a descriptor that takes and gives one frame per call, each behind a
/// `struct virtio_net_hdr_v1` (virtio 1.2, §5.1.6). What it is told beside that holds for the whole card.
pub(crate) trait Port: Send {
    /// The descriptor. It does not block.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What frames may come up to the guest.
    ///
    /// # Errors
    /// When the host does not have all of it.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Takes part in the card's traffic, or no longer: the frames go to the other ports then.
    ///
    /// # Errors
    /// When the host refuses.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;

    /// Which frames the host hands up.
    ///
    /// # Errors
    /// When the host cannot filter: it hands up all of them.
    fn set_filter(&self, filter: Option<&Filter>) -> io::Result<()>;

    /// Whether the host sees a cable.
    ///
    /// # Errors
    /// When it cannot be told.
    fn set_carrier(&self, up: bool) -> io::Result<()>;
}

/// What kinds of unfinished frames the guest takes: ones without a checksum, and ones to be cut into segments.
///
/// The bits are those of `TUNSETOFFLOAD` (`linux/if_tun.h`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Offloads(pub(crate) u32);

/// Each offload with its feature bit, which is also its bit in the control command (virtio 1.2, §5.1.6.5.6.1).
const OFFLOADS: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];
const TSO: u32 = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
/// Linux knows both only together.
pub(super) const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

impl Offloads {
    /// All feature bits that stand for an offload.
    pub(super) fn feature_bits() -> u64 {
        OFFLOADS.iter().fold(0, |bits, (feature, _)| bits | 1 << feature)
    }

    /// The offloads that the feature bits `features` ask for, less those that lack what they build on (virtio 1.2,
    /// §5.1.3.1).
    pub(super) fn of_features(features: u64) -> Self {
        let wanted = OFFLOADS.iter().filter(|(feature, _)| features & (1 << feature) != 0);
        let mut bits = wanted.fold(0, |bits, (_, offload)| bits | offload);
        if bits & libc::TUN_F_CSUM == 0 {
            bits = 0;
        }
        if bits & TSO == 0 {
            bits &= !libc::TUN_F_TSO_ECN;
        }
        if bits & USO != USO {
            bits &= !USO;
        }
        Self(bits)
    }
}

/// Which frames the guest wants to see. More may be handed up.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Filter {
    /// Destination addresses.
    pub(crate) addresses: Vec<[u8; 6]>,
    /// Whether all multicast frames are wanted.
    pub(crate) all_multicast: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_that_lack_what_they_build_on_are_left_out() {
        let features = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1_u64 << bit);
        for (given, expected) in [
            (&[][..], 0),
            (&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_ECN], 0),
            (&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN], libc::TUN_F_CSUM),
            (&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_USO4], libc::TUN_F_CSUM),
            (
                &[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN],
                libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN,
            ),
        ] {
            assert_eq!(Offloads::of_features(features(given)).0, expected, "{given:?}");
        }
        assert_eq!(Offloads::of_features(u64::MAX).0, libc::TUN_F_CSUM | TSO | libc::TUN_F_TSO_ECN | USO);
    }
}
