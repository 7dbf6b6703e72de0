//! Questions to a pod process over its Task API.

use std::time::Duration;

use protobuf::Message;
use protocols::containerd::api::{StateRequest, StatsRequest};
use protocols::containerd::cgroups_v2::metrics::Metrics;
use protocols::containerd::shim_async::{Client, TaskClient};
use protocols::containerd::ttrpc;
use protocols::containerd::types::task::Status;
use serde::Serialize;

use super::node::Sandbox;

/// What one sandbox may take for all its answers: a pod process answers `State` from its own memory, and of a guest
/// that does not answer nothing is told.
const DEADLINE: Duration = Duration::from_secs(2);

/// A container as its pod process tells of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Container {
    pub(super) id: String,
    /// `created`, `running`, `paused`, `stopped`.
    pub(super) state: &'static str,
    /// Of a container that has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) exit_status: Option<u32>,
    /// What it has used; only when that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<ContainerUsage>,
}

/// What a container uses in its guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct ContainerUsage {
    /// CPU time in microseconds.
    pub(super) cpu_usec: u64,
    /// Memory in bytes, page cache included.
    pub(super) memory: u64,
    /// Processes and threads.
    pub(super) pids: u64,
}

/// Whether the guest is asked, too, what its containers use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    State,
    Usage,
}

/// Whether containerd has connected to the pod process: that takes the first connection for containerd's, and would wait
/// for no other one. It has had its first when the shared directory is there.
fn is_in_use(sandbox: &Sandbox) -> bool {
    sandbox.paths.mounts().is_dir()
}

/// The Task API of a running sandbox; nothing when it does not serve it.
pub(super) async fn connect(sandbox: &Sandbox) -> Option<TaskClient> {
    if !is_in_use(sandbox) {
        return None;
    }
    let address = format!("unix://{}", sandbox.paths.task_socket().display());
    Client::connect(&address).await.ok().map(TaskClient::new)
}

/// The containers of a running sandbox; nothing when its pod process did not answer.
pub(super) async fn containers(sandbox: &Sandbox, ask: Ask) -> Option<Vec<Container>> {
    if !is_in_use(sandbox) {
        return Some(Vec::new());
    }
    let asked = async {
        let client = connect(sandbox).await?;
        let mut containers = Vec::new();
        for id in sandbox.containers() {
            containers.extend(container(&client, id, ask).await?);
        }
        Some(containers)
    };
    tokio::time::timeout(DEADLINE, asked).await.ok().flatten()
}

/// One container: nothing within something when it does not exist (any more), nothing at all without an answer.
async fn container(client: &TaskClient, id: String, ask: Ask) -> Option<Option<Container>> {
    let context = || ttrpc::context::with_duration(DEADLINE);
    let request = StateRequest { id: id.clone(), ..StateRequest::default() };
    let response = match client.state(context(), &request).await {
        Ok(response) => response,
        Err(ttrpc::Error::RpcStatus(_)) => return Some(None),
        Err(_) => return None,
    };
    let status = response.status.enum_value_or_default();
    let usage = if ask == Ask::Usage && status == Status::RUNNING { usage(client, &id).await } else { None };
    let exit_status = (status == Status::STOPPED).then_some(response.exit_status);
    Some(Some(Container { id, state: word(status), exit_status, usage }))
}

async fn usage(client: &TaskClient, id: &str) -> Option<ContainerUsage> {
    let request = StatsRequest { id: id.to_owned(), ..StatsRequest::default() };
    let response = client.stats(ttrpc::context::with_duration(DEADLINE), &request).await.ok()?;
    // It comes from the guest; a message has 4 MiB at most.
    let metrics = Metrics::parse_from_bytes(&response.stats.value).ok()?;
    Some(ContainerUsage { cpu_usec: metrics.cpu.usage_usec, memory: metrics.memory.usage, pids: metrics.pids.current })
}

fn word(status: Status) -> &'static str {
    match status {
        Status::CREATED => "created",
        Status::RUNNING => "running",
        Status::STOPPED => "stopped",
        Status::PAUSED | Status::PAUSING => "paused",
        Status::UNKNOWN => "unknown",
    }
}
