//! Brings up what the suites and the demonstration run against: a containerd that knows the stack's shim.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::containerd::{Containerd, Purpose};
use crate::ctr::Ctr;
use crate::event::Deadline;
use crate::kata_config::{KataConfig, OVERRIDE};

/// How to reach containerd and the stack; the options that the commands share.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The containerd to start, with its own root, state and socket; `ctr` is taken from beside it.
    #[arg(long, value_name = "PATH", conflicts_with = "address")]
    pub containerd: Option<PathBuf>,
    /// Socket of a containerd that runs; the runtime's configuration is then /etc/kata-containers/configuration.toml.
    #[arg(long, value_name = "SOCKET")]
    pub address: Option<PathBuf>,
    /// The ctr program.
    #[arg(long, value_name = "PATH")]
    pub ctr: Option<PathBuf>,
    /// Directory that holds the installed stack instead of /: nothing needs to be installed then.
    #[arg(long, value_name = "DIRECTORY", requires = "containerd")]
    pub dist: Option<PathBuf>,
    /// Directory with busybox.tar, debian.tar and, for pods, pause.tar, made by `rootfs-builder oci`.
    #[arg(long, value_name = "DIRECTORY", default_value = "target/images")]
    pub images: PathBuf,
    /// How many times slower than metal this machine is: all deadlines are multiplied by it.
    #[arg(long, value_name = "FACTOR", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub slowness: u32,
}

/// A containerd to drive. Dropped, one that was started is ended.
#[derive(Debug)]
pub struct Stack {
    /// The containerd that was started, if one was.
    pub own: Option<Containerd>,
    /// The client.
    pub ctr: Ctr,
    /// The runtime's configuration.
    pub config: KataConfig,
}

impl Stack {
    /// Starts a containerd for `purpose` below `work`, or takes the one that runs.
    ///
    /// # Errors
    /// When neither is asked for, it does not come up, or the stack is not installed.
    pub fn new(options: &Options, purpose: Purpose, runtime: &str, namespace: &str, work: &Path) -> Result<Self> {
        let path = match options.containerd {
            Some(_) => work.join("configuration.toml"),
            None => PathBuf::from(OVERRIDE),
        };
        let config = KataConfig::at(&path, options.dist.as_deref(), options.slowness)?;
        let own = match &options.containerd {
            Some(program) => Some(start(program, purpose, &config, options, work)?),
            None => None,
        };
        let address = match (&own, &options.address) {
            (Some(own), _) => own.address(),
            (None, Some(address)) => address.clone(),
            (None, None) => bail!("Which containerd? Give --containerd PATH to start one, or --address SOCKET"),
        };
        let beside = options.containerd.as_ref().and_then(|program| program.parent()).map(|parent| parent.join("ctr"));
        let program =
            options.ctr.clone().or_else(|| beside.filter(|ctr| ctr.is_file())).unwrap_or_else(|| "ctr".into());
        let patience = Duration::from_secs(20) * options.slowness;
        let (namespace, runtime) = (namespace.to_owned(), runtime.to_owned());
        Ok(Self { own, ctr: Ctr { program, address, namespace, runtime, patience }, config })
    }

    /// containerd's root and state directories.
    #[must_use]
    pub fn directories(&self) -> (PathBuf, PathBuf) {
        match &self.own {
            Some(own) => (own.root(), own.state()),
            None => (PathBuf::from("/var/lib/containerd"), PathBuf::from("/run/containerd")),
        }
    }
}

/// Search path in which the stack's programs come first.
#[must_use]
pub fn search_path(options: &Options) -> std::ffi::OsString {
    let dist = options.dist.as_ref().map(|dist| dist.join("usr/bin"));
    let beside = options.containerd.as_ref().and_then(|program| program.parent()).map(Path::to_owned);
    let before = std::env::var_os("PATH").unwrap_or_default();
    let all = dist.into_iter().chain(beside).chain(std::env::split_paths(&before));
    std::env::join_paths(all).unwrap_or(before)
}

fn start(program: &Path, purpose: Purpose, config: &KataConfig, options: &Options, work: &Path) -> Result<Containerd> {
    // The file exists from the beginning: the runtime must never look at another one.
    config.write()?;
    let path = search_path(options);
    let environment = [("KATA_CONF_FILE", config.path()), ("PATH", Path::new(&path))];
    let deadline = Deadline::after(Duration::from_secs(30) * options.slowness);
    Containerd::start(program, &work.join("containerd"), purpose, &environment, deadline)
        .with_context(|| format!("{} does not come up", program.display()))
}
