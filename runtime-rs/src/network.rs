//! The pod's network: the interfaces of its namespace become cards of the machine.

use std::sync::Arc;

use dragonball::{MacAddress, NetConfig, TapDescriptors, TapSource, VhostMode};
use journal::{Effect, EffectId, Journal};
use network::{HOST_REFUSED, Interface, Loopback, Namespace, Scan};
use protocols::agent;

use crate::error::{Error, chain};
use crate::spec::NetworkPlace;

/// Name of the taps in the pod's namespace; the kernel counts them.
const TAP_PATTERN: &str = "tap%d_kata";

/// Whether an interface is one of these.
fn is_tap(name: &str) -> bool {
    let between = TAP_PATTERN.split_once("%d").and_then(|(start, end)| name.strip_prefix(start)?.strip_suffix(end));
    between.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What machine and guest get.
#[derive(Debug, Clone, Default)]
pub struct Network {
    /// One for each interface.
    pub cards: Vec<NetConfig>,
    /// The interfaces as the guest is to have them.
    pub interfaces: Vec<agent::Interface>,
    /// The routes over them.
    pub routes: Vec<agent::Route>,
    /// The neighbours behind them.
    pub neighbours: Vec<agent::Neighbour>,
    /// What is dialled to the loopback address of the namespace, for the guest's servers.
    pub loopback: Option<Arc<Loopback>>,
    /// The namespace is this process's own: what it has comes later.
    pub own: bool,
}

/// An interface that is joined to a card.
#[derive(Debug)]
pub struct Joined {
    /// The card.
    pub card: NetConfig,
    /// The name of the tap between them, in the namespace.
    pub tap: String,
    /// What it did to the host.
    pub effect: EffectId,
}

impl Network {
    /// Joins the interfaces of `place` to taps; the taps last as long as this value and the cards that are made of it.
    ///
    /// # Errors
    ///
    /// [`Error::Network`], [`Error::Interface`], [`Error::Journal`]; [`Error::State`] for another machine's namespace.
    pub fn join(place: &NetworkPlace, journal: &Journal) -> Result<Self, Error> {
        let path = match place {
            NetworkPlace::Own => return Ok(Self { own: true, ..Self::default() }),
            NetworkPlace::Path(path) => path,
            NetworkPlace::Host => {
                let asked = "the specification asks for the host's network namespace";
                return Err(Error::Invalid(format!("{asked}: {HOST_REFUSED}")));
            }
        };
        let mut namespace = Namespace::open(path)?;
        let scan = namespace.scan()?;
        // A tap goes with its machine: there is one that lives.
        if scan.interfaces.iter().any(|interface| is_tap(&interface.name)) {
            return Err(Error::State(format!(
                "{} is the network of another virtual machine, which cannot be shared (docker's `--network container:…`): \
                 make both containers in one pod, or give this one a network of its own",
                path.display()
            )));
        }
        let mut cards = Vec::new();
        for interface in &scan.interfaces {
            cards.push(join(&mut namespace, interface, journal)?.card);
        }
        // A pod without it works; only its ports cannot be forwarded.
        let loopback = namespace.take_loopback().map(Arc::new);
        let loopback =
            loopback.inspect_err(|error| tracing::warn!(error = %chain(error), "no port can be forwarded")).ok();
        Ok(Self { cards, loopback, ..Self::of(&scan) })
    }

    /// What the guest is told of `scan`.
    pub(crate) fn of(scan: &Scan) -> Self {
        let cidr = |(address, prefix): &(std::net::IpAddr, u8)| format!("{address}/{prefix}");
        let interfaces = scan.interfaces.iter().map(|interface| agent::Interface {
            mac: mac_text(interface.mac),
            name: interface.name.clone(),
            addresses: interface.addresses.iter().map(cidr).collect(),
            mtu: interface.mtu,
            ..agent::Interface::default()
        });
        let text = |address: Option<std::net::IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        let routes = scan.routes.iter().map(|route| agent::Route {
            destination: route.destination.as_ref().map(cidr).unwrap_or_default(),
            gateway: text(route.gateway),
            interface: route.interface.clone(),
            scope: u32::from(route.scope),
            source: text(route.source),
            onlink: route.onlink,
            metric: route.metric,
            ..agent::Route::default()
        });
        let neighbours = scan.neighbours.iter().map(|neighbour| agent::Neighbour {
            address: neighbour.address.to_string(),
            mac: mac_text(neighbour.mac),
            interface: neighbour.interface.clone(),
            ..agent::Neighbour::default()
        });
        Self {
            cards: Vec::new(),
            interfaces: interfaces.collect(),
            routes: routes.collect(),
            neighbours: neighbours.collect(),
            loopback: None,
            own: false,
        }
    }
}

/// Makes a card with the hardware address of `interface`, over a tap that is joined to it. The tap lasts as long as the card's
/// configuration and the cards that are made of it.
///
/// # Errors
///
/// [`Error::Network`], [`Error::Interface`], [`Error::Journal`]; nothing is left then.
pub(crate) fn join(namespace: &mut Namespace, interface: &Interface, journal: &Journal) -> Result<Joined, Error> {
    let made = || TapDescriptors::make(TAP_PATTERN, 1).map_err(|source| refused(interface, source));
    let (descriptors, tap) = namespace.within(made)?;
    let effect = journal.record(Effect::Redirection {
        namespace: namespace.path().to_owned(),
        id: namespace.id(),
        interface: interface.name.clone(),
    })?;
    if let Err(error) = namespace.join(interface, &tap) {
        if let Err(failure) = journal.undo(effect) {
            tracing::warn!(%failure, "left until the end of the sandbox");
        }
        return Err(error.into());
    }
    let card = NetConfig {
        tap: TapSource::Descriptors(descriptors),
        mac: MacAddress::new(interface.mac).ok(),
        mtu: u16::try_from(interface.mtu).ok(),
        vhost: VhostMode::default(),
    };
    Ok(Joined { card, tap, effect })
}

fn refused(interface: &Interface, source: dragonball::TapError) -> Error {
    Error::Interface { interface: interface.name.clone(), source }
}

pub(crate) fn mac_text(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    #[test]
    fn taps_are_known_by_their_names() {
        for (name, known) in [("tap0_kata", true), ("tap12_kata", true), ("tap_kata", false), ("tapx_kata", false)] {
            assert_eq!(super::is_tap(name), known, "{name}");
        }
        assert!(!super::is_tap("eth0") && !super::is_tap("tap0"));
    }

    use network::{Neighbour, Route};

    use super::*;

    #[test]
    fn the_guest_is_told_all_that_was_found() {
        let interface = Interface {
            index: 3,
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 9, 0xab],
            mtu: 1400,
            addresses: vec![("10.9.0.2".parse().unwrap(), 24), ("fd00::2".parse().unwrap(), 64)],
        };
        let gateway = Some("169.254.1.1".parse().unwrap());
        let default = Route { gateway, interface: "eth0".to_owned(), onlink: true, metric: 7, ..Route::default() };
        let link = Route { destination: Some(("10.1.0.0".parse().unwrap(), 16)), scope: 253, ..default.clone() };
        let neighbour = Neighbour {
            address: "169.254.1.1".parse().unwrap(),
            mac: [2, 0, 0, 0, 9, 1],
            interface: "eth0".to_owned(),
        };
        let scan = Scan { interfaces: vec![interface], routes: vec![default, link], neighbours: vec![neighbour] };
        let network = Network::of(&scan);
        assert_eq!(network.interfaces[0].mac, "02:00:00:00:09:ab");
        assert_eq!(network.interfaces[0].addresses, ["10.9.0.2/24", "fd00::2/64"]);
        assert_eq!((network.interfaces[0].name.as_str(), network.interfaces[0].mtu), ("eth0", 1400));
        let [default, link] = &network.routes[..] else { panic!("{:?}", network.routes) };
        assert_eq!((default.destination.as_str(), default.gateway.as_str()), ("", "169.254.1.1"));
        assert!(default.onlink && default.metric == 7 && default.interface == "eth0");
        assert_eq!((link.destination.as_str(), link.scope), ("10.1.0.0/16", 253));
        assert_eq!(
            (network.neighbours[0].address.as_str(), network.neighbours[0].mac.as_str()),
            ("169.254.1.1", "02:00:00:00:09:01")
        );
    }

    #[test]
    fn a_pod_with_a_namespace_of_its_own_has_no_card_and_one_with_the_host_s_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::create(&directory.path().join("journal")).unwrap();
        let own = Network::join(&NetworkPlace::Own, &journal).unwrap();
        assert!(own.own && own.cards.is_empty() && own.interfaces.is_empty());
        let host = Network::join(&NetworkPlace::Host, &journal).unwrap_err();
        assert_eq!(host.code(), protocols::containerd::ttrpc::Code::INVALID_ARGUMENT);
        assert!(host.to_string().contains("hostNetwork"), "{host}");
    }
}
