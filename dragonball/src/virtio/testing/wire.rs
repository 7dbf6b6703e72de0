//! The other end of a network card's queue pair: a socket in place of a tap, which notes what it is told.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::{MacAddress, VhostMode};
use crate::virtio::net::Net;
use crate::virtio::net::port::{Filter, Offloads, Port};

/// The address of a card made here.
pub const CARD_ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The MTU of a card made here.
pub const CARD_MTU: u16 = 1400;

/// The host's end.
pub struct Wire {
    socket: UnixDatagram,
    #[cfg_attr(not(test), expect(dead_code, reason = "fuzz targets only exchange frames"))]
    told: Arc<Mutex<Told>>,
}

/// What a card told its port last.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Told {
    pub(crate) offloads: Offloads,
    pub(crate) disabled: bool,
    pub(crate) filter: Option<Filter>,
    pub(crate) carrier: Option<bool>,
}

struct Card {
    socket: UnixDatagram,
    told: Arc<Mutex<Told>>,
}

/// A card with `pairs` queue pairs, and the other end of each.
///
/// # Panics
/// When the host has no sockets.
pub fn card(pairs: usize) -> (Net, Vec<Wire>) {
    let (ports, wires): (Vec<Box<dyn Port>>, Vec<_>) = (0..pairs).map(|_| connected()).unzip();
    let mac = MacAddress::new(CARD_ADDRESS).expect("a unicast address");
    (Net::with_ports(ports, mac, Some(CARD_MTU), VhostMode::Off).expect("a card"), wires)
}

fn connected() -> (Box<dyn Port>, Wire) {
    let (card, host) = UnixDatagram::pair().expect("sockets");
    for socket in [&card, &host] {
        socket.set_nonblocking(true).expect("a socket");
    }
    let told = Arc::<Mutex<Told>>::default();
    (Box::new(Card { socket: card, told: Arc::clone(&told) }), Wire { socket: host, told })
}

impl Wire {
    /// Sends a frame, header included; false when the card has not read enough of those before.
    ///
    /// # Panics
    /// When the socket fails.
    pub fn send(&self, frame: &[u8]) -> bool {
        match self.socket.send(frame) {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("the wire: {error}"),
        }
    }

    /// The next frame that the card sent, header included.
    ///
    /// # Panics
    /// When the socket fails.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        match self.socket.recv(&mut frame) {
            Ok(length) => {
                frame.truncate(length);
                Some(frame)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("the wire: {error}"),
        }
    }

    /// What the card told this port last.
    #[cfg(test)]
    pub(crate) fn told(&self) -> Told {
        locked(&self.told).clone()
    }
}

fn locked(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port for Card {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        locked(&self.told).offloads = offloads;
        Ok(())
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        locked(&self.told).disabled = !enabled;
        Ok(())
    }

    fn set_filter(&self, filter: Option<&Filter>) -> io::Result<()> {
        locked(&self.told).filter = filter.cloned();
        Ok(())
    }

    fn set_carrier(&self, up: bool) -> io::Result<()> {
        locked(&self.told).carrier = Some(up);
        Ok(())
    }
}
