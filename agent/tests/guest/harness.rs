//! A host for the agent: runs it as PID 1 of its own namespaces, over unix sockets instead of vsock.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use protobuf::{Message, MessageField};
use protocols::agent::{ContainerOptions, Storage};
use protocols::agent_ttrpc::AgentServiceClient;
use protocols::containerd::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, StartRequest, UpdateTaskRequest,
    WaitRequest,
};
use protocols::containerd::shim_async::{Client, TaskClient};
use protocols::containerd::types::mount::Mount;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::context::Context;

/// Nothing that a test waits for takes this long; a hang fails instead of blocking the suite.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// A name that no other test of this machine has.
pub(crate) fn unique(prefix: &str) -> String {
    format!("{prefix}-{}-{}", std::process::id(), NUMBERS.fetch_add(1, Ordering::Relaxed))
}

/// Whether this user may make namespaces and mounts; says so loudly when not.
pub(crate) fn privileged() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: this test makes namespaces and mounts: run it as root");
    }
    root
}

/// Whether this machine lets cgroups of version 2 limit memory; says so loudly when not.
pub(crate) fn memory_controller() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mut roots = mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let available = roots.any(|line| {
        let controllers = Path::new(line.split(' ').nth(1).unwrap_or("/")).join("cgroup.controllers");
        std::fs::read_to_string(controllers).is_ok_and(|text| text.split_whitespace().any(|word| word == "memory"))
    });
    if !available {
        eprintln!("SKIPPED: the memory controller of this machine is not in the unified hierarchy");
    }
    available
}

/// An agent as PID 1 of its own namespaces, whose host listens at `prefix`.
pub(crate) fn agent(prefix: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"]).args([
        env!("CARGO_BIN_EXE_kata-agent"),
        "--dial",
        &format!("unix:{prefix}"),
    ]);
    command
}

/// An agent under test and the host's end of its connections.
pub(crate) struct Host {
    pub(crate) task: TaskClient,
    pub(crate) agent: AgentServiceClient,
    streams: UnixListener,
    pending: HashMap<u64, UnixStream>,
    agent_process: Child,
    pub(crate) agent_pid: i32,
    pub(crate) directory: tempfile::TempDir,
}

impl Host {
    /// Starts an agent and waits until it has dialled.
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let prefix = directory.path().join("s");
        let control = UnixListener::bind(port(&prefix, protocols::AGENT_PORT)).expect("control socket");
        let streams = UnixListener::bind(port(&prefix, protocols::STREAM_PORT)).expect("stream socket");
        let agent_process = agent(&prefix.display().to_string()).spawn().expect("unshare");
        let (connection, _) = within(control.accept()).await.expect("the agent dials");
        let agent_pid = connection.peer_cred().expect("credentials").pid().expect("a pid");
        let client = Client::new(ttrpc::asynchronous::transport::Socket::new(connection));
        Self {
            task: TaskClient::new(client.clone()),
            agent: AgentServiceClient::new(client),
            streams,
            pending: HashMap::new(),
            agent_process,
            agent_pid,
            directory,
        }
    }

    /// The stream with this id, once the agent has dialled it.
    pub(crate) async fn stream(&mut self, id: u64) -> UnixStream {
        loop {
            if let Some(stream) = self.pending.remove(&id) {
                return stream;
            }
            let (mut stream, _) = within(self.streams.accept()).await.expect("a stream");
            let got = within(stream.read_u64_le()).await.expect("a stream id");
            self.pending.insert(got, stream);
        }
    }

    /// Creates a container; its streams are those of `stdio`.
    pub(crate) async fn create(&self, id: &str, spec: &Value, stdio: &Stdio) -> ttrpc::Result<u32> {
        self.create_with(id, spec, stdio, self.rootfs_mount(id)).await
    }

    pub(crate) async fn create_with(
        &self,
        id: &str,
        spec: &Value,
        stdio: &Stdio,
        rootfs: Vec<Mount>,
    ) -> ttrpc::Result<u32> {
        let request = create_request(id, spec, stdio, rootfs);
        within(self.task.create(context(), &request)).await.map(|response| response.pid)
    }

    /// A file system of its own with busybox.
    pub(crate) fn rootfs_mount(&self, id: &str) -> Vec<Mount> {
        let rootfs = self.directory.path().join(id);
        make_rootfs(&rootfs);
        vec![Mount {
            type_: "bind".into(),
            source: rootfs.display().to_string(),
            target: format!("{}/{id}/rootfs", protocols::BUNDLES_DIR),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        }]
    }

    pub(crate) async fn begin(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        within(self.task.start(context(), &request)).await.map(|response| response.pid)
    }

    pub(crate) async fn exec(&self, id: &str, exec_id: &str, process: &Value, stdio: &Stdio) -> ttrpc::Result<()> {
        let kind = "types.containerd.io/opencontainers/runtime-spec/1/Process";
        self.exec_as(id, exec_id, (kind, process.to_string().as_bytes()), stdio).await
    }

    /// The same with a description of any type.
    pub(crate) async fn exec_as(
        &self,
        id: &str,
        exec_id: &str,
        (kind, description): (&str, &[u8]),
        stdio: &Stdio,
    ) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            terminal: stdio.terminal,
            stdin: stdio.stdin.map(stream_field).unwrap_or_default(),
            stdout: stdio.stdout.map(stream_field).unwrap_or_default(),
            stderr: stdio.stderr.map(stream_field).unwrap_or_default(),
            spec: MessageField::some(any(kind, description)),
            ..Default::default()
        };
        within(self.task.exec(context(), &request)).await.map(drop)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        within(self.task.wait(context(), &request)).await.map(|response| response.exit_status)
    }

    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        self.kill_with(KillRequest { id: id.into(), exec_id: exec_id.into(), signal, ..Default::default() }).await
    }

    pub(crate) async fn kill_with(&self, request: KillRequest) -> ttrpc::Result<()> {
        within(self.task.kill(context(), &request)).await.map(drop)
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        within(self.task.delete(context(), &request)).await
    }

    pub(crate) async fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<()> {
        let kind = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
        let resources = MessageField::some(any(kind, resources.to_string().as_bytes()));
        let request = UpdateTaskRequest { id: id.into(), resources, ..Default::default() };
        within(self.task.update(context(), &request)).await.map(drop)
    }

    /// Runs a container to its end: exit status, stdout and stderr.
    pub(crate) async fn run(&mut self, id: &str, spec: &Value) -> (u32, String, String) {
        let stdio = Stdio::outputs();
        self.create(id, spec, &stdio).await.expect("create");
        self.begin(id, "").await.expect("start");
        let outputs = self.outputs(&stdio).await;
        let status = self.wait(id, "").await.expect("wait");
        self.delete(id, "").await.expect("delete");
        (status, outputs.0, outputs.1)
    }

    /// Runs a further process to its end: exit status and stdout.
    pub(crate) async fn run_exec(&mut self, id: &str, process: &Value) -> (u32, String) {
        let stdio = Stdio::outputs();
        let exec_id = unique("exec");
        self.exec(id, &exec_id, process, &stdio).await.expect("exec");
        self.begin(id, &exec_id).await.expect("start exec");
        let outputs = self.outputs(&stdio).await;
        let status = self.wait(id, &exec_id).await.expect("wait exec");
        self.delete(id, &exec_id).await.expect("delete exec");
        (status, format!("{}{}", outputs.0, outputs.1))
    }

    /// All of stdout and stderr.
    pub(crate) async fn outputs(&mut self, stdio: &Stdio) -> (String, String) {
        let mut texts = [String::new(), String::new()];
        for (id, text) in [stdio.stdout, stdio.stderr].into_iter().zip(&mut texts) {
            if let Some(id) = id {
                let mut bytes = Vec::new();
                within(self.stream(id).await.read_to_end(&mut bytes)).await.expect("output");
                *text = String::from_utf8_lossy(&bytes).into_owned();
            }
        }
        texts.into()
    }

    /// The mounts that the agent sees.
    pub(crate) fn agent_mounts(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/mounts", self.agent_pid)).expect("mounts")
    }

    /// The path of a file as the agent sees it.
    pub(crate) fn agent_path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.agent_pid()))
    }

    /// The agent's pid as this process sees it.
    pub(crate) fn agent_pid(&self) -> i32 {
        self.agent_pid
    }

    /// The agent's cgroup (v2) as this process sees it: it outlives the agent.
    pub(crate) fn agent_cgroup(&self) -> PathBuf {
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 mount");
        let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", self.agent_pid())).expect("cgroups");
        let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).expect("a cgroup");
        Path::new(mount.split(' ').nth(1).expect("a mount point")).join(path)
    }

    /// Names of the files in a directory of the agent; empty when there is no such directory.
    pub(crate) fn list(&self, path: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.agent_path(path)) else { return Vec::new() };
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    /// Drops the connection and waits for the end of the agent.
    pub(crate) async fn hang_up(self) -> std::process::ExitStatus {
        let Self { task, agent, agent_process, .. } = self;
        drop((task, agent));
        ended(agent_process).await
    }

    /// Waits for the end of the agent, which has been told to end.
    pub(crate) async fn ended(self) -> std::process::ExitStatus {
        let Self { task, agent, agent_process, .. } = self;
        let status = ended(agent_process).await;
        drop((task, agent));
        status
    }
}

async fn ended(mut process: Child) -> std::process::ExitStatus {
    let status = tokio::task::spawn_blocking(move || process.wait());
    within(status).await.expect("no panic").expect("an exit status")
}

/// A request as the host half makes it.
pub(crate) fn create_request(id: &str, spec: &Value, stdio: &Stdio, rootfs: Vec<Mount>) -> CreateTaskRequest {
    let options = ContainerOptions { spec: spec.to_string().into_bytes(), ..Default::default() };
    CreateTaskRequest {
        id: id.into(),
        bundle: format!("{}/{id}", protocols::BUNDLES_DIR),
        rootfs,
        terminal: stdio.terminal,
        stdin: stdio.stdin.map(stream_field).unwrap_or_default(),
        stdout: stdio.stdout.map(stream_field).unwrap_or_default(),
        stderr: stdio.stderr.map(stream_field).unwrap_or_default(),
        options: MessageField::some(any(
            protocols::CONTAINER_OPTIONS_TYPE_URL,
            &options.write_to_bytes().expect("options"),
        )),
        ..Default::default()
    }
}

/// The stream ids of one process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: Option<u64>,
    pub(crate) stdout: Option<u64>,
    pub(crate) stderr: Option<u64>,
    pub(crate) terminal: bool,
}

impl Stdio {
    pub(crate) fn outputs() -> Self {
        Self { stdout: Some(stream_id()), stderr: Some(stream_id()), ..Self::default() }
    }

    pub(crate) fn all() -> Self {
        Self { stdin: Some(stream_id()), ..Self::outputs() }
    }

    pub(crate) fn terminal() -> Self {
        Self { stdin: Some(stream_id()), stdout: Some(stream_id()), stderr: None, terminal: true }
    }
}

fn stream_id() -> u64 {
    NUMBERS.fetch_add(1, Ordering::Relaxed)
}

fn stream_field(id: u64) -> String {
    format!("{}{id}", protocols::STREAM_SCHEME)
}

pub(crate) fn port(prefix: &Path, port: u32) -> String {
    format!("{}_{port}", prefix.display())
}

fn any(kind: &str, value: &[u8]) -> protobuf::well_known_types::any::Any {
    protobuf::well_known_types::any::Any { type_url: kind.into(), value: value.into(), ..Default::default() }
}

pub(crate) fn context() -> Context {
    ttrpc::context::with_timeout(0)
}

/// Fails the test when something never happens.
pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("an answer before the deadline")
}

/// The gRPC code and text of a refused request.
pub(crate) fn refusal<T: std::fmt::Debug>(outcome: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match outcome {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn make_rootfs(rootfs: &Path) {
    for directory in ["bin", "proc", "sys", "dev", "etc", "tmp", "root"] {
        std::fs::create_dir_all(rootfs.join(directory)).expect("a directory");
    }
    std::fs::copy("/usr/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static is installed");
    for applet in ["sh", "cat", "echo", "id", "sleep", "stty", "md5sum", "dd", "kill", "ls", "grep", "true", "hostname"]
    {
        let _ = std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet));
    }
    std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nwww:x:33:33::/srv/www:/bin/sh\n")
        .expect("passwd");
}

/// A process that runs a shell script.
pub(crate) fn shell(script: &str) -> Value {
    process(&["sh", "-c", script])
}

/// A process with containerd's default environment and capabilities.
pub(crate) fn process(args: &[&str]) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
        "noNewPrivileges": true,
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    })
}

/// A specification like the one that `ctr run` makes, fitted to the guest as the host half does.
pub(crate) fn spec(process: Value) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process,
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "cgroupsPath": "/default/whatever",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// A storage of the guest.
pub(crate) fn storage(fstype: &str, source: &str, target: &str, options: &[&str]) -> Storage {
    Storage {
        fstype: fstype.into(),
        source: source.into(),
        target: target.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    }
}

/// Writes all and says that no more follows.
pub(crate) async fn send_all(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).await.expect("stdin");
    stream.shutdown().await.expect("end of stdin");
}
