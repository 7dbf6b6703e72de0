//! A lab machine that runs: Debian with containerd in an emulated computer whose CPU has hardware virtualization.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Duration;

use lab_guest::wire::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::command::{Command, Event, Input, Output, Process};
use crate::connection::Connection;
use crate::error::{Error, io, tail};
use crate::prepare::prepare;
use crate::qemu::{self, Descriptors, End, Parts, Start};
use crate::qmp::Qmp;
use crate::rundir::{self, RunDir};
use crate::snapshot::Snapshot;
use crate::tools::Tools;

/// How long a running machine may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a machine was started from, as it stands in its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The snapshot's name.
    pub snapshot: String,
    /// Process number of its QEMU.
    pub pid: i32,
}

/// A machine that runs.
#[derive(Debug)]
pub struct Machine {
    dir: RunDir,
    snapshot: Snapshot,
    pid: Pid,
    /// Whether dropping this leaves the machine running.
    kept: bool,
}

impl Machine {
    /// Starts a machine as the snapshot left it; makes the snapshot first if there is none. The machine ends when this
    /// is dropped, and with this process however that ends.
    ///
    /// # Errors
    /// When a machine of that name runs, or something goes wrong.
    pub fn restore(snapshot: Snapshot, name: &str) -> Result<Self, Error> {
        Self::start(snapshot, name, End::WithThread)
    }

    /// The same, but the machine goes on until somebody ends it by its name.
    ///
    /// # Errors
    /// As [`Self::restore`].
    pub fn restore_kept(snapshot: Snapshot, name: &str) -> Result<Self, Error> {
        Self::start(snapshot, name, End::Never)
    }

    fn start(snapshot: Snapshot, name: &str, end: End) -> Result<Self, Error> {
        let dir = RunDir::of(name)?;
        let prepared = prepare(snapshot)?;
        let parts = prepared.parts(&dir);
        let machine = Self::launch(&prepared.materials.tools, snapshot, dir, &parts, Start::Restore, end)?;
        let mut qmp = machine.qmp()?;
        qmp.migrate("migrate-incoming", &prepared.state()).map_err(|error| machine.explain(error))?;
        qmp.execute("cont", &json!({}))?;
        let mut connection = machine.await_answer(ANSWER_LIMIT)?;
        if !snapshot.counts_instructions() {
            connection.set_clock(ANSWER_LIMIT)?;
        }
        Ok(machine)
    }

    /// The machine of that name, which runs already and goes on running.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when it does not.
    pub fn attach(name: &str) -> Result<Self, Error> {
        let dir = RunDir::of(name)?;
        let description = describe(&dir).ok_or_else(|| Error::NotRunning(name.to_owned()))?;
        Ok(Self { snapshot: description.snapshot.parse()?, pid: Pid::from_raw(description.pid), dir, kept: true })
    }

    /// Names and descriptions of the machines that run.
    ///
    /// # Errors
    /// When their directory cannot be read.
    pub fn list() -> Result<Vec<(String, Description)>, Error> {
        let mut machines = Vec::new();
        for name in rundir::names()? {
            if let Some(description) = describe(&RunDir::of(&name)?) {
                machines.push((name, description));
            }
        }
        Ok(machines)
    }

    /// Starts QEMU.
    pub(crate) fn launch(
        tools: &Tools,
        snapshot: Snapshot,
        dir: RunDir,
        parts: &Parts,
        start: Start,
        end: End,
    ) -> Result<Self, Error> {
        let life = dir.claim()?;
        let pid = spawn_kept(tools, snapshot, &dir, parts, start, end, life)?;
        let machine = Self { dir, snapshot, pid, kept: end == End::Never };
        let description = Description { snapshot: snapshot.name().to_owned(), pid: pid.as_raw() };
        let path = machine.dir.description();
        fs::write(&path, serde_json::to_vec(&description).unwrap_or_default()).map_err(io("write", &path))?;
        Ok(machine)
    }

    /// The machine's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.dir.name()
    }

    /// What it was started from.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot
    }

    /// The file with what the machine wrote to its console since it was restored.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.console()
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// When the command cannot be started, takes longer than its limit, or the machine does not answer. A command that
    /// fails is no error; see [`Output::check`].
    pub fn run(&self, command: &Command, input: Input) -> Result<Output, Error> {
        self.spawn(command, input)?.output()
    }

    /// Runs a command to its end and calls `on_event` with its output as it comes.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_streaming(&self, command: &Command, input: Input, on_event: impl FnMut(Event)) -> Result<Status, Error> {
        self.spawn(command, input)?.stream(on_event)
    }

    /// Starts a command.
    ///
    /// # Errors
    /// When the machine does not answer.
    pub fn spawn(&self, command: &Command, input: Input) -> Result<Process, Error> {
        Process::start(self.await_answer(ANSWER_LIMIT)?, command, input)
    }

    /// Stops the machine's CPUs and its virtual time.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn pause(&self) -> Result<(), Error> {
        self.qmp()?.execute("stop", &json!({})).map(drop)
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn resume(&self) -> Result<(), Error> {
        self.qmp()?.execute("cont", &json!({})).map(drop)
    }

    /// Whether it is not paused.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn running(&self) -> Result<bool, Error> {
        Ok(self.qmp()?.execute("query-status", &json!({}))?["running"] == true)
    }

    /// Ends the machine at once; what it had written is gone.
    ///
    /// # Errors
    /// When its directory cannot be removed.
    pub fn end(mut self) -> Result<(), Error> {
        self.kept = true;
        self.kill()
    }

    /// Lets QEMU end by itself, its files written.
    pub(crate) fn quit(mut self) -> Result<(), Error> {
        self.qmp()?.execute("quit", &json!({}))?;
        self.dir.wait_for_end();
        self.kept = true;
        self.dir.remove()
    }

    fn kill(&self) -> Result<(), Error> {
        // While the machine's lock is held, the number is its QEMU's and no other process's.
        if self.dir.alive() {
            // An error says that it has just ended.
            let _ = kill(self.pid, Signal::SIGKILL);
            self.dir.wait_for_end();
        }
        self.dir.remove()
    }

    /// A connection to QEMU.
    pub(crate) fn qmp(&self) -> Result<Qmp, Error> {
        Qmp::connect(&self.dir.qmp()).map_err(|error| self.explain(error))
    }

    /// Waits until the machine's command server answers.
    pub(crate) fn await_answer(&self, limit: Duration) -> Result<Connection, Error> {
        match Connection::open(&self.dir, limit) {
            Err(Error::Timeout { .. }) if self.running().is_ok_and(|running| !running) => {
                Err(Error::Paused(self.name().to_owned()))
            }
            opened => opened.map_err(|error| self.explain(error)),
        }
    }

    /// Adds QEMU's and the machine's last words to an error that is due to its end.
    fn explain(&self, error: Error) -> Error {
        if self.dir.alive() {
            return error;
        }
        let problem = match error {
            Error::Qemu { problem, .. } => problem,
            _ => "has ended".to_owned(),
        };
        let log: String = [self.dir.qemu_log(), self.dir.console()]
            .iter()
            .filter_map(|path| fs::read_to_string(path).ok())
            .map(|text| format!("\n{}", tail(&text, 2000)))
            .collect();
        Error::Qemu { problem, log }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = self.kill()
        {
            eprintln!("lab: Machine {} has ended, but: {error}", self.name());
        }
    }
}

/// The description of a machine, if it lives.
fn describe(dir: &RunDir) -> Option<Description> {
    let text = fs::read(dir.description()).ok()?;
    dir.alive().then(|| serde_json::from_slice(&text).ok()).flatten()
}

/// Starts QEMU in a thread that lives as long as QEMU does, so that "with the thread" means "with this process".
fn spawn_kept(
    tools: &Tools,
    snapshot: Snapshot,
    dir: &RunDir,
    parts: &Parts,
    start: Start,
    end: End,
    life: OwnedFd,
) -> Result<Pid, Error> {
    let (qmp, ports) = dir.listen()?;
    let descriptors = Descriptors { qmp, ports, life };
    let (tools, parts, log) = (tools.clone(), parts.clone(), dir.qemu_log());
    let (sender, started) = channel();
    std::thread::spawn(move || {
        let child = qemu::start(&tools, snapshot, &parts, start, descriptors, &log, end);
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                // The receiver waits below.
                let _ = sender.send(Err(error));
                return;
            }
        };
        let _ = sender.send(Ok(child.id()));
        // Reaps it; how it ended shows in its log.
        let _ = child.wait();
    });
    let pid =
        started.recv().map_err(|_| Error::Qemu { problem: "was not started".to_owned(), log: String::new() })??;
    Ok(Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX)))
}
