//! What containerd's CRI asks of a task and `ctr` has no command for: changed limits.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use protocols::containerd::api::UpdateTaskRequest;
use protocols::containerd::protobuf::MessageField;
use protocols::containerd::protobuf::well_known_types::any::Any;
use protocols::containerd::shim_sync::{Client, TaskClient};
use protocols::containerd::ttrpc;
use serde_json::Value;

use crate::context::Context;

/// Type of the resources in an update, as containerd registers it.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Sends `resources` of the OCI runtime specification to the task of a container, at the address where containerd found
/// it; answers the task's own error.
///
/// # Errors
/// When there is no such task, or it cannot be reached.
pub fn update(context: &Context, id: &str, resources: &Value) -> Result<std::result::Result<(), String>> {
    let (_, state) = context.stack.directories();
    let bundle = state.join("io.containerd.runtime.v2.task").join(&context.ctr.namespace).join(id);
    let file = bundle.join("address");
    let address = fs::read_to_string(&file).with_context(|| format!("Cannot read {}", file.display()))?;
    let client = Client::connect(&address).map_err(|error| anyhow::anyhow!("Cannot connect to {address}: {error}"))?;
    let resources = Any { type_url: RESOURCES.to_owned(), value: resources.to_string().into_bytes(), ..Any::default() };
    let resources = MessageField::some(resources);
    let request = UpdateTaskRequest { id: id.to_owned(), resources, ..UpdateTaskRequest::default() };
    let patience: Duration = context.within(60);
    match TaskClient::new(client).update(ttrpc::context::with_duration(patience), &request) {
        Ok(_) => Ok(Ok(())),
        Err(ttrpc::Error::RpcStatus(status)) => Ok(Err(status.message)),
        Err(error) => Err(error).context("The task does not answer"),
    }
}
