//! Guests and programs of the host that break the protocol.

use super::*;
use crate::virtio::vsock::muxer::MAX_CONNECTIONS;

#[test]
fn more_data_than_the_guest_has_credit_for_ends_the_connection() {
    let mut guest = Guest::new(8);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    let mut sent = 0;
    loop {
        guest.send_data(PORTS, &[9; 64 << 10]);
        guest.collect(true);
        guest.inbox.retain(|packet| packet.operation() == Operation::Reset);
        sent += 64 << 10;
        if let Some(packet) = guest.inbox.pop_front() {
            assert_eq!(packet.ports(), PORTS);
            break;
        }
        assert!(sent < 4 << 20, "the device takes more than it has room for");
    }
    // What it had accepted is still delivered.
    let arrived = guest.read_host(&mut stream, sent);
    assert_eq!(arrived.len(), sent - (64 << 10));
}

#[test]
fn packets_between_strangers_are_dropped() {
    let mut guest = Guest::new(4);
    let _listener = guest.listen(PORTS.host);
    let request = guest.header(PORTS, Operation::Request);
    guest.send_raw(Header { destination_cid: 3, ..request }, &[]);
    guest.send_raw(Header { source_cid: CID + 1, ..request }, &[]);
    guest.expect_nothing();
}

#[test]
fn unknown_operations_and_socket_types_are_refused() {
    let mut guest = Guest::new(4);
    let _listener = guest.listen(PORTS.host);
    let request = guest.header(PORTS, Operation::Request);
    for header in [
        Header { kind: 2, ..request },
        Header { kind: 0, ..request },
        Header { operation: 0, ..request },
        Header { operation: 8, ..request },
        Header { operation: u16::MAX, ..request },
    ] {
        guest.send_raw(header, &[]);
        guest.expect(Operation::Reset);
    }
}

#[test]
fn operations_that_do_not_fit_the_state_end_the_connection() {
    for operation in [Operation::Request, Operation::Response] {
        let mut guest = Guest::new(4);
        let listener = guest.listen(PORTS.host);
        let mut stream = guest.dial(&listener, PORTS);
        guest.send(PORTS, operation);
        guest.expect(Operation::Reset);
        guest.expect_host_end(&mut stream);
    }
    for operation in [Operation::Data, Operation::Shutdown, Operation::CreditRequest, Operation::Request] {
        let mut guest = Guest::new(4);
        let mut stream = guest.knock(9);
        let ports = guest.expect(Operation::Request).ports();
        guest.send(ports, operation);
        guest.expect(Operation::Reset);
        guest.expect_host_end(&mut stream);
    }
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let _stream = guest.dial(&listener, PORTS);
    guest.send_shutdown(PORTS, NO_SEND);
    guest.send_data(PORTS, b"after the end");
    guest.expect(Operation::Reset);
}

#[test]
fn a_guest_that_claims_to_have_read_more_than_it_got_gets_nothing() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    guest.forwarded = 1_000_000;
    guest.send(PORTS, Operation::CreditUpdate);
    stream.write_all(b"no").unwrap();
    guest.expect_nothing();
}

#[test]
fn packets_without_a_whole_header_or_payload_are_protocol_errors() {
    let whole = Guest::new(0).header(PORTS, Operation::Data);
    let cases: [(Header, usize); 3] = [
        (whole, HEADER_LENGTH - 1),
        (Header { length: 1, ..whole }, HEADER_LENGTH),
        (Header { length: u32::MAX, ..whole }, HEADER_LENGTH),
    ];
    for (header, length) in cases {
        let mut guest = Guest::new(0);
        let packet = guest.harness.readable(&header.to_bytes()[..length]);
        guest.harness.submit(1, &[packet]);
        assert!(matches!(guest.harness.try_settle(9), Err(DeviceError::Protocol(_))));
    }
}

#[test]
fn a_receive_buffer_without_room_for_payload_is_a_protocol_error() {
    for length in [43, 44] {
        let mut guest = Guest::new(0);
        let buffer = guest.harness.writable(length);
        guest.harness.submit(0, &[buffer]);
        let header = guest.header(PORTS, Operation::Data).to_bytes();
        let packet = guest.harness.readable(&header);
        guest.harness.submit(1, &[packet]);
        assert!(matches!(guest.harness.try_settle(9), Err(DeviceError::Protocol(_))));
    }
}

#[test]
fn a_guest_that_takes_no_packets_cannot_make_the_device_keep_more_and_more_of_them() {
    let mut guest = Guest::new(0);
    let _listener = guest.listen(PORTS.host);
    let head = Descriptor { address: guest.send_space.0, length: HEADER, flags: 0, next: 0 };
    let mut taken = 0;
    for port in 0..100_000_u32 {
        let header = guest.header(Ports { host: 1, guest: port }, Operation::Request);
        guest.harness.memory.write_slice(&header.to_bytes(), guest.send_space).unwrap();
        guest.harness.rings[1].write_descriptor(0, head);
        guest.harness.rings[1].make_available(0);
        guest.harness.kick(1);
        guest.harness.settle();
        if usize::from(guest.harness.rings[1].used_index()) == taken {
            break;
        }
        taken += 1;
    }
    assert!((100..1000).contains(&taken), "{taken} refusals are kept");
    // It goes on once the guest takes them.
    for _ in 0..8 {
        let buffer = guest.harness.writable(45);
        guest.post(buffer);
    }
    for _ in 0..=taken {
        guest.expect(Operation::Reset);
    }
    guest.expect_nothing();
}

#[test]
fn opening_and_resetting_again_and_again_leaves_nothing_behind() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let watched = guest.harness.events.watched();
    for _ in 0..2000 {
        guest.send(PORTS, Operation::Request);
        drop(listener.accept().unwrap());
        guest.send(PORTS, Operation::Reset);
    }
    assert_eq!(guest.harness.events.watched(), watched);
    guest.harness.settle();
    let buffer = guest.harness.writable(4096);
    guest.post(buffer);
    guest.expect_nothing();
}

#[test]
fn connections_above_the_limit_are_refused_on_both_sides_and_greetings_make_room() {
    // Each connection here has two ends in this process.
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    assert!(hard > 4096, "this test needs 4096 descriptors, ulimit -n allows {hard}");
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard).unwrap();

    let mut guest = Guest::new(16);
    let listener = guest.listen(PORTS.host);
    let mut streams = Vec::new();
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        streams.push(guest.dial(&listener, Ports { guest: port, ..PORTS }));
    }
    let one_more = Ports { guest: u32::MAX, ..PORTS };
    guest.send(one_more, Operation::Request);
    assert_eq!(guest.expect(Operation::Reset).ports(), one_more);
    let mut refused = UnixStream::connect(guest.directory.path().join("vsock")).unwrap();
    refused.set_nonblocking(true).unwrap();
    guest.expect_host_end(&mut refused);
    drop(streams.pop());
    guest.expect(Operation::Shutdown);
    guest.send_shutdown(Ports { guest: 1023, ..PORTS }, NO_SEND | NO_RECEIVE);
    guest.expect(Operation::Reset);
    let _stream = guest.dial(&listener, one_more);

    let mut guest = Guest::new(4);
    let path = guest.directory.path().join("vsock");
    let mut idle = UnixStream::connect(&path).unwrap();
    idle.set_nonblocking(true).unwrap();
    guest.harness.settle();
    let _others = (0..64).map(|_| UnixStream::connect(&path).unwrap()).collect::<Vec<_>>();
    guest.expect_host_end(&mut idle);
    let _knock = guest.knock(5);
    guest.expect(Operation::Request);
}
