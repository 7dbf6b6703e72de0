//! Tests of the socket device: a guest's driver on the rings, the host's programs on unix sockets.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::connection::BUFFER_SIZE;
use super::packet::{HOST_CID, Header, NO_RECEIVE, NO_SEND, Operation, Ports, TYPE_STREAM};
use super::*;
use crate::virtio::testing::{Descriptor, Harness, Segment};

mod bulk;
mod hostile;
mod life;

const CID: u64 = 42;
/// Guest memory for what the guest sends.
const SEND_SPACE: u32 = HEADER + (64 << 10);
/// The length of a header as a ring has it.
const HEADER: u32 = 44;

/// A packet that the guest got.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Packet {
    header: Header,
    payload: Vec<u8>,
}

impl Packet {
    fn operation(&self) -> Operation {
        Operation::from_number(self.header.operation).unwrap()
    }

    fn ports(&self) -> Ports {
        Ports { host: self.header.source_port, guest: self.header.destination_port }
    }
}

/// A guest, its device, and the directory of the host's sockets.
struct Guest {
    harness: Harness<Vsock>,
    directory: TempDir,
    /// Receive buffers that the device has.
    posted: HashMap<u16, Segment>,
    inbox: VecDeque<Packet>,
    send_space: GuestAddress,
    /// What the guest tells about its receive buffer.
    buffer_size: u32,
    forwarded: u32,
}

impl Guest {
    /// A guest that posted `buffers` receive buffers of a page each.
    fn new(buffers: usize) -> Self {
        Self::with_harness(buffers, Harness::new)
    }

    fn with_harness(buffers: usize, harness: fn(Vsock) -> Harness<Vsock>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let device = Vsock::new(CID, &directory.path().join("vsock")).unwrap();
        let mut harness = harness(device);
        let send_space = harness.allocate(SEND_SPACE);
        let mut guest = Self {
            harness,
            directory,
            posted: HashMap::new(),
            inbox: VecDeque::new(),
            send_space,
            buffer_size: 256 << 10,
            forwarded: 0,
        };
        for _ in 0..buffers {
            let buffer = guest.harness.writable(4096);
            guest.post(buffer);
        }
        guest
    }

    fn post(&mut self, buffer: Segment) {
        let head = self.harness.submit(0, &[buffer]);
        self.posted.insert(head, buffer);
    }

    /// Takes what arrived into the inbox; the buffers go back to the device if `again`.
    fn collect(&mut self, again: bool) {
        while let Some(used) = self.harness.rings[0].take_used() {
            let buffer = self.posted.remove(&used.head).unwrap();
            let bytes = self.harness.bytes(buffer);
            assert!(used.written as usize >= HEADER_LENGTH);
            let header = parse(&bytes);
            assert_eq!((header.source_cid, header.destination_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
            assert_eq!(used.written as usize, HEADER_LENGTH + header.length as usize);
            self.inbox.push_back(Packet { header, payload: bytes[HEADER_LENGTH..used.written as usize].to_vec() });
            if again {
                self.post(buffer);
            }
        }
    }

    /// The next packet that arrives.
    fn receive(&mut self) -> Packet {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            self.collect(true);
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            assert!(std::time::Instant::now() < deadline, "no packet arrives");
            self.harness.round(deadline).unwrap();
        }
    }

    /// The next packet, which must be `operation`.
    fn expect(&mut self, operation: Operation) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.operation(), operation, "{packet:?}");
        packet
    }

    /// The next packet but credit updates, which must be `operation`.
    fn expect_after_updates(&mut self, operation: Operation) -> Packet {
        loop {
            let packet = self.receive();
            if packet.operation() != Operation::CreditUpdate {
                assert_eq!(packet.operation(), operation, "{packet:?}");
                return packet;
            }
        }
    }

    /// Lets the device work until it is quiet, and checks that nothing but credit updates arrived.
    fn drop_updates(&mut self) {
        self.harness.settle();
        self.collect(true);
        self.inbox.retain(|packet| packet.operation() != Operation::CreditUpdate);
        assert_eq!(self.inbox, []);
    }

    /// Lets the device work until it is quiet, and checks that nothing arrived.
    fn expect_nothing(&mut self) {
        self.harness.settle();
        self.collect(true);
        assert_eq!(self.inbox, []);
    }

    fn header(&self, ports: Ports, operation: Operation) -> Header {
        Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: ports.guest,
            destination_port: ports.host,
            kind: TYPE_STREAM,
            operation: operation as u16,
            buffer_size: self.buffer_size,
            forwarded: self.forwarded,
            ..Header::default()
        }
    }

    /// Sends a packet and waits until the device has taken it.
    fn send_raw(&mut self, header: Header, payload: &[u8]) {
        let bytes = [&header.to_bytes()[..], payload].concat();
        self.harness.memory.write_slice(&bytes, self.send_space).unwrap();
        let segment = Segment::Readable(self.send_space, u32::try_from(bytes.len()).unwrap());
        assert_eq!(self.harness.request(1, &[segment]), 0);
    }

    fn send(&mut self, ports: Ports, operation: Operation) {
        self.send_raw(self.header(ports, operation), &[]);
    }

    fn send_data(&mut self, ports: Ports, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap();
        self.send_raw(Header { length, ..self.header(ports, Operation::Data) }, payload);
    }

    fn send_shutdown(&mut self, ports: Ports, flags: u32) {
        self.send_raw(Header { flags, ..self.header(ports, Operation::Shutdown) }, &[]);
    }

    /// A program of the host that listens for host port `port`.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// A connection that the guest makes to `listener` of host port `host`.
    fn dial(&mut self, listener: &UnixListener, ports: Ports) -> UnixStream {
        self.send(ports, Operation::Request);
        let granted = self.expect(Operation::Response);
        assert_eq!(granted.ports(), ports);
        assert_eq!(granted.header.buffer_size, BUFFER_SIZE);
        let stream = listener.accept().unwrap().0;
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// A program of the host that connects and asks for port `port` of the guest.
    fn knock(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Runs the device until `stream` has ended, or `count` bytes came.
    fn read_host(&mut self, stream: &mut UnixStream, count: usize) -> Vec<u8> {
        let mut seen = Vec::new();
        self.harness.run_until(|_| {
            while seen.len() < count {
                let mut chunk = vec![0; count - seen.len()];
                match stream.read(&mut chunk) {
                    Ok(0) => return true,
                    Ok(length) => seen.extend_from_slice(&chunk[..length]),
                    Err(error) => {
                        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                        return false;
                    }
                }
            }
            true
        });
        seen
    }

    /// Runs the device until `stream` is at its end.
    fn expect_host_end(&mut self, stream: &mut UnixStream) {
        assert_eq!(self.read_host(stream, 1), b"");
    }
}

fn parse(bytes: &[u8]) -> Header {
    fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
        bytes[at..at + N].try_into().unwrap()
    }
    Header {
        source_cid: u64::from_le_bytes(field(bytes, 0)),
        destination_cid: u64::from_le_bytes(field(bytes, 8)),
        source_port: u32::from_le_bytes(field(bytes, 16)),
        destination_port: u32::from_le_bytes(field(bytes, 20)),
        length: u32::from_le_bytes(field(bytes, 24)),
        kind: u16::from_le_bytes(field(bytes, 28)),
        operation: u16::from_le_bytes(field(bytes, 30)),
        flags: u32::from_le_bytes(field(bytes, 32)),
        buffer_size: u32::from_le_bytes(field(bytes, 36)),
        forwarded: u32::from_le_bytes(field(bytes, 40)),
    }
}

const PORTS: Ports = Ports { host: 1024, guest: 5000 };

#[test]
fn the_guest_reaches_who_listens_on_the_host_and_both_talk() {
    let mut guest = Guest::new(4);
    let listener = guest.listen(PORTS.host);
    let mut stream = guest.dial(&listener, PORTS);
    guest.send_data(PORTS, b"hello host");
    assert_eq!(guest.read_host(&mut stream, 10), b"hello host");
    stream.write_all(b"hello guest").unwrap();
    let packet = guest.expect(Operation::Data);
    assert_eq!((packet.ports(), &packet.payload[..]), (PORTS, &b"hello guest"[..]));
    assert_eq!(packet.header.forwarded, 10);
    guest.expect_nothing();
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let mut guest = Guest::new(4);
    guest.send(PORTS, Operation::Request);
    assert_eq!(guest.expect(Operation::Reset).ports(), PORTS);
    // A socket file that nobody serves any more is no different.
    drop(guest.listen(PORTS.host));
    guest.send(PORTS, Operation::Request);
    assert_eq!(guest.expect(Operation::Reset).ports(), PORTS);
}

#[test]
fn a_listener_whose_queue_is_full_refuses_and_does_not_block_the_device() {
    let mut guest = Guest::new(4);
    let _listener = guest.listen(PORTS.host);
    let path = guest.directory.path().join(format!("vsock_{}", PORTS.host));
    let mut refused = false;
    for port in 0..5000 {
        guest.send(Ports { guest: port, ..PORTS }, Operation::Request);
        if guest.receive().operation() == Operation::Reset {
            refused = true;
            break;
        }
    }
    assert!(refused, "the queue of {} has no end", path.display());
}

#[test]
fn the_host_reaches_who_listens_in_the_guest_and_both_talk() {
    let mut guest = Guest::new(4);
    let mut stream = guest.knock(7);
    stream.write_all(b"early").unwrap();
    let request = guest.expect(Operation::Request);
    let ports = request.ports();
    assert_eq!(ports.guest, 7);
    guest.expect_nothing();
    guest.send(ports, Operation::Response);
    assert_eq!(guest.expect(Operation::Data).payload, b"early");
    let answer = format!("OK {}\n", ports.host);
    assert_eq!(guest.read_host(&mut stream, answer.len()), answer.as_bytes());
    guest.send_data(ports, b"reply");
    assert_eq!(guest.read_host(&mut stream, 5), b"reply");
}

#[test]
fn a_port_that_the_guest_refuses_ends_the_hosts_stream_without_a_word() {
    let mut guest = Guest::new(4);
    let mut stream = guest.knock(7);
    let ports = guest.expect(Operation::Request).ports();
    guest.send(ports, Operation::Reset);
    guest.expect_host_end(&mut stream);
    guest.expect_nothing();
}

#[test]
fn a_connect_line_may_come_in_pieces_and_nonsense_is_hung_up_on() {
    let mut guest = Guest::new(4);
    let path = guest.directory.path().join("vsock");
    let mut slow = UnixStream::connect(&path).unwrap();
    for piece in ["CON", "NECT ", "1", "2"] {
        slow.write_all(piece.as_bytes()).unwrap();
        guest.expect_nothing();
    }
    slow.write_all(b"\nrest").unwrap();
    assert_eq!(guest.expect(Operation::Request).ports().guest, 12);

    for nonsense in [&b"GET / HTTP/1.1\n"[..], &[b'1'; 33], b"CONNECT 12 34\n"] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(nonsense).unwrap();
        stream.set_nonblocking(true).unwrap();
        guest.harness.run_until(
            |_| !matches!(stream.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
        );
    }
    drop(UnixStream::connect(&path).unwrap());
    guest.expect_nothing();
}

#[test]
fn two_connections_to_the_same_port_of_the_guest_have_different_host_ports() {
    let mut guest = Guest::new(4);
    let _streams = [guest.knock(7), guest.knock(7)];
    let first = guest.expect(Operation::Request).ports();
    let second = guest.expect(Operation::Request).ports();
    assert_ne!(first.host, second.host);
}

#[test]
fn the_configuration_space_holds_the_context_id() {
    assert_eq!(Guest::new(0).harness.device.config(), CID.to_le_bytes());
}

#[test]
fn reserved_context_ids_long_paths_and_taken_paths_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(matches!(Vsock::new(cid, &path), Err(VsockError::ReservedCid(_))));
    }
    let long = directory.path().join("x".repeat(100));
    assert!(matches!(Vsock::new(3, &long), Err(VsockError::PathTooLong { .. })));
    let device = Vsock::new(3, &path).unwrap();
    assert!(matches!(Vsock::new(3, &path), Err(VsockError::Bind { .. })));
    drop(device);
    assert!(!path.exists());
}
