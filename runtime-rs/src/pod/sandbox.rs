//! The sandbox: the virtual machine, and the agent in it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use protocols::agent::{SetupRequest, SetupResponse, Storage};
use protocols::agent_ttrpc::AgentServiceClient;
use protocols::containerd::shim_async::TaskClient;
use protocols::containerd::ttrpc;
use protocols::{AGENT_PORT, SHARED_DIR, SHARED_TAG, STREAM_PORT};
use timeline::{ClockOffset, Lane};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use super::Pod;
use super::devices::Devices;
use super::resize::Resizer;
use crate::error::Error;
use crate::host::blocking;
use crate::machine::{Blueprint, ExitReason, Hardware, Machine, Plan};

/// The agent mounts one file system and sets a few files and sysctls.
const SETUP_DEADLINE: Duration = Duration::from_secs(30);
/// Random bytes that the guest starts with: a fresh VM has hardly any of its own.
const ENTROPY: usize = 64;
/// What ttrpc's server answers to a request whose time is up while its handler still runs.
const TTRPC_TIMEOUT: &str = "timeout";
/// The end of a machine that was told to end.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// A running sandbox.
pub struct Sandbox {
    machine: Box<dyn Machine>,
    exit: AsyncFd<OwnedFd>,
    /// Containers of the guest.
    pub task: TaskClient,
    /// The guest itself.
    pub agent: AgentServiceClient,
    /// Keeps the machine as large as its containers need.
    pub resizer: Resizer,
    /// The devices of the host that its containers have.
    pub devices: Devices,
    /// How long the agent may take for one container.
    pub create_timeout: Duration,
}

impl Sandbox {
    /// What changes its machine.
    pub fn hardware(&self) -> Arc<dyn Hardware> {
        self.machine.hardware()
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("exit_reason", &self.machine.exit_reason()).finish_non_exhaustive()
    }
}

/// Where the guest's dials arrive. Made before the machine, so that no dial is refused.
struct Listeners {
    agent: UnixListener,
    streams: UnixListener,
}

impl Sandbox {
    /// Boots the machine, waits for its agent and sets the guest up.
    ///
    /// # Errors
    ///
    /// [`Error::Launch`], [`Error::GuestEnded`], [`Error::GuestHangs`], or the agent's answer. The machine has ended then.
    pub async fn boot(pod: &Arc<Pod>, blueprint: &Blueprint) -> Result<Self, Error> {
        let Blueprint { config, size, .. } = blueprint;
        let listeners = listen(pod)?;
        let console = config.hypervisor.enable_debug.then(|| pod.paths.console());
        let plan = Plan::new(blueprint, &pod.paths.vsock(), &pod.paths.shared(), console);
        let launcher = Arc::clone(&pod.launcher);
        let machine = blocking::run("launch", move || launcher.launch(&plan)).await??;
        let exit = watch(machine.exit_event()).map_err(Error::host("watch", "the virtual machine"))?;
        pod.stamp("machine started");
        // While the guest boots nobody waits for this process.
        dragonball::footprint::give_back_code();

        let deadline = config.agent.reconnect_timeout;
        let agent = tokio::select! {
            dialled = listeners.agent.accept() => dialled.map_err(Error::host("accept", "the agent's dial"))?.0,
            _ = exit.readable() => return Err(ended(&*machine)),
            () = tokio::time::sleep(deadline) => {
                let tail = machine.console_tail();
                return Err(Error::GuestHangs { deadline, tail });
            }
        };
        pod.stamp("agent dialled");
        tokio::spawn(Arc::clone(&pod.streams).serve(listeners.streams));
        let client = Client::new(Socket::from(agent));
        let agent = AgentServiceClient::new(client.clone());
        let create_timeout = config.agent.create_container_timeout;
        let sandbox = Self {
            devices: Devices::start(machine.hardware(), &blueprint.devices, create_timeout).await?,
            resizer: Resizer::start(machine.hardware(), agent.clone(), *size, create_timeout),
            machine,
            exit,
            task: TaskClient::new(client),
            agent,
            create_timeout,
        };
        let setup = sandbox.setup(pod, blueprint);
        tokio::select! {
            done = setup => done?,
            _ = sandbox.exit.readable() => return Err(ended(&*sandbox.machine)),
        }
        Ok(sandbox)
    }

    async fn setup(&self, pod: &Pod, blueprint: &Blueprint) -> Result<(), Error> {
        let Blueprint { config, hostname, network, sysctls, shm_size, .. } = blueprint;
        let mut entropy = vec![0; ENTROPY];
        fill_random(&mut entropy)?;
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let request = SetupRequest {
            sandbox_id: pod.id.clone(),
            hostname: hostname.clone(),
            sysctls: sysctls.clone(),
            interfaces: network.interfaces.clone(),
            routes: network.routes.clone(),
            neighbours: network.neighbours.clone(),
            storages: vec![Storage {
                fstype: "virtiofs".to_owned(),
                source: SHARED_TAG.to_owned(),
                target: SHARED_DIR.to_owned(),
                ..Storage::default()
            }],
            realtime_ns: i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX),
            entropy,
            shm_size: *shm_size,
            debug_console: config.agent.debug_console,
            ..SetupRequest::default()
        };
        let sent = timeline::now_ns();
        let response = self
            .agent
            .setup(ttrpc::context::with_duration(SETUP_DEADLINE), &request)
            .await
            .map_err(|error| self.explain(error))?;
        self.stamp(pod, sent, &response);
        Ok(())
    }

    /// Puts the machine's and the guest's stamps on the host's clock.
    fn stamp(&self, pod: &Pod, sent: u64, response: &SetupResponse) {
        let received = timeline::now_ns();
        let clock = ClockOffset::from_exchange(sent, response.received_ns, response.answered_ns, received);
        let mut timeline = pod.timeline();
        for (name, at) in self.machine.stamps() {
            timeline.stamp_at(format!("vmm: {name}"), Lane::Host, at);
        }
        for stamp in &response.stamps {
            if let Some(at) = clock.to_host(stamp.boottime_ns).filter(|at| *at <= received) {
                timeline.stamp_at(stamp.name.clone(), Lane::Guest, at);
            }
        }
        timeline.stamp_at("agent ready", Lane::Host, received);
    }

    /// The agent's answer as an error of ours, with its code; a lost connection as the end that caused it.
    pub fn explain(&self, error: ttrpc::Error) -> Error {
        match (error, self.machine.exit_reason()) {
            // ttrpc counts a request's time at both ends, and the agent's may be the first to be up.
            (ttrpc::Error::RpcStatus(status), None) if status.message == TTRPC_TIMEOUT => {
                Error::Unanswered(status.message)
            }
            (ttrpc::Error::RpcStatus(status), _) => {
                Error::Agent(status.message.clone(), status.code.enum_value().unwrap_or(ttrpc::Code::UNKNOWN))
            }
            (_, Some(reason)) => Error::GuestGone(reason.to_string()),
            // What ttrpc says of a deadline; lost connections have errors of their own.
            (ttrpc::Error::Others(text), None) => Error::Unanswered(text),
            (other, None) => Error::GuestGone(other.to_string()),
        }
    }

    /// Waits for the machine's end.
    pub async fn ended(&self) -> String {
        // An error means that the event cannot be watched any more: as good as the end.
        let _ = self.exit.readable().await;
        self.machine.exit_reason().map_or_else(|| "its threads are gone".to_owned(), |reason| reason.to_string())
    }

    /// Whether the machine has ended.
    pub fn has_ended(&self) -> bool {
        self.machine.exit_reason().is_some()
    }

    /// Ends the machine and waits until it has.
    pub async fn stop(&self) {
        self.machine.stop();
        if tokio::time::timeout(STOP_DEADLINE, self.exit.readable()).await.is_err() {
            tracing::warn!("the virtual machine does not end; it ends with this process");
        }
    }

    /// Ends the machine: its agent is lost, or does not even answer to a request that something shall end.
    pub fn give_up(&self, error: &dyn std::fmt::Display) {
        tracing::warn!(%error, "the agent is lost; the sandbox ends");
        self.machine.stop();
    }
}

fn listen(pod: &Pod) -> Result<Listeners, Error> {
    let bind = |port| {
        let path = pod.paths.vsock_port(port);
        UnixListener::bind(&path).map_err(Error::host("listen on", path))
    };
    Ok(Listeners { agent: bind(AGENT_PORT)?, streams: bind(STREAM_PORT)? })
}

pub(super) fn watch(event: BorrowedFd<'_>) -> std::io::Result<AsyncFd<OwnedFd>> {
    let event = event.try_clone_to_owned()?;
    // SAFETY: the descriptor is a clone that the `AsyncFd` owns: it stays open and refers to the same file until the
    // registration ends with it.
    Ok(unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) }?)
}

fn ended(machine: &dyn Machine) -> Error {
    let what = machine.exit_reason().unwrap_or_else(|| ExitReason::Failed("it gave no reason".to_owned()));
    Error::GuestEnded { what, tail: machine.console_tail() }
}

fn fill_random(buffer: &mut [u8]) -> Result<(), Error> {
    use std::io::Read;
    let path = Path::new("/dev/urandom");
    std::fs::File::open(path).and_then(|mut file| file.read_exact(buffer)).map_err(Error::host("read", path))
}
