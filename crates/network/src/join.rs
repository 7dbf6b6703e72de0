//! An interface and a tap as one wire.

use std::io;
use std::path::Path;

use netlink::route::RouteNetlinkMessage;
use netlink::route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink::route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute, TcFilterU32Option,
    TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use netlink::{Connection, NLM_F_CREATE, NLM_F_EXCL};

use crate::{Interface, Namespace, NamespaceId, NetworkError};

/// The queueing discipline of what an interface receives (tc(8), "ingress").
const INGRESS: TcHandle = TcHandle { major: 0xFFFF, minor: 0 };
/// All protocols (`ETH_P_ALL` of linux/if_ether.h), in the byte order of the wire.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// Filters are tried in the order of these; one that somebody else has put there before 1 does not exist.
const PRIORITY: u32 = 1;

impl Namespace {
    /// Joins `interface` to the tap `tap` of this namespace, which gets its largest packet.
    ///
    /// What the interface received it keeps from the namespace until [`part`] or until the interface goes. The tap goes
    /// with its descriptors.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`].
    pub fn join(&mut self, interface: &Interface, tap: &str) -> Result<(), NetworkError> {
        let what = |step: &str| format!("{step} (network namespace {})", self.path().display());
        let (find, set_up) = (what(&format!("find the tap {tap}")), what(&format!("set up the tap {tap}")));
        let there = what(&format!("redirect what {} receives to the tap {tap}", interface.name));
        let back = what(&format!("redirect what the tap {tap} receives to {}", interface.name));
        let connection = &mut self.connection;
        let index = link_index(connection, tap)
            .and_then(|index| index.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(NetworkError::kernel(find))?;
        bring_up(connection, index, interface.mtu).map_err(NetworkError::kernel(set_up))?;
        redirect(connection, index, interface.index).map_err(NetworkError::kernel(back))?;
        redirect(connection, interface.index, index).map_err(NetworkError::kernel(there))
    }
}

/// Takes back what [`Namespace::join`] did to the interface `name` of namespace `path`, if it is still the one of `id`.
/// Nothing to take back is success.
///
/// # Errors
/// [`NetworkError`].
pub fn part(path: &Path, id: NamespaceId, name: &str) -> Result<(), NetworkError> {
    let Some(mut namespace) = Namespace::reopen(path, id)? else { return Ok(()) };
    let what = format!("let {name} receive again (network namespace {})", path.display());
    let connection = &mut namespace.connection;
    let removed = link_index(connection, name).and_then(|index| match index {
        Some(index) => connection.request(RouteNetlinkMessage::DelQueueDiscipline(ingress(index)), 0),
        None => Ok(()),
    });
    match removed {
        // There is none (any more).
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result.map_err(NetworkError::kernel(what)),
    }
}

fn link_index(connection: &mut Connection, name: &str) -> io::Result<Option<u32>> {
    let wanted = LinkAttribute::IfName(name.to_owned());
    let links = connection.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links.into_iter().find_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) if link.attributes.contains(&wanted) => Some(link.header.index),
        _ => None,
    }))
}

fn bring_up(connection: &mut Connection, index: u32, mtu: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.push(LinkAttribute::Mtu(mtu));
    connection.request(RouteNetlinkMessage::SetLink(link), 0)
}

/// Has all that the interface `from` receives leave by the interface `to`.
fn redirect(connection: &mut Connection, from: u32, to: u32) -> io::Result<()> {
    match connection.request(RouteNetlinkMessage::NewQueueDiscipline(ingress(from)), NLM_F_CREATE | NLM_F_EXCL) {
        // The network's maker has one, to limit what comes: the redirection takes what it lets through.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        result => result?,
    }
    connection.request(RouteNetlinkMessage::NewTrafficFilter(filter(from, to)), NLM_F_CREATE)
}

fn message(index: u32) -> TcMessage {
    // The kernel counts interfaces by positive numbers of this type.
    TcMessage::with_index(i32::try_from(index).unwrap_or_default())
}

fn ingress(index: u32) -> TcMessage {
    let mut message = message(index);
    message.header.handle = INGRESS;
    message.header.parent = TcHandle::INGRESS;
    message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
    message
}

fn filter(from: u32, to: u32) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    // A key without a mask matches everything; `u32` is the classifier that small kernels have, too.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let mut message = message(from);
    message.header.parent = INGRESS;
    message.header.info = PRIORITY << 16 | u32::from(ALL_PROTOCOLS);
    message.attributes = vec![
        TcAttribute::Kind("u32".to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    message
}
