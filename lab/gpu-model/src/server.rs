//! Serves a device to one client at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::connection::{Connection, Message};
use crate::device::{Device, REGIONS, Region};
use crate::guest_memory::{MAX_MAPPINGS, Permissions};
use crate::interrupts;
use crate::protocol::{MAX_DATA, Payload, Request, VERSION};

/// What a region can be used for (`linux/vfio.h`, `VFIO_REGION_INFO_FLAG_*`).
const READ_WRITE: u32 = 3;
const MMAP: u32 = 1 << 2;
/// What the device is (`VFIO_DEVICE_FLAGS_*`).
const RESETTABLE_PCI: u32 = 3;
/// Descriptors that come with one request at most: one eventfd for each vector.
const DESCRIPTORS: usize = interrupts::VECTORS as usize;

/// An answer: its payload, and a descriptor if one goes with it.
type Answer<'a> = (Payload, Option<BorrowedFd<'a>>);

/// Serves the clients that come to `listener`, one after the other, each with a device as after a reset, until `life`,
/// one end of a pipe, has lost its other end.
///
/// # Errors
/// When the listener or the device fails. A client that fails only loses its connection.
pub fn serve(listener: &UnixListener, device: &Device, life: Option<BorrowedFd<'_>>) -> io::Result<()> {
    while wait_for_client(listener, life)? {
        let (stream, _) = listener.accept()?;
        if let Err(error) = serve_client(stream, device) {
            eprintln!("gpu-model: The client was left: {error}");
        }
        device.disconnect()?;
    }
    Ok(())
}

/// Waits for a client; false when `life` has ended first.
fn wait_for_client(listener: &UnixListener, life: Option<BorrowedFd<'_>>) -> io::Result<bool> {
    let life = life.map(|life| PollFd::new(life, PollFlags::empty()));
    let mut waited: Vec<_> = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)].into_iter().chain(life).collect();
    loop {
        match poll(&mut waited, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(waited[0].any().unwrap_or_default()),
        }
    }
}

/// Serves one client until it goes.
///
/// # Errors
/// When what the client sends is no vfio-user, or it cannot be answered.
pub fn serve_client(stream: UnixStream, device: &Device) -> io::Result<()> {
    let mut connection = Connection::new(stream);
    while let Some(Message { header, payload, descriptors }) = connection.receive()? {
        if !header.is_request() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a reply to nothing"));
        }
        let answer = Request::parse(header.command, &payload).and_then(|request| answer(device, request, descriptors));
        if !header.wants_reply() {
            continue;
        }
        match answer {
            Ok((payload, descriptor)) => connection.send(&header.reply(Ok(&payload.0)), descriptor)?,
            Err(errno) => connection.send(&header.reply(Err(errno)), None)?,
        }
    }
    Ok(())
}

fn answer<'a>(device: &'a Device, request: Request<'_>, mut descriptors: Vec<OwnedFd>) -> Result<Answer<'a>, Errno> {
    if descriptors.len() > DESCRIPTORS {
        return Err(Errno::EINVAL);
    }
    let payload = match request {
        Request::Version { major, minor } => version(major, minor)?,
        Request::DmaMap { read, write, offset, address, size } => {
            let file = descriptors.pop().map(|file| (file, offset));
            device.map(address, size, Permissions { read, write }, file)?;
            Payload::default()
        }
        Request::DmaUnmap { all, address, size } => {
            let unmapped = if all { 0 } else { device.unmap(address, size)? };
            if all {
                device.unmap_all();
            }
            let flags = u32::from(all) << 1;
            Payload::default().u32(24).u32(flags).u64(address).u64(if all { size } else { unmapped })
        }
        Request::DeviceInfo => Payload::default().u32(16).u32(RESETTABLE_PCI).u32(REGIONS).u32(interrupts::INDEXES),
        Request::RegionInfo { index } => return region_info(device, index),
        Request::IrqInfo { index } => irq_info(index)?,
        Request::SetIrqs { flags, index, start, count, data } => {
            let request = interrupts::Request { flags, index, start, count, bytes: data, eventfds: descriptors };
            device.set_interrupts(request)?;
            Payload::default()
        }
        Request::RegionRead { region, offset, count } => {
            let mut data = vec![0; count as usize];
            device.read(region, offset, &mut data)?;
            Payload::default().u64(offset).u32(region).u32(count).bytes(&data)
        }
        Request::RegionWrite { region, offset, data } => {
            device.write(region, offset, data)?;
            let count = u32::try_from(data.len()).map_err(|_| Errno::EINVAL)?;
            Payload::default().u64(offset).u32(region).u32(count)
        }
        Request::Reset => {
            device.reset()?;
            Payload::default()
        }
    };
    Ok((payload, None))
}

fn version(major: u16, minor: u16) -> Result<Payload, Errno> {
    if major != VERSION.0 {
        return Err(Errno::ENOTSUP);
    }
    let capabilities = serde_json::json!({ "capabilities": {
        "max_msg_fds": DESCRIPTORS,
        "max_data_xfer_size": MAX_DATA,
        "max_dma_maps": MAX_MAPPINGS.min(usize::from(u16::MAX)),
        "pgsizes": 4096,
    } });
    let payload = Payload::default().u16(VERSION.0).u16(minor.min(VERSION.1));
    Ok(payload.bytes(capabilities.to_string().as_bytes()).bytes(&[0]))
}

fn region_info(device: &Device, index: u32) -> Result<Answer<'_>, Errno> {
    let Region { size, file } = device.region(index).ok_or(Errno::EINVAL)?;
    let flags = if size == 0 { 0 } else { READ_WRITE } | if file.is_some() { MMAP } else { 0 };
    Ok((Payload::default().u32(32).u32(flags).u32(index).u32(0).u64(size).u64(0), file))
}

fn irq_info(index: u32) -> Result<Payload, Errno> {
    if index >= interrupts::INDEXES {
        return Err(Errno::EINVAL);
    }
    let (count, flags) = interrupts::information(index);
    Ok(Payload::default().u32(16).u32(flags).u32(index).u32(count))
}
