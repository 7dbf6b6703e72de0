//! The one place where two versions of vm-memory meet.
//!
//! fuse-backend-rs 0.14 is written against vm-memory 0.17 and virtio-queue 0.17, everything else here against 0.18. Its
//! reader and writer are made from a 0.17 descriptor chain, so the island has a mirror of guest memory (the same pages,
//! described by 0.17 types, see `mirror`) and looks each chain up again that the device's own ring has taken and checked.

use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::Opcode;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use virtio_queue_017::{Queue, QueueOwnedT, QueueT};
use vm_memory_017::GuestAddress;

use super::mirror::{self, Mirror};
use super::shared::SharedDirectory;
use crate::virtio::buffers::Request;
use crate::virtio::device::{DeviceError, GuestMemory};
use crate::virtio::ring::RingLayout;

/// Length of `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

/// The requests that are handed to the library. All others are answered with `ENOSYS` here, upon which Linux does
/// without: locks stay in the guest's kernel, which alone has the files open, and nothing else is needed.
const SERVED: [Opcode; 35] = [
    Opcode::Lookup,
    Opcode::Forget,
    Opcode::Getattr,
    Opcode::Setattr,
    Opcode::Readlink,
    Opcode::Symlink,
    Opcode::Mknod,
    Opcode::Mkdir,
    Opcode::Unlink,
    Opcode::Rmdir,
    Opcode::Rename,
    Opcode::Link,
    Opcode::Open,
    Opcode::Read,
    Opcode::Write,
    Opcode::Statfs,
    Opcode::Release,
    Opcode::Fsync,
    Opcode::Setxattr,
    Opcode::Getxattr,
    Opcode::Listxattr,
    Opcode::Removexattr,
    Opcode::Flush,
    Opcode::Init,
    Opcode::Opendir,
    Opcode::Readdir,
    Opcode::Releasedir,
    Opcode::Fsyncdir,
    Opcode::Access,
    Opcode::Create,
    Opcode::BatchForget,
    Opcode::Fallocate,
    Opcode::Readdirplus,
    Opcode::Rename2,
    Opcode::Lseek,
];

/// Requests that have no answer.
const UNANSWERED: [Opcode; 4] = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt, Opcode::Destroy];

/// The library's server on the library's view of guest memory.
pub(super) struct Island {
    server: Server<Arc<SharedDirectory>>,
    mirror: Mirror,
}

impl Island {
    /// An island beside `memory`.
    pub(super) fn new(memory: &GuestMemory, directory: Arc<SharedDirectory>) -> Result<Self, DeviceError> {
        let mirror = mirror::of(memory).ok_or_else(|| DeviceError::Host {
            action: "describe guest memory to the file system",
            source: std::io::Error::from(std::io::ErrorKind::InvalidInput),
        })?;
        Ok(Self { server: Server::new(directory), mirror })
    }

    /// Answers `request`, the one that was taken last from the ring that `layout` describes; returns how many bytes of
    /// answer there are.
    pub(super) fn answer(&self, request: &Request<'_>, layout: RingLayout) -> Result<usize, DeviceError> {
        let Some(number) = request.readable.read_array(4).map(u32::from_le_bytes) else {
            return Err(DeviceError::Protocol(format!(
                "a file system request has {} bytes, its header alone has {IN_HEADER}",
                request.readable.len()
            )));
        };
        let is = |opcode: &Opcode| *opcode as u32 == number;
        if UNANSWERED.iter().any(is) && !SERVED.iter().any(is) {
            return Ok(0);
        }
        if !SERVED.iter().any(is) {
            return Ok(refuse(request, libc::ENOSYS));
        }
        let queue = lookup_queue(layout)?;
        let changed = || DeviceError::Protocol(String::from("a descriptor chain changed after it was made available"));
        let mut queue = queue;
        let chain = queue.iter(&self.mirror).ok().and_then(|mut chains| chains.next()).ok_or_else(changed)?;
        if chain.head_index() != request.head {
            return Err(changed());
        }
        let (Ok(reader), Ok(writer)) =
            (Reader::from_descriptor_chain(&self.mirror, chain.clone()), VirtioFsWriter::new(&self.mirror, chain))
        else {
            return Ok(refuse(request, libc::EIO));
        };
        match self.server.handle_message(reader, Writer::VirtioFs(writer), None, None) {
            Ok(written) => Ok(written.min(request.writable.len())),
            Err(error) => {
                tracing::debug!(%error, opcode = number, "a file system request could not be read or answered");
                if UNANSWERED.iter().any(is) { Ok(0) } else { Ok(refuse(request, libc::EIO)) }
            }
        }
    }
}

/// Answers `request` with an error, if there is room for that; returns the answer's length.
fn refuse(request: &Request<'_>, error: libc::c_int) -> usize {
    let unique: [u8; 8] = request.readable.read_array(8).unwrap_or_default();
    let mut answer = [0; OUT_HEADER];
    answer[..4].copy_from_slice(&16_u32.to_le_bytes());
    answer[4..8].copy_from_slice(&(-error).to_le_bytes());
    answer[8..].copy_from_slice(&unique);
    if request.writable.len() < OUT_HEADER { 0 } else { request.writable.write_at(0, &answer) }
}

/// A 0.17 queue whose next chain is the one that was taken last.
fn lookup_queue(layout: RingLayout) -> Result<Queue, DeviceError> {
    let bad = |_| DeviceError::Protocol(String::from("the ring's layout is not a valid one"));
    let mut queue = Queue::new(layout.size).map_err(bad)?;
    queue.try_set_desc_table_address(GuestAddress(layout.descriptors)).map_err(bad)?;
    queue.try_set_avail_ring_address(GuestAddress(layout.available)).map_err(bad)?;
    queue.try_set_used_ring_address(GuestAddress(layout.used)).map_err(bad)?;
    queue.set_next_avail(layout.next_available.wrapping_sub(1));
    queue.set_ready(true);
    Ok(queue)
}
