//! Pods whose containerd ends and starts again.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::{run_pod, script};
use crate::context::Context;
use crate::cri::api::{ContainerState, PodSandboxState};
use crate::cri::{Container, Pod, lines};
use crate::event::{Deadline, appears};
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("cri: pods go on while containerd ends and starts again, and no line of theirs is lost", lines_stay)
        .with_pods(),
    Case::any("soak: twenty pods go on while containerd is killed, and no line of theirs is lost", twenty).for_soak(),
    Case::any("cri: a container that ends while there is no containerd is told with its exit code", ends_meanwhile)
        .with_pods(),
];

/// Counts, says each number on both streams, and keeps it for others to see. It ends when it is asked to.
fn count(seconds_between: &str) -> String {
    format!(
        "trap 'exit 5' TERM; n=0; while :; do n=$((n+1)); echo out $n; echo err $n >&2; echo $n > /count; \
         sleep {seconds_between} & wait $!; done"
    )
}

/// A counting container that has begun.
fn counting<'a>(pod: &'a Pod<'_>, name: &str, seconds_between: &str) -> Result<Container<'a>> {
    let container = pod.run(script(name, &count(seconds_between)))?;
    container.shell("until [ -s /count ]; do sleep 0.1; done")?;
    Ok(container)
}

/// Waits until a counting container has counted further.
fn counts(container: &Container<'_>, further: u32) -> Result<()> {
    let wait = format!(
        "n=$(($(cat /count) + {further})); until [ \"$(cat /count)\" -ge $n ] 2> /dev/null; do sleep 0.1; done"
    );
    container.shell(&wait).map(drop)
}

/// Ends a counting container and looks for each line that it has written.
fn end_whole(container: &Container<'_>, least: usize) -> Result<()> {
    container.stop(1000)?;
    ensure!(container.status()?.exit_code == 5, "{:?}", container.status()?);
    let lines = lines(&container.log)?;
    for stream in ["stdout", "stderr"] {
        let told = lines.iter().filter(|line| line.stream == stream).map(|line| line.text.clone());
        let counted = (1..).map(|number| format!("{} {number}", &stream[3..]));
        let wrong = told.zip(counted).find(|(told, counted)| told != counted);
        ensure!(wrong.is_none(), "{stream}: {wrong:?}");
    }
    ensure!(lines.len() > least, "{} lines", lines.len());
    Ok(())
}

/// Both are as they were, and the container works on.
fn expect_alive(pod: &Pod<'_>, container: &Container<'_>, further: u32) -> Result<()> {
    ensure!(pod.status()?.state() == PodSandboxState::SandboxReady, "{:?}", pod.status()?);
    ensure!(container.status()?.state() == ContainerState::ContainerRunning, "{:?}", container.status()?);
    counts(container, further)
}

fn lines_stay(context: &Context) -> Result<()> {
    let pod = run_pod(context, "restarted")?;
    let container = counting(&pod, "counts", "0.05")?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        counts(&container, 10)?;
        context.restart_containerd(signal, || Ok(()))?;
        expect_alive(&pod, &container, 10)?;
    }
    end_whole(&container, 80)?;
    pod.remove()
}

fn twenty(context: &Context) -> Result<()> {
    let pods: Vec<_> = (0..20).map(|_| run_pod(context, "restarted")).collect::<Result<_>>()?;
    let counting = |(number, pod)| counting(pod, &format!("counts-{number}"), "1");
    let containers: Vec<_> = pods.iter().enumerate().map(counting).collect::<Result<_>>()?;
    for _ in 0..2 {
        context.restart_containerd(Signal::SIGKILL, || Ok(()))?;
        pods.iter().zip(&containers).try_for_each(|(pod, container)| expect_alive(pod, container, 2))?;
    }
    containers.iter().try_for_each(|container| end_whole(container, 8))?;
    pods.into_iter().try_for_each(Pod::remove)
}

fn ends_meanwhile(context: &Context) -> Result<()> {
    let pod = run_pod(context, "meanwhile")?;
    let volume = context.work.join("volume");
    std::fs::create_dir(&volume)?;
    let mortal = script("mortal", "until [ -e /volume/go ]; do :; done; echo last words; echo > /volume/gone; exit 9");
    let container = pod.run(mortal.with_mount(&volume, "/volume", false))?;
    context.restart_containerd(Signal::SIGKILL, || {
        std::fs::write(volume.join("go"), "")?;
        appears(&volume, "gone", Deadline::after(context.within(30)))
    })?;
    let ended = container.ended()?;
    ensure!(ended.exit_code == 9 && ended.reason == "Error", "{ended:?}");
    let lines = lines(&container.log)?;
    ensure!(lines.iter().any(|line| line.text == "last words"), "{lines:?}");
    pod.remove()
}
