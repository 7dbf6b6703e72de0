//! A containerd of the suites' own: its own root, state, socket and log.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use crate::daemon;
use crate::event::{Deadline, wait};
use crate::pidfd::Pidfd;

/// What a containerd is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Purpose {
    /// Containers one by one.
    Containers,
    /// Pods as well, by the CRI.
    Pods,
}

/// The plugins of the CRI.
const CRI: &[&str] = &["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"];
/// Plugins that the suites do not use; some of them need what a small machine does not have.
const WITHOUT: &[&str] = &[
    "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

/// The runtime handler of this stack's pods that are made by the Sandbox API, where containerd knows it.
pub const BY_SANDBOX_API: &str = "kata-sandbox-api";
/// An empty file system in a file, of which the snapshotter `blockfile` makes the first layer of an image.
const SCRATCH: &str = "scratch.ext4";
/// Its size in MiB: enough for the small image.
const SCRATCH_SIZE: u64 = 32;
/// The image that holds a pod of a runtime without virtual machines.
pub const PAUSE: &str = "docker.io/library/pause:latest";
/// Where Debian has the plugins that make networks of pods (package containernetworking-plugins).
const CNI_PLUGINS: &str = "/usr/lib/cni";
/// What is done to have one: nothing of it outlives its pod.
const CNI_NETWORK: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "suites",
  "plugins": [{
    "type": "ptp",
    "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.79.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] }
  }]
}"#;

/// A containerd that runs. Dropped, it is ended and its directories are removed.
#[derive(Debug)]
pub struct Containerd {
    process: Mutex<(Child, Pidfd)>,
    directory: PathBuf,
    program: PathBuf,
    environment: Vec<(String, PathBuf)>,
}

impl Containerd {
    /// Starts `program` with everything of its own below `directory`, and waits until it serves.
    ///
    /// Shims inherit `environment`.
    ///
    /// # Errors
    /// With the end of its log when it ends or does not serve before the deadline.
    pub fn start(
        program: &Path,
        directory: &Path,
        purpose: Purpose,
        environment: &[(&str, &Path)],
        deadline: Deadline,
    ) -> Result<Self> {
        let networks = directory.join("cni");
        fs::create_dir_all(&networks).with_context(|| format!("Cannot create {}", networks.display()))?;
        for (file, content) in [
            (config(directory), configuration(directory, purpose)),
            (networks.join("suites.conflist"), CNI_NETWORK.to_owned()),
        ] {
            fs::write(&file, content).with_context(|| format!("Cannot write {}", file.display()))?;
        }
        make_scratch(&directory.join(SCRATCH))?;
        if purpose == Purpose::Pods {
            // containerd's own, made with its first pod of the Sandbox API and never removed.
            let sandboxes = directory.join("state/io.containerd.sandbox.controller.v1.shim/k8s.io");
            fs::create_dir_all(&sandboxes).with_context(|| format!("Cannot create {}", sandboxes.display()))?;
        }
        let environment: Vec<_> =
            environment.iter().map(|(name, value)| ((*name).to_owned(), value.to_path_buf())).collect();
        let process = Mutex::new(spawn(program, directory, &environment, deadline)?);
        let (directory, program) = (directory.to_owned(), program.to_owned());
        Ok(Self { process, directory, program, environment })
    }

    /// Ends it by `signal`, does what is to be done `meanwhile`, and starts it again; the pods and containers go on.
    ///
    /// # Errors
    /// As [`Self::start`], and those of `meanwhile`.
    pub fn restart(&self, signal: Signal, meanwhile: impl FnOnce() -> Result<()>, deadline: Deadline) -> Result<()> {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let (child, pidfd) = &mut *process;
        pidfd.signal(signal).context("containerd cannot be ended")?;
        let ended = wait(&[(pidfd.as_fd(), PollFlags::POLLIN)], deadline)?;
        ensure!(ended.is_some(), "containerd does not end");
        child.wait().context("containerd's end")?;
        let done = meanwhile();
        *process = spawn(&self.program, &self.directory, &self.environment, deadline)?;
        done
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

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        config(&self.directory)
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }
}

/// Makes the scratch file of the snapshotter `blockfile`.
fn make_scratch(file: &Path) -> Result<()> {
    fs::File::create(file)?.set_len(SCRATCH_SIZE << 20)?;
    let made = Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(file).output();
    let made = made.context("Cannot run mkfs.ext4")?;
    ensure!(made.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&made.stderr).trim());
    Ok(())
}

fn config(directory: &Path) -> PathBuf {
    directory.join("config.toml")
}

/// Starts containerd and waits until it says that it serves (sd_notify(3)).
fn spawn(
    program: &Path,
    directory: &Path,
    environment: &[(String, PathBuf)],
    deadline: Deadline,
) -> Result<(Child, Pidfd)> {
    let log = fs::OpenOptions::new().create(true).append(true).open(directory.join("log"));
    let log = log.context("Cannot open containerd's log")?;
    let notice = directory.join("notify.sock");
    // That of the one before.
    fs::remove_file(&notice).ok();
    let ready = UnixDatagram::bind(&notice).with_context(|| format!("Cannot bind {}", notice.display()))?;
    let mut child = Command::new(program)
        .arg("--config")
        .arg(config(directory))
        .env("NOTIFY_SOCKET", &notice)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("Cannot run {}", program.display()))?;
    let serves = Pidfd::open(i32::try_from(child.id())?).context("pidfd_open").and_then(|pidfd| {
        until_ready(&ready, &pidfd, deadline).with_context(|| log_end(directory))?;
        Ok(pidfd)
    });
    match serves {
        Ok(pidfd) => Ok((child, pidfd)),
        Err(error) => {
            child.kill().ok();
            child.wait().ok();
            Err(error)
        }
    }
}

/// Waits until the daemon `pidfd` says to `ready` that it serves.
///
/// # Errors
/// When it does not in time, or ends.
pub(crate) fn until_ready(ready: &UnixDatagram, pidfd: &Pidfd, deadline: Deadline) -> Result<()> {
    loop {
        let fds = [(ready.as_fd(), PollFlags::POLLIN), (pidfd.as_fd(), PollFlags::POLLIN)];
        let Some(events) = wait(&fds, deadline)? else { bail!("it does not serve") };
        ensure!(!events[1], "it ended");
        let mut message = [0; 256];
        let count = ready.recv(&mut message)?;
        if String::from_utf8_lossy(&message[..count]).lines().any(|line| line == "READY=1") {
            return Ok(());
        }
    }
}

fn log_end(directory: &Path) -> String {
    format!("the end of its log:{}", daemon::log_end(directory, 10))
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let process = self.process.get_mut().unwrap_or_else(PoisonError::into_inner);
        daemon::end(process, &self.directory, Duration::from_secs(30));
    }
}

fn configuration(directory: &Path, purpose: Purpose) -> String {
    let path = |name: &str| toml::Value::String(directory.join(name).display().to_string());
    let (without, pods) = match purpose {
        Purpose::Containers => ([CRI, WITHOUT].concat(), String::new()),
        Purpose::Pods => (WITHOUT.to_vec(), pods(&path("cni"))),
    };
    let without =
        toml::Value::Array(without.into_iter().map(|plugin| toml::Value::String(plugin.to_owned())).collect());
    let (root, state, address) = (path("root"), path("state"), path("containerd.sock"));
    let (temp, blocks, scratch) = (path("temp"), path("blocks"), path(SCRATCH));
    // Version 2 is read by 1.x and 2.x alike.
    format!(
        "version = 2\nroot = {root}\nstate = {state}\ntemp = {temp}\ndisabled_plugins = {without}\n\
         [grpc]\naddress = {address}\n[debug]\nlevel = \"info\"\n[metrics]\naddress = \"\"\n\
         [plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nroot_path = {blocks}\nscratch_file = {scratch}\n\
         fs_type = \"ext4\"\nmount_options = []\n{pods}"
    )
}

/// How pods are made, with the networks of the directory `networks`.
fn pods(networks: &toml::Value) -> String {
    const CRI: &str = "plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        "[{CRI}]\nsandbox_image = \"{PAUSE}\"\n\
         [{CRI}.cni]\nbin_dir = \"{CNI_PLUGINS}\"\nconf_dir = {networks}\n\
         [{CRI}.containerd.runtimes.kata]\nruntime_type = \"io.containerd.kata.v2\"\n\
         pod_annotations = [\"io.katacontainers.*\"]\nprivileged_without_host_devices = true\n\
         [{CRI}.containerd.runtimes.{BY_SANDBOX_API}]\nruntime_type = \"io.containerd.kata.v2\"\nsandboxer = \"shim\"\n\
         [{CRI}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n"
    )
}
