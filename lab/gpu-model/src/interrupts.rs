//! Interrupts as vfio has them: an eventfd for each MSI-X vector and one for the line.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// MSI-X vectors of the device.
pub const VECTORS: u16 = 8;

/// Indexes of vfio's PCI interrupts (`linux/vfio.h`, `VFIO_PCI_*_IRQ_INDEX`).
pub(crate) const INTX: u32 = 0;
pub(crate) const MSIX: u32 = 2;
/// How many indexes there are.
pub(crate) const INDEXES: u32 = 5;

/// Bits of a request's flags (`linux/vfio.h`, `VFIO_IRQ_SET_*`).
const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_MASK: u32 = 1 << 3;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

/// What a client asks for.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) flags: u32,
    pub(crate) index: u32,
    pub(crate) start: u32,
    pub(crate) count: u32,
    /// A byte for each interrupt, with [`DATA_BOOL`].
    pub(crate) bytes: &'a [u8],
    /// An eventfd for each interrupt, with [`DATA_EVENTFD`]; none at all takes them away.
    pub(crate) eventfds: Vec<OwnedFd>,
}

/// Where interrupts go.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    vectors: [Option<File>; VECTORS as usize],
    line: Option<File>,
    /// Raised and not yet unmasked by the client: vfio masks the line whenever it is raised.
    masked: bool,
}

/// Number and flags (`VFIO_IRQ_INFO_*`) of the interrupts of an index.
pub(crate) fn information(index: u32) -> (u32, u32) {
    const EVENTFD: u32 = 1;
    const MASKABLE: u32 = 1 << 1;
    const AUTOMASKED: u32 = 1 << 2;
    const NORESIZE: u32 = 1 << 3;
    match index {
        INTX => (1, EVENTFD | MASKABLE | AUTOMASKED),
        MSIX => (VECTORS.into(), EVENTFD | NORESIZE),
        _ => (0, 0),
    }
}

impl Interrupts {
    /// Does what a client asks for; the caller then raises the line if it is due.
    pub(crate) fn set(&mut self, request: Request<'_>) -> Result<(), Errno> {
        let (available, _) = information(request.index);
        let end = request.start.checked_add(request.count).ok_or(Errno::EINVAL)?;
        if end > available {
            return Err(Errno::EINVAL);
        }
        let data = request.flags & (DATA_NONE | DATA_BOOL | DATA_EVENTFD);
        match (request.flags & (ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER), data) {
            (ACTION_TRIGGER, DATA_NONE) if request.count == 0 => {
                self.disable(request.index);
                Ok(())
            }
            (ACTION_TRIGGER, DATA_EVENTFD) => self.connect(request),
            (ACTION_TRIGGER, DATA_NONE | DATA_BOOL) => self.loop_back(&request),
            (action @ (ACTION_MASK | ACTION_UNMASK), DATA_NONE) if request.index == INTX => {
                self.masked = action == ACTION_MASK;
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn disable(&mut self, index: u32) {
        if index == INTX {
            self.line = None;
            self.masked = false;
        } else {
            self.vectors = Default::default();
        }
    }

    fn connect(&mut self, request: Request<'_>) -> Result<(), Errno> {
        let count = request.eventfds.len();
        if count != 0 && u32::try_from(count) != Ok(request.count) {
            return Err(Errno::EINVAL);
        }
        let index = request.index;
        let mut eventfds = request.eventfds.into_iter().map(File::from);
        for number in request.start..request.start + request.count {
            *self.target(index, number).ok_or(Errno::EINVAL)? = eventfds.next();
        }
        Ok(())
    }

    /// Raises interrupts as the device would.
    fn loop_back(&mut self, request: &Request<'_>) -> Result<(), Errno> {
        let chosen = if request.flags & DATA_BOOL == 0 { None } else { Some(request.bytes) };
        if chosen.is_some_and(|bytes| u32::try_from(bytes.len()) != Ok(request.count)) {
            return Err(Errno::EINVAL);
        }
        for (position, number) in (request.start..request.start + request.count).enumerate() {
            if chosen.is_none_or(|bytes| bytes[position] != 0) {
                signal(self.target(request.index, number));
            }
        }
        Ok(())
    }

    fn target(&mut self, index: u32, number: u32) -> Option<&mut Option<File>> {
        match index {
            INTX => Some(&mut self.line),
            MSIX => self.vectors.get_mut(usize::try_from(number).ok()?),
            _ => None,
        }
    }

    /// Whether the client has taken MSI-X into use, so that the line is silent.
    pub(crate) fn msix(&self) -> bool {
        self.vectors.iter().any(Option::is_some)
    }

    /// Raises a vector.
    pub(crate) fn raise_vector(&mut self, vector: u8) {
        signal(self.vectors.get_mut(usize::from(vector)));
    }

    /// Raises the line, unless it is raised already.
    pub(crate) fn raise_line(&mut self) {
        if self.line.is_some() && !self.masked {
            self.masked = true;
            signal(Some(&mut self.line));
        }
    }
}

fn signal(target: Option<&mut Option<File>>) {
    let Some(Some(eventfd)) = target else { return };
    // A client that gave something else than an eventfd, or lets it overflow, loses its interrupts and stops nobody.
    if poll(&mut [PollFd::new(eventfd.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO) == Ok(1) {
        let _ = eventfd.write(&1_u64.to_ne_bytes());
    }
}
