//! Collects every child that ends: the processes of containers, helpers, and orphans that fell to PID 1.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::time::SystemTime;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::sys;

/// How a process ended: its exit code, or 128 + the signal that killed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// The only place of this process that waits for children.
///
/// A helper learns a container's pid and reports it; the container may have ended by then. Exits of unknown children
/// are therefore kept while a [`Birth`] lives, and dropped otherwise: those were orphans.
#[derive(Default)]
pub(crate) struct Reaper {
    claims: RefCell<HashMap<i32, oneshot::Sender<Exit>>>,
    unclaimed: RefCell<HashMap<i32, Exit>>,
    births: Cell<usize>,
}

/// While this lives, children are being born whose pids are not known yet.
pub(crate) struct Birth(Rc<Reaper>);

impl Drop for Birth {
    fn drop(&mut self) {
        self.0.births.set(self.0.births.get() - 1);
        if self.0.births.get() == 0 {
            self.0.unclaimed.take();
        }
    }
}

impl Reaper {
    /// To be taken before a child is spawned and kept until all its pids are claimed.
    pub(crate) fn birth(self: &Rc<Self>) -> Birth {
        self.births.set(self.births.get() + 1);
        Birth(Rc::clone(self))
    }

    /// Asks for the exit of one child of this process.
    pub(crate) fn claim(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        match self.unclaimed.borrow_mut().remove(&pid) {
            Some(exit) => drop(sender.send(exit)),
            None => drop(self.claims.borrow_mut().insert(pid, sender)),
        }
        receiver
    }

    /// Installs the SIGCHLD handler: before the first child is spawned.
    pub(crate) fn listen() -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps for ever.
    pub(crate) async fn run(self: Rc<Self>, mut children: Signal) {
        while children.recv().await.is_some() {
            self.reap();
        }
    }

    fn reap(&self) {
        loop {
            match sys::reap_one() {
                Ok(Some(ended)) => self.ended(&ended),
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot wait for children");
                    return;
                }
            }
        }
    }

    fn ended(&self, ended: &sys::Ended) {
        let exit = Exit { status: ended.status, at: SystemTime::now() };
        if let Some(claim) = self.claims.borrow_mut().remove(&ended.pid) {
            // The claimant may have lost interest; its process is reaped all the same.
            let _ = claim.send(exit);
        } else if self.births.get() > 0 {
            self.unclaimed.borrow_mut().insert(ended.pid, exit);
        }
    }
}
