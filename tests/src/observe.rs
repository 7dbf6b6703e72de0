//! Moments in the life of a container, seen from outside: events of containerd, lines of a sandbox's
//! journal, processes of a shim.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ChildStdout;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::poll::PollFlags;

use crate::context::Context;
use crate::ctr::Ctr;
use crate::event::{Deadline, Watch, readable, wait};
use crate::pidfd::Pidfd;
use crate::process::Running;

/// Where the runtime keeps the state of its sandboxes.
const RUN_DIR: &str = "/run/kata";

/// Reads `output` until `wanted` stands in it; answers everything read.
///
/// # Errors
/// With what was read, at the deadline or at the end of the output.
pub fn read_until(output: &mut ChildStdout, wanted: &str, deadline: Deadline) -> Result<String> {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        readable(output.as_fd(), wanted, deadline).with_context(|| format!("Seen: {seen:?}"))?;
        let mut bytes = [0; 4096];
        let count = output.read(&mut bytes)?;
        if count == 0 {
            bail!("The output ended without {wanted:?}: {seen:?}");
        }
        seen += &String::from_utf8_lossy(&bytes[..count]);
    }
    Ok(seen)
}

/// The stream of containerd's events.
#[derive(Debug)]
pub struct Events {
    // Killed when the stream is dropped.
    _process: Running,
    output: ChildStdout,
    /// What was read after the last line that was taken.
    unread: String,
}

impl Events {
    /// Subscribes; when this returns, no later event is missed.
    ///
    /// # Errors
    /// When containerd does not serve events.
    pub fn subscribe(ctr: &Ctr) -> Result<Self> {
        let mut process = Running::start_with_pipes(&mut ctr.command(&["events"]))?;
        let output = process.take_stdout()?;
        let mut events = Self { _process: process, output, unread: String::new() };
        // ctr does not say when it has subscribed: cause events until one comes through.
        let deadline = ctr.deadline();
        for attempt in 0.. {
            let mark = format!("attempt-{attempt}");
            ctr.ok(&["namespace", "label", &ctr.namespace, &format!("subscribed={mark}")])?;
            let soon = Deadline::after(Duration::from_millis(500).min(deadline.left()));
            match events.of("/namespaces/update", &mark, soon) {
                Ok(()) => break,
                Err(error) if deadline.passed() => return Err(error),
                Err(_) => {}
            }
        }
        Ok(events)
    }

    /// Waits for an event of `topic` about `subject`.
    ///
    /// # Errors
    /// At the deadline, or when the stream ends.
    pub fn of(&mut self, topic: &str, subject: &str, deadline: Deadline) -> Result<()> {
        loop {
            while let Some((line, rest)) = self.unread.split_once('\n') {
                let found = line.contains(topic) && line.contains(subject);
                self.unread = rest.to_owned();
                if found {
                    return Ok(());
                }
            }
            readable(self.output.as_fd(), &format!("the event {topic} of {subject}"), deadline)?;
            let mut bytes = [0; 4096];
            let count = self.output.read(&mut bytes)?;
            if count == 0 {
                bail!("containerd's events ended");
            }
            self.unread += &String::from_utf8_lossy(&bytes[..count]);
        }
    }
}

/// The undo journal of one sandbox: one line for each side effect on the host, written before it happens.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    watch: Watch,
}

impl Journal {
    /// The journal of a sandbox that may not exist yet.
    ///
    /// # Errors
    /// When the kernel refuses to watch files.
    pub fn of(ctr: &Ctr, id: &str) -> Result<Self> {
        let path = Path::new(RUN_DIR).join(&ctr.namespace).join(id).join("journal");
        Ok(Self { path, watch: Watch::new()? })
    }

    /// Lines that are there now.
    #[must_use]
    pub fn lines(&self) -> usize {
        fs::read(&self.path).map_or(0, |content| content.iter().filter(|byte| **byte == b'\n').count())
    }

    /// Waits until there are `count` lines; `false` when `other` ends before.
    ///
    /// # Errors
    /// At the deadline.
    pub fn until(&self, count: usize, other: &Pidfd, deadline: Deadline) -> Result<bool> {
        self.until_so(|journal| journal.lines() >= count, other, deadline)
    }

    /// Waits until the journal was there and is gone; `false` when `other` ends before.
    ///
    /// # Errors
    /// At the deadline.
    pub fn until_gone(&self, other: &Pidfd, deadline: Deadline) -> Result<bool> {
        self.until_so(|journal| !journal.path.exists(), other, deadline)
    }

    fn until_so(&self, so: impl Fn(&Self) -> bool, other: &Pidfd, deadline: Deadline) -> Result<bool> {
        loop {
            self.watch.drain();
            for path in self.path.ancestors().take_while(|path| *path != Path::new("/")) {
                self.watch.add(path)?;
            }
            if so(self) {
                return Ok(true);
            }
            let fds = [(self.watch.as_fd(), PollFlags::POLLIN), (other.as_fd(), PollFlags::POLLIN)];
            match wait(&fds, deadline)? {
                None => bail!("{} has {} lines at the deadline", self.path.display(), self.lines()),
                // What happened before its end still counts.
                Some(events) if events[1] => return Ok(so(self)),
                Some(_) => {}
            }
        }
    }
}

/// The process of the shim that serves the container `id` (not one of its short-lived commands).
///
/// # Errors
/// When there is none.
pub fn pod_process(context: &Context, id: &str) -> Result<Pidfd> {
    let shim = context.shim.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let serves = |pid: i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments: Vec<String> =
            command.split(|byte| *byte == 0).map(|argument| String::from_utf8_lossy(argument).into_owned()).collect();
        let is_shim = arguments.first()?.rsplit('/').next()? == shim;
        let is_about_it = arguments.windows(2).any(|pair| pair[0].trim_start_matches('-') == "id" && pair[1] == id);
        let is_command = arguments.iter().any(|argument| argument == "start" || argument == "delete");
        (is_shim && is_about_it && !is_command).then_some(())
    };
    for entry in fs::read_dir("/proc").context("Cannot read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if serves(pid).is_none() {
            continue;
        }
        // The number may have changed hands before the descriptor was opened: look again through it.
        if let Ok(process) = Pidfd::open(pid)
            && serves(pid).is_some()
        {
            return Ok(process);
        }
    }
    bail!("No process of {shim} serves {id}")
}
