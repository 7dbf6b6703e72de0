//! What a pod costs through containerd's CRI: from the request for the pod to the first byte of its container, alone and
//! together with others, and in memory.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use tests::containerd::{Containerd, PAUSE, Purpose};
use tests::context::BUSYBOX;
use tests::cri::{ContainerSpec, Cri, Pod, PodSpec};
use tests::ctr::Ctr;
use tests::event::{Deadline, Watch, readable};
use timeline::{Lane, Timeline};

use super::{Samples, containers, push, retry};

/// Runtime handlers that are compared.
pub const HANDLERS: [&str; 2] = ["kata", "runc"];
/// How many pods are made at once.
pub const CROWD: usize = 20;
/// containerd's namespace for pods.
const NAMESPACE: &str = "k8s.io";
/// A guard against hangs, in the machine's time: no measurement ends by it.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the samples of our hops are called, before their own names.
pub const HOP: &str = "hop ";
/// The stamp of the last hop that a client waits for.
const LAST_HOP: &str = "first output";
/// How many containers a pod gets beyond its first when their memory is measured.
const FURTHER: usize = 20;

/// Makes pods with one container by both runtimes, one after the other: first a round that is thrown away, then `rounds`
/// that count; then [`CROWD`] of each at once, `crowds` times. Samples `HANDLER pod` and `HANDLER crowd`, in milliseconds;
/// [`HOP`] and a name for each hop of ours; and in KiB `pod pss` of a pod process with one container, and `container pss`,
/// by which that grows with each further one.
///
/// # Errors
/// When a pod fails.
pub fn measure(archives: &[&Path], rounds: usize, crowds: usize, limit: u16) -> Result<Samples> {
    let directory = tempfile::tempdir().context("Cannot make a directory")?;
    let timelines = directory.path().join("timelines");
    std::fs::create_dir(&timelines).context("Cannot make a directory")?;
    containers::configure(limit, Some(&timelines))?;
    let deadline = Deadline::after(PATIENCE);
    let place = directory.path().join("containerd");
    let containerd = Containerd::start(Path::new("containerd"), &place, Purpose::Pods, &[], deadline)?;
    let ctr = Ctr {
        program: "ctr".into(),
        address: containerd.address(),
        namespace: NAMESPACE.to_owned(),
        runtime: String::new(),
        patience: PATIENCE,
    };
    archives.iter().try_for_each(|archive| ctr.import(archive))?;
    // The CRI learns of others' images when it starts.
    containerd.restart(Signal::SIGTERM, || Ok(()), Deadline::after(PATIENCE))?;
    let cri = Cri::connect(&containerd.address(), HANDLERS[0], PATIENCE)?;
    cri.expect_ready()?;
    let images = cri.images()?;
    ensure!([PAUSE, BUSYBOX].iter().all(|image| images.iter().any(|known| known == image)), "Not imported: {images:?}");
    let mut samples = Samples::new();
    for round in 0..=rounds {
        for handler in HANDLERS {
            let (took, id) = retry(|| alone(&cri, handler, directory.path()))?;
            if round > 0 {
                push(&mut samples, &format!("{handler} pod"), took);
                if handler == HANDLERS[0] {
                    hops(&timelines.join(format!("{id}.json")), &mut samples)?;
                }
            }
        }
    }
    memory(&cri, directory.path(), &mut samples)?;
    for _ in 0..crowds {
        for handler in HANDLERS {
            push(&mut samples, &format!("{handler} crowd"), retry(|| together(&cri, handler, directory.path()))?);
        }
    }
    Ok(samples)
}

/// Milliseconds until the first byte of one pod, and its id.
fn alone(cri: &Cri, handler: &str, directory: &Path) -> Result<(f64, String)> {
    let start = Instant::now();
    let (pod, at) = first_byte(cri, handler, "pod", directory)?;
    let id = pod.id.clone();
    pod.remove()?;
    Ok(((at - start).as_secs_f64() * 1e3, id))
}

/// The host's hops of a pod that has ended, up to the last that a client waits for, in milliseconds.
fn hops(path: &Path, samples: &mut Samples) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("Cannot read {}", path.display()))?;
    let timeline = Timeline::from_json(&text)?;
    for (name, took) in timeline.hops(Lane::Host) {
        push(samples, &format!("{HOP}{name}"), took as f64 / 1e6);
        if name == LAST_HOP {
            return Ok(());
        }
    }
    bail!("{} has no hop {LAST_HOP:?}", path.display())
}

/// What the process of a pod has with one container, and how much more with each further one.
fn memory(cri: &Cri, directory: &Path, samples: &mut Samples) -> Result<()> {
    let (pod, _) = retry(|| first_byte(cri, HANDLERS[0], "pod", directory))?;
    let measured = pod_pss().and_then(|one| {
        for number in 0..FURTHER {
            pod.run(ContainerSpec::new(&format!("further-{number}"), BUSYBOX, &["sleep", "1000000"]))?;
        }
        Ok((one, pod_pss()?))
    });
    pod.remove()?;
    let (one, many) = measured?;
    push(samples, "pod pss", one);
    push(samples, "container pss", (many - one) / FURTHER as f64);
    Ok(())
}

/// The only pod's, in KiB.
fn pod_pss() -> Result<f64> {
    let found = containers::pod_processes()?;
    ensure!(found.len() == 1, "{} pods have a process with guest memory", found.len());
    Ok(found[0].own_pss as f64)
}

/// Milliseconds until the first byte of the last of many pods.
fn together(cri: &Cri, handler: &str, directory: &Path) -> Result<f64> {
    let start = Instant::now();
    let names: Vec<String> = (0..CROWD).map(|number| format!("pod-{number}")).collect();
    let made: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            names.iter().map(|name| scope.spawn(move || first_byte(cri, handler, name, directory))).collect();
        threads.into_iter().map(|thread| thread.join().ok().context("A thread panicked").flatten()).collect()
    });
    let mut last: Result<Instant> = Ok(start);
    for pod in made {
        // All that were made are removed, whatever the first error is.
        let ended = pod.and_then(|(pod, at)| pod.remove().map(|()| at));
        last = last.and_then(|last| Ok(ended?.max(last)));
    }
    Ok((last? - start).as_secs_f64() * 1e3)
}

/// Makes a pod with a container that says something; answers when that was in its log.
fn first_byte<'a>(cri: &'a Cri, handler: &str, name: &str, directory: &Path) -> Result<(Pod<'a>, Instant)> {
    let logs = tempfile::tempdir_in(directory).context("Cannot make a directory")?;
    let watch = Watch::new()?;
    watch.add(logs.path())?;
    let pod = cri.run_pod_with(PodSpec::new(name, logs.path()), handler)?;
    let said = pod.run(ContainerSpec::new("one", BUSYBOX, &["sh", "-c", "echo started; exec sleep 1000000"]));
    let said = said.and_then(|container| {
        let deadline = Deadline::after(PATIENCE);
        while std::fs::metadata(&container.log).map_or(0, |log| log.len()) == 0 {
            readable(watch.as_fd(), "the container's first byte", deadline)?;
            watch.drain();
        }
        Ok(Instant::now())
    });
    match said {
        Ok(at) => Ok((pod, at)),
        Err(error) => {
            // The error before is the one to tell.
            let _ = pod.remove();
            Err(error)
        }
    }
}
