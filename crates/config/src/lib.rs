//! The configuration file: Kata's keys, typed, with defaults.
//!
//! The file is looked for where Kata looks: `KATA_CONF_FILE`, `/etc/kata-containers/configuration.toml`,
//! `/usr/share/defaults/kata-containers/configuration.toml`. A key that does nothing here is refused, and the error
//! names the nearest key that does; a value out of range is refused with the limit and the remedy.

mod annotations;
mod keys;
mod parse;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use annotations::{AnnotationError, PREFIX as ANNOTATION_PREFIX};
pub use keys::{KEYS, Key};

/// Environment variable that names the configuration file, before all other places.
pub const FILE_VARIABLE: &str = "KATA_CONF_FILE";
/// The administrator's file.
pub const SYSTEM_FILE: &str = "/etc/kata-containers/configuration.toml";
/// The file that is installed with the runtime.
pub const DEFAULT_FILE: &str = "/usr/share/defaults/kata-containers/configuration.toml";
/// A larger file is refused (bytes): a configuration has a few KiB.
const MAX_FILE: u64 = 1 << 20;

/// The smallest memory that the guest kernel and the agent run in (MiB).
pub const MIN_MEMORY_MIB: u64 = 64;
/// The largest memory of one sandbox (MiB): 1 TiB. Also never more than the host has.
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// vCPUs of one sandbox at most.
pub const MAX_VCPUS: u64 = 64;

/// Everything that the configuration file decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `[hypervisor.dragonball]`
    pub hypervisor: Hypervisor,
    /// `[agent.kata]`
    pub agent: Agent,
    /// `[runtime]`
    pub runtime: Runtime,
}

/// The virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hypervisor {
    /// Uncompressed `vmlinux` with a PVH entry, or a `bzImage`.
    pub kernel: PathBuf,
    /// Read-only guest image, an EROFS with the agent.
    pub image: PathBuf,
    /// Appended to the guest kernel's command line.
    pub kernel_params: String,
    /// vCPUs at the start, 1 to [`MAX_VCPUS`].
    pub default_vcpus: u8,
    /// vCPUs that the limits of containers may ask for, up to [`MAX_VCPUS`]; 0 stands for those of the host.
    pub default_maxvcpus: u8,
    /// Guest memory at the start in bytes.
    pub default_memory: u64,
    /// Guest memory in bytes that the limits of containers may ask for; 0 stands for the RAM of the host.
    pub default_maxmemory: u64,
    /// Guest memory is in the host's huge pages from the start.
    pub enable_hugepages: bool,
    /// Which keys of this table a pod's annotations may change: regular expressions for whole names.
    pub enable_annotations: Vec<String>,
    /// Writes the guest's console to the log and has a debug UART.
    pub enable_debug: bool,
}

/// The agent in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// The agent logs at debug.
    pub enable_debug: bool,
    /// The administrator of the node can execute commands in the guest itself.
    pub debug_console: bool,
    /// From the start of the VM to the agent's dial.
    pub reconnect_timeout: Duration,
    /// One call that makes a container in the guest.
    pub create_container_timeout: Duration,
}

/// The runtime itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// The runtime logs at debug.
    pub enable_debug: bool,
    /// A machine is sized once, from what its sandbox is known to need, and does not grow.
    pub static_sandbox_resource_mgmt: bool,
    /// Boot timelines are written to this directory when it is set.
    pub timeline_dir: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hypervisor: Hypervisor {
                kernel: PathBuf::from("/usr/share/kata-containers/vmlinux"),
                image: PathBuf::from("/usr/share/kata-containers/kata-containers.img"),
                kernel_params: String::new(),
                default_vcpus: 1,
                default_maxvcpus: 0,
                default_memory: 256 << 20,
                default_maxmemory: 0,
                enable_hugepages: false,
                enable_annotations: ["kernel_params", "default_vcpus", "default_memory"].map(str::to_owned).to_vec(),
                enable_debug: false,
            },
            agent: Agent {
                enable_debug: false,
                debug_console: false,
                reconnect_timeout: Duration::from_secs(30),
                create_container_timeout: Duration::from_secs(60),
            },
            runtime: Runtime { enable_debug: false, static_sandbox_resource_mgmt: false, timeline_dir: None },
        }
    }
}

/// Why a configuration is not usable. Every text says where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// None of the places has a file.
    #[error("no configuration file: looked at {0}; install the default one at {DEFAULT_FILE} or set {FILE_VARIABLE}")]
    Missing(String),
    /// The file is there but cannot be read.
    #[error("configuration {path}: {source}; make the file readable for root, or remove it to use the default one")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is much larger than a configuration.
    #[error("configuration {path} is larger than the limit of {MAX_FILE} bytes; is this the right file?")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is no TOML.
    #[error("configuration {path}, line {line}: {message}; correct the TOML syntax there")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// First line of the problem, from 1.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// A table or key that does nothing here.
    #[error("configuration {path}, line {line}: unknown key `{key}`; {advice}")]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Full name with its table.
        key: String,
        /// The nearest known one.
        advice: String,
    },
    /// A pod's annotation.
    #[error(transparent)]
    Annotation(Box<AnnotationError>),
    /// A value of the wrong type or out of range.
    #[error("configuration {path}, line {line}: {key} = {value}: {problem}; {remedy}")]
    BadValue {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Full name with its table.
        key: &'static str,
        /// As it stands in the file.
        value: Box<str>,
        /// The limit.
        problem: Box<str>,
        /// What to write instead.
        remedy: Box<str>,
    },
}

impl Config {
    /// Loads the file that `KATA_CONF_FILE` names, or the administrator's, or the installed default.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]; a file that is named but missing is an error, not a reason to look further.
    pub fn load(named: Option<&Path>) -> Result<(Self, PathBuf), ConfigError> {
        let named = named.map(Path::to_owned).or_else(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from));
        let places = match named {
            Some(path) if !path.as_os_str().is_empty() => vec![path],
            _ => vec![PathBuf::from(SYSTEM_FILE), PathBuf::from(DEFAULT_FILE)],
        };
        for path in &places {
            match std::fs::File::open(path) {
                Ok(file) => return Ok((Self::read(file, path)?, path.clone())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(ConfigError::Unreadable { path: path.clone(), source }),
            }
        }
        let looked: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
        Err(ConfigError::Missing(looked.join(" and ")))
    }

    /// Parses the text of a file; `path` is for error texts alone.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] naming the line.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        parse::parse(text, path)
    }

    fn read(file: std::fs::File, path: &Path) -> Result<Self, ConfigError> {
        let mut text = String::new();
        file.take(MAX_FILE + 1)
            .read_to_string(&mut text)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        if text.len() as u64 > MAX_FILE {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        Self::parse(&text, path)
    }
}
