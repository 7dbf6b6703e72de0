//! `demo`: real OCI images in virtual machines, run as root on the machine under test.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use tests::containerd::Purpose;
use tests::context::{BUSYBOX, DEBIAN, KATA};
use tests::ctr::Ctr;
use tests::process::Finished;
use tests::stack::{Options, Stack};
use timeline::Timeline;

/// Runs busybox and redis in virtual machines and shows their output and a timeline of the boot.
///
/// Run it as root on the machine under test.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    stack: Options,
    /// Where to write the timelines (JSON and SVG).
    #[arg(long, value_name = "DIRECTORY", default_value = "target/run")]
    report: PathBuf,
}

/// Where everything of a run lives.
const WORK: &str = "/run/tatami-demo";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(nix::unistd::geteuid().is_root(), "Run the demonstration as root: it drives containerd");
    fs::create_dir_all(&arguments.report).with_context(|| format!("Cannot create {}", arguments.report.display()))?;
    let work = Path::new(WORK).join(std::process::id().to_string());
    let result = show(&arguments, &work);
    fs::remove_dir_all(&work).ok();
    fs::remove_dir(WORK).ok();
    result
}

fn show(arguments: &Arguments, work: &Path) -> Result<()> {
    let stack = Stack::new(&arguments.stack, Purpose::Containers, KATA, "demo", work)?;
    let timelines = work.join("timelines");
    fs::create_dir_all(&timelines)?;
    let directory = toml::Value::String(timelines.display().to_string()).to_string();
    let changed = stack.config.with(&[("runtime.timeline_dir", &directory)])?;
    heading("Import the images");
    for archive in ["busybox.tar", "debian.tar"] {
        let path = arguments.stack.images.join(archive);
        stack.ctr.import(&path)?;
        println!("{}", path.display());
    }
    busybox(&stack.ctr)?;
    redis(&stack.ctr)?;
    boot(&timelines, &arguments.report)?;
    drop(changed);
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// Shows a command as a user would type it, and how it went.
fn tell(ctr: &Ctr, arguments: &[&str], run: impl FnOnce() -> Result<Finished>) -> Result<String> {
    println!("# ctr {}", arguments.join(" "));
    let begun = Instant::now();
    let finished = run()?;
    let (text, errors) = (finished.text(), finished.error_text());
    for line in text.lines().chain(errors.lines()) {
        // A program that overwrites its line (redis-benchmark -q) shows its last state.
        println!("{}", line.trim_end().rsplit('\r').next().unwrap_or_default().trim_end());
    }
    // `task delete --force` answers the exit code of what it killed.
    let killed = arguments.contains(&"--force") && finished.code == 137;
    if finished.code != 0 && !killed {
        bail!("ctr {} ended with {} (runtime {})", arguments.join(" "), finished.code, ctr.runtime);
    }
    println!("  ({} ms)", begun.elapsed().as_millis());
    Ok(text)
}

fn told(ctr: &Ctr, arguments: &[&str]) -> Result<String> {
    tell(ctr, arguments, || ctr.any(arguments))
}

fn busybox(ctr: &Ctr) -> Result<()> {
    heading("A container in its own virtual machine: busybox");
    let host = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let guest = told(ctr, &["run", "--rm", "--runtime", KATA, BUSYBOX, "hello", "uname", "-r"])?;
    println!("The host's kernel is {host}, the container's is {guest}.");
    ensure!(!guest.is_empty() && guest != host, "The container ran on the host's kernel");
    Ok(())
}

fn redis(ctr: &Ctr) -> Result<()> {
    heading("A service: redis, and its benchmark by exec");
    let server = ["redis-server", "--save", "", "--appendonly", "no", "--dir", "/tmp"];
    let start = [&["run", "-d", "--runtime", KATA, DEBIAN, "redis"], &server[..]].concat();
    let result = told(ctr, &start).and_then(|_| benchmark(ctr));
    if result.is_err() {
        // Whatever came of it, the container goes; the first error is the one to tell.
        ctr.sweep().ok();
        return result;
    }
    told(ctr, &["task", "delete", "--force", "redis"])?;
    told(ctr, &["container", "delete", "redis"]).map(drop)
}

fn benchmark(ctr: &Ctr) -> Result<()> {
    let ready = "until redis-cli ping 2>/dev/null | grep -q PONG; do :; done";
    ctr.ok(&["task", "exec", "--exec-id", "ready", "redis", "bash", "-c", ready])?;
    let run =
        ["task", "exec", "--exec-id", "benchmark", "redis", "redis-benchmark", "-q", "-n", "1000", "-t", "set,get"];
    let text = told(ctr, &run)?;
    ensure!(text.contains("SET:") && text.contains("GET:"), "redis-benchmark measured nothing");
    told(ctr, &["task", "ls"]).map(drop)
}

/// The timelines that the runtime wrote; the first container's is shown.
fn boot(timelines: &Path, report: &Path) -> Result<()> {
    heading("From `ctr run` to the container: the timeline of busybox");
    let mut shown = false;
    for id in ["hello", "redis"] {
        let path = timelines.join(format!("{id}.json"));
        let text = fs::read_to_string(&path).with_context(|| format!("The runtime wrote no {}", path.display()))?;
        let timeline = Timeline::from_json(&text)?;
        if !shown {
            print!("{}", timeline.text());
            shown = true;
        }
        fs::write(report.join(format!("timeline-{id}.svg")), timeline.svg())?;
        fs::write(report.join(format!("timeline-{id}.json")), text)?;
    }
    println!("Drawings: timeline-hello.svg and timeline-redis.svg in the report's directory.");
    Ok(())
}
