//! The helper: this binary executed again, single-threaded, for one call into libcontainer.
//!
//! libcontainer forks and changes the working directory, which a process with an event loop must not do. The agent
//! starts `kata-agent helper` with a [`Request`] as JSON on its stdin and reads one line, a [`Reply`], from its stdout.

mod command;
mod executor;
pub(crate) mod pause;
mod spec;

use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize};

use executor::ContainerExecutor;

use crate::cgroup::Cgroup;
use crate::devices;

/// First argument that makes this binary the helper.
pub(crate) const ARGUMENT: &str = "helper";

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Make a container from `<bundle>/spec.json`, up to just before its entrypoint is executed.
    Create(Create),
    /// Run another process, described by the JSON file `process`, in a running container.
    Exec { id: String, process: PathBuf, stdio: Stdio },
    /// Run a process of the guest itself, described by the file `command`.
    Command { command: PathBuf, stdio: Stdio },
    /// Run a container's hooks of one stage.
    Hooks { id: String, stage: Stage },
    /// Make a PID namespace and start [`pause`] as its first process.
    PidNamespace,
}

/// The container to make.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Create {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// Where its root file system is mounted, if not where its specification says.
    pub(crate) rootfs: Option<PathBuf>,
    /// The PID namespace that it shares with others.
    pub(crate) pid_namespace: Option<PathBuf>,
    pub(crate) stdio: Stdio,
}

/// Stages whose hooks the agent runs itself; the others run inside `Create`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stage {
    Poststart,
    Poststop,
}

/// Descriptors that the helper inherits for the new process; what is `None` becomes /dev/null.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Stdio {
    pub(crate) pipes: [Option<RawFd>; 3],
    /// A listening unix socket: the process gets a terminal and its other end is sent there.
    pub(crate) console: Option<PathBuf>,
}

/// What the helper answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Started(Started),
    Done,
    /// Why it failed, for the person who started the container.
    Failed(String),
}

/// A process that the helper started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Started {
    pub(crate) pid: i32,
    /// Its user, in the guest's numbering.
    pub(crate) uid: u32,
    pub(crate) hooks: Vec<Stage>,
}

/// Where libcontainer keeps its state of each container.
pub(crate) fn state_root() -> PathBuf {
    Path::new(crate::RUNTIME_DIR).join("state")
}

/// The helper's whole life.
pub(crate) fn main() -> io::Result<()> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    let request: Request = serde_json::from_str(&text)?;
    let log = ErrorLog::install()?;
    let reply = match serve(request) {
        Ok(reply) => reply,
        Err(error) => Reply::Failed(log.explain(&error)),
    };
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    io::stdout().write_all(&line)
}

type Error = Box<dyn std::error::Error>;

fn serve(request: Request) -> Result<Reply, Error> {
    match request {
        Request::Create(container) => create(container).map(Reply::Started),
        Request::Exec { id, process, stdio } => exec(id, &process, stdio).map(Reply::Started),
        Request::Command { command, stdio } => command::start(&command, stdio).map(Reply::Started),
        Request::Hooks { id, stage } => hooks(&id, stage).map(|()| Reply::Done),
        Request::PidNamespace => Ok(Reply::Started(pause::start()?)),
    }
}

fn create(container: Create) -> Result<Started, Error> {
    let mut spec: Spec = read_json(&container.bundle.join("spec.json"), "the spec")?;
    spec::adapt(&mut spec, &container)?;
    let Create { id, bundle, stdio, .. } = container;
    spec.save(bundle.join("config.json"))?;
    let uid = spec::host_uid(&spec);
    let devices = spec::device_rules(&spec);
    let hooks = spec::hook_stages(&spec);
    let cgroup = Cgroup::of(&id);
    let container =
        builder(id, stdio, uid, ContainerExecutor::for_init())?.as_init(&bundle).with_systemd(false).build()?;
    // The container's own devices exist by now and its program does not run yet.
    devices::restrict(&cgroup, &devices)?;
    let pid = container.pid().ok_or("the container has no process")?.as_raw();
    Ok(Started { pid, uid, hooks })
}

fn exec(id: String, process_file: &Path, stdio: Stdio) -> Result<Started, Error> {
    let mut container = Container::load(state_root().join(&id))?;
    // The agent started it by itself (see `containers::start`), so libcontainer's own record is behind.
    container.set_status(ContainerStatus::Running).save()?;
    let spec = Spec::load(container.bundle().join("config.json"))?;
    let init = container.pid().ok_or("the container has no process")?;
    let sub_cgroup = sub_cgroup(&id, init.as_raw());
    let mut process: Process = read_json(process_file, "the process")?;
    let executor = ContainerExecutor::for_exec(&spec, &mut process);
    spec::adapt_process(&mut process, &PathBuf::from(format!("/proc/{init}/root")), stdio.console.is_some());
    let uid = spec::map_uid(&spec, process.user().uid());
    std::fs::write(process_file, serde_json::to_vec(&process)?)?;
    let tenant = builder(id, stdio, uid, executor)?.as_tenant().with_sub_cgroup(sub_cgroup);
    let pid = tenant.with_detach(true).with_process(Some(process_file)).build()?;
    Ok(Started { pid: pid.as_raw(), uid, hooks: Vec::new() })
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path, what: &str) -> Result<T, Error> {
    let text = std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    serde_json::from_slice(&text)
        .map_err(|error| format!("{what} is not what the OCI runtime specification describes: {error}").into())
}

/// The cgroup of a container's first process below the container's own, when it has moved there: as systemd does. A
/// cgroup with cgroups below it takes no processes, so further ones must go there too.
fn sub_cgroup(id: &str, init: i32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{init}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(Cgroup::oci_path(id)).ok()?.to_str()?;
    (!below.is_empty()).then(|| below.to_owned())
}

fn hooks(id: &str, stage: Stage) -> Result<(), Error> {
    let root = state_root().join(id);
    // Not `Container::load`, which looks the process up in /proc and fails when it ends at that moment.
    let mut container = Container { state: State::load(&root)?, root };
    let config = container.spec()?;
    let Some(all) = config.hooks.as_ref() else { return Ok(()) };
    let (hooks, status) = match stage {
        Stage::Poststart => (all.poststart(), ContainerStatus::Running),
        Stage::Poststop => (all.poststop(), ContainerStatus::Stopped),
    };
    container.set_status(status);
    Ok(run_hooks(hooks.as_ref(), Some(&container.state), None, None, None)?)
}

fn builder(id: String, stdio: Stdio, uid: u32, executor: ContainerExecutor) -> Result<ContainerBuilder, Error> {
    let mut builder = ContainerBuilder::new(id, SyscallType::default())
        .with_executor(executor)
        .with_root_path(state_root())?
        .validate_id()?;
    if stdio.console.is_some() {
        return Ok(builder.with_console_socket(stdio.console));
    }
    let [stdin, stdout, stderr] = stdio.pipes;
    builder.stdin = Some(process_end(stdin, uid)?);
    builder.stdout = Some(process_end(stdout, uid)?);
    builder.stderr = Some(process_end(stderr, uid)?);
    Ok(builder)
}

/// The descriptor that becomes one of the process's standard streams. A pipe is given to the process's user, who may
/// open it again as /dev/stdout.
fn process_end(inherited: Option<RawFd>, uid: u32) -> io::Result<OwnedFd> {
    let Some(number) = inherited else {
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        return Ok(null.into());
    };
    // SAFETY: the agent made this descriptor inheritable for us and nothing else in this process knows its number.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    nix::unistd::fchown(&fd, Some(uid.into()), None)?;
    Ok(fd)
}

/// Collects what libcontainer logs as errors, in this process and in those that it forks: their typed errors come back
/// as bare sentences ("failed syscall") whose cause is in the log only.
struct ErrorLog(std::io::PipeReader);

impl ErrorLog {
    /// Longest part of the log that goes into an answer.
    const LIMIT: usize = 2048;

    fn install() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        for end in
            [fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)), fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))]
        {
            end?;
        }
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::ERROR)
            .with_ansi(false)
            .without_time()
            .with_level(false)
            .with_target(false)
            .with_writer(std::sync::Mutex::new(writer))
            .init();
        Ok(Self(reader))
    }

    /// The error, its causes, and the first thing that was logged.
    fn explain(mut self, error: &Error) -> String {
        let mut text = executor::reword(&error.to_string());
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        let mut logged = vec![0; Self::LIMIT];
        let n = self.0.read(&mut logged).unwrap_or(0);
        let logged = String::from_utf8_lossy(&logged[..n]);
        match logged.lines().next().map(str::trim) {
            Some(first) if !executor::is_verdict(&text) && !text.contains(first) => format!("{text} ({first})"),
            _ => text,
        }
    }
}
