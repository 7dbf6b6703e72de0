//! containerd's Sandbox API, as a shim serves it (`sandboxer = "shim"`): the pod without a container that stands for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use protocols::containerd::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use protocols::containerd::sandbox_async::{Sandbox as SandboxApi, create_sandbox};
use protocols::containerd::ttrpc;
use protocols::cri::PodSandboxConfig;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::process::Exit;
use super::sandbox::Sandbox;
use super::{Pod, create, lifetime, service};
use crate::error::Error;
use crate::host::blocking;
use crate::host::cgroup::PodCgroup;
use crate::host::files::PodFiles;
use crate::machine::Blueprint;
use crate::spec::Spec;

/// What containerd's CRI hands on as `options` (k8s.io/cri-api, runtime/v1).
const POD_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// The states that containerd's CRI knows.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// Bytes of a pod's shared memory, as containerd gives to pods that a container stands for.
const SHARED_MEMORY_SIZE: u64 = 64 << 20;

/// The service.
#[must_use]
pub(super) fn service(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService { pod: Arc::clone(pod), life: Arc::default() }))
}

struct SandboxService {
    pod: Arc<Pod>,
    life: Arc<Life>,
}

/// What the calls of one sandbox leave to those after them.
#[derive(Default)]
struct Life {
    blueprint: Mutex<Option<Blueprint>>,
    created_at: OnceLock<Timestamp>,
    /// How it ended: asked to, or by itself.
    exit: OnceLock<Exit>,
}

impl Life {
    fn blueprint(&self) -> MutexGuard<'_, Option<Blueprint>> {
        self.blueprint.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SandboxService {
    /// A request is about the sandbox of this process.
    fn check(&self, id: &str) -> Result<(), Error> {
        if id == self.pod.id {
            return Ok(());
        }
        Err(Error::NotFound(format!("sandbox {id} (this is the pod process of {})", self.pod.id)))
    }

    fn machine(&self) -> Result<&Arc<Sandbox>, Error> {
        self.pod.sandbox.get().ok_or_else(|| Error::State("the sandbox has not been started".to_owned()))
    }
}

async fn create_pod(pod: &Arc<Pod>, life: &Life, request: CreateSandboxRequest) -> Result<(), Error> {
    let _inside = pod.gate.enter().await?;
    if life.blueprint().is_some() || pod.sandbox.get().is_some() || !pod.containers.is_empty() {
        return Err(Error::AlreadyExists(format!("sandbox {}", request.sandbox_id)));
    }
    let config = pod_config(request.options.as_ref())?;
    let spec = Spec::of_pod(&config, &request.sandbox_id, &request.netns_path);
    let blueprint = create::plan_sandbox(pod, &spec, None).await?;
    let blueprint = Blueprint { shm_size: SHARED_MEMORY_SIZE, ..blueprint };
    let (owner, hostname, interfaces) =
        (Arc::clone(pod), blueprint.hostname.clone(), blueprint.network.interfaces.clone());
    let write = move || PodFiles::write(&owner.paths.files(), &config, &hostname, &interfaces, &owner.journal);
    let files = blocking::run("pod files", write).await??;
    // Two at a time would have met at the directory.
    let _ = pod.files.set(files);
    *life.blueprint() = Some(blueprint);
    Ok(())
}

fn pod_config(options: Option<&Any>) -> Result<PodSandboxConfig, Error> {
    let Some(options) = options.filter(|options| options.type_url.ends_with(POD_TYPE)) else {
        let found = options.map_or("nothing", |options| &options.type_url);
        return Err(Error::Invalid(format!("options of the sandbox: expected a {POD_TYPE}, found {found}")));
    };
    PodSandboxConfig::parse_from_bytes(&options.value)
        .map_err(|error| Error::Invalid(format!("options of the sandbox: {error}; send a {POD_TYPE}")))
}

async fn start_pod(pod: &Arc<Pod>, life: &Life) -> Result<Timestamp, Error> {
    let _inside = pod.gate.enter().await?;
    let blueprint = life.blueprint().clone();
    let blueprint = blueprint.ok_or_else(|| Error::State("the sandbox has not been created".to_owned()))?;
    create::boot(pod, &blueprint).await?;
    Ok(life.created_at.get_or_init(Timestamp::now).clone())
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let (pod, life) = (Arc::clone(&self.pod), Arc::clone(&self.life));
        service::whole(async move { create_pod(&pod, &life, request).await }).await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let (pod, life) = (Arc::clone(&self.pod), Arc::clone(&self.life));
        let created_at = service::whole(async move { start_pod(&pod, &life).await }).await?;
        let created_at = MessageField::some(created_at);
        Ok(StartSandboxResponse { pid: Pod::pid(), created_at, ..StartSandboxResponse::default() })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.check(&request.sandbox_id)?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        "amd64".clone_into(&mut platform.architecture);
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        self.check(&request.sandbox_id)?;
        if let Some(sandbox) = self.pod.sandbox.get() {
            if !sandbox.has_ended() {
                let _ = self.life.exit.set(Exit { status: 0, at: Exit::now() });
            }
            sandbox.stop().await;
        }
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let sandbox = Arc::clone(self.machine()?);
        sandbox.ended().await;
        let Exit { status, at } = self.life.exit.get_or_init(Exit::killed).clone();
        let (exit_status, exited_at) = (status, MessageField::some(at));
        Ok(WaitSandboxResponse { exit_status, exited_at, ..WaitSandboxResponse::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.check(&request.sandbox_id)?;
        let runs = self.pod.sandbox.get().is_some_and(|sandbox| !sandbox.has_ended());
        let state = if runs { READY } else { NOT_READY };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: Pod::pid(),
            state: state.to_owned(),
            created_at: self.life.created_at.get().cloned().into(),
            exited_at: self.life.exit.get().map(|exit| exit.at.clone()).into(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.check(&request.sandbox_id)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.check(&request.sandbox_id)?;
        lifetime::store_timeline(&self.pod).await;
        self.pod.end.notify_one();
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.check(&request.sandbox_id)?;
        let pod = Arc::clone(&self.pod);
        let read = move || pod.facts().cgroup.as_ref().map(PodCgroup::metrics).transpose();
        let read = blocking::run("metrics", read).await.and_then(|metrics| metrics);
        let metrics = read?.ok_or_else(|| {
            Error::State(
                "the sandbox has no cgroup of its own: the host has cgroup v1, or no cgroup_parent was given"
                    .to_owned(),
            )
        })?;
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(Timestamp::now());
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(Any::pack(&metrics).map_err(|error| Error::Invalid(error.to_string()))?);
        Ok(response)
    }
}
