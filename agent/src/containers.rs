//! What requests do with containers: create, start, exec, signal, pause, update, delete.

use std::borrow::Cow;
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::LinuxResources;
use protobuf::Message;
use protocols::agent::ContainerOptions;
use protocols::containerd::api::{CreateTaskRequest, ExecProcessRequest};
use protocols::{GUEST_COMMAND_TYPE_URL, MAX_SPEC, SHARED_DIR};
use tokio::sync::oneshot;
use tokio::task::spawn_local;

use crate::cgroup::{CGROUP_ROOT, Cgroup};
use crate::copies;
use crate::error::{Error, Result};
use crate::events;
use crate::guest::{Container, Guest, check_id};
use crate::helper::{Create, Request, Stage, state_root};
use crate::launch::{self, Launched};
use crate::passthrough;
use crate::process::{Phase, Process, StdioFields};
use crate::reaper::Exit;
use crate::stdio::{ProcessEnds, StdioRequest};
use crate::sys;

/// Type of the process description in an Exec request, as containerd registers it.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// Directory of volumes, in a container's shared directory, and of copies of them in its bundle.
const COPIES: &str = "mounts";
/// Type of the resources in an Update request.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

impl Guest {
    /// Makes a container up to just before its program runs; returns its pid.
    pub(crate) async fn create(self: &Rc<Self>, request: CreateTaskRequest) -> Result<u32> {
        let options = create_options(&request)?;
        let fields = StdioFields {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let container = Container::new(&request.id, Process::new("", fields, Phase::Changing));
        check_bundle(&request.bundle, &container.bundle)?;
        self.add(Rc::clone(&container))?;
        match self.build(&container, &request, &options).await {
            Ok(launched) => {
                container.hooks.replace(launched.started.hooks);
                container.memory_watch.replace(events::watch_memory(self, &container.id, &container.cgroup));
                container.init.set_phase(Phase::Created);
                follow_init(&container, launched.exit);
                Ok(container.init.pid())
            }
            Err(error) => {
                let failures = self.dismantle(&container).await;
                if !failures.is_empty() {
                    tracing::warn!(container = container.id, ?failures, "a failed create left something behind");
                }
                self.remove(&container.id);
                Err(error)
            }
        }
    }

    async fn build(
        &self,
        container: &Container,
        request: &CreateTaskRequest,
        options: &ContainerOptions,
    ) -> Result<Launched> {
        let rootfs = container.bundle.join("rootfs");
        fs::create_dir_all(&rootfs).map_err(Error::io(format!("cannot make {}", rootfs.display())))?;
        fs::create_dir_all(state_root()).map_err(Error::io("cannot make the state directory"))?;
        let layers = passthrough::name_disks(&request.rootfs).await?;
        {
            let mut mounts = container.mounts.borrow_mut();
            mounts.add_storages(&options.storages)?;
            mounts.add_rootfs(&layers, &rootfs)?;
        }
        self.copy_volumes(container, &options.copies).await?;
        let spec = container.bundle.join("spec.json");
        let content = match &options.devices[..] {
            [] => Cow::Borrowed(&options.spec),
            devices => Cow::Owned(passthrough::admit(&options.spec, devices).await?),
        };
        fs::write(&spec, &*content).map_err(Error::io(format!("cannot write {}", spec.display())))?;
        let rootfs = (!request.rootfs.is_empty()).then_some(rootfs);
        container.sandbox_pidns.set(options.sandbox_pidns);
        let pid_namespace = if options.sandbox_pidns { Some(self.pid_namespace().await?) } else { None };
        let (id, bundle) = (container.id.clone(), container.bundle.clone());
        let request = |stdio| Request::Create(Create { id, bundle, rootfs, pid_namespace, stdio });
        self.launch(&container.init, "create", request).await
    }

    async fn copy_volumes(&self, container: &Container, numbers: &[u32]) -> Result<()> {
        if numbers.is_empty() {
            return Ok(());
        }
        let directory = container.bundle.join(COPIES);
        fs::create_dir_all(&directory).map_err(Error::io(format!("cannot make {}", directory.display())))?;
        for number in numbers {
            refresh(container, *number).await?;
        }
        Ok(())
    }

    /// Makes a container's copy of a volume like the volume again.
    pub(crate) async fn refresh_copy(&self, id: &str, number: u32) -> Result<()> {
        let container = self.container(id)?;
        if !container.bundle.join(COPIES).join(number.to_string()).is_dir() {
            return Err(Error::invalid(format!("container {id:?} has no copy of a volume of number {number}")));
        }
        // Two at once would be in each other's way. It is never closed.
        let _turn = container.turn.acquire().await;
        refresh(&container, number).await
    }

    /// The PID namespace of the sandbox as a path for others, made when it is asked for first.
    async fn pid_namespace(&self) -> Result<PathBuf> {
        let namespace = self.pid_namespace.get_or_try_init(|| async {
            let reply = self.run_helper("pause", &Request::PidNamespace, ProcessEnds::default()).await?;
            let path = format!("/proc/{}/ns/pid", launch::started("pause", reply)?.pid);
            fs::File::open(&path).map(OwnedFd::from).map_err(Error::io(format!("cannot open {path}")))
        });
        let namespace = namespace.await?.as_raw_fd();
        Ok(PathBuf::from(format!("/proc/{}/fd/{namespace}", std::process::id())))
    }

    /// Lets a created process run; returns its pid.
    pub(crate) async fn start(self: &Rc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let container = self.place(id)?;
        let process = container.process(exec_id)?;
        if exec_id.is_empty() {
            self.start_init(&container).await?
        } else {
            self.start_exec(&container, &process).await?
        }
        Ok(process.pid())
    }

    async fn start_init(&self, container: &Container) -> Result<()> {
        container.init.begin_change(Phase::Created, "start")?;
        if let Err(error) = notify_start(&container.id) {
            container.init.set_phase(Phase::Created);
            return Err(Error::Io { what: format!("cannot start container {:?}", container.id), source: error });
        }
        container.init.set_phase(Phase::Running);
        if container.hooks.borrow().contains(&Stage::Poststart) {
            // The specification has the runtime go on when such a hook fails.
            if let Err(error) = self.run_hooks(container, Stage::Poststart).await {
                tracing::warn!(%error, container = container.id, "a poststart hook failed");
            }
        }
        Ok(())
    }

    async fn start_exec(&self, container: &Container, process: &Rc<Process>) -> Result<()> {
        if container.init.phase() != Phase::Running || container.paused.get() {
            return Err(Error::precondition(format!("container {:?} is not running", container.id)));
        }
        process.begin_change(Phase::Created, "start")?;
        let description = container.take_description(&process.exec_id).unwrap_or_default();
        let file = container.bundle.join(format!("exec-{}.json", self.unique_name()));
        let outcome = self.exec_from_file(container, process, &file, &description).await;
        let _ = fs::remove_file(&file);
        match outcome {
            Ok(launched) => {
                process.set_phase(Phase::Running);
                follow(process, launched.exit);
                Ok(())
            }
            Err(error) => {
                // As with runc: a process that could not be started counts as one that failed to find its program.
                process.stopped(Exit { status: 127, at: std::time::SystemTime::now() });
                Err(error)
            }
        }
    }

    async fn exec_from_file(
        &self,
        container: &Container,
        process: &Process,
        file: &Path,
        description: &[u8],
    ) -> Result<Launched> {
        fs::write(file, description).map_err(Error::io(format!("cannot write {}", file.display())))?;
        let (id, file) = (container.id.clone(), file.to_owned());
        if container.is_guest() {
            return self.launch(process, "exec", |stdio| Request::Command { command: file, stdio }).await;
        }
        // It is never closed.
        let _turn = container.turn.acquire().await;
        self.launch(process, "exec", |stdio| Request::Exec { id, process: file, stdio }).await
    }

    /// Registers a further process; it runs at its Start.
    pub(crate) fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        check_id("exec id", &request.exec_id)?;
        let container = self.place(&request.id)?;
        if container.init.phase() != Phase::Running {
            return Err(Error::precondition(format!("container {:?} is not running", request.id)));
        }
        let kind = if container.is_guest() { GUEST_COMMAND_TYPE_URL } else { PROCESS_TYPE };
        let description = any_value(request.spec.as_ref(), kind, "the process")?;
        let fields = StdioFields {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        StdioRequest::parse(&fields.stdin, &fields.stdout, &fields.stderr, fields.terminal)?;
        container.add_exec(Process::new(&request.exec_id, fields, Phase::Created), description)
    }

    /// Sends a signal to one process, or to all of the container.
    pub(crate) fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let number = i32::try_from(signal).ok().filter(|number| (0..=libc::SIGRTMAX()).contains(number));
        let number =
            number.ok_or_else(|| Error::invalid(format!("signal {signal}: signals are 0 to {}", libc::SIGRTMAX())))?;
        let container = self.place(id)?;
        let process = container.process(exec_id)?;
        if all && container.is_guest() {
            return Err(Error::invalid("processes of the guest itself are signalled one by one"));
        }
        if all {
            return kill_all(&container, number);
        }
        process.signal(effective_signal(process.phase(), number))
    }

    /// Says that no input follows. The end of file itself is the host's half-close of the stdin stream: it comes after
    /// the bytes that are still on their way, which this request may overtake.
    pub(crate) fn close_io(&self, id: &str, exec_id: &str) -> Result<()> {
        let process = self.process(id, exec_id)?;
        if matches!(process.phase(), Phase::Stopped(_)) || process.fields.stdin.is_empty() || process.has_stdin() {
            return Ok(());
        }
        Err(Error::precondition("the process does not run yet: its stdin is not open"))
    }

    /// Freezes or thaws all processes of a container.
    pub(crate) async fn set_paused(&self, id: &str, paused: bool) -> Result<()> {
        let container = self.container(id)?;
        let doing = if paused { "pause" } else { "resume" };
        if container.init.phase() != Phase::Running || container.paused.get() == paused {
            let now = if container.paused.get() { "paused" } else { crate::process::describe(container.init.phase()) };
            return Err(Error::precondition(format!("cannot {doing} container {id:?}: it is {now}")));
        }
        container.cgroup.set_frozen(paused).await?;
        container.paused.set(paused);
        Ok(())
    }

    /// Changes the limits of a container.
    pub(crate) fn update(&self, id: &str, resources: Option<&protobuf::well_known_types::any::Any>) -> Result<()> {
        self.container(id)?;
        let json = any_value(resources, RESOURCES_TYPE, "the resources")?;
        let resources: LinuxResources = serde_json::from_slice(&json)
            .map_err(|e| Error::invalid(format!("the resources are no valid JSON: {e}")))?;
        let limits = ControllerOpt {
            resources: &resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        let failed = |error: libcgroups::v2::manager::V2ManagerError| Error::Runtime {
            operation: "update",
            message: error.to_string(),
        };
        let manager = Manager::new(CGROUP_ROOT.into(), Cgroup::oci_path(id)).map_err(failed)?;
        manager.apply(&limits).map_err(failed)
    }

    /// Forgets a process that has ended or never ran. For the first process, everything of the container goes with it.
    pub(crate) async fn delete(self: &Rc<Self>, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let container = self.place(id)?;
        let process = container.process(exec_id)?;
        if exec_id.is_empty() {
            self.delete_container(&container).await
        } else {
            let exit = match process.phase() {
                Phase::Stopped(exit) => exit,
                Phase::Created => Exit { status: 0, at: std::time::SystemTime::now() },
                phase => return Err(undeletable(phase)),
            };
            container.remove_exec(exec_id);
            Ok((process.pid(), exit))
        }
    }

    async fn delete_container(&self, container: &Rc<Container>) -> Result<(u32, Exit)> {
        match container.init.phase() {
            Phase::Stopped(_) | Phase::Created => {}
            phase => return Err(undeletable(phase)),
        }
        if container.deleting.replace(true) {
            return Err(undeletable(Phase::Changing));
        }
        let ended = container.init.wait();
        if container.init.phase() == Phase::Created {
            // One that has ended by itself meanwhile needs no signal.
            let _ = container.init.signal(libc::SIGKILL);
        }
        let exit = ended.await.ok_or(Error::ProcessFinished)?;
        let failures = self.dismantle(container).await;
        self.remove(&container.id);
        if failures.is_empty() {
            Ok((container.init.pid(), exit))
        } else {
            Err(Error::CleanUp { container: container.id.clone(), failures })
        }
    }

    /// Ends every container; for the end of the sandbox.
    pub(crate) async fn dismantle_all(&self) {
        for container in self.containers() {
            for failure in self.dismantle(&container).await {
                tracing::warn!(container = container.id, failure, "clean-up before power-off");
            }
        }
        for failure in self.storages.borrow_mut().undo() {
            tracing::warn!(failure, "clean-up before power-off");
        }
    }

    /// Removes whatever there is of a container: runs all steps and says which failed.
    async fn dismantle(&self, container: &Container) -> Vec<String> {
        let mut failures = Vec::new();
        let mut note = |outcome: Result<(), String>| failures.extend(outcome.err());
        note(container.cgroup.kill().map_err(|e| e.to_string()));
        note(container.cgroup.wait_empty().await.map_err(|e| e.to_string()));
        if let Some(watch) = container.memory_watch.take() {
            watch.abort();
        }
        let cgroup = container.cgroup.directory().display();
        note(container.cgroup.remove().map_err(|e| format!("cannot remove {cgroup}: {e}")));
        if container.hooks.borrow().contains(&Stage::Poststop) {
            note(self.run_hooks(container, Stage::Poststop).await.map_err(|e| e.to_string()));
        }
        failures.extend(container.mounts.borrow_mut().undo());
        failures.extend(remove_files(container));
        failures
    }

    async fn run_hooks(&self, container: &Container, stage: Stage) -> Result<()> {
        let request = Request::Hooks { id: container.id.clone(), stage };
        self.run_helper("hook", &request, ProcessEnds::default()).await.map(drop)
    }
}

async fn refresh(container: &Container, number: u32) -> Result<()> {
    let source = Path::new(SHARED_DIR).join(&container.id).join(COPIES).join(number.to_string());
    copies::refresh(source, container.bundle.join(COPIES).join(number.to_string())).await
}

fn create_options(request: &CreateTaskRequest) -> Result<ContainerOptions> {
    check_id("container id", &request.id)?;
    if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
        return Err(Error::Unimplemented { what: "restoring a container from a checkpoint" });
    }
    StdioRequest::parse(&request.stdin, &request.stdout, &request.stderr, request.terminal)?;
    let any = request.options.as_ref().ok_or_else(|| Error::invalid("a Create request needs ContainerOptions"))?;
    if any.type_url != protocols::CONTAINER_OPTIONS_TYPE_URL {
        let expected = protocols::CONTAINER_OPTIONS_TYPE_URL;
        return Err(Error::invalid(format!("options of type {:?}: expected {expected:?}", any.type_url)));
    }
    let options = ContainerOptions::parse_from_bytes(&any.value)
        .map_err(|e| Error::invalid(format!("the options are no valid ContainerOptions: {e}")))?;
    check_size("the spec", options.spec.len())?;
    Ok(options)
}

fn check_bundle(requested: &str, bundle: &Path) -> Result<()> {
    if requested.is_empty() || Path::new(requested) == bundle {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "bundle {requested:?}: the guest's bundle of this container is {:?}",
        bundle.display().to_string()
    )))
}

fn check_size(what: &str, size: usize) -> Result<()> {
    if size > MAX_SPEC {
        return Err(Error::invalid(format!("{what} has {size} bytes: the limit is {MAX_SPEC}")));
    }
    Ok(())
}

fn any_value(any: Option<&protobuf::well_known_types::any::Any>, kind: &str, what: &str) -> Result<Vec<u8>> {
    let any = any.ok_or_else(|| Error::invalid(format!("the request does not hold {what}")))?;
    if any.type_url != kind {
        return Err(Error::invalid(format!("{what} is of type {:?}: expected {kind:?}", any.type_url)));
    }
    check_size(what, any.value.len())?;
    Ok(any.value.clone())
}

/// Sets the phase of a container's first process when it ends, and ends the others with it: what the kernel does by itself
/// in a PID namespace that is the container's own.
fn follow_init(container: &Rc<Container>, exit: oneshot::Receiver<Exit>) {
    let container = Rc::downgrade(container);
    spawn_local(async move {
        let (Ok(exit), Some(container)) = (exit.await, container.upgrade()) else { return };
        if container.sandbox_pidns.get()
            && let Err(error) = container.cgroup.kill()
        {
            tracing::warn!(%error, container = container.id, "processes of an ended container go on");
        }
        container.init.stopped(exit);
    });
}

/// Sets the process's phase when it ends.
fn follow(process: &Rc<Process>, exit: oneshot::Receiver<Exit>) {
    let process = Rc::downgrade(process);
    spawn_local(async move {
        if let (Ok(exit), Some(process)) = (exit.await, process.upgrade()) {
            process.stopped(exit);
        }
    });
}

/// Tells the waiting first process to execute its program: libcontainer's start protocol. The directory is entered
/// through /proc, since its path may be longer than a socket address.
fn notify_start(id: &str) -> std::io::Result<()> {
    let directory = fs::File::open(state_root().join(id))?;
    let socket =
        format!("/proc/self/fd/{}/{}", directory.as_fd().as_raw_fd(), libcontainer::notify_socket::NOTIFY_FILE);
    UnixStream::connect(socket)?.write_all(b"start container")
}

/// A created process is PID 1 of its namespace and has no handlers yet: the kernel would drop the signals that should
/// end it.
fn effective_signal(phase: Phase, signal: i32) -> i32 {
    let ends = matches!(signal, libc::SIGTERM | libc::SIGINT | libc::SIGHUP | libc::SIGQUIT);
    if phase == Phase::Created && ends { libc::SIGKILL } else { signal }
}

fn kill_all(container: &Container, signal: i32) -> Result<()> {
    if matches!(container.init.phase(), Phase::Stopped(_))
        && container.cgroup.processes().map_or(true, |p| p.is_empty())
    {
        return Err(Error::ProcessFinished);
    }
    if signal == libc::SIGKILL {
        return container.cgroup.kill();
    }
    let signal = effective_signal(container.init.phase(), signal);
    for pid in container.cgroup.processes()? {
        // A process that ended since it was listed needs no signal.
        let _ = sys::kill(pid.cast_signed(), signal);
    }
    Ok(())
}

fn undeletable(phase: Phase) -> Error {
    Error::precondition(format!("cannot delete a process that is {}", crate::process::describe(phase)))
}

/// Removes the files that this agent and libcontainer made, and nothing below a mount that could not be undone.
fn remove_files(container: &Container) -> Vec<String> {
    let mut failures = Vec::new();
    let mut note = |path: PathBuf, outcome: std::io::Result<()>| match outcome {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            failures.push(format!("cannot remove {}: {error}", path.display()));
        }
        _ => {}
    };
    let bundle = &container.bundle;
    for file in ["spec.json", "config.json"] {
        note(bundle.join(file), fs::remove_file(bundle.join(file)));
    }
    note(bundle.join(COPIES), fs::remove_dir_all(bundle.join(COPIES)));
    for directory in [bundle.join("rootfs"), bundle.clone()] {
        note(directory.clone(), fs::remove_dir(&directory));
    }
    let state = state_root().join(&container.id);
    note(state.clone(), fs::remove_dir_all(&state));
    failures
}
