//! What containerd asks of an existing container: checked against its state on the host, carried out by the agent.

use std::sync::Arc;

use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use protocols::MAX_SPEC;
use protocols::containerd::api::{
    DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest, ResizePtyRequest, ResumeRequest, StartRequest,
    StatsRequest, StatsResponse, UpdateTaskRequest,
};
use protocols::containerd::cgroups_v2::metrics::Metrics;
use protocols::containerd::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use protocols::containerd::topics::{
    TASK_DELETE_EVENT_TOPIC, TASK_EXEC_ADDED_EVENT_TOPIC, TASK_EXEC_STARTED_EVENT_TOPIC, TASK_PAUSED_EVENT_TOPIC,
    TASK_RESUMED_EVENT_TOPIC, TASK_START_EVENT_TOPIC,
};
use protocols::containerd::ttrpc;
use serde_json::{Map, Value};
use ttrpc::context::Context;

use super::Pod;
use super::containers::{self, Container, wrong_phase};
use super::process::{Exit, Phase, Process};
use super::service::CALL_DEADLINE;
use super::stdio::{Names, Pumps};
use crate::error::Error;
use crate::sizing::Demand;
use crate::{paths, spec};

/// SIGKILL, as the Task API numbers signals.
const SIGKILL: u32 = 9;

fn deadline() -> Context {
    ttrpc::context::with_duration(CALL_DEADLINE)
}

/// Starts an init or an exec.
///
/// # Errors
///
/// [`Error::State`] unless it is created; the agent's answer, for example that there is no such program.
pub async fn start(pod: &Arc<Pod>, request: &StartRequest) -> Result<(), Error> {
    let container = pod.containers.get(&request.id)?;
    let process = container.process(&request.exec_id)?;
    if !process.advance(&Phase::Created, Phase::Starting) {
        return Err(wrong_phase("start", &process.phase()));
    }
    if !container.is_pause()
        && let Err(error) = start_in_guest(pod, request, &process).await
    {
        process.advance(&Phase::Starting, Phase::Created);
        return Err(error);
    }
    if !container.is_guest() {
        tell_start(pod, &container, &process);
    }
    // After the event: a process that has ended already is told about only now.
    process.advance(&Phase::Starting, Phase::Running);
    Ok(())
}

fn tell_start(pod: &Pod, container: &Container, process: &Process) {
    pod.stamp("started");
    let (pid, container_id) = (Pod::pid(), container.id.clone());
    if process.exec_id.is_empty() {
        let event = TaskStart { container_id, pid, ..TaskStart::default() };
        pod.events.publish(TASK_START_EVENT_TOPIC, &event);
    } else {
        let exec_id = process.exec_id.clone();
        let event = TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() };
        pod.events.publish(TASK_EXEC_STARTED_EVENT_TOPIC, &event);
    }
}

async fn start_in_guest(pod: &Pod, request: &StartRequest, process: &Process) -> Result<(), Error> {
    let sandbox = pod.sandbox()?;
    if let Some(follower) = pod.follower.get().filter(|_| request.exec_id.is_empty()) {
        follower.catch_up().await?;
    }
    process.open_input()?;
    sandbox.task.start(deadline(), request).await.map_err(|error| sandbox.explain(error))?;
    Ok(())
}

/// Adds a process to a running container; `Start` runs it.
///
/// # Errors
///
/// [`Error`]; nothing of the exec is left then.
pub async fn exec(pod: &Arc<Pod>, mut request: ExecProcessRequest) -> Result<(), Error> {
    paths::check("exec id", &request.exec_id)?;
    let container = pod.containers.get(&request.id)?;
    if container.is_pause() {
        let text = "a sandbox container has no processes; execute in one of the pod's containers";
        return Err(Error::Unsupported(text.to_owned()));
    }
    match container.init().phase() {
        Phase::Starting | Phase::Running => {}
        phase => return Err(wrong_phase("execute in the container of", &phase)),
    }
    let names = Names {
        stdin: std::mem::take(&mut request.stdin),
        stdout: std::mem::take(&mut request.stdout),
        stderr: std::mem::take(&mut request.stderr),
        terminal: request.terminal,
    };
    // The first byte that counts is a container's.
    let first_byte = if container.is_guest() { &Arc::default() } else { &pod.first_byte };
    let (streams, pumps) = Pumps::start(&names, &pod.streams, first_byte).await?;
    let process = Process::new(request.exec_id.clone(), names, pumps);
    container.add_exec(Arc::clone(&process))?;
    (request.stdin, request.stdout, request.stderr) = (streams.stdin, streams.stdout, streams.stderr);
    let sandbox = pod.sandbox()?;
    if let Err(error) = sandbox.task.exec(deadline(), &request).await {
        container.remove_exec(&request.exec_id);
        return Err(sandbox.explain(error));
    }
    if !container.is_guest() {
        let (container_id, exec_id) = (request.id, request.exec_id);
        let event = TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() };
        pod.events.publish(TASK_EXEC_ADDED_EVENT_TOPIC, &event);
    }
    containers::watch(pod, &container, &process);
    Ok(())
}

/// Sends a signal.
///
/// # Errors
///
/// [`Error::NotFound`] for a process that has ended, as containerd expects of a runtime.
pub async fn kill(pod: &Arc<Pod>, request: &KillRequest) -> Result<(), Error> {
    let container = pod.containers.get(&request.id)?;
    let process = container.process(&request.exec_id)?;
    if process.exit().is_some() {
        return Err(Error::NotFound("process already finished".to_owned()));
    }
    if container.is_pause() {
        let exit = Exit { status: 128 + request.signal.min(64), at: Exit::now() };
        containers::stopped(pod, &container, &process, exit);
        return Ok(());
    }
    let sandbox = pod.sandbox()?;
    match sandbox.task.kill(deadline(), request).await.map_err(|error| sandbox.explain(error)) {
        Err(error @ Error::Unanswered(_)) if request.signal == SIGKILL => {
            sandbox.give_up(&error);
            Ok(())
        }
        other => other.map(drop),
    }
}

/// Forgets a process that has ended, or that never ran; with the init, the container and its storage.
///
/// # Errors
///
/// [`Error::State`] while it runs.
pub async fn delete(pod: &Arc<Pod>, request: &DeleteRequest) -> Result<Exit, Error> {
    if request.exec_id.is_empty() {
        pod.containers.abandon(&request.id);
    }
    let container = pod.containers.get(&request.id)?;
    let process = container.process(&request.exec_id)?;
    let ran = match process.phase() {
        Phase::Stopped(_) => true,
        Phase::Created => false,
        phase => return Err(wrong_phase("delete", &phase)),
    };
    if !container.is_pause() {
        if !ran && request.exec_id.is_empty() {
            end_created(pod, &container, &process).await;
        }
        delete_in_guest(pod, request).await?;
    }
    if ran {
        process.drain().await;
    }
    let exit = process.exit().unwrap_or_else(Exit::killed);
    if !request.exec_id.is_empty() {
        container.remove_exec(&request.exec_id);
        return Ok(exit);
    }
    free(pod, &container).await;
    pod.stamp("deleted");
    let event = TaskDelete {
        container_id: container.id.clone(),
        id: container.id.clone(),
        pid: Pod::pid(),
        exit_status: exit.status,
        exited_at: MessageField::some(exit.at.clone()),
        ..TaskDelete::default()
    };
    pod.events.publish(TASK_DELETE_EVENT_TOPIC, &event);
    Ok(exit)
}

/// Takes back a container that nobody wants any more by the time it is made.
pub async fn discard(pod: &Arc<Pod>, container: &Container) {
    let request = DeleteRequest { id: container.id.clone(), ..DeleteRequest::default() };
    if !container.is_pause() {
        end_created(pod, container, container.init()).await;
        if let Err(error) = delete_in_guest(pod, &request).await {
            tracing::warn!(%error, "an abandoned container stays in the guest");
        }
    }
    free(pod, container).await;
}

/// Gives back what a container held that the guest no longer has.
async fn free(pod: &Arc<Pod>, container: &Container) {
    containers::undo(pod, container.take_effects()).await;
    // The last one takes the machine with it.
    if let Ok(sandbox) = pod.sandbox()
        && pod.containers.has_others(&container.id)
    {
        sandbox.devices.give_back(&container.id).await;
        sandbox.resizer.release(&container.id, None).await;
    }
    pod.containers.remove(&container.id);
}

/// A container that was made but not started has an init in the guest that waits to run.
async fn end_created(pod: &Pod, container: &Container, process: &Process) {
    let request = KillRequest { id: container.id.clone(), signal: SIGKILL, ..KillRequest::default() };
    let Ok(sandbox) = pod.sandbox() else { return };
    match sandbox.task.kill(deadline(), &request).await {
        // The guest tells of the end as of any other.
        Ok(_) => drop(tokio::time::timeout(CALL_DEADLINE, process.wait()).await),
        Err(error) => tracing::debug!(%error, "a container that never ran could not be killed"),
    }
}

async fn delete_in_guest(pod: &Pod, request: &DeleteRequest) -> Result<(), Error> {
    // With its machine, a container is gone.
    let Ok(sandbox) = pod.sandbox() else { return Ok(()) };
    match sandbox.task.delete(deadline(), request).await {
        Ok(_) => Ok(()),
        Err(error) => match sandbox.explain(error) {
            Error::Agent(_, ttrpc::Code::NOT_FOUND) | Error::GuestGone(_) => Ok(()),
            error @ Error::Unanswered(_) => {
                sandbox.give_up(&error);
                Ok(())
            }
            error => Err(error),
        },
    }
}

/// Tells a terminal its size.
///
/// # Errors
///
/// The agent's answer.
pub async fn resize_pty(pod: &Arc<Pod>, request: &ResizePtyRequest) -> Result<(), Error> {
    pod.containers.get(&request.id)?.process(&request.exec_id)?;
    let sandbox = pod.sandbox()?;
    sandbox.task.resize_pty(deadline(), request).await.map_err(|error| sandbox.explain(error))?;
    Ok(())
}

/// Freezes a container.
///
/// # Errors
///
/// [`Error::State`] unless it runs; the agent's answer.
pub async fn pause(pod: &Arc<Pod>, request: &PauseRequest) -> Result<(), Error> {
    let container = member(pod, &request.id, "pause")?;
    if container.init().phase() != Phase::Running {
        return Err(wrong_phase("pause", &container.init().phase()));
    }
    let sandbox = pod.sandbox()?;
    sandbox.task.pause(deadline(), request).await.map_err(|error| sandbox.explain(error))?;
    container.init().advance(&Phase::Running, Phase::Paused);
    let event = TaskPaused { container_id: request.id.clone(), ..TaskPaused::default() };
    pod.events.publish(TASK_PAUSED_EVENT_TOPIC, &event);
    Ok(())
}

/// Thaws a container.
///
/// # Errors
///
/// [`Error::State`] unless it is paused; the agent's answer.
pub async fn resume(pod: &Arc<Pod>, request: &ResumeRequest) -> Result<(), Error> {
    let container = member(pod, &request.id, "resume")?;
    if container.init().phase() != Phase::Paused {
        return Err(wrong_phase("resume", &container.init().phase()));
    }
    let sandbox = pod.sandbox()?;
    sandbox.task.resume(deadline(), request).await.map_err(|error| sandbox.explain(error))?;
    container.init().advance(&Phase::Paused, Phase::Running);
    let event = TaskResumed { container_id: request.id.clone(), ..TaskResumed::default() };
    pod.events.publish(TASK_RESUMED_EVENT_TOPIC, &event);
    Ok(())
}

/// Changes a container's limits in the guest, and the size of the machine with them: before, where it grows, and after,
/// where it shrinks.
///
/// # Errors
///
/// [`Error::Size`] and [`Error::Grow`], or the agent's answer; limits and size are as before then.
pub async fn update(pod: &Arc<Pod>, request: UpdateTaskRequest) -> Result<(), Error> {
    let container = member(pod, &request.id, "update")?;
    let sandbox = pod.sandbox()?;
    let (request, resources) = guest_update(request)?;
    let before = container.limits();
    let after = Demand::of(&resources, before);
    sandbox.resizer.hold(&container.id, before.widest(after)).await?;
    let updated = sandbox.task.update(deadline(), &request).await.map_err(|error| sandbox.explain(error));
    let limits = if updated.is_ok() { after } else { before };
    container.set_limits(limits);
    sandbox.resizer.release(&container.id, Some(limits)).await;
    updated.map(drop)
}

/// The request with what means something in the guest, and the resources in it.
fn guest_update(mut request: UpdateTaskRequest) -> Result<(UpdateTaskRequest, Value), Error> {
    let text = "an update needs the resources of the OCI runtime specification as JSON";
    let any = request.resources.as_mut().ok_or_else(|| Error::Invalid(text.to_owned()))?;
    if any.value.len() > MAX_SPEC {
        return Err(Error::Invalid(format!("resources of {} bytes: the limit is {MAX_SPEC}", any.value.len())));
    }
    let mut resources: Map<String, Value> =
        serde_json::from_slice(&any.value).map_err(|error| Error::Invalid(format!("{text}: {error}")))?;
    spec::keep_guest_resources(&mut resources);
    let resources = Value::Object(resources);
    any.value = resources.to_string().into_bytes();
    Ok((request, resources))
}

/// What a container has used, from its cgroup in the guest.
///
/// # Errors
///
/// The agent's answer.
pub async fn stats(pod: &Arc<Pod>, request: &StatsRequest) -> Result<StatsResponse, Error> {
    if pod.containers.get(&request.id)?.is_pause() {
        // No process, no use.
        let metrics = Metrics::default();
        let any = Any {
            type_url: "io.containerd.cgroups.v2.Metrics".to_owned(),
            value: metrics.write_to_bytes().map_err(|error| Error::State(error.to_string()))?,
            ..Any::default()
        };
        return Ok(StatsResponse { stats: MessageField::some(any), ..StatsResponse::default() });
    }
    let sandbox = pod.sandbox()?;
    sandbox.task.stats(deadline(), request).await.map_err(|error| sandbox.explain(error))
}

/// A container of the guest.
fn member(pod: &Pod, id: &str, action: &str) -> Result<Arc<Container>, Error> {
    let container = pod.containers.get(id)?;
    if container.is_guest() {
        return Err(Error::Unsupported(format!("cannot {action} the guest itself; {action} its containers")));
    }
    if container.is_pause() {
        let text = format!("cannot {action} a sandbox container; {action} the pod's containers");
        return Err(Error::Unsupported(text));
    }
    Ok(container)
}
