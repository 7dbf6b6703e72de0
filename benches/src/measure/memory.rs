//! What idle VMs cost their host.

use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::smaps::usage;
use super::trace::{Instance, Pipe, await_init, moment_filter};
use super::vmm::{GUEST_MEMORY, Guest, Vmm};
use super::{Samples, push, retry};
use crate::site::Clock;

/// How many VMs share what can be shared.
pub const CROWD: usize = 10;
/// Seconds that a guest may take to its `/init` or its agent: memory is measured by the virtual clock only.
const LIMIT: u16 = Clock::Virtual.boot_limit();
/// The vsock port on which the host awaits the agent.
pub(super) const AGENT_PORT: u32 = 1024;
/// How a guest finds its image and its agent.
pub(super) const AGENT_COMMAND_LINE: &str =
    "quiet loglevel=0 panic=-1 root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/sbin/kata-agent";

/// Lets guest memory be counted in pages that a guest touched, not in huge pages around them.
///
/// # Errors
/// When the setting cannot be written.
pub fn without_huge_pages() -> Result<()> {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    fs::write(SETTING, "never").with_context(|| format!("Cannot write {SETTING}"))
}

/// Memory of `vmm`'s processes, in KiB: samples `NAME rss` (one VM alone, guest memory left out), `NAME pss`
/// (each of [`CROWD`] VMs, likewise) and `NAME guest` (guest memory touched by kernel and `/init`).
///
/// # Errors
/// When a guest does not reach its `/init`.
pub fn measure(vmm: Vmm, kernel: &Path, initrd: &Path, rounds: usize) -> Result<Samples> {
    let mut samples = Samples::new();
    for _ in 0..rounds {
        let alone = start(vmm, kernel, initrd, 1)?;
        for guest in &alone {
            let memory = usage(guest.pid(), GUEST_MEMORY * 1024)?;
            push(&mut samples, &format!("{} rss", vmm.name()), memory.own_rss as f64);
            push(&mut samples, &format!("{} guest", vmm.name()), memory.guest as f64);
        }
    }
    for guest in start(vmm, kernel, initrd, CROWD)?.iter() {
        let memory = usage(guest.pid(), GUEST_MEMORY * 1024)?;
        push(&mut samples, &format!("{} pss", vmm.name()), memory.own_pss as f64);
    }
    Ok(samples)
}

/// Starts `count` guests, each when the one before idles.
fn start(vmm: Vmm, kernel: &Path, initrd: &Path, count: usize) -> Result<Vec<Guest>> {
    let marks = Instance::new("tatami-marks", "kvm/kvm_cpuid", &moment_filter())?;
    let mut pipe = marks.pipe()?;
    (0..count).map(|_| retry(|| boot(vmm, kernel, initrd, &mut pipe))).collect()
}

fn boot(vmm: Vmm, kernel: &Path, initrd: &Path, pipe: &mut Pipe) -> Result<Guest> {
    let guest = vmm.start(kernel, initrd)?;
    await_init(pipe, LIMIT)?;
    Ok(guest)
}

/// A VM with the guest image, its agent ready.
struct AgentGuest(Child);

impl Drop for AgentGuest {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Guest memory touched when the agent has called the host, in KiB, as sample `agent guest`.
///
/// # Errors
/// When the agent does not call.
pub fn measure_agent(kernel: &Path, image: &Path, rounds: usize) -> Result<Samples> {
    let mut samples = Samples::new();
    let dir = tempfile::tempdir().context("Cannot make a directory")?;
    for _ in 0..rounds {
        let memory = retry(|| agent_memory(kernel, image, dir.path()))?;
        push(&mut samples, "agent guest", memory as f64);
    }
    Ok(samples)
}

fn agent_memory(kernel: &Path, image: &Path, dir: &Path) -> Result<u64> {
    let socket = dir.join("vsock");
    let path = dir.join(format!("vsock_{AGENT_PORT}"));
    for stale in [&socket, &path] {
        // There is none in the first round.
        let _ = fs::remove_file(stale);
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("Cannot listen on {}", path.display()))?;
    let guest = start_agent(kernel, image, &socket)?;
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(i32::from(LIMIT) * 1000).unwrap_or(PollTimeout::MAX);
    if poll(&mut fds, limit)? == 0 {
        bail!("The agent did not call within {LIMIT} s");
    }
    let _connection = listener.accept().context("Cannot accept the agent's call")?;
    Ok(usage(guest.0.id(), GUEST_MEMORY * 1024)?.guest)
}

fn start_agent(kernel: &Path, image: &Path, socket: &Path) -> Result<AgentGuest> {
    let program = Vmm::Dragonball.program();
    let child = Command::new(program)
        .args(["run", "--cpus", "1", "--memory", &format!("{GUEST_MEMORY}M"), "--cmdline", AGENT_COMMAND_LINE])
        .arg("--kernel")
        .arg(kernel)
        .arg("--pmem")
        .arg(image)
        .arg("--vsock")
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Ok(AgentGuest(child.with_context(|| format!("Cannot start {program}"))?))
}
