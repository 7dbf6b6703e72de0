//! containerd's Task API, version 2 and 3: one service under two names.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protobuf::MessageField;
use protobuf::well_known_types::empty::Empty;
use protocols::containerd::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use protocols::containerd::shim_async::{Task, create_task};
use protocols::containerd::ttrpc;
use ttrpc::Error as RpcError;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::{Pod, create, lifetime, operations};
use crate::error::Error;

/// What the agent may take for anything that is neither `Create` nor `Wait`.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(30);

/// The name that containerd before 2.0, and every containerd that is given a plain address, calls.
const V2: &str = "containerd.task.v2.Task";
/// The name that the generated code has.
const V3: &str = "containerd.task.v3.Task";

/// The service as version 3.
#[must_use]
pub fn v3(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_task(Arc::new(TaskService { pod: Arc::clone(pod) }))
}

/// The service as version 2: the messages are the same, field by field.
#[must_use]
pub fn v2(pod: &Arc<Pod>) -> HashMap<String, Service> {
    v3(pod).into_iter().map(|(name, service)| (name.replace(V3, V2), service)).collect()
}

struct TaskService {
    pod: Arc<Pod>,
}

/// Runs a request to its end even when containerd hangs up meanwhile: half of it would leave the host half changed.
pub(super) async fn whole<T: Send + 'static>(
    request: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, RpcError> {
    match tokio::spawn(request).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ttrpc::error::get_rpc_status(ttrpc::Code::INTERNAL, format!("the request failed: {error}"))),
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = whole(async move { create::create(&pod, request).await }).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pod = Arc::clone(&self.pod);
        whole(async move { operations::start(&pod, &request).await }).await?;
        Ok(StartResponse { pid: Pod::pid(), ..StartResponse::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { operations::exec(&pod, request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let pod = Arc::clone(&self.pod);
        let exit = whole(async move { operations::delete(&pod, &request).await }).await?;
        Ok(DeleteResponse {
            pid: Pod::pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..DeleteResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        operations::kill(&self.pod, &request).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.pod.containers.get(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse { exit_status: exit.status, exited_at: MessageField::some(exit.at), ..WaitResponse::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.pod.containers.get(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.exit();
        let names = process.names.clone();
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle.clone(),
            pid: Pod::pid(),
            status: process.status().into(),
            stdin: names.stdin,
            stdout: names.stdout,
            stderr: names.stderr,
            terminal: names.terminal,
            exit_status: exit.as_ref().map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at).into(),
            ..StateResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.pod.containers.get(&request.id)?;
        let process = ProcessInfo { pid: Pod::pid(), ..ProcessInfo::default() };
        Ok(PidsResponse { processes: vec![process], ..PidsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // containerd also connects to pods whose container is only about to be made.
        tracing::debug!(id = request.id, "connect");
        let (shim_pid, task_pid) = (Pod::pid(), Pod::pid());
        Ok(ConnectResponse { shim_pid, task_pid, ..ConnectResponse::default() })
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.pod.containers.get(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        operations::resize_pty(&self.pod, &request).await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        operations::pause(&self.pod, &request).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        operations::resume(&self.pod, &request).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { operations::update(&pod, request).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        Ok(operations::stats(&self.pod, &request).await?)
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let text = "a container in a virtual machine cannot be checkpointed; stop it and create it again";
        Err(Error::Unsupported(text.to_owned()).into())
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        // Newer versions of containerd call this after every Delete, also while the pod's other containers run; a sandbox of
        // the Sandbox API ends by that.
        if self.pod.containers.is_empty() && self.pod.files.get().is_none() {
            lifetime::store_timeline(&self.pod).await;
            self.pod.end.notify_one();
        } else {
            tracing::debug!(id = request.id, "the sandbox stays for its other containers");
        }
        Ok(Empty::new())
    }
}
