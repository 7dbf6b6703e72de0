//! A network that changes while the guest runs: from what is set to what is wanted.

use std::io;
use std::time::Duration;

use netlink::route::RouteNetlinkMessage;
use netlink::route::link::{LinkAttribute, LinkFlags, LinkMessage};
use protocols::agent::{Interface, Neighbour, Route};

use super::{
    NetworkError, Result, address_message, configure, find_link, link_index, neighbour_message, parse_cidr, request,
    route_message,
};
use crate::uevents::Uevents;

/// What the host has had set. What containers set themselves is not in it, and stays.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

impl Applied {
    pub(crate) fn new(interfaces: &[Interface], routes: &[Route], neighbours: &[Neighbour]) -> Self {
        Self { interfaces: interfaces.to_vec(), routes: routes.to_vec(), neighbours: neighbours.to_vec() }
    }

    /// Takes back what is not in `wanted`, and sets all that is. What fails on the way leaves the rest undone, for the next
    /// change.
    pub(crate) fn change(&mut self, wanted: Self) -> Result<()> {
        for neighbour in self.neighbours.iter().filter(|old| !wanted.neighbours.contains(old)) {
            remove_neighbour(neighbour)?;
        }
        for route in self.routes.iter().filter(|old| !wanted.routes.contains(old)) {
            remove_route(route)?;
        }
        for old in &self.interfaces {
            match wanted.interfaces.iter().find(|new| new.mac == old.mac) {
                Some(new) => remove_addresses(old, new)?,
                None => withdraw(old)?,
            }
        }
        make_way(&wanted.interfaces)?;
        configure(&wanted.interfaces, &wanted.routes, &wanted.neighbours)?;
        *self = wanted;
        Ok(())
    }
}

/// Waits until each interface has its link, which the kernel makes after the host has plugged the card.
pub(crate) async fn await_links(interfaces: &[Interface], deadline: Duration) -> Result<()> {
    let failed = |source| NetworkError::Kernel { what: "wait for a network interface".into(), source };
    let look = || interfaces.iter().try_for_each(|interface| find_link(&interface.mac).map(drop));
    let there = || match look() {
        Ok(()) => Ok(Some(Ok(()))),
        Err(NetworkError::NoInterface { .. }) => Ok(None),
        Err(other) => Ok(Some(Err(other))),
    };
    if let Some(known) = there().map_err(failed)? {
        return known;
    }
    // Before the second look: what comes after it is an event.
    let events = Uevents::listen().map_err(failed)?;
    match tokio::time::timeout(deadline, events.until(there)).await {
        Ok(outcome) => outcome.map_err(failed)?,
        Err(_) => look(),
    }
}

/// The link goes with its card; until then nothing leaves by it.
fn withdraw(interface: &Interface) -> Result<()> {
    let link = match find_link(&interface.mac) {
        Ok(link) => link,
        Err(NetworkError::NoInterface { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.change_mask = LinkFlags::Up;
    take_back(RouteNetlinkMessage::SetLink(message), &format!("take interface {} down", link.name))?;
    let none = Interface::default();
    remove_addresses(interface, &none)
}

fn remove_addresses(old: &Interface, new: &Interface) -> Result<()> {
    for text in old.addresses.iter().filter(|address| !new.addresses.contains(address)) {
        let Ok(link) = find_link(&old.mac) else { return Ok(()) };
        let message = address_message(link.index, parse_cidr("address", text)?);
        take_back(RouteNetlinkMessage::DelAddress(message), &format!("remove address {text}"))?;
    }
    Ok(())
}

fn remove_route(route: &Route) -> Result<()> {
    // With its interface, a route is gone.
    let Ok(index) = link_index(&route.interface) else { return Ok(()) };
    let what = format!("remove route {:?} via {:?} on {:?}", route.destination, route.gateway, route.interface);
    take_back(RouteNetlinkMessage::DelRoute(route_message(route, index)?), &what)
}

fn remove_neighbour(neighbour: &Neighbour) -> Result<()> {
    if link_index(&neighbour.interface).is_err() {
        return Ok(());
    }
    let what = format!("remove neighbour {} on {}", neighbour.address, neighbour.interface);
    take_back(RouteNetlinkMessage::DelNeighbour(neighbour_message(neighbour)?), &what)
}

/// Has links give up the names that others are to have.
fn make_way(interfaces: &[Interface]) -> Result<()> {
    for interface in interfaces.iter().filter(|interface| !interface.name.is_empty()) {
        let link = find_link(&interface.mac)?;
        if link.name == interface.name {
            continue;
        }
        let Ok(holder) = link_index(&interface.name) else { continue };
        let mut message = LinkMessage::default();
        message.header.index = holder;
        message.attributes.push(LinkAttribute::IfName(format!("left{holder}")));
        request(RouteNetlinkMessage::SetLink(message), 0, &format!("rename interface {}", interface.name))?;
    }
    Ok(())
}

/// What is not there (any more) is taken back already.
fn take_back(message: RouteNetlinkMessage, what: &str) -> Result<()> {
    match request(message, 0, what) {
        Err(NetworkError::Kernel { source, .. }) if is_gone(&source) => Ok(()),
        other => other,
    }
}

fn is_gone(error: &io::Error) -> bool {
    let codes = [libc::ESRCH, libc::ENOENT, libc::ENODEV, libc::ENETUNREACH, libc::EADDRNOTAVAIL];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}
