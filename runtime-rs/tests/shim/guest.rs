//! A guest without a virtual machine: the agent protocol over the same sockets, with host processes as containers.
//!
//! What the kernel command line says after `fake=` decides how it fails; without it, it works.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use dragonball::NetConfig;
use nix::sys::eventfd::{EfdFlags, EventFd};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use protocols::agent::{
    ContainerOptions, Event, GuestCommand, GuestStamp, NextEventRequest, OnlineCpuMemRequest, OnlineCpuMemResponse,
    SetupRequest, SetupResponse, UpdateNetworkRequest, UpdateNetworkResponse,
};
use protocols::agent_ttrpc::{AgentService, create_agent_service};
use protocols::containerd::api::*;
use protocols::containerd::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use protocols::containerd::shim_async::{Task, create_task};
use protocols::containerd::ttrpc;
use protocols::{AGENT_PORT, GUEST, GUEST_COMMAND_TYPE_URL, SHARED_DIR, STREAM_PORT};
use runtime_rs::machine::{
    ChangeError, ExitReason, FirstDevices, Hardware, HostDevice, LaunchError, Launcher, Machine, Plan, Plugged,
};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

pub(crate) struct FakeLauncher;

impl Launcher for FakeLauncher {
    fn launch(&self, plan: &Plan) -> Result<Box<dyn Machine>, LaunchError> {
        tell(&format!("made with {:?}", (plan.size.boot, plan.size.max)));
        let plan = plan.clone();
        let shared = Arc::new(Shared {
            event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap(),
            reason: OnceLock::new(),
            stop: watch::Sender::new(false),
        });
        let guest = Arc::clone(&shared);
        let booted = plan.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(live(&booted, &guest));
        });
        let limit = plan_word(&plan, "limit=").and_then(|limit| limit.parse().ok());
        Ok(Box::new(FakeMachine(shared, limit)))
    }
}

struct Shared {
    event: EventFd,
    reason: OnceLock<ExitReason>,
    stop: watch::Sender<bool>,
}

impl Shared {
    fn end(&self, reason: ExitReason) {
        let _ = self.reason.set(reason);
        self.event.write(1).unwrap();
        self.stop.send_replace(true);
    }
}

struct FakeMachine(Arc<Shared>, Option<u8>);

/// What the kernel's command line says behind `name`.
fn plan_word<'a>(plan: &'a Plan, name: &str) -> Option<&'a str> {
    plan.cmdline.split_whitespace().find_map(|word| word.strip_prefix(name))
}

impl Machine for FakeMachine {
    fn exit_event(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }

    fn exit_reason(&self) -> Option<ExitReason> {
        self.0.reason.get().cloned()
    }

    fn stop(&self) {
        self.0.end(ExitReason::Stopped);
    }

    fn console_tail(&self) -> String {
        "the last line of the console\n".to_owned()
    }

    fn stamps(&self) -> Vec<(&'static str, u64)> {
        vec![("kernel entered", timeline::now_ns())]
    }

    fn hardware(&self) -> Arc<dyn Hardware> {
        Arc::new(FakeHardware { limit: self.1 })
    }
}

/// Hardware that tells the test of each change, and stops growing at a number of vCPUs if it has one.
struct FakeHardware {
    limit: Option<u8>,
}

impl Hardware for FakeHardware {
    fn resize_vcpus(&self, count: u8, _: Duration) -> Result<u8, ChangeError> {
        let count = self.limit.map_or(count, |limit| count.min(limit));
        tell(&format!("{count} vCPUs"));
        Ok(count)
    }

    fn resize_memory(&self, bytes: u64, _: Duration) -> Result<u64, ChangeError> {
        tell(&format!("{} MiB", bytes >> 20));
        Ok(bytes)
    }

    fn add_device(&self, device: &HostDevice, deadline: Duration) -> Result<Plugged, ChangeError> {
        tell(&format!("add {}", device.path().display()));
        Err(ChangeError::Unseen(deadline))
    }

    fn remove_device(&self, name: &str, _: Duration) -> Result<(), ChangeError> {
        tell(&format!("remove {name}"));
        Ok(())
    }

    fn add_card(&self, name: &str, card: &NetConfig, _: Duration) -> Result<(), ChangeError> {
        let interface = name.split('-').next().unwrap();
        tell(&format!("card {} for {interface}", card.mac.unwrap()));
        Ok(())
    }

    fn remove_card(&self, name: &str, _: Duration) -> Result<(), ChangeError> {
        tell(&format!("no card for {}", name.split('-').next().unwrap()));
        Ok(())
    }

    fn first_devices(&self) -> Result<FirstDevices, ChangeError> {
        Ok(FirstDevices::default())
    }
}

/// Writes a line to the FIFO of the test that looks at the hardware, if one does.
fn tell(line: &str) {
    let root = std::env::var_os(crate::node::ROOT_VARIABLE).unwrap();
    let fifo = Path::new(&root).with_file_name(crate::node::HARDWARE);
    if let Ok(mut fifo) = std::fs::OpenOptions::new().write(true).open(fifo) {
        fifo.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

async fn live(plan: &Plan, shared: &Arc<Shared>) {
    let fate = plan_word(plan, "fake=");
    match fate {
        Some("poweroff") => return shared.end(ExitReason::PowerOff),
        Some("panic") => return shared.end(ExitReason::Panic),
        Some("triple") => return shared.end(ExitReason::TripleFault),
        Some("hang") => return drop(shared.stop.subscribe().wait_for(|stop| *stop).await),
        _ => {}
    }
    let dial = |port| format!("{}_{port}", plan.vsock.display());
    let connection = UnixStream::connect(dial(AGENT_PORT)).await.unwrap();
    let agent = Arc::new(Agent {
        streams: dial(STREAM_PORT),
        rootfs: plan.shared.clone(),
        dies_at_start: fate == Some("dies-at-start"),
        is_deaf: fate == Some("deaf"),
        shared: Arc::clone(shared),
        processes: Mutex::default(),
    });
    let once = futures::StreamExt::chain(
        futures::stream::once(async { Ok::<_, std::io::Error>(connection) }),
        futures::stream::pending(),
    );
    let mut server = Server::new()
        .add_listener(Listener::new(once))
        .register_service(create_task(Arc::clone(&agent) as Arc<dyn Task + Send + Sync>))
        .register_service(create_agent_service(Arc::clone(&agent) as Arc<dyn AgentService + Send + Sync>));
    server.start().await.unwrap();
    let _ = shared.stop.subscribe().wait_for(|stop| *stop).await;
    for process in agent.processes.lock().unwrap().values() {
        process.signal(9);
    }
}

struct Agent {
    streams: String,
    rootfs: PathBuf,
    dies_at_start: bool,
    is_deaf: bool,
    shared: Arc<Shared>,
    processes: Mutex<HashMap<(String, String), Arc<Process>>>,
}

/// A process that is described by its arguments, and its end.
struct Process {
    arguments: Vec<String>,
    directory: PathBuf,
    stdin: String,
    stdout: String,
    stderr: String,
    pid: OnceLock<i32>,
    exit: watch::Sender<Option<u32>>,
}

impl Process {
    fn signal(&self, signal: i32) {
        match self.pid.get() {
            Some(pid) => drop(nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(*pid),
                nix::sys::signal::Signal::try_from(signal).unwrap(),
            )),
            None => drop(self.exit.send_replace(Some(128 + signal.unsigned_abs()))),
        }
    }
}

impl Agent {
    fn find(&self, id: &str, exec_id: &str) -> ttrpc::Result<Arc<Process>> {
        let key = (id.to_owned(), exec_id.to_owned());
        self.processes.lock().unwrap().get(&key).cloned().ok_or_else(|| {
            ttrpc::error::get_rpc_status(ttrpc::Code::NOT_FOUND, format!("process {id}/{exec_id} not found"))
        })
    }

    fn add(&self, id: &str, exec_id: &str, process: Process) {
        self.processes.lock().unwrap().insert((id.to_owned(), exec_id.to_owned()), Arc::new(process));
    }

    /// As the agent does: one connection, which begins with the id.
    async fn stream(&self, name: &str) -> Option<OwnedFd> {
        let id: u64 = name.strip_prefix("stream:")?.parse().unwrap();
        let mut stream = UnixStream::connect(&self.streams).await.unwrap();
        stream.write_u64_le(id).await.unwrap();
        let stream = stream.into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        Some(stream.into())
    }
}

fn arguments(process: &serde_json::Value) -> Vec<String> {
    process["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

fn process(request: (String, String, String), arguments: Vec<String>, directory: &Path) -> Process {
    let (stdin, stdout, stderr) = request;
    let (pid, exit) = (OnceLock::new(), watch::Sender::new(None));
    Process { arguments, directory: directory.to_owned(), stdin, stdout, stderr, pid, exit }
}

#[async_trait]
impl Task for Agent {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        if self.is_deaf {
            return futures::future::pending().await;
        }
        assert_eq!(request.rootfs[0].source, format!("{SHARED_DIR}/{}/rootfs", request.id));
        let options = ContainerOptions::parse_from_bytes(&request.options.value).unwrap();
        let spec: serde_json::Value = serde_json::from_slice(&options.spec).unwrap();
        let arguments = arguments(&spec["process"]);
        if arguments[0] == "/no/such/program" {
            let text = "exec: \"/no/such/program\": no such file or directory";
            return Err(ttrpc::error::get_rpc_status(ttrpc::Code::NOT_FOUND, text));
        }
        let directory = self.rootfs.join(&request.id).join("rootfs");
        let process = process((request.stdin, request.stdout, request.stderr), arguments, &directory);
        self.add(&request.id, "", process);
        Ok(CreateTaskResponse { pid: 2, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let (arguments, directory) = if request.id == GUEST {
            assert_eq!(request.spec.type_url, GUEST_COMMAND_TYPE_URL);
            (GuestCommand::parse_from_bytes(&request.spec.value).unwrap().arguments, PathBuf::from("/"))
        } else {
            let spec: serde_json::Value = serde_json::from_slice(&request.spec.value).unwrap();
            (arguments(&spec), self.find(&request.id, "")?.directory.clone())
        };
        let process = process((request.stdin, request.stdout, request.stderr), arguments, &directory);
        self.add(&request.id, &request.exec_id, process);
        Ok(Empty::new())
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        if self.dies_at_start {
            self.shared.end(ExitReason::Panic);
            return futures::future::pending().await;
        }
        let process = self.find(&request.id, &request.exec_id)?;
        if process.arguments[0] == "/no/such/program" {
            return Err(ttrpc::error::get_rpc_status(ttrpc::Code::UNKNOWN, "no such program"));
        }
        let mut command = tokio::process::Command::new(&process.arguments[0]);
        command.args(&process.arguments[1..]).current_dir(&process.directory).process_group(0);
        // As in a machine: nothing outlives it.
        // SAFETY: the closure makes one system call, which is safe between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?));
        }
        let stdio = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        command.stdin(stdio(self.stream(&process.stdin).await));
        command.stdout(stdio(self.stream(&process.stdout).await));
        command.stderr(stdio(self.stream(&process.stderr).await));
        let mut child = command.spawn().unwrap();
        drop(command);
        process.pid.set(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
        tokio::spawn(async move {
            let status = child.wait().await.unwrap();
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
            process.exit.send_replace(Some(u32::try_from(code).unwrap()));
        });
        Ok(StartResponse { pid: 2, ..Default::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.find(&request.id, &request.exec_id)?;
        let mut exit = process.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        let exited_at = MessageField::some(Timestamp::now());
        Ok(WaitResponse { exit_status: status, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.find(&request.id, &request.exec_id)?.signal(i32::try_from(request.signal).unwrap());
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = String::from_utf8(request.resources.unwrap().value).unwrap();
        if resources.contains("-7") {
            return Err(ttrpc::error::get_rpc_status(ttrpc::Code::UNKNOWN, "no such limit"));
        }
        tell(&format!("limits {resources}"));
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.find(&request.id, "")?;
        let metrics = Metrics {
            cpu: MessageField::some(CPUStat { usage_usec: 2_500_000, ..Default::default() }),
            memory: MessageField::some(MemoryStat { usage: 3 << 20, ..Default::default() }),
            pids: MessageField::some(PidsStat { current: 2, ..Default::default() }),
            ..Default::default()
        };
        let type_url = "io.containerd.cgroups.v2.Metrics".to_owned();
        let value = metrics.write_to_bytes().unwrap();
        let stats = MessageField::some(Any { type_url, value, ..Default::default() });
        Ok(StatsResponse { stats, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.find(&request.id, &request.exec_id)?;
        self.processes.lock().unwrap().remove(&(request.id, request.exec_id));
        Ok(DeleteResponse::default())
    }
}

#[async_trait]
impl AgentService for Agent {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        assert_eq!(request.storages[0].fstype, "virtiofs");
        assert!(request.entropy.iter().any(|byte| *byte != 0));
        let boottime_ns = i64::try_from(timeline::now_ns()).unwrap();
        Ok(SetupResponse {
            stamps: vec![GuestStamp { name: "init".to_owned(), boottime_ns, ..Default::default() }],
            received_ns: boottime_ns,
            answered_ns: boottime_ns,
            ..Default::default()
        })
    }

    async fn online_cpu_mem(
        &self,
        _: &TtrpcContext,
        request: OnlineCpuMemRequest,
    ) -> ttrpc::Result<OnlineCpuMemResponse> {
        tell(&format!("online: {} vCPUs, {} MiB", request.cpus, request.memory >> 20));
        let (cpus, memory) = (request.cpus, request.memory);
        Ok(OnlineCpuMemResponse { cpus, memory, ..Default::default() })
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<UpdateNetworkResponse> {
        let interfaces = request.interfaces.iter().map(|one| format!("{} {}", one.name, one.addresses.join(" ")));
        let routes = request.routes.iter().map(|route| format!("via {} {}", route.gateway, route.interface));
        tell(&format!("network: {}", interfaces.chain(routes).collect::<Vec<_>>().join(", ")));
        Ok(UpdateNetworkResponse::default())
    }

    async fn next_event(&self, _: &TtrpcContext, _: NextEventRequest) -> ttrpc::Result<Event> {
        futures::future::pending().await
    }
}
