//! What is dialled to the loopback address of a pod's namespace on the host, to whatever port.
//!
//! Port-forwarding is asked of a node, and containerd does it by dialling 127.0.0.1 in the pod's network namespace, where a
//! container's server would be. Here it is in a virtual machine, and nothing listens. So one listener takes all of it: a
//! BPF program that the kernel asks whose a new connection is (`Documentation/bpf/prog_sk_lookup.rst`) steers there what
//! goes to 127.0.0.0/8, and the connection's own address tells the port that was dialled. No address is translated and no
//! rule is added where the network's maker has his; program and listener go with this process.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bpf::{Instruction, Map, code};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket, sockopt,
};

use crate::{Namespace, NetworkError};

// `enum bpf_map_type`, `enum bpf_prog_type`, `enum bpf_attach_type`, `enum bpf_func_id`.
const SOCKET_MAP: u32 = 15;
const SOCKET_LOOKUP_PROGRAM: u32 = 30;
const SOCKET_LOOKUP: u32 = 36;
const RELEASE_SOCKET: i32 = 86;
const ASSIGN_SOCKET: i32 = 124;

/// The listener, and what leads to it.
#[derive(Debug)]
pub struct Loopback {
    listener: TcpListener,
    _steering: OwnedFd,
}

impl Loopback {
    /// Accepts the connections; its local address is the one that was dialled. It does not block.
    #[must_use]
    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }
}

impl Namespace {
    /// Takes all connections to 127.0.0.0/8 of this namespace, for as long as the answer exists.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`], as when the kernel is older than 5.9 or has no BPF.
    pub fn take_loopback(&self) -> Result<Loopback, NetworkError> {
        let failed = |step: &str| {
            NetworkError::kernel(format!("{step} (loopback of network namespace {})", self.path().display()))
        };
        let listener = self.within(|| listener().map_err(failed("listen")))?;
        let steering = self.steer(&listener).map_err(failed("steer connections to a listener"))?;
        Ok(Loopback { listener, _steering: steering })
    }

    fn steer(&self, listener: &TcpListener) -> io::Result<OwnedFd> {
        let sockets = Map::new(SOCKET_MAP, 1)?;
        sockets.put(0, u64::try_from(listener.as_raw_fd()).map_err(io::Error::other)?)?;
        let program = bpf::load(SOCKET_LOOKUP_PROGRAM, SOCKET_LOOKUP, &program(&sockets))?;
        bpf::link(self.file().as_fd(), &program, SOCKET_LOOKUP)
    }
}

/// A socket that listens at any port of 127.0.0.1, which need not be an address yet.
fn listener() -> io::Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(TcpListener::from(socket))
}

/// Steers TCP to 127.0.0.0/8 to the socket in the map, and leaves the rest as it is.
fn program(sockets: &Map) -> Vec<Instruction> {
    // Of `struct bpf_sk_lookup`; addresses are in the order of the wire, so that the first byte is the lowest.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOOPBACK: i32 = 127;
    /// Instructions that ask for one condition.
    const CONDITION: usize = 3;
    /// `SK_PASS`: the kernel goes on with the socket that was chosen, or looks for one itself.
    const PASS: [Instruction; 2] = [Instruction::set(0, 1), Instruction::EXIT];

    let assign = [
        Instruction::copy(7, 0),
        Instruction::copy(1, 6),
        Instruction::copy(2, 0),
        Instruction::set(3, 0),
        Instruction::call(ASSIGN_SOCKET),
        Instruction::copy(1, 7),
        Instruction::call(RELEASE_SOCKET),
    ];
    let mut found = sockets.find(0).to_vec();
    found.push(Instruction::new(code::JUMP_IF, 0, 0, length(&assign), 0));
    found.extend(assign);

    let conditions = [(FAMILY, -1, libc::AF_INET), (PROTOCOL, -1, libc::IPPROTO_TCP), (LOCAL_IP4, 0xff, LOOPBACK)];
    let mut program = vec![Instruction::copy(6, 1)];
    for (later, (offset, mask, wanted)) in (0..conditions.len()).rev().zip(conditions) {
        let rest = i16::try_from(later * CONDITION).unwrap_or_default() + length(&found);
        program.extend::<[_; CONDITION]>([
            Instruction::load_word(2, 6, offset),
            Instruction::new(code::AND, 2, 0, 0, mask),
            Instruction::new(code::JUMP_IF_NOT, 2, 0, rest, wanted),
        ]);
    }
    program.extend(found);
    program.extend(PASS);
    program
}

fn length(program: &[Instruction]) -> i16 {
    i16::try_from(program.len()).unwrap_or(i16::MAX)
}
