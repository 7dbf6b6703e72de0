//! `suites`: the end-to-end suites, run as root on the machine under test.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use libtest_mimic::FormatSetting;
use tests::cases;
use tests::containerd::Containerd;
use tests::context::{BUSYBOX, Context, DEBIAN, Images, KATA, RUNC};
use tests::ctr::Ctr;
use tests::event::Deadline;
use tests::harness::trial;
use tests::kata_config::{KataConfig, OVERRIDE};
use tests::leftovers::{Scope, Snapshot, describe, settle};

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
    /// The containerd to start, with its own root, state and socket; `ctr` is taken from beside it.
    #[arg(long, value_name = "PATH", conflicts_with = "address")]
    containerd: Option<PathBuf>,
    /// Socket of a containerd that runs; the configuration file is then /etc/kata-containers/configuration.toml.
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// The ctr program.
    #[arg(long, value_name = "PATH")]
    ctr: Option<PathBuf>,
    /// The runtime under test.
    #[arg(long, default_value = KATA)]
    runtime: String,
    /// Directory with busybox.tar and debian.tar, made by `rootfs-builder oci`.
    #[arg(long, value_name = "DIRECTORY", default_value = "target/images")]
    images: PathBuf,
    /// How many times slower than metal this machine is: all deadlines are multiplied by it.
    #[arg(long, value_name = "FACTOR", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    slowness: u32,
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
    let config = match arguments.containerd {
        Some(_) => work.join("configuration.toml"),
        None => PathBuf::from(OVERRIDE),
    };
    let own = start_containerd(arguments, work, &config)?;
    let context = context(arguments, work, &config, own.as_ref())?;
    if !arguments.list {
        prepare(&context)?;
    }
    let before = Snapshot::take(&context.scope)?;
    let scope = context.scope.clone();
    let patience = context.within(10);
    let namespaces = [context.ctr.clone(), context.other_namespace()];
    let context = Arc::new(Mutex::new(context));
    let trials = cases::all().into_iter().map(|case| trial(case, &context)).collect();
    let conclusion = libtest_mimic::run(&arguments.harness(), trials);
    if !arguments.list {
        let left = settle(&before, &scope, Deadline::after(patience))?;
        release(namespaces.each_ref());
        if !left.is_empty() {
            bail!("After the whole run something stays behind{}", describe(&left));
        }
    }
    Ok(conclusion.exit_code())
}

fn start_containerd(arguments: &Arguments, work: &Path, config: &Path) -> Result<Option<Containerd>> {
    let Some(program) = arguments.containerd.as_ref().filter(|_| !arguments.list) else { return Ok(None) };
    // The file exists from the beginning: the runtime must never look at another one.
    std::fs::create_dir_all(work).with_context(|| format!("Cannot create {}", work.display()))?;
    if let Ok(installed) = std::fs::read(tests::kata_config::DEFAULT) {
        std::fs::write(config, installed).context("Cannot copy the runtime's configuration")?;
    }
    let deadline = Deadline::after(Duration::from_secs(30) * arguments.slowness);
    Containerd::start(program, &work.join("containerd"), &[("KATA_CONF_FILE", config)], deadline).map(Some)
}

fn context(arguments: &Arguments, work: &Path, config: &Path, own: Option<&Containerd>) -> Result<Context> {
    let beside = arguments.containerd.as_ref().and_then(|program| program.parent()).map(|parent| parent.join("ctr"));
    let program = arguments.ctr.clone().or_else(|| beside.filter(|ctr| ctr.is_file()));
    let address = match (own, &arguments.address) {
        (Some(own), _) => own.address(),
        (None, Some(address)) => address.clone(),
        (None, None) if arguments.list => PathBuf::new(),
        (None, None) => bail!("Which containerd? Give --containerd PATH to start one, or --address SOCKET"),
    };
    let (root, state) = match own {
        Some(own) => (own.root(), own.state()),
        None => (PathBuf::from("/var/lib/containerd"), PathBuf::from("/run/containerd")),
    };
    let namespace = format!("suites-{}", std::process::id());
    let mut scope = Scope::containerd(&namespace, &root, &state);
    if arguments.runtime != KATA {
        // runc's shim leaves its socket there when it is killed; that is not ours to judge.
        scope.directories.retain(|(directory, _)| directory != Path::new("/run/containerd/s"));
    }
    let ctr = Ctr {
        program: program.unwrap_or_else(|| "ctr".into()),
        address,
        namespace,
        runtime: arguments.runtime.clone(),
        patience: Duration::from_secs(20) * arguments.slowness,
    };
    let images = Images { busybox: arguments.images.join("busybox.tar"), debian: arguments.images.join("debian.tar") };
    let log = own.map(Containerd::log);
    Context::new(ctr, scope, KataConfig::at(config), images, &work.join("case"), arguments.slowness, log)
}

/// Imports the images and runs one container of each, so that what the first one makes for all is there.
fn prepare(context: &Context) -> Result<()> {
    let other = context.other_namespace();
    context.ctr.import(&context.images.busybox)?;
    context.ctr.import(&context.images.debian)?;
    other.import(&context.images.busybox)?;
    for (ctr, image) in [(&context.ctr, BUSYBOX), (&context.ctr, DEBIAN), (&other, BUSYBOX)] {
        let id = context.id("warm-up");
        let ran = ctr.with_runtime(RUNC).run(&[], image, &id, &["true"])?.expect_code(0);
        ran.with_context(|| format!("runc cannot run {image} on this machine"))?;
    }
    Ok(())
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
