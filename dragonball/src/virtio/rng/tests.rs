//! Tests of the entropy device through its ring.

use rstest::rstest;
use vm_memory::GuestAddress;

use super::*;
use crate::virtio::testing::{
    Descriptor, Harness, INDIRECT, MEMORY_SIZE, MEMORY_START, NEXT, SECOND_REGION, Segment, WRITE,
};

#[test]
fn a_request_is_filled_whole_and_with_something_new() {
    let mut harness = Harness::new(Rng::new());
    let buffers = [harness.writable(4096), harness.writable(4096)];
    for buffer in buffers {
        assert_eq!(harness.request(0, &[buffer]), 4096);
    }
    let [first, second] = buffers.map(|buffer| harness.bytes(buffer));
    assert_ne!(first, second);
    // 4096 random bytes lack a given value in 1 of 9 million cases; that they lack 100 values is out of the question.
    assert!(first.iter().collect::<std::collections::HashSet<_>>().len() > 156);
    assert_eq!(harness.interrupt.queue(0), 2);
}

#[test]
fn a_huge_request_gets_no_more_than_the_limit() {
    let mut harness = Harness::new(Rng::new());
    let buffer = harness.writable(1 << 20);
    assert_eq!(harness.request(0, &[buffer]) as usize, MAX_REQUEST);
    assert!(harness.bytes(buffer)[MAX_REQUEST..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_request_that_is_spread_over_pieces_and_regions_is_filled() {
    let mut harness = Harness::new(Rng::new());
    let parts = [harness.writable(7), Segment::Writable(GuestAddress(SECOND_REGION - 100), 200), harness.writable(1)];
    assert_eq!(harness.request(0, &parts), 208);
    let table = harness.allocate(48);
    harness.rings[0].add_indirect(table, &parts);
    harness.kick(0);
    assert_eq!(harness.wait_used(0).written, 208);
}

#[test]
fn a_request_with_nothing_to_write_is_given_back_empty() {
    let mut harness = Harness::new(Rng::new());
    let buffer = harness.readable(b"not for you");
    assert_eq!(harness.request(0, &[buffer]), 0);
}

#[test]
fn more_requests_than_a_turn_are_all_served() {
    let mut harness = Harness::new(Rng::new());
    let buffer = harness.writable(1);
    for _ in 0..10 {
        let count = harness.rings[0].free();
        for _ in 0..count {
            harness.rings[0].add(&[buffer]);
        }
        harness.kick(0);
        for _ in 0..count {
            assert_eq!(harness.wait_used(0).written, 1);
        }
    }
}

#[rstest]
#[case::outside_memory(&[Descriptor { address: MEMORY_START + MEMORY_SIZE - 1, length: 2, flags: WRITE, next: 0 }])]
#[case::at_the_end_of_addresses(&[Descriptor { address: u64::MAX, length: 2, flags: WRITE, next: 0 }])]
#[case::a_loop(&[Descriptor { address: MEMORY_START, length: 1, flags: WRITE | NEXT, next: 0 }])]
#[case::a_next_outside_the_table(&[Descriptor { address: MEMORY_START, length: 1, flags: WRITE | NEXT, next: 64 }])]
#[case::a_cut_indirect_table(&[Descriptor { address: MEMORY_START, length: 15, flags: INDIRECT, next: 0 }])]
#[case::an_empty_indirect_table(&[Descriptor { address: MEMORY_START, length: 0, flags: INDIRECT, next: 0 }])]
#[case::an_indirect_table_outside_memory(&[Descriptor { address: 0, length: 16, flags: INDIRECT, next: 0 }])]
#[case::readable_after_writable(&[
    Descriptor { address: MEMORY_START, length: 1, flags: WRITE | NEXT, next: 1 },
    Descriptor { address: MEMORY_START, length: 1, flags: 0, next: 0 },
])]
fn a_broken_chain_is_a_protocol_error(#[case] chain: &[Descriptor]) {
    let mut harness = Harness::new(Rng::new());
    for (index, &descriptor) in (0_u16..).zip(chain) {
        harness.rings[0].write_descriptor(index, descriptor);
    }
    harness.rings[0].make_available(0);
    harness.kick(0);
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Protocol(_))));
}

#[test]
fn an_available_index_far_ahead_is_an_error() {
    let mut harness = Harness::new(Rng::new());
    harness.rings[0].set_available_index(65);
    harness.kick(0);
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Ring(_))));
}

#[test]
fn a_head_outside_the_table_is_a_protocol_error() {
    let mut harness = Harness::new(Rng::new());
    harness.rings[0].make_available(64);
    harness.kick(0);
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Protocol(_))));
}

#[test]
fn interrupts_come_only_where_the_driver_wants_one() {
    let mut harness = Harness::new(Rng::new());
    let buffer = harness.writable(1);
    harness.rings[0].set_used_event(3);
    for _ in 0..3 {
        harness.submit(0, &[buffer]);
        harness.settle();
    }
    assert_eq!(harness.interrupt.queue(0), 0);
    harness.submit(0, &[buffer]);
    harness.settle();
    assert_eq!(harness.interrupt.queue(0), 1);
}

#[test]
fn a_reset_device_watches_nothing_and_works_again() {
    let mut harness = Harness::new(Rng::new());
    let buffer = harness.writable(16);
    harness.request(0, &[buffer]);
    harness.reset();
    assert_eq!(harness.events.watched(), 0);
    harness.reset();
    harness.activate().unwrap();
    assert_eq!(harness.request(0, &[buffer]), 16);
}

#[test]
fn a_request_that_a_saved_device_had_not_looked_at_is_served_by_the_restored_one() {
    let mut harness = Harness::new(Rng::new());
    let buffer = harness.writable(16);
    harness.request(0, &[buffer]);
    let head = harness.submit(0, &[buffer]);
    // The doorbell rang, nobody listened: that ring is lost with the old device.
    harness.replace(Rng::new()).unwrap();
    let used = harness.wait_used(0);
    assert_eq!((used.head, used.written), (head, 16));
    assert_eq!(harness.request(0, &[buffer]), 16);
}

#[test]
fn a_restored_position_that_does_not_fit_the_ring_is_an_error_of_that_device_only() {
    let mut harness = Harness::idle(Rng::new());
    let wild = State { rings: Some([RingPosition { next_avail: 40_000, next_used: 7 }]) };
    harness.device.restore(&state::encode(STATE_VERSION, &wild).unwrap()).unwrap();
    harness.activate().unwrap();
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Ring(_))));
}
