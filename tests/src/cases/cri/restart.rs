//! Pods whose containerd ends and starts again.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::{run_pod, script};
use crate::context::Context;
use crate::cri::api::{ContainerState, PodSandboxState};
use crate::cri::{Container, lines};
use crate::event::{Deadline, appears};
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("cri: pods go on while containerd ends and starts again, and no line of theirs is lost", lines_stay)
        .with_pods(),
    Case::any("cri: a container that ends while there is no containerd is told with its exit code", ends_meanwhile)
        .with_pods(),
];

/// Counts, says each number on both streams, and keeps it for others to see. It ends when it is asked to.
const COUNT: &str = "trap 'exit 5' TERM; n=0; while :; do n=$((n+1)); echo out $n; echo err $n >&2; echo $n > /count; \
                     sleep 0.05 & wait $!; done";

/// Waits until a counting container has counted ten further.
fn counts(container: &Container<'_>) -> Result<()> {
    let wait = "n=$(($(cat /count) + 10)); until [ \"$(cat /count)\" -ge $n ] 2> /dev/null; do :; done";
    container.shell(wait).map(drop)
}

fn lines_stay(context: &Context) -> Result<()> {
    let pod = run_pod(context, "restarted")?;
    let container = pod.run(script("counts", COUNT))?;
    container.shell("until [ -s /count ]; do :; done")?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        counts(&container)?;
        context.restart_containerd(signal, || Ok(()))?;
        ensure!(pod.status()?.state() == PodSandboxState::SandboxReady, "{:?}", pod.status()?);
        ensure!(container.status()?.state() == ContainerState::ContainerRunning, "{:?}", container.status()?);
        counts(&container)?;
    }
    container.stop(1000)?;
    ensure!(container.status()?.exit_code == 5, "{:?}", container.status()?);
    let lines = lines(&container.log)?;
    for stream in ["stdout", "stderr"] {
        let told = lines.iter().filter(|line| line.stream == stream).map(|line| line.text.clone());
        let counted = (1..).map(|number| format!("{} {number}", &stream[3..]));
        let wrong = told.zip(counted).find(|(told, counted)| told != counted);
        ensure!(wrong.is_none(), "{stream}: {wrong:?}");
    }
    ensure!(lines.len() > 80, "{} lines", lines.len());
    pod.remove()
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
