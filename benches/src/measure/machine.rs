//! Guests with devices: how each monitor is started with a disk or a network card at its best, and what the guest's
//! tools said.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Memory of these guests in MiB.
const MEMORY: u64 = 256;
/// Length of the disk that takes the guest's answer, and so the longest answer.
const ANSWER_SIZE: u64 = 1 << 20;

/// The machines that are compared.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Machine {
    /// Ours.
    Dragonball,
    /// QEMU's usual machine for virtio-pci devices.
    Q35,
}

impl Machine {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Dragonball, Self::Q35];

    /// Its name in figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dragonball => "dragonball",
            Self::Q35 => "QEMU q35",
        }
    }

    /// The program, and its option for the kernel command line.
    fn command(self, parts: Parts<'_>, job: Job<'_>, answer: &Path) -> (Command, &'static str) {
        match self {
            Self::Dragonball => (dragonball(parts, job, answer), "--cmdline"),
            Self::Q35 => (qemu(parts, job, answer), "-append"),
        }
    }
}

/// What every guest is made of.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The disk that it starts from.
    pub tools: &'a Path,
    /// Seconds that it may take to its end.
    pub limit: u16,
}

/// A disk or a network card, and what the guest does with it.
#[derive(Clone, Copy, Debug)]
pub enum Job<'a> {
    /// fio on this file.
    Block(&'a Path),
    /// ping and iperf3 over this tap interface, with these words for the guest.
    Net {
        /// The interface.
        tap: &'a str,
        /// Whether the host's kernel moves the packets.
        vhost: bool,
        /// `guest=`, `host=`, `pings=` and `seconds=`.
        words: &'a str,
    },
}

impl Job<'_> {
    /// More words for the kernel command line: the guest's `/init` gets them as its environment.
    fn words(self) -> String {
        match self {
            Self::Block(_) => "job=block answer=/dev/vdc".to_owned(),
            Self::Net { words, .. } => format!("job=net answer=/dev/vdb {words}"),
        }
    }
}

/// Starts a guest in `machine`, waits for its end and answers what its tools said.
///
/// # Errors
/// When it does not end within the limit, or says nothing.
pub fn run(machine: Machine, parts: Parts<'_>, job: Job<'_>) -> Result<String> {
    let dir = tempfile::tempdir().context("Cannot make a directory")?;
    let answer = dir.path().join("answer");
    File::create(&answer).and_then(|file| file.set_len(ANSWER_SIZE)).context("Cannot make the answer's disk")?;
    let (mut command, option) = machine.command(parts, job, &answer);
    command.arg(option).arg(format!("{COMMAND_LINE} {}", job.words()));
    // Its end shows by the end of its output.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let child = command.spawn().with_context(|| format!("Cannot start {}", machine.name()))?;
    Process(child).await_end(parts.limit)?;
    let text = fs::read(&answer).context("Cannot read the answer")?;
    let text = String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned();
    if text.is_empty() { bail!("The guest of {} ended without an answer", machine.name()) } else { Ok(text) }
}

const COMMAND_LINE: &str = "quiet loglevel=0 panic=-1 reboot=t root=/dev/vda rootfstype=erofs ro init=/init";

fn dragonball(parts: Parts<'_>, job: Job<'_>, answer: &Path) -> Command {
    let mut command = Command::new("/usr/bin/dragonball");
    command.args(["run", "--cpus", "1", "--memory", &format!("{MEMORY}M"), "--kernel"]).arg(parts.kernel);
    command.args(["--disk", &format!("{},ro", parts.tools.display())]);
    match job {
        Job::Block(file) => {
            command.arg("--disk").arg(file);
        }
        Job::Net { tap, vhost, .. } => {
            let vhost = if vhost { "on" } else { "off" };
            command.args(["--net", &format!("tap={tap},vhost={vhost}")]);
        }
    }
    command.arg("--disk").arg(answer);
    command
}

/// QEMU's usual machine for virtio-pci devices; disks with a thread of their own and io_uring.
fn qemu(parts: Parts<'_>, job: Job<'_>, answer: &Path) -> Command {
    let mut command = Command::new("/usr/bin/qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-cpu", "host", "-smp", "1"]);
    command.args(["-M", "q35,accel=kvm", "-m", &MEMORY.to_string(), "-kernel"]).arg(parts.kernel);
    command.args(["-object", "iothread,id=disks"]);
    let mut disk = |name: &str, file: &Path, rest: &str| {
        let file = file.display();
        command.args(["-blockdev", &format!("driver=file,node-name={name},filename={file},aio=io_uring{rest}")]);
        command.args(["-device", &format!("virtio-blk-pci,drive={name},iothread=disks")]);
    };
    disk("tools", parts.tools, ",read-only=on");
    if let Job::Block(file) = job {
        disk("data", file, "");
    }
    disk("answer", answer, "");
    if let Job::Net { tap, vhost, .. } = job {
        let vhost = if vhost { "on" } else { "off" };
        command.args(["-netdev", &format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost={vhost}")]);
        command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
    }
    command
}

/// A process that ends with this value at the latest.
#[derive(Debug)]
pub struct Process(pub Child);

impl Process {
    /// Waits until the process has ended, told by the end of its piped output.
    ///
    /// # Errors
    /// When it has not within `seconds`.
    pub fn await_end(mut self, seconds: u16) -> Result<()> {
        let mut output = self.0.stdout.take().context("The process has no pipe")?;
        let limit = PollTimeout::try_from(i32::from(seconds) * 1000).unwrap_or(PollTimeout::MAX);
        let mut part = [0; 4096];
        loop {
            let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, limit)? == 0 {
                bail!("The guest did not end within {seconds} s");
            }
            if output.read(&mut part).context("Cannot read a monitor's output")? == 0 {
                return Ok(());
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
