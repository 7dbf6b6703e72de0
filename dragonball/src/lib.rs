//! A small virtual machine monitor on KVM: it boots a Linux kernel with virtio-pci devices and keeps out of the way.
//!
//! A [`MachineConfig`] says what the machine consists of, [`start`] starts it, and the [`Vm`] that it returns is the
//! handle on it. The machine's threads are `vmm`, which owns all devices, and one `vcpuN` per vCPU.

pub mod config;
pub mod control_socket;
pub mod footprint;
pub mod manage;
pub mod virtio;

mod acpi;
mod boot;
mod bus;
mod causes;
mod control;
mod host;
mod irq;
mod kvm;
mod machine;
mod memory;
mod pci;
mod platform;
mod threads;
mod vcpu;
mod vfio;
mod vm;

pub use boot::BootError;
pub use config::{
    ConfigError, ConsoleOutput, DeviceConfig, DiskConfig, FsConfig, MacAddress, MachineConfig, NetConfig, PmemConfig,
    TapDescriptors, TapSource, VfioConfig, VhostMode, VsockConfig,
};
pub use host::memory_limit;
pub use kvm::KvmError;
pub use machine::{StartError, start};
pub use vcpu::mtrr::VcpuMemoryTypes;
#[cfg(any(test, feature = "testing"))]
pub use vfio::scene as host_device_scene;
pub use virtio::net::TapError;
pub use vm::{ExitReason, Vm};
