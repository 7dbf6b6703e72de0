//! Interfaces of real network namespaces, scanned, joined and parted. They need root; without it they say so.

#![expect(clippy::unwrap_used, reason = "a test fails by panics")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use netlink::route::address::{AddressAttribute, AddressMessage};
use netlink::route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink::route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink::route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink::route::{AddressFamily, RouteNetlinkMessage};
use netlink::{Connection, NLM_F_CREATE, NLM_F_EXCL};
use network::{Namespace, Neighbour, NetworkError, Route, leave_host, part};
use nix::sched::{CloneFlags, unshare};

const POD: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const WORLD: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const MAC: [u8; 6] = [2, 0, 0, 0, 9, 2];
const WORLD_MAC: [u8; 6] = [2, 0, 0, 0, 9, 1];
/// How long a packet may take; one that shall not come is waited for a tenth of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// A network namespace that lasts as long as this value: as the thread that is in it.
struct Made {
    path: PathBuf,
    _thread: Sender<()>,
}

/// A new namespace; `None` where this user cannot make one.
fn made() -> Option<Made> {
    let (told, tell) = channel();
    let (thread, ended) = channel::<()>();
    std::thread::spawn(move || {
        told.send(unshare(CloneFlags::CLONE_NEWNET).map(|()| nix::unistd::gettid())).unwrap();
        // Ends with an error when the other side is gone.
        let _ = ended.recv();
    });
    match tell.recv().unwrap() {
        Ok(id) => Some(Made { path: format!("/proc/{}/task/{id}/ns/net", std::process::id()).into(), _thread: thread }),
        Err(error) => {
            eprintln!("SKIPPED: no network namespace can be made: {error}");
            None
        }
    }
}

impl Made {
    fn connection(&self) -> Connection {
        Namespace::open(&self.path)
            .unwrap()
            .within(|| Connection::open().map_err(|source| NetworkError::Kernel { what: "open".to_owned(), source }))
            .unwrap()
    }

    fn socket(&self, address: Ipv4Addr) -> UdpSocket {
        let bind =
            || UdpSocket::bind((address, 7)).map_err(|source| NetworkError::Kernel { what: "bind".to_owned(), source });
        let socket = Namespace::open(&self.path).unwrap().within(bind).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }
}

/// One of a pair of interfaces.
struct End<'a> {
    place: &'a Made,
    name: &'static str,
    mac: [u8; 6],
    address: Option<Ipv4Addr>,
}

/// Makes a pair of interfaces; both are up and have their addresses.
fn veth(near: &End<'_>, far: &End<'_>) {
    let file = File::open(&far.place.path).unwrap();
    let common = |end: &End<'_>| {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(end.name.to_owned()),
            LinkAttribute::Address(end.mac.to_vec()),
            LinkAttribute::Mtu(1400),
        ];
        link
    };
    let (mut link, mut peer) = (common(near), common(far));
    peer.attributes.push(LinkAttribute::NetNsFd(file.as_raw_fd()));
    let info = vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer)))];
    link.attributes.push(LinkAttribute::LinkInfo(info));
    near.place.connection().request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL).unwrap();
    // None comes up before its peer is there.
    for end in [near, far] {
        set_up(end.place, end.name, end.address);
    }
}

fn index(place: &Made, name: &str) -> u32 {
    let find = || {
        nix::net::if_::if_nametoindex(name)
            .map_err(|errno| NetworkError::Kernel { what: name.to_owned(), source: errno.into() })
    };
    Namespace::open(&place.path).unwrap().within(find).unwrap()
}

/// Has the interface up, with `address` of 24 bits.
fn set_up(place: &Made, name: &str, address: Option<Ipv4Addr>) {
    let index = index(place, name);
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    let mut connection = place.connection();
    connection.request(RouteNetlinkMessage::SetLink(link), 0).unwrap();
    let Some(address) = address else { return };
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 24;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
    connection.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE).unwrap();
}

/// A pod's interface as a CNI plugin makes it.
fn wire(pod: &Made, world: &Made) {
    let near = End { place: pod, name: "eth0", mac: MAC, address: Some(POD) };
    veth(&near, &End { place: world, name: "pod", mac: WORLD_MAC, address: Some(WORLD) });
}

#[test]
fn a_scan_has_what_was_set_and_not_what_the_kernel_makes_of_it() {
    let (Some(pod), Some(world)) = (made(), made()) else { return };
    wire(&pod, &world);
    let index = index(&pod, "eth0");
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: AddressFamily::Inet,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        flags: RouteFlags::Onlink,
        ..RouteHeader::default()
    };
    route.attributes = vec![
        RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY)),
        RouteAttribute::Oif(index),
        RouteAttribute::Priority(7),
    ];
    let mut neighbour = NeighbourMessage::default();
    neighbour.header.family = AddressFamily::Inet;
    neighbour.header.ifindex = index;
    neighbour.header.state = NeighbourState::Permanent;
    neighbour.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(GATEWAY)),
        NeighbourAttribute::LinkLayerAddress(WORLD_MAC.to_vec()),
    ];
    let mut connection = pod.connection();
    connection.request(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE).unwrap();
    connection.request(RouteNetlinkMessage::NewNeighbour(neighbour), NLM_F_CREATE).unwrap();

    let scan = Namespace::open(&pod.path).unwrap().scan().unwrap();
    let [interface] = &scan.interfaces[..] else { panic!("{scan:?}") };
    assert_eq!((interface.name.as_str(), interface.mac, interface.mtu), ("eth0", MAC, 1400));
    assert_eq!(interface.addresses, [(IpAddr::from(POD), 24)]);
    let expected = Route {
        gateway: Some(GATEWAY.into()),
        interface: "eth0".to_owned(),
        onlink: true,
        metric: 7,
        ..Route::default()
    };
    assert_eq!(scan.routes, [expected]);
    let expected = Neighbour { address: GATEWAY.into(), mac: WORLD_MAC, interface: "eth0".to_owned() };
    assert_eq!(scan.neighbours, [expected]);
}

/// Whether what the world sends reaches `socket`.
fn reaches(world: &UdpSocket, socket: &UdpSocket) -> bool {
    world.send_to(b"hello", (POD, 7)).unwrap();
    let mut buffer = [0; 16];
    socket.recv(&mut buffer).is_ok_and(|length| &buffer[..length] == b"hello")
}

#[test]
fn what_a_joined_interface_receives_goes_to_the_tap_and_back_until_they_are_parted() {
    let (Some(pod), Some(world), Some(guest)) = (made(), made(), made()) else { return };
    wire(&pod, &world);
    // What a tap is to a guest, at whose end are the interface's hardware and network address.
    let tap = End { place: &pod, name: "tap0", mac: [2, 0, 0, 0, 9, 3], address: None };
    veth(&tap, &End { place: &guest, name: "eth0", mac: MAC, address: Some(POD) });
    let outside = world.socket(WORLD);
    let stays = pod.socket(POD);
    let inside = guest.socket(POD);
    assert!(reaches(&outside, &stays));

    let mut namespace = Namespace::open(&pod.path).unwrap();
    let interface = namespace.scan().unwrap().interfaces.into_iter().find(|one| one.name == "eth0").unwrap();
    namespace.join(&interface, "tap0").unwrap();
    inside.send_to(b"hello", (WORLD, 7)).unwrap();
    let mut buffer = [0; 16];
    assert_eq!(outside.recv_from(&mut buffer).unwrap().1.ip(), IpAddr::from(POD));
    assert!(reaches(&outside, &inside));
    stays.set_read_timeout(Some(PATIENCE / 10)).unwrap();
    assert!(stays.recv(&mut buffer).is_err(), "the namespace's own stack has got what is the guest's");

    let id = namespace.id();
    for _ in 0..2 {
        part(&pod.path, id, "eth0").unwrap();
    }
    stays.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(reaches(&outside, &stays));
    part(&pod.path, id, "no-such-interface").unwrap();
    drop(pod);
    part(Path::new("/proc/self/ns/no-such-file"), id, "eth0").unwrap();
    // What is left of a file that a namespace was mounted on.
    part(tempfile::NamedTempFile::new().unwrap().path(), id, "eth0").unwrap();
}

#[test]
fn one_listener_takes_what_is_dialled_to_any_port_of_the_loopback_address() {
    let (Some(pod), Some(world)) = (made(), made()) else { return };
    wire(&pod, &world);
    set_up(&pod, "lo", None);
    let namespace = Namespace::open(&pod.path).unwrap();
    let dial = |address: [u8; 4], port: u16| {
        let dialled = || {
            TcpStream::connect((Ipv4Addr::from(address), port))
                .map_err(|source| NetworkError::Kernel { what: "connect".to_owned(), source })
        };
        namespace.within(dialled)
    };
    let loopback = namespace.take_loopback().unwrap();
    for (address, port) in [([127, 0, 0, 1], 80), ([127, 0, 0, 1], 65535), ([127, 9, 9, 9], 1)] {
        let mut client = dial(address, port).unwrap();
        let (mut server, from) = loopback.listener().accept().unwrap();
        assert_eq!(server.local_addr().unwrap(), (address, port).into());
        assert_eq!(from, client.local_addr().unwrap());
        client.write_all(b"hello").unwrap();
        drop(client);
        let mut text = String::new();
        server.set_nonblocking(false).unwrap();
        server.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }
    dial(POD.octets(), 80).unwrap_err();
    drop(loopback);
    dial([127, 0, 0, 1], 80).unwrap_err();
}

#[test]
fn what_is_no_pod_s_namespace_is_refused_by_name() {
    let own = Namespace::open(Path::new("/proc/self/ns/net")).map(drop).unwrap_err();
    assert!(matches!(own, NetworkError::OfHost { .. }) && own.to_string().contains("hostNetwork"), "{own}");
    for path in ["/proc/self/ns/mnt", "/dev/null", "/no/such/file"] {
        let error = Namespace::open(Path::new(path)).map(drop).unwrap_err();
        assert!(matches!(error, NetworkError::Namespace { .. }) && error.to_string().contains(path), "{error}");
    }
}

#[test]
fn news_tell_that_something_has_changed_and_not_more_often() {
    let (Some(pod), Some(world)) = (made(), made()) else { return };
    let news = Namespace::open(&pod.path).unwrap().news().unwrap();
    assert!(!news.take().unwrap());
    wire(&pod, &world);
    assert!(news.take().unwrap());
    // The kernel may be at it still: a link finds its peer a while later.
    let index = index(&pod, "eth0");
    let mut link = LinkMessage::default();
    link.header.index = index;
    pod.connection().request(RouteNetlinkMessage::DelLink(link), 0).unwrap();
    assert!(news.take().unwrap());
}

#[test]
fn a_server_of_names_is_found_by_its_address() {
    let Some(pod) = made() else { return };
    set_up(&pod, "lo", None);
    let namespace = Namespace::open(&pod.path).unwrap();
    let docker = Ipv4Addr::new(127, 0, 0, 11);
    assert!(!namespace.serves(docker).unwrap());
    let socket = pod.socket(docker);
    assert!(namespace.serves(docker).unwrap());
    drop(socket);
    assert!(!namespace.serves(docker).unwrap());
}

#[test]
fn only_the_first_thread_moves_its_process_to_another_namespace() {
    let refused = std::thread::spawn(leave_host).join().unwrap().unwrap_err();
    assert!(matches!(refused, NetworkError::Thread), "{refused}");
}
