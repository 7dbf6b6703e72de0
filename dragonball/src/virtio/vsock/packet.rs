//! The header of a vsock packet (virtio 1.2, §5.10.6: `struct virtio_vsock_hdr`).
//!
//! The `virtio-vsock` crate reads a packet only from one or two descriptors; Linux sends one whose payload is
//! scattered over many (6.7 and newer), so the header is read here from whatever pieces the chain has.

use crate::virtio::buffers::Buffers;

/// The host's context id.
pub(super) const HOST_CID: u64 = 2;
/// Length of a header in bytes.
pub(super) const HEADER_LENGTH: usize = 44;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type here.
pub(super) const TYPE_STREAM: u16 = 1;
/// The sender of a `Shutdown` will receive no more (`VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`).
pub(super) const NO_RECEIVE: u32 = 1;
/// The sender of a `Shutdown` will send no more (`VIRTIO_VSOCK_SHUTDOWN_F_SEND`).
pub(super) const NO_SEND: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub(super) enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Grants a connection.
    Response = 2,
    /// Ends or refuses a connection.
    Reset = 3,
    /// Closes one direction or both, see the flags.
    Shutdown = 4,
    /// Carries payload.
    Data = 5,
    /// Tells how much room the sender has.
    CreditUpdate = 6,
    /// Asks for a credit update.
    CreditRequest = 7,
}

impl Operation {
    /// The operation of a number, if there is one.
    pub(super) fn from_number(number: u16) -> Option<Self> {
        [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ]
        .into_iter()
        .find(|&operation| operation as u16 == number)
    }
}

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct Ports {
    /// The host's port.
    pub(super) host: u32,
    /// The guest's port.
    pub(super) guest: u32,
}

/// A packet header.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Header {
    /// Context id of the sender.
    pub(super) source_cid: u64,
    /// Context id of the receiver.
    pub(super) destination_cid: u64,
    /// Port of the sender.
    pub(super) source_port: u32,
    /// Port of the receiver.
    pub(super) destination_port: u32,
    /// Bytes of payload that follow.
    pub(super) length: u32,
    /// Socket type.
    pub(super) kind: u16,
    /// Number of the [`Operation`].
    pub(super) operation: u16,
    /// Flags of the operation.
    pub(super) flags: u32,
    /// The sender's receive buffer for this connection in bytes.
    pub(super) buffer_size: u32,
    /// Bytes that ever left the sender's receive buffer, free running.
    pub(super) forwarded: u32,
}

impl Header {
    /// The header in front of a packet that the guest sent, or `None` when the packet is too short.
    pub(super) fn read(buffers: &Buffers<'_>) -> Option<Self> {
        Some(Self {
            source_cid: u64::from_le_bytes(buffers.read_array(0)?),
            destination_cid: u64::from_le_bytes(buffers.read_array(8)?),
            source_port: u32::from_le_bytes(buffers.read_array(16)?),
            destination_port: u32::from_le_bytes(buffers.read_array(20)?),
            length: u32::from_le_bytes(buffers.read_array(24)?),
            kind: u16::from_le_bytes(buffers.read_array(28)?),
            operation: u16::from_le_bytes(buffers.read_array(30)?),
            flags: u32::from_le_bytes(buffers.read_array(32)?),
            buffer_size: u32::from_le_bytes(buffers.read_array(36)?),
            forwarded: u32::from_le_bytes(buffers.read_array(40)?),
        })
    }

    /// The header as it lies in memory.
    pub(super) fn to_bytes(self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer_size.to_le_bytes());
        bytes[40..].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The ends of the connection of a packet that the guest sent.
    pub(super) fn ports_from_guest(&self) -> Ports {
        Ports { host: self.destination_port, guest: self.source_port }
    }
}
