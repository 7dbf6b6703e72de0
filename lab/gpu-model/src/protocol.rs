//! Messages of vfio-user, version 0.1: what a client asks and how it is answered.
//!
//! Source: QEMU's `docs/interop/vfio-user.rst`. All numbers are in the host's byte order, which is little-endian on
//! the machines that this runs on. This module only takes bytes apart and puts them together.

use nix::errno::Errno;

/// Bytes of a message's header.
pub const HEADER: usize = 16;
/// Most bytes of data in a read or write of a region.
pub const MAX_DATA: u32 = 1 << 20;
/// Most descriptors in a message.
pub const MAX_DESCRIPTORS: usize = 16;
/// The longest payload that a client may send: a write of [`MAX_DATA`] bytes.
pub const MAX_PAYLOAD: usize = 16 + MAX_DATA as usize;
/// The protocol's version, major and minor.
pub const VERSION: (u16, u16) = (0, 1);

/// In a header's flags: which type of message it is; zero is a request, one a reply.
const TYPE: u32 = 0xf;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// Numbers of the requests that the model answers.
#[expect(missing_docs, reason = "the protocol's own names")]
pub mod command {
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DEVICE_RESET: u16 = 13;
}

/// What every message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The client's number for the request, repeated in the reply.
    pub id: u16,
    /// Which request.
    pub command: u16,
    /// Bytes of the whole message.
    pub size: u32,
    flags: u32,
}

impl Header {
    /// Takes a header apart.
    #[must_use]
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *bytes;
        Self {
            id: u16::from_le_bytes([a, b]),
            command: u16::from_le_bytes([c, d]),
            size: u32::from_le_bytes([e, f, g, h]),
            flags: u32::from_le_bytes([i, j, k, l]),
        }
    }

    /// Bytes after the header; none when the size cannot be.
    #[must_use]
    pub fn payload(&self) -> Option<usize> {
        (self.size as usize).checked_sub(HEADER).filter(|length| *length <= MAX_PAYLOAD)
    }

    /// Whether it is a request.
    #[must_use]
    pub fn is_request(&self) -> bool {
        self.flags & TYPE == 0
    }

    /// Whether the client waits for an answer.
    #[must_use]
    pub fn wants_reply(&self) -> bool {
        self.flags & NO_REPLY == 0
    }

    /// The message that answers this one: a payload, or an error number.
    #[must_use]
    pub fn reply(&self, result: Result<&[u8], Errno>) -> Vec<u8> {
        let (flags, error, payload) = match result {
            Ok(payload) => (REPLY, 0, payload),
            Err(errno) => (REPLY | ERROR, errno as u32, [].as_slice()),
        };
        // What the device answers is never longer than what may be asked for.
        let size = u32::try_from(HEADER + payload.len()).unwrap_or(u32::MAX);
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend(self.id.to_le_bytes());
        message.extend(self.command.to_le_bytes());
        for number in [size, flags, error] {
            message.extend(number.to_le_bytes());
        }
        message.extend(payload);
        message
    }
}

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Which version of the protocol it speaks.
    Version {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// Lets the device reach memory.
    DmaMap {
        /// Whether the device may read.
        read: bool,
        /// Whether it may write.
        write: bool,
        /// Where in the file.
        offset: u64,
        /// Bus address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Takes memory away from the device.
    DmaUnmap {
        /// All of it, whatever the range says.
        all: bool,
        /// Bus address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// What kind of device it is.
    DeviceInfo,
    /// A region's size and what can be done with it.
    RegionInfo {
        /// Which.
        index: u32,
    },
    /// Number and kind of an index's interrupts.
    IrqInfo {
        /// Which.
        index: u32,
    },
    /// Where interrupts go.
    SetIrqs {
        /// vfio's flags.
        flags: u32,
        /// Which kind of interrupt.
        index: u32,
        /// The first one.
        start: u32,
        /// How many.
        count: u32,
        /// A byte for each, if the flags say so.
        data: &'a [u8],
    },
    /// Reads from a region.
    RegionRead {
        /// Which.
        region: u32,
        /// Where.
        offset: u64,
        /// How many bytes, at most [`MAX_DATA`].
        count: u32,
    },
    /// Writes to a region.
    RegionWrite {
        /// Which.
        region: u32,
        /// Where.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// Resets the device.
    Reset,
}

/// The fields of a payload, taken off its front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (front, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(*front)
    }

    fn u16(&mut self) -> Result<u16, Errno> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    /// The rest, which must have this many bytes.
    fn rest(self, count: u32) -> Result<&'a [u8], Errno> {
        if u32::try_from(self.0.len()) == Ok(count) { Ok(self.0) } else { Err(Errno::EINVAL) }
    }
}

impl<'a> Request<'a> {
    /// Takes a request apart.
    ///
    /// # Errors
    /// `ENOTSUP` for a request that the model does not know, `EINVAL` for one that is too short, too long or asks for
    /// too much.
    pub fn parse(number: u16, payload: &'a [u8]) -> Result<Self, Errno> {
        let mut fields = Fields(payload);
        match number {
            command::VERSION => version(&mut fields),
            command::DMA_MAP => dma_map(&mut fields),
            command::DMA_UNMAP => dma_unmap(&mut fields),
            command::DEVICE_GET_INFO => Ok(Self::DeviceInfo),
            command::DEVICE_GET_REGION_INFO => Ok(Self::RegionInfo { index: third(&mut fields)? }),
            command::DEVICE_GET_IRQ_INFO => Ok(Self::IrqInfo { index: third(&mut fields)? }),
            command::DEVICE_SET_IRQS => set_irqs(fields),
            command::REGION_READ => {
                let (offset, region, count) = region_access(&mut fields)?;
                Ok(Self::RegionRead { region, offset, count })
            }
            command::REGION_WRITE => {
                let (offset, region, count) = region_access(&mut fields)?;
                Ok(Self::RegionWrite { region, offset, data: fields.rest(count)? })
            }
            command::DEVICE_RESET => Ok(Self::Reset),
            _ => Err(Errno::ENOTSUP),
        }
    }
}

fn version<'a>(fields: &mut Fields<'a>) -> Result<Request<'a>, Errno> {
    // The capabilities that follow limit what a client can take; the model stays within the defaults anyway.
    Ok(Request::Version { major: fields.u16()?, minor: fields.u16()? })
}

fn dma_map<'a>(fields: &mut Fields<'a>) -> Result<Request<'a>, Errno> {
    let (_argument_size, flags) = (fields.u32()?, fields.u32()?);
    let (offset, address, size) = (fields.u64()?, fields.u64()?, fields.u64()?);
    Ok(Request::DmaMap { read: flags & 1 != 0, write: flags & 2 != 0, offset, address, size })
}

fn dma_unmap<'a>(fields: &mut Fields<'a>) -> Result<Request<'a>, Errno> {
    const ALL: u32 = 1 << 1;
    let (_argument_size, flags) = (fields.u32()?, fields.u32()?);
    // No log of dirty pages is kept, so none can be asked for.
    if flags & !ALL != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(Request::DmaUnmap { all: flags & ALL != 0, address: fields.u64()?, size: fields.u64()? })
}

/// The third 32-bit field, after size and flags: an index.
fn third(fields: &mut Fields<'_>) -> Result<u32, Errno> {
    let (_argument_size, _flags) = (fields.u32()?, fields.u32()?);
    fields.u32()
}

fn set_irqs(mut fields: Fields<'_>) -> Result<Request<'_>, Errno> {
    let (_argument_size, flags, index) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let (start, count) = (fields.u32()?, fields.u32()?);
    Ok(Request::SetIrqs { flags, index, start, count, data: fields.0 })
}

fn region_access(fields: &mut Fields<'_>) -> Result<(u64, u32, u32), Errno> {
    let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
    if count > MAX_DATA {
        return Err(Errno::EINVAL);
    }
    Ok((offset, region, count))
}

/// A payload of numbers.
#[derive(Debug, Default)]
pub(crate) struct Payload(pub(crate) Vec<u8>);

impl Payload {
    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}
