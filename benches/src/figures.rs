//! The figures that the project promises, made of samples.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use lab::Kernel;

use crate::measure::vmm::Vmm;
use crate::measure::{Samples, pods};
use crate::report::{Figure, Goal, Report, round};
use crate::sample::Sample;
use crate::site::{Clock, Site};

mod devices;

/// KiB in a MiB.
const KIB_PER_MIB: f64 = 1024.0;
/// KiB in a MB.
const KIB_PER_MB: f64 = 1e6 / 1024.0;

/// What is measured.
#[derive(Debug)]
pub struct Inputs {
    /// The staged tree.
    pub dist: PathBuf,
    /// OCI archives.
    pub images: PathBuf,
    /// The peer's kernel, if it is measured.
    pub reference: Option<PathBuf>,
    /// The image of a guest that measures its own devices, if there are such groups.
    pub tools: Option<PathBuf>,
    /// The smallest guest.
    pub initrd: PathBuf,
    /// Measurements of each quantity.
    pub rounds: usize,
}

/// A group of figures.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Group {
    /// From the monitor's execution to the guest's first program
    Boot,
    /// The guest kernel's own share of that
    Kernel,
    /// Memory of monitors and guests
    Memory,
    /// Containers through containerd
    Containers,
    /// Pods through containerd's CRI
    Pods,
    /// Throughput and latency of disks
    Block,
    /// Throughput and latency of network cards
    Net,
    /// Disks and network cards that come to a running guest
    HotPlug,
    /// What idle VMs make their host do
    Idle,
    /// A GPU of the host that comes to a running guest, on Debian's kernel: VFIO by groups
    Vfio,
    /// The same on a kernel with IOMMUFD
    Iommufd,
}

impl Group {
    /// All groups, in the order of the report.
    pub const ALL: [Self; 11] = [
        Self::Boot,
        Self::Kernel,
        Self::Memory,
        Self::Containers,
        Self::Pods,
        Self::Block,
        Self::Net,
        Self::HotPlug,
        Self::Idle,
        Self::Vfio,
        Self::Iommufd,
    ];

    /// Its name in progress messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Kernel => "the kernel",
            Self::Memory => "memory",
            Self::Containers => "containers",
            Self::Pods => "pods",
            Self::Block => "disks",
            Self::Net => "network cards",
            Self::HotPlug => "hot-plug",
            Self::Idle => "idle VMs",
            Self::Vfio => "a device of the host",
            Self::Iommufd => "a device of the host by IOMMUFD",
        }
    }

    /// Whether it is measured by `clock`: not twice where its figures are the same by both or mean something by one
    /// only.
    #[must_use]
    pub fn is_measured_in(self, clock: Clock) -> bool {
        match self {
            Self::Boot | Self::Containers => true,
            Self::Kernel | Self::Memory | Self::Pods | Self::HotPlug => clock == Clock::Virtual,
            // Virtual time runs away from a machine that idles, and one CPU hides what several do at once.
            Self::Block | Self::Net | Self::Idle | Self::Vfio | Self::Iommufd => clock == Clock::Wall,
        }
    }

    /// Whether a failure is said in the report alone: QEMU's guests with devices hang now and then on the lab's emulated
    /// processor.
    #[must_use]
    pub fn may_fail(self) -> bool {
        matches!(self, Self::Block | Self::Net)
    }

    /// Whether its guests start from the image of tools.
    #[must_use]
    pub fn needs_tools(self) -> bool {
        matches!(self, Self::Block | Self::Net | Self::HotPlug | Self::Vfio | Self::Iommufd)
    }

    /// The machine that it is measured in.
    ///
    /// # Errors
    /// When it does not start.
    pub fn site(self, clock: Clock, dist: &Path) -> Result<Site> {
        match self {
            // Guests whose devices come and go, and many guests, would meet the fault of virtualization.
            Self::HotPlug | Self::Pods => Ok(Site::new(clock, dist)?.mended()),
            Self::Vfio => Site::with_gpu(Kernel::Debian, dist),
            Self::Iommufd => Site::with_gpu(Kernel::Iommufd, dist),
            _ => Site::new(clock, dist),
        }
    }

    /// Measures its figures at `site` and adds them to `report`.
    ///
    /// # Errors
    /// When a measurement fails.
    pub fn measure(self, site: &Site, clock: Clock, inputs: &Inputs, report: &mut Report) -> Result<()> {
        match self {
            Self::Boot => boot(site, clock, inputs, report),
            Self::Kernel => kernels(site, inputs, report),
            Self::Memory => memory(site, inputs, report),
            Self::Containers => containers(site, clock, inputs, report),
            Self::Pods => pods(site, clock, inputs, report),
            Self::Block => devices::block(site, inputs, report),
            Self::Net => devices::net(site, inputs, report),
            Self::HotPlug => devices::hot_plug(site, inputs, report),
            Self::Idle => devices::idle(site, inputs, report),
            Self::Vfio => devices::vfio(site, inputs, "GPU of 8 GiB to a guest of 2 GiB, wall time", report),
            Self::Iommufd => {
                devices::vfio(site, inputs, "GPU of 8 GiB to a guest of 2 GiB by IOMMUFD, wall time", report)
            }
        }
    }
}

fn sample(samples: &Samples, name: &str, divisor: f64) -> Result<Sample> {
    let values = samples.get(name).cloned().unwrap_or_default();
    Sample::new(values.into_iter().map(|value| value / divisor).collect())
        .with_context(|| format!("No values of {name} were measured"))
}

/// The kernel of a staged tree.
fn kernel(dist: &Path) -> PathBuf {
    dist.join("usr/share/kata-containers/vmlinux")
}

/// Adds two figures, the second being the first one's peer.
fn compare(report: &mut Report, group: &'static str, names: [&str; 2], samples: [&Sample; 2], goal: f64) {
    let own = Figure::new(group, names[0], "ms", samples[0]).against(names[1], samples[0], samples[1]);
    report.figures.push(own.with_goal(Goal::RatioAtMost(goal)));
    report.figures.push(Figure::new(group, names[1], "ms", samples[1]));
}

fn boot(site: &Site, clock: Clock, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let base = site.provide(&kernel(&inputs.dist), "base")?;
    let initrd = site.provide(&inputs.initrd, "initrd")?;
    let (rounds, limit) = (inputs.rounds.to_string(), clock.boot_limit().to_string());
    let arguments = ["boot", "--kernel", &base, "--initrd", &initrd, "--rounds", &rounds, "--limit", &limit];
    let samples = site.measure(&arguments)?;
    let group = match clock {
        Clock::Virtual => "Boot, virtual time",
        Clock::Wall => "Boot, wall time",
    };
    let [own, peer] = [Vmm::Dragonball, Vmm::Microvm].map(|vmm| sample(&samples, vmm.name(), 1.0));
    let names = ["dragonball: exec to guest init", "QEMU microvm at its best: exec to guest init"];
    let names = names.map(|name| format!("{name} ({})", clock.name()));
    compare(report, group, [&names[0], &names[1]], [&own?, &peer?], 0.8);
    Ok(())
}

/// Milliseconds from each kernel's entry to init in QEMU microvm.
///
/// # Errors
/// When a kernel does not boot.
pub fn kernel_samples(site: &Site, kernels: &[PathBuf], initrd: &Path, rounds: usize) -> Result<Vec<Sample>> {
    let (initrd, rounds) = (site.provide(initrd, "initrd")?, rounds.to_string());
    let limit = Clock::Virtual.boot_limit().to_string();
    let mut arguments = vec!["kernels", "--initrd", &initrd, "--rounds", &rounds, "--limit", &limit];
    let kernels: Vec<String> = kernels
        .iter()
        .enumerate()
        .map(|(number, kernel)| site.provide(kernel, &format!("kernel-{number}")))
        .collect::<Result<_>>()?;
    arguments.extend(kernels.iter().flat_map(|kernel| ["--kernel", kernel]));
    let samples = site.measure(&arguments)?;
    (0..kernels.len()).map(|number| sample(&samples, &format!("kernel {number} kernel"), 1.0)).collect()
}

fn kernels(site: &Site, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let reference = inputs.reference.clone().context("The peer's kernel was not built")?;
    let kernels = [kernel(&inputs.dist), reference];
    let samples = kernel_samples(site, &kernels, &inputs.initrd, inputs.rounds)?;
    let names = ["base", "reference"].map(|profile| format!("{profile} kernel: entry to init in QEMU microvm"));
    compare(report, "Guest kernel, virtual time", [&names[0], &names[1]], [&samples[0], &samples[1]], 0.6);
    Ok(())
}

fn memory(site: &Site, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let base = site.provide(&kernel(&inputs.dist), "base")?;
    let initrd = site.provide(&inputs.initrd, "initrd")?;
    let image = site.provide(&inputs.dist.join("usr/share/kata-containers/kata-containers.img"), "image")?;
    let rounds = inputs.rounds.to_string();
    let samples =
        site.measure(&["memory", "--kernel", &base, "--initrd", &initrd, "--image", &image, "--rounds", &rounds])?;
    let group = "Monitor's memory without guest RAM";
    for (suffix, what, limit) in [("rss", "RSS, one VM", 4.0), ("pss", "PSS each at 10 VMs", 0.7)] {
        let [own, peer] = pair(&samples, group, suffix, what, ("MiB", KIB_PER_MIB))?;
        report.figures.extend([own.with_goal(Goal::AtMost(limit)), peer]);
    }
    let group = "Guest RAM touched";
    let megabytes = ("MB", KIB_PER_MB);
    report.figures.extend(pair(&samples, group, "guest", "bare init, 128 MiB", megabytes)?);
    let agent =
        Figure::new(group, "dragonball: agent ready, 128 MiB", "MB", &sample(&samples, "agent guest", KIB_PER_MB)?);
    report.figures.push(agent.with_goal(Goal::AtMost(22.0)));
    Ok(())
}

/// The figures of one quantity of both monitors.
fn pair(
    samples: &Samples,
    group: &'static str,
    suffix: &str,
    what: &str,
    (unit, divisor): (&'static str, f64),
) -> Result<[Figure; 2]> {
    let [own, peer] =
        [Vmm::Dragonball, Vmm::Microvm].map(|vmm| sample(samples, &format!("{} {suffix}", vmm.name()), divisor));
    let (own, peer) = (own?, peer?);
    let [own_name, peer_name] = [Vmm::Dragonball, Vmm::Microvm].map(|vmm| format!("{}: {what}", vmm.name()));
    let figure = Figure::new(group, own_name, unit, &own).against(&peer_name, &own, &peer);
    Ok([figure, Figure::new(group, peer_name, unit, &peer)])
}

fn containers(site: &Site, clock: Clock, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let archive = site.provide(&inputs.images.join("busybox.tar"), "busybox.tar")?;
    let (rounds, limit) = (inputs.rounds.to_string(), clock.boot_limit().to_string());
    let arguments = ["containers", "--archive", &archive, "--rounds", &rounds, "--limit", &limit];
    let samples = site.measure(&arguments)?;
    let (own, peer) = (sample(&samples, "kata", 1.0)?, sample(&samples, "runc", 1.0)?);
    let names = ["kata", "runc"].map(|runtime| format!("ctr run --rm … true with {runtime} ({})", clock.name()));
    let group = match clock {
        Clock::Virtual => "Containers, virtual time",
        Clock::Wall => "Containers, wall time",
    };
    compare(report, group, [&names[0], &names[1]], [&own, &peer], 2.5);
    if clock == Clock::Virtual {
        let pss = sample(&samples, "pod pss", KIB_PER_MIB)?;
        let figure = Figure::new("Pods", "pod process without guest RAM: PSS each at 10 pods", "MiB", &pss);
        report.figures.push(figure.with_goal(Goal::AtMost(2.5)));
        let guest = sample(&samples, "pod guest", KIB_PER_MB)?;
        report.figures.push(Figure::new("Pods", "guest RAM touched by an idle pod, 10 pods", "MB", &guest));
        report.notes.push(causes(&samples, &kernel(&inputs.dist))?);
    }
    Ok(())
}

/// How often many pods are made at once.
const CROWDS: &str = "3";

fn pods(site: &Site, clock: Clock, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let provide = |name: &str| site.provide(&inputs.images.join(name), name);
    let (pause, busybox) = (provide("pause.tar")?, provide("busybox.tar")?);
    let (rounds, limit) = (inputs.rounds.to_string(), clock.boot_limit().to_string());
    let archives = ["pods", "--archive", &pause, "--archive", &busybox];
    let numbers = ["--rounds", &rounds, "--crowds", CROWDS, "--limit", &limit];
    let samples = site.measure(&[&archives[..], &numbers].concat())?;
    let at_once = format!("{} pods at once, until the last one's", pods::CROWD);
    for (suffix, what, goal) in [("pod", "a pod until its container's first byte", 2.0), ("crowd", &at_once, 2.5)] {
        let [own, peer] = pods::HANDLERS.map(|handler| sample(&samples, &format!("{handler} {suffix}"), 1.0));
        let names = pods::HANDLERS.map(|handler| format!("{handler}: {what}"));
        compare(report, "Pods by the CRI, virtual time", [&names[0], &names[1]], [&own?, &peer?], goal);
    }
    let one = sample(&samples, "pod pss", KIB_PER_MIB)?;
    let figure = Figure::new("Pods", "pod process with one container, by the CRI: PSS", "MiB", &one);
    report.figures.push(figure.with_goal(Goal::AtMost(8.0)));
    let further = sample(&samples, "container pss", 1.0)?;
    let figure = Figure::new("Pods", "each further container: PSS of the pod process", "KiB", &further);
    report.figures.push(figure.with_goal(Goal::AtMost(100.0)));
    report.notes.push(longest_hops(&samples)?);
    Ok(())
}

/// The hops that a client waits for longest, by their medians.
fn longest_hops(samples: &Samples) -> Result<String> {
    let mut hops = Vec::new();
    for name in samples.keys().filter_map(|name| name.strip_prefix(pods::HOP)) {
        hops.push((name, sample(samples, &format!("{}{name}", pods::HOP), 1.0)?.median()));
    }
    hops.sort_by(|a, b| b.1.total_cmp(&a.1));
    let longest = hops.iter().take(3).map(|(name, took)| format!("to \"{name}\" ({} ms)", round(*took)));
    let longest = longest.collect::<Vec<_>>().join(", ");
    Ok(format!("The three longest hops of a pod of kata until its container's first byte: {longest}."))
}

/// What a guest's memory is used for, the largest first: the kernel's own counters as a container saw them.
fn causes(samples: &Samples, kernel: &Path) -> Result<String> {
    let image = std::fs::metadata(kernel).with_context(|| format!("Cannot read {}", kernel.display()))?.len();
    let counter = |name: &str| samples.get(name).and_then(|values| values.first()).copied().unwrap_or_default();
    // One struct page of 64 bytes for each page of 4 KiB.
    let page_structs = counter("MemTotal") / 64.0;
    let mut causes = [
        ("the kernel's image (at most its file's size)", image as f64 / 1024.0),
        ("slab caches", counter("Slab")),
        ("struct page array", page_structs),
        ("anonymous memory of agent and container", counter("AnonPages")),
        ("page cache and tmpfs", counter("Cached")),
        ("page tables", counter("PageTables")),
        ("kernel stacks", counter("KernelStack")),
        ("per-CPU data", counter("Percpu")),
    ];
    causes.sort_by(|a, b| b.1.total_cmp(&a.1));
    let largest = causes.iter().take(3).map(|(name, kib)| format!("{name} ({} MiB)", round(kib / KIB_PER_MIB)));
    Ok(format!("The three largest causes of guest RAM touched: {}.", largest.collect::<Vec<_>>().join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_longest_hops_are_named_in_order() {
        let hop = |name: &str, values: &[f64]| (format!("{}{name}", pods::HOP), values.to_vec());
        let samples: Samples = [
            hop("Create", &[1.0, 1.0, 50.0]),
            hop("agent dialled", &[60.0, 62.0, 61.0]),
            hop("first output", &[20.0, 21.0, 19.0]),
            hop("started", &[5.0, 4.0, 6.0]),
            ("kata pod".to_owned(), vec![1000.0]),
        ]
        .into();
        let text = longest_hops(&samples).unwrap();
        let expected = "to \"agent dialled\" (61.0 ms), to \"first output\" (20.0 ms), to \"started\" (5.00 ms).";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn the_three_largest_causes_are_named_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        std::fs::write(&kernel, vec![0; 3 << 20]).unwrap();
        let samples: Samples =
            [("Slab".to_owned(), vec![8192.0]), ("MemTotal".to_owned(), vec![131_072.0])].into_iter().collect();
        let text = causes(&samples, &kernel).unwrap();
        let at = |name: &str| text.find(name).unwrap();
        assert!(
            at("slab caches (8.00 MiB)") < at("kernel's image") && at("kernel's image") < at("struct page"),
            "{text}"
        );
        assert!(!text.contains("page tables"));
    }
}
