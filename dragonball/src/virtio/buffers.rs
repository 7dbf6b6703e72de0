//! The buffers of a request: what a descriptor chain points to in guest memory, checked before the device looks at it.
//!
//! `virtio_queue`'s chain iterator ends silently at whatever it cannot follow. Here a chain is either taken whole
//! (virtio 1.2, §2.7.5: readable parts first, no longer than the ring, every byte in guest memory) or refused.

use std::io;

use vm_memory::{GuestMemory as _, Permissions, ReadVolatile, VolatileSlice, WriteVolatile};

use super::device::{DeviceError, GuestRegions};

/// A descriptor chain that the driver made available.
#[derive(Debug)]
pub(crate) struct Request<'m> {
    /// The chain's head, by which it is given back.
    pub(crate) head: u16,
    /// What the driver wrote for the device.
    pub(crate) readable: Buffers<'m>,
    /// What the device may write.
    pub(crate) writable: Buffers<'m>,
}

impl<'m> Request<'m> {
    /// Follows `chain` to its end. `limit` is the ring's size, the longest chain that is legal.
    pub(crate) fn new(
        memory: &'m GuestRegions,
        chain: virtio_queue::DescriptorChain<&'m GuestRegions>,
        limit: u16,
    ) -> Result<Self, DeviceError> {
        let head = chain.head_index();
        let mut request = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut unfinished = true;
        for (position, descriptor) in chain.enumerate() {
            if position >= usize::from(limit) {
                return Err(broken(head, "it is longer than its ring"));
            }
            let (list, access) = if descriptor.is_write_only() {
                (&mut request.writable, Permissions::Write)
            } else if request.writable.slices.is_empty() {
                (&mut request.readable, Permissions::Read)
            } else {
                return Err(broken(head, "a readable descriptor follows a writable one"));
            };
            let length = descriptor.len() as usize;
            let slices = memory
                .get_slices(descriptor.addr(), length, access)
                .map_err(|_| broken(head, "it leaves guest memory"))?;
            for slice in slices {
                list.push(slice.map_err(|_| broken(head, "it leaves guest memory"))?);
            }
            unfinished = descriptor.has_next();
        }
        if unfinished {
            return Err(broken(head, "its end cannot be reached"));
        }
        Ok(request)
    }
}

fn broken(head: u16, what: &str) -> DeviceError {
    DeviceError::Protocol(format!("descriptor chain {head}: {what}"))
}

/// A sequence of pieces of guest memory, seen as one run of bytes.
///
/// Offsets beyond the end are not an error: fewer bytes are copied, and the count says so.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        self.length += slice.len();
        self.slices.push(slice);
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The pieces that hold `count` bytes from `offset`, cut where the range begins and ends.
    pub(crate) fn range(&self, offset: usize, count: usize) -> impl Iterator<Item = VolatileSlice<'m>> {
        let (mut skip, mut left) = (offset, count);
        self.slices.iter().filter_map(move |slice| {
            let start = skip.min(slice.len());
            skip -= start;
            let take = left.min(slice.len() - start);
            left -= take;
            if take == 0 { None } else { slice.subslice(start, take).ok() }
        })
    }

    /// Copies from `offset` into `into`; returns how many bytes there were.
    pub(crate) fn read_at(&self, offset: usize, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, into.len()) {
            slice.copy_to(&mut into[done..]);
            done += slice.len();
        }
        done
    }

    /// Copies the `N` bytes at `offset`, or `None` when there are fewer.
    pub(crate) fn read_array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut array = [0; N];
        (self.read_at(offset, &mut array) == N).then_some(array)
    }

    /// Copies `from` to `offset`; returns how many bytes had room.
    pub(crate) fn write_at(&self, offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.range(offset, from.len()) {
            slice.copy_from(&from[done..]);
            done += slice.len();
        }
        done
    }

    /// Reads from `source` into at most `count` bytes at `offset`, until it has no more for now.
    ///
    /// Returns the number of bytes, 0 only at the end of `source` (or when `count` is 0). An error after the first
    /// bytes is left for the next call to find.
    pub(crate) fn fill_from(&self, offset: usize, count: usize, source: &mut impl ReadVolatile) -> io::Result<usize> {
        transfer(self.range(offset, count), |slice| source.read_volatile(slice))
    }

    /// Writes at most `count` bytes from `offset` to `sink`, until it takes no more for now; see [`Self::fill_from`].
    pub(crate) fn drain_to(&self, offset: usize, count: usize, sink: &mut impl WriteVolatile) -> io::Result<usize> {
        transfer(self.range(offset, count), |slice| sink.write_volatile(slice))
    }
}

/// Moves one piece after the other until one moves only in part.
fn transfer<'m>(
    pieces: impl Iterator<Item = VolatileSlice<'m>>,
    mut piece: impl FnMut(&mut VolatileSlice<'m>) -> Result<usize, vm_memory::VolatileMemoryError>,
) -> io::Result<usize> {
    let mut done = 0;
    for mut slice in pieces {
        match piece(&mut slice).map_err(into_io) {
            Ok(moved) => {
                done += moved;
                if moved < slice.len() {
                    break;
                }
            }
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(done)
}

fn into_io(error: vm_memory::VolatileMemoryError) -> io::Error {
    match error {
        vm_memory::VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
