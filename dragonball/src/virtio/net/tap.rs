//! A tap interface of the host (the kernel's `Documentation/networking/tuntap.rst`), one descriptor per queue pair.
//!
//! The unsafe code here is that of ioctls.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::HEADER_LENGTH;
use super::port::{Filter, Offloads, Port};
use crate::config::{TapDescriptors, TapSource};

const CLONE_DEVICE: &str = "/dev/net/tun";
/// What every descriptor must have: Ethernet frames, behind a virtio header and nothing else.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// The most addresses that the filter is asked for, broadcast included. Behind the first eight the kernel matches groups
/// by hash, and takes a single card's address as a reason to filter nothing (`update_filter` of its `tun.c`).
const FILTER_MAX: usize = 64;
/// `TUN_FLT_ALLMULTI` of `linux/if_tun.h`.
const ALL_MULTICAST: u16 = 1;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Why a tap interface cannot serve a card.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host has no taps for us.
    #[error("Cannot open {CLONE_DEVICE}: load the module (modprobe tun), and run this as a user who may open it")]
    CloneDevice(#[source] io::Error),
    /// The interface cannot be attached to or made.
    #[error(
        "Cannot attach to the tap interface {name} with {queues} queue pair(s): check that no other program has it, that \
         this user may use it (CAP_NET_ADMIN, or `ip tuntap add {name} mode tap user NAME`), and that it was made with \
         `multi_queue` if there is more than one pair"
    )]
    Attach {
        /// The interface.
        name: String,
        /// How many queue pairs were asked for.
        queues: u16,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// What was passed is no tap, or not one for virtual machines.
    #[error(
        "Descriptor {0} is no tap that a virtual machine can use: make it by TUNSETIFF with IFF_TAP, IFF_NO_PI and \
         IFF_VNET_HDR, and with IFF_MULTI_QUEUE if there is more than one"
    )]
    NotATap(i32),
    /// The interface was attached to, but cannot be used as it is needed.
    #[error("Cannot {action} the tap interface {name}")]
    Setup {
        /// What was tried.
        action: &'static str,
        /// The interface.
        name: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
}

/// One descriptor of a tap interface.
pub(super) struct Tap(OwnedFd);

/// A tap interface that was opened.
pub(super) struct Opened {
    /// Its queues, all enabled.
    pub(super) ports: Vec<Box<dyn Port>>,
    /// Its MTU, where it can be asked for.
    pub(super) mtu: Option<u16>,
}

/// Opens the taps of `source`. An interface that is made for this gets `mtu`.
pub(super) fn open(source: &TapSource, mtu: Option<u16>) -> Result<Opened, TapError> {
    let (taps, mtu) = match source {
        TapSource::Name { name, queues } => open_name(name, *queues, mtu)?,
        TapSource::Descriptors(descriptors) => (take(descriptors)?, None),
    };
    let name = source.to_string();
    for tap in &taps {
        tap.prepare().map_err(|source| TapError::Setup { action: "set the header of", name: name.clone(), source })?;
    }
    Ok(Opened { ports: taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Port>).collect(), mtu })
}

/// Attaches to the interface `name`, or makes it. Returns its MTU, too.
fn open_name(name: &str, queues: u16, mtu: Option<u16>) -> Result<(Vec<Tap>, Option<u16>), TapError> {
    let is_new = nix::net::if_::if_nametoindex(name).is_err();
    let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let attach = |flags| (0..queues).map(|_| Ok(attach(name, FLAGS | flags)?.0)).collect::<Result<Vec<_>, _>>();
    let taps = match attach(many) {
        // An interface of many queues takes no single one, but does take one of its queues.
        Err(Refusal::Interface(error)) if many == 0 && error.raw_os_error() == Some(libc::EINVAL) => {
            attach(libc::IFF_MULTI_QUEUE)
        }
        result => result,
    };
    let taps = taps.map_err(|refusal: Refusal| refusal.into_error(name, queues))?;
    let setup = |action| move |source| TapError::Setup { action, name: name.to_owned(), source };
    let interface = Interface::new(name).map_err(setup("examine"))?;
    if is_new {
        interface.set_up(mtu).map_err(setup("set up"))?;
    }
    let mtu = interface.mtu().map_err(setup("read the MTU of"))?;
    Ok((taps, u16::try_from(mtu).ok()))
}

impl TapDescriptors {
    /// Makes a tap interface with `queues` queue pairs in the network namespace of this thread, and attaches to it; answers
    /// its name, too. In `pattern` the kernel replaces `%d` by the first number that makes a new name. The interface is
    /// gone when the descriptors are.
    ///
    /// # Errors
    /// [`TapError::CloneDevice`] and [`TapError::Attach`].
    pub fn make(pattern: &str, queues: u16) -> Result<(Self, String), TapError> {
        let flags = if queues > 1 { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS };
        let mut name = pattern.to_owned();
        let mut descriptors = Vec::new();
        for _ in 0..queues {
            let (Tap(descriptor), made) = attach(&name, flags).map_err(|refusal| refusal.into_error(&name, queues))?;
            descriptors.push(descriptor);
            name = made;
        }
        Ok((Self::new(descriptors), name))
    }
}

enum Refusal {
    CloneDevice(io::Error),
    Interface(io::Error),
}

impl Refusal {
    fn into_error(self, name: &str, queues: u16) -> TapError {
        match self {
            Self::CloneDevice(source) => TapError::CloneDevice(source),
            Self::Interface(source) => TapError::Attach { name: name.to_owned(), queues, source },
        }
    }
}

/// Returns the name as the kernel made it, too.
fn attach(name: &str, flags: libc::c_int) -> Result<(Tap, String), Refusal> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(CLONE_DEVICE)
        .map_err(Refusal::CloneDevice)?;
    let tap = Tap(file.into());
    let mut request = request(name, flags);
    tap.ioctl(libc::TUNSETIFF, &mut request).map_err(Refusal::Interface)?;
    let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0).collect();
    Ok((tap, String::from_utf8(name).unwrap_or_default()))
}

/// Own descriptors of taps that somebody else has opened.
fn take(descriptors: &TapDescriptors) -> Result<Vec<Tap>, TapError> {
    let many = descriptors.as_slice().len() > 1;
    let needed = if many { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS };
    let take = |descriptor: &OwnedFd| -> Option<Tap> {
        let tap = Tap(descriptor.try_clone().ok()?);
        let mut request = request("", 0);
        tap.ioctl(libc::TUNGETIFF, &mut request).ok()?;
        // SAFETY: the kernel filled this member, and any bits are a number.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let status = OFlag::from_bits_retain(fcntl(&tap.0, FcntlArg::F_GETFL).ok()?);
        fcntl(&tap.0, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK)).ok()?;
        (flags & needed == needed).then_some(tap)
    };
    descriptors
        .as_slice()
        .iter()
        .map(|descriptor| take(descriptor).ok_or_else(|| TapError::NotATap(descriptor.as_raw_fd())))
        .collect()
}

impl Tap {
    fn prepare(&self) -> io::Result<()> {
        let length = libc::c_int::try_from(HEADER_LENGTH).map_err(io::Error::other)?;
        self.ioctl(libc::TUNSETVNETHDRSZ, &mut { length })
    }

    /// An ioctl that takes a pointer to `argument`.
    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request is called with the type that the kernel's `if_tun.h` says, for which `argument` is valid.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) })
    }
}

impl Port for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bits = libc::c_ulong::from(offloads.0);
        // SAFETY: this request takes a number.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, bits) })
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let flag = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        self.ioctl(libc::TUNSETQUEUE, &mut request("", flag))
    }

    fn set_filter(&self, filter: Option<&Filter>) -> io::Result<()> {
        let mut table = FilterTable { flags: 0, count: 0, addresses: [[0; 6]; FILTER_MAX] };
        if let Some(filter) = filter
            && filter.addresses.len() < FILTER_MAX
        {
            let wanted = [&BROADCAST].into_iter().chain(&filter.addresses);
            for (slot, address) in table.addresses.iter_mut().zip(wanted) {
                *slot = *address;
                table.count += 1;
            }
            table.flags = if filter.all_multicast { ALL_MULTICAST } else { 0 };
        }
        self.ioctl(libc::TUNSETTXFILTER, &mut table)
    }

    fn set_carrier(&self, up: bool) -> io::Result<()> {
        self.ioctl(libc::TUNSETCARRIER, &mut libc::c_int::from(up))
    }
}

/// `struct tun_filter`; no address means no filter.
#[repr(C)]
struct FilterTable {
    flags: u16,
    count: u16,
    addresses: [[u8; 6]; FILTER_MAX],
}

/// An interface as the socket ioctls see it (netdevice(7)).
struct Interface<'n> {
    socket: OwnedFd,
    name: &'n str,
}

impl<'n> Interface<'n> {
    fn new(name: &'n str) -> io::Result<Self> {
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket, name })
    }

    fn ioctl(&self, command: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: these requests take a `struct ifreq`.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), command, std::ptr::from_mut(request)) })
    }

    fn mtu(&self) -> io::Result<libc::c_int> {
        let mut request = request(self.name, 0);
        self.ioctl(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel filled this member, and any bits are a number.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    fn set_up(&self, mtu: Option<u16>) -> io::Result<()> {
        if let Some(mtu) = mtu {
            let mut change = request(self.name, 0);
            change.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
            self.ioctl(libc::SIOCSIFMTU, &mut change)?;
        }
        let mut flags = request(self.name, 0);
        self.ioctl(libc::SIOCGIFFLAGS, &mut flags)?;
        // SAFETY: the kernel filled this member, and any bits are a number.
        let now = libc::c_int::from(unsafe { flags.ifr_ifru.ifru_flags });
        self.ioctl(libc::SIOCSIFFLAGS, &mut request(self.name, now | libc::IFF_UP))
    }
}

/// A request for the interface `name`; what does not fit of the name is left out, the kernel wants its NUL.
fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: `ifreq` is made of integers and pointers, for which zeroes are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *to = from.cast_signed();
    }
    #[expect(clippy::cast_possible_truncation, reason = "the flags of an interface are 16 bits")]
    let flags = flags as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    request
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
