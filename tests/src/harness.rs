//! Runs cases one after another, each between two looks at the machine.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow, bail};
use libtest_mimic::{Failed, Trial};

use crate::context::Context;
use crate::docker::Docker;
use crate::event::Deadline;
use crate::leftovers::{Snapshot, Thing, describe, settle};

/// One behaviour that a user of containerd relies on.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The behaviour as a sentence, after the name of its group.
    pub name: &'static str,
    /// Which runtimes it is about.
    pub about: About,
    /// Whether it needs the image with real services, which takes long to unpack.
    pub services: bool,
    /// Whether it needs devices of the machine for its containers.
    pub devices: bool,
    /// Whether it makes pods through the CRI.
    pub pods: bool,
    /// Whether it makes containers through docker.
    pub docker: bool,
    /// Whether it shows something that no version of containerd changes.
    pub whatever_containerd: bool,
    /// Whether it takes far longer than others, and runs only when that is asked for.
    pub soak: bool,
    /// Shows that it holds.
    pub run: fn(&Context) -> Result<()>,
}

/// Which runtimes a case is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// Every runtime of containerd: it must hold for runc too.
    Any,
    /// Only a runtime with virtual machines, or this stack's own files.
    Kata,
}

impl Case {
    /// A case about every runtime.
    #[must_use]
    pub const fn any(name: &'static str, run: fn(&Context) -> Result<()>) -> Self {
        Self {
            name,
            about: About::Any,
            services: false,
            devices: false,
            pods: false,
            docker: false,
            whatever_containerd: false,
            soak: false,
            run,
        }
    }

    /// The same case, with the image of real services.
    #[must_use]
    pub const fn with_services(self) -> Self {
        Self { services: true, ..self }
    }

    /// The same case, with pods.
    #[must_use]
    pub const fn with_pods(self) -> Self {
        Self { pods: true, ..self }
    }

    /// The same case, which any one containerd can show.
    #[must_use]
    pub const fn whatever_containerd(self) -> Self {
        Self { whatever_containerd: true, ..self }
    }

    /// The same case with pods, as part of the long run.
    #[must_use]
    pub const fn for_soak(self) -> Self {
        Self { pods: true, soak: true, ..self }
    }

    /// A case about every runtime, with docker.
    #[must_use]
    pub const fn with_docker(name: &'static str, run: fn(&Context) -> Result<()>) -> Self {
        Self { docker: true, ..Self::any(name, run) }
    }

    /// A case about this stack alone, for machines with devices that containers may have.
    #[must_use]
    pub const fn with_devices(name: &'static str, run: fn(&Context) -> Result<()>) -> Self {
        Self { devices: true, ..Self::kata(name, run) }
    }

    /// A case about this stack alone.
    #[must_use]
    pub const fn kata(name: &'static str, run: fn(&Context) -> Result<()>) -> Self {
        Self { about: About::Kata, ..Self::any(name, run) }
    }
}

/// Makes a trial of a case. Trials share the machine: they run one at a time, whatever the caller's threads.
#[must_use]
pub fn trial(case: Case, context: &Arc<Mutex<Context>>) -> Trial {
    let context = Arc::clone(context);
    let of_other_machine = {
        let context = context.lock().unwrap_or_else(PoisonError::into_inner);
        let lacks = case.devices && context.devices.is_none() || case.pods && !context.pods;
        let lacks = lacks || case.docker && context.docker.is_none() || case.soak && context.soak.is_none();
        let lacks = lacks || case.whatever_containerd && context.containerd_alone;
        lacks || case.about == About::Kata && !context.is_kata()
    };
    Trial::test(case.name, move || {
        let context = context.lock().unwrap_or_else(PoisonError::into_inner);
        let before = Snapshot::take(&context.scope).map_err(|error| format!("{error:#}"))?;
        let Err(failure) = attempt(&case, &context) else { return Ok(()) };
        if !context.second_chances.take(case.name, &failure) {
            return Err(Failed::from(failure));
        }
        eprintln!("{}: again, for the emulation may have killed its guest: {failure}", case.name);
        let tidied = Snapshot::take(&context.scope).and_then(|now| remove_fifos(&now.since(&before), Path::new(FIFOS)));
        tidied.map_err(|error| format!("{error:#}"))?;
        attempt(&case, &context).map_err(|again| Failed::from(format!("{failure}\n\nand then again: {again}")))
    })
    .with_ignored_flag(of_other_machine)
}

/// Where `ctr` makes the FIFOs of its containers.
const FIFOS: &str = "/run/containerd/fifo";

/// Removes what a `ctr` leaves that was ended while it waited for a guest: the FIFOs that it made for its container, which
/// nobody else removes. Of `things`, that is what lies below `fifos`.
fn remove_fifos(things: &[Thing], fifos: &Path) -> Result<()> {
    // A directory comes before what is in it.
    for thing in things.iter().rev() {
        if let Thing::File { path } = thing
            && path.starts_with(fifos)
        {
            let removed = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
            removed.with_context(|| format!("{} of an ended client cannot be removed", path.display()))?;
        }
    }
    Ok(())
}

/// Runs a case. A failure is told with what containerd logged, and the reason is said last: the end of an output is what
/// is read first, and may be all that is kept.
fn attempt(case: &Case, context: &Context) -> std::result::Result<(), String> {
    guarded(case, context).map_err(|error| format!("{}{error:#}", log_since(context)))
}

/// Runs a case and then the one check for leftovers; both may have something to say.
fn guarded(case: &Case, context: &Context) -> Result<()> {
    let before = Snapshot::take(&context.scope)?;
    mark_log(context);
    let result = (case.run)(context);
    let pods = if case.pods { sweep_pods(context) } else { Ok(Vec::new()) };
    let docker = context.docker.as_ref().filter(|_| case.docker).map_or_else(|| Ok(Vec::new()), Docker::sweep);
    let swept =
        [pods, docker, context.ctr.sweep(), context.other_namespace().sweep()].into_iter().collect::<Result<Vec<_>>>();
    let files = empty(&context.work);
    let left = settle(&before, &context.scope, Deadline::after(context.within(10)))?;
    let docker_log = || context.docker.as_ref().filter(|_| case.docker).map(Docker::log_end).unwrap_or_default();
    result.with_context(docker_log)?;
    let swept = swept.context("containerd does not answer after the case")?.concat();
    if !swept.is_empty() {
        bail!("The case left containers: {}", swept.join(", "));
    }
    files.context("The case's own files cannot be removed")?;
    if left.is_empty() { Ok(()) } else { Err(anyhow!("Something stays behind{}", describe(&left))) }
}

/// Removes pods; what they had in containerd's store goes when it looks for garbage, and that may be long after.
fn sweep_pods(context: &Context) -> Result<Vec<String>> {
    let swept = context.cri.sweep()?;
    context.of_pods().collect_garbage()?;
    Ok(swept)
}

fn empty(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Where containerd's log ended when the case began.
static LOG_START: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
/// Lines of containerd's log that a failure shows.
const LOG_LINES: usize = 25;

fn mark_log(context: &Context) {
    let length = context.log().and_then(|log| fs::metadata(log).ok()).map_or(0, |data| data.len());
    LOG_START.store(length, std::sync::atomic::Ordering::Relaxed);
}

/// What containerd and the shims logged at warning or above, or ended with, during the case.
fn log_since(context: &Context) -> String {
    let Some(log) = context.log().and_then(|log| fs::read(log).ok()) else { return String::new() };
    let start = usize::try_from(LOG_START.load(std::sync::atomic::Ordering::Relaxed)).unwrap_or(0).min(log.len());
    let text = String::from_utf8_lossy(&log[start..]);
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains("level=debug")).collect();
    let shown = lines.iter().skip(lines.len().saturating_sub(LOG_LINES));
    shown.fold("containerd's log:\n".to_owned(), |all, line| all + "  " + line + "\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fifos_of_clients_are_removed_and_their_directories_after_them() {
        let root = tempfile::tempdir().unwrap();
        let (fifos, other) = (root.path().join("fifo"), root.path().join("other"));
        fs::create_dir_all(fifos.join("1")).unwrap();
        let files = [fifos.join("1/box-stdin"), fifos.join("1/box-stdout"), other];
        files.iter().for_each(|file| fs::write(file, "").unwrap());
        let mut things: Vec<_> =
            files.iter().chain([&fifos.join("1")]).map(|path| Thing::File { path: path.clone() }).collect();
        things.sort();
        remove_fifos(&things, &fifos).unwrap();
        assert!(files[2].exists() && fifos.exists() && !fifos.join("1").exists());
    }
}
