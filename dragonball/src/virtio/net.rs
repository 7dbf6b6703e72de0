//! The network card (virtio 1.2, §5.1), joined to a tap interface of the host.
//!
//! A frame crosses with its virtio header, so that what one side leaves to be done (checksums, cutting into segments) is
//! done by the other's network stack, or never where both are on one host. The frames are moved by the host kernel where
//! it has `/dev/vhost-net`, by the device's thread otherwise. Every queue pair has its own descriptor of the interface.

use std::fs::File;
use std::io::{self, Read};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
    VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, DeviceError, DeviceKind, EventRegistry, Outcome, SavedState, VirtioDevice};
use super::ring::{RING_FEATURES, RingPosition};
use super::state;
use crate::config::{MacAddress, NetConfig, VhostMode};

mod active;
mod control;
mod link;
mod pair;
mod pieces;
pub(crate) mod port;
mod receive;
mod tap;
mod transmit;
mod vhost;

use active::Active;
use control::{Command, TABLE_MAX};
pub use link::Link;
use pair::Host;
use port::{Filter, Offloads, Port};
pub use tap::TapError;

/// Entries of a receive and of a transmit ring, and of the control ring.
const DATA_QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
const STATE_VERSION: u16 = 1;
/// Bytes of `struct virtio_net_hdr_v1`, which is in front of every frame.
const HEADER_LENGTH: usize = 12;
/// The most bytes of a frame with its header: an IP packet of 64 KiB, and link headers with some tags.
const FRAME_MAX: usize = 65_600;

/// Tokens below this one are the queues' doorbells.
const TOKEN_PORT: u32 = 0x100;
/// The kernel's calls, by queue.
const TOKEN_CALL: u32 = 0x200;
const TOKEN_LINK: u32 = 0x300;

const FEATURES: u64 = RING_FEATURES
    | (1 << VIRTIO_NET_F_CSUM)
    | (1 << VIRTIO_NET_F_GUEST_CSUM)
    | (1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    | (1 << VIRTIO_NET_F_MAC)
    | (1 << VIRTIO_NET_F_GUEST_TSO4)
    | (1 << VIRTIO_NET_F_GUEST_TSO6)
    | (1 << VIRTIO_NET_F_GUEST_ECN)
    | (1 << VIRTIO_NET_F_HOST_TSO4)
    | (1 << VIRTIO_NET_F_HOST_TSO6)
    | (1 << VIRTIO_NET_F_HOST_ECN)
    | (1 << VIRTIO_NET_F_MRG_RXBUF)
    | (1 << VIRTIO_NET_F_STATUS)
    | (1 << VIRTIO_NET_F_CTRL_VQ)
    | (1 << VIRTIO_NET_F_CTRL_RX)
    | (1 << VIRTIO_NET_F_CTRL_MAC_ADDR);
/// Cutting of UDP, which hosts have since Linux 6.2.
const USO_FEATURES: u64 =
    (1 << VIRTIO_NET_F_GUEST_USO4) | (1 << VIRTIO_NET_F_GUEST_USO6) | (1 << VIRTIO_NET_F_HOST_USO);

/// Why a card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Its tap interface cannot be used.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel does not move frames, though it was asked to.
    #[error("Cannot open {}: load the module (modprobe vhost_net), or do not ask for vhost", vhost::DEVICE)]
    Vhost(#[source] io::Error),
    /// The host refused something else.
    #[error("Cannot {action} for the network card")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
}

/// A network card.
pub struct Net {
    /// The host's end of each queue pair.
    ports: Vec<Box<dyn Port>>,
    /// How many of them take part in the traffic.
    attached: usize,
    /// The address that the card was made with.
    own_mac: MacAddress,
    mtu: Option<u16>,
    vhost: VhostMode,
    features: u64,
    queue_sizes: Vec<u16>,
    link: Link,
    /// The tap interface was deleted.
    lost: bool,
    driver: DriverSettings,
    active: Option<Active>,
    resume: Option<Resume>,
}

/// What the driver set by the control queue.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct DriverSettings {
    mac: [u8; 6],
    /// All frames are wanted, as before the first command about it.
    promiscuous: bool,
    all_multicast: bool,
    /// `None` stands for all of them.
    unicast: Option<Vec<[u8; 6]>>,
    multicast: Option<Vec<[u8; 6]>>,
}

/// Where a restored card goes on.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Resume {
    rings: Vec<(u16, RingPosition)>,
    pairs: u16,
    /// Offloads as feature bits.
    offloads: u64,
}

#[derive(Deserialize, Serialize)]
struct State {
    driver: DriverSettings,
    resume: Option<Resume>,
}

impl DriverSettings {
    fn new(mac: [u8; 6]) -> Self {
        let none = || Some(Vec::new());
        Self { mac, promiscuous: true, all_multicast: false, unicast: none(), multicast: none() }
    }

    /// Which frames the driver wants; `None` for all.
    fn filter(&self) -> Option<Filter> {
        let unicast = self.unicast.as_ref().filter(|_| !self.promiscuous)?;
        let multicast = self.multicast.as_ref().filter(|_| !self.all_multicast);
        let addresses = [&self.mac].into_iter().chain(unicast).chain(multicast.into_iter().flatten());
        Some(Filter { addresses: addresses.copied().collect(), all_multicast: multicast.is_none() })
    }

    fn is_possible(&self) -> bool {
        let fits = |table: &Option<Vec<_>>| table.as_ref().is_none_or(|table| table.len() <= TABLE_MAX);
        MacAddress::new(self.mac).is_ok() && fits(&self.unicast) && fits(&self.multicast)
    }
}

impl Net {
    /// The card that `config` describes, which was checked. The tap interface is opened, or made, in the network
    /// namespace of the calling thread.
    ///
    /// # Errors
    /// When the tap cannot be used, or vhost is asked for and not there.
    pub fn open(config: &NetConfig) -> Result<Self, NetError> {
        if config.vhost == VhostMode::On {
            vhost::probe().map_err(NetError::Vhost)?;
        }
        let opened = tap::open(&config.tap, config.mtu)?;
        let mac = match config.mac {
            Some(mac) => mac,
            None => random_mac().map_err(|source| NetError::Host { action: "make a random address", source })?,
        };
        Self::with_ports(opened.ports, mac, config.mtu.or(opened.mtu), config.vhost)
    }

    /// A card with these ports, one per queue pair, all of them attached.
    pub(crate) fn with_ports(
        ports: Vec<Box<dyn Port>>,
        own_mac: MacAddress,
        mtu: Option<u16>,
        vhost: VhostMode,
    ) -> Result<Self, NetError> {
        let mut features = FEATURES;
        if ports.len() > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
        }
        if mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        let probe = Offloads(libc::TUN_F_CSUM | port::USO);
        if ports.first().is_some_and(|port| port.set_offloads(probe).is_ok()) {
            features |= USO_FEATURES;
        }
        let mut queue_sizes = vec![DATA_QUEUE_SIZE; 2 * ports.len()];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let link = Link::new().map_err(|source| NetError::Host { action: "make an event", source })?;
        let mut net = Self {
            attached: ports.len(),
            ports,
            own_mac,
            mtu,
            vhost,
            features,
            queue_sizes,
            link,
            lost: false,
            driver: DriverSettings::new(own_mac.bytes()),
            active: None,
            resume: None,
        };
        net.set_host_defaults().map_err(|source| NetError::Host { action: "set up the tap", source })?;
        Ok(net)
    }

    /// The card's cable.
    #[must_use]
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    fn link_is_up(&self) -> bool {
        self.link.is_up() && !self.lost
    }

    /// Tells the host what an unused card takes: one queue, finished frames, all of them.
    fn set_host_defaults(&mut self) -> io::Result<()> {
        self.attach_ports(1)?;
        self.set_offloads(0)?;
        self.set_filter();
        Ok(())
    }

    /// Lets the first `count` ports take part in the traffic, and no others.
    fn attach_ports(&mut self, count: usize) -> io::Result<()> {
        while self.attached > count {
            self.ports[self.attached - 1].set_enabled(false)?;
            self.attached -= 1;
        }
        while self.attached < count {
            self.ports[self.attached].set_enabled(true)?;
            self.attached += 1;
        }
        Ok(())
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.ports.first().map_or(Ok(()), |port| port.set_offloads(Offloads::of_features(features)))
    }

    fn set_filter(&self) {
        let filter = self.driver.filter();
        if let Some(Err(error)) = self.ports.first().map(|port| port.set_filter(filter.as_ref())) {
            // The driver then sees more frames than it wants, which it is used to.
            tracing::debug!(%error, "the tap does not filter frames");
        }
    }

    fn set_carrier(&self) {
        if let Some(Err(error)) = self.ports.first().map(|port| port.set_carrier(self.link.is_up())) {
            tracing::debug!(%error, "the host does not see whether the network card has a cable");
        }
    }

    /// Brings the pairs to what the driver and the host want by now.
    fn set_flows(&mut self, events: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        let link = self.link_is_up();
        let Some(active) = &mut self.active else { return Ok(Outcome::Done) };
        match active.set_flows(link, &self.ports, events)? {
            Host::Here => Ok(Outcome::Done),
            Host::Gone => self.lose(events),
        }
    }

    /// The tap interface was deleted: what is left is a card without a cable.
    fn lose(&mut self, events: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        if !self.lost {
            self.lost = true;
            tracing::warn!("the tap interface of a network card is gone; the guest sees a pulled cable");
            self.set_flows(events)?;
        }
        Ok(Outcome::ConfigChanged)
    }

    /// Serves the control queue.
    fn serve_control(&mut self, events: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        let Some(mut control) = self.active.as_mut().and_then(|active| active.control.take()) else {
            return Ok(Outcome::Done);
        };
        let mut outcome = Outcome::Done;
        let result = control.serve(|features, request| {
            let obeyed = match Command::parse(&request.readable, features) {
                Some(command) => self.obey(command, &mut outcome, events)?,
                None => false,
            };
            let answer = if obeyed { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            Ok(request.writable.write_at(0, &answer.to_le_bytes()[..1]))
        });
        if let Some(active) = &mut self.active {
            active.control = Some(control);
        }
        result.map(|()| outcome)
    }

    /// Does what the driver asks for; false when that is not possible.
    fn obey(
        &mut self,
        command: Command,
        outcome: &mut Outcome,
        events: &mut dyn EventRegistry,
    ) -> Result<bool, DeviceError> {
        match command {
            Command::QueuePairs(count) => return self.use_pairs(count, outcome, events),
            Command::GuestOffloads(features) => return Ok(self.use_offloads(features)),
            Command::Promiscuous(on) => self.driver.promiscuous = on,
            Command::AllMulticast(on) => self.driver.all_multicast = on,
            Command::MacTable { unicast, multicast } => {
                self.driver.unicast = unicast;
                self.driver.multicast = multicast;
            }
            Command::MacAddress(mac) => {
                if MacAddress::new(mac).is_err() {
                    return Ok(false);
                }
                self.driver.mac = mac;
                *outcome = Outcome::ConfigChanged;
            }
        }
        self.set_filter();
        Ok(true)
    }

    fn use_pairs(
        &mut self,
        count: u16,
        outcome: &mut Outcome,
        events: &mut dyn EventRegistry,
    ) -> Result<bool, DeviceError> {
        let wanted = usize::from(count);
        let Some(active) = &mut self.active else { return Ok(false) };
        if !(1..=active.pairs.len()).contains(&wanted) {
            return Ok(false);
        }
        // A pair lets go of its port before the port leaves the traffic, and takes it after the port has joined it.
        active.enabled = active.enabled.min(wanted);
        let kept = active.enabled;
        let stopped = self.set_flows(events)?;
        if let Err(error) = self.attach_ports(wanted) {
            tracing::debug!(%error, count, "the tap does not take so many queues");
            // No port that nobody reads shall get frames; it was attached a moment ago, so that it can be detached.
            let _ = self.attach_ports(kept);
            return Ok(false);
        }
        if let Some(active) = &mut self.active {
            active.enabled = wanted;
        }
        let started = self.set_flows(events)?;
        if [stopped, started].contains(&Outcome::ConfigChanged) {
            *outcome = Outcome::ConfigChanged;
        }
        Ok(true)
    }

    fn use_offloads(&mut self, features: u64) -> bool {
        let Some(active) = &mut self.active else { return false };
        if features & !(active.features & Offloads::feature_bits()) != 0 {
            return false;
        }
        let before = std::mem::replace(&mut active.offloads, features);
        if let Err(error) = self.set_offloads(features) {
            tracing::debug!(%error, features, "the tap does not have these offloads");
            if let Some(active) = &mut self.active {
                active.offloads = before;
            }
            return false;
        }
        true
    }

    /// Tells the host what the driver wants.
    fn prepare_host(&mut self, active: &Active) -> Result<(), DeviceError> {
        let prepared = self.attach_ports(active.enabled).and_then(|()| self.set_offloads(active.offloads));
        match prepared {
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => self.lost = true,
            result => result.map_err(|source| DeviceError::Host { action: "prepare the tap", source })?,
        }
        self.set_filter();
        self.set_carrier();
        Ok(())
    }

    fn hand_to_kernel(&self, active: &mut Active) -> Result<(), DeviceError> {
        match active.hand_to_kernel(&self.ports) {
            Err(source) if self.vhost == VhostMode::On => {
                Err(DeviceError::Host { action: "hand the rings to /dev/vhost-net", source })
            }
            Err(error) => {
                tracing::debug!(%error, "the frames of a network card are moved without vhost");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Takes the rings and starts.
    fn start(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let resume = self.resume.take();
        let mut active = Active::new(activation, self.ports.len(), resume.as_ref())?;
        if let Some(resume) = &resume {
            active.enabled = usize::from(resume.pairs).clamp(1, active.pairs.len());
            active.offloads = resume.offloads & active.features & Offloads::feature_bits();
        }
        self.prepare_host(&active)?;
        if self.vhost != VhostMode::Off && !self.lost {
            self.hand_to_kernel(&mut active)?;
        }
        active.watch(&self.link, &self.ports, events)?;
        self.active = Some(active);
        // A lost interface shows in the configuration, which is read again after this.
        self.set_flows(events).map(|_| ())
    }

    fn dispatch(
        &mut self,
        token: u32,
        ready: EventSet,
        events: &mut dyn EventRegistry,
    ) -> Result<Outcome, DeviceError> {
        let Some(active) = &mut self.active else { return Ok(Outcome::Done) };
        if active.control.as_ref().is_some_and(|control| control.token() == token) {
            return self.serve_control(events);
        }
        if token == TOKEN_LINK {
            self.link.acknowledge();
            self.set_carrier();
            self.set_flows(events)?;
            return Ok(Outcome::ConfigChanged);
        }
        match active.pair_event(token, ready, &self.ports, events)? {
            Host::Here => Ok(Outcome::Done),
            Host::Gone => self.lose(events),
        }
    }
}

/// A random address.
fn random_mac() -> io::Result<MacAddress> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(MacAddress::local(bytes))
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `struct virtio_net_config` up to the MTU: address, status, queue pairs, MTU.
    fn config(&self) -> Vec<u8> {
        let status = if self.link_is_up() { VIRTIO_NET_S_LINK_UP } else { 0 };
        // There are at most 127 pairs.
        let pairs = u16::try_from(self.ports.len()).unwrap_or(u16::MAX);
        let mut config = self.driver.mac.to_vec();
        config.extend_from_slice(&status.to_le_bytes()[..2]);
        config.extend_from_slice(&pairs.to_le_bytes());
        config.extend_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        if self.active.is_some() {
            return Err(DeviceError::Protocol(String::from("it is active already")));
        }
        let result = self.start(activation, events);
        if result.is_err() {
            self.reset(events);
        }
        result
    }

    fn handle_event(
        &mut self,
        token: u32,
        ready: EventSet,
        events: &mut dyn EventRegistry,
    ) -> Result<Outcome, DeviceError> {
        self.dispatch(token, ready, events)
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        if let Some(mut active) = self.active.take() {
            active.unwatch(&self.link, &self.ports, events);
        }
        self.resume = None;
        self.driver = DriverSettings::new(self.own_mac.bytes());
        if let Err(error) = self.set_host_defaults() {
            tracing::debug!(%error, "the tap keeps what the driver set");
        }
    }

    /// A frame that was read and found no buffers is not part of the state: it is lost, as on a wire.
    fn save(&mut self) -> Result<SavedState, DeviceError> {
        let resume = match &mut self.active {
            Some(active) => Some(active.save()?),
            None => self.resume.clone(),
        };
        state::encode(STATE_VERSION, &State { driver: self.driver.clone(), resume })
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { driver, resume } = state::decode(STATE_VERSION, saved)?;
        let invalid = |what: String| Err(DeviceError::InvalidState(what));
        if self.active.is_some() {
            return invalid(String::from("the device is in use; reset it first"));
        }
        if !driver.is_possible() {
            return invalid(String::from("no driver can have set these addresses"));
        }
        if let Some(resume) = &resume
            && (usize::from(resume.pairs) > self.ports.len() || resume.rings.len() > self.queue_sizes.len())
        {
            return invalid(format!("it has {} queue pairs, this card has {}", resume.pairs, self.ports.len()));
        }
        self.driver = driver;
        self.resume = resume;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
