//! `run-suites`: finds a machine with hardware virtualization (this host or the lab) and runs the suites or the
//! demonstration on it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use lab::{Device, Event, Hardware, Input, Machine, Setup, Snapshot, Status};
use tests::debian_kernel::DebianKernel;
use tests::docker_programs;
use tests::second_chance::SecondChances;

/// Runs the end-to-end suites or the demonstration where virtual machines can run.
///
/// With hardware virtualization that is this host, in a containerd of its own; otherwise it is the lab, a nested
/// machine that is made on the first use.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Runs the suites, in the lab once for each version of containerd.
    Test {
        #[command(flatten)]
        parts: Parts,
        /// Run only the cases whose names contain this.
        #[arg(long, value_name = "TEXT")]
        filter: Option<String>,
        /// Only with this containerd of the lab: base (1.7) or containerd-2.1.
        #[arg(long, value_name = "SNAPSHOT")]
        snapshot: Option<Snapshot>,
        /// Run the cases of pods, too.
        #[arg(long)]
        pods: bool,
        /// With the older containerd, leave out what the newer one shows as well.
        #[arg(long, conflicts_with = "snapshot")]
        brief: bool,
        /// Run the long cases, too, those without an end of their own for so many minutes.
        #[arg(long, value_name = "MINUTES", requires = "pods")]
        soak: Option<u32>,
        /// Run the cases of docker, too, with the newest of Debian's.
        #[arg(long)]
        docker: bool,
        #[command(flatten)]
        passed: Passed,
    },
    /// Runs a test program by itself in the lab: the small guests, unless they ran on this host's hardware.
    Program(Alone),
    /// Runs real images in VMs and shows their output and a timeline.
    Demo {
        #[command(flatten)]
        parts: Parts,
    },
}

/// A test program by itself.
#[derive(Clone, Debug, Args)]
struct Alone {
    /// The program; it needs nothing but the C library.
    program: PathBuf,
    /// Where to write the log.
    #[arg(long, value_name = "DIRECTORY")]
    report: PathBuf,
    /// A guest kernel for the program's Linux guests, whose shell is this machine's busybox.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Debian's newest cloud kernel for those guests, with its modules.
    #[arg(long, conflicts_with_all = ["kernel", "module"])]
    debian_kernel: bool,
    #[command(flatten)]
    passed: Passed,
    /// Run it in a machine with this much memory, in MiB.
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// A kernel module for the guests, loaded in the order given. Can be repeated.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    module: Vec<PathBuf>,
    /// How often devices, vCPUs and memory come and go.
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
    /// Run only the tests whose names contain this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

/// Where everything is that the machine needs.
#[derive(Clone, Debug, Args)]
struct Parts {
    /// The stack as `make dist` stages it.
    #[arg(long, value_name = "DIRECTORY")]
    dist: PathBuf,
    /// The OCI archives that `make images` makes.
    #[arg(long, value_name = "DIRECTORY")]
    images: PathBuf,
    /// The directory with the programs `suites`, `demo` and `storage-check`.
    #[arg(long, value_name = "DIRECTORY")]
    bin: PathBuf,
    /// Where to write the logs and reports.
    #[arg(long, value_name = "DIRECTORY")]
    report: PathBuf,
    /// Use the lab even if this host has hardware virtualization.
    #[arg(long)]
    lab: bool,
}

/// Devices for the guests of a machine of the lab.
#[derive(Clone, Debug, Default, Args)]
struct Passed {
    /// Run it in a machine with this device behind an IOMMU, for its guests (see `lab up --help`). Can be repeated.
    #[arg(long, value_name = "DEVICE", requires = "passthrough")]
    device: Vec<Device>,
    /// The static program by which guests use devices that are passed to them.
    #[arg(long, value_name = "FILE")]
    passthrough: Option<PathBuf>,
    /// The kernel of that machine: debian (it gives devices by groups) or iommufd (by iommufd).
    #[arg(long, value_name = "KERNEL", requires = "device", default_value = "debian")]
    machine_kernel: lab::Kernel,
    /// A directory with docker's programs.
    #[arg(skip)]
    docker: Option<PathBuf>,
}

impl Passed {
    /// A machine from the snapshot; one with devices or with another memory (in MiB) is booted.
    fn machine(&self, snapshot: Snapshot, memory: Option<u32>, name: &str) -> Result<Machine> {
        if self.device.is_empty() && memory.is_none() {
            return Ok(Machine::restore(snapshot, name)?);
        }
        let empty = Hardware::new().kernel(self.machine_kernel);
        let hardware = self.device.iter().fold(empty, |hardware, device| hardware.device(*device));
        let hardware = memory.into_iter().fold(hardware, Hardware::memory);
        Ok(Machine::boot(&hardware, snapshot, &Setup::new(), name)?)
    }

    /// Where the devices are in that machine.
    fn addresses(&self) -> Vec<String> {
        (0..self.device.len()).map(Hardware::address).collect()
    }
}

/// Where the program by which guests use devices is in a machine.
const PASSTHROUGH_PROGRAM: &str = "/root/bin/passthrough";

/// Where docker's programs are in a machine.
const DOCKER_PROGRAMS: &str = "/opt/docker";

/// Deadlines in the lab, where every CPU is emulated, are this many times those of metal.
const LAB_SLOWNESS: &str = "10";

/// A program to run, and where in the lab.
struct Job {
    program: &'static str,
    arguments: Vec<String>,
    /// Machines, each with what the program is told there only.
    machines: Vec<(Snapshot, Option<&'static str>)>,
    passed: Passed,
}

fn main() -> Result<ExitCode> {
    let (parts, job) = match Arguments::parse().action {
        Action::Program(alone) => return alone.run(),
        Action::Test { parts, filter, snapshot, pods, brief, soak, docker, passed } => {
            let docker = docker.then(|| docker_programs::newest(&cache::Cache::open()?)).transpose()?;
            let passed = Passed { docker, ..passed };
            let older = brief.then_some("--containerd-alone");
            let both = vec![(Snapshot::Base, older), (Snapshot::Containerd21, None)];
            let machines = snapshot.map_or(both, |one| vec![(one, None)]);
            let pods = pods.then(|| "--pods".to_owned());
            let soak = soak.map(|minutes| format!("--soak={minutes}"));
            let arguments = [pods, soak, filter].into_iter().flatten().collect();
            (parts, Job { program: "suites", arguments, machines, passed })
        }
        Action::Demo { parts } => {
            let (machines, passed) = (vec![(Snapshot::Base, None)], Passed::default());
            (parts, Job { program: "demo", arguments: Vec::new(), machines, passed })
        }
    };
    fs::create_dir_all(&parts.report).with_context(|| format!("Cannot create {}", parts.report.display()))?;
    let probe = lab::probe::probe();
    println!("{probe}");
    if probe.hardware && !parts.lab && job.passed.device.is_empty() {
        return on_this_host(&parts, job.program, &job.arguments, job.passed.docker.as_deref());
    }
    let mut failed = Vec::new();
    for (snapshot, more) in &job.machines {
        let log = job.log(&parts, *snapshot);
        File::create(&log).with_context(|| format!("Cannot write {}", log.display()))?;
        if !again_if_the_machine_ended(|| in_the_lab(&parts, &job, *snapshot, *more, &log))? {
            failed.push(snapshot.name());
        }
    }
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{} failed on {}; see {}", job.program, failed.join(" and "), parts.report.display());
    Ok(ExitCode::FAILURE)
}

fn on_this_host(parts: &Parts, program: &str, arguments: &[String], docker: Option<&Path>) -> Result<ExitCode> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let containerd = std::env::split_paths(&path).map(|directory| directory.join("containerd")).find(|it| it.is_file());
    let Some(containerd) = containerd else {
        bail!(
            "This host has hardware virtualization but no containerd: install it (apt-get install containerd), or give --lab"
        );
    };
    let mut command = Command::new(parts.bin.join(program));
    command.arg("--containerd").arg(containerd).arg("--dist").arg(fs::canonicalize(&parts.dist)?);
    command.arg("--images").arg(&parts.images).args(arguments);
    if let Some(docker) = docker {
        command.arg("--docker").arg(docker);
    }
    if program == "demo" {
        command.arg("--report").arg(&parts.report);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("Cannot run {program}"))?;
    let mut log = Log::create(&parts.report.join(format!("{program}-host.log")))?;
    if let Some(mut output) = child.stdout.take() {
        std::io::copy(&mut output, &mut log)?;
    }
    Ok(if child.wait()?.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Job {
    /// The file of what the program writes.
    fn log(&self, parts: &Parts, snapshot: Snapshot) -> PathBuf {
        let kind = if self.passed.device.is_empty() { "" } else { "-devices" };
        parts.report.join(format!("{}-{snapshot}{kind}.log", self.program))
    }
}

/// Answers whether the job's program succeeded in a machine restored from `snapshot`. Cases that have passed by the words of
/// `log`, in a machine that was lost, do not run again.
fn in_the_lab(parts: &Parts, job: &Job, snapshot: Snapshot, more: Option<&str>, log: &Path) -> Result<bool> {
    let Job { program, arguments, passed, .. } = job;
    println!("\n{program} in the lab, snapshot {snapshot}");
    let before = fs::read_to_string(log).with_context(|| format!("Cannot read {}", log.display()))?;
    let done = passed_tests(&before).into_iter().map(|name| format!("--skip={name}"));
    let name = format!("{program}-{}-{}", snapshot.name().replace('.', "-"), std::process::id());
    let machine = passed.machine(snapshot, None, &name)?;
    // The directory's content is merged into the machine's root: an installation.
    machine.push(&parts.dist, "/")?;
    machine.push(&parts.images, "/root/images")?;
    for program in [*program, "storage-check"] {
        machine.push(&parts.bin.join(program), "/root/bin/")?;
    }
    let script = "exec \"$0\" --containerd \"$(command -v containerd)\" --images /root/images \"$@\"";
    let mut command = lab::Command::shell(script)
        .arg(format!("/root/bin/{program}"))
        .args(["--slowness", LAB_SLOWNESS])
        .args(arguments.iter().map(String::as_str).chain(more))
        .args(done);
    command = if *program == "demo" { command.args(["--report", "/root/report"]) } else { command.arg("--emulated") };
    if let Some(file) = &passed.passthrough {
        machine.push(file, PASSTHROUGH_PROGRAM)?;
        command = command.args(["--passthrough", PASSTHROUGH_PROGRAM]);
        command =
            passed.addresses().iter().fold(command, |command, address| command.args(["--device", address.as_str()]));
    }
    if let Some(docker) = &passed.docker {
        machine.push(docker, DOCKER_PROGRAMS)?;
        command = command.args(["--docker", DOCKER_PROGRAMS]);
    }
    let succeeded = succeeds(&machine, &command, Log::append(log)?)?;
    if *program == "demo" && succeeded {
        machine.pull("/root/report", &parts.report)?;
    }
    if !succeeded {
        keep_console(&machine, &parts.report.join(format!("{program}-{snapshot}-console.log")));
    }
    machine.end()?;
    Ok(succeeded)
}

/// By these variables a test program finds what its Linux guests are made of, and the devices for them.
const KERNEL: &str = "TATAMI_TEST_KERNEL";
/// Programs that have Linux guests lend them their standard streams, to one at a time.
const ONE_THREAD: (&str, &str) = ("RUST_TEST_THREADS", "1");
const BUSYBOX: &str = "TATAMI_TEST_BUSYBOX";
const DEVICES: &str = "TATAMI_TEST_DEVICES";
const PASSTHROUGH: &str = "TATAMI_TEST_PASSTHROUGH";
const MODULES: &str = "TATAMI_TEST_MODULES";
const IOMMUFD: &str = "TATAMI_TEST_IOMMUFD";
/// Where the lab machine has the modules for guests.
const MODULES_PLACE: &str = "/root/bin/modules";
const ROUNDS: &str = "TATAMI_TEST_ROUNDS";

impl Alone {
    fn run(mut self) -> Result<ExitCode> {
        if self.debian_kernel {
            let kernel = DebianKernel::newest(&cache::Cache::open()?)?;
            (self.kernel, self.module) = (Some(kernel.image), kernel.modules);
        }
        let name = self.program.file_name().with_context(|| format!("{} names no program", self.program.display()))?;
        let name = name.to_string_lossy().into_owned();
        let succeeded = if lab::probe::probe().hardware && self.passed.device.is_empty() {
            self.on_this_host(&name)?
        } else {
            self.with_second_chances(&name)?
        };
        Ok(if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// The tests whose guests died run once more, in a machine of their own.
    fn with_second_chances(&self, name: &str) -> Result<bool> {
        let chances = SecondChances::new(true);
        let mut filter: Vec<_> = self.filter.iter().cloned().collect();
        loop {
            if again_if_the_machine_ended(|| self.in_the_lab(name, &filter))? {
                return Ok(true);
            }
            let log = self.log(name);
            let text = fs::read_to_string(&log).with_context(|| format!("Cannot read {}", log.display()))?;
            let failed = failed_tests(&text);
            if failed.is_empty() || !chances.take(&failed.join(", "), &text) {
                return Ok(false);
            }
            println!("\nA guest died or hung on emulated processors; once more: {}", failed.join(", "));
            filter = std::iter::once("--exact".to_owned()).chain(failed).collect();
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.report.join(format!("{name}.log"))
    }

    /// The modules, under names that sort as they are loaded.
    fn modules(&self) -> impl Iterator<Item = (String, &Path)> {
        self.module.iter().enumerate().map(|(number, module)| {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            (format!("{number:02}-{name}"), module.as_path())
        })
    }

    fn on_this_host(&self, name: &str) -> Result<bool> {
        let Some(kernel) = &self.kernel else {
            println!("{name} ran on this host's own KVM, with the unit tests");
            return Ok(true);
        };
        let mut command = Command::new(&self.program);
        command
            .args(&self.filter)
            .env(KERNEL, kernel)
            .envs([ONE_THREAD])
            .envs(self.rounds.map(|rounds| (ROUNDS, rounds.to_string())));
        let modules = tempfile::tempdir().context("Cannot make a directory")?;
        for (name, module) in self.modules() {
            fs::copy(module, modules.path().join(name)).with_context(|| format!("Cannot copy {}", module.display()))?;
            command.env(MODULES, modules.path());
        }
        let status = command.status();
        Ok(status.with_context(|| format!("Cannot run {}", self.program.display()))?.success())
    }

    fn in_the_lab(&self, name: &str, filter: &[String]) -> Result<bool> {
        fs::create_dir_all(&self.report).with_context(|| format!("Cannot create {}", self.report.display()))?;
        println!("{name} in the lab");
        let machine = self.passed.machine(Snapshot::Base, self.memory, &format!("program-{}", std::process::id()))?;
        machine.push(&self.program, "/root/bin/program")?;
        let mut command = lab::Command::new("/root/bin/program").args(filter.to_vec());
        if let Some(kernel) = &self.kernel {
            machine.push(kernel, "/root/bin/vmlinux")?;
            machine.push(Path::new("/usr/bin/busybox"), "/root/bin/busybox")?;
            command = command.env(KERNEL, "/root/bin/vmlinux").env(BUSYBOX, "/root/bin/busybox");
            command = command.env(ONE_THREAD.0, ONE_THREAD.1);
        }
        if let Some(passthrough) = &self.passed.passthrough {
            machine.push(passthrough, PASSTHROUGH_PROGRAM)?;
            command = command.env(PASSTHROUGH, PASSTHROUGH_PROGRAM).env(DEVICES, self.passed.addresses().join(" "));
        }
        for (name, module) in self.modules() {
            machine.push(module, &format!("{MODULES_PLACE}/{name}"))?;
            command = command.env(MODULES, MODULES_PLACE);
        }
        if self.passed.machine_kernel == lab::Kernel::Iommufd {
            command = command.env(IOMMUFD, "1");
        }
        if let Some(rounds) = self.rounds {
            command = command.env(ROUNDS, rounds.to_string());
        }
        let succeeded = succeeds(&machine, &command, Log::create(&self.log(name))?)?;
        if !succeeded {
            keep_console(&machine, &self.report.join(format!("{name}-console.log")));
        }
        machine.end()?;
        Ok(succeeded)
    }
}

/// Runs something in a machine, and once more in a new one if the machine itself ended or is out of reach: its guests run in
/// an emulator, and what ends that says nothing of them.
fn again_if_the_machine_ended(mut run: impl FnMut() -> Result<bool>) -> Result<bool> {
    match run() {
        Err(error) if matches!(error.downcast_ref(), Some(lab::Error::Qemu { .. } | lab::Error::Connection(_))) => {
            println!("\n{error:#}\n\nThe lab machine was lost; once more in a new one");
            run()
        }
        result => result,
    }
}

/// Runs the command with its output shown and kept. One that fails by a status may say nothing, so that is said too.
fn succeeds(machine: &Machine, command: &lab::Command, mut log: Log) -> Result<bool> {
    let status = machine.run_streaming(command, Input::Empty, |event| match event {
        Event::Stdout(bytes) | Event::Stderr(bytes) => log.add(&bytes),
        Event::Ended(_) => {}
    })?;
    if status != Status::Exited(0) {
        log.add(format!("{command} ended in the lab: {status:?}\n").as_bytes());
    }
    Ok(status == Status::Exited(0))
}

/// What the machine's kernel had to say may tell why something failed in it.
fn keep_console(machine: &Machine, file: &Path) {
    if let Err(error) = fs::copy(machine.console(), file) {
        eprintln!("Cannot keep the machine's console as {}: {error}", file.display());
    }
}

/// The tests that a log of Rust's test harness names as failed.
fn failed_tests(log: &str) -> Vec<String> {
    let failed = |line: &str| Some(line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?.to_owned());
    log.lines().filter_map(failed).collect()
}

/// Those that it names as passed.
fn passed_tests(log: &str) -> Vec<String> {
    let passed = |line: &str| Some(line.strip_prefix("test ")?.strip_suffix(" ... ok")?.trim_end().to_owned());
    log.lines().filter_map(passed).collect()
}

/// Shows what a program writes and keeps it.
struct Log {
    file: File,
    failed: bool,
}

impl Log {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("Cannot write {}", path.display()))?;
        Ok(Self { file, failed: false })
    }

    /// One that goes on in a file.
    fn append(path: &Path) -> Result<Self> {
        let file = File::options().append(true).open(path);
        Ok(Self { file: file.with_context(|| format!("Cannot write {}", path.display()))?, failed: false })
    }

    fn add(&mut self, bytes: &[u8]) {
        let mut out = std::io::stdout();
        let written = out.write_all(bytes).and_then(|()| out.flush()).and_then(|()| self.file.write_all(bytes));
        if let Err(error) = written
            && !self.failed
        {
            self.failed = true;
            eprintln!("The log is not complete: {error}");
        }
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod log_tests {
    use super::{failed_tests, passed_tests};

    #[test]
    fn passed_tests_are_those_whose_line_says_so_at_once() {
        let log =
            "test cri: a pod                 ... ok\ntest many: 8 start ... many: again, for\nok\ntest x ... FAILED\n";
        assert_eq!(passed_tests(log), ["cri: a pod"]);
    }

    #[test]
    fn failed_tests_are_found_in_a_log_among_what_guests_print() {
        let log = "running 3 tests\ntest memory::grows ... ok\ntest hot_plug::comes ... FAILED\n[ 1.2] test x\n\
                   test passthrough::used ... FAILED\n\nfailures:\n    hot_plug::comes\n";
        assert_eq!(failed_tests(log), ["hot_plug::comes", "passthrough::used"]);
        assert!(failed_tests("").is_empty());
    }
}
