//! What the daemons that the suites start have in common: a directory of their own with a log, and an end.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use crate::event::{Deadline, wait};
use crate::pidfd::Pidfd;

/// The last `lines` of the file `log` in `directory`, each after a line break.
pub(crate) fn log_end(directory: &Path, lines: usize) -> String {
    let log = fs::read_to_string(directory.join("log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().rev().take(lines).collect();
    lines.iter().rev().map(|line| format!("\n  {line}")).collect()
}

/// Asks the process to end, kills it when it takes longer than `patience`, and removes its directory with what it has mounted
/// there.
pub(crate) fn end((child, pidfd): &mut (Child, Pidfd), directory: &Path, patience: Duration) {
    pidfd.signal(Signal::SIGTERM).ok();
    let ended = wait(&[(pidfd.as_fd(), PollFlags::POLLIN)], Deadline::after(patience));
    if !matches!(ended, Ok(Some(_))) {
        child.kill().ok();
    }
    child.wait().ok();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for point in points.filter(|point| point.starts_with(directory)) {
        umount2(point, MntFlags::MNT_DETACH).ok();
    }
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("Cannot remove {}: {error}", directory.display());
    }
}
