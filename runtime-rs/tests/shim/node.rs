//! A node as containerd is one: bundles, stdio FIFOs, an event service, and the two commands of the shim.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use async_trait::async_trait;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protocols::containerd::api::*;
use protocols::containerd::shim_async::{Client, Events, TaskClient, create_events};
use protocols::containerd::ttrpc;
use serde_json::{Value, json};
use tokio::sync::watch;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::context::Context;

/// Environment variable that gives the shim its state directory instead of `/run/kata`.
pub(crate) const ROOT_VARIABLE: &str = "SHIM_TEST_ROOT";

/// Name of the FIFO, in a node's directory, that tells what was done to the machines.
pub(crate) const HARDWARE: &str = "hardware";

pub(crate) struct Node {
    directory: tempfile::TempDir,
    pub(crate) namespace: String,
    events: Arc<EventLog>,
    _server: Server,
}

/// Topics and the ids that they are about, in the order of arrival.
struct EventLog(watch::Sender<Vec<String>>);

#[async_trait]
impl Events for EventLog {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let topic = request.envelope.topic.clone();
        self.0.send_modify(|topics| topics.push(topic));
        Ok(Empty::new())
    }
}

/// A task as containerd's client holds one.
pub(crate) struct TaskHandle {
    pub(crate) id: String,
    pub(crate) client: TaskClient,
    pub(crate) raw: Client,
    pub(crate) bundle: PathBuf,
}

#[derive(Default, Clone)]
pub(crate) struct Io {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Node {
    pub(crate) async fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("shim").tempdir_in("/tmp").unwrap();
        let events = Arc::new(EventLog(watch::Sender::default()));
        let address = format!("unix://{}", directory.path().join("events").display());
        let mut server =
            Server::new().bind(&address).unwrap().register_service(create_events(Arc::clone(&events) as _));
        server.start().await.unwrap();
        let node = Self { directory, namespace: "test".to_owned(), events, _server: server };
        node.configure("");
        node
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.path("run")
    }

    /// Writes the configuration file with these lines for `[hypervisor.dragonball]`, or a whole file.
    pub(crate) fn configure(&self, text: &str) {
        let whole = if text.contains('[') { text.to_owned() } else { format!("[hypervisor.dragonball]\n{text}") };
        let timeline = self.path("timeline").display().to_string();
        let whole = if whole.contains("[runtime]") {
            whole
        } else {
            format!("{whole}\n[runtime]\ntimeline_dir = \"{timeline}\"")
        };
        fs::write(self.path("configuration.toml"), whole).unwrap();
    }

    /// A bundle whose process is `arguments`; `extra` is merged into its specification, and what it says of Linux into that.
    pub(crate) fn bundle(&self, id: &str, arguments: &[&str], extra: Value) -> PathBuf {
        let bundle = self.path(&format!("bundle-{}-{id}", self.namespace));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/hello"), "hello from the root file system\n").unwrap();
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "process": {"args": arguments, "cwd": "/"},
            "root": {"path": "rootfs"},
            "mounts": [],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]},
        });
        for (key, value) in extra.as_object().into_iter().flatten() {
            match (key.as_str(), value.as_object()) {
                ("linux", Some(linux)) => {
                    linux.iter().for_each(|(key, value)| spec["linux"][key] = value.clone());
                }
                _ => spec[key] = value.clone(),
            }
        }
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        mkfifo(&bundle.join("log"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        bundle
    }

    pub(crate) fn command(&self, id: &str, action: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["-namespace", &self.namespace, "-id", id, "-address", "/nonexistent", action])
            .env(ROOT_VARIABLE, self.root())
            .env("KATA_CONF_FILE", self.path("configuration.toml"))
            .env("TTRPC_ADDRESS", self.path("events"))
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn spawn_start(&self, id: &str, bundle: &Path) -> Child {
        let mut command = self.command(id, "start");
        command.current_dir(bundle).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub(crate) fn start(&self, id: &str, bundle: &Path) -> Output {
        self.spawn_start(id, bundle).wait_with_output().unwrap()
    }

    pub(crate) fn delete(&self, id: &str) -> DeleteResponse {
        let output = self.command(id, "delete").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty());
        protobuf::Message::parse_from_bytes(&output.stdout).unwrap()
    }

    pub(crate) async fn connect(&self, id: &str, bundle: &Path) -> TaskHandle {
        let output = self.start(id, bundle);
        let (address, errors) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success(), "{errors}");
        assert_eq!(errors, "");
        assert!(address.starts_with("unix:///"), "{address:?}");
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        let raw = Client::connect(&address).await.unwrap();
        let (client, bundle) = (TaskClient::new(raw.clone()), bundle.to_owned());
        TaskHandle { id: id.to_owned(), client, raw, bundle }
    }

    /// A running shim with a created container.
    pub(crate) async fn create(&self, id: &str, arguments: &[&str], io: &Io) -> TaskHandle {
        let bundle = self.bundle(id, arguments, Value::Null);
        let task = self.connect(id, &bundle).await;
        task.create(io).await.unwrap();
        task
    }

    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        path.display().to_string()
    }

    /// What is done to the machines from now on, line by line.
    pub(crate) fn hardware(&self) -> Hardware {
        let fifo = self.fifo(HARDWARE);
        // Its own writer: no end of file between the others.
        let file = fs::OpenOptions::new().read(true).write(true).open(fifo).unwrap();
        let (sender, lines) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(file).lines() {
                if sender.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        Hardware(lines)
    }

    /// Waits for these events, in this order, and nothing else.
    pub(crate) async fn expect_events(&self, topics: &[&str]) {
        let mut log = self.events.0.subscribe();
        let _ = tokio::time::timeout(std::time::Duration::from_secs(20), log.wait_for(|log| log.len() >= topics.len()))
            .await;
        assert_eq!(*self.events.0.borrow(), topics);
    }

    /// Waits for the end of the pod processes that this test orphaned, then looks for anything of theirs.
    pub(crate) async fn expect_nothing_left(&self) {
        let reaped = tokio::task::spawn_blocking(reap_orphans);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(60), reaped).await;
        assert!(ended.is_ok(), "a pod process does not end");
        assert_eq!(self.leftovers(), Vec::<String>::new());
    }

    /// Mounts, directories and sockets below this node's root.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let root = self.root().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut left: BTreeSet<String> =
            mounts.lines().filter(|line| line.contains(&root)).map(|line| format!("mount {line}")).collect();
        let mut directories = vec![self.root()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                left.insert(entry.path().display().to_string());
                if entry.file_type().unwrap().is_dir() {
                    directories.push(entry.path());
                }
            }
        }
        left.into_iter().collect()
    }
}

/// Lines about the machines of a node.
pub(crate) struct Hardware(tokio::sync::mpsc::UnboundedReceiver<String>);

impl Hardware {
    /// Waits for these lines, in this order, and nothing in between.
    pub(crate) async fn expect(&mut self, lines: &[&str]) {
        for expected in lines {
            let line = tokio::time::timeout(std::time::Duration::from_secs(20), self.0.recv()).await;
            assert_eq!(line.ok().flatten().as_deref(), Some(*expected));
        }
    }
}

impl TaskHandle {
    /// Changes the limits.
    pub(crate) async fn update(&self, resources: Value) -> ttrpc::Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Default::default()
        };
        let resources = MessageField::some(resources);
        let request = UpdateTaskRequest { id: self.id.clone(), resources, ..Default::default() };
        self.client.update(Context::default(), &request).await.map(drop)
    }

    pub(crate) async fn create(&self, io: &Io) -> ttrpc::Result<u32> {
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            ..Default::default()
        };
        Ok(self.client.create(Context::default(), &request).await?.pid)
    }

    pub(crate) async fn start(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let (id, exec_id) = (self.id.clone(), exec_id.to_owned());
        let request = StartRequest { id, exec_id, ..Default::default() };
        Ok(self.client.start(Context::default(), &request).await?.pid)
    }

    pub(crate) async fn wait(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let (id, exec_id) = (self.id.clone(), exec_id.to_owned());
        let request = WaitRequest { id, exec_id, ..Default::default() };
        Ok(self.client.wait(Context::default(), &request).await?.exit_status)
    }

    pub(crate) async fn kill(&self, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let (id, exec_id) = (self.id.clone(), exec_id.to_owned());
        let request = KillRequest { id, exec_id, signal, ..Default::default() };
        self.client.kill(Context::default(), &request).await.map(drop)
    }

    pub(crate) async fn exec(&self, exec_id: &str, arguments: &[&str], io: &Io) -> ttrpc::Result<()> {
        let value = json!({"args": arguments, "cwd": "/"}).to_string().into_bytes();
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value,
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.client.exec(Context::default(), &request).await.map(drop)
    }

    pub(crate) async fn state(&self, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let (id, exec_id) = (self.id.clone(), exec_id.to_owned());
        self.client.state(Context::default(), &StateRequest { id, exec_id, ..Default::default() }).await
    }

    pub(crate) async fn delete(&self, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let (id, exec_id) = (self.id.clone(), exec_id.to_owned());
        self.client.delete(Context::default(), &DeleteRequest { id, exec_id, ..Default::default() }).await
    }

    pub(crate) async fn close_input(&self, exec_id: &str) {
        let (id, exec_id) = (self.id.clone(), exec_id.to_owned());
        let request = CloseIORequest { id, exec_id, stdin: true, ..Default::default() };
        self.client.close_io(Context::default(), &request).await.unwrap();
    }

    pub(crate) async fn pid(&self) -> i32 {
        let request = ConnectRequest { id: self.id.clone(), ..Default::default() };
        let response = self.client.connect(Context::default(), &request).await.unwrap();
        i32::try_from(response.shim_pid).unwrap()
    }

    pub(crate) async fn shutdown(&self) {
        let request = ShutdownRequest { id: self.id.clone(), ..Default::default() };
        // The answer can be lost with the process; its end is what counts.
        let _ = self.client.shutdown(Context::default(), &request).await;
    }
}

/// Reads a FIFO to its end on a thread of its own. The FIFO has its reader when this returns: what a writer leaves there
/// is not lost, however late the thread is.
pub(crate) fn read_all(fifo: &str) -> tokio::task::JoinHandle<Vec<u8>> {
    let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(fifo).unwrap();
    tokio::task::spawn_blocking(move || {
        // Before the first writer a read would say end of file; poll waits for the writer (fifo(7)).
        poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// All orphans come to this process (it is a subreaper, and its tests run one after the other): waits until the last one
/// has ended.
fn reap_orphans() {
    while nix::sys::wait::wait().is_ok() {}
}

/// Kills all orphans, and those who become orphans by that.
pub(crate) fn end_orphans() {
    loop {
        for thread in fs::read_dir("/proc/self/task").unwrap() {
            let children = fs::read_to_string(thread.unwrap().path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                let _ = kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGKILL);
            }
        }
        // The loop ends with the last child: ECHILD.
        if nix::sys::wait::wait().is_err() {
            return;
        }
    }
}

/// The code of a failed call.
pub(crate) fn code(error: &ttrpc::Error) -> ttrpc::Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code.enum_value().unwrap(),
        other => panic!("not an answer: {other}"),
    }
}
