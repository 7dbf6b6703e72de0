//! Drivers that break the rules, and hosts that go away.

use vm_memory::GuestAddress;

use super::*;
use crate::virtio::testing::{Descriptor, MEMORY_SIZE, MEMORY_START, NEXT, WRITE};

/// What comes of `descriptors` in `queue`, the first one made available.
fn outcome(queue: u16, descriptors: &[Descriptor]) -> Result<(), DeviceError> {
    let (mut harness, wire) = one_card();
    assert!(wire.send(&frame(3000, 1)));
    for (index, descriptor) in (0..).zip(descriptors) {
        harness.rings[usize::from(queue)].write_descriptor(index, *descriptor);
    }
    harness.rings[usize::from(queue)].make_available(0);
    harness.kick(queue);
    harness.try_settle(1000)
}

#[test]
fn chains_that_leave_memory_or_never_end_break_the_device_and_nothing_else() {
    let address = MEMORY_START + MEMORY_SIZE / 4;
    for queue in 0..3 {
        for bad in [
            &[Descriptor { address: MEMORY_START + MEMORY_SIZE - 8, length: 64, flags: WRITE, next: 0 }][..],
            &[Descriptor { address: u64::MAX - 8, length: 64, flags: 0, next: 0 }],
            &[Descriptor { address, length: 64, flags: NEXT, next: 0 }],
            &[
                Descriptor { address, length: 64, flags: WRITE | NEXT, next: 1 },
                Descriptor { address, length: 64, flags: 0, next: 0 },
            ],
        ] {
            let result = outcome(queue, bad);
            assert!(matches!(result, Err(DeviceError::Protocol(_))), "{queue} {bad:?}: {result:?}");
        }
    }
}

#[test]
fn a_receive_buffer_without_room_for_a_header_breaks_the_device() {
    let address = MEMORY_START + MEMORY_SIZE / 4;
    for (length, flags) in [(11, WRITE), (2000, 0)] {
        let result = outcome(RX, &[Descriptor { address, length, flags, next: 0 }]);
        assert!(matches!(result, Err(DeviceError::Protocol(_))), "{result:?}");
    }
}

#[test]
fn buffers_of_a_byte_each_take_a_frame_in_one_chain() {
    let (mut harness, wire) = one_card();
    let first = harness.allocate(256);
    let segments = (0..250).map(|at| Segment::Writable(GuestAddress(first.0 + at), 1)).collect::<Vec<_>>();
    harness.submit(RX, &segments);
    assert!(wire.send(&frame(200, 5)));
    let used = harness.wait_used(RX);
    assert_eq!(used.written, 212);
    let bytes = harness.bytes(Segment::Readable(first, 212));
    assert_eq!((&bytes[10..12], &bytes[12..]), (&[1, 0][..], &frame(200, 5)[12..]));
}

#[test]
fn one_buffer_made_available_without_end_takes_one_frame_after_the_other() {
    let (mut harness, wire) = one_card();
    let segment = harness.writable(1536);
    let head = harness.submit(RX, &[segment]);
    for _ in 0..100 {
        harness.rings[0].make_available(head);
    }
    harness.kick(RX);
    for seed in 0..50 {
        assert!(wire.send(&frame(1000, seed)));
        harness.settle();
    }
    assert_eq!(harness.rings[0].used_index(), 50);
}

#[test]
fn a_host_that_hangs_up_is_a_pulled_cable() {
    let (mut harness, wire) = one_card();
    drop(wire);
    let segment = harness.readable(&frame(100, 1));
    harness.submit(TX, &[segment]);
    harness.settle();
    assert_eq!(harness.device.config()[6], 0);
    assert!(harness.config_changes > 0);
    assert!(harness.rings[1].take_used().is_some());
    // The driver's frames are still given back, now and after a reset.
    send(&mut harness, TX, &frame(100, 2));
    harness.reset();
    harness.activate().unwrap();
    send(&mut harness, TX, &frame(100, 3));
    assert_eq!(harness.device.config()[6], 0);
}

#[test]
fn a_card_without_its_first_pair_or_its_control_queue_does_not_start() {
    for missing in [0, 2] {
        let (net, _wires) = card(1);
        let mut harness = Harness::idle(net);
        harness.rings[missing].disable();
        let result = harness.activate();
        assert!(matches!(result, Err(DeviceError::MissingQueue(_))), "{missing}: {result:?}");
        assert_eq!(harness.events.watched(), 0);
    }
}
