//! What every case gets: the containerd, the runtime under test and the images.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use crate::cases::devices::HostDevices;
use crate::containerd::Containerd;
use crate::cri::Cri;
use crate::ctr::Ctr;
use crate::docker::Docker;
use crate::event::Deadline;
use crate::kata_config::KataConfig;
use crate::leftovers::Scope;
use crate::second_chance::SecondChances;
use crate::stack::Stack;

/// The runtime type of this stack.
pub const KATA: &str = "io.containerd.kata.v2";
/// The runtime that ours is compared with.
pub const RUNC: &str = "io.containerd.runc.v2";
/// The small image.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";
/// The image with real services.
pub const DEBIAN: &str = "docker.io/library/debian:trixie-slim";

/// The archives that the images were imported from.
#[derive(Clone, Debug)]
pub struct Images {
    /// [`BUSYBOX`].
    pub busybox: PathBuf,
    /// [`DEBIAN`].
    pub debian: PathBuf,
    /// [`PAUSE`](crate::containerd::PAUSE).
    pub pause: PathBuf,
}

/// What every case gets.
#[derive(Debug)]
pub struct Context {
    /// docker on the suites' containerd, where it is there; it is dropped before that.
    pub docker: Option<Docker>,
    /// containerd and the runtime's configuration.
    pub stack: Stack,
    /// The client, set to the runtime under test.
    pub ctr: Ctr,
    /// The client as a kubelet is one, set to the runtime under test.
    pub cri: Cri,
    /// What the leftover check looks at.
    pub scope: Scope,
    /// The shim of the runtime under test.
    pub shim: PathBuf,
    /// The archives that the images were imported from.
    pub images: Images,
    /// A directory for a case's own files; it is empty between cases.
    pub work: PathBuf,
    /// The program that observes file systems.
    pub storage_check: PathBuf,
    /// Devices that containers may have, where the machine has some.
    pub devices: Option<HostDevices>,
    /// Whether containerd serves the CRI, by which pods are made.
    pub pods: bool,
    /// Whether only cases run that show how this version of containerd is served.
    pub containerd_alone: bool,
    /// How long the long run lasts, if there is to be one.
    pub soak: Option<Duration>,
    /// How many times slower than metal the machine is: deadlines are multiplied by it.
    pub slowness: u32,
    /// How many cases may still run again.
    pub second_chances: SecondChances,
    next: AtomicU32,
}

impl Context {
    /// Puts the parts together; `search_path` is where containerd finds shims.
    ///
    /// # Errors
    /// When the work directory cannot be made.
    pub fn new(
        stack: Stack,
        search_path: &OsStr,
        scope: Scope,
        images: Images,
        work: &Path,
        slowness: u32,
    ) -> Result<Self> {
        std::fs::create_dir_all(work).with_context(|| format!("Cannot create {}", work.display()))?;
        let (ctr, shim) = (stack.ctr.clone(), shim_program(&stack.ctr.runtime, search_path));
        let handler = if ctr.runtime == KATA { "kata" } else { "runc" };
        let cri = Cri::connect(&ctr.address, handler, ctr.patience)?;
        Ok(Self {
            docker: None,
            stack,
            ctr,
            cri,
            scope,
            shim,
            images,
            work: work.to_owned(),
            storage_check: PathBuf::new(),
            devices: None,
            pods: false,
            containerd_alone: false,
            soak: None,
            slowness,
            second_chances: SecondChances::new(false),
            next: AtomicU32::new(0),
        })
    }

    /// The runtime's configuration file.
    #[must_use]
    pub fn config(&self) -> &KataConfig {
        &self.stack.config
    }

    /// Containerd's log, when the suites started it.
    #[must_use]
    pub fn log(&self) -> Option<PathBuf> {
        self.stack.own.as_ref().map(Containerd::log)
    }

    /// Ends the suites' containerd by `signal`, does what is to be done `meanwhile`, and starts it again.
    ///
    /// # Errors
    /// When the suites did not start one, or it does not come up again.
    pub fn restart_containerd(&self, signal: Signal, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        let own = self.stack.own.as_ref();
        let own = own.context("This needs a containerd of the suites' own: give --containerd")?;
        own.restart(signal, meanwhile, Deadline::after(self.within(30)))
    }

    /// Whether the runtime under test runs containers in virtual machines.
    #[must_use]
    pub fn is_kata(&self) -> bool {
        self.ctr.runtime == KATA
    }

    /// The client for runc, to compare with.
    #[must_use]
    pub fn runc(&self) -> Ctr {
        self.ctr.with_runtime(RUNC)
    }

    /// The client in a second namespace; the busybox image is there, too.
    #[must_use]
    pub fn other_namespace(&self) -> Ctr {
        Ctr { namespace: format!("{}-other", self.ctr.namespace), ..self.ctr.clone() }
    }

    /// The client in the namespace of pods.
    #[must_use]
    pub fn of_pods(&self) -> Ctr {
        Ctr { namespace: "k8s.io".to_owned(), ..self.ctr.clone() }
    }

    /// A container id that no other case uses; it says what for.
    #[must_use]
    pub fn id(&self, purpose: &str) -> String {
        format!("{purpose}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A hang guard: what takes `seconds` at the most on metal.
    #[must_use]
    pub fn within(&self, seconds: u32) -> Duration {
        Duration::from_secs(u64::from(seconds) * u64::from(self.slowness))
    }
}

/// containerd's rule for a runtime's program: `io.containerd.NAME.VERSION` is `containerd-shim-NAME-VERSION`, found by PATH.
fn shim_program(runtime: &str, search_path: &OsStr) -> PathBuf {
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let program = format!("containerd-shim-{name}-{version}");
    let found =
        std::env::split_paths(search_path).map(|directory| directory.join(&program)).find(|path| path.is_file());
    found.unwrap_or_else(|| program.into())
}
