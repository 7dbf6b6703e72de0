//! Commands of the control queue (virtio 1.2, §5.1.6.5): what the driver may ask for, taken apart and checked.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_MQ,
};

use crate::virtio::buffers::Buffers;

/// The most addresses that are kept of a table of the driver's. With more, it gets all frames of that kind.
pub(super) const TABLE_MAX: usize = 32;
/// Class and command.
const HEADER: usize = 2;

/// What the driver asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Command {
    /// All frames, whomever they are for, or not.
    Promiscuous(bool),
    /// All multicast frames, or not.
    AllMulticast(bool),
    /// The addresses beside the card's own whose frames are wanted.
    MacTable {
        /// Of single cards; `None` stands for more than are kept.
        unicast: Option<Vec<[u8; 6]>>,
        /// Of groups, likewise.
        multicast: Option<Vec<[u8; 6]>>,
    },
    /// The card's own address.
    MacAddress([u8; 6]),
    /// How many queue pairs are used.
    QueuePairs(u16),
    /// The offloads of frames to the guest, as feature bits.
    GuestOffloads(u64),
}

const CLASS_RX: u32 = VIRTIO_NET_CTRL_RX;
const CLASS_MAC: u32 = VIRTIO_NET_CTRL_MAC;
const CLASS_MQ: u32 = VIRTIO_NET_CTRL_MQ;
const CLASS_OFFLOADS: u32 = VIRTIO_NET_CTRL_GUEST_OFFLOADS;

impl Command {
    /// The command in `buffers`, or `None` when it is unknown, malformed, or of a feature that was not agreed on.
    pub(super) fn parse(buffers: &Buffers<'_>, features: u64) -> Option<Self> {
        let [class, command] = buffers.read_array::<HEADER>(0)?.map(u32::from);
        let agreed = |feature: u32| (features & (1 << feature) != 0).then_some(());
        match (class, command) {
            (CLASS_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI) => {
                agreed(VIRTIO_NET_F_CTRL_RX)?;
                let [on] = body(buffers)?;
                let on = on != 0;
                Some(if command == VIRTIO_NET_CTRL_RX_PROMISC { Self::Promiscuous(on) } else { Self::AllMulticast(on) })
            }
            (CLASS_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                agreed(VIRTIO_NET_F_CTRL_RX)?;
                let (unicast, next) = table(buffers, HEADER)?;
                let (multicast, end) = table(buffers, next)?;
                (end == buffers.len()).then_some(Self::MacTable { unicast, multicast })
            }
            (CLASS_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                agreed(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                body(buffers).map(Self::MacAddress)
            }
            (CLASS_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                agreed(VIRTIO_NET_F_MQ)?;
                body(buffers).map(u16::from_le_bytes).map(Self::QueuePairs)
            }
            (CLASS_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                agreed(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                body(buffers).map(u64::from_le_bytes).map(Self::GuestOffloads)
            }
            _ => None,
        }
    }
}

/// The command's data, which must be of this length.
fn body<const N: usize>(buffers: &Buffers<'_>) -> Option<[u8; N]> {
    (buffers.len() == HEADER + N).then(|| buffers.read_array(HEADER)).flatten()
}

type Addresses = Option<Vec<[u8; 6]>>;

/// A table of addresses at `offset`, and where it ends: a count of 32 bits, and that many addresses.
fn table(buffers: &Buffers<'_>, offset: usize) -> Option<(Addresses, usize)> {
    let count = u32::from_le_bytes(buffers.read_array(offset)?) as usize;
    let start = offset + 4;
    let end = start.checked_add(count.checked_mul(6)?)?;
    if end > buffers.len() {
        return None;
    }
    let address = |index: usize| buffers.read_array(start + 6 * index);
    let addresses = if count > TABLE_MAX { None } else { Some((0..count).map(address).collect::<Option<_>>()?) };
    Some((addresses, end))
}
