//! docker: a daemon of the suites' own, with their containerd, and its client.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::containerd::until_ready;
use crate::daemon;
use crate::event::Deadline;
use crate::pidfd::Pidfd;
use crate::process::{self, Finished};

/// The image of containers, as docker calls it.
pub const BUSYBOX: &str = "busybox:latest";
/// The networks that every daemon has.
const BUILT_IN: [&str; 3] = ["bridge", "host", "none"];

/// A dockerd that runs. Dropped, it is ended and its directories are removed.
#[derive(Debug)]
pub struct Docker {
    process: (Child, Pidfd),
    programs: PathBuf,
    directory: PathBuf,
    runtime: String,
    patience: Duration,
}

impl Docker {
    /// Starts the dockerd of the directory `programs` with everything of its own below `directory`, on the containerd that
    /// serves at `containerd`, and waits until it serves. Containers have this `runtime`; a command has so much `patience`.
    ///
    /// # Errors
    /// With the end of its log when it ends or does not serve before the deadline.
    pub fn start(
        programs: &Path,
        containerd: &Path,
        directory: &Path,
        runtime: &str,
        patience: Duration,
    ) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("Cannot create {}", directory.display()))?;
        let log = fs::File::create(directory.join("log")).context("Cannot open docker's log")?;
        let notice = directory.join("notify.sock");
        let ready = UnixDatagram::bind(&notice).with_context(|| format!("Cannot bind {}", notice.display()))?;
        let own = |name: &str| directory.join(name);
        let mut child = Command::new(programs.join("dockerd"))
            .arg("--containerd")
            .arg(containerd)
            .arg("--data-root")
            .arg(own("root"))
            .arg("--exec-root")
            .arg(own("exec"))
            .arg("--pidfile")
            .arg(own("pid"))
            .arg("--host")
            .arg(address(directory))
            .args(["--group", "root"])
            .arg("--userland-proxy-path")
            .arg(programs.join("docker-proxy"))
            .arg("--init-path")
            .arg(programs.join("docker-init"))
            .env("NOTIFY_SOCKET", &notice)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("Cannot run dockerd of {}", programs.display()))?;
        let serves = Pidfd::open(i32::try_from(child.id())?).context("pidfd_open").and_then(|pidfd| {
            until_ready(&ready, &pidfd, Deadline::after(patience))?;
            Ok(pidfd)
        });
        match serves {
            Ok(pidfd) => Ok(Self {
                process: (child, pidfd),
                programs: programs.to_owned(),
                directory: directory.to_owned(),
                runtime: runtime.to_owned(),
                patience,
            }),
            Err(error) => {
                child.kill().ok();
                child.wait().ok();
                Err(error.context(log_end(directory)))
            }
        }
    }

    /// The end of its log.
    #[must_use]
    pub fn log_end(&self) -> String {
        log_end(&self.directory)
    }

    /// The moment by which a command that starts now must have ended.
    #[must_use]
    pub fn deadline(&self) -> Deadline {
        Deadline::after(self.patience)
    }

    /// A command of the client that has not started.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("docker"));
        command.arg("--host").arg(address(&self.directory)).args(arguments);
        command
    }

    /// `docker run` with the runtime under test, and `options` before the image.
    #[must_use]
    pub fn run_command(&self, options: &[&str], program: &[&str]) -> Command {
        self.command(&[&["run", "--runtime", &self.runtime], options, &[BUSYBOX], program].concat())
    }

    /// `docker run --rm`: a container from its start to its removal.
    ///
    /// # Errors
    /// When it cannot be started or hangs.
    pub fn run(&self, options: &[&str], program: &[&str]) -> Result<Finished> {
        process::run(self.run_command(&[&["--rm"], options].concat(), program), b"", self.deadline())
    }

    /// `docker run -d`: the container `name` runs on when this returns.
    ///
    /// # Errors
    /// With docker's text when it fails.
    pub fn detach(&self, name: &str, options: &[&str], program: &[&str]) -> Result<()> {
        let command = self.run_command(&[&["-d", "--name", name], options].concat(), program);
        process::run(command, b"", self.deadline())?.expect_code(0).with_context(|| format!("docker run -d {name}"))?;
        Ok(())
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
        let finished = self.any(arguments)?.expect_code(0);
        Ok(finished.with_context(|| format!("docker {}", arguments.join(" ")))?.text())
    }

    /// What a script in the container `name` says.
    ///
    /// # Errors
    /// When it fails.
    pub fn script(&self, name: &str, script: &str) -> Result<String> {
        self.ok(&["exec", name, "sh", "-c", script])
    }

    /// Removes all containers and networks; answers what it found.
    ///
    /// # Errors
    /// When docker does not answer.
    pub fn sweep(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for name in self.ok(&["ps", "--all", "--format", "{{.Names}}"])?.lines() {
            self.any(&["rm", "--force", name])?;
            found.push(name.to_owned());
        }
        for name in self.ok(&["network", "ls", "--format", "{{.Name}}"])?.lines() {
            if !BUILT_IN.contains(&name) {
                self.any(&["network", "rm", name])?;
                found.push(format!("network {name}"));
            }
        }
        Ok(found)
    }
}

fn address(directory: &Path) -> String {
    format!("unix://{}", directory.join("docker.sock").display())
}

fn log_end(directory: &Path) -> String {
    format!("the end of docker's log:{}", daemon::log_end(directory, 15))
}

impl Drop for Docker {
    fn drop(&mut self) {
        let process = &mut self.process;
        daemon::end(process, &self.directory, Duration::from_secs(60));
    }
}

/// The docker of a context.
///
/// # Errors
/// When the suites run without one.
pub fn of(docker: Option<&Docker>) -> Result<&Docker> {
    match docker {
        Some(docker) => Ok(docker),
        None => bail!("This needs docker: give --docker"),
    }
}
