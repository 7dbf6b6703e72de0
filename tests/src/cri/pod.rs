//! Pods and their containers through the CRI.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatsRequest, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, Device, DnsConfig, ExecSyncRequest, ExecSyncResponse, ImageSpec, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState, PodSandboxStatsRequest, PodSandboxStatus,
    PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};

use super::Cri;
use crate::event::Deadline;

/// What a pod shall be.
#[derive(Clone, Debug, Default)]
pub struct PodSpec {
    /// As the kubelet writes it; name and log directory are filled in.
    pub config: PodSandboxConfig,
}

impl PodSpec {
    /// A pod with namespaces of its own, named after `name`, with logs below `logs`.
    #[must_use]
    pub fn new(name: &str, logs: &Path) -> Self {
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("{name}-uid"),
            namespace: "suites".to_owned(),
            attempt: 0,
        };
        let security_context = LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption::default()),
            ..LinuxSandboxSecurityContext::default()
        };
        let linux =
            LinuxPodSandboxConfig { security_context: Some(security_context), ..LinuxPodSandboxConfig::default() };
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            // As kubelets do. Without, containerd copies the node's, which a node need not have.
            dns_config: Some(DnsConfig { servers: vec!["10.79.0.1".to_owned()], ..DnsConfig::default() }),
            linux: Some(linux),
            ..PodSandboxConfig::default()
        };
        Self { config }
    }

    /// The Linux part.
    pub fn linux(&mut self) -> &mut LinuxPodSandboxConfig {
        self.config.linux.get_or_insert_default()
    }
}

/// A pod that runs, or ran. It is removed by [`Pod::remove`]; the harness says which pods a case has left.
#[derive(Debug)]
pub struct Pod<'a> {
    /// Where it runs.
    pub cri: &'a Cri,
    /// Its id.
    pub id: String,
    config: PodSandboxConfig,
}

/// What a container shall be.
#[derive(Clone, Debug, Default)]
pub struct ContainerSpec {
    /// As the kubelet writes it.
    pub config: ContainerConfig,
}

impl ContainerSpec {
    /// `program` in `image`, with its output in the log `NAME.log`.
    #[must_use]
    pub fn new(name: &str, image: &str, program: &[&str]) -> Self {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() }),
            command: program.iter().map(|word| (*word).to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: None,
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        pid: k8s_cri::v1::NamespaceMode::Container.into(),
                        ..NamespaceOption::default()
                    }),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        };
        Self { config }
    }

    /// Its security context.
    pub fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        self.config.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    /// The same with these resources.
    #[must_use]
    pub fn with_resources(mut self, resources: LinuxContainerResources) -> Self {
        self.config.linux.get_or_insert_default().resources = Some(resources);
        self
    }

    /// The same with the host's `source` at `target`.
    #[must_use]
    pub fn with_mount(mut self, source: &Path, target: &str, readonly: bool) -> Self {
        self.config.mounts.push(Mount {
            container_path: target.to_owned(),
            host_path: source.display().to_string(),
            readonly,
            ..Mount::default()
        });
        self
    }

    /// The same with the host's device at `target`; `permissions` as `rwm`.
    #[must_use]
    pub fn with_device(mut self, device: &Path, target: &str, permissions: &str) -> Self {
        self.config.devices.push(Device {
            container_path: target.to_owned(),
            host_path: device.display().to_string(),
            permissions: permissions.to_owned(),
        });
        self
    }
}

impl Cri {
    /// Starts a pod.
    ///
    /// # Errors
    /// containerd's.
    pub fn run_pod(&self, spec: PodSpec) -> Result<Pod<'_>> {
        self.run_pod_with(spec, &self.handler)
    }

    /// Starts a pod with another runtime handler.
    ///
    /// # Errors
    /// containerd's.
    pub fn run_pod_with(&self, spec: PodSpec, handler: &str) -> Result<Pod<'_>> {
        let request = RunPodSandboxRequest { config: Some(spec.config.clone()), runtime_handler: handler.to_owned() };
        let answer = self.call("RunPodSandbox", self.service().run_pod_sandbox(request))?;
        Ok(Pod { cri: self, id: answer.pod_sandbox_id, config: spec.config })
    }
}

impl Pod<'_> {
    /// What containerd says of it.
    ///
    /// # Errors
    /// containerd's.
    pub fn status(&self) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = self.cri.call("PodSandboxStatus", self.cri.service().pod_sandbox_status(request))?;
        answer.status.context("PodSandboxStatus says nothing")
    }

    /// Waits until it is not ready.
    ///
    /// # Errors
    /// When it still is after the patience.
    pub fn ended(&self) -> Result<()> {
        let deadline = Deadline::after(self.cri.patience);
        let mut events = self.cri.events();
        while self.status()?.state() == PodSandboxState::SandboxReady {
            self.cri.next_event(&mut events, deadline).context("The pod does not end")?;
        }
        Ok(())
    }

    /// Its address.
    ///
    /// # Errors
    /// When it has none.
    pub fn address(&self) -> Result<String> {
        let network = self.status()?.network.context("The pod has no network")?;
        ensure!(!network.ip.is_empty(), "The pod has no address");
        Ok(network.ip)
    }

    /// What it uses.
    ///
    /// # Errors
    /// containerd's.
    pub fn stats(&self) -> Result<k8s_cri::v1::PodSandboxStats> {
        let request = PodSandboxStatsRequest { pod_sandbox_id: self.id.clone() };
        let answer = self.cri.call("PodSandboxStats", self.cri.service().pod_sandbox_stats(request))?;
        answer.stats.context("PodSandboxStats says nothing")
    }

    /// Makes a container.
    ///
    /// # Errors
    /// containerd's.
    pub fn create(&self, spec: ContainerSpec) -> Result<Container<'_>> {
        let log = Path::new(&self.config.log_directory).join(&spec.config.log_path);
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(spec.config),
            sandbox_config: Some(self.config.clone()),
        };
        let answer = self.cri.call("CreateContainer", self.cri.service().create_container(request))?;
        Ok(Container { cri: self.cri, id: answer.container_id, log })
    }

    /// Makes a container and starts it.
    ///
    /// # Errors
    /// containerd's.
    pub fn run(&self, spec: ContainerSpec) -> Result<Container<'_>> {
        let container = self.create(spec)?;
        container.start()?;
        Ok(container)
    }

    /// Stops it and all of its containers.
    ///
    /// # Errors
    /// containerd's.
    pub fn stop(&self) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.call("StopPodSandbox", self.cri.service().stop_pod_sandbox(request)).map(drop)
    }

    /// Stops it and removes it with its containers.
    ///
    /// # Errors
    /// containerd's.
    pub fn remove(self) -> Result<()> {
        self.stop()?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.call("RemovePodSandbox", self.cri.service().remove_pod_sandbox(request)).map(drop)
    }
}

/// A container of a pod.
#[derive(Debug)]
pub struct Container<'a> {
    pub(super) cri: &'a Cri,
    /// Its id.
    pub id: String,
    /// Its log.
    pub log: PathBuf,
}

impl Container<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// containerd's.
    pub fn start(&self) -> Result<()> {
        let request = StartContainerRequest { container_id: self.id.clone() };
        self.cri.call("StartContainer", self.cri.service().start_container(request)).map(drop)
    }

    /// What containerd says of it.
    ///
    /// # Errors
    /// containerd's.
    pub fn status(&self) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let answer = self.cri.call("ContainerStatus", self.cri.service().container_status(request))?;
        answer.status.context("ContainerStatus says nothing")
    }

    /// Waits for its end; answers what containerd then says of it.
    ///
    /// # Errors
    /// When it does not end within the patience.
    pub fn ended(&self) -> Result<ContainerStatus> {
        let deadline = Deadline::after(self.cri.patience);
        let mut events = self.cri.events();
        loop {
            let status = self.status()?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            let next = self.cri.next_event(&mut events, deadline);
            next.with_context(|| format!("The container does not end: {status:?}"))?;
        }
    }

    /// Runs `program` in it to its end, which may take `seconds` (0: any time).
    ///
    /// # Errors
    /// containerd's.
    pub fn exec(&self, program: &[&str], seconds: i64) -> Result<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: program.iter().map(|word| (*word).to_owned()).collect(),
            timeout: seconds,
        };
        self.cri.call("ExecSync", self.cri.service().exec_sync(request))
    }

    /// What the shell prints for `script` in it; the script must succeed.
    ///
    /// # Errors
    /// containerd's, and when the script fails.
    pub fn shell(&self, script: &str) -> Result<String> {
        let answer = self.exec(&["sh", "-c", script], 0)?;
        let (output, errors) = (String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr));
        ensure!(answer.exit_code == 0, "{script}: exit code {}: {output}{errors}", answer.exit_code);
        Ok(output.into_owned())
    }

    /// What it uses.
    ///
    /// # Errors
    /// containerd's.
    pub fn stats(&self) -> Result<k8s_cri::v1::ContainerStats> {
        let request = ContainerStatsRequest { container_id: self.id.clone() };
        let answer = self.cri.call("ContainerStats", self.cri.service().container_stats(request))?;
        answer.stats.context("ContainerStats says nothing")
    }

    /// Stops it: SIGTERM, and SIGKILL after `seconds`.
    ///
    /// # Errors
    /// containerd's.
    pub fn stop(&self, seconds: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: self.id.clone(), timeout: seconds };
        self.cri.call("StopContainer", self.cri.service().stop_container(request)).map(drop)
    }

    /// Removes it.
    ///
    /// # Errors
    /// containerd's.
    pub fn remove(self) -> Result<()> {
        let request = RemoveContainerRequest { container_id: self.id.clone() };
        self.cri.call("RemoveContainer", self.cri.service().remove_container(request)).map(drop)
    }
}
