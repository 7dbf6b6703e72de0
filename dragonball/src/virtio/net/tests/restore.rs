//! Save and restore, in the middle of frames.

use super::*;

#[test]
fn a_restored_card_goes_on_where_the_saved_one_was() {
    let (net, _old) = card(2);
    let mut harness = Harness::new(net);
    assert!(control::command(&mut harness, &[4, 0, 2, 0]));
    assert!(control::command(&mut harness, &[1, 1, 2, 8, 8, 8, 8, 8]));
    assert!(control::command(&mut harness, &[0, 0, 0]));
    // Buffers that the old card has taken from the ring already, and frames that it has no time for.
    let buffers = give(&mut harness, RX, 60, 1536);
    let more = give(&mut harness, 2, 4, 1536);
    harness.settle();
    let (net, wires) = card(2);
    harness.replace(net).unwrap();
    assert_eq!(harness.device.config()[..6], [2, 8, 8, 8, 8, 8]);
    assert!(!wires[1].told().disabled);
    assert_eq!(wires[0].told().filter.unwrap().addresses, [[2, 8, 8, 8, 8, 8]]);
    for seed in 0..3 {
        assert!(wires[0].send(&frame(1600, seed)));
        let (count, body) = received(&mut harness, RX, &buffers);
        assert_eq!((count, body == frame(1600, seed)[HEADER_LENGTH..]), (2, true));
    }
    assert!(wires[1].send(&frame(80, 7)));
    assert_eq!(received(&mut harness, 2, &more).1, &frame(80, 7)[HEADER_LENGTH..]);
    send(&mut harness, TX, &frame(90, 1));
    assert_eq!(wires[0].receive(), Some(frame(90, 1)));
}

#[test]
fn frames_that_the_host_had_no_room_for_are_sent_by_the_restored_card() {
    let (net, _full) = card(1);
    let mut harness = Harness::new(net);
    let total = 250_u8;
    for seed in 0..total {
        let segment = harness.readable(&frame(60, seed));
        harness.submit(TX, &[segment]);
    }
    harness.settle();
    let taken = harness.rings[1].used_index() as u8;
    let (net, wires) = card(1);
    harness.replace(net).unwrap();
    let mut next = taken;
    harness.run_until(|harness| {
        harness.settle();
        while let Some(bytes) = wires[0].receive() {
            assert_eq!(bytes, frame(60, next));
            next += 1;
        }
        harness.settle();
        harness.rings[1].used_index() == u16::from(total)
    });
    while let Some(bytes) = wires[0].receive() {
        assert_eq!(bytes, frame(60, next));
        next += 1;
    }
    assert_eq!(next, total);
}

#[test]
fn a_state_that_no_card_can_have_saved_is_refused() {
    let driver = || DriverSettings::new(CARD_ADDRESS);
    let resume = |pairs| Some(Resume { rings: Vec::new(), pairs, offloads: 0 });
    let many = vec![(0, RingPosition::default()); 4];
    let long = vec![[2; 6]; TABLE_MAX + 1];
    for state in [
        State { driver: driver(), resume: resume(2) },
        State { driver: driver(), resume: Some(Resume { rings: many, pairs: 1, offloads: 0 }) },
        State { driver: DriverSettings::new([1; 6]), resume: None },
        State { driver: DriverSettings { unicast: Some(long), ..driver() }, resume: None },
    ] {
        let saved = state::encode(STATE_VERSION, &state).unwrap();
        let (mut net, _wires) = card(1);
        assert!(matches!(net.restore(&saved), Err(DeviceError::InvalidState(_))));
        assert_eq!(net.config()[..6], CARD_ADDRESS);
    }
    let (mut net, _wires) = card(1);
    assert!(net.restore(&SavedState { version: 9, data: Vec::new() }).is_err());
    let mut harness = Harness::new(net);
    let saved = harness.device.save().unwrap();
    assert!(matches!(harness.device.restore(&saved), Err(DeviceError::InvalidState(_))));
}
