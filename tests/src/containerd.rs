//! A containerd of the suites' own: its own root, state, socket and log.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use crate::event::{Deadline, wait};
use crate::pidfd::Pidfd;

/// Plugins that the suites do not use; some of them need what a small machine does not have.
const WITHOUT: &[&str] = &[
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.sandbox-controllers",
    "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

/// A containerd that runs. Dropped, it is ended and its directories are removed.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    pidfd: Pidfd,
    directory: PathBuf,
}

impl Containerd {
    /// Starts `program` with everything of its own below `directory`, and waits until it serves.
    ///
    /// Shims inherit `environment`.
    ///
    /// # Errors
    /// With the end of its log when it ends or does not serve before the deadline.
    pub fn start(program: &Path, directory: &Path, environment: &[(&str, &Path)], deadline: Deadline) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("Cannot create {}", directory.display()))?;
        let config = directory.join("config.toml");
        fs::write(&config, configuration(directory)).with_context(|| format!("Cannot write {}", config.display()))?;
        let log = fs::File::create(directory.join("log")).context("Cannot create containerd's log")?;
        let notice = directory.join("notify.sock");
        let ready = UnixDatagram::bind(&notice).with_context(|| format!("Cannot bind {}", notice.display()))?;
        let child = Command::new(program)
            .arg("--config")
            .arg(&config)
            .env("NOTIFY_SOCKET", &notice)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("Cannot run {}", program.display()))?;
        let pidfd = Pidfd::open(i32::try_from(child.id())?).context("pidfd_open")?;
        let containerd = Self { child, pidfd, directory: directory.to_owned() };
        containerd.until_ready(&ready, deadline)?;
        Ok(containerd)
    }

    /// Its socket.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// Its root: images and snapshots.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Its state: bundles and sockets.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// containerd says so itself (sd_notify(3)).
    fn until_ready(&self, ready: &UnixDatagram, deadline: Deadline) -> Result<()> {
        loop {
            let fds = [(ready.as_fd(), PollFlags::POLLIN), (self.pidfd.as_fd(), PollFlags::POLLIN)];
            let Some(events) = wait(&fds, deadline)? else { bail!("containerd does not serve; {}", self.log_end()) };
            if events[1] {
                bail!("containerd ended; {}", self.log_end());
            }
            let mut message = [0; 256];
            let count = ready.recv(&mut message)?;
            if String::from_utf8_lossy(&message[..count]).lines().any(|line| line == "READY=1") {
                return Ok(());
            }
        }
    }

    fn log_end(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(10).collect();
        let lines: String = lines.iter().rev().map(|line| format!("\n  {line}")).collect();
        format!("the end of its log:{lines}")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.pidfd.signal(Signal::SIGTERM).ok();
        let ended = wait(&[(self.pidfd.as_fd(), PollFlags::POLLIN)], Deadline::after(Duration::from_secs(30)));
        if !matches!(ended, Ok(Some(_))) {
            self.child.kill().ok();
        }
        self.child.wait().ok();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        for point in points.filter(|point| point.starts_with(&self.directory)) {
            umount2(point, MntFlags::MNT_DETACH).ok();
        }
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("Cannot remove {}: {error}", self.directory.display());
        }
    }
}

fn configuration(directory: &Path) -> String {
    let path = |name: &str| toml::Value::String(directory.join(name).display().to_string());
    let without: Vec<toml::Value> = WITHOUT.iter().map(|plugin| toml::Value::String((*plugin).to_owned())).collect();
    let without = toml::Value::Array(without);
    let (root, state, address) = (path("root"), path("state"), path("containerd.sock"));
    let temp = path("temp");
    // Version 2 is read by 1.x and 2.x alike.
    format!(
        "version = 2\nroot = {root}\nstate = {state}\ntemp = {temp}\ndisabled_plugins = {without}\n\
         [grpc]\naddress = {address}\n[debug]\nlevel = \"info\"\n[metrics]\naddress = \"\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_toml_and_names_only_the_suites_directories() {
        let configuration: toml::Table = configuration(Path::new("/run/a \"b\"")).parse().unwrap();
        assert_eq!(configuration["root"].as_str(), Some("/run/a \"b\"/root"));
        assert_eq!(configuration["state"].as_str(), Some("/run/a \"b\"/state"));
        assert_eq!(configuration["grpc"]["address"].as_str(), Some("/run/a \"b\"/containerd.sock"));
    }

    #[test]
    fn a_containerd_that_ends_at_once_is_told_with_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("own");
        let deadline = Deadline::after(Duration::from_secs(30));
        let error = Containerd::start(Path::new("/bin/ls"), &own, &[], deadline).unwrap_err().to_string();
        assert!(error.contains("containerd ended") && error.contains("--config"), "{error}");
        assert!(!own.exists());
    }
}
