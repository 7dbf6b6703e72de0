//! One process of a container: its life from the request to the exit.

use std::cell::{Cell, RefCell};
use std::os::fd::AsFd;
use std::rc::Rc;

use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::reaper::Exit;
use crate::stdio::{Forwarding, Watched};
use crate::sys;

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// A request to make, start or delete it is being worked on.
    Changing,
    Created,
    Running,
    Stopped(Exit),
}

/// The stdio fields of a request as they came: State must echo them.
#[derive(Debug, Clone, Default)]
pub(crate) struct StdioFields {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// A container's first process or a further one. Its exec id is empty for the first.
pub(crate) struct Process {
    pub(crate) exec_id: String,
    pub(crate) fields: StdioFields,
    phase: watch::Sender<Phase>,
    /// In the guest's numbering; 0 before there is one.
    pid: Cell<i32>,
    terminal: RefCell<Option<Rc<Watched>>>,
    forwarding: RefCell<Forwarding>,
    /// A size that came before the terminal did.
    window: Cell<Option<(u16, u16)>>,
}

impl Process {
    pub(crate) fn new(exec_id: &str, fields: StdioFields, phase: Phase) -> Rc<Self> {
        Rc::new(Self {
            exec_id: exec_id.to_owned(),
            fields,
            phase: watch::Sender::new(phase),
            pid: Cell::new(0),
            terminal: RefCell::default(),
            forwarding: RefCell::default(),
            window: Cell::new(None),
        })
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Claims the process for one change if it is in `from`; the caller sets the next phase.
    pub(crate) fn begin_change(&self, from: Phase, doing: &str) -> Result<()> {
        let now = self.phase();
        if now != from {
            return Err(Error::precondition(format!("cannot {doing} a process that is {}", describe(now))));
        }
        self.set_phase(Phase::Changing);
        Ok(())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.get().cast_unsigned()
    }

    pub(crate) fn set_pid(&self, pid: i32) {
        self.pid.set(pid);
    }

    /// Joins the process to its streams.
    pub(crate) fn attach(&self, forwarding: Forwarding, terminal: Option<Rc<Watched>>) -> Result<()> {
        self.forwarding.replace(forwarding);
        self.terminal.replace(terminal);
        match self.window.take() {
            Some((columns, rows)) => self.resize(columns, rows),
            None => Ok(()),
        }
    }

    pub(crate) fn stopped(&self, exit: Exit) {
        self.forwarding.take();
        self.terminal.take();
        self.set_phase(Phase::Stopped(exit));
    }

    /// Waits for the end of the process, which may not have begun yet. Does not keep the process alive: `None` when it
    /// is given up before it ran.
    pub(crate) fn wait(&self) -> impl Future<Output = Option<Exit>> + use<> {
        let mut phases = self.phase.subscribe();
        async move {
            let ended = phases.wait_for(|phase| matches!(phase, Phase::Stopped(_))).await;
            match ended.map(|phase| *phase) {
                Ok(Phase::Stopped(exit)) => Some(exit),
                _ => None,
            }
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`Error::ProcessFinished`] after its end, [`Error::Precondition`] before its beginning.
    pub(crate) fn signal(&self, signal: i32) -> Result<()> {
        match self.phase() {
            Phase::Stopped(_) => Err(Error::ProcessFinished),
            _ if self.pid.get() == 0 => Err(Error::precondition("process not created")),
            // The pid is ours until the reaper has said that the process stopped.
            _ => sys::kill(self.pid.get(), signal).map_err(|errno| match errno {
                nix::errno::Errno::ESRCH => Error::ProcessFinished,
                errno => Error::Io { what: format!("cannot send signal {signal}"), source: errno.into() },
            }),
        }
    }

    /// Sets the size of its terminal, now or as soon as it has one.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        if !self.fields.terminal {
            return Err(Error::precondition("the process has no terminal"));
        }
        match self.terminal.borrow().as_ref() {
            Some(terminal) => sys::set_window_size(terminal.get_ref().as_fd(), columns, rows)
                .map_err(Error::io("cannot resize the terminal")),
            None => {
                self.window.set(Some((columns, rows)));
                Ok(())
            }
        }
    }

    /// Whether input can reach the process.
    pub(crate) fn has_stdin(&self) -> bool {
        self.forwarding.borrow().has_stdin()
    }
}

/// A phase in the words of runc's shim.
pub(crate) fn describe(phase: Phase) -> &'static str {
    match phase {
        Phase::Changing => "busy with another request",
        Phase::Created => "created",
        Phase::Running => "running",
        Phase::Stopped(_) => "stopped",
    }
}
