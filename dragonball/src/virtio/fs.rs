//! The file system device (virtio 1.2, §5.11): a directory of the host, passed through in this process.
//!
//! Requests run on the device thread, one after the other: a file system of the host that hangs (a dead network server)
//! holds up all devices of this VM, and only those.
//!
//! What the directory may hold, and what follows from it:
//!
//! - **Changes by others.** The guest looks a name up each time that a program uses it, so what the host or another guest
//!   made, renamed or removed is seen at once, and with it the file's attributes. Content is taken from the host at each
//!   open. A program that has a file open sees what others write within [`CACHE_TIMEOUT`], unless it reads with `O_DIRECT`.
//! - **Changes by this guest alone.** In directories that only it changes ([`FsConfig::guest_only`]) it uses names and
//!   attributes for [`GUEST_ONLY_TIMEOUT`], and keeps a file's content as long as its size and times are the same.
//! - **Mounts that come later.** A lookup sees what is mounted at that moment.
//! - **Inode numbers.** Several mounts have the same numbers; the guest sees numbers of this device instead, one per
//!   file for the device's whole life, so that no program in the guest takes two files for one.
//! - **Unmounting on the host.** The device holds a descriptor (`O_PATH`) for each file that the guest's kernel has
//!   in its cache. Until the guest forgets those, `umount` fails with `EBUSY`. A guest need not forget; who unmounts has
//!   to use `MNT_DETACH`, then the mount goes away with the last descriptor: the guest lets go when it finds, on its next
//!   look, that the name is gone or is another file.
//! - **Descriptors.** They count against `RLIMIT_NOFILE`, of which the device leaves [`RESERVED_DESCRIPTORS`] to the
//!   rest of the process; beyond that the guest gets `ENFILE`. Raise the limit before the device is made.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Outcome, SavedState, VirtioDevice};
use super::ring::{Life, RING_FEATURES, RingPosition, TURN, Work};
use super::state;
use crate::config::FsConfig;

mod island;
mod mirror;
mod shared;
mod thread;
mod version;

use island::Island;
use shared::SharedDirectory;

/// How long the guest may take a file's attributes for what they were.
pub const CACHE_TIMEOUT: Duration = Duration::from_secs(1);
/// The same, and for names, in directories that only it changes. The host can change something there against the rule:
/// then this is how long the guest may not see it.
pub const GUEST_ONLY_TIMEOUT: Duration = Duration::from_secs(60);
/// How many descriptors the device leaves to the rest of the process.
pub const RESERVED_DESCRIPTORS: u64 = 256;

/// Forgets, which must not wait behind other requests, and everything else. Linux cuts requests to what fits into a
/// ring: 128 entries are half a megabyte.
const QUEUE_SIZES: [u16; 2] = [16, 128];
const STATE_VERSION: u16 = 1;
/// `virtio_fs_config.tag` has this many bytes.
const TAG_LENGTH: usize = 36;

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("File system tag {0:?} must have 1 to 36 bytes and no zero byte")]
    Tag(String),
    /// The directory cannot be shared.
    #[error("Cannot share the directory {path} with the guest")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// A file system device.
pub struct Fs {
    tag: [u8; TAG_LENGTH],
    directory: Arc<SharedDirectory>,
    life: Life<2>,
    /// The library's side of the rings while the device is at work.
    island: Option<Island>,
}

#[derive(Deserialize, Serialize)]
struct State {
    rings: Option<[RingPosition; 2]>,
    /// What the guest's kernel can do, if it has mounted the file system.
    session: Option<u64>,
}

impl Fs {
    /// A device that shows a directory under the tag by which the guest mounts it.
    ///
    /// # Errors
    /// When the tag does not fit, or the directory cannot be opened.
    pub fn new(config: &FsConfig) -> Result<Self, FsError> {
        let (tag, path) = (&config.tag, &config.directory);
        let mut padded = [0; TAG_LENGTH];
        if tag.is_empty() || tag.len() > TAG_LENGTH || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        padded[..tag.len()].copy_from_slice(tag.as_bytes());
        let directory = SharedDirectory::open(path, config.guest_only.clone())
            .map_err(|source| FsError::Directory { path: path.to_owned(), source })?;
        Ok(Self { tag: padded, directory: Arc::new(directory), life: Life::NEW, island: None })
    }

    /// Answers the requests of queue `index`, at most one turn of them.
    fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        let (Some(Work { rings, memory }), Some(island)) = (self.life.work(), &self.island) else { return Ok(()) };
        let ring = &mut rings[index];
        ring.acknowledge_kick();
        for turn in 0.. {
            if turn == TURN {
                ring.call_again()?;
                break;
            }
            let Some(request) = ring.next(memory)? else { break };
            let written = island.answer(&request, ring.layout())?;
            ring.push_used(memory, request.head, written)?;
        }
        ring.signal_used(memory)
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fs
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_fs_config`: the tag and the number of request queues.
    fn config(&self) -> Vec<u8> {
        [&self.tag[..], &1_u32.to_le_bytes()].concat()
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        thread::prepare();
        let island = Island::new(&activation.memory, Arc::clone(&self.directory))?;
        self.life.activate(activation, events)?;
        self.island = Some(island);
        Ok(())
    }

    fn handle_event(&mut self, token: u32, _: EventSet, _: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        if (token as usize) < QUEUE_SIZES.len() {
            self.serve(token as usize)?;
        }
        Ok(Outcome::Done)
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        self.island = None;
        self.life.reset(events);
        self.directory.end_session();
    }

    /// Fails while the guest holds files: their names are not known any more. A guest that has the file system mounted
    /// and nothing of it in use can be saved.
    fn save(&mut self) -> Result<SavedState, DeviceError> {
        let held = self.directory.held();
        if held > 0 {
            return Err(DeviceError::InvalidState(format!(
                "the guest holds {held} files and directories of file system {}; unmount it in the guest first",
                String::from_utf8_lossy(&self.tag).trim_end_matches('\0')
            )));
        }
        let state = State { rings: self.life.positions(), session: self.directory.session() };
        state::encode(STATE_VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { rings, session } = state::decode(STATE_VERSION, saved)?;
        self.life.resume_from(rings)?;
        if let Some(session) = session {
            thread::prepare();
            self.directory
                .resume_session(session)
                .map_err(|source| DeviceError::Host { action: "open the shared directory", source })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
