//! The persistent memory device (virtio 1.2, §5.19): a file of the host that the guest maps instead of reads.
//!
//! The guest sees the file's pages themselves: with DAX a read-only image costs the guest no page cache, and all
//! guests on the host share the one copy. The machine puts [`PmemMapping`] into guest memory as a slot of its own and
//! tells the device where ([`Pmem::set_start`]).
//!
//! A file must not be truncated while it is mapped: the guest's next access to a page that is gone would end the VM.
//! Map files that nobody changes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use super::buffers::Request;
use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Outcome, SavedState, VirtioDevice};
use super::ring::{Life, RING_FEATURES, RingPosition};
use super::state;

mod mapping;

pub use mapping::PmemMapping;

/// Start and length of the region are multiples of this: Linux adds persistent memory in sections of 2 MiB
/// (`SUBSECTION_SIZE`), and a huge page can map it.
pub const ALIGNMENT: u64 = 2 << 20;

const QUEUE_SIZES: [u16; 1] = [64];
const STATE_VERSION: u16 = 1;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const REQUEST_FLUSH: u32 = 0;
/// `ret` of a request that was carried out.
const STATUS_OK: u32 = 0;
/// `ret` of a request that was not (virtio 1.2, §5.19.6.1: -1).
const STATUS_ERROR: u32 = u32::MAX;
/// Length of a response.
const RESPONSE_LENGTH: usize = 4;

/// What the guest's writes to the memory do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PmemMode {
    /// Nothing: the memory is read-only for the guest and shared with all other users of the file.
    ReadOnly,
    /// They stay in this VM: the file is mapped copy-on-write and never changes.
    CopyOnWrite,
}

/// Why a file cannot become a persistent memory device.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The file cannot be opened or examined.
    #[error("Cannot open {path} for persistent memory")]
    Open {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// Only a regular file has pages that a guest can map.
    #[error("{0} is not a regular file; give an image file")]
    NotAFile(PathBuf),
    /// There is nothing to map.
    #[error("{0} is empty; give an image file with contents")]
    Empty(PathBuf),
    /// The file cannot be mapped.
    #[error("Cannot map the {length} bytes of {path}; the limit of address space (ulimit -v) may be too low")]
    Map {
        /// The file.
        path: PathBuf,
        /// Bytes to map, alignment included.
        length: u64,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
}

/// A persistent memory device.
pub struct Pmem {
    mapping: PmemMapping,
    start: GuestAddress,
    life: Life<1>,
}

#[derive(Deserialize, Serialize)]
struct State {
    start: u64,
    length: u64,
    rings: Option<[RingPosition; 1]>,
}

impl Pmem {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// When it is no regular file with something in it, or cannot be opened or mapped.
    pub fn open(path: &Path, mode: PmemMode) -> Result<Self, PmemError> {
        let opened = |source| PmemError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(opened)?;
        let metadata = file.metadata().map_err(opened)?;
        if !metadata.is_file() {
            return Err(PmemError::NotAFile(path.to_owned()));
        }
        if metadata.len() == 0 {
            return Err(PmemError::Empty(path.to_owned()));
        }
        let length = metadata.len();
        let mapping = PmemMapping::new(&file, length, mode).map_err(|source| PmemError::Map {
            path: path.to_owned(),
            length,
            source,
        })?;
        Ok(Self { mapping, start: GuestAddress(0), life: Life::NEW })
    }

    /// The memory to put into the guest.
    #[must_use]
    pub fn mapping(&self) -> &PmemMapping {
        &self.mapping
    }

    /// Says where the mapping begins in guest memory. Before the driver looks at the device.
    pub fn set_start(&mut self, start: GuestAddress) {
        self.start = start;
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Pmem
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_pmem_config`: start and size.
    fn config(&self) -> Vec<u8> {
        [self.start.0.to_le_bytes(), self.mapping.len().to_le_bytes()].concat()
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        self.life.activate(activation, events)
    }

    fn handle_event(&mut self, _: u32, _: EventSet, _: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        if let Some(work) = self.life.work() {
            let ring = &mut work.rings[0];
            ring.acknowledge_kick();
            ring.serve(&work.memory, answer)?;
        }
        Ok(Outcome::Done)
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        self.life.reset(events);
    }

    fn save(&mut self) -> Result<SavedState, DeviceError> {
        let (start, length) = (self.start.0, self.mapping.len());
        state::encode(STATE_VERSION, &State { start, length, rings: self.life.positions() })
    }

    /// The state's region must be this device's: its place is part of the guest's page tables.
    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { start, length, rings } = state::decode(STATE_VERSION, saved)?;
        if (start, length) != (self.start.0, self.mapping.len()) {
            return Err(DeviceError::InvalidState(format!(
                "its memory is {length:#x} bytes at {start:#x}, this device's is {:#x} bytes at {:#x}; give the same file",
                self.mapping.len(),
                self.start.0
            )));
        }
        self.life.resume_from(rings)
    }
}

/// Answers a request. A flush has nothing to do in either mode: no write of the guest ever reaches the file.
fn answer(request: &Request<'_>) -> Result<usize, DeviceError> {
    let Some(kind) = request.readable.read_array(0).map(u32::from_le_bytes) else {
        return Err(DeviceError::Protocol(format!(
            "a pmem request has {} bytes, its type alone has 4",
            request.readable.len()
        )));
    };
    if request.writable.len() < RESPONSE_LENGTH {
        return Err(DeviceError::Protocol(format!(
            "a pmem request leaves {} bytes for the response, which has {RESPONSE_LENGTH}",
            request.writable.len()
        )));
    }
    let status = if kind == REQUEST_FLUSH { STATUS_OK } else { STATUS_ERROR };
    Ok(request.writable.write_at(0, &status.to_le_bytes()))
}

#[cfg(test)]
mod tests;
