//! The guest's network: links, addresses, routes and neighbours by rtnetlink(7).

mod change;

use std::fs;
use std::io;
use std::net::IpAddr;

use netlink::route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink::route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink::route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink::route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink::route::{AddressFamily, RouteNetlinkMessage};
use netlink::{Connection, NLM_F_CREATE, NLM_F_REPLACE};
use protocols::agent::{Interface, Neighbour, Route};
use ttrpc::Code;

/// Interfaces, addresses of one interface, routes or neighbours that one Setup may bring.
const LIMIT: usize = 4096;
/// Longest name of an interface (linux/if.h, `IFNAMSIZ` without the zero byte).
const NAME_LENGTH: usize = 15;

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("{what} {text:?}: {why}")]
    Invalid { what: &'static str, text: String, why: String },
    #[error("no network interface has the MAC address {mac:?}; there are: {}", present.join(", "))]
    NoInterface { mac: String, present: Vec<String> },
    #[error("cannot {what}: {source}")]
    Kernel { what: String, source: io::Error },
}

impl NetworkError {
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::INVALID_ARGUMENT,
            Self::NoInterface { .. } => Code::NOT_FOUND,
            Self::Kernel { .. } => Code::UNKNOWN,
        }
    }
}

pub(crate) use change::{Applied, await_links};

type Result<T> = std::result::Result<T, NetworkError>;

/// Brings the loopback interface up: it is always the first.
pub(crate) fn loopback_up() -> Result<()> {
    let mut loopback = LinkMessage::default();
    loopback.header.index = 1;
    set_up(loopback, "bring the loopback interface up")
}

/// Configures interfaces, then routes: those without a gateway first, since gateways are reached through them.
pub(crate) fn configure(interfaces: &[Interface], routes: &[Route], neighbours: &[Neighbour]) -> Result<()> {
    check_count("interfaces", interfaces.len())?;
    check_count("routes", routes.len())?;
    check_count("neighbours", neighbours.len())?;
    interfaces.iter().try_for_each(configure_interface)?;
    let (direct, through): (Vec<_>, Vec<_>) = routes.iter().partition(|route| route.gateway.is_empty());
    direct.into_iter().chain(through).try_for_each(add_route)?;
    neighbours.iter().try_for_each(add_neighbour)
}

fn configure_interface(interface: &Interface) -> Result<()> {
    check_count("addresses", interface.addresses.len())?;
    let link = find_link(&interface.mac)?;
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    if !interface.name.is_empty() && interface.name != link.name {
        check_name(&interface.name)?;
        message.attributes.push(LinkAttribute::IfName(interface.name.clone()));
    }
    if interface.mtu > 0 {
        message.attributes.push(LinkAttribute::Mtu(interface.mtu));
    }
    set_up(message, &format!("set up interface {} ({})", interface.name, interface.mac))?;
    for text in &interface.addresses {
        add_address(link.index, parse_cidr("address", text)?, text)?;
    }
    Ok(())
}

fn set_up(mut message: LinkMessage, what: &str) -> Result<()> {
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    request(RouteNetlinkMessage::SetLink(message), 0, what)
}

fn add_address(index: u32, cidr: (IpAddr, u8), text: &str) -> Result<()> {
    let mut message = address_message(index, cidr);
    if cidr.0.is_ipv6() {
        // The address is the pod's alone; waiting for a duplicate would only delay its first packet.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE, &format!("add address {text}"))
}

fn address_message(index: u32, (address, prefix): (IpAddr, u8)) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

fn add_route(route: &Route) -> Result<()> {
    let what = format!("add route {:?} via {:?} on {:?}", route.destination, route.gateway, route.interface);
    let message = route_message(route, link_index(&route.interface)?)?;
    request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE, &what)
}

fn route_message(route: &Route, index: u32) -> Result<RouteMessage> {
    let destination = optional(&route.destination).map(|text| parse_cidr("route destination", text)).transpose()?;
    let gateway = optional(&route.gateway).map(|text| parse_address("gateway", text)).transpose()?;
    let source = optional(&route.source).map(|text| parse_address("route source", text)).transpose()?;
    let Some(address_family) = destination.map(|(address, _)| address).or(gateway).map(family) else {
        return Err(invalid("route", "", "it has neither a destination nor a gateway"));
    };
    let scope = u8::try_from(route.scope).map_err(|e| invalid("route scope", &route.scope.to_string(), e))?;
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family,
        destination_prefix_length: destination.map_or(0, |(_, prefix)| prefix),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::from(scope),
        kind: RouteType::Unicast,
        flags: if route.onlink { RouteFlags::Onlink } else { RouteFlags::empty() },
        ..Default::default()
    };
    message.attributes.push(RouteAttribute::Oif(index));
    message.attributes.extend(destination.map(|(address, _)| RouteAttribute::Destination(RouteAddress::from(address))));
    message.attributes.extend(gateway.map(|address| RouteAttribute::Gateway(RouteAddress::from(address))));
    message.attributes.extend(source.map(|address| RouteAttribute::PrefSource(RouteAddress::from(address))));
    message.attributes.extend((route.metric > 0).then_some(RouteAttribute::Priority(route.metric)));
    Ok(message)
}

fn add_neighbour(neighbour: &Neighbour) -> Result<()> {
    let message = neighbour_message(neighbour)?;
    let what = format!("add neighbour {} ({}) on {}", neighbour.address, neighbour.mac, neighbour.interface);
    request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE, &what)
}

fn neighbour_message(neighbour: &Neighbour) -> Result<NeighbourMessage> {
    let address = parse_address("neighbour", &neighbour.address)?;
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = link_index(&neighbour.interface)?;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(address.into()),
        NeighbourAttribute::LinkLayerAddress(parse_mac(&neighbour.mac)?),
    ];
    Ok(message)
}

fn request(message: RouteNetlinkMessage, flags: u16, what: &str) -> Result<()> {
    let done = Connection::open().and_then(|mut connection| connection.request(message, flags));
    done.map_err(|source| NetworkError::Kernel { what: what.to_owned(), source })
}

struct Link {
    index: u32,
    name: String,
}

fn find_link(mac: &str) -> Result<Link> {
    let failed = |source| NetworkError::Kernel { what: "list network interfaces".into(), source };
    let mut present = Vec::new();
    for entry in fs::read_dir("/sys/class/net").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        // An interface may go while it is looked at.
        let Ok(address) = fs::read_to_string(format!("/sys/class/net/{name}/address")) else { continue };
        if address.trim().eq_ignore_ascii_case(mac) {
            return Ok(Link { index: link_index(&name)?, name });
        }
        present.push(format!("{name} {}", address.trim()));
    }
    Err(NetworkError::NoInterface { mac: mac.to_owned(), present })
}

fn link_index(name: &str) -> Result<u32> {
    check_name(name)?;
    nix::net::if_::if_nametoindex(name)
        .map_err(|errno| NetworkError::Kernel { what: format!("find interface {name:?}"), source: errno.into() })
}

fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    if name.is_empty() || name.len() > NAME_LENGTH || !name.chars().all(plain) || name == "." || name == ".." {
        return Err(invalid("interface name", name, format!("expected 1 to {NAME_LENGTH} plain characters")));
    }
    Ok(())
}

fn check_count(what: &'static str, count: usize) -> Result<()> {
    if count > LIMIT { Err(invalid(what, &count.to_string(), format!("the limit is {LIMIT}"))) } else { Ok(()) }
}

fn parse_cidr(what: &'static str, text: &str) -> Result<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/').ok_or_else(|| invalid(what, text, "expected address/prefix"))?;
    let address = parse_address(what, address)?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match prefix.parse() {
        Ok(prefix) if prefix <= longest => Ok((address, prefix)),
        _ => Err(invalid(what, text, format!("the prefix is a number from 0 to {longest}"))),
    }
}

fn parse_address(what: &'static str, text: &str) -> Result<IpAddr> {
    text.parse().map_err(|e| invalid(what, text, e))
}

fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| invalid("MAC address", text, "expected six bytes like 02:00:00:00:00:01"))
}

fn optional(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn invalid(what: &'static str, text: &str, why: impl ToString) -> NetworkError {
    NetworkError::Invalid { what, text: text.to_owned(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_cidr() {
        assert_eq!(parse_cidr("a", "10.0.0.2/24").ok(), Some(("10.0.0.2".parse().expect("v4"), 24)));
        assert_eq!(parse_cidr("a", "fd00::2/64").ok(), Some(("fd00::2".parse().expect("v6"), 64)));
        for bad in ["10.0.0.2", "10.0.0.2/33", "fd00::/129", "x/1", "/", "1.2.3.4/-1", ""] {
            assert!(parse_cidr("a", bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn a_route_takes_its_family_from_destination_or_gateway() {
        let v6 = Route { gateway: "fd00::1".into(), ..Default::default() };
        assert_eq!(route_message(&v6, 2).expect("a default route").header.address_family, AddressFamily::Inet6);
        let v4 = Route { destination: "10.1.0.0/16".into(), scope: 253, ..Default::default() };
        let message = route_message(&v4, 2).expect("a link route");
        assert_eq!(message.header.scope, RouteScope::Link);
        assert_eq!(message.header.destination_prefix_length, 16);
        assert!(route_message(&Route::default(), 2).is_err());
        assert!(route_message(&Route { scope: 256, ..v4 }, 2).is_err());
    }

    #[test]
    fn a_route_may_have_a_gateway_that_no_address_leads_to_and_a_metric() {
        let route = Route { gateway: "169.254.1.1".into(), onlink: true, metric: 42, ..Default::default() };
        let message = route_message(&route, 2).expect("a default route");
        assert_eq!(message.header.flags, RouteFlags::Onlink);
        assert!(message.attributes.contains(&RouteAttribute::Priority(42)));
    }

    #[test]
    fn hardware_addresses_are_six_bytes() {
        assert_eq!(parse_mac("02:00:5e:10:ab:FF").ok(), Some(vec![2, 0, 0x5e, 0x10, 0xab, 0xff]));
        for bad in ["", "02:00:5e:10:ab", "02:00:5e:10:ab:ff:00", "02:00:5e:10:ab:100", "0x:00:00:00:00:00"] {
            assert!(parse_mac(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn interface_names_are_plain() {
        for bad in ["", "..", "a/b", "a b", "sixteen-letters-", "a:1"] {
            assert!(check_name(bad).is_err(), "{bad:?} must be refused");
        }
        assert!(check_name("eth0").is_ok());
    }
}
