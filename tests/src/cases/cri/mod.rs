//! Pods through the Container Runtime Interface, as a kubelet makes them.

pub(super) mod lifecycle;
pub(super) mod pod;
pub(super) mod ports;
pub(super) mod restart;
pub(super) mod sandboxer;
pub(super) mod security;
pub(super) mod services;
pub(super) mod streams;
pub(super) mod volumes;

use anyhow::Result;

use crate::context::{BUSYBOX, Context};
use crate::cri::{ContainerSpec, Pod, PodSpec};

/// A program that runs until it is killed, and ends at once when it is asked to.
const FOREVER: &[&str] = &["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"];

/// A pod for a case.
fn spec(context: &Context, purpose: &str) -> PodSpec {
    PodSpec::new(&context.id(purpose), &context.work)
}

pub(super) fn run_pod<'a>(context: &'a Context, purpose: &str) -> Result<Pod<'a>> {
    context.cri.run_pod(spec(context, purpose))
}

/// A container that runs until it is stopped.
pub(super) fn forever(name: &str) -> ContainerSpec {
    ContainerSpec::new(name, BUSYBOX, FOREVER)
}

/// A container that runs `script`.
pub(super) fn script(name: &str, script: &str) -> ContainerSpec {
    ContainerSpec::new(name, BUSYBOX, &["sh", "-c", script])
}
