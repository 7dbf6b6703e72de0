//! One process of a container, its init or an exec: what the host knows of it without asking the guest.

use std::sync::Arc;
use std::time::Duration;

use protobuf::well_known_types::timestamp::Timestamp;
use protocols::containerd::types::task::Status;
use tokio::sync::watch;

use super::stdio::{Names, Pumps};
use crate::delete::EXIT_KILLED;
use crate::error::Error;

/// A container's processes end with its init, and its streams with them: silence means a guest that is slow.
const QUIET_INIT: Duration = Duration::from_secs(2);
/// What an exec leaves behind may hold its streams for as long as the container lives: silence means that.
const QUIET_EXEC: Duration = Duration::from_millis(250);

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Exit {
    /// Exit status; 128 + the signal's number for a killed one.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

impl Exit {
    /// The time of an end that nobody else has timed.
    #[must_use]
    pub fn now() -> Timestamp {
        Timestamp::now()
    }

    /// Killed now, by the end of its virtual machine.
    #[must_use]
    pub fn killed() -> Self {
        Self { status: EXIT_KILLED, at: Timestamp::now() }
    }
}

/// Where a process is in its life.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// Made, not running.
    Created,
    /// The guest was asked to start it; an exit is told only after that answer.
    Starting,
    /// Running.
    Running,
    /// Frozen with its container.
    Paused,
    /// Ended.
    Stopped(Exit),
}

/// A process of the guest.
#[derive(Debug)]
pub struct Process {
    /// Empty for a container's init.
    pub exec_id: String,
    /// What containerd named.
    pub names: Names,
    pumps: Pumps,
    phase: watch::Sender<Phase>,
}

impl Process {
    /// A process that is not started yet.
    #[must_use]
    pub fn new(exec_id: String, names: Names, pumps: Pumps) -> Arc<Self> {
        Arc::new(Self { exec_id, names, pumps, phase: watch::Sender::new(Phase::Created) })
    }

    /// Where it is now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// What the Task API calls that.
    #[must_use]
    pub fn status(&self) -> Status {
        match &*self.phase.borrow() {
            Phase::Created => Status::CREATED,
            Phase::Starting | Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Stopped(_) => Status::STOPPED,
        }
    }

    /// How it ended, once it did.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        match &*self.phase.borrow() {
            Phase::Stopped(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Goes from one phase to another; false, and no change, when it is not in `from`.
    pub fn advance(&self, from: &Phase, to: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let matches = phase == from;
            if matches {
                *phase = to;
            }
            matches
        })
    }

    /// Notes the end; false when it had ended before.
    pub fn stop(&self, exit: Exit) -> bool {
        self.phase.send_if_modified(|phase| {
            let first = !matches!(phase, Phase::Stopped(_));
            if first {
                *phase = Phase::Stopped(exit);
            }
            first
        })
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        // The sender lives as long as `self`.
        let ended = phase.wait_for(|phase| matches!(phase, Phase::Stopped(_))).await;
        match ended.as_deref() {
            Ok(Phase::Stopped(exit)) => exit.clone(),
            _ => Exit::killed(),
        }
    }

    /// Waits until a start that is under way has been answered.
    pub async fn settled(&self) {
        // As above: the sender lives.
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::Starting).await;
    }

    /// Begins to read its input.
    ///
    /// # Errors
    ///
    /// [`Error`] when it cannot be opened.
    pub fn open_input(&self) -> Result<(), Error> {
        self.pumps.open_input()
    }

    /// The client has no more input.
    pub fn close_input(&self) {
        self.pumps.close_input();
    }

    /// Waits, within limits, until the readers of its output have what it wrote before its end.
    pub async fn hand_over(&self) {
        self.pumps.hand_over(if self.exec_id.is_empty() { QUIET_INIT } else { QUIET_EXEC }).await;
    }

    /// Waits, within limits, for the rest of the output of a process that the guest has forgotten.
    pub async fn drain(&self) {
        self.pumps.finish().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Arc<Process> {
        Process::new(String::new(), Names::default(), Pumps::default())
    }

    #[tokio::test]
    async fn the_first_end_counts_and_everyone_who_waits_hears_of_it() {
        let process = process();
        let waiter = tokio::spawn({
            let process = Arc::clone(&process);
            async move { process.wait().await }
        });
        assert!(process.stop(Exit { status: 42, at: Timestamp::now() }));
        assert!(!process.stop(Exit::killed()));
        assert_eq!(waiter.await.unwrap().status, 42);
        assert_eq!(process.wait().await.status, 42);
    }

    #[test]
    fn a_late_answer_to_start_does_not_revive_an_ended_process() {
        let process = process();
        assert!(process.advance(&Phase::Created, Phase::Starting));
        assert!(process.stop(Exit::killed()));
        assert!(!process.advance(&Phase::Starting, Phase::Running));
        assert_eq!(process.status(), Status::STOPPED);
    }
}
