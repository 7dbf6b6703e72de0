//! containerd's own client, `ctr`, as the suites use it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::event::Deadline;
use crate::process::{self, Finished, Running};

/// Where a containerd is and how to talk to it.
#[derive(Clone, Debug)]
pub struct Ctr {
    /// The `ctr` program.
    pub program: PathBuf,
    /// containerd's socket.
    pub address: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// The runtime of new containers, such as `io.containerd.kata.v2`.
    pub runtime: String,
    /// A hang guard for one command.
    pub patience: Duration,
}

impl Ctr {
    /// The same client, for another runtime.
    #[must_use]
    pub fn with_runtime(&self, runtime: &str) -> Self {
        Self { runtime: runtime.to_owned(), ..self.clone() }
    }

    /// A `ctr` command that has not started.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--address").arg(&self.address).args(["--namespace", &self.namespace]).args(arguments);
        command
    }

    /// `ctr run` with this runtime and `options` before the image.
    #[must_use]
    pub fn run_command(&self, options: &[&str], image: &str, id: &str, program: &[&str]) -> Command {
        let mut arguments = vec!["run", "--runtime", &self.runtime];
        arguments.extend(options);
        arguments.extend([image, id]);
        arguments.extend(program);
        self.command(&arguments)
    }

    /// The moment by which a command that starts now must have ended.
    #[must_use]
    pub fn deadline(&self) -> Deadline {
        Deadline::after(self.patience)
    }

    /// Runs a command to its end, whatever its exit code.
    ///
    /// # Errors
    /// When it cannot be started or hangs.
    pub fn any(&self, arguments: &[&str]) -> Result<Finished> {
        process::run(self.command(arguments), b"", self.deadline())
    }

    /// Runs a command that must succeed; answers its standard output.
    ///
    /// # Errors
    /// With its own error text when it fails.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let finished = self.any(arguments)?.expect_code(0).with_context(|| format!("ctr {}", arguments.join(" ")))?;
        Ok(finished.text())
    }

    /// `ctr run --rm`: a container from its start to its removal.
    ///
    /// # Errors
    /// When it cannot be started or hangs.
    pub fn run(&self, options: &[&str], image: &str, id: &str, program: &[&str]) -> Result<Finished> {
        let options: Vec<&str> = ["--rm"].iter().chain(options).copied().collect();
        process::run(self.run_command(&options, image, id, program), b"", self.deadline())
    }

    /// `ctr run -d`: the container runs on when this returns.
    ///
    /// # Errors
    /// With ctr's text when it fails.
    pub fn detach(&self, options: &[&str], image: &str, id: &str, program: &[&str]) -> Result<Container<'_>> {
        let options: Vec<&str> = ["-d"].iter().chain(options).copied().collect();
        let finished = process::run(self.run_command(&options, image, id, program), b"", self.deadline())?;
        let container = Container { ctr: self, id: id.to_owned() };
        finished.expect_code(0).with_context(|| format!("ctr run -d {id}"))?;
        Ok(container)
    }

    /// Imports an OCI archive; answers the names of its images.
    ///
    /// # Errors
    /// With ctr's text when it fails.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.ok(&["image", "import", &archive.display().to_string()]).map(drop)
    }

    /// Lines of `ctr task ls`: id, pid and status.
    ///
    /// # Errors
    /// When ctr fails.
    pub fn tasks(&self) -> Result<Vec<Task>> {
        let listed = self.ok(&["task", "ls"])?;
        let task = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            Some(Task { id: words.next()?.into(), pid: words.next()?.parse().ok()?, status: words.next()?.into() })
        };
        Ok(listed.lines().skip(1).filter_map(task).collect())
    }

    /// Removes every task and container of the namespace; answers what it found.
    ///
    /// # Errors
    /// When containerd does not answer.
    pub fn sweep(&self) -> Result<Vec<String>> {
        let listed = self.ok(&["container", "ls", "-q"])?;
        let found: Vec<String> = listed.lines().map(str::to_owned).collect();
        for id in &found {
            // Each may have been removed in the meantime: whatever stays is found by the check.
            self.any(&["task", "delete", "--force", id])?;
            self.any(&["container", "delete", id])?;
        }
        Ok(found)
    }

    /// Has containerd remove what nothing refers to, and waits for it: the end of a lease can ask for that.
    ///
    /// # Errors
    /// When ctr fails.
    pub fn collect_garbage(&self) -> Result<()> {
        self.ok(&["leases", "create", "--id", "garbage"])?;
        self.ok(&["leases", "delete", "--sync", "garbage"]).map(drop)
    }
}

/// A line of `ctr task ls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// The process that containerd was told of.
    pub pid: i32,
    /// `CREATED`, `RUNNING`, `STOPPED`, …
    pub status: String,
}

/// A container that was started detached.
#[derive(Debug)]
pub struct Container<'a> {
    ctr: &'a Ctr,
    /// Its id.
    pub id: String,
}

impl Container<'_> {
    /// `ctr task exec`: another process in the container.
    ///
    /// # Errors
    /// When it cannot be started or hangs.
    pub fn exec(&self, name: &str, options: &[&str], program: &[&str], stdin: &[u8]) -> Result<Finished> {
        process::run(self.exec_command(name, options, program), stdin, self.ctr.deadline())
    }

    /// `ctr task exec` that has not started.
    #[must_use]
    pub fn exec_command(&self, name: &str, options: &[&str], program: &[&str]) -> Command {
        let mut arguments = vec!["task", "exec", "--exec-id", name];
        arguments.extend(options);
        arguments.push(&self.id);
        arguments.extend(program);
        self.ctr.command(&arguments)
    }

    /// `ctr task attach`: ends with the container and its exit code, and deletes the task then.
    ///
    /// # Errors
    /// When ctr cannot be started.
    pub fn attach(&self, stdin: &[u8]) -> Result<Running> {
        Running::start(self.ctr.command(&["task", "attach", &self.id]), Some(stdin.to_vec()))
    }

    /// `ctr task kill`.
    ///
    /// # Errors
    /// With ctr's text when it fails.
    pub fn kill(&self, signal: &str) -> Result<()> {
        self.ctr.ok(&["task", "kill", "-s", signal, &self.id]).map(drop)
    }

    /// containerd's word for its state.
    ///
    /// # Errors
    /// When containerd knows no such task.
    pub fn status(&self) -> Result<Task> {
        match self.ctr.tasks()?.into_iter().find(|task| task.id == self.id) {
            Some(task) => Ok(task),
            None => bail!("containerd knows no task {}", self.id),
        }
    }

    /// Removes the container, whose task is deleted.
    ///
    /// # Errors
    /// With ctr's text when it fails.
    pub fn remove_container(self) -> Result<()> {
        self.ctr.ok(&["container", "delete", &self.id]).map(drop)
    }

    /// Kills it if need be, and removes task and container; answers the exit code that `ctr task delete` tells.
    ///
    /// # Errors
    /// When ctr fails; an exit code of the task that is not 0 is no failure.
    pub fn remove(self) -> Result<i32> {
        let deleted = self.ctr.any(&["task", "delete", "--force", &self.id])?;
        // ctr ends with the task's exit code and says so only when it is not 0.
        if !deleted.error_text().is_empty() && deleted.code == 1 {
            bail!("ctr task delete {}: {}", self.id, deleted.error_text());
        }
        self.ctr.ok(&["container", "delete", &self.id])?;
        Ok(deleted.code)
    }
}
