//! The transport as a driver sees it, over its registers; what reaches the device is seen at the other end of the
//! machine's requests. Needs `/dev/kvm` for the doorbells and interrupts, a software one will do.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vmm_sys_util::epoll::EventSet;

use super::layout::{COMMON, DEVICE, DOORBELLS, LENGTH, MSIX_PENDING, MSIX_TABLE};
use super::registers::{VERSION_1, status};
use super::*;
use crate::control::{DeviceRequest, Mailbox, Request, channel};
use crate::irq::router::IrqRouter;
use crate::kvm;
use crate::memory::{AddressSpace, GuestRam};
use crate::pci::PciFunction;
use crate::pci::bus::PciBus;
use crate::virtio::device::{
    Activation, DeviceError, DeviceKind, EventRegistry, Interrupt, Outcome, SavedState, VirtioDevice,
};

const BAR: u32 = 0xC010_0000;
const FEATURE: u64 = 1 << 5;

/// Two queues and eight bytes of configuration; the transport never calls more than this in these tests.
struct Plain;

impl VirtioDevice for Plain {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5, 6, 7, 8]
    }
    fn activate(&mut self, _: Activation, _: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        Ok(())
    }
    fn handle_event(&mut self, _: u32, _: EventSet, _: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        Ok(Outcome::Done)
    }
    fn reset(&mut self, _: &mut dyn EventRegistry) {}
    fn save(&mut self) -> Result<SavedState, DeviceError> {
        Ok(SavedState { version: 1, data: Vec::new() })
    }
    fn restore(&mut self, _: &SavedState) -> Result<(), DeviceError> {
        Ok(())
    }
}

struct Driver {
    transport: Arc<Transport>,
    mailbox: Mailbox,
    space: AddressSpace,
}

/// A transport on a VM of its own; nothing where there is no KVM at all.
fn driver() -> Option<Driver> {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: this host has no /dev/kvm");
        return None;
    }
    let vm = kvm::create_vm(&kvm::open().unwrap()).unwrap();
    let (control, mailbox) = channel().unwrap();
    let router = Arc::new(IrqRouter::new(Arc::clone(&vm)));
    let memory = Arc::clone(GuestRam::new(32 << 20).unwrap().memory());
    let space = AddressSpace::new(Arc::clone(&vm));
    let hardware = Hardware { vm, router, memory, control };
    let transport = Arc::new(Transport::new(hardware, &Plain, 0, BAR).unwrap());
    transport.write_config(4, &[6, 0]);
    Some(Driver { transport, mailbox, space })
}

mod register {
    pub(super) const FEATURE_SELECT: u64 = 0x00;
    pub(super) const FEATURES: u64 = 0x04;
    pub(super) const DRIVER_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURES: u64 = 0x0c;
    pub(super) const QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const SELECT: u64 = 0x16;
    pub(super) const SIZE: u64 = 0x18;
    pub(super) const VECTOR: u64 = 0x1a;
    pub(super) const ENABLE: u64 = 0x1c;
    pub(super) const ADDRESSES: u64 = 0x20;
}

impl Driver {
    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read_memory(0, offset, &mut data);
        data
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.transport.write_memory(0, offset, data);
    }

    /// Where the window's capability is: the one with `cfg_type` 5.
    fn window(&self) -> u16 {
        let mut at = 0x34;
        loop {
            let mut capability = [0; 4];
            self.transport.read_config(at, &mut capability);
            if capability[0] == 9 && capability[3] == 5 {
                return at;
            }
            at = u16::from(capability[usize::from(at != 0x34)]);
            assert_ne!(at, 0, "the list has the window");
        }
    }

    fn status(&self) -> u8 {
        self.read::<1>(register::STATUS)[0]
    }

    fn set_status(&self, value: u8) {
        self.write(register::STATUS, &[value]);
    }

    /// Agrees on `features` up to `FEATURES_OK`.
    fn negotiate(&self, features: u64) {
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        for (select, half) in [(0_u32, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(register::DRIVER_SELECT, &select.to_le_bytes());
            self.write(register::DRIVER_FEATURES, &u32::try_from(half).unwrap().to_le_bytes());
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    }

    fn set_up_queue(&self, index: u16, size: u16, addresses: [u64; 3]) {
        self.write(register::SELECT, &index.to_le_bytes());
        self.write(register::SIZE, &size.to_le_bytes());
        for (position, address) in addresses.iter().enumerate() {
            self.write(register::ADDRESSES + 8 * position as u64, &address.to_le_bytes());
        }
        self.write(register::ENABLE, &1_u16.to_le_bytes());
    }

    fn driver_ok(&self) {
        let value = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.set_status(value);
    }

    /// What the device was handed, if it was.
    fn activation(&self) -> Option<Activation> {
        self.mailbox.requests.try_iter().find_map(|request| match request {
            Request::Device { request: DeviceRequest::Activate(activation), .. } => Some(activation),
            _ => None,
        })
    }
}

const RING: [u64; 3] = [0x10_0000, 0x11_0000, 0x12_0000];

#[test]
fn a_driver_finds_the_offered_features_and_queues() {
    let Some(driver) = driver() else { return };
    driver.write(register::FEATURE_SELECT, &1_u32.to_le_bytes());
    assert_eq!(driver.read(register::FEATURES), 1_u32.to_le_bytes(), "version 1");
    driver.write(register::FEATURE_SELECT, &0_u32.to_le_bytes());
    assert_eq!(driver.read(register::FEATURES), 32_u32.to_le_bytes());
    assert_eq!(driver.read(register::QUEUES), 2_u16.to_le_bytes());
    driver.write(register::SELECT, &1_u16.to_le_bytes());
    assert_eq!(driver.read(register::SIZE), 16_u16.to_le_bytes());
    driver.write(register::SELECT, &2_u16.to_le_bytes());
    assert_eq!(driver.read(register::SIZE), [0, 0], "there is no third queue");
    assert_eq!(driver.read(DEVICE.start), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(driver.read(DEVICE.start + 8), [0; 4]);
}

#[test]
fn features_that_are_not_offered_are_refused() {
    for features in [FEATURE, VERSION_1 | 1 << 6, VERSION_1 | 1 << 60] {
        let Some(driver) = driver() else { return };
        driver.negotiate(features);
        assert_eq!(driver.status() & status::FEATURES_OK, 0, "{features:#x}");
        driver.driver_ok();
        assert_eq!(driver.status() & status::DRIVER_OK, 0);
        assert!(driver.activation().is_none());
    }
}

#[test]
fn the_device_gets_the_rings_that_the_driver_enabled() {
    let Some(driver) = driver() else { return };
    driver.negotiate(VERSION_1 | FEATURE);
    driver.set_up_queue(1, 8, RING);
    driver.driver_ok();
    let activation = driver.activation().unwrap();
    assert_eq!(activation.features, VERSION_1 | FEATURE);
    let [ring] = activation.queues.as_slice() else { panic!("one queue") };
    assert_eq!(ring.index, 1);
    use virtio_queue::QueueT;
    assert_eq!((ring.queue.size(), ring.queue.desc_table(), ring.queue.used_ring()), (8, RING[0], RING[2]));
}

#[test]
fn a_doorbell_reaches_the_device_whether_kvm_took_it_or_not() {
    let Some(driver) = driver() else { return };
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 8, RING);
    driver.driver_ok();
    let activation = driver.activation().unwrap();
    driver.write(DOORBELLS.start + 4, &[0, 0]);
    assert!(activation.queues[0].kick.read().is_err(), "the other queue's");
    driver.write(DOORBELLS.start, &[0, 0]);
    assert_eq!(activation.queues[0].kick.read().unwrap(), 1);
}

#[test]
fn a_ring_outside_of_memory_breaks_the_device_until_its_reset() {
    for (size, ring) in [(8, [1 << 40, RING[1], RING[2]]), (7, RING), (0, RING), (8, [u64::MAX; 3]), (512, RING)] {
        let Some(driver) = driver() else { return };
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, size, ring);
        driver.driver_ok();
        assert_ne!(driver.status() & status::NEEDS_RESET, 0, "{size} {ring:x?}");
        assert!(driver.activation().is_none());
    }
}

#[test]
fn a_ring_that_is_enabled_cannot_be_changed() {
    let Some(driver) = driver() else { return };
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 8, RING);
    driver.write(register::SIZE, &16_u16.to_le_bytes());
    driver.write(register::ADDRESSES, &[0xff; 8]);
    assert_eq!(driver.read(register::SIZE), 8_u16.to_le_bytes());
    assert_eq!(driver.read(register::ADDRESSES), RING[0].to_le_bytes());
}

#[test]
fn a_reset_of_a_working_device_waits_for_the_device() {
    let Some(driver) = driver() else { return };
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 8, RING);
    driver.driver_ok();
    let transport = Arc::clone(&driver.transport);
    let writer = std::thread::spawn(move || transport.write_memory(0, register::STATUS, &[0]));
    let requests: Vec<_> = std::iter::from_fn(|| driver.mailbox.requests.recv().ok()).take(2).collect();
    let [
        Request::Device { request: DeviceRequest::Activate(_), .. },
        Request::Device { request: DeviceRequest::Reset(_), .. },
    ] = requests.as_slice()
    else {
        panic!("activation, then reset")
    };
    assert!(!writer.is_finished());
    drop(requests);
    writer.join().unwrap();
    assert_eq!((driver.status(), driver.read(register::ENABLE)), (0, [0, 0]));
}

#[test]
fn a_machine_that_ends_lets_a_waiting_vcpu_go() {
    let Some(Driver { transport, mailbox, .. }) = driver() else { return };
    let writer = std::thread::spawn(move || transport.write_memory(0, DEVICE.start, &[9]));
    let request = mailbox.requests.recv().unwrap();
    drop((request, mailbox));
    writer.join().unwrap();
}

#[test]
fn a_vector_that_does_not_exist_is_refused() {
    let Some(driver) = driver() else { return };
    for (vector, expected) in [(2_u16, 2_u16), (3, 0xffff), (0xffff, 0xffff)] {
        driver.write(register::VECTOR, &vector.to_le_bytes());
        assert_eq!(driver.read(register::VECTOR), expected.to_le_bytes());
    }
}

#[test]
fn the_function_answers_where_its_register_says() {
    let Some(driver) = driver() else { return };
    let bus = PciBus::default();
    bus.add(1, Arc::clone(&driver.transport) as _);
    bus.write_config(1 << 15 | 4, &[6, 0]);
    let mut data = [0; 2];
    assert!(bus.read_memory(u64::from(BAR) + register::QUEUES, &mut data));
    assert_eq!(data, [2, 0]);
    bus.write_config(1 << 15 | 0x10, &0xD000_0000_u32.to_le_bytes());
    assert!(!bus.read_memory(u64::from(BAR) + register::QUEUES, &mut data));
    assert!(bus.read_memory(0xD000_0000 + register::QUEUES, &mut data));
    bus.write_config(1 << 15 | 4, &[0, 0]);
    assert!(!bus.read_memory(0xD000_0000 + register::QUEUES, &mut data), "decoding is off");
}

#[test]
fn the_guest_reads_registers_as_memory_and_nothing_where_no_function_is() {
    let Some(driver) = driver() else { return };
    let bus = PciBus::new(driver.space.clone());
    let shown =
        |offset: usize| bus.shown_config(1).map(|page| u32::from_le_bytes(page[offset..][..4].try_into().unwrap()));
    assert_eq!(shown(0), None);
    bus.add(1, Arc::clone(&driver.transport) as _);
    assert_eq!([shown(0), shown(0x10), shown(256), shown(4092)], [Some(0x1042_1af4), Some(BAR), Some(0), Some(0)]);
    bus.write_config(1 << 15 | 0x10, &[0xff; 4]);
    assert_eq!([shown(0x10), shown(0)], [Some(0xffff_c000), Some(0x1042_1af4)]);
    bus.remove(1);
    driver.transport.write_config(0x10, &[0; 4]);
    assert_eq!([shown(0), shown(0x10), shown(4092)], [Some(0xffff_ffff); 3], "a vCPU that was at it changes nothing");
    bus.add(1, Arc::clone(&driver.transport) as _);
    assert_eq!([shown(0), shown(0x10)], [Some(0x1042_1af4), Some(0)]);
}

#[test]
fn a_window_that_is_open_is_read_by_exits() {
    let Some(driver) = driver() else { return };
    let bus = PciBus::new(driver.space.clone());
    bus.add(1, Arc::clone(&driver.transport) as _);
    let window = driver.window();
    bus.write_config(1 << 15 | u64::from(window + 8), &u32::try_from(register::QUEUES).unwrap().to_le_bytes());
    assert!(bus.shown_config(1).is_some(), "a window of no length");
    bus.write_config(1 << 15 | u64::from(window + 12), &2_u32.to_le_bytes());
    assert!(bus.shown_config(1).is_none());
    let mut queues = [0; 2];
    bus.read_config(1 << 15 | u64::from(window + 16), &mut queues);
    assert_eq!(queues, [2, 0]);
}

#[test]
fn doorbells_follow_a_function_that_moves() {
    let Some(driver) = driver() else { return };
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 8, RING);
    driver.driver_ok();
    for address in [0xD000_0000_u32, 0xD000_4000, BAR] {
        assert!(driver.transport.write_config(0x10, &address.to_le_bytes()));
        assert_eq!(driver.transport.ranges()[0].1.start, u64::from(address));
    }
    let Some(activation) = driver.activation() else { panic!("active") };
    driver.write(DOORBELLS.start, &[0, 0]);
    assert_eq!(activation.queues[0].kick.read().unwrap(), 1);
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let Some(driver) = driver() else { return };
    let window = driver.window();
    driver.transport.write_config(window + 8, &u32::try_from(register::QUEUES).unwrap().to_le_bytes());
    driver.transport.write_config(window + 12, &2_u32.to_le_bytes());
    let mut data = [0; 2];
    driver.transport.read_config(window + 16, &mut data);
    assert_eq!(data, [2, 0]);
    driver.transport.write_config(window + 8, &u32::try_from(register::SELECT).unwrap().to_le_bytes());
    driver.transport.write_config(window + 16, &1_u16.to_le_bytes());
    assert_eq!(driver.read(register::SELECT), [1, 0]);
}

#[test]
fn without_msix_the_status_register_tells_what_happened() {
    let Some(driver) = driver() else { return };
    driver.transport.lines().signal_queue(0);
    driver.transport.lines().signal_config();
    assert_eq!(driver.read(0x100), [3]);
    assert_eq!(driver.read(0x100), [0], "reading clears it");
}

/// Switches MSI-X on, with a message for vector `vector` that is masked or not.
fn set_up_vector(driver: &Driver, vector: u64, masked: bool) {
    let entry = [0xFEE0_0000_u32, 0, 0x30, u32::from(masked)];
    for (word, at) in entry.iter().zip((0..).step_by(4)) {
        driver.write(MSIX_TABLE.start + 16 * vector + at, &word.to_le_bytes());
    }
    driver.transport.write_config(driver.transport.capabilities.msix, &[0, 0x80]);
}

#[test]
fn an_event_of_the_host_kernel_is_pending_while_its_vector_is_masked_and_only_then() {
    let Some(driver) = driver() else { return };
    let lines = driver.transport.lines();
    assert!(lines.queue_event(0).is_none(), "without MSI-X there is no such event");
    set_up_vector(&driver, 1, true);
    driver.write(register::SELECT, &[0, 0]);
    driver.write(register::VECTOR, &[1, 0]);
    let event = lines.queue_event(0).unwrap();
    let pending = || driver.read::<1>(MSIX_PENDING.start)[0];
    assert_eq!(pending(), 0);
    event.write(1).unwrap();
    assert_eq!(pending(), 2);
    set_up_vector(&driver, 1, false);
    assert_eq!(pending(), 0, "KVM has it now");
    event.write(1).unwrap();
    set_up_vector(&driver, 1, true);
    // What KVM was told while it listened is delivered, and not pending.
    let _ = event.read();
    event.write(1).unwrap();
    assert_eq!(pending(), 2);
}

#[test]
fn an_event_of_the_host_kernel_follows_the_vector_of_its_queue_until_the_reset() {
    let Some(driver) = driver() else { return };
    let lines = driver.transport.lines();
    set_up_vector(&driver, 1, true);
    set_up_vector(&driver, 2, true);
    driver.write(register::SELECT, &[1, 0]);
    driver.write(register::VECTOR, &[1, 0]);
    let event = lines.queue_event(1).unwrap();
    driver.write(register::VECTOR, &[2, 0]);
    event.write(1).unwrap();
    assert_eq!(driver.read(MSIX_PENDING.start), [4]);
    driver.write(register::VECTOR, &[0xff, 0xff]);
    assert_eq!(driver.read(MSIX_PENDING.start), [0]);
    driver.write(register::VECTOR, &[2, 0]);
    driver.set_status(0);
    assert_eq!(driver.read(MSIX_PENDING.start), [0]);
}

#[test]
fn a_changed_configuration_has_a_new_generation() {
    let Some(driver) = driver() else { return };
    let before = driver.read::<1>(0x15);
    driver.transport.lines().set_config(vec![9; 8]);
    assert_ne!(driver.read(0x15), before);
    assert_eq!(driver.read(DEVICE.start), [9; 8]);
    let same = driver.read::<1>(0x15);
    driver.transport.lines().set_config(vec![9; 8]);
    assert_eq!(driver.read(0x15), same);
}

#[test]
fn a_saved_transport_continues_with_the_same_rings_and_vectors() {
    let (Some(first), Some(second)) = (driver(), driver()) else { return };
    first.negotiate(VERSION_1 | FEATURE);
    first.set_up_queue(1, 8, RING);
    first.write(register::VECTOR, &2_u16.to_le_bytes());
    first.driver_ok();
    let saved = first.transport.save();
    let bytes = postcard::to_stdvec(&saved).unwrap();
    second.transport.restore(&postcard::from_bytes(&bytes).unwrap()).unwrap();
    assert_eq!(second.transport.save(), saved);
    let activation = second.activation().unwrap();
    assert_eq!((activation.queues[0].index, activation.features), (1, VERSION_1 | FEATURE));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest does short of a reset of a working device, which would wait for one.
    #[test]
    fn no_access_panics(
        accesses in prop::collection::vec((any::<bool>(), 0..u64::from(LENGTH), prop::collection::vec(any::<u8>(), 1..9)), 0..128)
    ) {
        let Some(driver) = driver() else { return Ok(()) };
        for (to_config, offset, data) in accesses {
            let mut buffer = vec![0; data.len()];
            if to_config {
                // Not the window, which would reach the registers left out below.
                let register = u16::try_from(offset % 0x60).unwrap();
                driver.transport.write_config(register, &data);
                driver.transport.read_config(register, &mut buffer);
            } else {
                let waits = DEVICE.offset_of(offset, data.len()).is_some()
                    || COMMON.offset_of(offset, data.len()).is_some() && offset == register::STATUS && data[0] == 0;
                if !waits {
                    driver.write(offset, &data);
                }
                driver.transport.read_memory(0, offset, &mut buffer);
            }
        }
    }

    #[test]
    fn a_hostile_saved_state_is_taken_or_refused(position in 0_usize..400, value: u8) {
        let Some(driver) = driver() else { return Ok(()) };
        let mut bytes = postcard::to_stdvec(&driver.transport.save()).unwrap();
        let position = position % bytes.len();
        bytes[position] = value;
        if let Ok(state) = postcard::from_bytes(&bytes) {
            let _ = driver.transport.restore(&state);
        }
    }
}
