//! Virtio: devices, and the PCI transport that carries them.

pub mod device;
