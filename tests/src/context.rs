//! What every case gets: the containerd, the runtime under test and the images.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::ctr::Ctr;
use crate::kata_config::KataConfig;
use crate::leftovers::Scope;

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
}

/// What every case gets.
#[derive(Debug)]
pub struct Context {
    /// The client, set to the runtime under test.
    pub ctr: Ctr,
    /// What the leftover check looks at.
    pub scope: Scope,
    /// The shim of the runtime under test.
    pub shim: PathBuf,
    /// The runtime's configuration file.
    pub config: KataConfig,
    /// The archives that the images were imported from.
    pub images: Images,
    /// A directory for a case's own files; it is empty between cases.
    pub work: PathBuf,
    /// How many times slower than metal the machine is: deadlines are multiplied by it.
    pub slowness: u32,
    /// Containerd's log, when the suites started it.
    pub log: Option<PathBuf>,
    next: AtomicU32,
}

impl Context {
    /// Puts the parts together.
    ///
    /// # Errors
    /// When the work directory cannot be made.
    pub fn new(
        ctr: Ctr,
        scope: Scope,
        config: KataConfig,
        images: Images,
        work: &Path,
        slowness: u32,
        log: Option<PathBuf>,
    ) -> Result<Self> {
        std::fs::create_dir_all(work).with_context(|| format!("Cannot create {}", work.display()))?;
        let shim = shim_program(&ctr.runtime);
        let next = AtomicU32::new(0);
        Ok(Self { ctr, scope, shim, config, images, work: work.to_owned(), slowness, log, next })
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
fn shim_program(runtime: &str) -> PathBuf {
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let program = format!("containerd-shim-{name}-{version}");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join(&program)).find(|path| path.is_file());
    found.unwrap_or_else(|| program.into())
}
