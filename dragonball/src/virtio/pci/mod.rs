//! The PCI transport of virtio (virtio 1.2, §4.1): modern devices only, interrupts by MSI-X only.
//!
//! [`Transport`] is what the vCPUs talk to: it holds the registers of one function behind a lock. The device itself
//! lives on the `vmm` thread. What both sides touch is [`Lines`]: interrupts, the copy of the device configuration and
//! the mark that the device needs a reset; it has its own small locks, so that neither side ever waits for the other
//! while it holds one. A vCPU waits for the `vmm` thread only when it resets a device that was working, or writes to the
//! device configuration.

mod layout;
mod lines;
mod registers;
mod transport;

pub(crate) use layout::LENGTH as REGION_LENGTH;
pub(crate) use lines::Lines;
pub(crate) use transport::{Hardware, Transport};

#[cfg(test)]
mod tests;
