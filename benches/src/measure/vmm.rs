//! The virtual machine monitors that are compared, and how each is started at its best.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};

/// Memory of a measured guest in MiB.
pub const GUEST_MEMORY: u64 = 128;

/// A virtual machine monitor.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Vmm {
    /// Ours.
    Dragonball,
    /// QEMU's machine for microVMs with everything off that a guest can do without.
    Microvm,
}

impl Vmm {
    /// Its name in figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dragonball => "dragonball",
            Self::Microvm => "QEMU microvm",
        }
    }

    /// The program's path.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Dragonball => "/usr/bin/dragonball",
            Self::Microvm => "/usr/bin/qemu-system-x86_64",
        }
    }

    fn command(self, kernel: &Path, initrd: &Path) -> Command {
        let mut command = Command::new(self.program());
        match self {
            Self::Dragonball => {
                command.args(["run", "--cpus", "1", "--memory", &format!("{GUEST_MEMORY}M")]);
                command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd).args(["--cmdline", COMMAND_LINE]);
            }
            Self::Microvm => {
                let machine = "microvm,accel=kvm,rtc=on,pit=off,pic=off,isa-serial=off,acpi=off,x-option-roms=off";
                command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-cpu", "host"]);
                command.args(["-smp", "1", "-m", &GUEST_MEMORY.to_string(), "-M", machine, "-bios", "qboot.rom"]);
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd).args(["-append", COMMAND_LINE]);
            }
        }
        command
    }

    /// Starts a guest that marks its `/init` and then idles.
    ///
    /// # Errors
    /// When the program is not there.
    pub fn start(self, kernel: &Path, initrd: &Path) -> Result<Guest> {
        let mut command = self.command(kernel, initrd);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().with_context(|| format!("Cannot start {}", self.program()))?;
        Ok(Guest { process })
    }
}

/// The same for all: no console, no kernel messages.
const COMMAND_LINE: &str = "quiet loglevel=0 panic=-1 reboot=t rdinit=/init";

/// A running guest; it ends when this is dropped.
#[derive(Debug)]
pub struct Guest {
    process: Child,
}

impl Guest {
    /// Process number of its monitor.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
