//! The containers of a sandbox, and the tasks that wait for what happens to them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use journal::EffectId;
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, MessageField};
use protocols::GUEST;
use protocols::agent::NextEventRequest;
use protocols::agent::event::Event as AgentEvent;
use protocols::containerd::api::WaitRequest;
use protocols::containerd::events::task::{TaskExit, TaskOOM};
use protocols::containerd::topics::{TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC};
use protocols::containerd::ttrpc;

use super::Pod;
use super::copies::Followed;
use super::process::{Exit, Phase, Process};
use super::sandbox::Sandbox;
use super::stdio::{Names, Pumps};
use crate::error::{Error, chain};
use crate::host::blocking;
use crate::sizing::Demand;

/// Execs of one container at once, at most: each holds FIFOs and streams.
const MAX_EXECS: usize = 1024;

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: String,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    hold: Mutex<Hold>,
    kind: Kind,
}

/// What stands behind the id of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A container of the guest.
    Ordinary,
    /// What stands for a pod: only the host knows it.
    Pause,
    /// The guest itself, which containerd does not know.
    Guest,
}

/// What a container holds until it is deleted.
#[derive(Debug, Default)]
pub struct Hold {
    /// What its storage did to the host.
    pub effects: Vec<EffectId>,
    /// What the machine was made large enough for.
    pub limits: Demand,
    /// Its copies of volumes.
    pub copies: Followed,
}

impl Container {
    /// A container with its init.
    #[must_use]
    pub fn new(id: String, bundle: String, init: Arc<Process>, hold: Hold, kind: Kind) -> Self {
        Self { id, bundle, init, execs: Mutex::default(), hold: Mutex::new(hold), kind }
    }

    /// The guest itself, which runs.
    fn guest() -> Self {
        let init = Process::new(String::new(), Names::default(), Pumps::default());
        init.advance(&Phase::Created, Phase::Running);
        Self::new(GUEST.to_owned(), String::new(), init, Hold::default(), Kind::Guest)
    }

    /// Its first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Whether only the host knows it.
    pub fn is_pause(&self) -> bool {
        self.kind == Kind::Pause
    }

    /// Whether it is the guest itself.
    pub fn is_guest(&self) -> bool {
        self.kind == Kind::Guest
    }

    /// Takes what its storage did to the host.
    pub fn take_effects(&self) -> Vec<EffectId> {
        std::mem::take(&mut self.hold().effects)
    }

    /// What it is limited to.
    pub fn limits(&self) -> Demand {
        self.hold().limits
    }

    /// It is limited to this now.
    pub fn set_limits(&self, limits: Demand) {
        self.hold().limits = limits;
    }

    fn hold(&self) -> MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The init for an empty `exec_id`, or that exec.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`].
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs().get(exec_id).cloned().ok_or_else(|| Error::NotFound(format!("exec {exec_id} of {}", self.id)))
    }

    /// Adds an exec.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyExists`], or [`Error::State`] when there are too many.
    pub fn add_exec(&self, process: Arc<Process>) -> Result<(), Error> {
        let mut execs = self.execs();
        if execs.contains_key(&process.exec_id) {
            return Err(Error::AlreadyExists(format!("exec {} of {}", process.exec_id, self.id)));
        }
        if execs.len() >= MAX_EXECS {
            return Err(Error::State(format!("{} has {MAX_EXECS} execs, no more are possible; delete some", self.id)));
        }
        execs.insert(process.exec_id.clone(), process);
        Ok(())
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Init and execs.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        self.execs().values().chain([&self.init]).cloned().collect()
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an id stands for.
#[derive(Debug)]
enum Slot {
    /// A container that is being made; whether it was deleted meanwhile.
    Making { abandoned: bool },
    /// A container.
    Made(Arc<Container>),
}

/// The containers of a sandbox by id.
#[derive(Debug, Default)]
pub struct Containers {
    slots: Mutex<HashMap<String, Slot>>,
    guest: OnceLock<Arc<Container>>,
}

impl Containers {
    /// Takes an id for a container that is about to be made.
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyExists`].
    pub fn reserve(&self, id: &str) -> Result<Reservation<'_>, Error> {
        let mut containers = self.lock();
        if containers.contains_key(id) {
            return Err(Error::AlreadyExists(format!("container {id}")));
        }
        containers.insert(id.to_owned(), Slot::Making { abandoned: false });
        Ok(Reservation { containers: self, id: id.to_owned() })
    }

    /// The container of this id.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], also while it is being made; [`Error::NoConsole`] for the guest itself.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        if id == GUEST {
            return self.guest.get().cloned().ok_or(Error::NoConsole);
        }
        match self.lock().get(id) {
            Some(Slot::Made(container)) => Ok(Arc::clone(container)),
            _ => Err(Error::NotFound(format!("container {id}"))),
        }
    }

    /// Lets commands be executed in the guest itself.
    pub fn open_debug_console(&self) {
        self.guest.get_or_init(|| Arc::new(Container::guest()));
    }

    /// A container that is being made is no longer wanted: its client gave up.
    pub fn abandon(&self, id: &str) {
        if let Some(Slot::Making { abandoned }) = self.lock().get_mut(id) {
            *abandoned = true;
        }
    }

    /// Forgets a container.
    pub fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Whether somebody wants none of them: there is none, but for abandoned ones.
    pub fn is_empty(&self) -> bool {
        self.lock().values().all(|slot| matches!(slot, Slot::Making { abandoned: true }))
    }

    /// Whether there are others, made or being made.
    pub fn has_others(&self, id: &str) -> bool {
        self.lock().keys().any(|other| other != id)
    }

    /// What has processes in the guest.
    fn all(&self) -> Vec<Arc<Container>> {
        let made = |slot: &Slot| match slot {
            Slot::Made(container) => Some(Arc::clone(container)),
            Slot::Making { .. } => None,
        };
        self.lock().values().filter_map(made).chain(self.guest.get().cloned()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An id that is taken; given back when it is dropped unfilled.
#[derive(Debug)]
pub struct Reservation<'a> {
    containers: &'a Containers,
    id: String,
}

impl Reservation<'_> {
    /// Puts the container in, and tells whether it was abandoned meanwhile.
    pub fn fill(self, container: Container) -> (Arc<Container>, bool) {
        let container = Arc::new(container);
        let before = self.containers.lock().insert(self.id.clone(), Slot::Made(Arc::clone(&container)));
        (container, matches!(before, Some(Slot::Making { abandoned: true })))
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut containers = self.containers.lock();
        if let Some(Slot::Making { .. }) = containers.get(&self.id) {
            containers.remove(&self.id);
        }
    }
}

/// Waits for the end of a process in the guest, and tells everybody.
pub fn watch(pod: &Arc<Pod>, container: &Arc<Container>, process: &Arc<Process>) {
    let (pod, container, process) = (Arc::clone(pod), Arc::clone(container), Arc::clone(process));
    tokio::spawn(async move {
        let Some(sandbox) = pod.sandbox.get() else { return };
        let request =
            WaitRequest { id: container.id.clone(), exec_id: process.exec_id.clone(), ..WaitRequest::default() };
        match sandbox.task.wait(ttrpc::context::Context::default(), &request).await {
            Ok(response) => {
                let at = response.exited_at.into_option().unwrap_or_else(Exit::now);
                process.settled().await;
                process.hand_over().await;
                stopped(&pod, &container, &process, Exit { status: response.exit_status, at });
            }
            // Deleted without having run.
            Err(ttrpc::Error::RpcStatus(status)) => tracing::debug!(%status, "the agent knows the process no more"),
            Err(error) => {
                if !sandbox.has_ended() {
                    sandbox.give_up(&error);
                }
            }
        }
    });
}

/// Notes an exit and, of a container's process, publishes it, once.
pub fn stopped(pod: &Pod, container: &Container, process: &Process, exit: Exit) {
    if !process.stop(exit.clone()) {
        return;
    }
    if container.is_guest() {
        return;
    }
    if process.exec_id.is_empty() {
        pod.stamp("exited");
    }
    let id = if process.exec_id.is_empty() { &container.id } else { &process.exec_id };
    let event = TaskExit {
        container_id: container.id.clone(),
        id: id.clone(),
        pid: Pod::pid(),
        exit_status: exit.status,
        exited_at: MessageField::some(exit.at),
        ..TaskExit::default()
    };
    pod.events.publish(TASK_EXIT_EVENT_TOPIC, &event);
}

/// Waits for the machine's end, which is the end of all processes; and for the guest's events.
pub fn watch_sandbox(pod: &Arc<Pod>, sandbox: &Arc<Sandbox>) {
    let (ended, watched) = (Arc::clone(pod), Arc::clone(sandbox));
    tokio::spawn(async move {
        let reason = watched.ended().await;
        ended.streams.close();
        let containers = ended.containers.all();
        if containers.iter().any(|container| !container.is_guest()) {
            tracing::warn!(reason, "the virtual machine has ended with its containers");
        }
        for container in containers {
            for process in container.processes() {
                stopped(&ended, &container, &process, Exit::killed());
            }
        }
    });
    let (pod, sandbox) = (Arc::clone(pod), Arc::clone(sandbox));
    tokio::spawn(async move {
        let request = NextEventRequest::default();
        while let Ok(event) = sandbox.agent.next_event(ttrpc::context::Context::default(), &request).await {
            if let Some(AgentEvent::OutOfMemory(event)) = event.event {
                let event = TaskOOM { container_id: event.container_id, ..TaskOOM::default() };
                pod.events.publish(TASK_OOM_EVENT_TOPIC, &event);
            }
        }
    });
}

/// Undoes what a container did to the host; what cannot be undone stays in the journal for the end.
pub async fn undo(pod: &Arc<Pod>, effects: Vec<EffectId>) {
    let undone = Arc::clone(pod);
    let work = move || undone.journal.undo_all(&effects);
    match blocking::run("undo", work).await {
        Ok(failures) => {
            for failure in failures {
                tracing::warn!(%failure, "left until the end of the sandbox");
            }
        }
        Err(error) => tracing::warn!(error = %chain(&error), "the storage of a container stays until the sandbox ends"),
    }
}

/// `config_path` (field 2) of a `runtimeoptions.v1.Options`, which `ctr --runtime-config-path` and CRI's `ConfigPath`
/// send; other options are for other runtimes.
///
/// # Errors
///
/// [`Error::Invalid`] when the message is broken.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>, Error> {
    let Some(options) = options.filter(|options| options.type_url.ends_with("runtimeoptions.v1.Options")) else {
        return Ok(None);
    };
    let parse = || -> protobuf::Result<Option<PathBuf>> {
        let mut path = None;
        let mut input = CodedInputStream::from_bytes(&options.value);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            // Field 2, length-delimited.
            if tag == (2 << 3) | 2 {
                path = Some(PathBuf::from(input.read_string()?));
            } else {
                protobuf::rt::skip_field_for_tag(tag, &mut input)?;
            }
        }
        Ok(path.filter(|path| !path.as_os_str().is_empty()))
    };
    parse().map_err(|error| Error::Invalid(format!("runtime options: {error}; give a runtimeoptions.v1.Options")))
}

/// A state that does not allow a request.
#[must_use]
pub fn wrong_phase(action: &str, phase: &Phase) -> Error {
    let phase = match phase {
        Phase::Created => "created",
        Phase::Starting | Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Stopped(_) => "stopped",
    };
    Error::State(format!("cannot {action} a {phase} process"))
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn an_id_is_taken_while_its_container_is_being_made_and_free_when_that_fails() {
        let containers = Containers::default();
        let reservation = containers.reserve("a").unwrap();
        assert!(matches!(containers.reserve("a"), Err(Error::AlreadyExists(_))));
        assert!(matches!(containers.get("a"), Err(Error::NotFound(_))));
        assert!(!containers.is_empty());
        containers.abandon("a");
        assert!(containers.is_empty());
        drop(reservation);
        assert!(containers.is_empty());
        let init = Process::new(String::new(), Names::default(), Pumps::default());
        let container = Container::new("a".into(), "/b".into(), init, Hold::default(), Kind::Ordinary);
        assert!(!containers.reserve("a").unwrap().fill(container).1);
        assert_eq!(containers.get("a").unwrap().bundle, "/b");
    }

    #[test]
    fn the_path_of_a_configuration_is_found_among_the_runtime_options() {
        let value = b"\x0a\x03abc\x12\x07/c.toml\x1a\x01x".to_vec();
        let any = |type_url: &str, value| Any { type_url: type_url.to_owned(), value, ..Any::default() };
        let options = any("runtimeoptions.v1.Options", value.clone());
        assert_eq!(config_path(Some(&options)).unwrap(), Some(PathBuf::from("/c.toml")));
        assert_eq!(config_path(Some(&any("containerd.runc.v1.Options", value))).unwrap(), None);
        assert_eq!(config_path(None).unwrap(), None);
        assert!(config_path(Some(&any("runtimeoptions.v1.Options", vec![0x12, 0xff]))).is_err());
    }
}
