//! A queue pair whose frames the host kernel moves (`/dev/vhost-net`; the kernel's `include/uapi/linux/vhost.h`).
//!
//! The kernel takes the doorbells by itself. Its interrupts come as events of the device thread, which passes them on: so
//! they are masked and routed as those of every other device.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as KernelNet;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::device::{EventRegistry, GuestMemory, Region};
use crate::virtio::ring::{RING_FEATURES, Ring, RingPosition};

/// The device file.
pub(super) const DEVICE: &str = "/dev/vhost-net";
/// What the kernel has to know of what the driver may have accepted; the rest is the tap's.
const FEATURES: u64 = RING_FEATURES | (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_NET_F_MRG_RXBUF);
/// The event flags of a descriptor that is read.
const IN: vmm_sys_util::epoll::EventSet = vmm_sys_util::epoll::EventSet::IN;

/// A queue pair in the hands of the kernel.
pub(super) struct Vhost {
    kernel: KernelNet<GuestMemory>,
    memory: GuestMemory,
    tap: File,
    /// What the kernel calls the guest by, for the receive and the transmit ring.
    calls: [EventFd; 2],
    running: bool,
}

/// Says whether the kernel's device can be opened.
///
/// # Errors
/// When it cannot.
pub(super) fn probe() -> io::Result<()> {
    File::options().read(true).write(true).open(DEVICE).map(drop)
}

impl Vhost {
    /// Hands the two `rings` (receive, transmit) of a driver with `features` to the kernel, which waits for
    /// [`Self::set_running`].
    ///
    /// # Errors
    /// When the kernel does not take them; the rings are as they were then.
    pub(super) fn new(memory: &GuestMemory, features: u64, rings: [&Ring; 2], tap: BorrowedFd<'_>) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kernel = KernelNet::new(GuestMemory::clone(memory)).map_err(into_io)?;
        let new = Self {
            kernel,
            memory: GuestMemory::clone(memory),
            tap: tap.try_clone_to_owned()?.into(),
            calls: [event()?, event()?],
            running: false,
        };
        new.set_up(features, rings).map_err(into_io)?;
        Ok(new)
    }

    fn set_up(&self, features: u64, rings: [&Ring; 2]) -> vhost::Result<()> {
        let kernel = &self.kernel;
        kernel.set_owner()?;
        let wanted = features & FEATURES;
        if wanted & !kernel.get_features()? != 0 {
            return Err(vhost::Error::VhostOpen(io::ErrorKind::Unsupported.into()));
        }
        kernel.set_features(wanted)?;
        kernel.set_mem_table(&regions(&self.memory).map_err(vhost::Error::VhostOpen)?)?;
        for (index, (ring, call)) in rings.into_iter().zip(&self.calls).enumerate() {
            let layout = ring.layout();
            kernel.set_vring_num(index, layout.size)?;
            kernel.set_vring_base(index, layout.next_available)?;
            kernel.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: layout.size,
                    queue_size: layout.size,
                    flags: 0,
                    desc_table_addr: layout.descriptors,
                    used_ring_addr: layout.used,
                    avail_ring_addr: layout.available,
                    log_addr: None,
                },
            )?;
            kernel.set_vring_call(index, call)?;
            kernel.set_vring_kick(index, ring.kick())?;
        }
        Ok(())
    }

    /// Lets frames pass, or holds them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn set_running(&mut self, running: bool) -> io::Result<()> {
        if running != self.running {
            for index in 0..2 {
                self.kernel.set_backend(index, running.then_some(&self.tap)).map_err(into_io)?;
            }
            self.running = running;
        }
        Ok(())
    }

    /// Where the kernel is in `rings`. Frames are held for that moment.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(super) fn positions(&mut self, rings: [&Ring; 2]) -> io::Result<[RingPosition; 2]> {
        let running = self.running;
        self.set_running(false)?;
        let mut positions = [RingPosition::default(); 2];
        for (index, (ring, position)) in rings.into_iter().zip(&mut positions).enumerate() {
            let next = self.kernel.get_vring_base(index).map_err(into_io)?;
            position.next_avail = u16::try_from(next & 0xffff).unwrap_or_default();
            // The kernel keeps no other number of used buffers than the one that the driver sees.
            let used = GuestAddress(ring.layout().used + 2);
            position.next_used =
                self.memory.load(used, Ordering::Acquire).map(u16::from_le).map_err(io::Error::other)?;
        }
        self.set_running(running)?;
        Ok(positions)
    }

    /// Watches what the kernel calls the guest by, under `token` and the one after it.
    ///
    /// # Errors
    /// When epoll refuses; nothing is watched then.
    pub(super) fn watch(&self, token: u32, events: &mut dyn EventRegistry) -> io::Result<()> {
        let [receive, transmit] = &self.calls;
        events.add(receive.as_raw_fd(), token, IN)?;
        events.add(transmit.as_raw_fd(), token + 1, IN).inspect_err(|_| {
            // It was added a moment ago; the error to report is the first one.
            let _ = events.remove(receive.as_raw_fd());
        })
    }

    /// Watches it no longer.
    pub(super) fn unwatch(&self, events: &mut dyn EventRegistry) {
        for call in &self.calls {
            if let Err(error) = events.remove(call.as_raw_fd()) {
                tracing::debug!(%error, "the kernel's call was not watched");
            }
        }
    }

    /// Forgets the calls for ring `index` up to now; false when there were none.
    pub(super) fn acknowledge(&self, index: usize) -> bool {
        self.calls.get(index).is_some_and(|call| call.read().is_ok())
    }
}

/// Guest memory for the kernel. Of memory that comes and goes the kernel would write to what the guest does not have.
fn regions(memory: &GuestMemory) -> io::Result<Vec<VhostUserMemoryRegionInfo>> {
    let region = |region: &Region| {
        if region.blocks().is_some() {
            return Err(io::Error::other(
                "vhost does not go with memory that can be plugged: use vhost=off, or no such memory",
            ));
        }
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.mapping().as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        })
    };
    memory.iter().map(region).collect()
}

fn into_io(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::VhostOpen(error) | vhost::Error::IoctlError(error) => error,
        other => io::Error::other(other),
    }
}
