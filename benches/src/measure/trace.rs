//! The kernel's tracepoints (`Documentation/trace/events.rst`): when a program was executed, and when a guest said
//! that its `/init` runs.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd as _;

use crate::guest::MARK_LEAF;

const TRACEFS: &str = "/sys/kernel/tracing";

/// What a guest's CPUID says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment {
    /// The kernel runs its first C code: its PVH entry asks for the hypervisor's name before anything else.
    KernelEntry,
    /// `/init` runs ([`crate::guest`]).
    Init,
}

/// The first leaf with a hypervisor's name (Linux: `arch/x86/include/asm/cpuid.h`).
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

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
        // A reader wakes at the first event, not when half of the buffer is full.
        instance.set("buffer_percent", "0")?;
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

/// The filter that lets only the moments through.
#[must_use]
pub fn moment_filter() -> String {
    format!("function=={MARK_LEAF} || function=={HYPERVISOR_LEAF}")
}

/// Reads events until a guest's `/init` runs; answers the times of the first kernel entry and of init, in seconds.
///
/// # Errors
/// When no guest gets there within `seconds`, or none entered its kernel before.
pub fn await_init(pipe: &mut Pipe, seconds: u16) -> Result<(f64, f64)> {
    let mut entry = None;
    loop {
        let line = pipe.next(seconds)?;
        let at = time(&line);
        match moment(&line) {
            Some(Moment::KernelEntry) => entry = entry.or(at),
            Some(Moment::Init) => return entry.zip(at).context("A guest reached /init without entering a kernel"),
            None => {}
        }
    }
}

/// The time of an event line such as `  qemu-123 [000] d..1. 57.123456: kvm_cpuid: func 5658 …`, in seconds.
#[must_use]
pub fn time(line: &str) -> Option<f64> {
    line.split_whitespace().find_map(|word| word.strip_suffix(':')?.parse().ok())
}

/// The moment in a line of `kvm_cpuid`.
#[must_use]
pub fn moment(line: &str) -> Option<Moment> {
    let mut words = line.split_whitespace().skip_while(|word| *word != "kvm_cpuid:").skip(1);
    let function = (words.next()? == "func").then(|| words.next()).flatten()?;
    match u32::from_str_radix(function, 16).ok()? {
        MARK_LEAF => Some(Moment::Init),
        HYPERVISOR_LEAF => Some(Moment::KernelEntry),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "            vcpu0-812     [000] ..... 1234.500000: kvm_cpuid: func 5658 idx 3e8 rax 0 rbx 0 rcx 0 rdx 0, cpuid entry not found";

    #[test]
    fn both_moments_are_read() {
        assert_eq!((moment(LINE), time(LINE)), (Some(Moment::Init), Some(1234.5)));
        assert_eq!(moment(&LINE.replace("5658", "40000000")), Some(Moment::KernelEntry));
    }

    #[test]
    fn other_leaves_and_other_events_are_no_moments() {
        assert_eq!(moment(&LINE.replace("5658", "1")), None);
        assert_eq!(moment("  init-1  [000] ..... 5.0: sched_process_exec: filename=/bin/true pid=2 old_pid=2"), None);
        assert_eq!(time("  init-1  [000] ..... 5.5: sched_process_exec: filename=/bin/true"), Some(5.5));
    }
}
