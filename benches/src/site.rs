//! The lab machine that everything is measured in.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use lab::{Device, Hardware, Input, Kernel, Machine, Setup, Snapshot};

use crate::measure::Samples;

/// Longest that one measurement may take, in the host's time.
const LIMIT: Duration = Duration::from_secs(3600);
/// Video memory of the GPU in bytes, and memory of the machine with it in MiB: it has room for a guest of 2 GiB.
const GPU_MEMORY: u64 = 8 << 30;
const GPU_MACHINE_MEMORY: u32 = 5120;
/// Where this program lies in the lab machine.
const PROGRAM: &str = "/usr/local/bin/tatami-benches";
/// Where the inputs lie in the lab machine.
const INPUTS: &str = "/var/lib/tatami-bench";

/// What a measurement's time is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Clock {
    /// One nanosecond for each instruction: repeats to a few percent whatever else the host does
    Virtual,
    /// The host's clock: ten to twenty times longer than on hardware, and noisy
    Wall,
}

impl Clock {
    /// Its name in figures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Virtual => "virtual time",
            Self::Wall => "wall time",
        }
    }

    /// Seconds in which every guest that boots at all has booted: a virtual second lasts a minute where a guest spins.
    #[must_use]
    pub const fn boot_limit(self) -> u16 {
        match self {
            Self::Virtual => 2,
            Self::Wall => 60,
        }
    }

    fn snapshot(self) -> Snapshot {
        match self {
            Self::Virtual => Snapshot::Icount,
            Self::Wall => Snapshot::Base,
        }
    }
}

/// The lab's own program in its machines, with the command under which virtualization is mended.
const MENDED: [&str; 2] = ["/lab/lab-guest", "mended"];

/// A lab machine with the stack installed; it ends with this value.
#[derive(Debug)]
pub struct Site {
    machine: Machine,
    mended: bool,
}

impl Site {
    /// Restores a lab machine and installs `dist` (laid out as below `/`) in it.
    ///
    /// # Errors
    /// When the machine does not start.
    pub fn new(clock: Clock, dist: &Path) -> Result<Self> {
        Self::bare(clock)?.install(dist)
    }

    /// Boots a lab machine with this kernel and a GPU behind an IOMMU at [`Self::gpu`] and installs `dist` in it.
    ///
    /// # Errors
    /// When the machine does not start.
    pub fn with_gpu(kernel: Kernel, dist: &Path) -> Result<Self> {
        let hardware = Hardware::new().kernel(kernel).device(Device::Gpu(GPU_MEMORY)).memory(GPU_MACHINE_MEMORY);
        let name = format!("bench-gpu-{}", std::process::id());
        Self::with_program(Machine::boot(&hardware, Snapshot::Base, &Setup::new(), &name)?)?.install(dist)
    }

    /// Where the GPU is on the machine's PCI bus.
    #[must_use]
    pub fn gpu() -> String {
        Hardware::address(0)
    }

    /// Restores a lab machine without the stack, to measure peers alone.
    ///
    /// # Errors
    /// When the machine does not start.
    pub fn bare(clock: Clock) -> Result<Self> {
        let snapshot = clock.snapshot();
        let machine = Machine::restore(snapshot, &format!("bench-{}-{}", snapshot.name(), std::process::id()))?;
        Self::with_program(machine)
    }

    /// The same with virtualization mended during each measurement: for guests that would meet the emulator's fault. It
    /// costs each entry of a guest a little, whoever's it is.
    #[must_use]
    pub fn mended(self) -> Self {
        Self { mended: true, ..self }
    }

    fn install(self, dist: &Path) -> Result<Self> {
        self.machine
            .push(dist, "/")
            .with_context(|| format!("Cannot install {} in the lab machine", dist.display()))?;
        Ok(self)
    }

    fn with_program(machine: Machine) -> Result<Self> {
        machine.push(&std::env::current_exe().context("This program has no path")?, PROGRAM)?;
        Ok(Self { machine, mended: false })
    }

    /// Copies a file into the machine as `name` and answers its path there.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn provide(&self, file: &Path, name: &str) -> Result<String> {
        let target = format!("{INPUTS}/{name}");
        self.machine.push(file, &target).with_context(|| format!("Cannot copy {}", file.display()))?;
        Ok(target)
    }

    /// Runs `measure ARGUMENTS` of this very program in the machine.
    ///
    /// # Errors
    /// When it fails, or answers no samples.
    pub fn measure(&self, arguments: &[&str]) -> Result<Samples> {
        let words: &[&str] = if self.mended { &MENDED } else { &[] };
        let mut words = words.iter().chain(&[PROGRAM, "measure"]).chain(arguments).copied();
        let command = lab::Command::new(words.next().unwrap_or(PROGRAM)).args(words).limit(LIMIT);
        let output = self.machine.run(&command, Input::Empty)?.check()?;
        serde_json::from_slice(&output.stdout).context("The measurement answered no samples")
    }
}
