//! Typed requests to the `vmm` thread.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::EventFd;

use crate::machine::Retired;
use crate::manage::Change;
use crate::platform::hotplug::Told;
use crate::vcpu::mtrr::VcpuMemoryTypes;
use crate::virtio::device::Activation;
use crate::vm::ExitReason;

/// Names a device on the `vmm` thread; never used again for another one.
pub(crate) type DeviceNumber = u64;

/// What the `vmm` thread is asked to do.
pub(crate) enum Request {
    /// End the machine for this reason; the first reason wins.
    End(ExitReason),
    /// Something for one device.
    Device {
        /// The device's number.
        number: DeviceNumber,
        /// What it shall do.
        request: DeviceRequest,
    },
    /// The guest has found a device of the host.
    Found(DeviceNumber),
    /// Devices of the host have been retired.
    Retired(Retired),
    /// The machine shall change.
    Change(Change),
    /// The guest told something by its hot-plug registers.
    Told {
        /// What.
        told: Told,
        /// Told when it has been carried out.
        done: Done,
    },
    /// A vCPU did as it was told.
    Vcpu {
        /// Which one.
        id: u8,
        /// What it did.
        event: VcpuEvent,
    },
}

/// What a vCPU did.
#[derive(Debug)]
pub(crate) enum VcpuEvent {
    /// It stands still.
    Paused,
    /// It was asked for its memory types.
    MemoryTypes(io::Result<Box<VcpuMemoryTypes>>),
    /// Its thread is about to end.
    Stopped,
}

/// What a device is asked to do, by its transport. An answer is the drop of `done`: it comes in any case.
pub(crate) enum DeviceRequest {
    /// Work on these rings.
    Activate(Activation),
    /// Stop and forget the rings.
    Reset(Done),
    /// The driver wrote to the device configuration.
    WriteConfig {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// Told when it is done.
        done: Done,
    },
}

/// Tells the asking side, when it is dropped, that a request was carried out, or never will be.
pub(crate) type Done = Sender<()>;

/// The asking side; cheap to clone.
#[derive(Clone)]
pub(crate) struct Control {
    requests: Sender<Request>,
    wake: Arc<EventFd>,
}

/// The answering side, owned by the `vmm` thread.
pub(crate) struct Mailbox {
    /// Requests that were not looked at yet.
    pub(crate) requests: Receiver<Request>,
    /// Readable when there are some.
    pub(crate) wake: Arc<EventFd>,
}

/// Makes the two sides.
///
/// # Errors
/// When there are no file descriptors left.
pub(crate) fn channel() -> std::io::Result<(Control, Mailbox)> {
    let (sender, receiver) = mpsc::channel();
    let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
    Ok((Control { requests: sender, wake: Arc::clone(&wake) }, Mailbox { requests: receiver, wake }))
}

impl Control {
    /// Hands `request` over. A machine that has ended takes no requests; that is no error, it has ended already.
    pub(crate) fn send(&self, request: Request) {
        if self.requests.send(request).is_ok() {
            // Cannot fail: the counter is far from its maximum, and the descriptor is open as long as `self`.
            let _ = self.wake.write(1);
        }
    }
}
