//! Who carries tasks out: the kernel in the background by io_uring, or this thread at once.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};

use super::task::{Operation, Task};

/// A carrier of tasks.
pub(super) enum Engine {
    /// In the background.
    Background(Box<Background>),
    /// At once.
    Immediate,
}

/// A ring, and the tasks in it.
pub(super) struct Background {
    ring: IoUring,
    tasks: HashMap<u64, Task>,
    /// Tasks whose answers did not come from the ring.
    finished: Vec<(u64, io::Result<()>)>,
}

impl Engine {
    /// The best engine that this host has, for `entries` tasks at a time.
    pub(super) fn new(entries: u32) -> Self {
        match Background::new(entries) {
            Ok(background) => Self::Background(Box::new(background)),
            Err(error) => {
                tracing::info!(%error, "no io_uring: disk requests are carried out one by one");
                Self::Immediate
            }
        }
    }

    /// Readable while there are completions: the ring itself, which costs no system call to make it so, and none where
    /// they are taken before anybody waits for them.
    pub(super) fn event_fd(&self) -> Option<RawFd> {
        match self {
            Self::Background(background) => Some(background.ring.as_raw_fd()),
            Self::Immediate => None,
        }
    }

    /// Starts `task` under `number`; returns the result if it is there already.
    pub(super) fn start(&mut self, number: u64, task: Task, file: &File) -> Option<io::Result<()>> {
        match self {
            Self::Background(background) if !is_nothing(&task) => {
                background.push(number, task, file);
                None
            }
            _ => Some(task.run(file)),
        }
    }

    /// Hands over to the kernel what was started; false when it is short of something, and wants to be asked again.
    pub(super) fn submit(&mut self) -> io::Result<bool> {
        match self {
            Self::Background(background) => background.submit(),
            Self::Immediate => Ok(true),
        }
    }

    /// The tasks that are done, by their numbers.
    pub(super) fn completions(&mut self, file: &File) -> Vec<(u64, io::Result<()>)> {
        match self {
            Self::Background(background) => background.completions(file),
            Self::Immediate => Vec::new(),
        }
    }

    /// Waits until there is a completion. Only while a task is at work.
    pub(super) fn wait(&self) -> io::Result<()> {
        match self {
            Self::Background(background) if background.finished.is_empty() => {
                match background.ring.submitter().submit_and_wait(1) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
                    Ok(_) | Err(_) => Ok(()),
                }
            }
            Self::Background(_) | Self::Immediate => Ok(()),
        }
    }
}

/// Whether a task is one that `fallocate` would refuse as there is nothing to do.
fn is_nothing(task: &Task) -> bool {
    matches!(task.operation, Operation::Discard { length: 0 } | Operation::Zero { length: 0, .. })
}

impl Background {
    /// A ring that can do what disks need, and nothing else should the process be taken over.
    fn new(entries: u32) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(entries)?;
        let mut allowed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE]
            .map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self { ring, tasks: HashMap::new(), finished: Vec::new() })
    }

    fn push(&mut self, number: u64, task: Task, file: &File) {
        let entry = task.entry(file).user_data(number);
        // SAFETY: what the entry points to is kept in `tasks` until the completion: the list of pieces on the heap, and
        // the guest's memory. The file outlives the engine's tasks, as the device waits for them before it closes it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => {
                self.tasks.insert(number, task);
            }
            // There are as many entries as requests at a time, so this is for a kernel that did not take some earlier.
            Err(_) => self.finished.push((number, task.run(file))),
        }
    }

    fn submit(&mut self) -> io::Result<bool> {
        if self.ring.submission().is_empty() {
            return Ok(true);
        }
        match self.ring.submit() {
            Ok(_) => Ok(self.ring.submission().is_empty()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn completions(&mut self, file: &File) -> Vec<(u64, io::Result<()>)> {
        let mut done = std::mem::take(&mut self.finished);
        for completion in self.ring.completion() {
            let number = completion.user_data();
            let Some(mut task) = self.tasks.remove(&number) else { continue };
            let result =
                usize::try_from(completion.result()).map_err(|_| io::Error::from_raw_os_error(-completion.result()));
            let result = match result {
                Err(error) if task.has_another_way(&error) => task.run(file),
                result => task.absorb(result).unwrap_or_else(|| task.run(file)),
            };
            done.push((number, result));
        }
        done
    }
}
