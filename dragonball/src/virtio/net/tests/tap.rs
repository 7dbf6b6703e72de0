//! Real taps, each in a network namespace of its own test, with a packet socket as the host's network stack.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send as send_to_socket, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use rstest::rstest;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4,
};

use super::*;
use crate::config::{TapDescriptors, TapSource};
use crate::virtio::net::tap;

const NAME: &str = "card0";
pub(super) const PEER: [u8; 6] = [2, 0, 0, 0, 0, 0xff];
/// The mark of our frames among those that the kernel sends by itself: an EtherType for experiments (IEEE 802).
pub(super) const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// Runs `test` in a new network namespace; says why not where that is not possible.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let body = move || {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: taps need root and /dev/net/tun");
            return;
        }
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        // Less traffic of the kernel's own. Where there is no such setting, there is no IPv6.
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
    };
    std::thread::spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn open(queues: u16) -> Net {
    open_with(queues, VhostMode::Off)
}

/// A card on a tap with that many queues.
pub(super) fn open_with(queues: u16, vhost: VhostMode) -> Net {
    let tap = TapSource::Name { name: NAME.to_owned(), queues };
    let mac = Some(MacAddress::new(CARD_ADDRESS).unwrap());
    Net::open(&NetConfig { tap, mac, vhost, ..NetConfig::new("") }).unwrap()
}

/// The host's stack: frames with their virtio header (packet(7), `PACKET_VNET_HDR`).
pub(super) struct Stack(OwnedFd);

impl Stack {
    pub(super) fn new() -> Self {
        let all = SockProtocol::EthAll;
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all).unwrap();
        let on: libc::c_int = 1;
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the option takes a number of this size.
        let result = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), size)
        };
        assert_eq!(result, 0);
        setsockopt(&socket, sockopt::RcvBuf, &(4 << 20)).unwrap();
        // So that a broken device fails the test instead of hanging it.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
        bind(&socket);
        Self(socket)
    }

    pub(super) fn send(&self, frame: &[u8]) {
        assert_eq!(send_to_socket(self.0.as_raw_fd(), frame, MsgFlags::empty()).unwrap(), frame.len());
    }

    /// The next frame that came from the card.
    pub(super) fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 1 << 17];
        loop {
            let length = recv(self.0.as_raw_fd(), &mut frame, MsgFlags::empty()).expect("a frame in time");
            if frame[16..22] == CARD_ADDRESS {
                frame.truncate(length);
                return frame;
            }
        }
    }
}

/// Binds a packet socket to the tap.
fn bind(socket: &OwnedFd) {
    // SAFETY: all zeroes are a value of this structure of numbers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(NAME).unwrap() as i32;
    let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is valid for its size.
    assert_eq!(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) }, 0);
}

fn has_carrier() -> bool {
    let mut interfaces = getifaddrs().unwrap();
    interfaces.any(|entry| entry.interface_name == NAME && entry.flags.contains(InterfaceFlags::IFF_LOWER_UP))
}

/// An Ethernet frame.
pub(super) fn ethernet(to: [u8; 6], from: [u8; 6], ether_type: [u8; 2], body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ether_type, body].concat()
}

/// A TCP segment over IPv4 between 10.0.0.1 and .2, its TCP checksum left to be done: `length` bytes of data.
fn segment(to: [u8; 6], from: [u8; 6], length: usize) -> Vec<u8> {
    let total = (40 + length) as u16;
    let mut ip =
        [&[0x45, 0], &total.to_be_bytes()[..], &[0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut tcp = vec![0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    // With the checksum to be done, its place has the sum of the pseudo header.
    let pseudo = [&ip[12..20], &[0, 6], &((20 + length) as u16).to_be_bytes()].concat();
    let partial = !checksum(&pseudo);
    tcp[16..18].copy_from_slice(&partial.to_be_bytes());
    let data = (0..length).map(|at| (at % 251) as u8).collect::<Vec<_>>();
    ethernet(to, from, [8, 0], &[ip, tcp, data].concat())
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes
        .chunks(2)
        .fold(0_u32, |sum, pair| sum + (u32::from(pair[0]) << 8) + u32::from(pair.get(1).copied().unwrap_or(0)));
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// The TCP checksum of an IPv4 frame, right if it is 0.
fn tcp_checksum(frame: &[u8]) -> u16 {
    let ip = &frame[14..];
    let length = u16::from_be_bytes([ip[2], ip[3]]) - 20;
    let tcp = &ip[20..20 + usize::from(length)];
    checksum(&[&ip[12..20], &[0, 6], &length.to_be_bytes(), tcp].concat())
}

/// A header for a TCP segment: its checksum is to be done, and it is to be cut into pieces of `size` bytes if not 0.
fn header(size: u16) -> [u8; HEADER_LENGTH] {
    let kind = if size == 0 { 0 } else { VIRTIO_NET_HDR_GSO_TCPV4 as u8 };
    let [low, high] = size.to_le_bytes();
    [VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, kind, 54, 0, low, high, 34, 0, 16, 0, 0, 0]
}

/// The frames to the card that the driver finds, with their headers, until the first marked one.
pub(super) fn incoming(harness: &mut Harness<Net>, buffers: &[(u16, Segment)]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    loop {
        let first = harness.wait_used(RX);
        let mut frame = written(harness, first, buffers);
        for _ in 1..u16::from_le_bytes([frame[10], frame[11]]) {
            let used = harness.rings[0].take_used().expect("all buffers of a frame come at once");
            frame.extend(written(harness, used, buffers));
        }
        if frame[24..26] == ETHER_TYPE {
            return frames;
        }
        if frame[12..18] == CARD_ADDRESS {
            frames.push(frame);
        }
    }
}

/// A frame that tells [`incoming`] that there are no more. A packet socket's header has no `num_buffers`.
pub(super) fn mark() -> Vec<u8> {
    [&[0; 10][..], &ethernet(CARD_ADDRESS, PEER, ETHER_TYPE, &[0; 46])].concat()
}

#[test]
fn frames_go_both_ways_through_a_tap_that_is_made_for_the_card() {
    in_namespace(|| {
        let mut harness = Harness::new(open(1));
        let stack = Stack::new();
        let out = ethernet(PEER, CARD_ADDRESS, ETHER_TYPE, &[7; 100]);
        send(&mut harness, TX, &[&[0; HEADER_LENGTH][..], &out].concat());
        assert_eq!(stack.receive()[10..], out);

        let buffers = give(&mut harness, RX, 64, 1536);
        let into = ethernet(CARD_ADDRESS, PEER, [0x88, 0xb6], &[8; 1400]);
        stack.send(&[&[0; 10][..], &into].concat());
        stack.send(&mark());
        let frames = incoming(&mut harness, &buffers);
        assert_eq!(frames.iter().map(|frame| &frame[12..]).collect::<Vec<_>>(), [into]);
    });
}

#[test]
fn a_large_segment_of_the_driver_reaches_the_host_in_one_piece() {
    in_namespace(|| {
        let mut harness = Harness::new(open(1));
        let stack = Stack::new();
        let large = segment(PEER, CARD_ADDRESS, 64_000);
        send(&mut harness, TX, &[&header(1448)[..], &large].concat());
        let got = stack.receive();
        assert_eq!((got[1] & 0x7f, u16::from_le_bytes([got[4], got[5]])), (VIRTIO_NET_HDR_GSO_TCPV4 as u8, 1448));
        assert_eq!(got[10..], large);
    });
}

#[test]
fn a_large_segment_of_the_host_reaches_a_driver_that_takes_it_in_one_piece() {
    in_namespace(|| {
        let mut harness = Harness::new(open(1));
        let stack = Stack::new();
        let buffers = give(&mut harness, RX, 100, 1536);
        let large = segment(CARD_ADDRESS, PEER, 64_000);
        stack.send(&[&header(1448)[..10], &large].concat());
        stack.send(&mark());
        let frames = incoming(&mut harness, &buffers);
        let [frame] = &frames[..] else { panic!("{} frames", frames.len()) };
        assert_eq!((frame[0] & 1, frame[1] & 0x7f), (1, VIRTIO_NET_HDR_GSO_TCPV4 as u8));
        assert_eq!(u16::from_le_bytes([frame[4], frame[5]]), 1448);
        assert_eq!(frame[12..], large);
    });
}

#[rstest]
#[case::cuts_nothing(1 << VIRTIO_NET_F_GUEST_TSO4, true)]
#[case::sums_nothing(1 << VIRTIO_NET_F_GUEST_CSUM, false)]
fn a_large_segment_of_the_host_is_finished_for_a_driver_that_does_less(#[case] unknown: u64, #[case] sums: bool) {
    in_namespace(move || {
        let mut harness = Harness::without_features(open(1), unknown);
        let stack = Stack::new();
        let buffers = give(&mut harness, RX, 100, 1536);
        let large = segment(CARD_ADDRESS, PEER, 14_480);
        stack.send(&[&header(1448)[..10], &large].concat());
        stack.send(&mark());
        let frames = incoming(&mut harness, &buffers);
        assert_eq!(frames.len(), 10);
        let mut data = Vec::new();
        for frame in &frames {
            assert_eq!(frame[1], 0, "nothing is left to be cut");
            if frame[0] & 1 == 0 {
                assert_eq!(tcp_checksum(&frame[12..]), 0);
            } else {
                assert!(sums, "nothing is left to be summed");
            }
            data.extend_from_slice(&frame[12 + 54..]);
        }
        assert_eq!(data, large[54..]);
    });
}

#[test]
fn the_host_answers_a_flow_on_the_queue_pair_that_sent_it() {
    in_namespace(|| {
        let mut harness = Harness::new(open(2));
        let stack = Stack::new();
        assert!(control::command(&mut harness, &[4, 0, 2, 0]));
        let buffers = [give(&mut harness, 0, 8, 2048), give(&mut harness, 2, 8, 2048)];
        // Addresses and ports are the same both ways, so that the host sees one flow.
        let (out, into) = (segment(PEER, CARD_ADDRESS, 10), segment(CARD_ADDRESS, PEER, 10));
        for (transmit, receive, buffers) in [(3, 2, &buffers[1]), (1, 0, &buffers[0]), (3, 2, &buffers[1])] {
            send(&mut harness, transmit, &[&header(0)[..], &out].concat());
            assert_eq!(stack.receive()[10..], out);
            stack.send(&[&header(0)[..10], &into].concat());
            let (_, body) = received(&mut harness, receive, buffers);
            assert_eq!(body[..34], into[..34]);
        }
        // One pair again: all flows come there.
        assert!(control::command(&mut harness, &[4, 0, 1, 0]));
        stack.send(&[&header(0)[..10], &into].concat());
        assert_eq!(received(&mut harness, 0, &buffers[0]).1[..34], into[..34]);
    });
}

#[test]
fn the_host_filters_frames_and_sees_the_cable() {
    in_namespace(|| {
        let mut harness = Harness::new(open(1));
        let stack = Stack::new();
        let buffers = give(&mut harness, RX, 64, 1536);
        assert!(control::command(&mut harness, &[0, 0, 0]));
        stack.send(&[&[0; 10][..], &ethernet([2, 0, 0, 0, 0, 0x77], PEER, ETHER_TYPE, &[0; 46])].concat());
        stack.send(&[&[0; 10][..], &ethernet(CARD_ADDRESS, PEER, ETHER_TYPE, &[1; 46])].concat());
        let (_, body) = received(&mut harness, RX, &buffers);
        assert_eq!(body[..6], CARD_ADDRESS);

        let link = harness.device.link();
        for up in [false, true] {
            assert_ne!(has_carrier(), up);
            link.set_link(up).unwrap();
            harness.settle();
            assert_eq!(has_carrier(), up);
        }
    });
}

#[test]
fn a_deleted_tap_is_a_pulled_cable() {
    in_namespace(|| {
        let mut harness = Harness::new(open(1));
        give(&mut harness, RX, 8, 1536);
        harness.settle();
        assert!(std::process::Command::new("ip").args(["link", "delete", NAME]).status().unwrap().success());
        harness.run_until(|harness| harness.config_changes > 0);
        assert_eq!(harness.device.config()[6], 0);
        send(&mut harness, TX, &frame(100, 1));
        harness.settle();
        // So it stays for the driver's next start.
        harness.reset();
        harness.activate().unwrap();
        assert_eq!(harness.device.config()[6], 0);
        send(&mut harness, TX, &frame(100, 2));
    });
}

#[test]
fn the_mtu_is_that_of_the_tap_and_that_of_a_new_tap_is_the_card_s() {
    in_namespace(|| {
        let mtu = |net: &Net| u16::from_le_bytes([net.config()[10], net.config()[11]]);
        let card = NetConfig { mtu: Some(9000), ..NetConfig::new(NAME) };
        let first = Net::open(&card).unwrap();
        assert_eq!(mtu(&first), 9000);
        assert!(has_carrier(), "a new tap is set up");
        drop(first);
        let ip = |arguments: &str| {
            let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
            assert!(status.success());
        };
        ip(&format!("tuntap add {NAME} mode tap multi_queue"));
        ip(&format!("link set {NAME} mtu 1300"));
        // One queue of an interface of many.
        assert_eq!(mtu(&Net::open(&NetConfig::new(NAME)).unwrap()), 1300);
        assert!(!has_carrier(), "a tap of somebody else stays as it is");
    });
}

#[test]
fn taps_that_cannot_be_used_are_refused_with_the_way_out() {
    in_namespace(|| {
        let text = |tap| match Net::open(&NetConfig { tap, ..NetConfig::new("") }) {
            Ok(_) => panic!("a card"),
            Err(error) => error.to_string(),
        };
        let name = |name: &str, queues| TapSource::Name { name: name.to_owned(), queues };
        let _holder = open(1);
        assert!(text(name(NAME, 1)).contains("no other program has it"));
        assert!(text(name("lo", 1)).contains("Cannot attach to the tap interface lo"));
        assert!(text(name(NAME, 2)).contains("made with `multi_queue`"));
        let null = TapDescriptors::new(vec![fs::File::open("/dev/null").unwrap().into()]);
        assert!(text(TapSource::Descriptors(null)).contains("TUNSETIFF"));
        let unbound = TapDescriptors::new(vec![fs::File::open("/dev/net/tun").unwrap().into()]);
        assert!(text(TapSource::Descriptors(unbound)).contains("TUNSETIFF"));
    });
}

#[test]
fn open_descriptors_of_a_tap_serve_as_its_name_does() {
    in_namespace(|| {
        let made = tap::open(&TapSource::Name { name: NAME.to_owned(), queues: 2 }, None).unwrap();
        let descriptors = made.ports.iter().map(|port| port.fd().try_clone_to_owned().unwrap()).collect();
        let tap = TapSource::Descriptors(TapDescriptors::new(descriptors));
        drop(made);
        let net = Net::open(&NetConfig { tap, vhost: VhostMode::Off, ..NetConfig::new("") }).unwrap();
        assert_eq!((net.queue_sizes().len(), net.features() & (1 << VIRTIO_NET_F_MTU)), (5, 0));
        let mut harness = Harness::new(net);
        let stack = Stack::new();
        send(
            &mut harness,
            TX,
            &[&[0; HEADER_LENGTH][..], &ethernet(PEER, CARD_ADDRESS, ETHER_TYPE, &[7; 60])].concat(),
        );
        assert_eq!(stack.receive()[10..16], PEER);
    });
}
