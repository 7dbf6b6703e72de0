//! The control queue: what the driver asks for, and what comes of it.

use rstest::rstest;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

use super::*;
use crate::virtio::net::port::USO;

/// Sends a command to a card whose control queue is its last; true when the card says that it was carried out.
pub(super) fn command(harness: &mut Harness<Net>, bytes: &[u8]) -> bool {
    let queue = harness.rings.len() as u16 - 1;
    command_in(harness, queue, bytes)
}

fn command_in(harness: &mut Harness<Net>, queue: u16, bytes: &[u8]) -> bool {
    let (header, body) = bytes.split_at(bytes.len().min(2));
    let answer = harness.writable(1);
    let segments = [harness.readable(header), harness.readable(body), answer];
    assert_eq!(harness.request(queue, &segments), 1);
    match harness.bytes(answer)[..] {
        [0] => true,
        [1] => false,
        ref other => panic!("{other:?} is no answer"),
    }
}

fn offloads(bits: &[u32]) -> Vec<u8> {
    let bits = bits.iter().fold(0, |all, bit| all | 1_u64 << bit);
    [&[5, 0][..], &bits.to_le_bytes()].concat()
}

fn mac_table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    let mut bytes = vec![1, 0];
    for table in [unicast, multicast] {
        bytes.extend((table.len() as u32).to_le_bytes());
        bytes.extend(table.concat());
    }
    bytes
}

#[test]
fn the_host_gets_the_offloads_that_the_driver_accepts_and_later_asks_for() {
    let (mut harness, wire) = one_card();
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN | USO;
    assert_eq!(wire.told().offloads, Offloads(all));
    assert!(command(&mut harness, &offloads(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4])));
    assert_eq!(wire.told().offloads, Offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4));
    assert!(command(&mut harness, &offloads(&[])));
    assert_eq!(wire.told().offloads, Offloads(0));
    // Not an offload, and not one that was agreed on.
    assert!(!command(&mut harness, &offloads(&[VIRTIO_NET_F_MAC])));
    let (net, wires) = card(1);
    let mut harness = Harness::without_features(net, 1 << VIRTIO_NET_F_GUEST_TSO6);
    assert_eq!(wires[0].told().offloads, Offloads(all & !libc::TUN_F_TSO6));
    assert!(!command(&mut harness, &offloads(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO6])));
}

#[test]
fn only_the_pairs_that_the_driver_uses_take_part_in_the_traffic() {
    let (net, wires) = card(3);
    let mut harness = Harness::new(net);
    let used = |wires: &[Wire]| wires.iter().map(|wire| !wire.told().disabled).collect::<Vec<_>>();
    assert_eq!(used(&wires), [true, false, false]);
    assert!(command(&mut harness, &[4, 0, 3, 0]));
    assert_eq!(used(&wires), [true, true, true]);
    let buffers = give(&mut harness, 4, 4, 1536);
    assert!(wires[2].send(&frame(100, 1)));
    assert_eq!(received(&mut harness, 4, &buffers).1, &frame(100, 1)[HEADER_LENGTH..]);
    send(&mut harness, 3, &frame(100, 2));
    assert_eq!(wires[1].receive(), Some(frame(100, 2)));

    assert!(command(&mut harness, &[4, 0, 2, 0]));
    assert_eq!(used(&wires), [true, true, false]);
    assert!(wires[2].send(&frame(100, 3)));
    harness.settle();
    assert_eq!(harness.rings[4].used_index(), 1);
    for refused in [0, 4, 0x8000_u16] {
        assert!(!command(&mut harness, &[4, 0, refused as u8, (refused >> 8) as u8]), "{refused}");
    }
    assert_eq!(used(&wires), [true, true, false]);
}

#[test]
fn a_driver_that_knows_one_pair_has_its_control_queue_behind_that() {
    let (net, _wires) = card(2);
    let mut harness = Harness::without_features(net, 1 << VIRTIO_NET_F_MQ);
    assert!(command_in(&mut harness, 2, &[0, 0, 1]));
    assert!(!command_in(&mut harness, 2, &[4, 0, 2, 0]));
}

#[test]
fn the_host_filters_what_the_driver_does_not_want() {
    let (mut harness, wire) = one_card();
    let (one, group) = ([2, 0, 0, 0, 0, 7], [1, 0, 0x5e, 0, 0, 1]);
    assert_eq!(wire.told().filter, None);
    assert!(command(&mut harness, &[0, 0, 0]));
    assert_eq!(wire.told().filter, Some(Filter { addresses: vec![CARD_ADDRESS], all_multicast: false }));
    assert!(command(&mut harness, &mac_table(&[one], &[group])));
    let addresses = vec![CARD_ADDRESS, one, group];
    assert_eq!(wire.told().filter, Some(Filter { addresses, all_multicast: false }));
    assert!(command(&mut harness, &[0, 1, 1]));
    assert_eq!(wire.told().filter, Some(Filter { addresses: vec![CARD_ADDRESS, one], all_multicast: true }));
    assert!(command(&mut harness, &[1, 1, 2, 5, 5, 5, 5, 5]));
    assert_eq!(wire.told().filter.unwrap().addresses, [[2, 5, 5, 5, 5, 5], one]);
    // More than are kept stand for all.
    assert!(command(&mut harness, &mac_table(&[], &[group; TABLE_MAX + 1])));
    assert!(wire.told().filter.unwrap().all_multicast);
    assert!(command(&mut harness, &mac_table(&[one; TABLE_MAX + 1], &[])));
    assert_eq!(wire.told().filter, None);
    assert!(command(&mut harness, &mac_table(&[], &[])));
    assert!(wire.told().filter.is_some());
    assert!(command(&mut harness, &[0, 0, 1]));
    assert_eq!(wire.told().filter, None);
}

#[rstest]
#[case::nothing(&[])]
#[case::no_command(&[0])]
#[case::no_value(&[0, 0])]
#[case::long_value(&[0, 0, 1, 1])]
#[case::unknown_mode(&[0, 2, 1])]
#[case::unknown_class(&[9, 0, 0])]
#[case::vlan(&[2, 0, 1, 0])]
#[case::short_pairs(&[4, 0, 1])]
#[case::receive_side_scaling(&[4, 1, 0, 0, 0, 0])]
#[case::short_offloads(&[5, 0, 0, 0, 0, 0])]
#[case::short_address(&[1, 1, 2, 0, 0, 0, 0])]
#[case::group_address(&[1, 1, 3, 0, 0, 0, 0, 1])]
#[case::zero_address(&[1, 1, 0, 0, 0, 0, 0, 0])]
#[case::table_without_addresses(&[1, 0, 1, 0, 0, 0, 0, 0, 0, 0])]
#[case::endless_table(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0])]
#[case::one_table(&[1, 0, 0, 0, 0, 0])]
#[case::behind_the_tables(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7])]
fn what_is_no_command_is_refused_and_changes_nothing(#[case] bytes: &[u8]) {
    let (net, wires) = card(2);
    let mut harness = Harness::new(net);
    let before = (wires[0].told(), wires[1].told(), harness.device.config());
    assert!(!command(&mut harness, bytes));
    assert_eq!((wires[0].told(), wires[1].told(), harness.device.config()), before);
}

#[test]
fn a_command_without_room_for_an_answer_is_given_back() {
    let (mut harness, _wire) = one_card();
    let segments = [harness.readable(&[0, 0, 1])];
    assert_eq!(harness.request(2, &segments), 0);
}
