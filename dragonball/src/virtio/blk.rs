//! The block device (virtio 1.2, §5.2): a file or block device of the host as the guest's disk.
//!
//! Requests go to the host through io_uring, whose completions come as events of the device thread; where there is no
//! io_uring (it can be switched off for a host or forbidden to a container), each is carried out at once. The file
//! is locked: writable for one VM, or read-only for many.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Outcome, SavedState, VirtioDevice};
use super::ring::{Life, RING_FEATURES, RingPosition, TURN, Work};
use super::state;

mod engine;
mod request;
mod task;

use engine::Engine;
use request::{Answer, Parsed, SECTOR, Status};

/// Entries of the ring.
const QUEUE_SIZES: [u16; 1] = [128];
/// The most requests that the host works on at a time.
const MOST_PENDING: usize = QUEUE_SIZES[0] as usize;
/// Requests after which the driver is interrupted though more of them come: fewer interrupts leave its vCPU more time, and
/// none of the answers is old by then.
const TOGETHER: usize = 16;
const STATE_VERSION: u16 = 1;
const TOKEN_RING: u32 = 0;
const TOKEN_COMPLETION: u32 = 1;
const TOKEN_RESIZE: u32 = 2;

/// `VIRTIO_BLK_F_SIZE_MAX`, `_SEG_MAX`, `_RO`, `_BLK_SIZE`, `_FLUSH`, `_DISCARD` and `_WRITE_ZEROES`.
const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// Why a file cannot become a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The file cannot be opened or examined.
    #[error("Cannot open the disk {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// Only files and block devices have sectors.
    #[error("{0} is neither a file nor a block device; give a disk image")]
    NotADisk(PathBuf),
    /// There is no whole sector.
    #[error("{path} has {length} bytes, a disk at least {SECTOR}; give a disk image")]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
    },
    /// Another process has it.
    #[error(
        "{0} is in use as a writable disk, or in use at all while this one shall be writable; stop the other VM, or use it read-only in both"
    )]
    InUse(PathBuf),
    /// No descriptor is left for the device.
    #[error("Cannot make an event descriptor for the disk; raise the limit of open files (ulimit -n)")]
    Event(#[source] io::Error),
}

/// A block device.
pub struct Blk {
    file: File,
    read_only: bool,
    /// Length of the disk in sectors.
    capacity: u64,
    /// What the guest sees as the disk's serial number.
    id: [u8; request::ID_LENGTH],
    resize: Arc<EventFd>,
    engine: Engine,
    /// Requests that the host works on, by their number.
    pending: HashMap<u64, Answer>,
    next_number: u64,
    life: Life<1>,
}

/// Tells a disk, from any thread, that its file has another length.
#[derive(Clone, Debug)]
pub struct Resizer(Arc<EventFd>);

impl Resizer {
    /// Has the device look at the length of its file and tell the guest.
    ///
    /// # Errors
    /// When the device cannot be woken.
    pub fn resize(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[derive(Deserialize, Serialize)]
struct State {
    rings: Option<[RingPosition; 1]>,
}

impl Blk {
    /// The disk in the file or block device `path`.
    ///
    /// # Errors
    /// When it cannot be opened as it is wanted, has no sector, or another VM has it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlkError> {
        Self::with_engine(path, read_only, Engine::new(u32::from(QUEUE_SIZES[0])))
    }

    fn with_engine(path: &Path, read_only: bool, engine: Engine) -> Result<Self, BlkError> {
        let failed = |source| BlkError::Open { path: path.to_owned(), source };
        let file = File::options().read(true).write(!read_only).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(BlkError::NotADisk(path.to_owned()));
        }
        match if read_only { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(BlkError::InUse(path.to_owned())),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let length = length(&file).map_err(failed)?;
        if length < SECTOR {
            return Err(BlkError::TooSmall { path: path.to_owned(), length });
        }
        let resize = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BlkError::Event)?;
        Ok(Self {
            id: id(metadata.dev(), metadata.ino()),
            file,
            read_only,
            capacity: length / SECTOR,
            resize: Arc::new(resize),
            engine,
            pending: HashMap::new(),
            next_number: 0,
            life: Life::NEW,
        })
    }

    /// A handle by which the device learns that its file has another length.
    #[must_use]
    pub fn resizer(&self) -> Resizer {
        Resizer(Arc::clone(&self.resize))
    }

    /// Serves the ring until it is empty and what the host can answer at once is answered. Until then the driver does
    /// not ring the doorbell: each ring would stop its vCPU for a request that is seen anyway.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let (mut served, mut untold) = (0, 0);
        loop {
            let taken = self.take_requests()?;
            let failed = |source| DeviceError::Host { action: "hand disk requests to the kernel", source };
            let handed = self.engine.submit().map_err(failed)?;
            self.take_completions()?;
            let Some(Work { rings, memory }) = self.life.work() else { return Ok(()) };
            let ring = &mut rings[0];
            served += taken;
            untold += taken;
            let leave = !handed || served >= TURN;
            if leave || taken == 0 || untold >= TOGETHER {
                ring.signal_used(memory)?;
                untold = 0;
            }
            if leave {
                return ring.call_again();
            }
            // While there is no room for more, a completion is the event to wait for.
            if taken == 0 && (self.pending.len() >= MOST_PENDING || ring.rest(memory)?) {
                return Ok(());
            }
        }
    }

    /// Takes requests from the ring and has the engine start them, as many as the host may work on at a time; returns
    /// their number.
    fn take_requests(&mut self) -> Result<usize, DeviceError> {
        let Some(Work { rings, memory }) = self.life.work() else { return Ok(0) };
        let ring = &mut rings[0];
        for taken in 0..TURN {
            // A driver that makes one buffer available twice has more requests than the ring has entries.
            if self.pending.len() >= MOST_PENDING {
                return Ok(taken);
            }
            let Some(request) = ring.pop(memory)? else { return Ok(taken) };
            let (answer, status) = match request::parse(&request, memory, self.capacity, self.read_only, &self.id)? {
                Parsed::Answered(answer, status) => (answer, status),
                Parsed::Task(answer, task) => {
                    let number = self.next_number;
                    self.next_number = self.next_number.wrapping_add(1);
                    let Some(result) = self.engine.start(number, task, &self.file) else {
                        self.pending.insert(number, answer);
                        continue;
                    };
                    (answer, Status::of(&result))
                }
            };
            ring.stage_used(memory, answer.head, answer.finish(status))?;
        }
        Ok(TURN)
    }

    /// Shows the guest the answers that there are by now, without an interrupt.
    fn take_completions(&mut self) -> Result<(), DeviceError> {
        let Some(Work { rings, memory }) = self.life.work() else { return Ok(()) };
        let ring = &mut rings[0];
        for (number, result) in self.engine.completions(&self.file) {
            if let Some(answer) = self.pending.remove(&number) {
                ring.stage_used(memory, answer.head, answer.finish(Status::of(&result)))?;
            }
        }
        ring.publish_used(memory)
    }

    /// Waits until the host has answered all requests; a device that goes on comes back to those that it left.
    fn drain(&mut self) -> Result<(), DeviceError> {
        if self.pending.len() >= MOST_PENDING
            && let Some(work) = self.life.work()
        {
            work.rings[0].call_again()?;
        }
        while !self.pending.is_empty() {
            self.engine
                .wait()
                .map_err(|source| DeviceError::Host { action: "wait for the disk's requests", source })?;
            self.take_completions()?;
        }
        self.life.work().map_or(Ok(()), |Work { rings, memory }| rings[0].signal_used(memory))
    }

    /// Waits until the host works on no request any more, and answers none.
    fn abandon(&mut self) {
        while !self.pending.is_empty() && self.engine.wait().is_ok() {
            for (number, _) in self.engine.completions(&self.file) {
                self.pending.remove(&number);
            }
        }
    }

    fn look_at_length(&mut self) -> Outcome {
        // Nothing to read is as good as read.
        let _ = self.resize.read();
        match length(&self.file) {
            Ok(length) if length / SECTOR != self.capacity => {
                self.capacity = length / SECTOR;
                Outcome::ConfigChanged
            }
            Ok(_) => Outcome::Done,
            Err(error) => {
                tracing::warn!(%error, "the disk's length cannot be read; the guest sees the old one");
                Outcome::Done
            }
        }
    }

    fn watch(&self, events: &mut dyn EventRegistry) -> io::Result<()> {
        events.add(self.resize.as_raw_fd(), TOKEN_RESIZE, EventSet::IN)?;
        let Some(fd) = self.engine.event_fd() else { return Ok(()) };
        events.add(fd, TOKEN_COMPLETION, EventSet::IN).inspect_err(|_| {
            // It was added a moment ago; the error to report is the first one.
            let _ = events.remove(self.resize.as_raw_fd());
        })
    }

    fn unwatch(&self, events: &mut dyn EventRegistry) {
        for fd in self.engine.event_fd().into_iter().chain([self.resize.as_raw_fd()]) {
            if let Err(error) = events.remove(fd) {
                tracing::debug!(%error, "a descriptor of the disk was not watched");
            }
        }
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let writes = FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES;
        RING_FEATURES
            | FEATURE_SIZE_MAX
            | FEATURE_SEG_MAX
            | FEATURE_BLOCK_SIZE
            | if self.read_only { FEATURE_READ_ONLY } else { writes }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_blk_config`.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(8, request::MAX_SEGMENT);
        put(12, request::MAX_SEGMENTS);
        put(20, 512);
        put(36, request::MAX_DISCARD);
        put(40, 1);
        put(44, 1);
        put(48, request::MAX_WRITE_ZEROES);
        put(52, 1);
        config[..8].copy_from_slice(&self.capacity.to_le_bytes());
        config[56] = 1;
        config
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        self.life.activate(activation, events)?;
        self.watch(events).map_err(|source| {
            self.life.reset(events);
            DeviceError::Host { action: "watch the disk's events", source }
        })
    }

    fn handle_event(&mut self, token: u32, _: EventSet, _: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        match token {
            TOKEN_RESIZE => return Ok(self.look_at_length()),
            TOKEN_COMPLETION => {}
            TOKEN_RING => {
                if let Some(work) = self.life.work() {
                    work.rings[0].acknowledge_kick();
                }
            }
            _ => return Ok(Outcome::Done),
        }
        self.serve()?;
        Ok(Outcome::Done)
    }

    /// Waits for the host's answers, as they are written into the guest's memory.
    fn reset(&mut self, events: &mut dyn EventRegistry) {
        if self.life.work().is_some() {
            self.unwatch(events);
        }
        self.abandon();
        self.life.reset(events);
    }

    fn save(&mut self) -> Result<SavedState, DeviceError> {
        self.drain()?;
        state::encode(STATE_VERSION, &State { rings: self.life.positions() })
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { rings } = state::decode(STATE_VERSION, saved)?;
        self.life.resume_from(rings)
    }
}

impl Drop for Blk {
    /// The kernel must be done with guest memory before that may go away.
    fn drop(&mut self) {
        self.abandon();
    }
}

/// Length of a file or block device in bytes.
fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// A serial number that two disks of a host never share.
fn id(device: u64, inode: u64) -> [u8; request::ID_LENGTH] {
    let mut id = [0; request::ID_LENGTH];
    let text = format!("{device:x}-{inode:x}");
    let length = text.len().min(id.len());
    id[..length].copy_from_slice(&text.as_bytes()[..length]);
    id
}

#[cfg(test)]
mod tests;
