//! What an idle VM does to its host: how often the threads of its process get to run.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::machine::Process;
use super::memory::{AGENT_COMMAND_LINE, AGENT_PORT};
use super::vmm::{GUEST_MEMORY, Vmm};
use super::{Samples, push, retry};
use crate::site::Clock;

/// VMs that idle side by side.
const CROWD: usize = 5;
/// Seconds for a guest to come to rest.
const SETTLING: u16 = 20;
/// Seconds that it is watched.
const WATCHED: u16 = 30;
/// Seconds that a guest may take to its agent.
const LIMIT: u16 = Clock::Wall.boot_limit();

/// Starts VMs with what a pod has (image, vsock, shared directory, network card), lets them come to rest and counts
/// how often their threads were switched to in [`WATCHED`] seconds, per second: samples `vmm` (all threads but the
/// vCPUs) and `vcpu`.
///
/// # Errors
/// When a guest's agent does not call, or a VM ends.
pub fn measure(kernel: &Path, image: &Path) -> Result<Samples> {
    let guests: Vec<Guest> =
        (0..CROWD).map(|number| retry(|| Guest::start(kernel, image, number))).collect::<Result<_>>()?;
    stay(&guests, SETTLING)?;
    let before = guests.iter().map(Guest::switches).collect::<Result<Vec<_>>>()?;
    stay(&guests, WATCHED)?;
    let mut samples = Samples::new();
    for (guest, before) in guests.iter().zip(before) {
        let after = guest.switches()?;
        let rate = |before: u64, after: u64| after.saturating_sub(before) as f64 / f64::from(WATCHED);
        push(&mut samples, "vmm", rate(before.vmm, after.vmm));
        push(&mut samples, "vcpu", rate(before.vcpu, after.vcpu));
    }
    Ok(samples)
}

/// Lets `seconds` pass, in which every VM lives on: the end of one closes its connection, which poll always tells.
fn stay(guests: &[Guest], seconds: u16) -> Result<()> {
    let mut fds: Vec<PollFd<'_>> =
        guests.iter().map(|guest| PollFd::new(guest.agent.as_fd(), PollFlags::empty())).collect();
    let limit = PollTimeout::try_from(i32::from(seconds) * 1000).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, limit)? {
        0 => Ok(()),
        ended => bail!("{ended} of {} idle VMs ended", guests.len()),
    }
}

/// How often a process's threads were switched to since they began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Switches {
    vmm: u64,
    vcpu: u64,
}

/// An idle VM whose agent has called.
struct Guest {
    process: Process,
    /// Ends with the VM.
    agent: UnixStream,
    _dir: tempfile::TempDir,
}

impl Guest {
    fn start(kernel: &Path, image: &Path, number: usize) -> Result<Self> {
        let dir = tempfile::tempdir().context("Cannot make a directory")?;
        let socket = dir.path().join(format!("vsock_{AGENT_PORT}"));
        let listener = UnixListener::bind(&socket).context("Cannot listen for the agent's call")?;
        let process = Process(command(kernel, image, dir.path(), number).spawn().context("Cannot start dragonball")?);
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(i32::from(LIMIT) * 1000).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, limit)? == 0 {
            bail!("The agent did not call within {LIMIT} s");
        }
        let (agent, _) = listener.accept().context("Cannot accept the agent's call")?;
        Ok(Self { process, agent, _dir: dir })
    }

    fn switches(&self) -> Result<Switches> {
        let mut switches = Switches::default();
        for task in fs::read_dir(format!("/proc/{}/task", self.process.0.id())).context("The VM is gone")? {
            let task = task.context("The VM is gone")?.path();
            let name = fs::read_to_string(task.join("comm")).context("A thread of the VM is gone")?;
            let status = fs::read_to_string(task.join("status")).context("A thread of the VM is gone")?;
            let count = if name.starts_with("vcpu") { &mut switches.vcpu } else { &mut switches.vmm };
            *count += parse(&status);
        }
        Ok(switches)
    }
}

/// dragonball with what a pod has.
fn command(kernel: &Path, image: &Path, dir: &Path, number: usize) -> Command {
    let mut command = Command::new(Vmm::Dragonball.program());
    command.args(["run", "--cpus", "1", "--memory", &format!("{GUEST_MEMORY}M"), "--cmdline", AGENT_COMMAND_LINE]);
    command.arg("--kernel").arg(kernel).args(["--pmem", &format!("{},ro", image.display())]);
    command.arg("--vsock").arg(dir.join("vsock")).args(["--fs", &format!("shared={}", dir.display())]);
    command.args(["--net", &format!("tap=idle{number}")]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Both kinds of switches in a thread's `/proc/PID/task/TID/status` (proc(5)).
fn parse(status: &str) -> u64 {
    let value = |line: &str| line.split_once("_ctxt_switches:")?.1.trim().parse::<u64>().ok();
    status.lines().filter_map(value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn voluntary_and_other_switches_are_added() {
        assert_eq!(parse("Name:\tvmm\nvoluntary_ctxt_switches:\t40\nnonvoluntary_ctxt_switches:\t2\n"), 42);
        assert_eq!(parse("Name:\tvmm\n"), 0);
    }
}
