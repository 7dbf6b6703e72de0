//! Tests of the network card as its driver, with sockets or real taps as the host.
#![expect(clippy::cast_possible_truncation, reason = "small numbers of tests")]

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::*;
use crate::virtio::testing::wire::{CARD_ADDRESS, CARD_MTU, Wire, card};
use crate::virtio::testing::{Harness, Segment, Used};

mod control;
mod hostile;
mod restore;
mod tap;
mod vhost;

/// Rings of the first pair.
const RX: u16 = 0;
const TX: u16 = 1;

/// A frame behind an empty header, its bytes told apart by `seed`.
fn frame(length: usize, seed: u8) -> Vec<u8> {
    let body = (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed));
    [0; HEADER_LENGTH].into_iter().chain(body).collect()
}

/// What the driver finds in the buffers of one frame: `num_buffers` of its header, and the bytes behind that.
fn received(harness: &mut Harness<Net>, queue: u16, buffers: &[(u16, Segment)]) -> (u16, Vec<u8>) {
    let used = harness.wait_used(queue);
    let mut bytes = written(harness, used, buffers);
    let count = u16::from_le_bytes([bytes[10], bytes[11]]);
    for _ in 1..count {
        let used = harness.rings[usize::from(queue)].take_used().expect("all buffers of a frame come at once");
        bytes.extend(written(harness, used, buffers));
    }
    (count, bytes.split_off(HEADER_LENGTH))
}

fn written(harness: &Harness<Net>, used: Used, buffers: &[(u16, Segment)]) -> Vec<u8> {
    let (_, segment) = buffers.iter().find(|(head, _)| *head == used.head).expect("a buffer that was given");
    let mut bytes = harness.bytes(*segment);
    bytes.truncate(used.written as usize);
    bytes
}

/// Gives the device `count` receive buffers of `length` bytes.
fn give(harness: &mut Harness<Net>, queue: u16, count: usize, length: u32) -> Vec<(u16, Segment)> {
    (0..count)
        .map(|_| {
            let segment = harness.writable(length);
            (harness.submit(queue, &[segment]), segment)
        })
        .collect()
}

/// Has the device send `frame`, its header and its body in two buffers.
fn send(harness: &mut Harness<Net>, queue: u16, frame: &[u8]) {
    let (header, body) = frame.split_at(HEADER_LENGTH);
    let segments = [harness.readable(header), harness.readable(body)];
    harness.request(queue, &segments);
}

fn one_card() -> (Harness<Net>, Wire) {
    let (net, mut wires) = card(1);
    (Harness::new(net), wires.remove(0))
}

#[test]
fn a_frame_goes_out_as_the_driver_wrote_it() {
    let (mut harness, wire) = one_card();
    for length in [14, 60, 1514, 65_535] {
        let frame = frame(length, 1);
        send(&mut harness, TX, &frame);
        assert_eq!(wire.receive().as_ref(), Some(&frame), "{length}");
    }
}

#[test]
fn a_frame_comes_in_behind_a_header_that_counts_its_buffers() {
    let (mut harness, wire) = one_card();
    let buffers = give(&mut harness, RX, 60, 1536);
    for (length, count) in [(60, 1), (1514, 1), (1524, 1), (1525, 2), (65_535, 43)] {
        let frame = frame(length, 2);
        assert!(wire.send(&frame));
        let (counted, body) = received(&mut harness, RX, &buffers);
        assert_eq!((counted, body == frame[HEADER_LENGTH..]), (count, true), "{length}");
    }
}

#[test]
fn a_frame_waits_for_the_buffers_that_it_needs() {
    let (mut harness, wire) = one_card();
    let mut buffers = give(&mut harness, RX, 1, 512);
    let frame = frame(1500, 3);
    assert!(wire.send(&frame));
    harness.settle();
    assert_eq!(harness.rings[0].used_index(), 0);
    buffers.extend(give(&mut harness, RX, 2, 512));
    let (count, body) = received(&mut harness, RX, &buffers);
    assert_eq!((count, body == frame[HEADER_LENGTH..]), (3, true));
}

#[test]
fn a_driver_without_merging_gets_what_fits_into_one_buffer_and_nothing_of_the_rest() {
    let (net, wires) = card(1);
    let mut harness = Harness::without_features(net, 1 << VIRTIO_NET_F_MRG_RXBUF);
    let buffers = give(&mut harness, RX, 3, 1526);
    assert!(wires[0].send(&frame(1515, 4)));
    assert!(wires[0].send(&frame(1514, 5)));
    let (count, body) = received(&mut harness, RX, &buffers);
    assert_eq!((count, &body[..]), (1, &frame(1514, 5)[HEADER_LENGTH..]));
    // One buffer that takes the longest frame is read into without a copy.
    let large = give(&mut harness, RX, 1, 65_700);
    let _small = [received_after(&mut harness, &wires[0], &buffers), received_after(&mut harness, &wires[0], &buffers)];
    assert!(wires[0].send(&frame(60_000, 6)));
    assert_eq!(received(&mut harness, RX, &large).1, &frame(60_000, 6)[HEADER_LENGTH..]);
}

fn received_after(harness: &mut Harness<Net>, wire: &Wire, buffers: &[(u16, Segment)]) -> (u16, Vec<u8>) {
    assert!(wire.send(&frame(100, 9)));
    received(harness, RX, buffers)
}

#[test]
fn an_idle_card_has_nothing_to_do_whatever_waits_on_either_side() {
    let (mut harness, wire) = one_card();
    harness.settle();
    // Frames, and no buffers.
    while wire.send(&frame(100, 7)) {}
    harness.settle();
    assert_eq!(harness.round(std::time::Instant::now()).unwrap(), 0);
    // Buffers, and no frames.
    let (mut harness, _wire) = one_card();
    give(&mut harness, RX, 16, 1536);
    harness.settle();
    assert_eq!(harness.round(std::time::Instant::now()).unwrap(), 0);
}

#[test]
fn a_driver_that_sends_faster_than_the_host_reads_loses_nothing() {
    let (mut harness, wire) = one_card();
    let mut sent = 0_u8;
    // The driver's ring takes 256 frames of one buffer each; the socket queues fewer or more than that.
    let total = 200;
    for seed in 0..total {
        let segment = harness.readable(&frame(100, seed));
        harness.submit(TX, &[segment]);
    }
    harness.run_until(|harness| {
        harness.settle();
        while let Some(bytes) = wire.receive() {
            assert_eq!(bytes, frame(100, sent));
            sent += 1;
        }
        sent == total
    });
    harness.settle();
    assert_eq!(harness.rings[1].used_index(), u16::from(total));
}

#[test]
fn one_interrupt_tells_of_a_whole_batch() {
    let (net, wires) = card(1);
    let mut harness = Harness::without_event_index(net);
    let buffers = give(&mut harness, RX, 8, 1536);
    harness.settle();
    let before = harness.interrupt.queue(RX);
    for seed in 0..4 {
        assert!(wires[0].send(&frame(100, seed)));
    }
    harness.settle();
    for seed in 0..4 {
        assert_eq!(received(&mut harness, RX, &buffers).1, &frame(100, seed)[HEADER_LENGTH..]);
    }
    assert_eq!(harness.interrupt.queue(RX) - before, 1);
}

#[test]
fn what_is_too_short_or_too_long_for_a_frame_is_given_back_unsent() {
    let (mut harness, wire) = one_card();
    for length in [1, 13, FRAME_MAX] {
        send(&mut harness, TX, &frame(length, 8));
    }
    let header_alone = [harness.readable(&[0; HEADER_LENGTH - 1])];
    harness.request(TX, &header_alone);
    let nothing_readable = [harness.writable(100)];
    harness.request(TX, &nothing_readable);
    send(&mut harness, TX, &frame(14, 8));
    assert_eq!(wire.receive(), Some(frame(14, 8)));
    assert_eq!(wire.receive(), None);
}

#[test]
fn the_configuration_says_address_status_pairs_and_mtu() {
    let (net, _wires) = card(3);
    let mut expected = CARD_ADDRESS.to_vec();
    expected.extend([1, 0, 3, 0]);
    expected.extend(CARD_MTU.to_le_bytes());
    assert_eq!(net.config(), expected);
    for feature in [VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ] {
        assert!(net.features() & (1 << feature) != 0, "{feature}");
    }
    let (single, _wires) = card(1);
    assert_eq!(single.features() & (1 << VIRTIO_NET_F_MQ), 0);
}

#[test]
fn a_pulled_cable_stops_the_frames_and_a_plugged_one_lets_new_ones_pass() {
    let (mut harness, wire) = one_card();
    let link = harness.device.link();
    let buffers = give(&mut harness, RX, 8, 1536);
    harness.settle();
    link.set_link(false).unwrap();
    harness.settle();
    assert_eq!((harness.device.config()[6], harness.config_changes), (0, 1));
    assert_eq!(wire.told().carrier, Some(false));
    send(&mut harness, TX, &frame(100, 1));
    assert!(wire.send(&frame(100, 2)));
    harness.settle();
    assert_eq!((wire.receive(), harness.rings[0].used_index()), (None, 0));

    link.set_link(true).unwrap();
    harness.settle();
    assert_eq!((harness.device.config()[6], harness.config_changes), (1, 2));
    assert_eq!(wire.told().carrier, Some(true));
    // The frame of the time without a cable is gone.
    assert!(wire.send(&frame(100, 3)));
    assert_eq!(received(&mut harness, RX, &buffers).1, &frame(100, 3)[HEADER_LENGTH..]);
    send(&mut harness, TX, &frame(100, 4));
    assert_eq!(wire.receive(), Some(frame(100, 4)));
}

#[test]
fn a_reset_card_starts_again_with_its_own_address_and_one_pair() {
    let (net, wires) = card(2);
    let mut harness = Harness::new(net);
    assert!(control::command(&mut harness, &[1, 1, 2, 9, 9, 9, 9, 9]));
    assert!(control::command(&mut harness, &[4, 0, 2, 0]));
    assert_eq!(harness.device.config()[..6], [2, 9, 9, 9, 9, 9]);
    assert!(!wires[1].told().disabled);
    harness.reset();
    assert_eq!(harness.events.watched(), 0);
    assert_eq!(harness.device.config()[..6], CARD_ADDRESS);
    assert!(wires[1].told().disabled);
    assert_eq!(wires[0].told().offloads, Offloads::default());
    harness.activate().unwrap();
    let buffers = give(&mut harness, RX, 1, 70_000);
    assert!(wires[0].send(&frame(100, 1)));
    assert_eq!(received(&mut harness, RX, &buffers).1, &frame(100, 1)[HEADER_LENGTH..]);
}
