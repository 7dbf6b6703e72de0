//! The ttrpc face of the guest: containerd's Task service and the agent's own.
//!
//! Handlers run on ttrpc's tasks, which a deadline of the caller may drop at any await. The work itself is therefore
//! sent to the guest's own thread-local tasks: what changes something runs to its end whoever still listens, and what
//! only waits ends with its caller.

use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use futures::future::LocalBoxFuture;
use protobuf::well_known_types::empty::Empty;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, MessageField};
use protocols::agent::{
    Event, ForwardRequest, ForwardResponse, MemoryTypesRequest, MemoryTypesResponse, NextEventRequest,
    OnlineCpuMemRequest, OnlineCpuMemResponse, RefreshCopyRequest, RefreshCopyResponse, SetupRequest, SetupResponse,
    UpdateNetworkRequest, UpdateNetworkResponse,
};
use protocols::agent_ttrpc::{AgentService, create_agent_service};
use protocols::containerd::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use protocols::containerd::shim_async::{Task, create_task};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::spawn_local;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::error::{Error, Result};
use crate::forward;
use crate::guest::Guest;
use crate::hotplug;
use crate::memory_types;
use crate::process::Phase;
use crate::reaper::Exit;
use crate::stats;

/// Name under which containerd before 2.0 knows the same Task service.
const TASK_V2: &str = "containerd.task.v2.Task";

type Job = Box<dyn FnOnce(Rc<Guest>) -> LocalBoxFuture<'static, ()> + Send>;

/// Sends work to the thread that owns the guest.
#[derive(Clone)]
struct Handle {
    jobs: mpsc::UnboundedSender<Job>,
    shutdown: Arc<Notify>,
}

/// Work that [`Handle`]s sent, and whether one of them was told to shut the sandbox down.
pub(crate) struct Jobs {
    queue: mpsc::UnboundedReceiver<Job>,
    pub(crate) shutdown: Arc<Notify>,
}

/// Makes the services and the queue of the work that they cause.
pub(crate) fn services() -> (HashMap<String, Service>, Jobs) {
    let (jobs, queue) = mpsc::unbounded_channel();
    let shutdown = Arc::new(Notify::new());
    let handle = Handle { jobs, shutdown: Arc::clone(&shutdown) };
    let mut services = create_agent_service(Arc::new(handle.clone()));
    services.extend(create_task(Arc::new(handle.clone())));
    services.extend(create_task(Arc::new(handle)).into_values().map(|task| (TASK_V2.to_owned(), task)));
    (services, Jobs { queue, shutdown })
}

impl Jobs {
    /// Starts each job as a task of its own, for ever.
    pub(crate) async fn run(&mut self, guest: &Rc<Guest>) {
        while let Some(job) = self.queue.recv().await {
            spawn_local(job(Rc::clone(guest)));
        }
    }
}

impl Handle {
    /// Runs `work` to its end, even if the caller goes away.
    async fn change<T, W>(&self, work: impl FnOnce(Rc<Guest>) -> W + Send + 'static) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + 'static,
    {
        self.submit(|guest, reply: oneshot::Sender<Result<T>>| async move {
            // A caller that is gone has had its answer: a deadline.
            let _ = reply.send(work(guest).await);
        })
        .await
    }

    /// Runs `work` as long as the caller waits for it.
    async fn wait<T, W>(&self, work: impl FnOnce(Rc<Guest>) -> W + Send + 'static) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + 'static,
    {
        self.submit(|guest, mut reply: oneshot::Sender<Result<T>>| async move {
            let outcome = tokio::select! {
                biased;
                () = reply.closed() => return,
                outcome = work(guest) => outcome,
            };
            let _ = reply.send(outcome);
        })
        .await
    }

    /// Runs `work` at once.
    async fn now<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Rc<Guest>) -> Result<T> + Send + 'static,
    ) -> ttrpc::Result<T> {
        self.change(move |guest| async move { work(&guest) }).await
    }

    async fn submit<T, W>(
        &self,
        work: impl FnOnce(Rc<Guest>, oneshot::Sender<Result<T>>) -> W + Send + 'static,
    ) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        W: Future<Output = ()> + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let gone = || ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::UNAVAILABLE, "the guest is powering off"));
        self.jobs.send(Box::new(|guest| Box::pin(work(guest, reply)))).map_err(|_| gone())?;
        Ok(answer.await.map_err(|_| gone())??)
    }
}

#[async_trait]
impl AgentService for Handle {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        self.now(move |guest| guest.setup(&request)).await
    }

    async fn online_cpu_mem(
        &self,
        _: &TtrpcContext,
        request: OnlineCpuMemRequest,
    ) -> ttrpc::Result<OnlineCpuMemResponse> {
        self.change(async move |_| hotplug::online(&request).await).await
    }

    async fn next_event(&self, _: &TtrpcContext, _: NextEventRequest) -> ttrpc::Result<Event> {
        self.wait(async |guest| Ok(guest.events.next().await)).await
    }

    async fn memory_types(&self, _: &TtrpcContext, request: MemoryTypesRequest) -> ttrpc::Result<MemoryTypesResponse> {
        self.now(move |_| memory_types::collect(request.mtrr_default_type)).await
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<ForwardResponse> {
        self.wait(async move |guest| forward::forward(&guest.endpoint, &request).await).await?;
        Ok(ForwardResponse::default())
    }

    async fn refresh_copy(&self, _: &TtrpcContext, request: RefreshCopyRequest) -> ttrpc::Result<RefreshCopyResponse> {
        self.change(async move |guest| guest.refresh_copy(&request.container_id, request.number).await).await?;
        Ok(RefreshCopyResponse::default())
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<UpdateNetworkResponse> {
        self.change(async move |guest| guest.update_network(&request).await).await?;
        Ok(UpdateNetworkResponse::default())
    }
}

#[async_trait]
impl Task for Handle {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.change(async |guest| guest.create(request).await).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self.change(async move |guest| guest.start(&request.id, &request.exec_id).await).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.now(|guest| guest.exec(request)).await.map(empty)
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = self.change(async move |guest| guest.delete(&request.id, &request.exec_id).await).await?;
        let exited_at = timestamp(exit);
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.now(move |guest| state(guest, &request)).await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = Handle::wait(self, async move |guest| {
            let ended = guest.process(&request.id, &request.exec_id)?.wait();
            drop(guest);
            ended.await.ok_or(Error::NoProcess { container: request.id, exec_id: request.exec_id })
        })
        .await?;
        Ok(WaitResponse { exit_status: exit.status, exited_at: timestamp(exit), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let KillRequest { id, exec_id, signal, all, .. } = request;
        self.now(move |guest| guest.kill(&id, &exec_id, signal, all)).await.map(empty)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self.now(move |guest| guest.container(&request.id)?.cgroup.processes()).await?;
        let processes = processes.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.now(move |guest| {
            let size = |what: &str, cells: u32| {
                u16::try_from(cells).map_err(|_| Error::invalid(format!("{what} {cells}: the limit is {}", u16::MAX)))
            };
            let (columns, rows) = (size("width", request.width)?, size("height", request.height)?);
            guest.process(&request.id, &request.exec_id)?.resize(columns, rows)
        })
        .await
        .map(empty)
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.now(move |guest| guest.close_io(&request.id, &request.exec_id)).await.map(empty)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.change(async move |guest| guest.set_paused(&request.id, true).await).await.map(empty)
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.change(async move |guest| guest.set_paused(&request.id, false).await).await.map(empty)
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unimplemented { what: "checkpoint of a container inside of its virtual machine" }.into())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.now(move |guest| guest.update(&request.id, request.resources.as_ref())).await.map(empty)
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.now(move |guest| stats::collect(&guest.container(&request.id)?.cgroup)).await?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.now(move |guest| Ok(guest.container(&request.id)?.init.pid())).await?;
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.now(move |guest| {
            if !request.now && !guest.containers().is_empty() {
                return Err(Error::precondition("the sandbox still has containers: delete them first, or set now"));
            }
            Ok(())
        })
        .await?;
        self.shutdown.notify_one();
        Ok(Empty::default())
    }
}

fn state(guest: &Guest, request: &StateRequest) -> Result<StateResponse> {
    let container = guest.place(&request.id)?;
    let process = container.process(&request.exec_id)?;
    let phase = process.phase();
    let status = match phase {
        Phase::Changing | Phase::Created => Status::CREATED,
        Phase::Running if container.paused.get() => Status::PAUSED,
        Phase::Running => Status::RUNNING,
        Phase::Stopped(_) => Status::STOPPED,
    };
    let mut response = StateResponse {
        id: container.id.clone(),
        exec_id: process.exec_id.clone(),
        bundle: container.bundle.display().to_string(),
        pid: process.pid(),
        status: EnumOrUnknown::new(status),
        stdin: process.fields.stdin.clone(),
        stdout: process.fields.stdout.clone(),
        stderr: process.fields.stderr.clone(),
        terminal: process.fields.terminal,
        ..Default::default()
    };
    if let Phase::Stopped(exit) = phase {
        response.exit_status = exit.status;
        response.exited_at = timestamp(exit);
    }
    Ok(response)
}

fn timestamp(exit: Exit) -> MessageField<Timestamp> {
    // A clock before 1970 has not been set; the epoch is as good an answer as any.
    let since = exit.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: since.as_secs().cast_signed(),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    })
}

fn empty((): ()) -> Empty {
    Empty::default()
}
