//! Keeps KVM from patching its own code while guests run.
//!
//! Some of KVM's branches are instructions that the kernel rewrites when a count leaves zero or returns to it ("static
//! keys", Linux's `Documentation/staging/static-keys.rst`): whether there is a virtual machine at all, a vCPU without an
//! interrupt controller, a vCPU whose controller is switched off, as each is until its guest's kernel runs. So each start and
//! end of a guest rewrites code that other CPUs execute, by way of a breakpoint. QEMU's emulated CPUs have been seen to meet
//! that breakpoint after it was gone (`Oops: int3` in `vcpu_run`), which ends the machine. Two machines with a vCPU each that
//! never runs hold the counts above zero.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Requests of `linux/kvm.h` whose argument is a number.
const CREATE_VM: libc::c_ulong = 0xae01;
const CREATE_VCPU: libc::c_ulong = 0xae41;
const CREATE_IRQCHIP: libc::c_ulong = 0xae60;

/// The machines and their vCPUs; they go with it.
#[derive(Debug)]
pub(crate) struct Kept {
    _machines: [[OwnedFd; 2]; 2],
}

impl Kept {
    /// Makes the machines.
    ///
    /// # Errors
    /// When the kernel has no KVM.
    pub(crate) fn make() -> io::Result<Self> {
        let kvm = File::open("/dev/kvm")?;
        Ok(Self { _machines: [machine(&kvm, true)?, machine(&kvm, false)?] })
    }
}

/// A machine and its vCPU, whose interrupt controller is switched off, or which has none.
fn machine(kvm: &File, with_controller: bool) -> io::Result<[OwnedFd; 2]> {
    let machine = descriptor(request(kvm, CREATE_VM)?);
    if with_controller {
        request(&machine, CREATE_IRQCHIP)?;
    }
    let vcpu = descriptor(request(&machine, CREATE_VCPU)?);
    Ok([machine, vcpu])
}

fn request(to: &impl AsRawFd, number: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: these requests take a number and touch no memory of this process.
    match unsafe { libc::ioctl(to.as_raw_fd(), number, 0) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

fn descriptor(number: i32) -> OwnedFd {
    // SAFETY: the kernel has just made it for this caller.
    unsafe { OwnedFd::from_raw_fd(number) }
}
