//! Requests to the kernel's rtnetlink(7), one at a time.
//!
//! The kernel answers each request before send(2) returns, so plain blocking calls serve: they need no event loop and no
//! task that waits for answers.

mod news;

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

pub use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
/// What requests and answers are made of.
pub use netlink_packet_route as route;
pub use news::News;

/// The most messages that one answer may have: a namespace with as many addresses or routes is no pod's.
const ANSWER_MAX: usize = 100_000;

/// What messages of one datagram begin at multiples of, in bytes (`NLMSG_ALIGNTO` of linux/netlink.h).
const ALIGNMENT: usize = 4;

/// A socket of the network namespace that the thread was in which opened it. It stays in that one, whoever uses it.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    number: u32,
}

impl Connection {
    /// Opens a socket in this thread's network namespace.
    ///
    /// # Errors
    /// When the kernel has none.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, number: 0 })
    }

    /// Has the kernel do something, with `flags` such as [`NLM_F_CREATE`].
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, flags | NLM_F_ACK).map(|_| ())
    }

    /// Asks for all that there is of a kind.
    ///
    /// # Errors
    /// The kernel's refusal, or an answer that cannot be understood.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, NLM_F_DUMP)
    }

    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.number = self.number.wrapping_add(1);
        let mut packet = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        packet.header.flags = NLM_F_REQUEST | flags;
        packet.header.sequence_number = self.number;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        self.answer()
    }

    /// Collects messages up to the one that ends the answer.
    fn answer(&self) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut messages = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                let length = (message.header.length as usize).next_multiple_of(ALIGNMENT).max(ALIGNMENT);
                rest = rest.get(length..).unwrap_or_default();
                // What is left of an earlier answer that nobody read to its end.
                if message.header.sequence_number != self.number {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) if messages.len() < ANSWER_MAX => messages.push(inner),
                    NetlinkPayload::InnerMessage(_) => {
                        return Err(io::Error::other(format!("the answer has more than {ANSWER_MAX} messages")));
                    }
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(messages),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::AddressFamily;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    #[test]
    fn the_loopback_interface_is_among_the_links() {
        let mut connection = Connection::open().expect("a socket");
        let links = connection.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).expect("the links");
        let is_loopback = |message: &RouteNetlinkMessage| match message {
            RouteNetlinkMessage::NewLink(link) => {
                link.attributes.contains(&LinkAttribute::IfName("lo".to_owned())) && link.header.index == 1
            }
            _ => false,
        };
        assert!(links.iter().any(is_loopback), "{links:?}");
    }

    #[test]
    fn a_refusal_is_the_kernel_s_and_the_next_request_has_an_answer_of_its_own() {
        let mut connection = Connection::open().expect("a socket");
        let mut nowhere = LinkMessage::default();
        nowhere.header.index = u32::MAX >> 1;
        nowhere.header.interface_family = AddressFamily::Unspec;
        let error = connection.request(RouteNetlinkMessage::SetLink(nowhere), 0).expect_err("there is no such link");
        let code = error.raw_os_error().map(nix::Error::from_raw);
        assert!(matches!(code, Some(nix::Error::ENODEV | nix::Error::EPERM)), "{error}");
        connection.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).expect("the links");
    }
}
