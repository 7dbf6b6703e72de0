//! The network cards of a configuration.

use std::fmt;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;

use super::{ConfigError, MachineConfig};

/// The most queue pairs of one card: with the control queue, they fill the transport's 255 queues.
pub const NET_QUEUES_MAX: u16 = 127;
/// The least MTU of a card: the least that IPv4 works with (RFC 791, §3.2), which is also what virtio demands.
pub const MTU_MIN: u16 = 68;
/// The longest name of an interface, in bytes (`IFNAMSIZ` of `linux/if.h`, less its NUL).
const INTERFACE_NAME_MAX: usize = 15;

/// A network card of the guest, joined to a tap interface of the host.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct NetConfig {
    /// The tap interface.
    pub tap: TapSource,
    /// The card's address; `None` takes a random one.
    pub mac: Option<MacAddress>,
    /// What the guest is told to be the largest packet in bytes, at least [`MTU_MIN`]; `None` takes that of an interface
    /// which is given by its name, and tells the guest nothing otherwise.
    pub mtu: Option<u16>,
    /// Whether the host kernel moves the packets.
    pub vhost: VhostMode,
}

impl NetConfig {
    /// A card with one queue pair on the interface `name`, and everything else as it suits the host.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            tap: TapSource::Name { name: name.into(), queues: 1 },
            mac: None,
            mtu: None,
            vhost: VhostMode::default(),
        }
    }
}

/// Where the tap interface of a card comes from.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TapSource {
    /// The interface of this name in the network namespace of the thread that starts the machine. One that is not there
    /// is made, set up, and gone again when the machine ends.
    Name {
        /// 1 to 15 bytes.
        name: String,
        /// Number of queue pairs, 1 to [`NET_QUEUES_MAX`]. More than one need an interface made with `multi_queue`.
        queues: u16,
    },
    /// Open descriptors of one tap interface, one per queue pair. They are of this process: no message carries them.
    #[serde(skip)]
    Descriptors(TapDescriptors),
}

/// Open descriptors of a tap interface, of `/dev/net/tun` with `TUNSETIFF` done (`IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR`).
///
/// The device makes them non-blocking. They are closed when the device and all clones of this value are gone.
#[derive(Clone, Debug)]
pub struct TapDescriptors(Arc<Vec<OwnedFd>>);

impl TapDescriptors {
    /// Takes the descriptors, one per queue pair.
    #[must_use]
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(Arc::new(descriptors))
    }

    /// The descriptors.
    #[must_use]
    pub fn as_slice(&self) -> &[OwnedFd] {
        &self.0
    }
}

/// The same descriptors, not only ones of the same interface.
impl PartialEq for TapDescriptors {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for TapDescriptors {}

/// Whether the packets of a card are moved by the host kernel (`/dev/vhost-net`) or by the `vmm` thread.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VhostMode {
    /// By the kernel where it can, by the `vmm` thread otherwise.
    #[default]
    Auto,
    /// By the kernel; without it, there is no machine.
    On,
    /// By the `vmm` thread.
    Off,
}

/// The address of a card: a unicast one.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address of these bytes, in the order in which they are sent.
    ///
    /// # Errors
    /// When it is a multicast address or zero.
    pub fn new(bytes: [u8; 6]) -> Result<Self, ConfigError> {
        let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
        if unicast { Ok(Self(bytes)) } else { Err(ConfigError::Mac(Self(bytes).to_string())) }
    }

    /// A locally administered address of these random bytes.
    #[must_use]
    pub(crate) fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }

    /// Its bytes, in the order in which they are sent.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl FromStr for MacAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Self::new(bytes).map_err(|_| wrong()) }
    }
}

impl NetConfig {
    /// Checks what can be checked without opening the tap interface.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let queues = match &self.tap {
            TapSource::Name { name, queues } => {
                check_interface_name(name)?;
                usize::from(*queues)
            }
            TapSource::Descriptors(descriptors) => descriptors.as_slice().len(),
        };
        if !(1..=usize::from(NET_QUEUES_MAX)).contains(&queues) {
            return Err(ConfigError::NetQueues { given: queues });
        }
        match self.mtu {
            Some(mtu) if mtu < MTU_MIN => Err(ConfigError::Mtu(mtu)),
            _ => Ok(()),
        }
    }
}

impl MachineConfig {
    /// Checks that each card has its own tap interface.
    pub(super) fn validate_taps(&self) -> Result<(), ConfigError> {
        for (index, net) in self.net.iter().enumerate() {
            if self.net.iter().take(index).any(|other| other.tap == net.tap) {
                return Err(ConfigError::TapTwice(net.tap.to_string()));
            }
        }
        Ok(())
    }
}

/// The kernel's rules (`dev_valid_name`), and no `%`, which it takes as a pattern to make a name from.
fn check_interface_name(name: &str) -> Result<(), ConfigError> {
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
    let usable =
        (1..=INTERFACE_NAME_MAX).contains(&name.len()) && !matches!(name, "." | "..") && name.chars().all(legal);
    if usable { Ok(()) } else { Err(ConfigError::InterfaceName(name.to_owned())) }
}

impl fmt::Display for TapSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { name, .. } => formatter.write_str(name),
            Self::Descriptors(descriptors) => write!(formatter, "of {} open descriptors", descriptors.as_slice().len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn refusal(net: Vec<NetConfig>) -> String {
        let config = MachineConfig { net, ..MachineConfig::new("vmlinux") };
        let cards = config.net.iter().try_for_each(NetConfig::validate);
        config.validate_taps().and(cards).unwrap_err().to_string()
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let address: MacAddress = "02:00:5e:10:AB:ff".parse().unwrap();
        assert_eq!(address.bytes(), [2, 0, 0x5e, 0x10, 0xab, 0xff]);
        assert_eq!(address.to_string(), "02:00:5e:10:ab:ff");
    }

    #[rstest]
    #[case::empty("")]
    #[case::short("02:00:00:00:00")]
    #[case::long("02:00:00:00:00:00:00")]
    #[case::sign("02:00:00:00:00:+1")]
    #[case::no_hex("02:00:00:00:00:0g")]
    #[case::narrow("2:0:0:0:0:1")]
    #[case::multicast("03:00:00:00:00:01")]
    #[case::zero("00:00:00:00:00:00")]
    fn what_is_no_unicast_address_is_refused(#[case] text: &str) {
        let error = text.parse::<MacAddress>().unwrap_err().to_string();
        assert!(error.contains(&format!("{text:?}")) && error.contains("02:00:00:00:00:01"), "{error}");
    }

    #[test]
    fn random_addresses_are_local_unicast_ones() {
        for bytes in [[0; 6], [0xff; 6], [1, 2, 3, 4, 5, 6]] {
            let address = MacAddress::local(bytes);
            assert_eq!(address.bytes()[0] & 3, 2);
            assert!(MacAddress::new(address.bytes()).is_ok());
        }
    }

    #[rstest]
    #[case("")]
    #[case("0123456789abcdef")]
    #[case("a/b")]
    #[case("a b")]
    #[case("tap%d")]
    #[case("..")]
    #[case("t\u{e4}p")]
    fn a_name_that_no_interface_can_have_is_refused(#[case] name: &str) {
        assert!(refusal(vec![NetConfig::new(name)]).contains("1 to 15"), "{name}");
    }

    #[test]
    fn queues_mtu_and_repeated_interfaces_are_checked() {
        for queues in [0, NET_QUEUES_MAX + 1] {
            let tap = TapSource::Name { name: "tap0".to_owned(), queues };
            assert!(refusal(vec![NetConfig { tap, ..NetConfig::new("") }]).contains("1 to 127"));
        }
        let none = TapSource::Descriptors(TapDescriptors::new(Vec::new()));
        assert!(refusal(vec![NetConfig { tap: none, ..NetConfig::new("") }]).contains("1 to 127"));
        assert!(refusal(vec![NetConfig { mtu: Some(67), ..NetConfig::new("tap0") }]).contains("at least 68"));
        assert!(refusal(vec![NetConfig::new("tap0"), NetConfig::new("tap0")]).contains("tap0"));
    }
}
