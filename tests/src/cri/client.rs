//! Calls of the CRI, each to its end.

use std::future::Future;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    GetEventsRequest, ListImagesRequest, ListPodSandboxRequest, RemovePodSandboxRequest, StatusRequest,
    StopPodSandboxRequest, VersionRequest,
};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::event::Deadline;

/// A containerd with its CRI plugin, and the runtime handler of new pods.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
    /// How many events of containers there were. One task counts them, as each is told to one listener only.
    events: watch::Sender<u64>,
    counter: Mutex<Option<JoinHandle<()>>>,
    /// The runtime handler of new pods.
    pub handler: String,
    /// A hang guard for one call.
    pub patience: Duration,
}

impl Cri {
    /// The CRI at the socket `address`.
    ///
    /// # Errors
    /// When nobody serves there.
    pub fn connect(address: &Path, handler: &str, patience: Duration) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("Cannot make a runtime for calls of the CRI")?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", address.display()))
            .with_context(|| format!("{} is no socket's path", address.display()))?;
        // Connects at the first call, and again after containerd's restart.
        let channel = {
            let _entered = runtime.enter();
            endpoint.connect_lazy()
        };
        let (events, _) = watch::channel(0);
        Ok(Self { runtime, channel, events, counter: Mutex::default(), handler: handler.to_owned(), patience })
    }

    /// What changes with each event of a container from now on.
    pub(super) fn events(&self) -> watch::Receiver<u64> {
        let mut counter = self.counter.lock().unwrap_or_else(PoisonError::into_inner);
        if counter.as_ref().is_none_or(JoinHandle::is_finished) {
            *counter = Some(self.runtime.spawn(count_events(self.service(), self.events.clone())));
        }
        self.events.subscribe()
    }

    /// Waits for the next event.
    pub(super) fn next_event(&self, events: &mut watch::Receiver<u64>, deadline: Deadline) -> Result<()> {
        let changed = self.runtime.block_on(async { tokio::time::timeout(deadline.left(), events.changed()).await });
        changed.context("No event of a container came in time")?.context("Nobody listens to events of containers")
    }

    /// The runtime service; each call takes one.
    #[must_use]
    pub fn service(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    /// The version of containerd.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn version(&self) -> Result<String> {
        let request = VersionRequest { version: "v1".to_owned() };
        Ok(self.call("Version", self.service().version(request))?.runtime_version)
    }

    /// Makes a call; answers as the peer did.
    ///
    /// # Errors
    /// When there is no answer within the patience.
    pub fn try_call<T>(
        &self,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<std::result::Result<T, Status>> {
        self.within(async { Ok(call.await.map(Response::into_inner)) })
    }

    /// Does what must be done within the patience.
    pub(super) fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let done = self.runtime.block_on(async { tokio::time::timeout(self.patience, work).await });
        done.with_context(|| format!("No answer within {} s", self.patience.as_secs()))?
    }

    /// Makes a call that must succeed.
    ///
    /// # Errors
    /// The peer's, or when there is no answer within the patience.
    pub fn call<T>(
        &self,
        what: &str,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        match self.try_call(call).with_context(|| what.to_owned())? {
            Ok(answer) => Ok(answer),
            Err(status) => bail!("{what}: {:?}: {}", status.code(), status.message()),
        }
    }

    /// Whether containerd's conditions for pods and their network hold.
    ///
    /// # Errors
    /// With the reason of the first that does not.
    pub fn expect_ready(&self) -> Result<()> {
        let answer = self.call("Status", self.service().status(StatusRequest { verbose: false }))?;
        for condition in answer.status.context("Status says nothing")?.conditions {
            if !condition.status && ["RuntimeReady", "NetworkReady"].contains(&condition.r#type.as_str()) {
                bail!("{}: {}: {}", condition.r#type, condition.reason, condition.message);
            }
        }
        Ok(())
    }

    /// Names of the images that pods can be made of.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn images(&self) -> Result<Vec<String>> {
        let mut service = ImageServiceClient::new(self.channel.clone());
        let answer = self.call("ListImages", service.list_images(ListImagesRequest::default()))?;
        Ok(answer.images.into_iter().flat_map(|image| image.repo_tags).collect())
    }

    /// Removes every pod; answers what it found.
    ///
    /// # Errors
    /// When containerd does not answer or a pod cannot be removed.
    pub fn sweep(&self) -> Result<Vec<String>> {
        let listed =
            self.call("ListPodSandbox", self.service().list_pod_sandbox(ListPodSandboxRequest::default()))?.items;
        for pod in &listed {
            let (stop, remove) = (pod.id.clone(), pod.id.clone());
            let stop = StopPodSandboxRequest { pod_sandbox_id: stop };
            self.call("StopPodSandbox", self.service().stop_pod_sandbox(stop))?;
            let remove = RemovePodSandboxRequest { pod_sandbox_id: remove };
            self.call("RemovePodSandbox", self.service().remove_pod_sandbox(remove))?;
        }
        Ok(listed.into_iter().map(|pod| format!("pod {}", pod.id)).collect())
    }
}

/// Counts until the stream ends, as it does with containerd.
async fn count_events(mut service: RuntimeServiceClient<Channel>, count: watch::Sender<u64>) {
    let Ok(stream) = service.get_container_events(GetEventsRequest {}).await else { return };
    let mut stream = stream.into_inner();
    while let Ok(Some(_)) = stream.message().await {
        count.send_modify(|count| *count += 1);
    }
}
