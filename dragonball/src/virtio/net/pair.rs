//! A queue pair at work: its two rings, its port, and who moves the frames between them.

use std::os::fd::AsRawFd;

use vmm_sys_util::epoll::EventSet;

use super::TOKEN_CALL;
use super::port::Port;
use super::receive::{Receiver, Waits};
use super::transmit::{Sent, Transmitter};
use super::vhost::Vhost;
use crate::virtio::device::{DeviceError, EventRegistry, GuestMemory};
use crate::virtio::ring::{Ring, RingPosition};

/// Frames that a pulled cable left in the port; an interface queues far fewer.
const STALE_MAX: usize = 10_000;

/// Whether and how frames pass.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Flow {
    /// The driver uses this pair.
    pub(super) enabled: bool,
    /// There is a cable.
    pub(super) link: bool,
}

/// Whether the host is still there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub(super) enum Host {
    /// It is.
    Here,
    /// The tap interface was deleted.
    Gone,
}

/// A queue pair at work.
pub(super) struct Pair {
    receiver: Receiver,
    transmitter: Transmitter,
    /// The kernel, if it moves the frames.
    kernel: Option<Vhost>,
    flow: Flow,
    /// What the port is watched for, under this token.
    watched: EventSet,
    token: u32,
}

impl Pair {
    /// A pair with these rings (receive, transmit); no frame passes yet. Its port has `token`.
    pub(super) fn new(rings: [Ring; 2], memory: &GuestMemory, features: u64, token: u32) -> Self {
        let [receive, transmit] = rings;
        Self {
            receiver: Receiver::new(receive, GuestMemory::clone(memory), features),
            transmitter: Transmitter::new(transmit, GuestMemory::clone(memory)),
            kernel: None,
            flow: Flow::default(),
            watched: EventSet::empty(),
            token,
        }
    }

    fn rings(&self) -> [&Ring; 2] {
        [&self.receiver.ring, &self.transmitter.ring]
    }

    /// Hands the rings to the kernel.
    ///
    /// # Errors
    /// When it does not take them; they stay here then.
    pub(super) fn hand_to_kernel(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        port: &dyn Port,
    ) -> std::io::Result<()> {
        self.kernel = Some(Vhost::new(memory, features, self.rings(), port.fd())?);
        Ok(())
    }

    /// Takes the rings back from a kernel that has not run yet.
    pub(super) fn take_from_kernel(&mut self) {
        self.kernel = None;
    }

    /// Watches the doorbells, or the kernel's calls.
    ///
    /// # Errors
    /// When epoll refuses; nothing is watched then.
    pub(super) fn watch(&self, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let [receive, transmit] = self.rings();
        let result = match &self.kernel {
            Some(kernel) => kernel.watch(TOKEN_CALL + u32::from(receive.index()), events),
            None => watch_kick(receive, events).and_then(|()| {
                watch_kick(transmit, events).inspect_err(|_| {
                    // It was added a moment ago; the error to report is the first one.
                    let _ = events.remove(receive.kick().as_raw_fd());
                })
            }),
        };
        result.map_err(|source| DeviceError::Host { action: "watch a doorbell", source })
    }

    /// Watches nothing any more.
    pub(super) fn unwatch(&mut self, port: &dyn Port, events: &mut dyn EventRegistry) {
        self.unwatch_port(port, events);
        match &self.kernel {
            Some(kernel) => kernel.unwatch(events),
            None => {
                for ring in self.rings() {
                    if let Err(error) = events.remove(ring.kick().as_raw_fd()) {
                        tracing::debug!(queue = ring.index(), %error, "a doorbell was not watched");
                    }
                }
            }
        }
    }

    fn unwatch_port(&mut self, port: &dyn Port, events: &mut dyn EventRegistry) {
        if !std::mem::replace(&mut self.watched, EventSet::empty()).is_empty()
            && let Err(error) = events.remove(port.fd().as_raw_fd())
        {
            tracing::debug!(%error, "the tap was not watched");
        }
    }

    /// Watches the port for `wanted` in place of what it is watched for in `mask`. A port that is watched for nothing is
    /// not watched at all: one without an interface would report that without end.
    fn watch_port(
        &mut self,
        mask: EventSet,
        wanted: EventSet,
        port: &dyn Port,
        events: &mut dyn EventRegistry,
    ) -> Result<(), DeviceError> {
        let wanted = (self.watched & !mask) | wanted;
        if wanted == self.watched {
            return Ok(());
        }
        if wanted.is_empty() {
            self.unwatch_port(port, events);
            return Ok(());
        }
        let fd = port.fd().as_raw_fd();
        let result = if self.watched.is_empty() {
            events.add(fd, self.token, wanted)
        } else {
            events.modify(fd, self.token, wanted)
        };
        result.map_err(|source| DeviceError::Host { action: "watch the tap", source })?;
        self.watched = wanted;
        Ok(())
    }

    /// Lets frames pass as `flow` says.
    pub(super) fn set_flow(
        &mut self,
        flow: Flow,
        port: &dyn Port,
        events: &mut dyn EventRegistry,
    ) -> Result<Host, DeviceError> {
        if flow == self.flow {
            return Ok(Host::Here);
        }
        if flow.link && !self.flow.link && self.flow.enabled {
            discard(port);
        }
        self.flow = flow;
        if let Some(kernel) = &mut self.kernel {
            kernel
                .set_running(flow.enabled && flow.link)
                .map_err(|source| DeviceError::Host { action: "hand the tap to the kernel", source })?;
            // What the driver asked for in the meantime is looked at now.
            self.rings().into_iter().try_for_each(Ring::call_again)?;
            return Ok(Host::Here);
        }
        match self.transmit(port, events)? {
            Host::Here => self.receive(port, events),
            Host::Gone => Ok(Host::Gone),
        }
    }

    /// The receive doorbell rang, or frames came.
    pub(super) fn receive(&mut self, port: &dyn Port, events: &mut dyn EventRegistry) -> Result<Host, DeviceError> {
        if self.kernel.is_some() {
            return Ok(Host::Here);
        }
        let waits = if self.flow.enabled && self.flow.link { self.receiver.receive(port)? } else { Waits::ForBuffers };
        let wanted = if waits == Waits::ForFrames { EventSet::IN } else { EventSet::empty() };
        self.watch_port(EventSet::IN, wanted, port, events)?;
        Ok(if waits == Waits::Forever { Host::Gone } else { Host::Here })
    }

    /// The transmit doorbell rang, or the port has room again.
    pub(super) fn transmit(&mut self, port: &dyn Port, events: &mut dyn EventRegistry) -> Result<Host, DeviceError> {
        if self.kernel.is_some() {
            return Ok(Host::Here);
        }
        let sent =
            if self.flow.enabled { self.transmitter.transmit(self.flow.link.then_some(port))? } else { Sent::All };
        let wanted = if sent == Sent::UntilFull { EventSet::OUT } else { EventSet::empty() };
        self.watch_port(EventSet::OUT, wanted, port, events)?;
        Ok(if sent == Sent::Nothing { Host::Gone } else { Host::Here })
    }

    /// The port is ready in some way.
    pub(super) fn port_ready(
        &mut self,
        ready: EventSet,
        port: &dyn Port,
        events: &mut dyn EventRegistry,
    ) -> Result<Host, DeviceError> {
        if !ready.intersects(EventSet::IN | EventSet::OUT) {
            return Ok(Host::Gone);
        }
        if ready.contains(EventSet::OUT)
            && let Host::Gone = self.transmit(port, events)?
        {
            return Ok(Host::Gone);
        }
        if ready.contains(EventSet::IN) { self.receive(port, events) } else { Ok(Host::Here) }
    }

    /// The doorbell of the receive (0) or transmit (1) ring rang.
    pub(super) fn kicked(
        &mut self,
        side: usize,
        port: &dyn Port,
        events: &mut dyn EventRegistry,
    ) -> Result<Host, DeviceError> {
        if self.kernel.is_none() {
            self.rings().into_iter().skip(side).take(1).for_each(Ring::acknowledge_kick);
        }
        if side == 0 { self.receive(port, events) } else { self.transmit(port, events) }
    }

    /// The kernel called the guest for the receive (0) or transmit (1) ring.
    pub(super) fn called(&self, side: usize) {
        if let Some(kernel) = &self.kernel
            && kernel.acknowledge(side)
        {
            self.rings().into_iter().skip(side).take(1).for_each(Ring::signal);
        }
    }

    /// Where the device is in the rings.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(super) fn positions(&mut self) -> Result<[(u16, RingPosition); 2], DeviceError> {
        let rings = [&self.receiver.ring, &self.transmitter.ring];
        let indices = rings.map(Ring::index);
        let positions = match &mut self.kernel {
            Some(kernel) => kernel
                .positions(rings)
                .map_err(|source| DeviceError::Host { action: "ask the kernel where it is in the rings", source })?,
            None => [self.receiver.position(), self.transmitter.ring.position()],
        };
        let [receive, transmit] = positions;
        Ok([(indices[0], receive), (indices[1], transmit)])
    }
}

fn watch_kick(ring: &Ring, events: &mut dyn EventRegistry) -> std::io::Result<()> {
    events.add(ring.kick().as_raw_fd(), u32::from(ring.index()), EventSet::IN)
}

/// Forgets the frames that came while there was no cable.
fn discard(port: &dyn Port) {
    let mut frame = [0; 64];
    for _ in 0..STALE_MAX {
        if !matches!(super::pieces::read(port.fd(), &mut frame), Ok(1..)) {
            break;
        }
    }
}
