//! KVM's side of VFIO: it learns which devices a VM has, so that it honours the memory types of a guest whose devices
//! bypass the caches, and lets the processor take the devices' interrupts without an exit where the hardware can.
//!
//! Source: the kernel's `Documentation/virt/kvm/devices/vfio.rst`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// The one VFIO device of a VM.
#[derive(Debug)]
pub(crate) struct KvmVfio(DeviceFd);

impl KvmVfio {
    /// Makes it; a VM can have one.
    ///
    /// # Errors
    /// When KVM was built without it.
    pub(crate) fn new(vm: &VmFd) -> io::Result<Self> {
        let mut request = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
        Ok(Self(vm.create_device(&mut request)?))
    }

    /// A group, or a device that is not in one, belongs to the VM now.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(super) fn add(&self, file: &File) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_ADD, file)
    }

    /// It does no more.
    ///
    /// # Errors
    /// When it did not before.
    pub(super) fn remove(&self, file: &File) -> io::Result<()> {
        self.set(KVM_DEV_VFIO_FILE_DEL, file)
    }

    fn set(&self, attribute: u32, file: &File) -> io::Result<()> {
        let descriptor: RawFd = file.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(attribute),
            addr: &raw const descriptor as u64,
        };
        Ok(self.0.set_device_attr(&attribute)?)
    }
}
