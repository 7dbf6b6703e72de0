//! Much data: it arrives whole whatever the reader does, and waiting costs nothing.

use std::sync::LazyLock;

use rstest::rstest;

use super::*;

const AMOUNT: usize = 64 << 20;

/// The longest piece that [`pattern`] gives.
const PIECE: usize = 1 << 20;
/// After how many bytes the pattern begins anew: no multiple of any buffer's size.
const PERIOD: usize = 1_000_003;
static PATTERN: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..PERIOD + PIECE).map(|at| at % PERIOD).map(|at| (at ^ (at >> 8)).to_le_bytes()[0]).collect());

/// Bytes of which a lost, doubled or moved piece shows.
fn pattern(from: usize, length: usize) -> &'static [u8] {
    let start = from % PERIOD;
    &PATTERN[start..start + length]
}

/// The guest's account of what it may still send.
#[derive(Default)]
struct Account {
    sent: u32,
    room: u32,
    forwarded: u32,
}

impl Account {
    fn take(&mut self, header: &Header) {
        (self.room, self.forwarded) = (header.buffer_size, header.forwarded);
    }

    fn credit(&self) -> usize {
        (self.room - (self.sent.wrapping_sub(self.forwarded))) as usize
    }
}

#[rstest]
#[case::with_event_index(Harness::new)]
#[case::without_event_index(Harness::without_event_index)]
fn what_the_guest_sends_arrives_whole_with_a_slow_reader(#[case] harness: fn(Vsock) -> Harness<Vsock>) {
    let mut guest = Guest::with_harness(8, harness);
    let listener = guest.listen(PORTS.host);
    guest.send(PORTS, Operation::Request);
    let mut account = Account::default();
    account.take(&guest.expect(Operation::Response).header);
    let mut stream = listener.accept().unwrap().0;
    stream.set_nonblocking(true).unwrap();

    let (mut sent, mut seen) = (0, 0);
    let mut chunk = vec![0; 100_000];
    while seen < AMOUNT {
        guest.collect(true);
        while let Some(packet) = guest.inbox.pop_front() {
            assert_eq!(packet.operation(), Operation::CreditUpdate);
            account.take(&packet.header);
        }
        let length = account.credit().min(64 << 10).min(AMOUNT - sent);
        if length > 0 {
            guest.send_data(PORTS, pattern(sent, length));
            account.sent = account.sent.wrapping_add(u32::try_from(length).unwrap());
            sent += length;
            continue;
        }
        // The guest is out of credit: the device has nothing to do until the host reads.
        guest.harness.settle();
        match stream.read(&mut chunk) {
            Ok(count) => {
                assert!(chunk[..count] == *pattern(seen, count), "wrong bytes after {seen}");
                seen += count;
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        guest.harness.settle();
    }
    assert_eq!(sent, AMOUNT);
}

#[rstest]
#[case::with_event_index(Harness::new)]
#[case::without_event_index(Harness::without_event_index)]
fn what_the_host_sends_arrives_whole_with_a_slow_reader(#[case] harness: fn(Vsock) -> Harness<Vsock>) {
    let mut guest = Guest::with_harness(3, harness);
    guest.buffer_size = 100_000;
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);

    let (mut sent, mut seen) = (0, 0);
    let mut data: &[u8] = &[];
    while seen < AMOUNT {
        if data.is_empty() {
            data = pattern(sent, PIECE.min(AMOUNT - sent));
        }
        match stream.write(data) {
            Ok(count) => {
                data = &data[count..];
                sent += count;
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        guest.harness.settle();
        guest.collect(true);
        let mut asked = false;
        while let Some(packet) = guest.inbox.pop_front() {
            match packet.operation() {
                Operation::Data => {
                    assert!(packet.payload == pattern(seen, packet.payload.len()), "wrong bytes after {seen}");
                    seen += packet.payload.len();
                }
                Operation::CreditRequest => asked = true,
                other => panic!("{other:?}"),
            }
        }
        // The guest's program reads only once the guest's buffer is full.
        assert!(seen - guest.forwarded as usize <= 100_000, "the device sent more than the guest has room for");
        if asked {
            guest.forwarded = u32::try_from(seen).unwrap();
            guest.send(PORTS, Operation::CreditUpdate);
        }
    }
    assert_eq!(sent, AMOUNT);
}

#[test]
fn a_guest_without_credit_or_without_buffers_leaves_the_device_quiet() {
    let mut guest = Guest::new(1);
    guest.buffer_size = 10;
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    stream.write_all(&[7; 100]).unwrap();
    assert_eq!(guest.expect(Operation::Data).payload, [7; 10]);
    guest.expect(Operation::CreditRequest);
    // An answer that gives no room is not answered by another request.
    guest.send(PORTS, Operation::CreditUpdate);
    guest.expect_nothing();
    // The other end goes away meanwhile: still nothing to do, and nothing is lost.
    drop(stream);
    guest.expect_nothing();
    (guest.buffer_size, guest.forwarded) = (10_000, 10);
    guest.send(PORTS, Operation::CreditUpdate);
    assert_eq!(guest.expect(Operation::Data).payload, [7; 90]);
    assert_eq!(guest.expect(Operation::Shutdown).header.flags, NO_SEND | NO_RECEIVE);
    guest.expect_nothing();
}

#[test]
fn an_empty_receive_ring_holds_everything_back_until_it_is_filled() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    guest.send(PORTS, Operation::Request);
    let mut stream = listener.accept().unwrap().0;
    stream.write_all(b"patience").unwrap();
    guest.harness.settle();
    for expected in [Operation::Response, Operation::Data] {
        let buffer = guest.harness.writable(4096);
        guest.post(buffer);
        guest.harness.settle();
        guest.collect(false);
        assert_eq!(guest.inbox.pop_front().unwrap().operation(), expected);
        assert_eq!(guest.inbox, []);
    }
    drop(stream);
    guest.harness.settle();
    let buffer = guest.harness.writable(4096);
    guest.post(buffer);
    guest.expect(Operation::Shutdown);
}

#[test]
fn connections_take_turns_in_the_receive_ring() {
    let mut guest = Guest::new(0);
    let listener = guest.listen(PORTS.host);
    let mut streams = Vec::new();
    for port in 0..3 {
        guest.send(Ports { guest: port, ..PORTS }, Operation::Request);
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(&[0; 50_000]).unwrap();
        streams.push(stream);
    }
    for _ in 0..3 {
        let buffer = guest.harness.writable(4096);
        guest.post(buffer);
        guest.expect(Operation::Response);
    }
    let turns = (0..6).map(|_| guest.expect(Operation::Data).ports().guest).collect::<Vec<_>>();
    assert_eq!(turns[..3], turns[3..]);
    assert_eq!(turns[..3].iter().collect::<std::collections::HashSet<_>>().len(), 3);
}

#[test]
fn payload_that_is_scattered_over_many_descriptors_is_put_together() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    let data = pattern(0, 30_000);
    let header = Header { length: 30_000, ..guest.header(PORTS, Operation::Data) }.to_bytes();
    let mut segments = vec![guest.harness.readable(&header[..20]), guest.harness.readable(&header[20..])];
    segments.extend(data.chunks(4000).map(|piece| guest.harness.readable(piece)).collect::<Vec<_>>());
    guest.harness.request(1, &segments);
    assert!(guest.read_host(&mut stream, 30_000) == data);

    // The same the other way: one receive buffer of many pieces.
    let mut guest = Guest::new(1);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    guest.collect(false);
    stream.write_all(&data[..5000]).unwrap();
    guest.expect(Operation::Data);
    guest.expect(Operation::Data);
}

#[test]
fn an_idle_connection_holds_no_buffer() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    for _ in 0..4 {
        guest.send_data(PORTS, pattern(0, 64 << 10));
    }
    assert!(guest.harness.device.buffered_bytes() > 0);
    assert_eq!(guest.read_host(&mut stream, 256 << 10).len(), 256 << 10);
    guest.harness.settle();
    assert_eq!(guest.harness.device.buffered_bytes(), 0);
}
