//! The agent protocol, and containerd's protocols as this stack uses them.
//!
//! Every connection between host and guest is opened by the guest: one to
//! [`AGENT_PORT`] for ttrpc (the host is the ttrpc client), and one to
//! [`STREAM_PORT`] for each stdio stream that a Create or Exec request named. A
//! stream connection begins with its stream id, eight bytes little-endian; then it
//! carries bytes, and half-closing it is the end of file.
//!
//! What is asked at [`RESOLVER`] in the guest goes to [`RESOLVER_PORT`], a connection
//! for each question by UDP and for each connection by TCP. It begins with
//! [`resolver::UDP`] or [`resolver::TCP`]; then it carries messages as DNS by TCP does
//! (RFC 1035, §4.2.2): the length in two bytes, big-endian, and the message. By UDP
//! there is one question and one answer.

/// Code generated from `proto/*.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used, clippy::expect_used, unreachable_pub)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

use std::net::Ipv4Addr;

pub use containerd_shim_protos as containerd;
pub use generated::agent;
pub use generated::agent_ttrpc;
pub use generated::cri;

pub mod dns;

/// vsock address of the host, as every guest sees it (linux/vm_sockets.h, `VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;
/// vsock address of the guest; userspace vsock needs no node-wide number.
pub const GUEST_CID: u32 = 3;
/// Host port that the agent dials once it can serve ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// Host port that the agent dials for each stdio stream.
pub const STREAM_PORT: u32 = 1025;
/// Host port that the agent dials for what is asked at [`RESOLVER`].
pub const RESOLVER_PORT: u32 = 1026;
/// Where docker resolves names in a container's network namespace, by UDP and TCP at port 53.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// How a connection to [`RESOLVER_PORT`] begins.
pub mod resolver {
    /// One question, which came by UDP.
    pub const UDP: u8 = 0;
    /// All of a TCP connection.
    pub const TCP: u8 = 1;
    /// The port that DNS has (RFC 1035, §4.2).
    pub const PORT: u16 = 53;
}

/// virtio-fs tag of the directory that a sandbox's containers share with the host.
pub const SHARED_TAG: &str = "kataShared";
/// Where the guest mounts [`SHARED_TAG`].
pub const SHARED_DIR: &str = "/run/kata-containers/shared/containers";
/// Parent of the guest's bundles: `<BUNDLES_DIR>/<container id>/{config.json,rootfs}`.
pub const BUNDLES_DIR: &str = "/run/kata-containers/bundles";
/// What a mount's source begins with that is the disk at an address of the guest's PCI bus: udev's name for it, which no
/// guest has.
pub const DISK_BY_PATH: &str = "/dev/disk/by-path/pci-";
/// Prefix of a stdio field that names a stream: `stream:17`.
pub const STREAM_SCHEME: &str = "stream:";
/// Bytes of a container's runtime spec (`config.json`, and what becomes of it for the guest): a ttrpc message holds 4 MiB,
/// and the rest of a request needs room too.
pub const MAX_SPEC: usize = 3 << 20;
/// Bytes of a volume that a container gets as a copy, so that programs are told of its changes: it takes the guest's memory.
/// A config map or secret has 1 MiB at most.
pub const MAX_COPY_BYTES: u64 = 8 << 20;
/// Files, directories and links of such a volume.
pub const MAX_COPY_ENTRIES: usize = 4096;
/// Id of the guest itself where the Task API takes a container's: what is executed in it is a process of the guest. No
/// container has it, because containerd's ids begin with a letter or digit.
pub const GUEST: &str = ".guest";
/// `Any.type_url` of [`agent::GuestCommand`].
pub const GUEST_COMMAND_TYPE_URL: &str = "tatami.agent.v1.GuestCommand";
/// `Any.type_url` of [`agent::ContainerOptions`].
pub const CONTAINER_OPTIONS_TYPE_URL: &str = "tatami.agent.v1.ContainerOptions";
