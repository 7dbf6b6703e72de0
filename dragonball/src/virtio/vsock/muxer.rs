//! All connections of a vsock device: which packet and which event belongs to which, and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Fate};
use super::host::{Greeted, Greeting, HostSocket};
use super::packet::{HOST_CID, Header, Operation, Ports, TYPE_STREAM};
use super::{FIRST_FREE_TOKEN, TOKEN_LISTENER};
use crate::virtio::buffers::Buffers;
use crate::virtio::device::{DeviceError, EventRegistry};

/// The most connections at a time; those that are being made or written out count. Each may hold
/// [`super::connection::BUFFER_SIZE`] bytes of the host's memory.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// The most programs of the host that connected and have not said where to; the oldest makes room for a new one.
const MAX_GREETINGS: usize = 64;
/// How many resets may wait for the guest to make room; no packet of the guest is looked at while so many do.
const MAX_RESETS: usize = 256;
/// Host ports of connections that the host makes begin here, as with Firecracker: far above any port of a service.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// How many connections are accepted in one go.
const ACCEPT_TURN: usize = 16;

/// To what the event token of a socket belongs.
enum Endpoint {
    Connection(Ports),
    /// A connection that the guest is done with, whose last bytes the host has not taken yet.
    Remainder(Connection),
    Greeting(Greeting),
}

/// The connections.
pub(super) struct Muxer {
    guest_cid: u64,
    host: HostSocket,
    connections: HashMap<Ports, Connection>,
    endpoints: HashMap<u32, Endpoint>,
    /// Connections that may have something for the guest, in the order of their turns.
    queue: VecDeque<Ports>,
    /// Connections of which the guest must learn that they do not exist.
    resets: VecDeque<Ports>,
    next_token: u32,
    next_port: u32,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, host: HostSocket) -> Self {
        Self {
            guest_cid,
            host,
            connections: HashMap::new(),
            endpoints: HashMap::new(),
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: FIRST_FREE_TOKEN,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// The guest's context id.
    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Begins to accept the host's connections.
    pub(super) fn start(&self, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        events
            .add(self.host.as_raw_fd(), TOKEN_LISTENER, EventSet::IN)
            .map_err(|source| DeviceError::Host { action: "watch the vsock socket", source })
    }

    /// Ends all connections and accepts no more.
    pub(super) fn stop(&mut self, events: &mut dyn EventRegistry) {
        if let Err(error) = events.remove(self.host.as_raw_fd()) {
            tracing::debug!(%error, "the vsock socket was not watched");
        }
        for mut connection in self.connections.drain().map(|(_, connection)| connection) {
            connection.unwatch(events);
        }
        for endpoint in self.endpoints.drain().map(|(_, endpoint)| endpoint) {
            match endpoint {
                Endpoint::Connection(_) => {}
                Endpoint::Remainder(mut connection) => connection.unwatch(events),
                Endpoint::Greeting(greeting) => forget(&greeting.stream, events),
            }
        }
        self.queue.clear();
        self.resets.clear();
    }

    /// Whether the guest must take packets before it may send more.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Handles a packet of the guest.
    pub(super) fn receive(&mut self, packet: &Buffers<'_>, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let Some(header) = Header::read(packet) else {
            return Err(DeviceError::Protocol(format!("a vsock packet of {} bytes has no header", packet.len())));
        };
        if (header.length as usize) > packet.len() - super::packet::HEADER_LENGTH {
            return Err(DeviceError::Protocol(format!(
                "a vsock packet announces {} bytes of payload and has {} with its header",
                header.length,
                packet.len()
            )));
        }
        if header.destination_cid != HOST_CID || header.source_cid != self.guest_cid {
            tracing::debug!(?header, "a vsock packet between strangers is dropped");
            return Ok(());
        }
        let ports = header.ports_from_guest();
        let operation = Operation::from_number(header.operation).filter(|_| header.kind == TYPE_STREAM);
        match (operation, self.connections.contains_key(&ports)) {
            (Some(Operation::Reset), true) => self.end(ports, events),
            (Some(Operation::Reset), false) => {}
            (Some(Operation::Request), false) => self.grant(ports, &header),
            (Some(operation), true) => self.pass_on(ports, &header, operation, packet, events),
            (None, true) => self.refuse(ports, events),
            (_, false) => self.resets.push_back(ports),
        }
        Ok(())
    }

    fn pass_on(
        &mut self,
        ports: Ports,
        header: &Header,
        operation: Operation,
        packet: &Buffers<'_>,
        events: &mut dyn EventRegistry,
    ) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        if connection.receive(header, operation, packet, ports.host) == Fate::Refused {
            return self.refuse(ports, events);
        }
        if connection.is_closed_by_guest() {
            return self.refuse(ports, events);
        }
        let more = connection.owes() || (operation != Operation::Data && connection.may_pull());
        if more {
            self.enqueue(ports);
        }
        self.watch(ports, events);
    }

    /// Connects the guest to who listens on the host, or refuses.
    fn grant(&mut self, ports: Ports, request: &Header) {
        let stream = match self.has_room().then(|| self.host.connect(ports.host)) {
            Some(Ok(stream)) => stream,
            refused => {
                tracing::debug!(port = ports.host, ?refused, "a connection of the guest is refused");
                self.resets.push_back(ports);
                return;
            }
        };
        let token = self.token();
        self.endpoints.insert(token, Endpoint::Connection(ports));
        self.connections.insert(ports, Connection::granted(stream, token, request));
        self.enqueue(ports);
    }

    /// Ends a connection, and tells the guest.
    fn refuse(&mut self, ports: Ports, events: &mut dyn EventRegistry) {
        self.end(ports, events);
        self.resets.push_back(ports);
    }

    /// Ends a connection that the guest knows to be over. What it sent before is still written out.
    fn end(&mut self, ports: Ports, events: &mut dyn EventRegistry) {
        let Some(mut connection) = self.connections.remove(&ports) else { return };
        if connection.queued {
            self.queue.retain(|&queued| queued != ports);
        }
        let token = connection.token;
        connection.unwatch(events);
        self.endpoints.remove(&token);
        if let Some(mut remainder) = connection.into_remainder()
            && remainder.watch(events).is_ok()
        {
            self.endpoints.insert(token, Endpoint::Remainder(remainder));
        }
    }

    fn enqueue(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.queue.push_back(ports);
        }
    }

    fn watch(&mut self, ports: Ports, events: &mut dyn EventRegistry) {
        if let Some(connection) = self.connections.get_mut(&ports)
            && let Err(error) = connection.watch(events)
        {
            tracing::warn!(%error, "a vsock connection cannot be watched and is ended");
            self.refuse(ports, events);
        }
    }

    /// A socket of the host is ready.
    pub(super) fn host_ready(&mut self, token: u32, ready: EventSet, events: &mut dyn EventRegistry) {
        match self.endpoints.get_mut(&token) {
            // A late event of a socket that was closed since.
            None => {}
            Some(Endpoint::Connection(ports)) => {
                let ports = *ports;
                if let Some(connection) = self.connections.get_mut(&ports) {
                    connection.ready(ready);
                    self.enqueue(ports);
                }
            }
            Some(Endpoint::Remainder(connection)) => {
                connection.flush();
                if connection.is_flushed() || connection.watch(events).is_err() {
                    connection.unwatch(events);
                    self.endpoints.remove(&token);
                }
            }
            Some(Endpoint::Greeting(greeting)) => match greeting.read_on() {
                Greeted::Unfinished => {}
                greeted => {
                    forget(&greeting.stream, events);
                    if let Some(Endpoint::Greeting(greeting)) = self.endpoints.remove(&token)
                        && let Greeted::Port(port) = greeted
                    {
                        self.request(port, greeting.stream);
                    }
                }
            },
        }
    }

    /// Programs of the host wait to be accepted.
    pub(super) fn accept(&mut self, events: &mut dyn EventRegistry) {
        for _ in 0..ACCEPT_TURN {
            let Some(stream) = self.host.accept() else { return };
            self.make_room_for_greeting(events);
            let token = self.token();
            if !self.has_room() || events.add(stream.as_raw_fd(), token, EventSet::IN).is_err() {
                tracing::warn!("a connection of the host to the guest is refused: too many are open");
                continue;
            }
            self.endpoints.insert(token, Endpoint::Greeting(Greeting::new(stream)));
        }
    }

    fn make_room_for_greeting(&mut self, events: &mut dyn EventRegistry) {
        let greetings = self.endpoints.iter().filter(|(_, endpoint)| matches!(endpoint, Endpoint::Greeting(_)));
        // Tokens count up, so the one that is farthest behind is the oldest.
        let (count, oldest) = greetings.fold((0, None::<u32>), |(count, oldest), (&token, _)| {
            let age = |token: u32| self.next_token.wrapping_sub(token);
            (count + 1, oldest.filter(|&oldest| age(oldest) > age(token)).or(Some(token)))
        });
        if count >= MAX_GREETINGS
            && let Some(Endpoint::Greeting(greeting)) = oldest.and_then(|token| self.endpoints.remove(&token))
        {
            forget(&greeting.stream, events);
        }
    }

    /// Asks the guest for a connection to its port `guest`.
    fn request(&mut self, guest: u32, stream: UnixStream) {
        let token = self.token();
        let ports = Ports { host: self.host_port(guest), guest };
        self.endpoints.insert(token, Endpoint::Connection(ports));
        self.connections.insert(ports, Connection::requested(stream, token));
        self.enqueue(ports);
    }

    fn has_room(&self) -> bool {
        self.endpoints.len() < MAX_CONNECTIONS
    }

    /// A token that no socket has. There are far fewer sockets than tokens.
    fn token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = token.checked_add(1).unwrap_or(FIRST_FREE_TOKEN);
            if !self.endpoints.contains_key(&token) {
                return token;
            }
        }
    }

    /// A host port that no connection to the guest's port has. There are far fewer connections than ports.
    fn host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.connections.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.queue.is_empty()
    }

    /// Fills `packet` with the next packet for the guest; returns its length, or `None` when there is nothing to send.
    pub(super) fn produce(&mut self, packet: &Buffers<'_>, events: &mut dyn EventRegistry) -> Option<usize> {
        loop {
            if let Some(ports) = self.resets.pop_front() {
                let operation = Operation::Reset as u16;
                return Some(self.finish(packet, ports, Header { operation, kind: TYPE_STREAM, ..Header::default() }));
            }
            let ports = self.queue.pop_front()?;
            let Some(connection) = self.connections.get_mut(&ports) else { continue };
            if let Some(header) = connection.produce(packet) {
                self.queue.push_back(ports);
                return Some(self.finish(packet, ports, header));
            }
            connection.queued = false;
            self.watch(ports, events);
        }
    }

    /// Writes the header in front of a packet's payload.
    fn finish(&self, packet: &Buffers<'_>, ports: Ports, header: Header) -> usize {
        let header = Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: ports.host,
            destination_port: ports.guest,
            ..header
        };
        packet.write_at(0, &header.to_bytes()) + header.length as usize
    }

    /// How many bytes of the guest wait for the host's programs to take them.
    #[cfg(test)]
    pub(super) fn buffered_bytes(&self) -> usize {
        let remainders = self.endpoints.values().filter_map(|endpoint| match endpoint {
            Endpoint::Remainder(connection) => Some(connection),
            Endpoint::Connection(_) | Endpoint::Greeting(_) => None,
        });
        self.connections.values().chain(remainders).map(Connection::buffer_capacity).sum()
    }

    /// The guest has no room: the sockets of those that wait for it are not watched meanwhile.
    pub(super) fn suspend(&mut self, events: &mut dyn EventRegistry) {
        for index in (0..self.queue.len()).rev() {
            if let Some(&ports) = self.queue.get(index) {
                self.watch(ports, events);
            }
        }
    }
}

/// Watches a greeting's socket no longer.
fn forget(stream: &UnixStream, events: &mut dyn EventRegistry) {
    if let Err(error) = events.remove(stream.as_raw_fd()) {
        tracing::debug!(%error, "a greeting was not watched");
    }
}
