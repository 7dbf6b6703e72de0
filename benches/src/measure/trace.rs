//! The kernel's tracepoints (`Documentation/trace/events.rst`): when a program was executed, and when a guest said
//! that its `/init` runs.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd as _;

use crate::guest::{MARK_LEAF, STAMP_SHIFT};

const TRACEFS: &str = "/sys/kernel/tracing";

/// A mark that a guest made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mark {
    /// When the host saw it: seconds of the monotonic clock.
    pub at: f64,
    /// The guest's time stamp counter then, in cycles since its first vCPU was created.
    pub guest_cycles: u64,
}

/// A ring buffer of our own with one tracepoint in it.
#[derive(Debug)]
pub struct Instance {
    path: PathBuf,
}

impl Instance {
    /// Makes an instance with event `event` (`system/name`) filtered by `filter`.
    ///
    /// # Errors
    /// When tracefs cannot be mounted, or this kernel lacks the event.
    pub fn new(name: &str, event: &str, filter: &str) -> Result<Self> {
        mount()?;
        let path = Path::new(TRACEFS).join("instances").join(name);
        // One of a run that was killed: its events are not ours.
        let _ = fs::remove_dir(&path);
        fs::create_dir(&path).with_context(|| format!("Cannot create {}", path.display()))?;
        let instance = Self { path };
        instance.set("trace_clock", "mono")?;
        instance.set(&format!("events/{event}/filter"), filter)?;
        instance.set(&format!("events/{event}/enable"), "1")?;
        Ok(instance)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("Cannot write {value:?} to {}", path.display()))
    }

    /// The events so far, one line each; they are forgotten.
    ///
    /// # Errors
    /// When tracefs cannot be read.
    pub fn take(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.path.join("trace")).context("Cannot read the trace")?;
        self.set("trace", "")?;
        Ok(text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect())
    }

    /// Opens the stream of events from now on.
    ///
    /// # Errors
    /// When tracefs cannot be read.
    pub fn pipe(&self) -> Result<Pipe> {
        let file = File::open(self.path.join("trace_pipe")).context("Cannot open the trace pipe")?;
        Ok(Pipe { reader: BufReader::new(file) })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Nothing can be done about a failure; the next run removes it.
        let _ = fs::remove_dir(&self.path);
    }
}

/// Events as they come.
#[derive(Debug)]
pub struct Pipe {
    reader: BufReader<File>,
}

impl Pipe {
    /// The next event.
    ///
    /// # Errors
    /// When none comes within `seconds`.
    pub fn next(&mut self, seconds: u16) -> Result<String> {
        if self.reader.buffer().is_empty() {
            let mut fds = [PollFd::new(self.reader.get_ref().as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(i32::from(seconds) * 1000).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, limit)? == 0 {
                bail!("No guest reached its /init within {seconds} s");
            }
        }
        let mut line = String::new();
        self.reader.read_line(&mut line).context("Cannot read the trace pipe")?;
        Ok(line)
    }
}

fn mount() -> Result<()> {
    if Path::new(TRACEFS).join("instances").exists() {
        return Ok(());
    }
    let status = Command::new("mount").args(["-t", "tracefs", "none", TRACEFS]).status().context("Cannot run mount")?;
    if status.success() { Ok(()) } else { bail!("Cannot mount tracefs at {TRACEFS}; it needs root") }
}

/// The filter that lets only [`crate::guest`]'s marks through.
#[must_use]
pub fn mark_filter() -> String {
    format!("function=={MARK_LEAF}")
}

/// The time of an event line such as `  qemu-123 [000] d..1. 57.123456: kvm_cpuid: func 5658 …`, in seconds.
#[must_use]
pub fn time(line: &str) -> Option<f64> {
    line.split_whitespace().find_map(|word| word.strip_suffix(':')?.parse().ok())
}

/// The mark in a line of `kvm_cpuid`.
#[must_use]
pub fn mark(line: &str) -> Option<Mark> {
    let mut words = line.split_whitespace().skip_while(|word| *word != "kvm_cpuid:").skip(1);
    let function = (words.next()? == "func").then(|| words.next()).flatten()?;
    let index = (words.next()? == "idx").then(|| words.next()).flatten()?;
    let stamp = u64::from_str_radix(index, 16).ok()?;
    (u32::from_str_radix(function, 16).ok()? == MARK_LEAF)
        .then(|| Some(Mark { at: time(line)?, guest_cycles: stamp << STAMP_SHIFT }))?
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "            vcpu0-812     [000] ..... 1234.500000: kvm_cpuid: func 5658 idx 3e8 rax 0 rbx 0 rcx 0 rdx 0, cpuid entry not found";

    #[test]
    fn a_mark_is_read_with_both_clocks() {
        assert_eq!(mark(LINE), Some(Mark { at: 1234.5, guest_cycles: 1000 << 10 }));
    }

    #[test]
    fn other_leaves_and_other_events_are_no_marks() {
        assert_eq!(mark(&LINE.replace("5658", "1")), None);
        assert_eq!(mark("  init-1  [000] ..... 5.0: sched_process_exec: filename=/bin/true pid=2 old_pid=2"), None);
        assert_eq!(time("  init-1  [000] ..... 5.5: sched_process_exec: filename=/bin/true"), Some(5.5));
    }
}
