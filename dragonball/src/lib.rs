//! A small KVM virtual machine monitor: library and command.

pub mod virtio;
