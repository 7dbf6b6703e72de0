//! Tests of the balloon through its rings.

use rstest::rstest;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::memory::listener::DmaListener;
use crate::memory::mapping::is_resident;
use crate::virtio::testing::scenes::balloon_harness;
use crate::virtio::testing::{Harness, MEMORY_SIZE, MEMORY_START, SECOND_REGION, Segment};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const REPORT: u16 = 4;
/// A place that no ring and no buffer of the harness is in.
const FREE: u64 = SECOND_REGION;

/// The balloon takes no notice of what a device does with memory; only that there is one.
struct Device;

impl DmaListener for Device {
    fn plugged(&self, _: Range, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn unplugged(&self, _: Range) {}
}

fn harness() -> Harness<Balloon> {
    balloon_harness().0
}

fn fill(harness: &Harness<Balloon>, start: u64, pages: usize) {
    harness.memory.write_slice(&vec![7; pages * 4096], GuestAddress(start)).unwrap();
}

/// Which of the pages from `start` on are in the host's memory.
fn resident(harness: &Harness<Balloon>, start: u64, pages: u64) -> Vec<bool> {
    let host = |page| harness.memory.get_host_address(GuestAddress(start + page * PAGE)).unwrap() as u64;
    (0..pages).map(|page| is_resident(host(page))).collect()
}

fn numbers(addresses: &[u64]) -> Vec<u8> {
    addresses.iter().flat_map(|address| u32::try_from(address / PAGE).unwrap().to_le_bytes()).collect()
}

fn inflate_pages(harness: &mut Harness<Balloon>, addresses: &[u64]) {
    let request = harness.readable(&numbers(addresses));
    assert_eq!(harness.request(INFLATE, &[request]), 0);
}

fn stats_buffer(harness: &mut Harness<Balloon>, entries: &[(u16, u64)]) -> Segment {
    let raw: Vec<u8> =
        entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect();
    harness.readable(&raw)
}

#[test]
fn pages_in_the_balloon_go_back_to_the_host_and_their_neighbours_stay() {
    let mut harness = harness();
    fill(&harness, FREE, 6);
    inflate_pages(&mut harness, &[FREE + 4 * PAGE, FREE + PAGE, FREE + 2 * PAGE, FREE + PAGE]);
    assert_eq!(resident(&harness, FREE, 6), [true, false, false, true, false, true]);
    assert_eq!(harness.device.control().state().discarded, 3 * PAGE);
    let request = harness.readable(&numbers(&[FREE + PAGE]));
    assert_eq!(harness.request(DEFLATE, &[request]), 0);
    let mut page = [1; 4096];
    harness.memory.read_slice(&mut page, GuestAddress(FREE + PAGE)).unwrap();
    assert_eq!(page, [0; 4096]);
}

#[test]
fn a_run_across_regions_and_the_end_of_memory_goes_as_far_as_there_is_memory() {
    let mut harness = harness();
    fill(&harness, SECOND_REGION - PAGE, 2);
    let last = MEMORY_START + MEMORY_SIZE - PAGE;
    fill(&harness, last, 1);
    let unplugged = crate::virtio::testing::PLUGGABLE_START;
    inflate_pages(
        &mut harness,
        &[SECOND_REGION - PAGE, SECOND_REGION, last, last + PAGE, 0, unplugged, 0xffff_ffff * PAGE],
    );
    assert_eq!(resident(&harness, SECOND_REGION - PAGE, 2), [false, false]);
    assert_eq!(harness.device.control().state().discarded, 3 * PAGE);
}

#[rstest]
#[case::half_a_number(3)]
#[case::more_than_a_request_can_have(4 * (pages::PAGES_MAX + 1))]
fn a_wrong_inflate_request_breaks_the_device(#[case] length: usize) {
    let mut harness = harness();
    let request = harness.readable(&vec![0; length]);
    harness.submit(INFLATE, &[request]);
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Protocol(_))));
}

#[rstest]
#[case::by_the_specification(4)]
#[case::by_linux_before_6_11(3)]
fn reported_pages_go_back_to_the_host(#[case] queue: u16) {
    let mut harness = harness();
    fill(&harness, FREE, 8);
    let pieces = [(FREE, 2 * PAGE), (FREE + 4 * PAGE, PAGE), (FREE + 6 * PAGE + 1, PAGE), (FREE + 7 * PAGE, 100)];
    let segments = pieces.map(|(start, length)| Segment::Writable(GuestAddress(start), u32::try_from(length).unwrap()));
    assert_eq!(harness.request(queue, &segments), 0);
    let expected = [false, false, true, true, false, true, true, true];
    assert_eq!(resident(&harness, FREE, 8), expected, "only whole pages");
    assert_eq!(harness.device.control().state().discarded, 3 * PAGE);
}

#[test]
fn nothing_goes_back_while_a_device_reaches_memory() {
    let (mut harness, listeners) = balloon_harness();
    fill(&harness, FREE, 2);
    let attachment = listeners.attach(Arc::new(Device)).unwrap();
    inflate_pages(&mut harness, &[FREE]);
    assert_eq!(harness.request(REPORT, &[Segment::Writable(GuestAddress(FREE + PAGE), 4096)]), 0);
    assert_eq!(resident(&harness, FREE, 2), [true, true]);
    drop(attachment);
    inflate_pages(&mut harness, &[FREE]);
    assert_eq!(resident(&harness, FREE, 2), [false, true]);
    assert_eq!(harness.device.control().state().discarded, PAGE);
}

#[test]
fn the_guest_is_told_of_another_target_and_the_host_of_what_came_of_it() {
    let mut harness = harness();
    let control = harness.device.control();
    assert_eq!(control.set_target(10 * PAGE + 17).unwrap(), 10 * PAGE);
    harness.settle();
    assert_eq!(harness.config_changes, 1);
    assert_eq!(harness.device.config(), [10, 0, 0, 0, 0, 0, 0, 0]);
    harness.device.write_config(4, &[7]);
    harness.device.write_config(0, &[9, 9, 9, 9]);
    harness.device.write_config(5, &[1, 0, 0, 9, 9]);
    harness.device.write_config(u64::MAX, &[9, 9]);
    assert_eq!(harness.device.config(), [10, 0, 0, 0, 7, 1, 0, 0]);
    assert_eq!(control.state().actual, 263 * PAGE);
    assert_eq!(control.set_target(u64::MAX).unwrap(), MEMORY_SIZE);
}

#[test]
fn statistics_come_when_the_host_asks_and_not_before() {
    let mut harness = harness();
    let control = harness.device.control();
    let first = stats_buffer(&mut harness, &[(4, 100), (99, 1), (6, 300), (10, 2)]);
    let head = harness.submit(STATISTICS, &[first]);
    harness.settle();
    let expected = BalloonStats {
        free_memory: Some(100),
        available_memory: Some(300),
        oom_kills: Some(2),
        ..BalloonStats::default()
    };
    assert_eq!((control.state().stats, control.state().reports), (expected, 1));
    assert_eq!(harness.rings[usize::from(STATISTICS)].take_used(), None, "the device keeps the buffer");

    assert_eq!(control.request_stats().unwrap(), 1);
    assert_eq!(harness.wait_used(STATISTICS).head, head);
    let second = stats_buffer(&mut harness, &[(5, 50)]);
    harness.submit(STATISTICS, &[second]);
    harness.settle();
    let expected = BalloonStats { total_memory: Some(50), ..BalloonStats::default() };
    assert_eq!((control.state().stats, control.state().reports), (expected, 2));
    assert_eq!(harness.rings[usize::from(STATISTICS)].take_used(), None);
}

#[test]
fn a_question_before_the_first_buffer_is_answered_by_it() {
    let mut harness = harness();
    let control = harness.device.control();
    let before = control.request_stats().unwrap();
    harness.settle();
    let buffer = stats_buffer(&mut harness, &[(0, 1)]);
    harness.submit(STATISTICS, &[buffer]);
    harness.settle();
    assert!(control.state().reports > before);
}

#[test]
fn a_second_statistics_buffer_brings_the_first_one_back() {
    let mut harness = harness();
    let buffer = stats_buffer(&mut harness, &[(0, 1)]);
    let first = harness.submit(STATISTICS, &[buffer]);
    harness.submit(STATISTICS, &[buffer]);
    assert_eq!(harness.wait_used(STATISTICS).head, first);
}

#[test]
fn a_restored_device_goes_on_with_the_target_the_size_and_the_buffer_it_kept() {
    let mut harness = harness();
    harness.device.control().set_target(3 * PAGE).unwrap();
    harness.device.write_config(4, &[2, 0, 0, 0]);
    let buffer = stats_buffer(&mut harness, &[(0, 1)]);
    let head = harness.submit(STATISTICS, &[buffer]);
    harness.settle();
    fill(&harness, FREE, 1);
    let request = harness.readable(&numbers(&[FREE]));
    harness.submit(INFLATE, &[request]);
    let (mut fresh, _) = balloon_harness();
    fresh.reset();
    let listeners = DmaListeners::new(Arc::clone(&harness.memory));
    fresh.device.listeners = listeners;
    harness.replace(fresh.device).unwrap();
    harness.wait_used(INFLATE);
    assert_eq!(resident(&harness, FREE, 1), [false]);
    let control = harness.device.control();
    let state = control.state();
    assert_eq!((state.target, state.actual), (3 * PAGE, 2 * PAGE));
    control.request_stats().unwrap();
    assert_eq!(harness.wait_used(STATISTICS).head, head);
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let state = |target, actual, rings| {
        let resume = Resume { rings: vec![(0, RingPosition::default()); rings], stats: None };
        state::encode(STATE_VERSION, &State { target, actual, resume }).unwrap()
    };
    for bad in [state(1, 0, 0), state(0, 1, 0), state(MEMORY_SIZE + PAGE, 0, 0), state(0, 0, 6)] {
        let mut harness = harness();
        assert!(matches!(harness.device.restore(&bad), Err(DeviceError::InvalidState(_))));
    }
}

#[test]
fn a_kept_buffer_that_the_ring_cannot_have_is_an_error_of_that_device_only() {
    let mut harness = harness();
    harness.reset();
    let resume = Resume { rings: Vec::new(), stats: Some(40_000) };
    harness.device.restore(&state::encode(STATE_VERSION, &State { target: 0, actual: 0, resume }).unwrap()).unwrap();
    harness.activate().unwrap();
    harness.device.control().request_stats().unwrap();
    assert!(matches!(harness.try_settle(9), Err(DeviceError::Ring(_))));
}

#[test]
fn a_reset_balloon_is_empty_and_works_again() {
    let mut harness = harness();
    harness.device.write_config(4, &[2, 0, 0, 0]);
    harness.reset();
    assert_eq!(harness.events.watched(), 0);
    let state = harness.device.control().state();
    assert_eq!((state.actual, state.driver), (0, false));
    harness.activate().unwrap();
    fill(&harness, FREE, 1);
    inflate_pages(&mut harness, &[FREE]);
    assert_eq!(resident(&harness, FREE, 1), [false]);
}

#[rstest]
#[case::all(STATS | REPORTING, [Some(Role::Stats), Some(Role::Reporting), Some(Role::Reporting)])]
#[case::no_statistics(REPORTING, [Some(Role::Reporting); 3])]
#[case::statistics_only(STATS, [Some(Role::Stats), None, None])]
#[case::neither(0, [None; 3])]
fn queues_have_the_roles_that_the_agreed_features_give_them(#[case] features: u64, #[case] roles: [Option<Role>; 3]) {
    assert_eq!([0, 1].map(|index| role(index, features)), [Some(Role::Inflate), Some(Role::Deflate)]);
    assert_eq!([2, 3, 4].map(|index| role(index, features)), roles);
    assert_eq!(role(5, features), None);
}
