//! A network that changes while the guest runs, and names that the host resolves.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use netlink::route::RouteNetlinkMessage;
use netlink::route::address::{AddressAttribute, AddressMessage};
use netlink::route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink::route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol};
use netlink::{Connection, NLM_F_CREATE, NLM_F_EXCL};
use nix::sched::{CloneFlags, setns};
use protocols::agent::{Interface, Route, UpdateNetworkRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use ttrpc::Code;

use crate::harness::{DEADLINE, Host, context, port, privileged, refusal, within};

const MAC: [u8; 6] = [2, 0, 0, 0, 9, 2];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 9, 3];

/// Does something in the guest's network namespace.
fn inside<T: Send>(host: &Host, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(format!("/proc/{}/ns/net", host.agent_pid)).expect("the agent's network namespace");
    let enter = || {
        setns(file, CloneFlags::CLONE_NEWNET).expect("the agent's network namespace");
        work()
    };
    std::thread::scope(|scope| scope.spawn(enter).join().expect("the work inside"))
}

/// A card as the host plugs it.
fn plug(host: &Host, mac: [u8; 6], name: &str) {
    inside(host, || {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
        ];
        let mut connection = Connection::open().expect("a socket");
        connection.request(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL).expect("a link");
    });
}

/// The guest's addresses, and the gateways of the routes that were set, IPv4 alone.
fn seen(host: &Host) -> BTreeSet<String> {
    inside(host, || {
        let mut connection = Connection::open().expect("a socket");
        let mut seen = BTreeSet::new();
        for message in connection.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default())).expect("addresses") {
            let RouteNetlinkMessage::NewAddress(message) = message else { continue };
            for attribute in message.attributes {
                if let AddressAttribute::Local(address) = attribute
                    && address.is_ipv4()
                    && !address.is_loopback()
                {
                    seen.insert(format!("{address}/{}", message.header.prefix_len));
                }
            }
        }
        for message in connection.dump(RouteNetlinkMessage::GetRoute(RouteMessage::default())).expect("routes") {
            let RouteNetlinkMessage::NewRoute(message) = message else { continue };
            let is_set =
                message.header.table == RouteHeader::RT_TABLE_MAIN && message.header.protocol == RouteProtocol::Boot;
            for attribute in message.attributes.iter().filter(|_| is_set) {
                if let RouteAttribute::Gateway(RouteAddress::Inet(gateway)) = attribute {
                    seen.insert(format!("via {gateway}"));
                }
            }
        }
        seen
    })
}

fn interface(mac: [u8; 6], name: &str, addresses: &[&str]) -> Interface {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
    Interface { mac, name: name.into(), addresses, ..Default::default() }
}

fn default_route(gateway: &str, interface: &str) -> Route {
    Route { gateway: gateway.into(), interface: interface.into(), ..Default::default() }
}

fn request(interfaces: Vec<Interface>, routes: Vec<Route>) -> UpdateNetworkRequest {
    let deadline_ms = u32::try_from(DEADLINE.as_millis()).expect("a deadline");
    UpdateNetworkRequest { interfaces, routes, deadline_ms, ..Default::default() }
}

fn set<const N: usize>(expected: [&str; N]) -> BTreeSet<String> {
    expected.map(str::to_owned).into()
}

#[tokio::test]
async fn the_network_becomes_what_the_host_says_and_what_it_names_no_more_is_taken_back() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    // The answer comes when the card has.
    let first =
        request(vec![interface(MAC, "eth0", &["10.9.0.2/24", "10.9.1.2/24"])], vec![default_route("10.9.0.1", "eth0")]);
    let (agent, asked) = (host.agent.clone(), first.clone());
    let waiting = tokio::spawn(async move { agent.update_network(context(), &asked).await });
    tokio::task::yield_now().await;
    plug(&host, MAC, "new0");
    within(waiting).await.expect("a task").expect("an update");
    assert_eq!(seen(&host), set(["10.9.0.2/24", "10.9.1.2/24", "via 10.9.0.1"]));
    // The same again changes nothing.
    within(host.agent.update_network(context(), &first)).await.expect("an update");
    assert_eq!(seen(&host), set(["10.9.0.2/24", "10.9.1.2/24", "via 10.9.0.1"]));

    // Another card gets the name of the first, which gets another.
    plug(&host, OTHER_MAC, "new1");
    let both = request(
        vec![interface(MAC, "eth1", &["10.9.1.2/24"]), interface(OTHER_MAC, "eth0", &["10.8.0.2/24"])],
        vec![default_route("10.8.0.1", "eth0")],
    );
    within(host.agent.update_network(context(), &both)).await.expect("an update");
    assert_eq!(seen(&host), set(["10.9.1.2/24", "10.8.0.2/24", "via 10.8.0.1"]));

    let one = request(vec![interface(MAC, "eth1", &["10.9.1.2/24"])], Vec::new());
    within(host.agent.update_network(context(), &one)).await.expect("an update");
    assert_eq!(seen(&host), set(["10.9.1.2/24"]));

    let absent = UpdateNetworkRequest {
        interfaces: vec![interface([2, 0, 0, 0, 9, 9], "eth2", &[])],
        deadline_ms: 10,
        ..Default::default()
    };
    let (code, text) = refusal(within(host.agent.update_network(context(), &absent)).await);
    assert!(code == Code::NOT_FOUND && text.contains("02:00:00:00:09:09"), "{text}");
}

#[tokio::test]
async fn what_is_asked_for_names_goes_to_the_host_and_its_answer_goes_back() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let questions = UnixListener::bind(port(&host.directory.path().join("s"), protocols::RESOLVER_PORT));
    let questions = questions.expect("a socket for questions");
    let resolves = |resolver: bool| UpdateNetworkRequest { resolver, ..Default::default() };
    within(host.agent.update_network(context(), &resolves(true))).await.expect("an update");
    let server = SocketAddr::from((protocols::RESOLVER, protocols::resolver::PORT));

    let client = inside(&host, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).expect("a socket");
    client.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    client.connect(server).expect("an address");
    client.send(b"who?").expect("a question");
    let (mut asked, _) = within(questions.accept()).await.expect("the question");
    let mut message = [0; 7];
    within(asked.read_exact(&mut message)).await.expect("the question");
    assert_eq!(&message, b"\x00\x00\x04who?");
    // In parts, as it may come.
    for part in [&b"\x00"[..], b"\x02m", b"e"] {
        asked.write_all(part).await.expect("an answer");
        tokio::task::yield_now().await;
    }
    let mut answer = [0; 16];
    let length = client.recv(&mut answer).expect("the answer");
    assert_eq!(&answer[..length], b"me");

    let dial = || TcpStream::connect_timeout(&server, DEADLINE);
    let client = inside(&host, dial).expect("a connection");
    client.set_nonblocking(true).expect("a socket");
    let mut client = tokio::net::TcpStream::from_std(client).expect("a socket");
    client.write_all(b"\x00\x04who?").await.expect("a question");
    let (mut asked, _) = within(questions.accept()).await.expect("the connection");
    within(asked.read_exact(&mut message)).await.expect("the question");
    assert_eq!(&message, b"\x01\x00\x04who?");
    asked.write_all(b"\x00\x02me").await.expect("an answer");
    let mut answer = [0; 4];
    within(client.read_exact(&mut answer)).await.expect("the answer");
    assert_eq!(&answer, b"\x00\x02me");

    within(host.agent.update_network(context(), &resolves(false))).await.expect("an update");
    inside(&host, || TcpStream::connect_timeout(&server, Duration::from_secs(5))).expect_err("nobody listens");
}
