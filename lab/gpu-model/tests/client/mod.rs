//! A vfio-user client that packs its messages by itself, so that the tests do not depend on the server's own packing.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use gpu_model::registers::{BUSY, COMMAND, STATUS};
use gpu_model::{Device, Identity};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

pub(crate) const VIDEO_MEMORY: u64 = 64 << 20;
pub(crate) const CONFIG: u32 = 7;
/// Most time that any answer or interrupt may take before the test is given up.
const LIMIT: u16 = 60_000;

/// An answer: error number, payload and descriptors.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) error: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A device's client, and the thread that serves it.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) server: Option<JoinHandle<std::io::Result<()>>>,
    id: u16,
}

pub(crate) fn numbers(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn memory(size: u64) -> File {
    let file = File::from(memfd_create("client", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

impl Client {
    pub(crate) fn new() -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_millis(LIMIT.into()))).unwrap();
        let server = std::thread::spawn(move || {
            let device = Device::new(Identity::default(), VIDEO_MEMORY).unwrap();
            gpu_model::serve_client(theirs, &device)
        });
        Self { stream, server: Some(server), id: 0 }
    }

    /// With memory decoding and bus mastering on.
    pub(crate) fn ready() -> Self {
        let mut client = Self::new();
        client.write(CONFIG, 4, &[6, 0]);
        client
    }

    pub(crate) fn header(&mut self, command: u16, size: usize, flags: u32) -> Vec<u8> {
        self.id += 1;
        let mut header = [self.id.to_le_bytes(), command.to_le_bytes()].concat();
        header.extend(numbers(&[u32::try_from(size + 16).unwrap(), flags, 0]));
        header
    }

    pub(crate) fn send(&mut self, command: u16, payload: &[u8], flags: u32, descriptors: &[RawFd]) {
        let message = [self.header(command, payload.len(), flags), payload.to_vec()].concat();
        let control = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &control[..0] } else { &control[..] };
        let fd = self.stream.as_raw_fd();
        let sent = sendmsg::<()>(fd, &[IoSlice::new(&message)], control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
        self.stream.write_all(&message[sent..]).unwrap();
    }

    pub(crate) fn receive(&mut self) -> Answer {
        let mut header = [0; 16];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut control), flags).unwrap();
        let mut descriptors = Vec::new();
        for message in received.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                // SAFETY: the kernel has just made these descriptors for this test alone.
                descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        assert_eq!(received.bytes, 16, "the server has hung up");
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(header[..2], self.id.to_le_bytes(), "the answer to another request");
        assert_eq!(field(8) & 0xf, 1, "no reply");
        assert_eq!(field(8) & 0x20 != 0, field(12) != 0, "error bit without number, or the other way round");
        let mut payload = vec![0; field(4) as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        Answer { error: field(12), payload, descriptors }
    }

    pub(crate) fn ask_with(&mut self, command: u16, payload: &[u8], descriptors: &[RawFd]) -> Answer {
        self.send(command, payload, 0, descriptors);
        self.receive()
    }

    pub(crate) fn ask(&mut self, command: u16, payload: &[u8]) -> Answer {
        self.ask_with(command, payload, &[])
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let answer = self.ask(9, &[offset.to_le_bytes().to_vec(), numbers(&[region, count])].concat());
        assert_eq!(answer.error, 0, "reading {count} bytes of region {region} at {offset:#x}");
        answer.payload[16..].to_vec()
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let count = u32::try_from(data.len()).unwrap();
        let fields = [offset.to_le_bytes().to_vec(), numbers(&[region, count]), data.to_vec()].concat();
        assert_eq!(self.ask(10, &fields).error, 0, "writing {count} bytes to region {region} at {offset:#x}");
    }

    pub(crate) fn register(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(0, offset, 4).try_into().unwrap())
    }

    pub(crate) fn wide_register(&mut self, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(0, offset, 8).try_into().unwrap())
    }

    pub(crate) fn set_register(&mut self, offset: u64, value: u32) {
        self.write(0, offset, &value.to_le_bytes());
    }

    pub(crate) fn map(&mut self, file: &File, flags: u32, offset: u64, address: u64, size: u64) -> u32 {
        let mut payload = numbers(&[32, flags]);
        payload.extend([offset, address, size].iter().flat_map(|value| value.to_le_bytes()));
        self.ask_with(2, &payload, &[file.as_raw_fd()]).error
    }

    pub(crate) fn unmap(&mut self, flags: u32, address: u64, size: u64) -> Answer {
        let mut payload = numbers(&[24, flags]);
        payload.extend([address, size].iter().flat_map(|value| value.to_le_bytes()));
        self.ask(3, &payload)
    }

    /// Connects an eventfd to an interrupt.
    pub(crate) fn eventfd(&mut self, index: u32, start: u32) -> EventFd {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        let fields = numbers(&[20, 0x24, index, start, 1]);
        assert_eq!(self.ask_with(8, &fields, &[eventfd.as_raw_fd()]).error, 0);
        eventfd
    }

    /// Runs a command to its interrupt on vector 3; answers its status.
    pub(crate) fn run(&mut self, operation: u32, source: u64, destination: u64, length: u64) -> u32 {
        let eventfd = self.eventfd(2, 3);
        for (offset, value) in [(0x1000, source), (0x1008, destination), (0x1010, length)] {
            self.write(0, offset, &value.to_le_bytes());
        }
        self.set_register(COMMAND, operation | 3 << 8);
        assert!(raised(&eventfd, LIMIT), "no interrupt");
        let status = self.register(STATUS);
        assert_eq!(status & BUSY, 0);
        status
    }

    /// Closes the connection; answers how the server took it.
    pub(crate) fn finish(mut self) -> std::io::Result<()> {
        drop(std::mem::replace(&mut self.stream, UnixStream::pair().unwrap().0));
        self.server.take().unwrap().join().unwrap()
    }
}

/// Whether an eventfd is raised within `limit` milliseconds; takes the event.
pub(crate) fn raised(eventfd: &EventFd, limit: u16) -> bool {
    use std::os::fd::AsFd;
    let count = poll(&mut [PollFd::new(eventfd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(limit)).unwrap();
    count == 1 && eventfd.read().unwrap() > 0
}

/// Bytes that no pattern of the device makes.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(step).flatten().take(length).collect()
}

pub(crate) fn content(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}
