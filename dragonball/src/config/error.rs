//! Why a configuration was refused.

use std::path::PathBuf;

use super::{CLIQUE_MAX, DEVICES_MAX, MEMORY_GRANULE, MTU_MIN, NET_QUEUES_MAX};

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Too little or too much guest memory.
    #[error("Guest memory of {given} bytes is out of range: give {min} to {max} bytes ({limit})")]
    MemoryRange {
        /// What was asked for, in bytes.
        given: u64,
        /// The least, in bytes.
        min: u64,
        /// The most on this host, in bytes.
        max: u64,
        /// What sets the upper limit.
        limit: &'static str,
    },
    /// Guest memory that is no multiple of the granule.
    #[error("Guest memory of {0} bytes is not a multiple of 2 MiB: round it up to {next} bytes", next = .0.next_multiple_of(MEMORY_GRANULE))]
    MemoryGranule(u64),
    /// A maximum of guest memory below what the machine starts with.
    #[error(
        "The most guest memory, {max} bytes, is less than the {memory} bytes that the guest starts with: give at least those"
    )]
    MemoryMax {
        /// The maximum that was asked for, in bytes.
        max: u64,
        /// The memory that was asked for, in bytes.
        memory: u64,
    },
    /// No vCPU, or too many.
    #[error("{given} vCPUs are out of range: give 1 to {max}")]
    Vcpus {
        /// What was asked for.
        given: u8,
        /// The most on this host.
        max: u8,
    },
    /// A maximum below the number of vCPUs, or above it in a machine that cannot get more.
    #[error(
        "At most {max} vCPUs do not go with {vcpus} at the start: give at least as many, and more only with hot-plug"
    )]
    VcpusMax {
        /// How many at the start.
        vcpus: u8,
        /// The maximum as given.
        max: u8,
    },
    /// A file or directory cannot be used.
    #[error("The {role} {} cannot be used: check that it exists and is {kind} that this user may access", path.display())]
    Unusable {
        /// What it is for.
        role: &'static str,
        /// The path as given.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// An empty file where content is needed.
    #[error("The {role} {} is empty: build or copy it again", path.display())]
    Empty {
        /// What it is for.
        role: &'static str,
        /// The path as given.
        path: PathBuf,
    },
    /// A kernel command line that the guest could not take.
    #[error("The kernel command line has {given} bytes, the guest takes at most {max}: shorten it")]
    CmdlineLength {
        /// Its length with the machine's own part.
        given: usize,
        /// The longest that the guest takes.
        max: usize,
    },
    /// A kernel command line with a control or non-ASCII character.
    #[error("The kernel command line has the character {0:?}: use printable ASCII only")]
    CmdlineCharacter(char),
    /// A shared directory's tag that is empty, too long, or used twice.
    #[error("The tag {0:?} cannot be used: give each shared directory its own tag of 1 to 36 bytes")]
    Tag(String),
    /// What is no address of a card.
    #[error("{0:?} is no address of a network card: give a unicast one, for instance 02:00:00:00:00:01")]
    Mac(String),
    /// What is no name of an interface.
    #[error("{0:?} is no name of an interface: give 1 to 15 printable ASCII characters other than / : and %")]
    InterfaceName(String),
    /// Two cards on one tap interface.
    #[error("The tap {0} cannot serve two network cards: give each its own")]
    TapTwice(String),
    /// No queue pair, or too many.
    #[error("{given} queue pairs of a network card are out of range: give 1 to {NET_QUEUES_MAX}")]
    NetQueues {
        /// What was asked for.
        given: usize,
    },
    /// An MTU that no network works with.
    #[error("An MTU of {0} bytes is too small: give at least {MTU_MIN}")]
    Mtu(u16),
    /// A context id that is reserved.
    #[error("The vsock context id {0} is reserved: give 3 to 4294967294")]
    GuestCid(u32),
    /// A socket path that does not fit `sun_path`.
    #[error("The vsock socket path {} is too long: keep it within {max} bytes", path.display())]
    SocketPath {
        /// The path as given.
        path: PathBuf,
        /// The longest that leaves room for the port suffix.
        max: usize,
    },
    /// More devices than the PCI bus has slots.
    #[error("{given} devices were asked for, the machine has room for {DEVICES_MAX}: remove some")]
    TooManyDevices {
        /// How many were asked for.
        given: usize,
    },
    /// A clique that the capability has no number for.
    #[error("The clique {0} is out of range: give 0 to {CLIQUE_MAX}")]
    Clique(u8),
    /// Two consoles on standard input and output.
    #[error("The console and the debug UART cannot both use standard input and output: send one of them to a file")]
    StdioTwice,
}
