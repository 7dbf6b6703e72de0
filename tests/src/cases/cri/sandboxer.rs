//! Pods that containerd makes by the Sandbox API of their shim, without a container that stands for them (`sandboxer =
//! "shim"`, containerd 2). An older containerd does not know the setting and makes the same pods as ever.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::{forever, script, spec};
use crate::containerd::BY_SANDBOX_API;
use crate::context::Context;
use crate::cri::api::PodSandboxState;
use crate::cri::{Pod, PodSpec};
use crate::harness::Case;
use crate::observe::pod_process;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::kata("cri: a pod of the Sandbox API has its names, parameters, network and shared memory", whole).with_pods(),
    Case::kata("cri: a pod of the Sandbox API is told as ended when its process is killed", killed).with_pods(),
];

fn run_pod(context: &Context, spec: PodSpec) -> Result<Pod<'_>> {
    context.cri.run_pod_with(spec, BY_SANDBOX_API)
}

/// Whether a container stands for the pod.
fn has_sandbox_container(context: &Context, pod: &Pod<'_>) -> Result<bool> {
    let listed = context.of_pods().ok(&["containers", "list", "-q"])?;
    Ok(listed.lines().any(|id| id == pod.id))
}

fn whole(context: &Context) -> Result<()> {
    let mut asked = spec(context, "api");
    let name = asked.config.hostname.clone();
    asked.linux().sysctls = [("kernel.msgmax".to_owned(), "4096".to_owned())].into();
    let pod = run_pod(context, asked)?;
    let knows_api = !context.cri.version()?.starts_with("1.");
    ensure!(has_sandbox_container(context, &pod)? != knows_api, "containerd knows the Sandbox API: {knows_api}");
    ensure!(pod.status()?.state() == PodSandboxState::SandboxReady, "{:?}", pod.status()?);
    let (one, two) = (pod.run(forever("one"))?, pod.run(forever("two"))?);
    ensure!(one.shell("hostname; cat /etc/hostname /proc/sys/kernel/msgmax")? == format!("{name}\n{name}\n4096\n"));
    ensure!(one.shell("cat /etc/resolv.conf")?.contains("nameserver 10.79.0.1"));
    let (address, hosts) = (pod.address()?, two.shell("cat /etc/hosts")?);
    ensure!(hosts.contains("localhost"), "{hosts}");
    ensure!(one.shell("ip -o -4 address show dev eth0")?.contains(&address));
    one.shell("echo shared > /dev/shm/file")?;
    ensure!(two.shell("cat /dev/shm/file")? == "shared\n");
    ensure!(two.shell("df -k /dev/shm | awk 'NR == 2 { print $2 }'")? == "65536\n");
    let ended = pod.run(script("ends", "exit 3"))?.ended()?;
    ensure!(ended.exit_code == 3, "{ended:?}");
    // containerd's Delete of one container is not the end of the pod.
    one.stop(1)?;
    one.remove()?;
    two.shell("true")?;
    pod.stop()?;
    ensure!(pod.status()?.state() == PodSandboxState::SandboxNotready, "{:?}", pod.status()?);
    pod.remove()
}

fn killed(context: &Context) -> Result<()> {
    let pod = run_pod(context, spec(context, "killed"))?;
    let container = pod.run(forever("one"))?;
    pod_process(context, &pod.id)?.signal(Signal::SIGKILL)?;
    let ended = container.ended()?;
    ensure!(ended.exit_code != 0, "{ended:?}");
    pod.ended()?;
    pod.remove()
}
