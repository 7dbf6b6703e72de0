//! The driver's side of a device: real rings in real guest memory, a real event loop, no KVM.
//!
//! [`Harness`] owns a device, activates it as a transport would, and drives it as a guest would: it writes descriptor
//! chains, makes them available, rings doorbells and waits for used buffers. What a guest may get wrong, a test can get
//! wrong too: [`DriverRing`] writes any descriptor and any index.
//!
//! A wait has a deadline only so that a broken device fails the test instead of hanging it; no test depends on how long
//! something takes.
#![expect(clippy::expect_used, reason = "a test that cannot set its machine up has failed, and says where")]

mod board;
mod events;
pub mod pci;
mod ring;
pub mod scenes;
pub mod script;
pub mod targets;
pub mod wire;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use events::EventLoop;
pub use ring::{Descriptor, DriverRing, INDIRECT, NEXT, Segment, Used, WRITE};

use super::device::{
    Activation, ActiveQueue, DeviceError, GuestMemory, GuestRegions, Interrupt, Outcome, Region, SavedState,
    VirtioDevice,
};
use crate::memory::layout::Range;
use crate::memory::{mapping, plug};

/// Where the guest memory of a harness begins. Not 0, so that a zeroed address is a bad one.
pub const MEMORY_START: u64 = 0x10_0000;
/// How much guest memory a harness has. It consists of two regions, so that a buffer can cross from one to the other.
pub const MEMORY_SIZE: u64 = 8 << 20;
/// Where the second region of guest memory begins.
pub const SECOND_REGION: u64 = MEMORY_START + MEMORY_SIZE / 2;
/// Where memory can be plugged, in a harness that has some.
pub const PLUGGABLE_START: u64 = 1 << 30;
/// How long a wait lasts before the test counts as failed.
const DEADLINE: Duration = Duration::from_secs(20);
/// Rings lie below this offset of guest memory, buffers above it.
const RINGS_SIZE: u64 = 0x4_0000;

/// Counts the interrupts of a device.
#[derive(Debug, Default)]
pub struct TestInterrupt {
    queues: [AtomicU32; 8],
    config: AtomicU32,
    seen: Mutex<Option<Vec<u8>>>,
}

impl TestInterrupt {
    /// How often queue `index` was signalled.
    pub fn queue(&self, index: u16) -> u32 {
        self.queues[usize::from(index)].load(Ordering::SeqCst)
    }

    /// The configuration that the device told without a signal, if it did since the last call.
    pub fn take_config(&self) -> Option<Vec<u8>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// How often a change of the configuration was signalled.
    pub fn config(&self) -> u32 {
        self.config.load(Ordering::SeqCst)
    }
}

impl Interrupt for TestInterrupt {
    fn signal_queue(&self, index: u16) {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn set_config(&self, config: Vec<u8>) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(config);
    }
}

fn fixed_regions(ranges: &[(u64, usize)]) -> Vec<Region> {
    let region = |&(start, length): &(u64, usize)| {
        Region::fixed(mapping::ram(length as u64).expect("memory"), GuestAddress(start)).expect("a region")
    };
    ranges.iter().map(region).collect()
}

/// Guest memory that is always there: start and length of each region, in order.
fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
    Arc::new(GuestRegions::from_regions(fixed_regions(ranges)).expect("guest memory"))
}

/// The guest memory of a harness; with `pluggable` bytes that can be plugged at [`PLUGGABLE_START`].
pub(crate) fn harness_memory(pluggable: Option<u64>) -> GuestMemory {
    let half = usize::try_from(MEMORY_SIZE / 2).expect("half of the memory");
    let mut regions = fixed_regions(&[(MEMORY_START, half), (SECOND_REGION, half)]);
    if let Some(length) = pluggable {
        regions.push(plug::region(Range { start: PLUGGABLE_START, length }).expect("addresses"));
    }
    Arc::new(GuestRegions::from_regions(regions).expect("guest memory"))
}

/// A device with a driver that does what the test says.
pub struct Harness<D: VirtioDevice> {
    /// The device under test.
    pub device: D,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The driver's rings, one per queue.
    pub rings: Vec<DriverRing>,
    /// What the device signalled.
    pub interrupt: Arc<TestInterrupt>,
    /// What the device watches.
    pub events: EventLoop,
    /// How often the device said that its configuration changed.
    pub config_changes: u32,
    kicks: Vec<EventFd>,
    next_buffer: u64,
    features: u64,
}

impl<D: VirtioDevice> Harness<D> {
    /// A device whose driver accepts all features and has not set `DRIVER_OK` yet; the rings have their largest size.
    pub fn idle(device: D) -> Self {
        Self::idle_in(harness_memory(None), device)
    }

    /// As [`Self::idle`], in a guest memory that the device knows already; see [`harness_memory`].
    pub(crate) fn idle_in(memory: GuestMemory, device: D) -> Self {
        let mut address = MEMORY_START;
        let rings = device
            .queue_sizes()
            .iter()
            .map(|&size| {
                let ring = DriverRing::new(Arc::clone(&memory), address, size);
                address = ring.end();
                ring
            })
            .collect::<Vec<_>>();
        assert!(address <= MEMORY_START + RINGS_SIZE, "the rings need more room than the harness has");
        let features = device.features() | (1 << VIRTIO_F_VERSION_1);
        Self {
            device,
            memory,
            rings,
            interrupt: Arc::default(),
            events: EventLoop::new(),
            config_changes: 0,
            kicks: Vec::new(),
            next_buffer: MEMORY_START + RINGS_SIZE,
            features,
        }
    }

    /// A device at work.
    pub fn new(device: D) -> Self {
        let mut harness = Self::idle(device);
        harness.activate().expect("activation");
        harness
    }

    /// A device at work whose driver does not know `RING_EVENT_IDX`.
    pub fn without_event_index(device: D) -> Self {
        Self::without_features(device, 1 << VIRTIO_RING_F_EVENT_IDX)
    }

    /// A device at work whose driver does not know the feature bits `unknown`.
    pub fn without_features(device: D, unknown: u64) -> Self {
        let mut harness = Self::idle(device);
        harness.features &= !unknown;
        harness.decline(1 << VIRTIO_RING_F_EVENT_IDX);
        harness.activate().expect("activation");
        harness
    }

    /// The driver does not know `features`.
    pub fn decline(&mut self, features: u64) {
        self.features &= !features;
    }

    /// Sets `DRIVER_OK`.
    ///
    /// # Errors
    /// The device's own.
    pub fn activate(&mut self) -> Result<(), DeviceError> {
        self.kicks = self.rings.iter().map(|_| EventFd::new(EFD_NONBLOCK).expect("eventfd")).collect();
        let queues = (0_u16..)
            .zip(&self.rings)
            .zip(&self.kicks)
            .filter(|((_, ring), _)| !ring.is_disabled())
            .map(|((index, ring), kick)| ActiveQueue {
                index,
                queue: ring.device_queue(),
                kick: kick.try_clone().expect("eventfd"),
            })
            .collect();
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: self.features,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
        };
        self.device.activate(activation, &mut self.events)
    }

    /// Resets the device; the driver's rings stay as they are.
    fn reset_device(&mut self) {
        self.device.reset(&mut self.events);
    }

    /// Resets the device and the driver's rings.
    pub fn reset(&mut self) {
        self.reset_device();
        self.rings.iter_mut().for_each(DriverRing::reset);
    }

    /// Saves the device, and goes on with `device` in its place, restored from that state, on the same rings.
    ///
    /// # Errors
    /// Either device's own.
    pub fn replace(&mut self, device: D) -> Result<SavedState, DeviceError> {
        let state = self.device.save()?;
        self.device.reset(&mut self.events);
        assert_eq!(self.events.watched(), 0, "a reset device watches nothing");
        self.device = device;
        self.device.restore(&state)?;
        self.activate()?;
        Ok(state)
    }

    /// Takes `length` bytes of guest memory for a buffer. Nothing is ever given back.
    pub fn allocate(&mut self, length: u32) -> GuestAddress {
        let address = self.next_buffer;
        self.next_buffer += u64::from(length).next_multiple_of(16);
        assert!(self.next_buffer <= MEMORY_START + MEMORY_SIZE, "the harness is out of guest memory");
        GuestAddress(address)
    }

    /// A buffer with `data` in it, for the device to read.
    pub fn readable(&mut self, data: &[u8]) -> Segment {
        let length = u32::try_from(data.len()).expect("a buffer below 4 GiB");
        let address = self.allocate(length);
        self.memory.write_slice(data, address).expect("a buffer in guest memory");
        Segment::Readable(address, length)
    }

    /// A buffer of `length` bytes for the device to write.
    pub fn writable(&mut self, length: u32) -> Segment {
        Segment::Writable(self.allocate(length), length)
    }

    /// What is in a buffer.
    pub fn bytes(&self, segment: Segment) -> Vec<u8> {
        let mut data = vec![0; segment.len() as usize];
        self.memory.read_slice(&mut data, segment.address()).expect("a buffer in guest memory");
        data
    }

    /// Makes a chain of `segments` available in queue `queue` and rings its doorbell if the device asked for that.
    /// Returns the chain's head.
    pub fn submit(&mut self, queue: u16, segments: &[Segment]) -> u16 {
        let event_index = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let ring = &mut self.rings[usize::from(queue)];
        let head = ring.add(segments);
        if ring.wants_doorbell(event_index) {
            self.kick(queue);
        }
        head
    }

    /// Rings the doorbell of queue `queue`, wanted or not.
    pub fn kick(&self, queue: u16) {
        self.kicks[usize::from(queue)].write(1).expect("a doorbell");
    }

    /// Serves one round of ready descriptors, waiting for the first until `deadline`. Returns how many were served.
    ///
    /// # Errors
    /// The device's own.
    pub fn round(&mut self, deadline: Instant) -> Result<usize, DeviceError> {
        let ready = self.events.wait(deadline.saturating_duration_since(Instant::now()));
        for &(token, events) in &ready {
            if self.device.handle_event(token, events, &mut self.events)? == Outcome::ConfigChanged {
                self.config_changes += 1;
            }
        }
        Ok(ready.len())
    }

    /// Serves events until `done` says so.
    ///
    /// # Errors
    /// The device's own.
    ///
    /// # Panics
    /// When that does not happen.
    pub fn try_run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) -> Result<(), DeviceError> {
        let deadline = Instant::now() + DEADLINE;
        while !done(self) {
            assert!(Instant::now() < deadline, "what the test waits for never happened");
            self.round(deadline)?;
        }
        Ok(())
    }

    /// Serves events until `done` says so.
    ///
    /// # Panics
    /// When that does not happen, or the device fails.
    pub fn run_until(&mut self, done: impl FnMut(&mut Self) -> bool) {
        self.try_run_until(done).expect("a working device");
    }

    /// Serves events until none is ready.
    ///
    /// # Errors
    /// The device's own.
    ///
    /// # Panics
    /// When the device is still busy after `rounds` rounds with nothing new to do: it spins.
    pub fn try_settle(&mut self, rounds: usize) -> Result<(), DeviceError> {
        for _ in 0..rounds {
            if self.round(Instant::now())? == 0 {
                return Ok(());
            }
        }
        panic!("the device is still busy after {rounds} rounds: it spins");
    }

    /// Serves events until none is ready.
    ///
    /// # Panics
    /// When the device spins or fails.
    pub fn settle(&mut self) {
        self.try_settle(1000).expect("a working device");
    }

    /// Takes the next used buffer of queue `queue`, serving events until there is one.
    ///
    /// # Panics
    /// When there is none in time, or the device fails.
    pub fn wait_used(&mut self, queue: u16) -> Used {
        let mut used = None;
        self.run_until(|harness| {
            used = harness.rings[usize::from(queue)].take_used();
            used.is_some()
        });
        used.expect("a used buffer")
    }

    /// Submits a chain and waits until it is used; returns how many bytes the device wrote.
    ///
    /// # Panics
    /// When another chain is used, or none in time.
    pub fn request(&mut self, queue: u16, segments: &[Segment]) -> u32 {
        let head = self.submit(queue, segments);
        let used = self.wait_used(queue);
        assert_eq!(used.head, head, "the device used another chain");
        used.written
    }

    /// The descriptor number of a queue's doorbell.
    pub fn doorbell(&self, queue: u16) -> i32 {
        self.kicks[usize::from(queue)].as_raw_fd()
    }
}
