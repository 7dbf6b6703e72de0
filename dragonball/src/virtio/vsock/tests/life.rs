//! How connections end, and what a reset, a saved and a restored device make of them.

use super::*;

#[test]
fn a_guest_that_sends_no_more_can_still_receive() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    guest.send_data(PORTS, b"last words");
    guest.send_shutdown(PORTS, NO_SEND);
    assert_eq!(guest.read_host(&mut stream, 100), b"last words");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(Operation::Data).payload, b"answer");
    drop(stream);
    assert_eq!(guest.expect(Operation::Shutdown).header.flags, NO_SEND | NO_RECEIVE);
    guest.expect_nothing();
    guest.send_shutdown(PORTS, NO_SEND | NO_RECEIVE);
    guest.expect(Operation::Reset);
}

#[test]
fn a_host_that_sends_no_more_can_still_receive_until_it_hangs_up() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Operation::Data).payload, b"last words");
    assert_eq!(guest.expect(Operation::Shutdown).header.flags, NO_SEND);
    guest.expect_nothing();
    guest.send_data(PORTS, b"answer");
    assert_eq!(guest.read_host(&mut stream, 6), b"answer");
    drop(stream);
    assert_eq!(guest.expect(Operation::Shutdown).header.flags, NO_SEND | NO_RECEIVE);
    guest.expect_nothing();
}

#[test]
fn a_guest_that_receives_no_more_makes_the_hosts_writes_fail() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    guest.send_shutdown(PORTS, NO_RECEIVE);
    guest.harness.settle();
    assert_eq!(stream.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.send_data(PORTS, b"still here");
    assert_eq!(guest.read_host(&mut stream, 10), b"still here");
}

#[test]
fn a_host_that_reads_no_more_is_told_to_the_guest_and_its_own_bytes_still_arrive() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    stream.shutdown(Shutdown::Read).unwrap();
    guest.send_data(PORTS, b"into the void");
    assert_eq!(guest.expect(Operation::Shutdown).header.flags, NO_RECEIVE);
    guest.send_data(PORTS, b"a packet that was on its way");
    stream.write_all(b"still here").unwrap();
    assert_eq!(guest.expect(Operation::Data).payload, b"still here");
}

#[test]
fn a_guest_that_closes_is_answered_and_what_it_sent_still_reaches_a_slow_host() {
    for abrupt in [false, true] {
        let mut guest = Guest::new(4);
        let listener = guest.listen(PORTS.host);
        let mut stream = guest.dial(&listener, PORTS);
        let data = vec![3; 64 << 10];
        for _ in 0..4 {
            guest.send_data(PORTS, &data);
        }
        if abrupt {
            // Linux gives up waiting for the host to take the rest after 8 seconds (`VSOCK_CLOSE_TIMEOUT`).
            guest.send(PORTS, Operation::Reset);
        } else {
            guest.send_shutdown(PORTS, NO_SEND | NO_RECEIVE);
            assert_eq!(guest.expect_after_updates(Operation::Reset).ports(), PORTS);
        }
        guest.drop_updates();
        // The ports are free again while the rest is still being written.
        let mut second = guest.dial(&listener, PORTS);
        guest.send_data(PORTS, b"second");
        assert_eq!(guest.read_host(&mut second, 6), b"second");
        assert!(guest.read_host(&mut stream, 256 << 10) == vec![3; 256 << 10]);
        guest.expect_host_end(&mut stream);
        guest.expect_nothing();
    }
}

#[test]
fn a_host_that_goes_away_while_the_rest_is_written_leaves_nothing_behind() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let idle = guest.harness.events.watched();
    let stream = guest.dial(&listener, PORTS);
    for _ in 0..4 {
        guest.send_data(PORTS, &[3; 64 << 10]);
    }
    guest.send_shutdown(PORTS, NO_SEND | NO_RECEIVE);
    guest.expect_after_updates(Operation::Reset);
    drop(stream);
    guest.harness.settle();
    assert_eq!(guest.harness.events.watched(), idle);
    assert_eq!(guest.harness.device.buffered_bytes(), 0);
}

#[test]
fn a_packet_for_no_connection_is_answered_with_a_reset_and_a_reset_with_nothing() {
    let mut guest = Guest::new(4);
    for operation in [Operation::Data, Operation::Shutdown, Operation::CreditUpdate, Operation::Response] {
        guest.send(PORTS, operation);
        assert_eq!(guest.expect(Operation::Reset).ports(), PORTS);
    }
    guest.send(PORTS, Operation::Reset);
    guest.expect_nothing();
}

#[test]
fn a_credit_request_is_answered_with_what_the_host_took() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    guest.send_data(PORTS, b"12345");
    guest.read_host(&mut stream, 5);
    guest.send(PORTS, Operation::CreditRequest);
    let update = guest.expect(Operation::CreditUpdate).header;
    assert_eq!((update.buffer_size, update.forwarded), (BUFFER_SIZE, 5));
}

#[test]
fn a_reset_device_ends_all_connections_watches_nothing_and_works_again() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    let mut closed = guest.dial(&listener, Ports { guest: 1, ..PORTS });
    let _greeting = UnixStream::connect(guest.directory.path().join("vsock")).unwrap();
    guest.harness.settle();
    guest.harness.reset();
    guest.posted.clear();
    assert_eq!(guest.harness.events.watched(), 0);
    for stream in [&mut stream, &mut closed] {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    guest.harness.activate().unwrap();
    let buffer = guest.harness.writable(4096);
    guest.post(buffer);
    guest.dial(&listener, PORTS);
}

#[test]
fn a_restored_device_tells_the_guest_that_its_connections_are_gone_and_serves_what_was_not_looked_at() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    let event = guest.harness.writable(4);
    guest.harness.submit(2, &[event]);
    // A request that the saved device did not get to see.
    let other = Ports { guest: 6, ..PORTS };
    let bytes = guest.header(other, Operation::Request).to_bytes();
    guest.harness.memory.write_slice(&bytes, guest.send_space).unwrap();
    let segment = Segment::Readable(guest.send_space, HEADER);
    guest.harness.submit(1, &[segment]);

    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("vsock");
    let clone_listener = UnixListener::bind(elsewhere.path().join("vsock_1024")).unwrap();
    guest.harness.replace(Vsock::new(77, &path).unwrap()).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let used = guest.harness.wait_used(2);
    assert_eq!((used.written, &guest.harness.bytes(event)[..]), (4, &[0; 4][..]));
    // The clone has another context id; the packet is one of its past and goes nowhere.
    guest.harness.wait_used(1);
    clone_listener.set_nonblocking(true).unwrap();
    assert!(clone_listener.accept().is_err());
    assert_eq!(guest.harness.device.config(), 77_u64.to_le_bytes());
}

#[test]
fn the_transport_reset_waits_for_an_event_buffer() {
    let mut guest = Guest::new(1);
    let elsewhere = tempfile::tempdir().unwrap();
    guest.harness.replace(Vsock::new(CID, &elsewhere.path().join("vsock")).unwrap()).unwrap();
    guest.harness.settle();
    let event = guest.harness.writable(4);
    assert_eq!(guest.harness.request(2, &[event]), 4);
    // It is told once.
    guest.harness.submit(2, &[event]);
    guest.harness.settle();
    assert_eq!(guest.harness.rings[2].take_used(), None);
}
