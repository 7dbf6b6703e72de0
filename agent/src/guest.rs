//! The agent's state: the containers of the sandbox and what their requests share.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use protocols::GUEST;
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::helper::Stage;
use crate::mounts::Mounts;
use crate::network::Applied;
use crate::process::{Phase, Process, StdioFields};
use crate::reaper::Reaper;
use crate::resolver::Resolver;
use crate::timeline::Timeline;
use crate::transport::Endpoint;

/// Containers of one sandbox; kubelet's own limit for a node is 110 pods.
const CONTAINERS: usize = 1024;
/// Further processes of one container that are not deleted yet.
const PROCESSES: usize = 1024;
/// containerd's own limit for ids (its `identifiers` package).
const ID_LENGTH: usize = 76;

/// Everything that requests work on. Lives on one thread; no borrow is held across an await.
pub(crate) struct Guest {
    pub(crate) endpoint: Endpoint,
    pub(crate) reaper: Rc<Reaper>,
    pub(crate) events: Events,
    pub(crate) timeline: RefCell<Timeline>,
    /// What Setup mounted.
    pub(crate) storages: RefCell<Mounts>,
    /// What the host has had set of the network.
    pub(crate) network: RefCell<Applied>,
    /// Resolves names as docker does, where the network has that.
    pub(crate) resolver: RefCell<Option<Resolver>>,
    /// The PID namespace of all containers that ask for the sandbox's.
    pub(crate) pid_namespace: OnceCell<OwnedFd>,
    /// The guest itself among them, where the host has its administrator execute commands in it.
    itself: std::cell::OnceCell<Rc<Container>>,
    containers: RefCell<HashMap<String, Rc<Container>>>,
    names: Cell<u64>,
}

/// One container, from its Create to the end of its Delete.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) cgroup: Cgroup,
    pub(crate) init: Rc<Process>,
    pub(crate) mounts: RefCell<Mounts>,
    pub(crate) hooks: RefCell<Vec<Stage>>,
    pub(crate) paused: Cell<bool>,
    pub(crate) deleting: Cell<bool>,
    pub(crate) memory_watch: RefCell<Option<AbortHandle>>,
    /// One helper at a time starts a process in it: each reads the container's state file and writes it again, and a
    /// file that is being written has nothing in it.
    pub(crate) turn: Semaphore,
    /// Its first process is not the first of its PID namespace, and others outlive it.
    pub(crate) sandbox_pidns: Cell<bool>,
    execs: RefCell<HashMap<String, Exec>>,
}

/// A further process and, until it starts, its description as JSON.
struct Exec {
    process: Rc<Process>,
    description: Option<Vec<u8>>,
}

impl Guest {
    pub(crate) fn new(endpoint: Endpoint, reaper: Rc<Reaper>, timeline: Timeline) -> Rc<Self> {
        Rc::new(Self {
            endpoint,
            reaper,
            events: Events::default(),
            timeline: RefCell::new(timeline),
            storages: RefCell::default(),
            network: RefCell::default(),
            resolver: RefCell::default(),
            pid_namespace: OnceCell::new(),
            itself: std::cell::OnceCell::new(),
            containers: RefCell::default(),
            names: Cell::new(0),
        })
    }

    pub(crate) fn container(&self, id: &str) -> Result<Rc<Container>> {
        self.containers.borrow().get(id).map(Rc::clone).ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// What has the processes that a request is about: a container, or the guest itself.
    pub(crate) fn place(&self, id: &str) -> Result<Rc<Container>> {
        if id != GUEST {
            return self.container(id);
        }
        self.itself.get().map(Rc::clone).ok_or_else(|| Error::precondition("the guest itself executes no commands"))
    }

    /// Lets commands be executed in the guest itself.
    pub(crate) fn open_debug_console(&self) {
        self.itself.get_or_init(Container::guest);
    }

    /// All containers, in no order.
    pub(crate) fn containers(&self) -> Vec<Rc<Container>> {
        self.containers.borrow().values().map(Rc::clone).collect()
    }

    /// A process by its container's id and its exec id, which is empty for the first process.
    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Rc<Process>> {
        self.place(id)?.process(exec_id)
    }

    /// Takes an id for a new container.
    pub(crate) fn add(&self, container: Rc<Container>) -> Result<()> {
        let mut containers = self.containers.borrow_mut();
        if containers.contains_key(&container.id) {
            return Err(Error::Exists(container.id.clone()));
        }
        if containers.len() >= CONTAINERS {
            return Err(Error::precondition(format!("this sandbox has {CONTAINERS} containers: delete some first")));
        }
        containers.insert(container.id.clone(), container);
        Ok(())
    }

    pub(crate) fn remove(&self, id: &str) {
        self.containers.borrow_mut().remove(id);
    }

    /// A short file name that no other call has got.
    pub(crate) fn unique_name(&self) -> String {
        let number = self.names.get();
        self.names.set(number + 1);
        number.to_string()
    }
}

impl Container {
    pub(crate) fn new(id: &str, init: Rc<Process>) -> Rc<Self> {
        Self::at(Path::new(protocols::BUNDLES_DIR).join(id), id, init)
    }

    /// The guest itself: it runs for as long as anything does, and nothing of it is to be removed.
    fn guest() -> Rc<Self> {
        Self::at(crate::RUNTIME_DIR.into(), GUEST, Process::new("", StdioFields::default(), Phase::Running))
    }

    pub(crate) fn is_guest(&self) -> bool {
        self.id == GUEST
    }

    fn at(bundle: PathBuf, id: &str, init: Rc<Process>) -> Rc<Self> {
        Rc::new(Self {
            id: id.to_owned(),
            bundle,
            cgroup: Cgroup::of(id),
            init,
            mounts: RefCell::default(),
            hooks: RefCell::default(),
            paused: Cell::new(false),
            deleting: Cell::new(false),
            memory_watch: RefCell::default(),
            turn: Semaphore::new(1),
            sandbox_pidns: Cell::new(false),
            execs: RefCell::default(),
        })
    }

    pub(crate) fn process(&self, exec_id: &str) -> Result<Rc<Process>> {
        if exec_id.is_empty() {
            return Ok(Rc::clone(&self.init));
        }
        self.execs
            .borrow()
            .get(exec_id)
            .map(|exec| Rc::clone(&exec.process))
            .ok_or_else(|| Error::NoProcess { container: self.id.clone(), exec_id: exec_id.to_owned() })
    }

    pub(crate) fn add_exec(&self, process: Rc<Process>, description: Vec<u8>) -> Result<()> {
        let mut execs = self.execs.borrow_mut();
        if execs.contains_key(&process.exec_id) {
            return Err(Error::Exists(process.exec_id.clone()));
        }
        if execs.len() >= PROCESSES {
            return Err(Error::precondition(format!(
                "container {:?} has {PROCESSES} exec processes: delete some first",
                self.id
            )));
        }
        execs.insert(process.exec_id.clone(), Exec { process, description: Some(description) });
        Ok(())
    }

    /// The description of a process that is about to start.
    pub(crate) fn take_description(&self, exec_id: &str) -> Option<Vec<u8>> {
        self.execs.borrow_mut().get_mut(exec_id).and_then(|exec| exec.description.take())
    }

    pub(crate) fn remove_exec(&self, exec_id: &str) {
        self.execs.borrow_mut().remove(exec_id);
    }
}

/// Checks an id that becomes the name of files and cgroups.
pub(crate) fn check_id(what: &str, id: &str) -> Result<()> {
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    if id.is_empty() || id.len() > ID_LENGTH || id.starts_with('.') || !id.chars().all(valid) {
        return Err(Error::invalid(format!(
            "{what} {id:?}: expected 1 to {ID_LENGTH} letters, digits or _ - . + that do not begin with a dot"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_no_file_names_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "\n", ".hidden", &"x".repeat(ID_LENGTH + 1)] {
            assert!(check_id("id", bad).is_err(), "{bad:?} must be refused");
        }
        for good in ["a", "k8s_web-1.2", &"x".repeat(ID_LENGTH)] {
            assert!(check_id("id", good).is_ok(), "{good:?} must be accepted");
        }
    }
}
