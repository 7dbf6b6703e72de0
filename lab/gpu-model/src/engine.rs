//! The copy and compute engine: takes a command, works through it part by part, and answers how it ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::guest_memory::{Fault, GuestMemory};
use crate::registers::{Checksum, CommandError, Operation, Registers};
use crate::video_memory::VideoMemory;

/// Bytes that are moved at a time: between two parts, mappings can change and a reset can stop the command.
const PART: u64 = 1 << 20;

/// A command as it was when it was started.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) operation: Operation,
    pub(crate) vector: u8,
    source: u64,
    destination: u64,
    length: u64,
    multiplier: u32,
    addend: u32,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) checksum: u64,
    /// The error, and the bus address if it is one of that.
    pub(crate) error: Option<(CommandError, u64)>,
}

/// What the engine works on.
#[derive(Debug)]
pub(crate) struct Memories {
    pub(crate) guest: Mutex<GuestMemory>,
    pub(crate) video: VideoMemory,
    /// Whether the device may reach guest memory now.
    pub(crate) bus_master: AtomicBool,
    /// Whether the command that runs is to be given up.
    pub(crate) stop: AtomicBool,
}

impl Memories {
    pub(crate) fn guest(&self) -> MutexGuard<'_, GuestMemory> {
        // A panic elsewhere leaves the mappings as whole as they were.
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    /// The command that the registers hold.
    pub(crate) fn new(operation: Operation, vector: u8, registers: &Registers) -> Self {
        Self {
            operation,
            vector,
            source: registers.source,
            destination: registers.destination,
            length: registers.length,
            multiplier: registers.multiplier,
            addend: registers.addend,
        }
    }

    /// Does it all.
    pub(crate) fn run(&self, memories: &Memories) -> Outcome {
        let mut checksum = Checksum::new();
        let error = self.check(memories).and_then(|()| self.parts(memories, &mut checksum)).err();
        Outcome { checksum: checksum.value(), error }
    }

    /// Refuses ranges that leave the video memory before anything is moved.
    fn check(&self, memories: &Memories) -> Result<(), (CommandError, u64)> {
        let holds = |offset| memories.video.holds(offset, self.length);
        let fits = match self.operation {
            Operation::CopyIn => holds(self.destination),
            Operation::CopyOut | Operation::Checksum => holds(self.source),
            Operation::Compute => {
                let aligned = (self.source | self.destination | self.length).is_multiple_of(4);
                let apart = self.source.abs_diff(self.destination) >= self.length;
                aligned && (apart || self.source == self.destination) && holds(self.source) && holds(self.destination)
            }
        };
        if fits { Ok(()) } else { Err((CommandError::Range, 0)) }
    }

    fn parts(&self, memories: &Memories, checksum: &mut Checksum) -> Result<(), (CommandError, u64)> {
        let mut buffer = vec![0; usize::try_from(PART.min(self.length)).unwrap_or_default()];
        let mut done = 0;
        while done < self.length && !memories.stop.load(Ordering::Acquire) {
            let size = PART.min(self.length - done);
            let part = &mut buffer[..usize::try_from(size).unwrap_or_default()];
            self.part(memories, done, part)?;
            checksum.add(part);
            done += size;
        }
        Ok(())
    }

    /// Moves one part; afterwards it is in `data`.
    fn part(&self, memories: &Memories, done: u64, data: &mut [u8]) -> Result<(), (CommandError, u64)> {
        let faulted = |Fault(address): Fault| (CommandError::BusAddress, address);
        let missing = |_| (CommandError::Range, 0);
        match self.operation {
            Operation::CopyIn => {
                let source = self.bus_address(memories, self.source, done)?;
                memories.guest().read(source, data).map_err(faulted)?;
                memories.video.write(self.destination + done, data).map_err(missing)
            }
            Operation::CopyOut => {
                memories.video.read(self.source + done, data).map_err(missing)?;
                let destination = self.bus_address(memories, self.destination, done)?;
                memories.guest().write(destination, data).map_err(faulted)
            }
            Operation::Compute => {
                memories.video.read(self.source + done, data).map_err(missing)?;
                self.compute(data);
                memories.video.write(self.destination + done, data).map_err(missing)
            }
            Operation::Checksum => memories.video.read(self.source + done, data).map_err(missing),
        }
    }

    fn bus_address(&self, memories: &Memories, base: u64, done: u64) -> Result<u64, (CommandError, u64)> {
        if !memories.bus_master.load(Ordering::Acquire) {
            return Err((CommandError::BusMaster, 0));
        }
        base.checked_add(done).ok_or((CommandError::BusAddress, base))
    }

    fn compute(&self, data: &mut [u8]) {
        for word in data.as_chunks_mut::<4>().0 {
            *word = u32::from_le_bytes(*word).wrapping_mul(self.multiplier).wrapping_add(self.addend).to_le_bytes();
        }
    }
}
