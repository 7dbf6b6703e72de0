//! One connection: a socket of the host on one side, a port of the guest on the other, and the flow control between.
//!
//! Guest → host: what the socket does not take at once waits in a backlog, at most [`BUFFER_SIZE`] bytes; the guest
//! knows that size and sends no more (virtio 1.2, §5.10.6.3). Host → guest: bytes go straight from the socket into the
//! guest's buffers, and are left in the socket while the guest has no room. A connection that is quiet holds no buffer.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use vmm_sys_util::epoll::EventSet;

use super::packet::{HEADER_LENGTH, Header, NO_RECEIVE, NO_SEND, Operation};
use crate::virtio::buffers::Buffers;
use crate::virtio::device::EventRegistry;

/// How many bytes the guest may send before the host's socket took them.
pub(super) const BUFFER_SIZE: u32 = 256 << 10;
/// The longest payload of a packet (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` in Linux).
const MAX_PAYLOAD: usize = 64 << 10;

/// Whether both sides agreed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// The host asked the guest, which has not answered.
    Requested,
    /// Bytes may flow.
    Open,
}

/// Packets without payload that the guest is owed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    /// Flags of a `Shutdown`, 0 for none.
    shutdown: u32,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fate {
    /// It goes on.
    Alive,
    /// It is over, and the guest must be told by a reset.
    Refused,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// The host's side.
    stream: UnixStream,
    /// Under which events of the socket come.
    pub(super) token: u32,
    /// Whether it is in the list of those that have something for the guest.
    pub(super) queued: bool,
    phase: Phase,
    owed: Owed,
    watched: Option<EventSet>,

    /// Bytes from the guest that the socket did not take yet.
    backlog: VecDeque<u8>,
    /// Bytes that the socket took, free running.
    forwarded: Wrapping<u32>,
    /// The last value of `forwarded` that the guest was told.
    told: Wrapping<u32>,
    guest_sends_no_more: bool,
    /// The socket's other end reads no more: what the guest sends is dropped.
    host_takes_no_more: bool,

    /// Bytes sent to the guest, free running.
    sent: Wrapping<u32>,
    /// The guest's receive buffer.
    guest_buffer: u32,
    /// Bytes that left the guest's receive buffer, free running.
    guest_forwarded: Wrapping<u32>,
    credit_requested: bool,
    guest_takes_no_more: bool,
    /// The socket's other end sends no more, and all of it was read.
    host_sends_no_more: bool,
    /// The socket is closed in both directions.
    hung_up: bool,
}

impl Connection {
    fn new(stream: UnixStream, token: u32, phase: Phase) -> Self {
        Self {
            stream,
            token,
            queued: false,
            phase,
            owed: Owed::default(),
            watched: None,
            backlog: VecDeque::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            guest_sends_no_more: false,
            host_takes_no_more: false,
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            credit_requested: false,
            guest_takes_no_more: false,
            host_sends_no_more: false,
            hung_up: false,
        }
    }

    /// A connection that the guest asked for and gets.
    pub(super) fn granted(stream: UnixStream, token: u32, request: &Header) -> Self {
        let mut connection = Self::new(stream, token, Phase::Open);
        connection.owed.response = true;
        connection.take_credit(request);
        connection
    }

    /// A connection that the host asks the guest for.
    pub(super) fn requested(stream: UnixStream, token: u32) -> Self {
        let mut connection = Self::new(stream, token, Phase::Requested);
        connection.owed.request = true;
        connection
    }

    /// Handles a packet of the guest; its payload is what follows the header in `packet`.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        operation: Operation,
        packet: &Buffers<'_>,
        host_port: u32,
    ) -> Fate {
        self.take_credit(header);
        match (operation, self.phase) {
            (Operation::Response, Phase::Requested) => return self.open(host_port),
            (Operation::Data, Phase::Open) => return self.accept(packet, header.length as usize),
            (Operation::Shutdown, Phase::Open) => self.guest_shuts_down(header.flags),
            (Operation::CreditUpdate, Phase::Open) => {}
            (Operation::CreditRequest, Phase::Open) => self.owed.credit_update = true,
            _ => return Fate::Refused,
        }
        Fate::Alive
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer_size;
        self.guest_forwarded = Wrapping(header.forwarded);
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// How many bytes the guest has room for. A guest that claims to have read more than it got has no room.
    fn credit(&self) -> usize {
        let in_flight = self.sent - self.guest_forwarded;
        self.guest_buffer.saturating_sub(in_flight.0) as usize
    }

    /// The guest granted the connection: tells the host, as the `CONNECT` protocol wants it.
    fn open(&mut self, host_port: u32) -> Fate {
        self.phase = Phase::Open;
        // A new socket takes so short a line whole, or its other end is gone.
        match self.stream.write_all(format!("OK {host_port}\n").as_bytes()) {
            Ok(()) => Fate::Alive,
            Err(_) => Fate::Refused,
        }
    }

    /// Takes payload of the guest: into the socket as far as it goes, the rest into the backlog.
    fn accept(&mut self, packet: &Buffers<'_>, length: usize) -> Fate {
        if self.guest_sends_no_more || self.backlog.len() + length > BUFFER_SIZE as usize {
            return Fate::Refused;
        }
        let mut done = 0;
        if self.backlog.is_empty() && !self.host_takes_no_more {
            match packet.drain_to(HEADER_LENGTH, length, &mut self.stream) {
                Ok(count) => done = count,
                Err(error) if is_temporary(&error) => {}
                Err(_) => self.host_is_deaf(),
            }
        }
        if self.host_takes_no_more {
            done = length;
        }
        self.forward(done);
        let mut rest = vec![0; length - done];
        packet.read_at(HEADER_LENGTH + done, &mut rest);
        self.backlog.extend(rest);
        Fate::Alive
    }

    /// Counts bytes that the socket took; the guest is told once half of its room would be gone without that.
    fn forward(&mut self, count: usize) {
        // A backlog is shorter than 4 GiB, and so is a packet.
        self.forwarded += Wrapping(u32::try_from(count).unwrap_or(u32::MAX));
        if (self.forwarded - self.told).0 >= BUFFER_SIZE / 2 {
            self.owed.credit_update = true;
        }
    }

    /// Writes the backlog to the socket, as far as it goes.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            match self.stream.write(self.backlog.as_slices().0) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.forward(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_is_deaf(),
            }
        }
        self.backlog = VecDeque::new();
        if self.guest_sends_no_more {
            // It fails only when the other end is gone, which the socket tells by itself.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The socket's other end takes no more bytes: the guest is told, what it sends until then is dropped.
    fn host_is_deaf(&mut self) {
        self.host_takes_no_more = true;
        self.forward(self.backlog.len());
        self.backlog.clear();
        self.owed.shutdown |= NO_RECEIVE;
    }

    fn guest_shuts_down(&mut self, flags: u32) {
        if flags & NO_SEND != 0 && !self.guest_sends_no_more {
            self.guest_sends_no_more = true;
            self.flush();
        }
        if flags & NO_RECEIVE != 0 && !self.guest_takes_no_more {
            self.guest_takes_no_more = true;
            // See `flush`.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }

    /// Whether the guest closed both directions: it waits for a reset and sends nothing any more.
    pub(super) fn is_closed_by_guest(&self) -> bool {
        self.guest_sends_no_more && self.guest_takes_no_more
    }

    /// The socket is ready for `events`. Whether it has something for the guest is found out when the guest has room.
    pub(super) fn ready(&mut self, events: EventSet) {
        if events.intersects(EventSet::OUT | EventSet::ERROR | EventSet::HANG_UP) {
            self.flush();
        }
        if events.contains(EventSet::HANG_UP) && self.host_sends_no_more && !self.hung_up {
            self.hung_up = true;
            self.owed.shutdown |= NO_SEND | NO_RECEIVE;
        }
    }

    /// Fills `packet` with the next packet for the guest; returns its header and payload length, or `None` when there is
    /// nothing to send.
    pub(super) fn produce(&mut self, packet: &Buffers<'_>) -> Option<Header> {
        let (operation, flags, length) = self.next_packet(packet)?;
        self.told = self.forwarded;
        self.owed.credit_update = false;
        Some(Header {
            length,
            kind: super::packet::TYPE_STREAM,
            operation: operation as u16,
            flags,
            buffer_size: BUFFER_SIZE,
            forwarded: self.forwarded.0,
            ..Header::default()
        })
    }

    fn next_packet(&mut self, packet: &Buffers<'_>) -> Option<(Operation, u32, u32)> {
        let owed = &mut self.owed;
        if std::mem::take(&mut owed.request) {
            return Some((Operation::Request, 0, 0));
        }
        if std::mem::take(&mut owed.response) {
            return Some((Operation::Response, 0, 0));
        }
        if self.phase == Phase::Requested {
            return None;
        }
        if let Some(length) = self.pull(packet) {
            return Some((Operation::Data, 0, length));
        }
        // Data came first: a shutdown says that there is no more of it.
        let owed = &mut self.owed;
        if owed.shutdown != 0 {
            return Some((Operation::Shutdown, std::mem::take(&mut owed.shutdown), 0));
        }
        if owed.credit_update {
            return Some((Operation::CreditUpdate, 0, 0));
        }
        std::mem::take(&mut owed.credit_request).then_some((Operation::CreditRequest, 0, 0))
    }

    /// Reads from the socket into the payload of `packet`; `None` when there is nothing to read or no room for it.
    fn pull(&mut self, packet: &Buffers<'_>) -> Option<u32> {
        if self.host_sends_no_more || self.guest_takes_no_more {
            return None;
        }
        let credit = self.credit();
        if credit == 0 {
            if !std::mem::replace(&mut self.credit_requested, true) {
                self.owed.credit_request = true;
            }
            return None;
        }
        let room = packet.len().saturating_sub(HEADER_LENGTH).min(credit).min(MAX_PAYLOAD);
        match packet.fill_from(HEADER_LENGTH, room, &mut self.stream) {
            Ok(0) if room > 0 => self.end_of_stream(),
            Ok(count) if count > 0 => {
                let length = u32::try_from(count).unwrap_or(u32::MAX);
                self.sent += Wrapping(length);
                return Some(length);
            }
            Err(error) if !is_temporary(&error) => self.end_of_stream(),
            Ok(_) | Err(_) => {}
        }
        None
    }

    /// All that the host sent was read. Whether it still listens is another matter.
    fn end_of_stream(&mut self) {
        self.host_sends_no_more = true;
        let mut socket = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let polled = nix::poll::poll(&mut socket, PollTimeout::ZERO);
        let closed =
            socket[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR));
        self.hung_up = polled.is_ok() && closed;
        self.owed.shutdown |= if self.hung_up { NO_SEND | NO_RECEIVE } else { NO_SEND };
    }

    /// Whether a packet without payload is owed.
    pub(super) fn owes(&self) -> bool {
        self.owed != Owed::default()
    }

    /// Whether bytes of the host could go to the guest now.
    pub(super) fn may_pull(&self) -> bool {
        self.phase == Phase::Open && !self.host_sends_no_more && !self.guest_takes_no_more && self.credit() > 0
    }

    /// What the socket has to be watched for. A closed socket reports `HANG_UP` whatever it is watched for, so that it
    /// must not be watched at all while nothing can be done about it.
    fn interest(&self) -> Option<EventSet> {
        let mut interest = EventSet::empty();
        if self.may_pull() && !self.queued {
            interest |= EventSet::IN;
        }
        if !self.backlog.is_empty() {
            interest |= EventSet::OUT;
        }
        let awaits_hang_up = self.host_sends_no_more && !self.hung_up && !self.queued;
        (!interest.is_empty() || awaits_hang_up).then_some(interest)
    }

    /// Brings what the event loop watches up to date.
    pub(super) fn watch(&mut self, events: &mut dyn EventRegistry) -> io::Result<()> {
        let interest = self.interest();
        let fd = self.stream.as_raw_fd();
        match (self.watched, interest) {
            (before, after) if before == after => return Ok(()),
            (None, Some(wanted)) => events.add(fd, self.token, wanted)?,
            (Some(_), Some(wanted)) => events.modify(fd, self.token, wanted)?,
            (_, None) => events.remove(fd)?,
        }
        self.watched = interest;
        Ok(())
    }

    /// Watches the socket no longer.
    pub(super) fn unwatch(&mut self, events: &mut dyn EventRegistry) {
        if self.watched.take().is_some()
            && let Err(error) = events.remove(self.stream.as_raw_fd())
        {
            tracing::debug!(%error, "a vsock connection was not watched");
        }
    }

    /// The guest is done with the connection: what it sent is still written out, nothing else happens. `None` when
    /// nothing is left to write.
    pub(super) fn into_remainder(mut self) -> Option<Self> {
        self.phase = Phase::Open;
        self.guest_takes_no_more = true;
        self.guest_sends_no_more = true;
        self.queued = false;
        self.flush();
        (!self.backlog.is_empty()).then_some(self)
    }

    /// Bytes of memory that the backlog takes.
    #[cfg(test)]
    pub(super) fn buffer_capacity(&self) -> usize {
        self.backlog.capacity()
    }

    /// Whether everything that the guest sent was written out.
    pub(super) fn is_flushed(&self) -> bool {
        self.backlog.is_empty()
    }
}

/// Whether an operation of a socket may succeed later.
pub(super) fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
