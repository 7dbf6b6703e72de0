//! A lab machine that runs: Debian with containerd in an emulated computer whose CPU has hardware virtualization.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use lab_guest::wire::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tool::{io, tail};

use crate::command::{Command, Event, Input, Output, Process};
use crate::connection::Connection;
use crate::ending::Ending;
use crate::error::Error;
use crate::hardware::Hardware;
use crate::model;
use crate::prepare::BOOT_LIMIT;
use crate::progress::Progress;
use crate::qemu::{Descriptors, End, Plan, Start};
use crate::qmp::Qmp;
use crate::rundir::{self, RunDir};
use crate::setup::{Setup, prepare_with};
use crate::snapshot::Snapshot;

/// How long a running machine may take to answer: it shares the host with whatever is built there.
const ANSWER_LIMIT: Duration = Duration::from_secs(180);

/// How long a QEMU may take to end after the connections to it have broken.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Lets guests' memory be of huge pages, so that the IOMMU maps 2 MiB at a time: each mapping is told to QEMU, and by
/// QEMU to the models of devices, which for 4 KiB at a time takes half a minute for a GiB.
const HUGE_PAGES: &str = "echo always > /sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// What a machine was started from, as it stands in its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The snapshot's name.
    pub snapshot: String,
    /// Process number of its QEMU.
    pub pid: i32,
    /// Names of the devices behind its IOMMU.
    #[serde(default)]
    pub devices: Vec<String>,
}

/// A machine that runs.
#[derive(Debug)]
pub struct Machine {
    dir: RunDir,
    snapshot: Snapshot,
    pid: Pid,
    /// How its QEMU ended; of machines that another process started nobody here knows.
    ending: Option<Arc<Ending>>,
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
        Self::restore_with(snapshot, &Setup::new(), name)
    }

    /// The same with a setup done before.
    ///
    /// # Errors
    /// As [`Self::restore`], and when the setup fails.
    pub fn restore_with(snapshot: Snapshot, setup: &Setup, name: &str) -> Result<Self, Error> {
        Self::start(snapshot, setup, name, End::WithThread)
    }

    /// The same, but the machine goes on until somebody ends it by its name.
    ///
    /// # Errors
    /// As [`Self::restore_with`].
    pub fn restore_kept(snapshot: Snapshot, setup: &Setup, name: &str) -> Result<Self, Error> {
        let mut machine = Self::start(snapshot, setup, name, End::Never)?;
        machine.kept = true;
        Ok(machine)
    }

    fn start(snapshot: Snapshot, setup: &Setup, name: &str, end: End) -> Result<Self, Error> {
        let dir = RunDir::of(name)?;
        let prepared = prepare_with(snapshot, setup)?;
        let plan = prepared.plan(snapshot, &dir, Start::Restore, end);
        let machine = Self::launch(dir, &plan)?;
        machine.receive(&prepared.state())?;
        Ok(machine)
    }

    /// Boots a machine with hardware of its own from the disk of a snapshot with a setup: what the setup wrote to the
    /// disk is there, what ran is not. Takes as long as a boot does. The machine ends when this is dropped, and with
    /// this process however that ends.
    ///
    /// # Errors
    /// As [`Self::restore_with`], and when the hardware cannot be had.
    pub fn boot(hardware: &Hardware, snapshot: Snapshot, setup: &Setup, name: &str) -> Result<Self, Error> {
        Self::start_fresh(hardware, snapshot, setup, name, End::WithThread)
    }

    /// The same, but the machine goes on until somebody ends it by its name.
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub fn boot_kept(hardware: &Hardware, snapshot: Snapshot, setup: &Setup, name: &str) -> Result<Self, Error> {
        let mut machine = Self::start_fresh(hardware, snapshot, setup, name, End::Never)?;
        machine.kept = true;
        Ok(machine)
    }

    fn start_fresh(
        hardware: &Hardware,
        snapshot: Snapshot,
        setup: &Setup,
        name: &str,
        end: End,
    ) -> Result<Self, Error> {
        let dir = RunDir::of(name)?;
        let prepared = prepare_with(snapshot, setup)?;
        let plan = prepared.fresh_plan(snapshot, hardware, &dir, end)?;
        let progress = Progress::start(&format!("Booting the lab machine {name}"), 0);
        let machine = Self::launch_with(dir, &plan, hardware)?;
        // The answer's connection is not needed, only that it comes.
        drop(machine.await_answer(BOOT_LIMIT)?);
        machine.run(&Command::shell(HUGE_PAGES), Input::Empty)?.check()?;
        drop(progress);
        Ok(machine)
    }

    /// Gives a machine that was just launched the state at `uri`, and lets it run.
    pub(crate) fn receive(&self, uri: &str) -> Result<(), Error> {
        let mut qmp = self.qmp()?;
        qmp.migrate("migrate-incoming", uri).map_err(|error| self.explain(error))?;
        qmp.execute("cont", &json!({}))?;
        let mut connection = self.await_answer(ANSWER_LIMIT)?;
        if self.snapshot.counts_instructions() {
            return Ok(());
        }
        connection.set_clock(ANSWER_LIMIT)
    }

    /// The machine of that name, which runs already and goes on running.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when it does not.
    pub fn attach(name: &str) -> Result<Self, Error> {
        let dir = RunDir::of(name)?;
        let description = describe(&dir).ok_or_else(|| Error::NotRunning(name.to_owned()))?;
        let (snapshot, pid) = (description.snapshot.parse()?, Pid::from_raw(description.pid));
        Ok(Self { snapshot, pid, dir, ending: None, kept: true })
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

    /// The names of machines that run, and of those that have ended by themselves and left their logs.
    ///
    /// # Errors
    /// When their directory cannot be read.
    pub fn names() -> Result<Vec<String>, Error> {
        rundir::names()
    }

    /// The file with what a machine wrote to its console, even if it has ended by itself.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when there is none.
    pub fn console_of(name: &str) -> Result<PathBuf, Error> {
        let dir = RunDir::of(name)?;
        if dir.exists() { Ok(dir.console()) } else { Err(Error::NotRunning(name.to_owned())) }
    }

    /// Ends the machine of that name, and removes what one that has ended by itself left.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when there is neither.
    pub fn end_named(name: &str) -> Result<(), Error> {
        let dir = RunDir::of(name)?;
        match Self::attach(name) {
            Err(Error::NotRunning(_)) if dir.exists() => dir.remove(),
            Err(error) => Err(error),
            Ok(machine) => machine.end(),
        }
    }

    /// Starts QEMU. Even a machine that is to stay ends with its starter as long as nobody says otherwise.
    pub(crate) fn launch(dir: RunDir, plan: &Plan) -> Result<Self, Error> {
        Self::launch_with(dir, plan, &Hardware::new())
    }

    /// The same with what the plan's hardware needs beside QEMU.
    fn launch_with(dir: RunDir, plan: &Plan, hardware: &Hardware) -> Result<Self, Error> {
        let life = dir.claim()?;
        model::create_disks(hardware, &dir)?;
        let models = model::start(hardware, &dir)?;
        let ending = Arc::new(Ending::default());
        let pid = spawn(&dir, plan, life, models, Arc::clone(&ending))?;
        let machine = Self { dir, snapshot: plan.snapshot, pid, ending: Some(ending), kept: false };
        let devices = hardware.devices().iter().map(ToString::to_string).collect();
        let description = Description { snapshot: plan.snapshot.name().to_owned(), pid: pid.as_raw(), devices };
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
        self.spawn(command, input)?.output().map_err(|error| self.explain(error))
    }

    /// Runs a command to its end and calls `on_event` with its output as it comes.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_streaming(&self, command: &Command, input: Input, on_event: impl FnMut(Event)) -> Result<Status, Error> {
        self.spawn(command, input)?.stream(on_event).map_err(|error| self.explain(error))
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
        self.qmp()?.execute("stop", &json!({}))?;
        let mark = self.dir.paused();
        Ok(fs::write(&mark, "").map_err(io("write", &mark))?)
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub fn resume(&self) -> Result<(), Error> {
        self.qmp()?.execute("cont", &json!({}))?;
        let mark = self.dir.paused();
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io("remove", &mark)(error).into()),
            _ => Ok(()),
        }
    }

    /// Whether it is not paused.
    #[must_use]
    pub fn running(&self) -> bool {
        !self.dir.paused().exists()
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
        if self.dir.paused().exists() {
            return Err(Error::Paused(self.name().to_owned()));
        }
        Connection::open(&self.dir, limit).map_err(|error| self.explain(error))
    }

    /// Adds how QEMU ended, and its and the machine's last words, to an error that is due to that.
    fn explain(&self, error: Error) -> Error {
        // A connection breaks a moment before the process is gone.
        let grace = if matches!(error, Error::Connection(_)) { END_LIMIT } else { Duration::ZERO };
        let status = self.ending.as_ref().and_then(|ending| ending.wait(grace));
        if status.is_none() && self.dir.alive() {
            return error;
        }
        let how = status.map_or_else(String::new, |status| format!(" ({status})"));
        let problem = match error {
            Error::Qemu { problem, .. } => problem,
            _ => "has ended".to_owned(),
        };
        let log: String = [self.dir.qemu_log(), self.dir.console()]
            .iter()
            .filter_map(|path| fs::read_to_string(path).ok())
            .map(|text| format!("\n{}", tail(&text, 2000)))
            .collect();
        Error::Qemu { problem: problem + &how, log }
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
fn spawn(dir: &RunDir, plan: &Plan, life: OwnedFd, models: Vec<OwnedFd>, ending: Arc<Ending>) -> Result<Pid, Error> {
    let (qmp, ports) = dir.listen()?;
    let descriptors = Descriptors { qmp, ports, life, models };
    let (plan, log) = (plan.clone(), dir.qemu_log());
    let (sender, started) = channel();
    std::thread::spawn(move || {
        // The receiver waits below for exactly one message.
        match plan.spawn(descriptors, &log) {
            Err(error) => drop(sender.send(Err(error))),
            Ok(mut child) => {
                drop(sender.send(Ok(child.id())));
                ending.set(child.wait());
            }
        }
    });
    let unstarted = || Error::Qemu { problem: "was not started".to_owned(), log: String::new() };
    let pid = started.recv().map_err(|_| unstarted())??;
    Ok(Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX)))
}
