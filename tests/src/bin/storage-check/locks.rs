//! Locks between processes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::Behaviour;
use crate::observation::{Observed, Steps, answer, code, in_another_process, of_code};

pub(crate) const BEHAVIOURS: &[Behaviour] =
    &[("locks of files", whole), ("locks of records", records), ("locks of descriptions", descriptions)];

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// flock(2), without waiting.
fn lock(file: &File, kind: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    answer(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) }).map(drop)
}

/// The lock of fcntl(2) that `command` sets, for `length` bytes from `start`, without waiting.
fn lock_record(file: &File, command: i32, kind: i32, (start, length): (i64, i64)) -> io::Result<()> {
    let kind = i16::try_from(kind).map_err(io::Error::other)?;
    let record = libc::flock { l_type: kind, l_whence: 0, l_start: start, l_len: length, l_pid: 0 };
    // SAFETY: the descriptor is open, and the structure is what the command reads.
    answer(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const record) }).map(drop)
}

/// What another process, which opens the file itself, finds.
fn by_another<T>(path: &Path, work: impl FnOnce(&File) -> io::Result<T>) -> io::Result<String> {
    Ok(of_code(in_another_process(|| code(&open(path).and_then(|file| work(&file))))?))
}

fn whole(dir: &Path) -> Observed {
    let path = dir.join("file");
    let file = open(&path)?;
    let mut steps = Steps::default();
    steps.result("shared", lock(&file, libc::LOCK_SH));
    steps.see("shared by another", by_another(&path, |file| lock(file, libc::LOCK_SH))?);
    steps.see("alone by another", by_another(&path, |file| lock(file, libc::LOCK_EX))?);
    steps.result("alone", lock(&file, libc::LOCK_EX));
    steps.see("shared by another", by_another(&path, |file| lock(file, libc::LOCK_SH))?);
    drop(file);
    steps.see("after closing", by_another(&path, |file| lock(file, libc::LOCK_EX))?);
    steps.done()
}

fn records(dir: &Path) -> Observed {
    let path = dir.join("file");
    let file = open(&path)?;
    let set = |file: &File, kind, range| lock_record(file, libc::F_SETLK, kind, range);
    let mut steps = Steps::default();
    steps.result("alone", set(&file, libc::F_WRLCK, (0, 10)));
    steps.see("overlapping", by_another(&path, |file| set(file, libc::F_RDLCK, (5, 10)))?);
    steps.see("beside it", by_another(&path, |file| set(file, libc::F_WRLCK, (10, 10)))?);
    steps.result("part of it let go", set(&file, libc::F_UNLCK, (5, 5)));
    steps.see("that part", by_another(&path, |file| set(file, libc::F_WRLCK, (5, 5)))?);
    // Any of its descriptors that a process closes takes its locks away.
    drop(open(&path)?);
    steps.see("after closing another descriptor", by_another(&path, |file| set(file, libc::F_WRLCK, (0, 5)))?);
    steps.done()
}

fn descriptions(dir: &Path) -> Observed {
    let path = dir.join("file");
    let (one, two) = (open(&path)?, open(&path)?);
    let set = |file: &File, kind| lock_record(file, libc::F_OFD_SETLK, kind, (0, 0));
    let mut steps = Steps::default();
    steps.result("alone", set(&one, libc::F_WRLCK));
    steps.result("by the same process", set(&two, libc::F_WRLCK));
    drop(one);
    steps.result("after closing", set(&two, libc::F_WRLCK));
    steps.done()
}
