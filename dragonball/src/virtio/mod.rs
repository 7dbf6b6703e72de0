//! Virtio: devices, and the PCI transport that carries them.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub mod vsock;

mod buffers;
mod observed;
pub(crate) mod pci;
mod ring;
pub(crate) mod state;
