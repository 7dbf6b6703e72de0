//! A machine's QEMU: its command line and its process.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::setsid;
use tool::io as io_error;

use crate::error::Error;
use crate::hardware::Hardware;
use crate::snapshot::Snapshot;
use crate::tools::Tools;

/// Commands that can run at once in a machine.
pub(crate) const PORTS: usize = 8;

/// Says that string instructions are slow, so that kernels and C libraries clear and copy memory by words: emulation does
/// the "fast" ones byte by byte, which makes clearing a page cost eight times as much as it need.
const SLOW_STRINGS: &str = ",-erms,-fsrm,-fzrm,-fsrs,-fsrc";

/// Where a machine's parts are.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// Directories with firmware.
    pub(crate) firmware: [PathBuf; 2],
    /// The uncompressed kernel.
    pub(crate) kernel: PathBuf,
    /// The initrd.
    pub(crate) initrd: PathBuf,
    /// The file that is the machine's memory.
    pub(crate) memory: PathBuf,
    /// How much memory a machine that boots afresh has, in MiB; others have what their snapshot has.
    pub(crate) fresh_memory: u32,
    /// The qcow2 disk.
    pub(crate) disk: PathBuf,
    /// The file that gets what the machine writes to its serial console.
    pub(crate) console: PathBuf,
    /// What the machine has beyond the plain one, as [`hardware::options`]; nothing for the plain one.
    pub(crate) hardware: Vec<(&'static str, String)>,
}

/// How a machine comes to life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// It boots; memory and disk files get what it writes.
    Boot,
    /// It boots; the disk file stays as it is, and memory and what it writes are its own.
    Fresh,
    /// It waits for a saved state; memory and disk files stay as they are, what it writes is its own.
    Restore,
    /// It waits for a saved state; memory and disk files get what it writes.
    Extend,
}

/// When a machine ends that nobody ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Never.
    Never,
    /// With the thread that started it, and so with its process, even when that is killed.
    WithThread,
}

/// Descriptors that QEMU gets from us.
#[derive(Debug)]
pub(crate) struct Descriptors {
    /// Listening socket for requests.
    pub(crate) qmp: OwnedFd,
    /// Listening socket of each command port.
    pub(crate) ports: Vec<OwnedFd>,
    /// The lock that says that the machine lives: held by its QEMU and nobody else.
    pub(crate) life: OwnedFd,
    /// What keeps the machine's GPU models alive.
    pub(crate) models: Vec<OwnedFd>,
}

/// The arguments of a machine's QEMU; `descriptors` gives the numbers of the sockets for requests and for each port.
pub(crate) fn arguments(snapshot: Snapshot, parts: &Parts, start: Start, qmp: RawFd, ports: &[RawFd]) -> Vec<OsString> {
    let mut line = Line::default();
    for path in &parts.firmware {
        line.add("-L", path);
    }
    add_machine(&mut line, snapshot, parts, start);
    // An IOMMU has to come before what is behind it.
    for (option, value) in &parts.hardware {
        line.add(option, value);
    }
    add_disk(&mut line, parts, start);
    line.add("-device", "virtio-serial-pci,id=commands,max_ports=16");
    for (index, fd) in ports.iter().enumerate() {
        let number = index + 1;
        line.add("-chardev", format!("socket,id=command{number},fd={fd},server=on,wait=off"));
        line.add(
            "-device",
            format!("virtserialport,bus=commands.0,nr={number},chardev=command{number},name=lab.{number}"),
        );
    }
    line.add("-chardev", with_path("file,id=console,path=", &parts.console));
    line.add("-serial", "chardev:console");
    line.add("-chardev", format!("socket,id=qmp,fd={qmp},server=on,wait=off"));
    line.add("-mon", "chardev=qmp,mode=control");
    if matches!(start, Start::Restore | Start::Extend) {
        line.add("-incoming", "defer");
    }
    line.words
}

fn add_machine(line: &mut Line, snapshot: Snapshot, parts: &Parts, start: Start) {
    line.add("-machine", "q35,memory-backend=ram");
    // Large BARs need more than the 40 address bits that a CPU has here otherwise.
    let bits = if parts.hardware.is_empty() { "" } else { ",phys-bits=46" };
    line.add("-cpu", format!("max,la57=off{SLOW_STRINGS}{bits}"));
    line.add("-smp", snapshot.cpus().to_string());
    let size = if start == Start::Fresh { parts.fresh_memory } else { snapshot.memory() };
    line.add("-m", size.to_string());
    // A restored machine's pages are its own copies of the file's.
    let share = if start == Start::Restore { "off" } else { "on" };
    if start == Start::Fresh {
        // Shared, so that models of devices reach it.
        line.add("-object", format!("memory-backend-memfd,id=ram,size={size}M,share=on"));
    } else {
        let memory = format!("memory-backend-file,id=ram,size={size}M,share={share},mem-path=");
        line.add("-object", with_path(&memory, &parts.memory));
    }
    if snapshot.counts_instructions() {
        line.add("-accel", "tcg,thread=single,tb-size=512");
        line.add("-icount", "shift=0,sleep=off");
        line.add("-rtc", "base=2026-11-01,clock=vm");
        line.add("-seed", "1");
    } else {
        line.add("-accel", "tcg,thread=multi,tb-size=512");
    }
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        line.words.push(flag.into());
    }
    line.add("-display", "none");
    line.add("-monitor", "none");
    line.add("-kernel", &parts.kernel);
    line.add("-initrd", &parts.initrd);
    let iommu = if parts.hardware.is_empty() { "" } else { Hardware::kernel_options() };
    line.add("-append", snapshot.kernel_options() + iommu);
}

fn add_disk(line: &mut Line, parts: &Parts, start: Start) {
    // What is not to be kept is written to a nameless temporary file, which ends with the machine.
    let temporary = if matches!(start, Start::Restore | Start::Fresh) { ",snapshot=on" } else { "" };
    line.add("-drive", with_path(&format!("if=none,id=disk,format=qcow2,cache=unsafe{temporary},file="), &parts.disk));
    line.add("-device", "virtio-blk-pci,drive=disk");
}

/// An option's value that ends with a path; QEMU wants commas in it doubled.
fn with_path(option: &str, path: &Path) -> OsString {
    let mut value = OsString::from(option);
    value.push(path.to_string_lossy().replace(',', ",,"));
    value
}

#[derive(Default)]
struct Line {
    words: Vec<OsString>,
}

impl Line {
    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.words.push(option.into());
        self.words.push(value.into());
    }
}

/// A machine to be started.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Where QEMU is.
    pub(crate) qemu: Tools,
    /// Which machine.
    pub(crate) snapshot: Snapshot,
    /// What it is made of.
    pub(crate) parts: Parts,
    /// How it comes to life.
    pub(crate) start: Start,
    /// When it ends.
    pub(crate) end: End,
}

impl Plan {
    /// Starts QEMU in a session of its own, with its messages in `log`.
    pub(crate) fn spawn(&self, descriptors: Descriptors, log: &Path) -> Result<Child, Error> {
        let ports: Vec<RawFd> = descriptors.ports.iter().map(AsRawFd::as_raw_fd).collect();
        let output = File::create(log).map_err(io_error("create", log))?;
        let mut command = self.qemu.command("usr/bin/qemu-system-x86_64");
        command.args(arguments(self.snapshot, &self.parts, self.start, descriptors.qmp.as_raw_fd(), &ports));
        command.stdout(output.try_clone().map_err(io_error("open", log))?).stderr(output);
        prepare_child(&mut command, descriptors, self.end);
        Ok(command.spawn().map_err(tool::start("qemu-system-x86_64"))?)
    }
}

/// Lets the child keep the descriptors under their numbers; ours are closed with the command.
fn prepare_child(command: &mut std::process::Command, descriptors: Descriptors, end: End) {
    let mut all = descriptors.ports;
    all.extend(descriptors.models);
    all.extend([descriptors.qmp, descriptors.life]);
    // SAFETY: fcntl, prctl and setsid are async-signal-safe, and the closure only reads what it owns.
    unsafe {
        command.pre_exec(move || {
            for fd in &all {
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(io::Error::from)?;
            }
            if end == End::WithThread {
                set_pdeathsig(Signal::SIGKILL)?;
            }
            setsid().map(drop).map_err(io::Error::from)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(snapshot: Snapshot, start: Start) -> String {
        line_with(snapshot, start, Vec::new())
    }

    fn line_with(snapshot: Snapshot, start: Start, hardware: Vec<(&'static str, String)>) -> String {
        let parts = Parts {
            firmware: ["/f1".into(), "/f2".into()],
            kernel: "/kernel".into(),
            initrd: "/initrd".into(),
            memory: "/memory".into(),
            fresh_memory: 6144,
            disk: "/a,b/disk".into(),
            console: "/console".into(),
            hardware,
        };
        let words = arguments(snapshot, &parts, start, 3, &[4, 5]);
        words.join(OsString::from(" ").as_os_str()).into_string().unwrap()
    }

    #[test]
    fn a_booting_machine_writes_to_its_files() {
        let line = line(Snapshot::Base, Start::Boot);
        assert!(line.contains("share=on,mem-path=/memory"), "{line}");
        assert!(line.contains("cache=unsafe,file=/a,,b/disk"), "{line}");
        assert!(!line.contains("-incoming"), "{line}");
    }

    #[test]
    fn a_restored_machine_leaves_its_files_alone() {
        let line = line(Snapshot::Base, Start::Restore);
        assert!(line.contains("share=off,mem-path=/memory"), "{line}");
        assert!(line.contains("snapshot=on"), "{line}");
        assert!(line.ends_with("-incoming defer"), "{line}");
    }

    #[test]
    fn an_extended_machine_starts_from_a_state_and_writes_to_its_files() {
        let line = line(Snapshot::Base, Start::Extend);
        assert!(line.contains("share=on,mem-path=/memory"), "{line}");
        assert!(!line.contains("snapshot=on"), "{line}");
        assert!(line.ends_with("-incoming defer"), "{line}");
    }

    #[test]
    fn a_fresh_machine_boots_with_shared_memory_and_leaves_its_files_alone() {
        let line = line(Snapshot::Base, Start::Fresh);
        assert!(line.contains("memory-backend-memfd,id=ram,size=6144M,share=on"), "{line}");
        assert!(!line.contains("/memory"), "{line}");
        assert!(line.contains("snapshot=on"), "{line}");
        assert!(!line.contains("-incoming"), "{line}");
    }

    #[test]
    fn hardware_comes_with_its_iommu_and_address_bits() {
        let line = line_with(Snapshot::Base, Start::Fresh, vec![("-device", "intel-iommu".to_owned())]);
        assert!(line.contains("phys-bits=46") && line.contains("intel_iommu=on iommu=pt"), "{line}");
        assert!(line.find("intel-iommu") < line.find("virtio-blk-pci"), "{line}");
    }

    #[test]
    fn only_the_icount_machine_counts_instructions() {
        assert!(line(Snapshot::Icount, Start::Boot).contains("-icount shift=0,sleep=off"));
        assert!(!line(Snapshot::Base, Start::Boot).contains("icount"));
    }

    #[test]
    fn each_port_has_its_socket() {
        let line = line(Snapshot::Base, Start::Boot);
        assert!(line.contains("socket,id=command1,fd=4,server=on,wait=off"), "{line}");
        assert!(line.contains("nr=2,chardev=command2,name=lab.2"), "{line}");
        assert!(line.contains("socket,id=qmp,fd=3,"), "{line}");
    }
}
