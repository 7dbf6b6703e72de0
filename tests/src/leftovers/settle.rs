//! Waits until the machine is as it was.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use super::{Scope, Snapshot, Thing};
use crate::event::{Deadline, Watch, wait};
use crate::pidfd::Pidfd;

/// Multicast group of link changes (linux/rtnetlink.h, `RTMGRP_LINK`).
const LINK_CHANGES: u32 = 1;

/// Waits until nothing of `scope` is there that was not there `before`; answers what is left at the deadline.
///
/// A removal that is under way is no leftover: containerd tells of a task's end before the runtime
/// has put everything away. Each kind of thing has an event for its end (process: pidfd, mount:
/// mountinfo, file and cgroup: inotify, device: rtnetlink), so nothing is polled.
///
/// # Errors
/// When the machine cannot be looked at.
pub fn settle(before: &Snapshot, scope: &Scope, deadline: Deadline) -> Result<Vec<Thing>> {
    loop {
        let left = Snapshot::take(scope)?.since(before);
        if left.is_empty() {
            return Ok(left);
        }
        let endings = Endings::of(&left)?;
        // What ended between the look and the watch has no event any more: look again.
        let left = Snapshot::take(scope)?.since(before);
        if left.is_empty() || !endings.next(deadline)? {
            return Ok(left);
        }
    }
}

/// Descriptors that become ready when one of a set of things ends.
struct Endings {
    processes: Vec<Pidfd>,
    mounts: std::fs::File,
    files: Watch,
    links: OwnedFd,
}

impl Endings {
    fn of(things: &[Thing]) -> Result<Self> {
        let endings = Self {
            processes: things.iter().filter_map(pidfd).collect(),
            mounts: std::fs::File::open("/proc/self/mountinfo").context("Cannot open /proc/self/mountinfo")?,
            files: Watch::new()?,
            links: link_changes()?,
        };
        for path in things.iter().filter_map(path) {
            endings.files.add(path)?;
            if let Some(parent) = path.parent() {
                endings.files.add(parent)?;
            }
        }
        Ok(endings)
    }

    /// `false` at the deadline.
    fn next(&self, deadline: Deadline) -> Result<bool> {
        let mut fds: Vec<(BorrowedFd<'_>, PollFlags)> =
            self.processes.iter().map(|process| (process.as_fd(), PollFlags::POLLIN)).collect();
        fds.push((self.mounts.as_fd(), PollFlags::POLLPRI));
        fds.push((self.files.as_fd(), PollFlags::POLLIN));
        fds.push((self.links.as_fd(), PollFlags::POLLIN));
        Ok(wait(&fds, deadline)?.is_some())
    }
}

fn pidfd(thing: &Thing) -> Option<Pidfd> {
    match thing {
        Thing::Process { pid, .. } => Pidfd::open(*pid).ok(),
        _ => None,
    }
}

fn path(thing: &Thing) -> Option<&Path> {
    match thing {
        Thing::File { path } | Thing::Cgroup { path } => Some(path),
        Thing::Socket { name } => Some(Path::new(name)).filter(|path| path.is_absolute()),
        _ => None,
    }
}

fn link_changes() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let links =
        socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute).context("rtnetlink")?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&links), &NetlinkAddr::new(0, LINK_CHANGES)).context("rtnetlink")?;
    // A message that was on its way before the watch began says nothing about it.
    recv(std::os::fd::AsRawFd::as_raw_fd(&links), &mut [0; 1], MsgFlags::MSG_DONTWAIT).ok();
    Ok(links)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::{Child, Command};
    use std::time::Duration;

    use super::*;

    fn scope(directory: &Path) -> Scope {
        let marker = format!("leftovers-test-{}", std::process::id());
        Scope { marker, programs: Vec::new(), directories: vec![(directory.to_owned(), 3)], daemon: None }
    }

    fn now() -> Deadline {
        Deadline::after(Duration::ZERO)
    }

    fn of_directory(things: Vec<Thing>, directory: &Path) -> Vec<Thing> {
        let inside = |thing: &Thing| path(thing).is_some_and(|path| path.starts_with(directory));
        things.into_iter().filter(inside).collect()
    }

    fn marked_process(scope: &Scope) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "read -r line", &scope.marker]).stdin(std::process::Stdio::piped());
        command.spawn().unwrap()
    }

    #[test]
    fn a_planted_process_is_found_by_its_marker() {
        let directory = tempfile::tempdir().unwrap();
        let scope = scope(directory.path());
        let before = Snapshot::take(&scope).unwrap();
        let mut process = marked_process(&scope);
        let pid = i32::try_from(process.id()).unwrap();
        let left = settle(&before, &scope, now()).unwrap();
        assert!(
            left.iter().any(|thing| matches!(thing, Thing::Process { pid: found, .. } if *found == pid)),
            "{left:?}"
        );
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[test]
    fn what_ends_while_the_check_waits_is_no_leftover() {
        let directory = tempfile::tempdir().unwrap();
        let planted = directory.path().join("late");
        let scope = Scope { directories: vec![(directory.path().to_owned(), 1)], ..scope(Path::new("/nowhere")) };
        let before = Snapshot::take(&scope).unwrap();
        fs::create_dir(&planted).unwrap();
        let path = planted.clone();
        // Whether it ends before, while or after the watch begins, the check must see it.
        let removal = std::thread::spawn(move || fs::remove_dir(path));
        let left = settle(&before, &scope, Deadline::after(Duration::from_secs(30))).unwrap();
        assert_eq!(of_directory(left, directory.path()), []);
        removal.join().unwrap().unwrap();
    }
}
