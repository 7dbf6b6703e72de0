//! What a container leaves on the machine: one check that every case ends with.
//!
//! A [`Snapshot`] lists what a container runtime makes on a host: processes, mounts, sockets,
//! cgroups, files under its state directories, network devices. [`Scope`] says which of
//! them are its own, so that other programs of the machine do not disturb the check. [`settle`]
//! waits, by events, until nothing is there that was not there before.

mod list;
mod settle;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

pub use settle::settle;

/// Which things of the machine belong to the containers under test.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// A word that only they carry, in cgroup paths and command lines: the containerd namespace.
    pub marker: String,
    /// Programs that a runtime starts: the beginnings of their names.
    pub programs: Vec<String>,
    /// Directories whose content is compared, and how many levels below each.
    pub directories: Vec<(PathBuf, usize)>,
    /// What only the command line of the containerd that serves them has: that one may be started again meanwhile.
    pub daemon: Option<String>,
}

impl Scope {
    /// What containerd, runc and this stack make, for containers of the namespace `marker`.
    ///
    /// `root` and `state` are containerd's own directories.
    #[must_use]
    pub fn containerd(marker: &str, root: &std::path::Path, state: &std::path::Path) -> Self {
        let programs = ["containerd-shim", "kata", "dragonball", "runc", "ctr", "virtiofsd"];
        let directories = [
            (PathBuf::from("/run/kata"), 5),
            (PathBuf::from("/run/kata-containers"), 5),
            (PathBuf::from("/run/vc"), 4),
            (PathBuf::from("/run/netns"), 1),
            (PathBuf::from("/run/containerd/s"), 1),
            (PathBuf::from("/run/containerd/fifo"), 3),
            (PathBuf::from("/run/containerd/runc"), 3),
            (state.to_owned(), 4),
            (root.join("io.containerd.runtime.v2.task"), 4),
            (root.join("io.containerd.grpc.v1.cri"), 3),
            (root.join("io.containerd.snapshotter.v1.overlayfs/snapshots"), 1),
        ];
        Self {
            marker: marker.to_owned(),
            programs: programs.map(str::to_owned).into(),
            directories: directories.into(),
            daemon: None,
        }
    }
}

/// One thing on the machine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thing {
    /// A process, by its number and start time (the two together are never reused).
    Process {
        /// Process number.
        pid: i32,
        /// Start time in clock ticks since boot (proc_pid_stat(5), field 22).
        start: u64,
        /// Command line, or the name in brackets when that is empty.
        command: String,
    },
    /// A mount in the mount namespace of this process.
    Mount {
        /// The kernel's number of the mount.
        id: u64,
        /// Where it is.
        point: PathBuf,
        /// File system type.
        kind: String,
    },
    /// A unix socket with a name; abstract names begin with `@`.
    Socket {
        /// Its name.
        name: String,
    },
    /// A control group.
    Cgroup {
        /// Its directory.
        path: PathBuf,
    },
    /// A file, directory, pipe or socket in one of the scope's directories.
    File {
        /// Where it is.
        path: PathBuf,
    },
    /// A network device of the host.
    NetworkDevice {
        /// The kernel's number of the device.
        index: u32,
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command, .. } => write!(f, "process {pid}: {command}"),
            Self::Mount { point, kind, .. } => write!(f, "mount {} ({kind})", point.display()),
            Self::Socket { name } => write!(f, "socket {name}"),
            Self::Cgroup { path } => write!(f, "cgroup {}", path.display()),
            Self::File { path } => write!(f, "file {}", path.display()),
            Self::NetworkDevice { name, .. } => write!(f, "network device {name}"),
        }
    }
}

/// All things of a scope at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<Thing>);

impl Snapshot {
    /// Looks at the machine.
    ///
    /// # Errors
    /// When `/proc` or `/sys` cannot be read.
    pub fn take(scope: &Scope) -> anyhow::Result<Self> {
        list::all(scope).map(Self)
    }

    /// What is here and was not there `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<Thing> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// The things as one line each, for an error.
#[must_use]
pub fn describe(things: &[Thing]) -> String {
    things.iter().map(|thing| format!("\n  left behind: {thing}")).collect()
}
