//! `suites`: the end-to-end suites, run as root on the machine under test.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use libtest_mimic::{FormatSetting, Trial};
use nix::sys::signal::Signal;
use tests::cases::{self, devices::HostDevices};
use tests::containerd::{PAUSE, Purpose};
use tests::context::{BUSYBOX, Context, DEBIAN, Images, KATA, RUNC};
use tests::cri::{ContainerSpec, PodSpec};
use tests::ctr::Ctr;
use tests::docker::{self, Docker};
use tests::event::Deadline;
use tests::harness::{Case, trial};
use tests::leftovers::{Scope, Snapshot, describe, settle};
use tests::second_chance::SecondChances;
use tests::stack::{Options, Stack, search_path};

/// Drives a real containerd through everything that its users rely on, and looks for leftovers after each case.
///
/// Run it as root on the machine under test. Give `--containerd` to let it start a containerd of its own
/// (recommended: nothing of the machine's is touched), or `--address` to use one that runs.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  \
        suites --containerd /usr/bin/containerd --images target/images\n  \
        suites --containerd /usr/bin/containerd --images target/images --runtime io.containerd.runc.v2 stdio\n  \
        suites --list"
)]
struct Arguments {
    #[command(flatten)]
    stack: Options,
    /// The runtime under test.
    #[arg(long, default_value = KATA)]
    runtime: String,
    /// The CPUs are QEMU's emulation, which kills a guest now and then: run a case that failed so once more, and say so.
    #[arg(long)]
    emulated: bool,
    /// The PCI address of a device that containers may have; it is given to vfio-pci. Can be repeated.
    #[arg(long, value_name = "ADDRESS", requires = "passthrough")]
    device: Vec<String>,
    /// The static program by which containers use such devices.
    #[arg(long, value_name = "FILE", requires = "device")]
    passthrough: Option<PathBuf>,
    /// Run the cases of pods, too: containerd then serves the CRI.
    #[arg(long, requires = "containerd")]
    pods: bool,
    /// Leave out what any other containerd shows as well.
    #[arg(long)]
    containerd_alone: bool,
    /// Run the cases of long runs, too, those without an end of their own for so many minutes.
    #[arg(long, value_name = "MINUTES", requires = "pods")]
    soak: Option<u32>,
    /// Run the cases of docker, too, with the programs of this directory.
    #[arg(long, value_name = "DIRECTORY", requires = "containerd")]
    docker: Option<PathBuf>,
    /// Tell the results as JSON, one event a line.
    #[arg(long)]
    json: bool,
    /// Reads standard input to its end and does nothing else: a process for the leftover check to catch.
    #[arg(long, hide = true)]
    wait_for_end_of_input: bool,
    /// Name the cases and run none.
    #[arg(long)]
    list: bool,
    /// FILTER is a case's whole name.
    #[arg(long)]
    exact: bool,
    /// Leave out the cases whose names contain this (may be given several times).
    #[arg(long, value_name = "TEXT")]
    skip: Vec<String>,
    /// Run only the cases whose names contain this.
    filter: Option<String>,
}

impl Arguments {
    /// Whether the case is among those that are asked for.
    fn will_run(&self, case: &Case) -> bool {
        let name = case.name;
        let wanted = |filter: &String| if self.exact { name == filter } else { name.contains(filter.as_str()) };
        let selected = self.filter.as_ref().is_none_or(wanted) && !self.skip.iter().any(wanted);
        selected && !(self.containerd_alone && case.whatever_containerd)
    }

    fn harness(&self) -> libtest_mimic::Arguments {
        libtest_mimic::Arguments {
            // Cases look at the whole machine: one at a time.
            test_threads: Some(1),
            format: self.json.then_some(FormatSetting::Json),
            list: self.list,
            exact: self.exact,
            skip: self.skip.clone(),
            filter: self.filter.clone(),
            ..libtest_mimic::Arguments::default()
        }
    }
}

/// Where everything of a run lives.
const WORK: &str = "/run/tatami-suites";

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.wait_for_end_of_input {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(nix::unistd::geteuid().is_root() || arguments.list, "Run the suites as root: they drive containerd");
    let work = Path::new(WORK).join(std::process::id().to_string());
    let result = run(&arguments, &work);
    // Only what a failed case left there keeps it.
    std::fs::remove_dir_all(&work).ok();
    std::fs::remove_dir(WORK).ok();
    result
}

fn run(arguments: &Arguments, work: &Path) -> Result<ExitCode> {
    if arguments.list {
        let trials = cases::all().into_iter().map(|case| Trial::test(case.name, || Ok(()))).collect();
        return Ok(libtest_mimic::run(&arguments.harness(), trials).exit_code());
    }
    let namespace = format!("suites-{}", std::process::id());
    let purpose = if arguments.pods { Purpose::Pods } else { Purpose::Containers };
    let stack = Stack::new(&arguments.stack, purpose, &arguments.runtime, &namespace, work)?;
    let mut context = context(arguments, work, stack)?;
    let cases = cases::all();
    let services = || cases.iter().filter(|case| case.services && arguments.will_run(case));
    prepare(&context, services().any(|case| !case.pods))?;
    if arguments.pods {
        prepare_pods(&context, services().any(|case| case.pods))?;
    }
    if let Some(programs) = &arguments.docker {
        context.docker = Some(prepare_docker(&context, programs, &work.join("docker"))?);
    }
    let (scope, patience) = (context.scope.clone(), context.within(10));
    let namespaces = [context.stack.ctr.clone(), context.other_namespace()];
    let before = Snapshot::take(&scope)?;
    let context = Arc::new(Mutex::new(context));
    let trials = cases.into_iter().map(|case| trial(case, &context)).collect();
    let conclusion = libtest_mimic::run(&arguments.harness(), trials);
    for again in context.lock().unwrap_or_else(PoisonError::into_inner).second_chances.taken() {
        eprintln!("It had a second chance on emulated processors: {again}");
    }
    let left = settle(&before, &scope, Deadline::after(patience))?;
    release(namespaces.each_ref());
    if !left.is_empty() {
        bail!("After the whole run something stays behind{}", describe(&left));
    }
    Ok(conclusion.exit_code())
}

fn context(arguments: &Arguments, work: &Path, stack: Stack) -> Result<Context> {
    let (root, state) = stack.directories();
    let mut scope = Scope::containerd(&stack.ctr.namespace, &root, &state);
    scope.daemon = stack.own.as_ref().map(|own| own.config().display().to_string());
    if arguments.runtime != KATA {
        // runc's shim leaves its socket there when it is killed; that is not ours to judge.
        scope.directories.retain(|(directory, _)| directory != Path::new("/run/containerd/s"));
    }
    let images = Images {
        busybox: arguments.stack.images.join("busybox.tar"),
        debian: arguments.stack.images.join("debian.tar"),
        pause: arguments.stack.images.join("pause.tar"),
    };
    let (work, slowness) = (work.join("case"), arguments.stack.slowness);
    let mut context = Context::new(stack, &search_path(&arguments.stack), scope, images, &work, slowness)?;
    context.devices = arguments.passthrough.clone().map(|program| {
        let addresses = arguments.device.clone();
        HostDevices { addresses, program }
    });
    context.storage_check = std::env::current_exe()?.with_file_name("storage-check");
    context.second_chances = SecondChances::new(arguments.emulated);
    context.pods = arguments.pods;
    context.containerd_alone = arguments.containerd_alone;
    context.soak = arguments.soak.map(|minutes| Duration::from_secs(60) * minutes);
    Ok(context)
}

/// Imports the images and runs one container of each, so that what the first one makes for all is there.
fn prepare(context: &Context, services: bool) -> Result<()> {
    let other = context.other_namespace();
    let mut wanted = vec![(&context.ctr, BUSYBOX, &context.images.busybox), (&other, BUSYBOX, &context.images.busybox)];
    if services {
        wanted.push((&context.ctr, DEBIAN, &context.images.debian));
    }
    for (ctr, image, archive) in wanted {
        ctr.import(archive)?;
        let id = context.id("warm-up");
        let ran = ctr.with_runtime(RUNC).run(&[], image, &id, &["true"])?.expect_code(0);
        ran.with_context(|| format!("runc cannot run {image} on this machine"))?;
    }
    Ok(())
}

/// Imports the images for pods and runs one. containerd's CRI knows them for certain when it has started again: it learns
/// of others' images a while after they came.
fn prepare_pods(context: &Context, services: bool) -> Result<()> {
    let Images { pause, busybox, debian } = &context.images;
    let mut wanted = vec![(PAUSE, pause), (BUSYBOX, busybox)];
    if services {
        wanted.push((DEBIAN, debian));
    }
    let ctr = context.of_pods();
    wanted.iter().try_for_each(|(_, archive)| ctr.import(archive))?;
    context.restart_containerd(Signal::SIGTERM, || Ok(()))?;
    context.cri.expect_ready()?;
    let images = context.cri.images()?;
    ensure!(wanted.iter().all(|(image, _)| images.iter().any(|known| known == image)), "{images:?}");
    // What the first pod makes for all is there then.
    let pod = context.cri.run_pod(PodSpec::new("warm-up", &context.work))?;
    pod.run(ContainerSpec::new("warm-up", BUSYBOX, &["true"]))?.ended()?;
    pod.remove()?;
    std::fs::remove_file(context.work.join("warm-up.log")).context("The first container has no log")
}

/// Starts docker, loads the image and runs a container of it, so that what the first one makes for all is there.
fn prepare_docker(context: &Context, programs: &Path, directory: &Path) -> Result<Docker> {
    let ctr = &context.ctr;
    let docker = Docker::start(programs, &ctr.address, directory, &ctr.runtime, context.within(60))?;
    docker.ok(&["load", "--input", &context.images.busybox.display().to_string()])?;
    let ran = docker.ok(&["run", "--rm", docker::BUSYBOX, "true"]);
    ran.with_context(|| format!("docker cannot run containers on this machine; {}", docker.log_end()))?;
    Ok(docker)
}

/// Gives the machine's containerd its namespaces back; one of our own ends anyway.
fn release(namespaces: [&Ctr; 2]) {
    for ctr in namespaces {
        for image in [BUSYBOX, DEBIAN] {
            ctr.any(&["image", "rm", "--sync", image]).ok();
        }
        ctr.any(&["namespace", "rm", &ctr.namespace]).ok();
    }
}
