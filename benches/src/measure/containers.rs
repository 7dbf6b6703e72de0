//! What a container costs through containerd: its time from `ctr run` to its end, and an idle pod's memory.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use config::Config;

use super::smaps::{Usage, usage};
use super::{Samples, push, retry};

/// Name of our runtime at containerd.
const KATA: &str = "io.containerd.kata.v2";
/// Name of the peer.
const RUNC: &str = "io.containerd.runc.v2";
/// The program that is a pod's process.
const POD_PROGRAM: &str = "/usr/bin/containerd-shim-kata-v2";
/// containerd's namespace for what is measured here.
const NAMESPACE: &str = "tatami-bench";
/// How many pods share what can be shared.
const CROWD: usize = 10;

fn ctr(arguments: &[&str]) -> Result<Output> {
    let output = Command::new("ctr").args(["-n", NAMESPACE]).args(arguments).output().context("Cannot run ctr")?;
    if output.status.success() {
        return Ok(output);
    }
    bail!("ctr {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())
}

/// Lets a guest that does not boot, or hangs before its container is made, fail after `limit` seconds instead of half a
/// minute or a whole one, which under the virtual clock last an hour; and has timelines written to a directory.
///
/// # Errors
/// When the runtime's configuration cannot be written.
pub fn configure(limit: u16, timelines: Option<&Path>) -> Result<()> {
    const FILE: &str = "/etc/kata-containers/configuration.toml";
    let agent = format!("[agent.kata]\nreconnect_timeout_ms = {limit}000\ncreate_container_timeout = {limit}\n");
    let runtime = timelines.map(|path| format!("[runtime]\ntimeline_dir = \"{}\"\n", path.display()));
    let text = agent + &runtime.unwrap_or_default();
    fs::create_dir_all("/etc/kata-containers")
        .and_then(|()| fs::write(FILE, text))
        .with_context(|| format!("Cannot write {FILE}"))
}

/// Imports an OCI archive and answers the image's name.
///
/// # Errors
/// When containerd refuses it.
pub fn import(archive: &Path) -> Result<String> {
    ctr(&["image", "import", &archive.to_string_lossy()])?;
    let images = String::from_utf8_lossy(&ctr(&["image", "ls", "-q"])?.stdout).into_owned();
    images.lines().next().map(str::to_owned).context("The archive holds no image")
}

/// Runs `true` in a container by both runtimes, one after the other: first a round that is thrown away, then `rounds`
/// that count. Samples `kata` and `runc`, in milliseconds.
///
/// # Errors
/// When a container fails.
pub fn measure_run(image: &str, rounds: usize) -> Result<Samples> {
    let mut samples = Samples::new();
    for round in 0..=rounds {
        for (name, runtime) in [("kata", KATA), ("runc", RUNC)] {
            let took = retry(|| timed_run(runtime, image, &format!("bench-{name}")))?;
            if round > 0 {
                push(&mut samples, name, took);
            }
        }
    }
    Ok(samples)
}

/// Milliseconds that `ctr run` takes.
fn timed_run(runtime: &str, image: &str, id: &str) -> Result<f64> {
    let start = Instant::now();
    ctr(&["run", "--rm", "--runtime", runtime, image, id, "true"]).inspect_err(|_| remove(id))?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Removes whatever there is of a container.
fn remove(id: &str) {
    // What is not there cannot be removed; the failure before is the one to tell.
    let _ = ctr(&["task", "kill", "-s", "KILL", id]);
    let _ = ctr(&["task", "delete", "--force", id]);
    let _ = ctr(&["container", "delete", id]);
}

/// A guest's `/proc/meminfo`, as a container sees it, in KiB by name.
///
/// # Errors
/// When the container fails.
pub fn measure_meminfo(image: &str) -> Result<Samples> {
    const ID: &str = "bench-meminfo";
    let run = || ctr(&["run", "--rm", "--runtime", KATA, image, ID, "cat", "/proc/meminfo"]);
    let output = retry(|| run().inspect_err(|_| remove(ID)))?;
    Ok(parse_meminfo(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_meminfo(text: &str) -> Samples {
    let mut samples = Samples::new();
    for line in text.lines() {
        let value = line.split_once(':').map(|(name, rest)| (name, rest.split_whitespace().next()));
        if let Some((name, Some(Ok(value)))) = value.map(|(name, value)| (name, value.map(str::parse))) {
            push(&mut samples, name, value);
        }
    }
    samples
}

/// Memory of the processes of ten idle pods, in KiB each: samples `pod rss`, `pod pss` (guest memory left out) and
/// `pod guest`.
///
/// # Errors
/// When a pod does not start; those that run are removed in any case.
pub fn measure_pods(image: &str) -> Result<Samples> {
    let names: Vec<String> = (0..CROWD).map(|number| format!("bench-pod-{number}")).collect();
    let start = |name: &String| ctr(&["run", "-d", "--runtime", KATA, image, name, "sleep", "1000000"]);
    let started = names.iter().try_for_each(|name| retry(|| start(name).inspect_err(|_| remove(name))).map(drop));
    let measured = started.and_then(|()| pods());
    for name in &names {
        remove(name);
    }
    measured
}

fn pods() -> Result<Samples> {
    let mut samples = Samples::new();
    for memory in pod_processes()? {
        push(&mut samples, "pod rss", memory.own_rss as f64);
        push(&mut samples, "pod pss", memory.own_pss as f64);
        push(&mut samples, "pod guest", memory.guest as f64);
    }
    match samples.get("pod pss").map(Vec::len) {
        Some(CROWD) => Ok(samples),
        found => bail!("{} of {CROWD} pods have a process with guest memory", found.unwrap_or_default()),
    }
}

/// The memory of each pod process of this machine.
///
/// # Errors
/// When the configuration, which says how much memory guests have, or a process cannot be read.
pub fn pod_processes() -> Result<Vec<Usage>> {
    let guest_size =
        Config::load(None).context("Cannot read the runtime's configuration")?.0.hypervisor.default_memory / 1024;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("Cannot read /proc")? {
        let entry = entry.context("Cannot read /proc")?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        if fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == Path::new(POD_PROGRAM)) {
            // Other processes of that program own no guest memory.
            found.extend(Some(usage(pid, guest_size)?).filter(|memory| memory.guest > 0));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_by_name_in_kib() {
        let samples = parse_meminfo("MemTotal:         114680 kB\nHugePages_Total:       0\nbroken\n");
        assert_eq!(samples["MemTotal"], [114_680.0]);
        assert_eq!(samples["HugePages_Total"], [0.0]);
        assert_eq!(samples.len(), 2);
    }
}
