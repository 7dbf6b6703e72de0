//! The life of pods and containers.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use super::{forever, run_pod, script, spec};
use crate::context::{BUSYBOX, Context};
use crate::cri::api::{
    ContainerState, ContainerStatusRequest, LinuxContainerResources, PodSandboxState, PodSandboxStatusRequest,
    UInt64Value, UpdateContainerResourcesRequest,
};
use crate::cri::{ContainerSpec, lines};
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("cri: a pod tells that it is ready, that it has stopped, and that it is gone", pod).with_pods(),
    Case::any("cri: a container tells when it was made, started and ended, and how", container).with_pods(),
    Case::any("cri: a container that ended is followed by another attempt in the same pod", attempts).with_pods(),
    Case::any("cri: a program that is not there fails its container alone", no_program).with_pods(),
    Case::any("cri: a container's log has its lines by stream", log).with_pods(),
    Case::any("cri: a container that asks to be stopped has its time, and no more", stop).with_pods(),
    Case::any("cri: ExecSync answers output and exit code, and gives up at its limit", exec).with_pods(),
    Case::any("cri: a container that takes more memory than its limit is told as killed for it", out_of_memory)
        .with_pods(),
    Case::any("cri: a container's limits are changed while it runs", update).with_pods(),
    Case::any("cri: statistics tell the CPU time and memory of containers", statistics).with_pods(),
    Case::any("cri: statistics of a pod tell what it uses on the node, and those of its containers", pod_statistics)
        .with_pods(),
    Case::any("cri: a pod is stopped and removed with its running containers", removed_whole).with_pods(),
];

fn pod(context: &Context) -> Result<()> {
    let pod = run_pod(context, "pod")?;
    let status = pod.status()?;
    ensure!(status.state() == PodSandboxState::SandboxReady, "{status:?}");
    ensure!(status.created_at > 0 && status.runtime_handler == context.cri.handler, "{status:?}");
    ensure!(pod.address()?.starts_with("10.79.0."), "{status:?}");
    pod.stop()?;
    let status = pod.status()?;
    ensure!(status.state() == PodSandboxState::SandboxNotready, "{status:?}");
    // Again is as good as once.
    pod.stop()?;
    let id = pod.id.clone();
    pod.remove()?;
    let request = PodSandboxStatusRequest { pod_sandbox_id: id, verbose: false };
    let gone = context.cri.try_call(context.cri.service().pod_sandbox_status(request))?;
    ensure!(gone.as_ref().is_err_and(|status| status.code() == tonic::Code::NotFound), "{gone:?}");
    Ok(())
}

fn container(context: &Context) -> Result<()> {
    let pod = run_pod(context, "container")?;
    let container = pod.create(script("ends", "exit 7"))?;
    let made = container.status()?;
    ensure!(made.state() == ContainerState::ContainerCreated && made.created_at > 0, "{made:?}");
    container.start()?;
    let ended = container.ended()?;
    ensure!(ended.exit_code == 7 && ended.reason == "Error", "{ended:?}");
    ensure!(made.created_at <= ended.started_at && ended.started_at <= ended.finished_at, "{ended:?}");
    let id = container.id.clone();
    container.remove()?;
    let request = ContainerStatusRequest { container_id: id, verbose: false };
    let gone = context.cri.try_call(context.cri.service().container_status(request))?;
    ensure!(gone.as_ref().is_err_and(|status| status.code() == tonic::Code::NotFound), "{gone:?}");
    pod.remove()
}

fn attempts(context: &Context) -> Result<()> {
    let pod = run_pod(context, "attempts")?;
    for attempt in 0..3 {
        let mut spec = script("one", "echo again; exit 0");
        if let Some(metadata) = &mut spec.config.metadata {
            metadata.attempt = attempt;
        }
        spec.config.log_path = format!("{attempt}.log");
        let container = pod.run(spec)?;
        let ended = container.ended()?;
        ensure!(ended.exit_code == 0 && ended.reason == "Completed", "{ended:?}");
    }
    pod.remove()
}

fn no_program(context: &Context) -> Result<()> {
    let pod = run_pod(context, "none")?;
    let container = pod.create(ContainerSpec::new("none", BUSYBOX, &["/no/such/program"]))?;
    let Err(error) = container.start() else { bail!("A program that is not there has started") };
    ensure!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    let status = container.status()?;
    ensure!(status.state() == ContainerState::ContainerExited && status.exit_code != 0, "{status:?}");
    let other = pod.run(script("other", "exit 3"))?;
    ensure!(other.ended()?.exit_code == 3);
    pod.remove()
}

fn log(context: &Context) -> Result<()> {
    let pod = run_pod(context, "log")?;
    let container = pod.run(script("says", "echo one; echo two >&2; echo three"))?;
    container.ended()?;
    let lines = lines(&container.log)?;
    let of = |stream: &str| -> Vec<&str> {
        lines.iter().filter(|line| line.stream == stream).map(|line| line.text.as_str()).collect()
    };
    ensure!(of("stdout") == ["one", "three"] && of("stderr") == ["two"], "{lines:?}");
    pod.remove()
}

fn stop(context: &Context) -> Result<()> {
    let pod = run_pod(context, "stop")?;
    let polite = pod.run(script("polite", "trap 'exit 5' TERM; while :; do sleep 1000 & wait $!; done"))?;
    let deaf = pod.run(script("deaf", "trap '' TERM; while :; do sleep 1000; done"))?;
    // The traps are set when something after them was done.
    for container in [&polite, &deaf] {
        container.shell("until [ \"$(pidof sleep)\" ]; do :; done")?;
    }
    polite.stop(1000)?;
    ensure!(polite.status()?.exit_code == 5, "{:?}", polite.status()?);
    deaf.stop(1)?;
    ensure!(deaf.status()?.exit_code == 137, "{:?}", deaf.status()?);
    pod.remove()
}

fn exec(context: &Context) -> Result<()> {
    let pod = run_pod(context, "exec")?;
    let container = pod.run(forever("one"))?;
    let answer = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 4"], 0)?;
    ensure!((&answer.stdout[..], &answer.stderr[..]) == (b"out\n", b"err\n") && answer.exit_code == 4, "{answer:?}");
    let large = container.exec(&["sh", "-c", "yes | head -c 3000000"], 0)?;
    ensure!(large.stdout.len() == 3_000_000, "{} bytes", large.stdout.len());
    let Err(error) = container.exec(&["sleep", "10000"], 1) else { bail!("A command goes on after its limit") };
    ensure!(format!("{error:#}").contains("DeadlineExceeded"), "{error:#}");
    ensure!(!container.shell("ps -o args")?.contains("sleep 10000"), "What was given up goes on");
    pod.remove()
}

fn out_of_memory(context: &Context) -> Result<()> {
    let pod = run_pod(context, "memory")?;
    let limits = LinuxContainerResources { memory_limit_in_bytes: 24 << 20, ..LinuxContainerResources::default() };
    // It says that it runs: a container that is killed before it has started is another thing.
    let hungry = script("hungry", "echo up; exec tail /dev/zero").with_resources(limits);
    let ended = pod.run(hungry)?.ended()?;
    ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
    pod.remove()
}

fn update(context: &Context) -> Result<()> {
    let pod = run_pod(context, "update")?;
    let limits = |mib: i64, quota: i64| LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        cpu_period: 100_000,
        cpu_quota: quota,
        ..LinuxContainerResources::default()
    };
    let container = pod.run(forever("one").with_resources(limits(64, 50_000)))?;
    let told = || container.shell("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max");
    ensure!(told()? == format!("{}\n50000 100000\n", 64 << 20), "{:?}", told()?);
    let request = UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(limits(96, 25_000)),
        ..UpdateContainerResourcesRequest::default()
    };
    context.cri.call("UpdateContainerResources", context.cri.service().update_container_resources(request))?;
    ensure!(told()? == format!("{}\n25000 100000\n", 96 << 20), "{:?}", told()?);
    pod.remove()
}

fn number(value: Option<UInt64Value>) -> u64 {
    value.map_or(0, |value| value.value)
}

fn statistics(context: &Context) -> Result<()> {
    let pod = run_pod(context, "statistics")?;
    let container = pod.run(forever("one"))?;
    container.shell("head -c 20000000 /dev/zero | sha256sum >/dev/null")?;
    let stats = container.stats()?;
    let (cpu, memory) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default());
    ensure!(number(cpu.usage_core_nano_seconds) > 0 && number(memory.working_set_bytes) > 0, "{stats:?}");
    pod.remove()
}

/// The cgroup of a pod, as a kubelet makes and removes it.
struct PodCgroup(PathBuf);

impl PodCgroup {
    fn make(name: &str) -> Result<Self> {
        let path = Path::new("/sys/fs/cgroup").join(name);
        std::fs::create_dir(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // One that is not empty is told by the check for leftovers.
        std::fs::remove_dir(&self.0).ok();
    }
}

fn pod_statistics(context: &Context) -> Result<()> {
    /// Less than any guest, and more than any process of a runtime without.
    const GUEST: u64 = 12 << 20;
    let mut asked = spec(context, "statistics");
    let name = asked.config.hostname.clone();
    let _cgroup = PodCgroup::make(&name)?;
    asked.linux().cgroup_parent = format!("/{name}");
    let pod = context.cri.run_pod(asked)?;
    let container = pod.run(forever("one"))?;
    container.shell("head -c 20000000 /dev/zero | sha256sum >/dev/null")?;
    let stats = pod.stats()?.linux.unwrap_or_default();
    let (cpu, memory) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default());
    let least = if context.is_kata() { GUEST } else { 1 };
    ensure!(number(cpu.usage_core_nano_seconds) > 0 && number(memory.working_set_bytes) >= least, "{cpu:?} {memory:?}");
    let ids: Vec<_> = stats.containers.into_iter().filter_map(|one| one.attributes).map(|one| one.id).collect();
    ensure!(ids == [container.id.clone()], "{ids:?}");
    let interface = stats.network.and_then(|network| network.default_interface).unwrap_or_default();
    ensure!(interface.name == "eth0", "{interface:?}");
    pod.remove()
}

fn removed_whole(context: &Context) -> Result<()> {
    let pod = run_pod(context, "whole")?;
    for name in ["one", "two", "three"] {
        pod.run(forever(name))?;
    }
    pod.remove()
}
