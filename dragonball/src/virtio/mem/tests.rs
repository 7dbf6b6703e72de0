//! Tests of the memory device through its ring. No VM is behind it: `memory::plug` has the tests with one.

use std::time::{Duration, Instant};

use rstest::rstest;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::scenes::{MEM_SIZE, mem_harness};
use crate::virtio::testing::{Harness, Segment};

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

fn message(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut message = vec![0; 24];
    message[..2].copy_from_slice(&kind.to_le_bytes());
    message[8..16].copy_from_slice(&address.to_le_bytes());
    message[16..18].copy_from_slice(&count.to_le_bytes());
    message
}

/// Type and state of the answer to a request about blocks of the region.
fn ask(harness: &mut Harness<Mem>, kind: u16, block: u64, count: u16) -> (u16, u16) {
    let address = harness.device.memory.range().start + block * BLOCK;
    ask_at(harness, kind, address, count)
}

fn ask_at(harness: &mut Harness<Mem>, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let segments = [harness.readable(&message(kind, address, count)), harness.writable(10)];
    assert_eq!(harness.request(0, &segments), 10);
    let answer = harness.bytes(segments[1]);
    (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
}

/// A device at work whose guest shall have `requested` bytes.
fn harness(requested: u64) -> Harness<Mem> {
    let harness = mem_harness();
    harness.device.control().set_requested(requested).unwrap();
    harness
}

fn field(config: &[u8], number: usize) -> u64 {
    u64::from_le_bytes(config[8 * number..8 * number + 8].try_into().unwrap())
}

#[test]
fn the_guest_gets_what_it_asks_for_up_to_what_it_shall_have() {
    let mut harness = harness(4 * BLOCK);
    assert_eq!(ask(&mut harness, PLUG, 0, 3).0, ACK);
    assert_eq!(ask(&mut harness, PLUG, 10, 2).0, NACK);
    assert_eq!(ask(&mut harness, PLUG, 10, 1).0, ACK);
    assert_eq!(ask(&mut harness, PLUG, 20, 1).0, NACK);
    assert_eq!(harness.device.control().state().plugged, 4 * BLOCK);
    harness.device.control().set_requested(0).unwrap();
    assert_eq!(ask(&mut harness, UNPLUG, 0, 2).0, ACK);
    assert_eq!(ask(&mut harness, PLUG, 0, 1).0, NACK, "it has to give back, not to take");
    assert_eq!(ask(&mut harness, UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(harness.device.control().state().plugged, 0);
}

#[test]
fn the_answer_is_seen_with_the_new_size_in_the_configuration() {
    let mut harness = harness(4 * BLOCK);
    let start = harness.device.memory.range().start;
    ask(&mut harness, PLUG, 1, 2);
    let config = harness.interrupt.take_config().unwrap();
    let fields: Vec<u64> = (0..7).map(|number| field(&config, number)).collect();
    assert_eq!(fields, [BLOCK, 0, start, MEM_SIZE, MEM_SIZE, 2 * BLOCK, 4 * BLOCK]);
    assert_eq!(config, harness.device.config());
}

#[test]
fn blocks_say_what_they_are() {
    let mut harness = harness(4 * BLOCK);
    ask(&mut harness, PLUG, 1, 2);
    for (block, count, state) in [(0, 1, 1), (1, 2, 0), (0, 2, 2), (2, 1, 0), (3, 61, 1)] {
        assert_eq!(ask(&mut harness, STATE, block, count), (ACK, state), "{block} {count}");
    }
}

#[rstest]
#[case::plugged_already(PLUG, 1, 1)]
#[case::plugged_in_part(PLUG, 0, 2)]
#[case::not_plugged(UNPLUG, 0, 1)]
#[case::not_all_plugged(UNPLUG, 1, 2)]
#[case::nothing_to_plug(PLUG, 2, 0)]
#[case::nothing_to_unplug(UNPLUG, 1, 0)]
#[case::behind_the_end(PLUG, MEM_SIZE / BLOCK, 1)]
#[case::across_the_end(PLUG, MEM_SIZE / BLOCK - 1, 2)]
#[case::state_across_the_end(STATE, MEM_SIZE / BLOCK - 1, 2)]
#[case::the_largest_count(UNPLUG, 0, u16::MAX)]
#[case::no_known_request(4, 0, 1)]
fn a_wrong_request_is_an_error_and_changes_nothing(#[case] kind: u16, #[case] block: u64, #[case] count: u16) {
    let mut harness = harness(8 * BLOCK);
    ask(&mut harness, PLUG, 1, 1);
    assert_eq!(ask(&mut harness, kind, block, count).0, ERROR);
    assert_eq!(harness.device.memory.plugged(), BLOCK);
    assert_eq!(ask(&mut harness, PLUG, 5, 1).0, ACK, "the device goes on");
}

#[test]
fn an_address_off_the_blocks_or_the_region_is_an_error() {
    let mut harness = harness(8 * BLOCK);
    let start = harness.device.memory.range().start;
    for address in [start + 4096, start - BLOCK, 0, u64::MAX - BLOCK + 1, u64::MAX] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(ask_at(&mut harness, kind, address, 1).0, ERROR, "{kind} {address:#x}");
        }
    }
}

#[test]
fn a_cut_request_is_an_error_and_a_cut_answer_breaks_the_device() {
    let mut harness = harness(8 * BLOCK);
    let segments = [harness.readable(&[0; 23]), harness.writable(10)];
    harness.request(0, &segments);
    assert_eq!(harness.bytes(segments[1])[0], 3);
    let segments = [harness.readable(&[0; 24]), harness.writable(9)];
    harness.submit(0, &segments);
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Protocol(_))));
}

#[test]
fn a_driver_that_would_touch_unplugged_memory_is_refused() {
    let mut harness = harness(0);
    harness.reset();
    harness.decline(UNPLUGGED_INACCESSIBLE);
    assert!(matches!(harness.activate(), Err(DeviceError::Protocol(_))));
    assert_eq!(harness.events.watched(), 0);
}

#[test]
fn a_buffer_in_unplugged_memory_is_refused_and_one_in_plugged_memory_works() {
    let mut harness = harness(8 * BLOCK);
    let start = harness.device.memory.range().start;
    ask(&mut harness, PLUG, 0, 2);
    // The answer to a request goes across two blocks that were plugged after the device was activated.
    let place = GuestAddress(start + BLOCK - 5);
    let request = harness.readable(&message(STATE, start, 2));
    harness.request(0, &[request, Segment::Writable(place, 10)]);
    let mut answer = [1; 10];
    harness.memory.read_slice(&mut answer, place).unwrap();
    assert_eq!(answer, [0; 10]);

    ask(&mut harness, UNPLUG, 1, 1);
    harness.submit(0, &[request, Segment::Writable(place, 10)]);
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Protocol(_))));
}

#[test]
fn the_guest_is_told_of_another_size_and_the_host_of_what_came_of_it() {
    let mut harness = harness(0);
    harness.settle();
    let before = harness.config_changes;
    let control = harness.device.control();
    assert_eq!(control.set_requested(3 * BLOCK - 1).unwrap(), 3 * BLOCK);
    harness.settle();
    assert_eq!(harness.config_changes, before + 1);
    assert_eq!(field(&harness.device.config(), 6), 3 * BLOCK);
    let (sender, receiver) = std::sync::mpsc::channel();
    control.watch(move |state| sender.send(state.plugged).unwrap());
    ask(&mut harness, PLUG, 0, 2);
    ask(&mut harness, PLUG, 2, 1);
    assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [2 * BLOCK, 3 * BLOCK]);
    assert_eq!(control.set_requested(u64::MAX).unwrap(), control.state().max);
}

#[test]
fn a_guest_that_comes_no_nearer_is_told_again_while_somebody_waits() {
    let mut harness = harness(4 * BLOCK);
    ask(&mut harness, PLUG, 0, 4);
    let control = harness.device.control();
    control.set_requested(0).unwrap();
    harness.settle();
    let told = harness.config_changes;
    let deadline = Instant::now() + Duration::from_secs(60);
    let waiter = std::thread::spawn(move || {
        control.wait_patiently(deadline, Duration::from_millis(1), |state| state.plugged == 0).plugged
    });
    harness.run_until(|harness| harness.config_changes >= told + 2);
    assert_eq!(ask(&mut harness, UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(waiter.join().unwrap(), 0);
}

#[test]
fn a_guest_with_the_size_that_it_shall_have_is_not_told_again() {
    let mut harness = harness(0);
    harness.settle();
    let told = harness.config_changes;
    let deadline = Instant::now() + Duration::from_millis(20);
    let state = harness.device.control().wait_patiently(deadline, Duration::from_millis(1), |_| false);
    harness.settle();
    assert_eq!((state.plugged, harness.config_changes), (0, told));
}

#[test]
fn memory_stays_plugged_over_a_reset() {
    let mut harness = harness(4 * BLOCK);
    ask(&mut harness, PLUG, 0, 4);
    harness.reset();
    let state = harness.device.control().state();
    assert_eq!((state.plugged, state.driver), (4 * BLOCK, false));
    harness.activate().unwrap();
    assert!(harness.device.control().state().driver);
    assert_eq!(ask(&mut harness, UNPLUG_ALL, 0, 0).0, ACK);
}

#[test]
fn a_restored_device_has_the_blocks_and_the_request_of_the_saved_one() {
    let mut harness = harness(6 * BLOCK);
    ask(&mut harness, PLUG, 0, 2);
    ask(&mut harness, PLUG, 40, 3);
    let request = message(PLUG, harness.device.memory.range().start + 10 * BLOCK, 1);
    let segments = [harness.readable(&request), harness.writable(10)];
    harness.submit(0, &segments);
    let mut fresh = mem_harness();
    fresh.reset();
    harness.replace(fresh.device).unwrap();
    harness.wait_used(0);
    assert_eq!(harness.device.memory.plugged(), 6 * BLOCK);
    assert!(harness.device.memory.blocks().all(Run { first: 40, count: 3 }));
    assert_eq!(ask(&mut harness, PLUG, 11, 1).0, NACK);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_nothing_is_plugged() {
    let range = mem_harness().device.memory.range();
    let good = || State { start: range.start, length: range.length, requested: 0, plugged: vec![1], rings: None };
    for bad in [
        State { start: range.start + BLOCK, ..good() },
        State { length: 2 * range.length, ..good() },
        State { requested: MEM_SIZE + BLOCK, ..good() },
        State { requested: 1, ..good() },
        State { plugged: vec![], ..good() },
        State { plugged: vec![1, 0], ..good() },
    ] {
        let mut harness = mem_harness();
        harness.reset();
        let saved = state::encode(STATE_VERSION, &bad).unwrap();
        assert!(matches!(harness.device.restore(&saved), Err(DeviceError::InvalidState(_))));
        assert_eq!(harness.device.memory.plugged(), 0);
    }
}
