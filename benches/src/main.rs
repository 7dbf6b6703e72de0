//! `benches`: measures what the project promises and writes a report.

use std::fs;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use benches::figures::{self, Group, Inputs};
use benches::guest;
use benches::measure::boot::Contender;
use benches::measure::machine::Parts;
use benches::measure::vmm::Vmm;
use benches::measure::{Samples, block, boot, containers, hot_plug, idle, memory, net, pods};
use benches::report::{Report, round};
use benches::site::{Clock, Site};
use benches::tools;
use cache::Cache;
use clap::{Args, Parser, Subcommand};
use indicatif::ProgressBar;
use kernel_config::build::{Builder, Progress};
use kernel_config::profile::Profile;

/// Measure what the project promises, against peers in the same run
///
/// Everything runs in the lab machine: once in virtual time (an instruction takes a nanosecond, whatever else this host
/// does) and once in wall time. The report goes to report.json, report.md and SVG charts in the output directory.
#[derive(Parser)]
#[command(name = "benches", version)]
struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: Run,
}

#[derive(Args)]
struct Run {
    /// The staged tree: what a node gets
    #[arg(long, value_name = "DIR", default_value = "target/dist")]
    dist: PathBuf,
    /// OCI archives for the containers
    #[arg(long, value_name = "DIR", default_value = "target/images")]
    images: PathBuf,
    /// Where the report goes
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    output: PathBuf,
    /// Measurements of each quantity
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Measure in this time only
    #[arg(long, value_enum)]
    clock: Option<Clock>,
    /// Measure these groups only
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Group>,
    /// Print the figures as JSON instead of as a table
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Action {
    /// Compare guest kernels: from entry to init in QEMU microvm, in virtual time
    Kernels {
        /// vmlinux files; the first is what the others are compared with
        #[arg(required = true, num_args = 1..)]
        kernels: Vec<PathBuf>,
        /// Measurements of each
        #[arg(long, value_name = "N", default_value_t = 5)]
        rounds: usize,
    },
    /// Take samples on this very machine and print them as JSON (what runs inside the lab machine)
    #[command(subcommand, hide = true)]
    Measure(Measure),
}

#[derive(Subcommand)]
enum Measure {
    /// Boot times of the monitors
    Boot {
        #[arg(long)]
        kernel: PathBuf,
        #[command(flatten)]
        boots: Boots,
    },
    /// Boot times of kernels in QEMU microvm
    Kernels {
        #[arg(long)]
        kernel: Vec<PathBuf>,
        #[command(flatten)]
        boots: Boots,
    },
    /// Memory of monitors and guests
    Memory {
        #[arg(long)]
        kernel: PathBuf,
        #[arg(long)]
        initrd: PathBuf,
        #[arg(long)]
        image: PathBuf,
        #[arg(long)]
        rounds: usize,
    },
    /// Throughput and latency of disks
    Block(Guests),
    /// Throughput and latency of network cards
    Net(Guests),
    /// Disks and network cards that come to running guests
    HotPlug(Guests),
    /// A device of the host that comes to running guests
    Vfio {
        #[command(flatten)]
        guests: Guests,
        /// Its address on the PCI bus
        #[arg(long)]
        address: String,
    },
    /// Thread switches of idle VMs
    Idle {
        #[arg(long)]
        kernel: PathBuf,
        #[arg(long)]
        image: PathBuf,
    },
    /// Pods by the CRI
    Pods {
        /// Archives of the images of pods and of their containers
        #[arg(long, required = true)]
        archive: Vec<PathBuf>,
        #[arg(long)]
        rounds: usize,
        /// How often many are made at once
        #[arg(long)]
        crowds: usize,
        /// Seconds that a guest may take
        #[arg(long)]
        limit: u16,
    },
    /// Containers and pods
    Containers {
        #[arg(long)]
        archive: PathBuf,
        #[arg(long)]
        rounds: usize,
        /// Seconds that a guest may take
        #[arg(long)]
        limit: u16,
    },
}

/// How boots are measured.
#[derive(Args)]
struct Boots {
    #[arg(long)]
    initrd: PathBuf,
    #[arg(long)]
    rounds: usize,
    /// Seconds that a guest may take
    #[arg(long)]
    limit: u16,
}

/// Guests that measure their own devices.
#[derive(Args)]
struct Guests {
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    tools: PathBuf,
    #[arg(long)]
    rounds: usize,
    /// Seconds that a guest may take
    #[arg(long)]
    limit: u16,
}

impl Guests {
    fn parts(&self) -> Parts<'_> {
        Parts { kernel: &self.kernel, tools: &self.tools, limit: self.limit }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.action {
        Some(Action::Measure(measure)) => take_samples(measure),
        Some(Action::Kernels { kernels, rounds }) => compare_kernels(&kernels, rounds),
        None => run(&arguments.run),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {error:#}", console::style("error:").red().bold().for_stderr());
            ExitCode::FAILURE
        }
    }
}

fn take_samples(measure: Measure) -> Result<()> {
    let mut samples = Samples::new();
    match measure {
        Measure::Boot { kernel, boots } => {
            let contender = |vmm: Vmm| Contender { name: vmm.name().to_owned(), vmm, kernel: &kernel };
            let contenders = [Vmm::Dragonball, Vmm::Microvm].map(contender);
            samples.extend(boot::measure(&contenders, &boots.initrd, boots.rounds, boots.limit)?);
        }
        Measure::Kernels { kernel, boots } => {
            let mut contenders = Vec::new();
            for (number, kernel) in kernel.iter().enumerate() {
                contenders.push(Contender { name: format!("kernel {number}"), vmm: Vmm::Microvm, kernel });
            }
            samples.extend(boot::measure(&contenders, &boots.initrd, boots.rounds, boots.limit)?);
        }
        Measure::Memory { kernel, initrd, image, rounds } => {
            memory::without_huge_pages()?;
            for vmm in [Vmm::Dragonball, Vmm::Microvm] {
                samples.extend(memory::measure(vmm, &kernel, &initrd, rounds)?);
            }
            samples.extend(memory::measure_agent(&kernel, &image, rounds)?);
        }
        Measure::Block(guests) => samples.extend(block::measure(guests.parts(), guests.rounds)?),
        Measure::Net(guests) => samples.extend(net::measure(guests.parts(), guests.rounds)?),
        Measure::HotPlug(guests) => samples.extend(hot_plug::measure(guests.parts(), guests.rounds)?),
        Measure::Vfio { guests, address } => {
            samples.extend(hot_plug::measure_host_device(guests.parts(), &address, guests.rounds)?);
        }
        Measure::Idle { kernel, image } => samples.extend(idle::measure(&kernel, &image)?),
        Measure::Pods { archive, rounds, crowds, limit } => {
            let archives: Vec<&Path> = archive.iter().map(PathBuf::as_path).collect();
            samples.extend(pods::measure(&archives, rounds, crowds, limit)?);
        }
        Measure::Containers { archive, rounds, limit } => {
            containers::configure(limit, None)?;
            let image = containers::import(&archive)?;
            samples.extend(containers::measure_run(&image, rounds)?);
            memory::without_huge_pages()?;
            samples.extend(containers::measure_meminfo(&image)?);
            samples.extend(containers::measure_pods(&image)?);
        }
    }
    println!("{}", serde_json::to_string(&samples)?);
    Ok(())
}

fn run(arguments: &Run) -> Result<()> {
    let status = Status::new();
    let initrd = initrd()?;
    let inputs = Inputs {
        dist: arguments.dist.clone(),
        images: arguments.images.clone(),
        reference: if wanted(&arguments.only, Group::Kernel) { Some(reference(&status)?) } else { None },
        tools: tools(&arguments.only, &status)?,
        initrd: initrd.path().to_owned(),
        rounds: arguments.rounds.into(),
    };
    let mut report = Report::default();
    let mut failures = Vec::new();
    for clock in [Clock::Virtual, Clock::Wall] {
        if arguments.clock.is_none_or(|only| only == clock) {
            failures.extend(measure(clock, &arguments.only, &inputs, &mut report, &status));
        }
    }
    status.bar.finish_and_clear();
    write(&report, &arguments.output)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report.figures)?);
    } else {
        println!("{}", report.markdown());
    }
    ensure!(failures.is_empty(), "The report is not whole:\n{}", failures.join("\n"));
    Ok(())
}

fn wanted(only: &[Group], group: Group) -> bool {
    only.is_empty() || only.contains(&group)
}

fn initrd() -> Result<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new().context("Cannot make a temporary file")?;
    fs::write(file.path(), guest::initrd()).context("Cannot write the initrd")?;
    Ok(file)
}

fn compare_kernels(kernels: &[PathBuf], rounds: usize) -> Result<()> {
    let site = Site::bare(Clock::Virtual)?;
    let samples = figures::kernel_samples(&site, kernels, initrd()?.path(), rounds)?;
    let first = samples.first().context("No kernel was measured")?.clone();
    for (kernel, sample) in kernels.iter().zip(&samples) {
        let (median, ratio) = (round(sample.median()), sample.ratio(&first));
        println!(
            "{median:>8} ms  {ratio:.3}  ({} – {})  {}",
            round(sample.min()),
            round(sample.max()),
            kernel.display()
        );
    }
    Ok(())
}

/// The image of tools, if a group needs it.
fn tools(only: &[Group], status: &Status) -> Result<Option<PathBuf>> {
    if !Group::ALL.iter().any(|group| group.needs_tools() && wanted(only, *group)) {
        return Ok(None);
    }
    status.step("Making the image with fio and iperf3");
    tools::image(&Cache::open()?).context("Cannot make the image with fio and iperf3").map(Some)
}

/// The peer's kernel, from the cache or built now.
fn reference(status: &Status) -> Result<PathBuf> {
    let cache = Cache::open()?;
    let jobs = std::thread::available_parallelism().map_or(1, Into::into);
    let kernel = Builder { cache: &cache, jobs, build_tree: None }.build(Profile::Reference, status)?;
    Ok(kernel.directory.join("vmlinux"))
}

/// Measures all groups of `clock`. What fails is noted in the report, and answered if it ought not to fail: the other
/// groups' figures took their time.
fn measure(clock: Clock, only: &[Group], inputs: &Inputs, report: &mut Report, status: &Status) -> Vec<String> {
    let mut failures = Vec::new();
    for group in Group::ALL {
        if !wanted(only, group) || !group.is_measured_in(clock) {
            continue;
        }
        status.step(&format!("Measuring {} in {}", group.name(), clock.name()));
        let measured = group.site(clock, &inputs.dist).and_then(|site| group.measure(&site, clock, inputs, report));
        if let Err(error) = measured {
            let failure = format!("Cannot measure {} in {}: {error:#}.", group.name(), clock.name());
            report.notes.push(failure.clone());
            if !group.may_fail() {
                failures.push(failure);
            }
        }
    }
    failures
}

fn write(report: &Report, output: &Path) -> Result<()> {
    fs::create_dir_all(output).with_context(|| format!("Cannot create {}", output.display()))?;
    let json = serde_json::to_string_pretty(&report.figures)?;
    let mut files = vec![("report.json".to_owned(), json), ("report.md".to_owned(), report.markdown())];
    files.extend(report.charts());
    for (name, text) in files {
        let path = output.join(name);
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(())
}

/// What is being done: a spinner on a terminal, plain lines elsewhere.
struct Status {
    bar: ProgressBar,
    terminal: bool,
}

impl Status {
    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.enable_steady_tick(std::time::Duration::from_millis(120));
        Self { bar, terminal }
    }
}

impl Progress for Status {
    fn step(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        if !self.terminal {
            eprintln!("bench: {what}");
        }
    }

    fn compiled(&self, file: &str) {
        self.bar.set_message(format!("Compiling the peer's kernel: {file}"));
    }
}
