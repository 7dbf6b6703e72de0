//! The device: what its regions read and write, and the thread that does its commands.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use crate::config_space::{self, ConfigSpace, Identity};
use crate::engine::{Job, Memories, Outcome};
use crate::guest_memory::{GuestMemory, Permissions};
use crate::interrupts::{self, Interrupts, VECTORS};
use crate::registers::{BUSY, CommandError, DONE, Effect, Operation, Registers};
use crate::video_memory::VideoMemory;

/// Bytes of BAR0, the registers.
pub const BAR0_SIZE: u64 = 16 << 20;
/// Bytes of BAR3, memory without a meaning of its own.
pub const BAR3_SIZE: u64 = 32 << 20;
/// The least and the most video memory, in bytes; a power of two between them.
pub const VIDEO_MEMORY: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 40;

/// Number of a region, as vfio counts them (`linux/vfio.h`, `VFIO_PCI_*_REGION_INDEX`).
pub(crate) const REGIONS: u32 = 9;
const CONFIG: u32 = 7;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size of the video memory cannot be that of a BAR.
    #[error("Video memory of {0} bytes cannot be: give a power of two from 1 MiB to 1 TiB, as 8G")]
    VideoMemory(u64),
    /// The host gave no memory.
    #[error("The host gives no memory for the device: {0}")]
    Memory(#[source] Errno),
    /// The host gave no thread.
    #[error("The host gives no thread for the device's engine: {0}")]
    Thread(#[source] std::io::Error),
}

/// What a region is to a client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region<'a> {
    pub(crate) size: u64,
    /// The file to map, if it can be mapped.
    pub(crate) file: Option<BorrowedFd<'a>>,
}

struct State {
    config: ConfigSpace,
    registers: Registers,
    interrupts: Interrupts,
    /// Whether the engine has a command. Not in the registers, since a reset clears those while the engine stops.
    running: bool,
}

/// What the engine's thread shares with the client's.
struct Shared {
    memories: Memories,
    state: Mutex<State>,
    stopped: Condvar,
}

/// A device. Its engine ends when it is dropped.
pub struct Device {
    shared: Arc<Shared>,
    spare: VideoMemory,
    jobs: Sender<Job>,
}

impl Device {
    /// A device that was just switched on.
    ///
    /// # Errors
    /// When the size cannot be, or the host gives no memory or thread.
    pub fn new(identity: Identity, video_memory: u64) -> Result<Self, Error> {
        if !video_memory.is_power_of_two() || !VIDEO_MEMORY.contains(&video_memory) {
            return Err(Error::VideoMemory(video_memory));
        }
        let memories = Memories {
            guest: Mutex::new(GuestMemory::default()),
            video: VideoMemory::new("gpu-model-bar1", video_memory).map_err(Error::Memory)?,
            bus_master: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        };
        let state = State {
            config: ConfigSpace::new(identity, VECTORS),
            registers: Registers::default(),
            interrupts: Interrupts::default(),
            running: false,
        };
        let shared = Arc::new(Shared { memories, state: Mutex::new(state), stopped: Condvar::new() });
        let spare = VideoMemory::new("gpu-model-bar3", BAR3_SIZE).map_err(Error::Memory)?;
        let (jobs, receiver) = channel();
        let engine = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("engine".to_owned());
        thread.spawn(move || engine.work(&receiver)).map_err(Error::Thread)?;
        Ok(Self { shared, spare, jobs })
    }

    /// The region of an index.
    pub(crate) fn region(&self, index: u32) -> Option<Region<'_>> {
        let video = &self.shared.memories.video;
        match index {
            0 => Some(Region { size: BAR0_SIZE, file: None }),
            1 => Some(Region { size: video.size(), file: Some(video.descriptor()) }),
            3 => Some(Region { size: BAR3_SIZE, file: Some(self.spare.descriptor()) }),
            CONFIG => Some(Region { size: config_space::SIZE as u64, file: None }),
            _ if index < REGIONS => Some(Region { size: 0, file: None }),
            _ => None,
        }
    }

    fn check(&self, region: u32, offset: u64, length: usize) -> Result<(), Errno> {
        let size = self.region(region).ok_or(Errno::EINVAL)?.size;
        let end = offset.checked_add(length as u64).ok_or(Errno::EINVAL)?;
        if end <= size { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// Reads from a region. While memory decoding is off, BARs read as on hardware: all ones.
    pub(crate) fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.check(region, offset, data.len())?;
        let state = self.shared.state();
        if region == CONFIG {
            state.config.read(position(offset)?, data);
        } else if !state.config.memory() {
            data.fill(0xff);
        } else if region == 0 {
            read_registers(&state.registers, self.shared.memories.video.size(), offset, data);
        } else {
            drop(state);
            self.memory(region)?.read(offset, data).map_err(|_| Errno::EIO)?;
        }
        Ok(())
    }

    /// Writes to a region. While memory decoding is off, writes to BARs are lost, as on hardware.
    pub(crate) fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check(region, offset, data.len())?;
        if region == CONFIG {
            return self.write_config(position(offset)?, data);
        }
        let state = self.shared.state();
        if !state.config.memory() {
            return Ok(());
        }
        if region == 0 {
            self.write_registers(state, offset, data);
            return Ok(());
        }
        drop(state);
        self.memory(region)?.write(offset, data).map_err(|_| Errno::EIO)
    }

    fn memory(&self, region: u32) -> Result<&VideoMemory, Errno> {
        match region {
            1 => Ok(&self.shared.memories.video),
            3 => Ok(&self.spare),
            _ => Err(Errno::EINVAL),
        }
    }

    fn write_config(&self, at: usize, data: &[u8]) -> Result<(), Errno> {
        let mut state = self.shared.state();
        let reset = state.config.write(at, data);
        self.shared.memories.bus_master.store(state.config.bus_master(), Ordering::Release);
        state.raise_line();
        drop(state);
        if reset { self.reset() } else { Ok(()) }
    }

    /// Registers take aligned words, one or two at a time; whatever else is written is lost.
    fn write_registers(&self, mut state: MutexGuard<'_, State>, offset: u64, data: &[u8]) {
        let (words, rest) = data.as_chunks::<4>();
        if !offset.is_multiple_of(4) || !rest.is_empty() || words.len() > 2 {
            return;
        }
        for (index, word) in words.iter().enumerate() {
            match state.registers.write(offset + 4 * index as u64, u32::from_le_bytes(*word)) {
                Effect::None => {}
                Effect::Interrupt => state.raise_line(),
                Effect::Start(command) => self.start(&mut state, command),
            }
        }
    }

    fn start(&self, state: &mut State, command: u32) {
        if state.running {
            return;
        }
        let [_, vector, ..] = command.to_le_bytes();
        let Some(operation) = Operation::of_command(command).filter(|_| u16::from(vector) < VECTORS) else {
            state.finish(0, Outcome { checksum: 0, error: Some((CommandError::Command, 0)) });
            return;
        };
        state.running = true;
        state.registers.status = BUSY;
        // The receiver lives as long as this sender.
        let _ = self.jobs.send(Job::new(operation, vector, &state.registers));
    }

    /// Puts the device into the state after a reset. Its memories are zero then; mappings and interrupts, which are
    /// the client's, stay. A command that runs ends first and moves nothing afterwards.
    pub(crate) fn reset(&self) -> Result<(), Errno> {
        let mut state = self.shared.stop();
        state.config.reset();
        state.registers.reset();
        self.shared.memories.bus_master.store(false, Ordering::Release);
        self.shared.memories.stop.store(false, Ordering::Release);
        self.shared.memories.video.clear()?;
        self.spare.clear()
    }

    /// Forgets all that a client left, for the next one.
    pub(crate) fn disconnect(&self) -> Result<(), Errno> {
        self.reset()?;
        self.shared.state().interrupts = Interrupts::default();
        self.shared.memories.guest().clear();
        Ok(())
    }

    /// Lets the device reach memory of the client.
    pub(crate) fn map(
        &self,
        address: u64,
        size: u64,
        permissions: Permissions,
        file: Option<(OwnedFd, u64)>,
    ) -> Result<(), Errno> {
        self.shared.memories.guest().map(address, size, permissions, file)
    }

    /// Takes memory away; once this has answered, no command reaches it any more.
    pub(crate) fn unmap(&self, address: u64, size: u64) -> Result<u64, Errno> {
        self.shared.memories.guest().unmap(address, size)
    }

    /// Takes all memory away.
    pub(crate) fn unmap_all(&self) {
        self.shared.memories.guest().clear();
    }

    /// Changes where interrupts go.
    pub(crate) fn set_interrupts(&self, request: interrupts::Request<'_>) -> Result<(), Errno> {
        let mut state = self.shared.state();
        state.interrupts.set(request)?;
        state.raise_line();
        Ok(())
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the registers as whole as they were.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does commands until the device is dropped.
    fn work(&self, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            let outcome = job.run(&self.memories);
            let mut state = self.state();
            state.running = false;
            state.finish(job.vector, outcome);
            drop(state);
            self.stopped.notify_all();
        }
    }

    /// Stops the command that runs and waits for its end.
    fn stop(&self) -> MutexGuard<'_, State> {
        self.memories.stop.store(true, Ordering::Release);
        self.stopped.wait_while(self.state(), |state| state.running).unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Says how a command ended, in registers and by interrupt.
    fn finish(&mut self, vector: u8, outcome: Outcome) {
        let (error, address) = outcome.error.map_or((0, 0), |(error, address)| (error as u32, address));
        self.registers.status = DONE | error << 8;
        self.registers.fault_address = address;
        self.registers.checksum = outcome.checksum;
        self.registers.completed = self.registers.completed.wrapping_add(1);
        self.registers.interrupt_status = true;
        self.interrupts.raise_vector(vector);
        self.raise_line();
    }

    /// Raises the line if it is due, and says in the status register whether it would be.
    fn raise_line(&mut self) {
        let pending = self.registers.interrupt_status && self.registers.interrupt_enable;
        self.config.set_interrupt_pending(pending);
        if pending && self.config.intx() && !self.interrupts.msix() {
            self.interrupts.raise_line();
        }
    }
}

fn read_registers(registers: &Registers, video_memory: u64, offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset..).zip(data) {
        let word = registers.word(at & !3, video_memory).to_le_bytes();
        *byte = word[usize::try_from(at & 3).unwrap_or_default()];
    }
}

fn position(offset: u64) -> Result<usize, Errno> {
    usize::try_from(offset).map_err(|_| Errno::EINVAL)
}
