//! Interfaces that come to and go from a container's network namespace while it runs, as docker makes them.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};

use libtest_mimic::Trial;
use netlink::route::address::{AddressAttribute, AddressMessage};
use netlink::route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink::route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink::route::{AddressFamily, RouteNetlinkMessage};
use netlink::{Connection, NLM_F_CREATE, NLM_F_EXCL};
use nix::sched::{CloneFlags, setns, unshare};
use protocols::containerd::ttrpc;
use serde_json::json;
use ttrpc::Code;

use crate::node::{Io, Node, code};
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("what comes to a container's network namespace comes to its machine, and goes with it", comes_and_goes),
        trial("a network that another machine has is refused with what to do", another_machine_s),
        trial("an interface that comes to a machine without room is refused at the start with the remedy", no_room),
    ]
}

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const MAC: [u8; 6] = [2, 0, 0, 0, 9, 2];

/// The network namespace of a pod process.
struct Place(PathBuf);

impl Place {
    /// Does something in it, with a socket of it.
    fn with(&self, work: impl FnOnce(&mut Connection) + Send) {
        let enter = || {
            setns(File::open(&self.0).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work(&mut Connection::open().unwrap());
        };
        std::thread::scope(|scope| scope.spawn(enter).join().unwrap());
    }

    /// An interface as docker leaves one; its other end is down, and so is not the container's.
    fn connect(&self, name: &'static str) {
        self.with(|connection| {
            let mut peer = LinkMessage::default();
            peer.attributes = vec![LinkAttribute::IfName(format!("{name}-world"))];
            let info = vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer)))];
            let mut link = LinkMessage::default();
            link.attributes = vec![
                LinkAttribute::IfName(name.to_owned()),
                LinkAttribute::Address(MAC.to_vec()),
                LinkAttribute::LinkInfo(info),
            ];
            connection.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL).unwrap();
            let index = nix::net::if_::if_nametoindex(name).unwrap();
            let mut address = AddressMessage::default();
            address.header.family = AddressFamily::Inet;
            address.header.prefix_len = 24;
            address.header.index = index;
            let own = IpAddr::from(ADDRESS);
            address.attributes = vec![AddressAttribute::Local(own), AddressAttribute::Address(own)];
            connection.request(RouteNetlinkMessage::NewAddress(address), NLM_F_CREATE).unwrap();
            let mut up = LinkMessage::default();
            up.header.index = index;
            up.header.flags = LinkFlags::Up;
            up.header.change_mask = LinkFlags::Up;
            connection.request(RouteNetlinkMessage::SetLink(up), 0).unwrap();
            let mut route = RouteMessage::default();
            route.header = RouteHeader {
                address_family: AddressFamily::Inet,
                table: RouteHeader::RT_TABLE_MAIN,
                protocol: RouteProtocol::Boot,
                scope: RouteScope::Universe,
                kind: RouteType::Unicast,
                ..RouteHeader::default()
            };
            route.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(GATEWAY)), RouteAttribute::Oif(index)];
            connection.request(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE).unwrap();
        });
    }

    fn disconnect(&self, name: &'static str) {
        self.with(|connection| {
            let mut link = LinkMessage::default();
            link.header.index = nix::net::if_::if_nametoindex(name).unwrap();
            connection.request(RouteNetlinkMessage::DelLink(link), 0).unwrap();
        });
    }
}

/// Whether interfaces can be joined to machines here; says so loudly when not.
fn has_taps() -> bool {
    let has = File::options().read(true).write(true).open("/dev/net/tun").is_ok();
    if !has {
        eprintln!("SKIPPED: this machine has no /dev/net/tun");
    }
    has
}

fn identity(process: &str) -> PathBuf {
    fs::read_link(Path::new("/proc").join(process).join("ns/net")).unwrap()
}

async fn comes_and_goes() {
    if !has_taps() {
        return;
    }
    let node = Node::new().await;
    let file = node.path("resolv.conf");
    fs::write(&file, "nameserver 127.0.0.11\n").unwrap();
    let bind = json!({"destination": "/etc/resolv.conf", "type": "bind", "source": file, "options": ["rbind"]});
    let bundle = node.bundle("late", &["/bin/sleep", "600"], json!({"mounts": [bind]}));
    let task = node.connect("late", &bundle).await;
    let pid = task.create(&Io::default()).await.unwrap();
    let mut hardware = node.hardware();
    assert_ne!(identity(&pid.to_string()), identity("self"), "the container is in the host's network namespace");
    let place = Place(PathBuf::from(format!("/proc/{pid}/ns/net")));

    // Before the start: there when the container's process begins.
    place.connect("eth0");
    task.start("").await.unwrap();
    let network = "network: eth0 10.9.0.2/24, via 10.9.0.1 eth0";
    hardware.expect(&["card 02:00:00:00:09:02 for eth0", network]).await;
    // While it runs.
    place.disconnect("eth0");
    hardware.expect(&["network: ", "no card for eth0"]).await;
    place.connect("eth1");
    let network = "network: eth1 10.9.0.2/24, via 10.9.0.1 eth1";
    hardware.expect(&["card 02:00:00:00:09:02 for eth1", network]).await;
    node.delete("late");
    node.expect_nothing_left().await;
}

/// A network namespace that lasts as long as the thread that is in it: until the sender is dropped.
fn namespace() -> (Place, Sender<()>) {
    let (told, tell) = channel();
    let (end, ended) = channel::<()>();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        told.send(nix::unistd::gettid()).unwrap();
        // Ends with an error when the other side is gone.
        let _ = ended.recv();
    });
    let thread = tell.recv().unwrap();
    (Place(PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))), end)
}

async fn another_machine_s() {
    if !has_taps() {
        return;
    }
    let node = Node::new().await;
    let (place, _thread) = namespace();
    place.connect("tap0_kata");
    let namespaces = json!([{"type": "pid"}, {"type": "mount"}, {"type": "network", "path": place.0}]);
    let bundle = node.bundle("second", &["/bin/true"], json!({"linux": {"namespaces": namespaces}}));
    let second = node.connect("second", &bundle).await;
    let error = second.create(&Io::default()).await.unwrap_err();
    assert_eq!(code(&error), Code::FAILED_PRECONDITION);
    assert!(error.to_string().contains("is the network of another virtual machine"), "{error}");
    node.delete("second");
    node.expect_nothing_left().await;
}

async fn no_room() {
    if !has_taps() {
        return;
    }
    let node = Node::new().await;
    let task = node.create("narrow", &["/bin/sleep", "600"], &Io::default()).await;
    let place = Place(PathBuf::from(format!("/proc/{}/ns/net", task.pid().await)));
    place.connect("eth0");
    let error = task.start("").await.unwrap_err();
    assert_eq!(code(&error), Code::FAILED_PRECONDITION);
    let text = error.to_string();
    assert!(text.contains("eth0") && text.contains("/etc/resolv.conf"), "{text}");
    place.disconnect("eth0");
    task.start("").await.unwrap();
    node.delete("narrow");
    node.expect_nothing_left().await;
}
