//! Frames that the host kernel moves, where it can.

use super::tap::{ETHER_TYPE, PEER, Stack, ethernet, in_namespace, incoming, mark, open_with};
use super::*;

/// Runs `test` in a new network namespace of a host that has vhost-net; says why not elsewhere.
fn with_vhost(test: impl FnOnce() + Send + 'static) {
    match crate::virtio::net::vhost::probe() {
        Ok(()) => in_namespace(test),
        Err(error) => eprintln!("skipped: {}: {error}", crate::virtio::net::vhost::DEVICE),
    }
}

fn out(harness: &mut Harness<Net>, queue: u16, stack: &Stack, seed: u8) {
    let frame = ethernet(PEER, CARD_ADDRESS, ETHER_TYPE, &[seed; 100]);
    send(harness, queue, &[&[0; HEADER_LENGTH][..], &frame].concat());
    assert_eq!(stack.receive()[10..], frame);
}

fn into(harness: &mut Harness<Net>, buffers: &[(u16, Segment)], stack: &Stack, seed: u8) {
    let frame = ethernet(CARD_ADDRESS, PEER, [0x88, 0xb6], &[seed; 1400]);
    stack.send(&[&[0; 10][..], &frame].concat());
    stack.send(&mark());
    let frames = incoming(harness, buffers);
    assert_eq!(frames.iter().map(|frame| &frame[12..]).collect::<Vec<_>>(), [frame]);
}

#[test]
fn without_vhost_a_card_that_must_have_it_is_refused_with_the_module_to_load() {
    if crate::virtio::net::vhost::probe().is_ok() {
        eprintln!("skipped: this host has vhost-net");
        return;
    }
    let Err(error) = Net::open(&NetConfig { vhost: VhostMode::On, ..NetConfig::new("card0") }) else {
        panic!("a card");
    };
    assert!(error.to_string().contains("modprobe vhost_net"), "{error}");
}

#[test]
fn the_kernel_moves_frames_both_ways_and_is_asked_for_nothing_when_idle() {
    with_vhost(|| {
        let mut harness = Harness::new(open_with(1, VhostMode::On));
        let stack = Stack::new();
        out(&mut harness, TX, &stack, 1);
        let buffers = give(&mut harness, RX, 64, 1536);
        into(&mut harness, &buffers, &stack, 2);
        harness.settle();
        assert_eq!(harness.round(std::time::Instant::now()).unwrap(), 0);
    });
}

#[test]
fn a_card_goes_on_from_the_kernel_to_the_thread_and_back() {
    with_vhost(|| {
        let mut harness = Harness::new(open_with(1, VhostMode::On));
        let mut stack = Stack::new();
        let buffers = give(&mut harness, RX, 64, 1536);
        for (seed, vhost) in (0..).step_by(4).zip([VhostMode::Off, VhostMode::On, VhostMode::Auto]) {
            out(&mut harness, TX, &stack, seed);
            into(&mut harness, &buffers, &stack, seed + 1);
            // A saved card that is not replaced goes on as well.
            harness.device.save().unwrap();
            out(&mut harness, TX, &stack, seed + 2);
            into(&mut harness, &buffers, &stack, seed + 3);
            let (placeholder, _wires) = card(1);
            harness.replace(placeholder).unwrap();
            harness.replace(open_with(1, vhost)).unwrap();
            stack = Stack::new();
        }
        out(&mut harness, TX, &stack, 99);
        into(&mut harness, &buffers, &stack, 98);
    });
}

#[test]
fn pairs_join_and_leave_and_the_cable_is_pulled_and_plugged() {
    with_vhost(|| {
        let mut harness = Harness::new(open_with(2, VhostMode::On));
        let stack = Stack::new();
        let link = harness.device.link();
        assert!(control::command(&mut harness, &[4, 0, 2, 0]));
        out(&mut harness, 1, &stack, 1);
        out(&mut harness, 3, &stack, 2);
        assert!(control::command(&mut harness, &[4, 0, 1, 0]));
        out(&mut harness, 1, &stack, 3);
        link.set_link(false).unwrap();
        harness.settle();
        assert_eq!(harness.device.config()[6], 0);
        let held =
            harness.readable(&[&[0; HEADER_LENGTH][..], &ethernet(PEER, CARD_ADDRESS, ETHER_TYPE, &[4; 60])].concat());
        harness.submit(1, &[held]);
        link.set_link(true).unwrap();
        harness.wait_used(1);
        assert_eq!(stack.receive()[10 + 14], 4);
        let buffers = give(&mut harness, RX, 64, 1536);
        into(&mut harness, &buffers, &stack, 5);
    });
}
