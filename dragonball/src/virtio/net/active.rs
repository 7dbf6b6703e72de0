//! A card that a driver uses: its queue pairs and its control queue.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vmm_sys_util::epoll::EventSet;

use super::link::Link;
use super::pair::{Flow, Host, Pair};
use super::port::{Offloads, Port};
use super::{Resume, TOKEN_CALL, TOKEN_LINK, TOKEN_PORT};
use crate::virtio::buffers::Request;
use crate::virtio::device::{Activation, ActiveQueue, DeviceError, EventRegistry, GuestMemory};
use crate::virtio::ring::Ring;

/// What there is between `activate` and `reset`.
pub(super) struct Active {
    /// What both sides agreed on.
    pub(super) features: u64,
    /// The pairs that the driver set up.
    pub(super) pairs: Vec<Pair>,
    /// How many of them it uses.
    pub(super) enabled: usize,
    /// The offloads of frames to the guest, as feature bits.
    pub(super) offloads: u64,
    /// The control queue; out while it is served.
    pub(super) control: Option<Control>,
    memory: GuestMemory,
}

/// The control queue at work.
pub(super) struct Control {
    ring: Ring,
    memory: GuestMemory,
    features: u64,
}

impl Control {
    /// The token of its doorbell.
    pub(super) fn token(&self) -> u32 {
        u32::from(self.ring.index())
    }

    /// Serves what is in the ring; `serve` gets the features and a request, and says how many bytes it wrote.
    pub(super) fn serve(
        &mut self,
        mut serve: impl FnMut(u64, &Request<'_>) -> Result<usize, DeviceError>,
    ) -> Result<(), DeviceError> {
        self.ring.acknowledge_kick();
        let features = self.features;
        self.ring.serve(&self.memory, |request| serve(features, request))
    }
}

impl Active {
    /// Takes the rings of `activation` for a card with up to `pairs_max` pairs, and goes on where `resume` says.
    ///
    /// # Errors
    /// When the first pair or the agreed control queue is missing.
    pub(super) fn new(activation: Activation, pairs_max: usize, resume: Option<&Resume>) -> Result<Self, DeviceError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let many = features & (1 << VIRTIO_NET_F_MQ) != 0;
        let pairs_max = if many { pairs_max } else { 1 };
        // The control queue follows the pairs that can be used, not those that the card has (virtio 1.2, §5.1.2).
        let control_index = u16::try_from(2 * pairs_max).unwrap_or(u16::MAX);
        let mut rings = queues
            .into_iter()
            .map(|queue| start(queue, features, &interrupt, resume))
            .collect::<Result<Vec<_>, _>>()?;
        let mut take = |index: u16| {
            let position = rings.iter().position(|ring| ring.index() == index)?;
            Some(rings.swap_remove(position))
        };
        let control = if features & (1 << VIRTIO_NET_F_CTRL_VQ) != 0 {
            let ring = take(control_index).ok_or(DeviceError::MissingQueue(control_index))?;
            Some(Control { ring, memory: Arc::clone(&memory), features })
        } else {
            None
        };
        let mut pairs = Vec::new();
        for index in (0..control_index).step_by(2) {
            let (Some(receive), Some(transmit)) = (take(index), take(index + 1)) else { break };
            let token = TOKEN_PORT + u32::from(index / 2);
            pairs.push(Pair::new([receive, transmit], &memory, features, token));
        }
        if pairs.is_empty() {
            return Err(DeviceError::MissingQueue(0));
        }
        let offloads = features & Offloads::feature_bits();
        Ok(Self { features, pairs, enabled: 1, offloads, control, memory })
    }

    /// Hands the pairs to the kernel: all, or none.
    ///
    /// # Errors
    /// When the kernel does not take them.
    pub(super) fn hand_to_kernel(&mut self, ports: &[Box<dyn Port>]) -> io::Result<()> {
        let Self { pairs, memory, features, .. } = self;
        let result = pairs
            .iter_mut()
            .zip(ports)
            .try_for_each(|(pair, port)| pair.hand_to_kernel(memory, *features, port.as_ref()));
        if result.is_err() {
            pairs.iter_mut().for_each(Pair::take_from_kernel);
        }
        result
    }

    /// Watches every doorbell and the cable.
    ///
    /// # Errors
    /// When epoll refuses; nothing is watched then.
    pub(super) fn watch(
        &mut self,
        link: &Link,
        ports: &[Box<dyn Port>],
        events: &mut dyn EventRegistry,
    ) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Host { action: "watch a network card's events", source };
        events.add(link.event(), TOKEN_LINK, EventSet::IN).map_err(failed)?;
        let mut watched = 0;
        let mut result = match &self.control {
            Some(control) => events.add(control.ring.kick().as_raw_fd(), control.token(), EventSet::IN).map_err(failed),
            None => Ok(()),
        };
        let control_watched = result.is_ok();
        while result.is_ok() && watched < self.pairs.len() {
            result = self.pairs[watched].watch(events);
            watched += usize::from(result.is_ok());
        }
        if result.is_err() {
            // What was added is taken back; the error to report is the first one.
            let _ = events.remove(link.event());
            if control_watched && let Some(control) = &self.control {
                let _ = events.remove(control.ring.kick().as_raw_fd());
            }
            for (pair, port) in self.pairs.iter_mut().zip(ports).take(watched) {
                pair.unwatch(port.as_ref(), events);
            }
        }
        result
    }

    /// Watches nothing any more.
    pub(super) fn unwatch(&mut self, link: &Link, ports: &[Box<dyn Port>], events: &mut dyn EventRegistry) {
        let control = self.control.as_ref().map(|control| control.ring.kick().as_raw_fd());
        for fd in control.into_iter().chain([link.event()]) {
            if let Err(error) = events.remove(fd) {
                tracing::debug!(%error, "a descriptor of the network card was not watched");
            }
        }
        for (pair, port) in self.pairs.iter_mut().zip(ports) {
            pair.unwatch(port.as_ref(), events);
        }
    }

    /// Lets frames pass through the pairs that are used, while there is a cable.
    pub(super) fn set_flows(
        &mut self,
        link: bool,
        ports: &[Box<dyn Port>],
        events: &mut dyn EventRegistry,
    ) -> Result<Host, DeviceError> {
        let mut host = Host::Here;
        for (index, (pair, port)) in self.pairs.iter_mut().zip(ports).enumerate() {
            let flow = Flow { enabled: index < self.enabled, link };
            if let Host::Gone = pair.set_flow(flow, port.as_ref(), events)? {
                host = Host::Gone;
            }
        }
        Ok(host)
    }

    /// Something that has a pair's token is ready.
    pub(super) fn pair_event(
        &mut self,
        token: u32,
        ready: EventSet,
        ports: &[Box<dyn Port>],
        events: &mut dyn EventRegistry,
    ) -> Result<Host, DeviceError> {
        let (queue, is_port) = match token {
            0..TOKEN_PORT => (token, false),
            TOKEN_PORT..TOKEN_CALL => (2 * (token - TOKEN_PORT), true),
            _ => (token - TOKEN_CALL, false),
        };
        let (index, side) = (queue as usize / 2, queue as usize % 2);
        let (Some(pair), Some(port)) = (self.pairs.get_mut(index), ports.get(index)) else { return Ok(Host::Here) };
        if is_port {
            pair.port_ready(ready, port.as_ref(), events)
        } else if token >= TOKEN_CALL {
            pair.called(side);
            Ok(Host::Here)
        } else {
            pair.kicked(side, port.as_ref(), events)
        }
    }

    /// Where a restored card goes on.
    ///
    /// # Errors
    /// When the kernel does not say where it is.
    pub(super) fn save(&mut self) -> Result<Resume, DeviceError> {
        let mut rings = Vec::new();
        for pair in &mut self.pairs {
            rings.extend(pair.positions()?);
        }
        rings.extend(self.control.iter().map(|control| (control.ring.index(), control.ring.position())));
        let pairs = u16::try_from(self.enabled).unwrap_or(u16::MAX);
        Ok(Resume { rings, pairs, offloads: self.offloads })
    }
}

/// A ring at its beginning, or where `resume` says.
fn start(
    queue: ActiveQueue,
    features: u64,
    interrupt: &Arc<dyn crate::virtio::device::Interrupt>,
    resume: Option<&Resume>,
) -> Result<Ring, DeviceError> {
    let mut ring = Ring::new(queue, features, Arc::clone(interrupt));
    let saved = resume.and_then(|resume| resume.rings.iter().find(|(index, _)| *index == ring.index()));
    if let Some((_, position)) = saved {
        ring.resume(*position)?;
    }
    Ok(ring)
}
