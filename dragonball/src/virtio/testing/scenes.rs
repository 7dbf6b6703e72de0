//! Devices in their surroundings, for hostile drivers: what requests look like, and what the host does meanwhile.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use tempfile::{NamedTempFile, TempDir};

use super::script::{Scene, Script, run};
use super::wire::{self, Wire};
use super::{Harness, MEMORY_SIZE, PLUGGABLE_START, harness_memory};
use crate::config::FsConfig;
use crate::memory::PluggableMemory;
use crate::memory::listener::DmaListeners;
use crate::virtio::balloon::{Balloon, BalloonControl};
use crate::virtio::blk::{Blk, Resizer};
use crate::virtio::console::Console;
use crate::virtio::fs::Fs;
use crate::virtio::mem::{Mem, MemControl};
use crate::virtio::net::Link;
use crate::virtio::pmem::{Pmem, PmemMode};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// Runs a program on the entropy device, which has no request format: the ring itself is under test.
pub fn queue(bytes: &[u8]) {
    run(&mut Harness::new(Rng::new()), Script::new(bytes), &mut Nothing);
}

/// Runs a program on a console: what the guest writes is lost, and there is nothing to read.
pub fn console(bytes: &[u8]) {
    let null = || fs::File::options().read(true).write(true).open("/dev/null").expect("/dev/null");
    let console = Console::new(Some(null().into()), Some(null().into()));
    run(&mut Harness::new(console), Script::new(bytes), &mut Nothing);
}

/// Runs a program on persistent memory that ends within a page.
pub fn pmem(bytes: &[u8]) {
    let image = NamedTempFile::new().expect("a temporary file");
    image.as_file().set_len(5000).expect("a short file");
    let mut script = Script::new(bytes);
    let mode = if script.byte() & 1 == 0 { PmemMode::ReadOnly } else { PmemMode::CopyOnWrite };
    let pmem = Pmem::open(image.path(), mode).expect("a device");
    run(&mut Harness::new(pmem), script, &mut Nothing);
}

/// Requests of any bytes, and a host that does nothing.
pub struct Nothing;

impl Scene for Nothing {}

/// Runs a program on a disk of a megabyte, which becomes shorter and longer.
pub fn blk(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let image = NamedTempFile::new().expect("a temporary file");
    image.as_file().set_len(1 << 20).expect("a megabyte");
    let blk = Blk::open(image.path(), script.byte() & 3 == 1).expect("a disk");
    let mut scene = Disk { resizer: blk.resizer(), image };
    run(&mut Harness::new(blk), script, &mut scene);
}

struct Disk {
    image: NamedTempFile,
    resizer: Resizer,
}

impl Scene for Disk {
    /// A header with a type and a sector near the disk's, and data.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let kind = u32::from(script.byte() % 16);
        let sector = u64::from(script.half() % 2100);
        let mut request = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        if matches!(kind, 11 | 13) {
            let (sector, count) = (u64::from(script.half() % 2100), u32::from(script.half() % 100));
            request.extend_from_slice(&sector.to_le_bytes());
            request.extend_from_slice(&count.to_le_bytes());
            request.extend_from_slice(&u32::from(script.byte() & 3).to_le_bytes());
        } else {
            request.resize(16 + 512 * usize::from(script.byte() % 8), script.byte());
        }
        request
    }

    fn host(&mut self, script: &mut Script<'_>) {
        let length = u64::from(script.half()) * 16;
        self.image.as_file().set_len(length).expect("at most a megabyte");
        if script.byte() & 1 == 0 {
            self.resizer.resize().expect("an event");
        }
    }
}

/// Runs a program on the socket device, with programs of the host on the other side.
pub fn vsock(bytes: &[u8]) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let listener = UnixListener::bind(directory.path().join("vsock_1")).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    let device = Vsock::new(3, &directory.path().join("vsock")).expect("a device");
    let mut scene = Sockets { directory, listener, programs: Vec::new() };
    run(&mut Harness::new(device), Script::new(bytes), &mut scene);
}

struct Sockets {
    directory: TempDir,
    listener: UnixListener,
    programs: Vec<UnixStream>,
}

/// The most programs of the host at a time.
const PROGRAMS: usize = 8;

impl Scene for Sockets {
    /// A packet between the right context ids and few ports.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let host = match script.byte() % 4 {
            port @ 0..2 => u32::from(port),
            port => (1 << 30) + u32::from(port - 2),
        };
        let operation = u16::from(script.byte() % 9);
        let length = if operation == 5 { u32::from(script.half() % 2000) } else { 0 };
        let (flags, room, forwarded) = (script.byte() & 3, script.half(), script.half());
        let mut packet = [3_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
        for word in [u32::from(script.byte() % 4), host, length, 1 | u32::from(operation) << 16] {
            packet.extend_from_slice(&word.to_le_bytes());
        }
        for word in [u32::from(flags), u32::from(room), u32::from(forwarded)] {
            packet.extend_from_slice(&word.to_le_bytes());
        }
        packet.resize(44 + length as usize, script.byte());
        packet
    }

    fn host(&mut self, script: &mut Script<'_>) {
        match script.byte() % 6 {
            0 => self.programs.extend(self.listener.accept().ok().map(|(stream, _)| stream)),
            1 if self.programs.len() < PROGRAMS => {
                self.programs.extend(UnixStream::connect(self.directory.path().join("vsock")).ok());
            }
            2 => {
                let data = vec![script.byte(); usize::from(script.half())];
                self.each(|stream| drop(stream.write(&data)));
            }
            3 => self.each(|stream| drop(stream.write(b"CONNECT 1\n"))),
            4 => self.each(|stream| {
                if let Err(error) = stream.read(&mut [0; 4096]) {
                    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset), "{error}");
                }
            }),
            _ => {
                if let Some(stream) = self.programs.pop() {
                    // Fails when the device ended the connection first.
                    let _ = stream.shutdown(if script.byte() & 1 == 0 { Shutdown::Write } else { Shutdown::Both });
                }
            }
        }
    }
}

impl Sockets {
    fn each(&mut self, mut action: impl FnMut(&mut UnixStream)) {
        for stream in &mut self.programs {
            stream.set_nonblocking(true).expect("a socket");
            action(stream);
        }
    }
}

/// Runs a program on the file system device, on a small directory that is mounted already.
pub fn fs(bytes: &[u8]) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir(directory.path().join("d")).expect("a directory");
    fs::write(directory.path().join("f"), "contents").expect("a file");
    symlink("f", directory.path().join("l")).expect("a link");
    let mut harness = Harness::new(
        Fs::new(&FsConfig { tag: "fuzz".to_owned(), directory: directory.path().to_owned(), guest_only: None })
            .expect("a device"),
    );
    let mut init = fuse_header(26, 0, 48);
    for word in [7_u32, 38, 1 << 17, u32::MAX, u32::MAX, 0] {
        init.extend_from_slice(&word.to_le_bytes());
    }
    init.resize(40 + 64, 0);
    let segments = [harness.readable(&init), harness.writable(128)];
    harness.request(1, &segments);
    run(&mut harness, Script::new(bytes), &mut Directory { directory });
}

/// How much memory the device of [`mem`] can plug.
pub const MEM_SIZE: u64 = 128 << 20;

/// A memory device at work in a guest without a VM, which shall have nothing.
pub(crate) fn mem_harness() -> Harness<Mem> {
    let memory = harness_memory(Some(MEM_SIZE));
    let listeners = DmaListeners::new(Arc::clone(&memory));
    let pluggable = PluggableMemory::new(&memory, None, listeners).expect("a region for pluggable memory");
    let mut harness = Harness::idle_in(memory, Mem::new(pluggable, MEM_SIZE).expect("a device"));
    harness.activate().expect("activation");
    harness
}

/// Runs a program on the memory device, of whose guest the host wants more and less.
pub fn mem(bytes: &[u8]) {
    let mut harness = mem_harness();
    let control = harness.device.control();
    run(&mut harness, Script::new(bytes), &mut Memory { control: control.clone() });
    let state = control.state();
    assert!(state.plugged <= MEM_SIZE, "the guest has more than there is: {state:?}");
}

struct Memory {
    control: MemControl,
}

impl Scene for Memory {
    /// A request about blocks that mostly exist.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let mut request = vec![0; 24];
        request[0] = script.byte() % 5;
        let offset = u64::from(script.byte() % 66) * (2 << 20) + u64::from(script.byte() == 255);
        request[8..16].copy_from_slice(&(PLUGGABLE_START + offset).to_le_bytes());
        request[16..18].copy_from_slice(&(script.half() % 66).to_le_bytes());
        request
    }

    fn host(&mut self, script: &mut Script<'_>) {
        let bytes = u64::from(script.half()) << 12;
        assert!(self.control.set_requested(bytes).expect("an event") <= MEM_SIZE);
    }
}

/// A balloon at work in a guest without a VM, and who else reaches its memory.
pub(crate) fn balloon_harness() -> (Harness<Balloon>, DmaListeners) {
    let memory = harness_memory(Some(MEM_SIZE));
    let listeners = DmaListeners::new(Arc::clone(&memory));
    let mut harness = Harness::idle_in(memory, Balloon::new(listeners.clone(), MEMORY_SIZE).expect("a device"));
    harness.activate().expect("activation");
    (harness, listeners)
}

/// Runs a program on a balloon that the host wants larger and smaller.
pub fn balloon(bytes: &[u8]) {
    let (mut harness, _listeners) = balloon_harness();
    let control = harness.device.control();
    run(&mut harness, Script::new(bytes), &mut Pages { control });
}

struct Pages {
    control: BalloonControl,
}

impl Scene for Pages {
    /// Numbers of pages that mostly exist.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let first = u32::from(script.half());
        let pages = (0..u32::from(script.byte())).map(|page| first + page * u32::from(script.byte() % 3));
        pages.flat_map(u32::to_le_bytes).collect()
    }

    fn host(&mut self, script: &mut Script<'_>) {
        if script.byte() & 1 == 0 {
            self.control.request_stats().expect("an event");
        } else {
            let target = self.control.set_target(u64::from(script.word())).expect("an event");
            assert!(target <= MEMORY_SIZE);
        }
    }
}

struct Directory {
    directory: TempDir,
}

fn fuse_header(opcode: u32, node: u64, body: usize) -> Vec<u8> {
    let length = u32::try_from(40 + body).expect("a short request");
    let mut header = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    header.extend_from_slice(&[0; 8]);
    header.extend_from_slice(&node.to_le_bytes());
    header.resize(40, 0);
    header
}

impl Scene for Directory {
    /// A request of any kind, on an inode that may exist, with numbers in its body that are mostly small (handles,
    /// sizes, offsets) and a name at its end.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        let opcode = u32::from(script.byte() % 52);
        let node = 1 + u64::from(script.byte() % 6);
        let mut body = Vec::new();
        for _ in 0..script.byte() % 12 {
            let number = match script.byte() {
                255 => u64::MAX,
                254 => u64::from(script.word() % (1 << 20)),
                number => u64::from(number % 16),
            };
            body.extend_from_slice(&number.to_le_bytes());
        }
        let name = [&b"d\0"[..], b"f\0", b"l\0", b"new\0", b"..\0", b"", b"f\0new\0", b"trusted.x\0value"];
        body.extend_from_slice(name[usize::from(script.byte() % 8)]);
        let mut request = fuse_header(opcode, node, body.len());
        request.extend_from_slice(&body);
        request
    }

    /// The host changes the directory under the guest's feet.
    fn host(&mut self, script: &mut Script<'_>) {
        let names = ["d", "f", "l", "new"].map(|name| self.directory.path().join(name));
        let (from, to) = (&names[usize::from(script.byte() % 4)], &names[usize::from(script.byte() % 4)]);
        // Fails where the names do not fit each other.
        let _ = fs::rename(from, to);
    }
}

/// Runs a program on a network card with two queue pairs, with a host on the other side.
pub fn net(bytes: &[u8]) {
    let (card, wires) = wire::card(2);
    let mut scene = Wires { link: card.link(), wires };
    run(&mut Harness::new(card), Script::new(bytes), &mut scene);
}

struct Wires {
    link: Link,
    wires: Vec<Wire>,
}

impl Wires {
    /// A frame of any bytes behind a header of any bytes, mostly shorter than 2 KiB.
    fn frame(script: &mut Script<'_>) -> Vec<u8> {
        let length = match script.byte() {
            0 => usize::from(script.half()),
            length => 8 * usize::from(length),
        };
        let mut frame = script.array::<12>().to_vec();
        frame.resize(12 + length, script.byte());
        frame
    }
}

impl Scene for Wires {
    /// A command with as much data as it needs, more or less, or a frame.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        if script.byte() & 1 == 0 {
            return Self::frame(script);
        }
        let (class, command) = (script.byte() % 7, script.byte() % 3);
        let mut request = vec![class, command];
        match (class, command) {
            (0, _) => request.push(script.byte() & 1),
            (1, 0) => {
                for _ in 0..2 {
                    let count = script.byte() % 40;
                    request.extend_from_slice(&u32::from(count).to_le_bytes());
                    request.extend((0..6 * usize::from(count)).map(|_| script.byte()));
                }
            }
            (1, _) => request.extend_from_slice(&script.array::<6>()),
            (4, _) => request.extend_from_slice(&[script.byte() % 4, 0]),
            _ => request.extend_from_slice(&script.array::<8>()),
        }
        if script.byte() & 7 == 0 {
            request.truncate(usize::from(script.byte()));
        }
        request
    }

    fn host(&mut self, script: &mut Script<'_>) {
        let wire = &self.wires[usize::from(script.byte() & 1)];
        match script.byte() & 7 {
            0 => while wire.receive().is_some() {},
            1 => self.link.set_link(script.byte() & 1 == 0).expect("an event"),
            _ => drop(wire.send(&Self::frame(script))),
        }
    }
}
