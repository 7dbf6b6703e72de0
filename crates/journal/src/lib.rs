//! The undo journal: every host side effect, written down before it happens.
//!
//! A journal is an append-only file of JSON lines. Each [`Effect`] is recorded *before* the host is touched,
//! so that whoever finds the file later (the process itself, `delete`, a restart) can undo whatever may have
//! happened: [`replay`] ends the recorded processes, then goes backwards through the rest, tries every step and
//! reports the steps that failed. Undoing is idempotent: an effect that never happened, or that was undone by
//! somebody else, is no error. A last line that was torn by a crash is ignored: its effect did not happen yet.

mod effect;
mod process;
mod tree;

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

pub use effect::{Effect, UndoError};
pub use process::ProcessId;

/// A journal larger than this is not replayed (bytes): no sandbox writes a hundredth of it.
const MAX_JOURNAL: u64 = 64 << 20;

/// How long [`replay`] waits for another process that replays the same journal.
const REPLAY_DEADLINE: Duration = Duration::from_secs(20);

/// Why the journal itself could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file could not be opened, read, written or locked.
    #[error("journal {path}: {source}; check that the file system of its directory is writable and not full")]
    Io {
        /// The journal file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is larger than any journal gets.
    #[error("journal {path} has {size} bytes, more than the {MAX_JOURNAL} that a journal may have; remove it by hand")]
    TooLarge {
        /// The journal file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Another process replays the same journal, and did not end within [`REPLAY_DEADLINE`].
    #[error(
        "journal {path} has been replayed by another process for {} s; see what holds that process (a mount that does \
         not answer?) and try again", REPLAY_DEADLINE.as_secs()
    )]
    Busy {
        /// The journal file.
        path: PathBuf,
    },
}

/// Names one recorded effect within its journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EffectId(u64);

/// One line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Do { id: EffectId, effect: Effect },
    Undone { id: EffectId },
}

/// The journal of one living owner.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    next: u64,
    /// In the order of recording; what is here is not undone yet.
    open: Vec<(EffectId, Effect)>,
}

impl Journal {
    /// Creates an empty journal; its directory must exist.
    ///
    /// # Errors
    ///
    /// [`JournalError::Io`] when the file cannot be created, or exists: two owners would undo each other's effects.
    pub fn create(path: &Path) -> Result<Self, JournalError> {
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| JournalError::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), state: Mutex::new(State { file, next: 0, open: Vec::new() }) })
    }

    /// Records an effect that is about to happen.
    ///
    /// # Errors
    ///
    /// [`JournalError::Io`]: the effect must then not be carried out.
    pub fn record(&self, effect: Effect) -> Result<EffectId, JournalError> {
        let mut state = self.lock();
        let id = EffectId(state.next);
        self.write(&mut state.file, &Line::Do { id, effect: effect.clone() })?;
        state.next += 1;
        state.open.push((id, effect));
        Ok(id)
    }

    /// Undoes one effect and strikes it out. An id that is struck out already is no error.
    ///
    /// # Errors
    ///
    /// [`UndoError`] when the host refused; the effect stays in the journal for [`replay`].
    pub fn undo(&self, id: EffectId) -> Result<(), UndoError> {
        let Some(effect) = self.lock().open.iter().find(|(open, _)| *open == id).map(|(_, effect)| effect.clone())
        else {
            return Ok(());
        };
        effect.undo()?;
        let mut state = self.lock();
        state.open.retain(|(open, _)| *open != id);
        // The effect is gone: a line that cannot be written costs one idempotent step in a later replay.
        if let Err(error) = self.write(&mut state.file, &Line::Undone { id }) {
            tracing::warn!(%error, "could not strike out an undone effect");
        }
        Ok(())
    }

    /// Undoes these effects backwards, every one of them whatever happens to the others.
    pub fn undo_all(&self, ids: &[EffectId]) -> Vec<UndoError> {
        ids.iter().rev().filter_map(|id| self.undo(*id).err()).collect()
    }

    /// Undoes everything but the processes, backwards. Removes the file when nothing is left to undo.
    pub fn finish(&self) -> Vec<UndoError> {
        let ids: Vec<EffectId> = self
            .lock()
            .open
            .iter()
            .filter(|(_, effect)| !matches!(effect, Effect::Process { .. }))
            .map(|(id, _)| *id)
            .collect();
        let failures = self.undo_all(&ids);
        if failures.is_empty()
            && let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "could not remove the finished journal");
        }
        failures
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is consistent after every statement: a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self, file: &mut File, line: &Line) -> Result<(), JournalError> {
        let fail = |source| JournalError::Io { path: self.path.clone(), source };
        let mut bytes = serde_json::to_vec(line).map_err(|error| fail(error.into()))?;
        bytes.push(b'\n');
        // One write to a file opened for appending: the line is there whole, or torn at the very end.
        file.write_all(&bytes).map_err(fail)
    }
}

/// What a replay did.
#[derive(Debug, Default)]
pub struct Replay {
    /// The journal existed.
    pub found: bool,
    /// Effects that are undone now.
    pub undone: usize,
    /// Effects that still stand, and why. The journal is kept while there are any.
    pub failures: Vec<UndoError>,
}

/// Ends the processes of the journal at `path`, undoes all other effects backwards, and removes the file when nothing
/// is left. A missing file is an empty journal.
///
/// # Errors
///
/// [`JournalError`] when the file cannot be read. A failed step is no error but in [`Replay::failures`].
pub fn replay(path: &Path) -> Result<Replay, JournalError> {
    replay_if(path, |_| true).map(Option::unwrap_or_default)
}

/// As [`replay`], unless `wanted` says no to the processes that the journal records. That is asked while nobody else
/// replays it and before anything is done: a sweeper that found the owner of a path dead must not end the next one.
///
/// # Errors
///
/// As [`replay`].
pub fn replay_if(path: &Path, wanted: impl FnOnce(&[ProcessId]) -> bool) -> Result<Option<Replay>, JournalError> {
    let fail = |source| JournalError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Some(Replay::default())),
        Err(error) => return Err(fail(error)),
    };
    let mut file = lock(file, path, REPLAY_DEADLINE)?;
    let metadata = file.metadata().map_err(fail)?;
    if metadata.nlink() == 0 {
        // Whoever held the lock has undone everything.
        return Ok(Some(Replay { found: true, ..Replay::default() }));
    }
    let size = metadata.len();
    if size > MAX_JOURNAL {
        return Err(JournalError::TooLarge { path: path.to_owned(), size });
    }
    let mut open = read_open(&mut file, path)?;
    if !wanted(&processes(open.iter().map(|(_, effect)| effect))) {
        return Ok(None);
    }
    end_processes(&mut file, path, &mut open)?;

    let mut replay = Replay { found: true, ..Replay::default() };
    for (_, effect) in open.iter().rev() {
        match effect.undo() {
            Ok(()) => replay.undone += 1,
            Err(failure) => replay.failures.push(failure),
        }
    }
    if replay.failures.is_empty() {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
    }
    Ok(Some(replay))
}

/// Waits for other replays of the same journal: the kernel ends their locks when they end, in whatever way.
fn lock(file: File, path: &Path, deadline: Duration) -> Result<Flock<File>, JournalError> {
    let fail = |errno: nix::Error| JournalError::Io { path: path.to_owned(), source: errno.into() };
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(locked) => return Ok(locked),
        Err((file, nix::Error::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(fail(errno)),
    };
    // flock(2) knows no deadline: a thread waits in it, and this one for the thread.
    let (sender, locked) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)));
    match locked.recv_timeout(deadline) {
        Ok(result) => result.map_err(fail),
        Err(_) => Err(JournalError::Busy { path: path.to_owned() }),
    }
}

/// The processes that a journal records: whoever owns it. None for a missing file.
///
/// # Errors
///
/// [`JournalError::Io`] when the file cannot be read.
pub fn owners(path: &Path) -> Result<Vec<ProcessId>, JournalError> {
    Ok(processes(&standing(path)?))
}

/// The processes among these effects.
fn processes<'a>(effects: impl IntoIterator<Item = &'a Effect>) -> Vec<ProcessId> {
    let process = |effect: &Effect| match effect {
        Effect::Process { process } => Some(*process),
        _ => None,
    };
    effects.into_iter().filter_map(process).collect()
}

/// The effects that a journal records and that are not undone, in the order of recording. None for a missing file.
///
/// # Errors
///
/// [`JournalError::Io`] when the file cannot be read.
pub fn standing(path: &Path) -> Result<Vec<Effect>, JournalError> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(|source| JournalError::Io { path: path.to_owned(), source })?,
    };
    Ok(read_open(&mut file, path)?.into_iter().map(|(_, effect)| effect).collect())
}

/// Ends the recorded processes first: they hold mounts and cgroups, and write to this journal. What they recorded until
/// their end is read again.
fn end_processes(file: &mut File, path: &Path, open: &mut Vec<(EffectId, Effect)>) -> Result<(), JournalError> {
    if !open.iter().any(|(_, effect)| matches!(effect, Effect::Process { .. })) {
        return Ok(());
    }
    for (_, effect) in open.iter().filter(|(_, effect)| matches!(effect, Effect::Process { .. })) {
        if let Err(error) = effect.undo() {
            tracing::warn!(%error, "a recorded process did not end");
        }
    }
    std::io::Seek::rewind(file).map_err(|source| JournalError::Io { path: path.to_owned(), source })?;
    *open = read_open(file, path)?;
    Ok(())
}

/// The effects that are not struck out, in the order of recording.
fn read_open(file: &mut File, path: &Path) -> Result<Vec<(EffectId, Effect)>, JournalError> {
    let mut bytes = Vec::new();
    file.take(MAX_JOURNAL)
        .read_to_end(&mut bytes)
        .map_err(|source| JournalError::Io { path: path.to_owned(), source })?;
    let mut open: Vec<(EffectId, Effect)> = Vec::new();
    for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(Line::Do { id, effect }) => open.push((id, effect)),
            Ok(Line::Undone { id }) => open.retain(|(other, _)| *other != id),
            // Only a torn last line is expected; a broken one in the middle must not hide the rest.
            Err(error) => tracing::warn!(%error, path = %path.display(), "skipped a line of the journal"),
        }
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_replay_that_does_not_end_is_named() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let held = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusive).unwrap();
        let refused = lock(File::open(&path).unwrap(), &path, Duration::from_millis(1)).unwrap_err();
        assert!(matches!(refused, JournalError::Busy { .. }), "{refused}");
        drop(held);
        lock(File::open(&path).unwrap(), &path, REPLAY_DEADLINE).unwrap();
    }
}
