//! What a pod's namespace has: interfaces with their addresses, routes and neighbours.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink::route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink::route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink::route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink::route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink::route::{AddressFamily, RouteNetlinkMessage};

use crate::{Namespace, NetworkError};

/// An interface that the machine gets a card for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interface {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name, which it has in the guest, too.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its largest packet, in bytes.
    pub mtu: u32,
    /// Its addresses and the lengths of their prefixes; none of those that a link gives itself.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// A route of the main table that somebody has set: those of the kernel's own come with the addresses.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Route {
    /// Where it leads; `None` is everywhere.
    pub destination: Option<(IpAddr, u8)>,
    /// By way of whom.
    pub gateway: Option<IpAddr>,
    /// The name of the interface.
    pub interface: String,
    /// The kernel's `RT_SCOPE_*`.
    pub scope: u8,
    /// The sender's address.
    pub source: Option<IpAddr>,
    /// Whether the gateway is taken to be on the link though no address says so.
    pub onlink: bool,
    /// What the kernel prefers it by; 0 is its default.
    pub metric: u32,
}

/// A neighbour that somebody has set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The name of the interface that it is behind.
    pub interface: String,
}

/// All of a namespace that the guest is to have.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Scan {
    /// In the order of their numbers.
    pub interfaces: Vec<Interface>,
    /// In the kernel's order.
    pub routes: Vec<Route>,
    /// In the kernel's order.
    pub neighbours: Vec<Neighbour>,
}

impl Namespace {
    /// Looks at what there is.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`].
    pub fn scan(&mut self) -> Result<Scan, NetworkError> {
        let requests = [
            ("interfaces", RouteNetlinkMessage::GetLink(LinkMessage::default())),
            ("addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default())),
            ("routes", RouteNetlinkMessage::GetRoute(RouteMessage::default())),
            ("neighbours", RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())),
        ];
        let mut messages = Vec::new();
        for (what, request) in requests {
            let failed = NetworkError::kernel(format!("list the {what} of {}", self.path().display()));
            messages.extend(self.connection.dump(request).map_err(failed)?);
        }
        Ok(Scan::of(&messages))
    }
}

impl Scan {
    /// What the kernel's answers say.
    fn of(messages: &[RouteNetlinkMessage]) -> Self {
        let mut interfaces = Vec::new();
        let (mut routes, mut neighbours) = (Vec::new(), Vec::new());
        for message in messages {
            if let RouteNetlinkMessage::NewLink(link) = message {
                interfaces.extend(interface(link));
            }
        }
        interfaces.sort_by_key(|interface: &Interface| interface.index);
        for message in messages {
            if let RouteNetlinkMessage::NewAddress(address) = message
                && let Some(interface) = interfaces.iter_mut().find(|one| one.index == address.header.index)
            {
                interface.addresses.extend(global_address(address));
            }
        }
        let names: HashMap<u32, String> = interfaces.iter().map(|one| (one.index, one.name.clone())).collect();
        for message in messages {
            match message {
                RouteNetlinkMessage::NewRoute(message) => routes.extend(route(message, &names)),
                RouteNetlinkMessage::NewNeighbour(message) => neighbours.extend(neighbour(message, &names)),
                _ => {}
            }
        }
        Self { interfaces, routes, neighbours }
    }
}

/// An interface that carries Ethernet frames and is in use: not loopback, nor the tunnels that every namespace has.
fn interface(link: &LinkMessage) -> Option<Interface> {
    let up = link.header.flags.contains(LinkFlags::Up);
    if link.header.link_layer_type != LinkLayerType::Ether || !up {
        return None;
    }
    let mut interface =
        Interface { index: link.header.index, name: String::new(), mac: [0; 6], mtu: 0, addresses: Vec::new() };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Address(mac) => interface.mac = mac.as_slice().try_into().ok()?,
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            _ => {}
        }
    }
    Some(interface)
}

fn global_address(message: &AddressMessage) -> Option<(IpAddr, u8)> {
    // A link gives itself one of these, and so does the guest's, which is the same by the hardware address.
    if message.header.scope == AddressScope::Link && message.header.family == AddressFamily::Inet6 {
        return None;
    }
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    // With a peer, the other attribute is the peer's.
    let local = find(|attribute| if let AddressAttribute::Local(address) = attribute { Some(*address) } else { None });
    let any = find(|attribute| if let AddressAttribute::Address(address) = attribute { Some(*address) } else { None });
    local.or(any).map(|address| (address, message.header.prefix_len))
}

fn route(message: &RouteMessage, names: &HashMap<u32, String>) -> Option<Route> {
    let header = &message.header;
    let set = header.protocol != RouteProtocol::Kernel && header.protocol != RouteProtocol::Ra;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast || !set {
        return None;
    }
    let mut route =
        Route { scope: header.scope.into(), onlink: header.flags.contains(RouteFlags::Onlink), ..Route::default() };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.destination = address(to).map(|to| (to, header.destination_prefix_length));
            }
            RouteAttribute::Gateway(gateway) => route.gateway = address(gateway),
            RouteAttribute::PrefSource(source) => route.source = address(source),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => route.interface.clone_from(names.get(index)?),
            _ => {}
        }
    }
    // A default route on the link alone names nothing that would tell its family.
    if route.destination.is_none() && route.gateway.is_none() {
        let v6 = header.address_family == AddressFamily::Inet6;
        route.destination = Some((if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }, 0));
    }
    if route.interface.is_empty() {
        tracing::warn!(?route, "a route over several interfaces does not reach the guest");
        return None;
    }
    Some(route)
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// One that was set for good: the guest finds the others by itself.
fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, String>) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let interface = names.get(&message.header.ifindex)?.clone();
    let (mut to, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => to = Some(IpAddr::from(*address)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => to = Some(IpAddr::from(*address)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { address: to?, mac: mac?, interface })
}
