//! The way of a device's messages: from the host's interrupt over an eventfd into KVM, past this process.
//!
//! A vector costs nothing until the guest unmasks it. While it is masked, its eventfd is not attached to KVM, and its
//! counter holds what is pending: attaching it again delivers that. All routes that change together are changed by one
//! call, because KVM takes as long for one as for many.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::host::{HostDevice, IrqKind};
use crate::irq::Message;
use crate::irq::router::{Gsi, IrqRouter};

/// What of KVM's interrupt routing a device needs.
pub(crate) trait Routes: Send + Sync {
    /// Takes a free number.
    ///
    /// # Errors
    /// When there is none.
    fn allocate(&self) -> io::Result<Gsi>;

    /// Gives it back.
    fn release(&self, gsi: Gsi);

    /// Sends each number to its message.
    ///
    /// # Errors
    /// When KVM refuses; nothing has changed then.
    fn route(&self, changes: &[(Gsi, Message)]) -> io::Result<()>;

    /// Lets an event raise a number.
    ///
    /// # Errors
    /// When KVM refuses.
    fn attach(&self, event: &EventFd, gsi: Gsi) -> io::Result<()>;

    /// Ends that.
    ///
    /// # Errors
    /// When it did not.
    fn detach(&self, event: &EventFd, gsi: Gsi) -> io::Result<()>;
}

impl Routes for IrqRouter {
    fn allocate(&self) -> io::Result<Gsi> {
        Self::allocate(self)
    }

    fn release(&self, gsi: Gsi) {
        Self::release(self, gsi);
    }

    fn route(&self, changes: &[(Gsi, Message)]) -> io::Result<()> {
        Self::route(self, changes)
    }

    fn attach(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        Self::attach(self, event, gsi)
    }

    fn detach(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
        Self::detach(self, event, gsi)
    }
}

/// The vectors of one kind of a device.
pub(super) struct Vectors {
    kind: IrqKind,
    host: Arc<dyn HostDevice>,
    routes: Arc<dyn Routes>,
    lines: Vec<Option<Line>>,
    /// How many vectors the host has switched on, 0 while the kind is off.
    started: usize,
}

/// What carries one vector.
struct Line {
    event: EventFd,
    gsi: Gsi,
    routed: Option<Message>,
    attached: bool,
}

impl Vectors {
    pub(super) fn new(kind: IrqKind, host: Arc<dyn HostDevice>, routes: Arc<dyn Routes>) -> Self {
        Self { kind, host, routes, lines: Vec::new(), started: 0 }
    }

    /// Makes the interrupts what the guest wants: a message for each vector, nothing for a masked one, and no vector at
    /// all while the kind is off. What the host refuses is off afterwards, and said in the log.
    pub(super) fn set(&mut self, wanted: &[Option<Message>]) {
        let result = if wanted.is_empty() { Ok(()) } else { self.try_set(wanted) };
        if let Err(error) = &result {
            tracing::warn!(device = self.host.name(), kind = ?self.kind, %error, "interrupts are off");
        }
        if wanted.is_empty() || result.is_err() {
            self.stop();
        }
    }

    fn try_set(&mut self, wanted: &[Option<Message>]) -> io::Result<()> {
        let grows = self.host.irq(self.kind).grows;
        if self.started > 0 && !grows && self.started != wanted.len() {
            self.stop();
        }
        self.lines.resize_with(wanted.len(), || None);
        let fresh = self.route(wanted)?;
        self.attach(wanted)?;
        self.start(&fresh, grows)
    }

    /// Gives every unmasked vector a line and its route; gives the vectors whose lines are new.
    fn route(&mut self, wanted: &[Option<Message>]) -> io::Result<Vec<usize>> {
        let mut fresh = Vec::new();
        let mut changes = Vec::new();
        for (index, (line, message)) in self.lines.iter_mut().zip(wanted).enumerate() {
            let Some(message) = message else { continue };
            let line = match line {
                Some(line) => line,
                none => {
                    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
                    fresh.push(index);
                    none.insert(Line { event, gsi: self.routes.allocate()?, routed: None, attached: false })
                }
            };
            if line.routed != Some(*message) {
                changes.push((line.gsi, *message));
                line.routed = Some(*message);
            }
        }
        if !changes.is_empty() {
            self.routes.route(&changes)?;
        }
        Ok(fresh)
    }

    /// Attaches the lines of unmasked vectors to KVM, and takes those of masked ones away.
    fn attach(&mut self, wanted: &[Option<Message>]) -> io::Result<()> {
        for (line, message) in self.lines.iter_mut().zip(wanted) {
            let Some(line) = line else { continue };
            match (message, line.attached) {
                (Some(_), false) => self.routes.attach(&line.event, line.gsi)?,
                (None, true) => self.routes.detach(&line.event, line.gsi)?,
                _ => continue,
            }
            line.attached = message.is_some();
        }
        Ok(())
    }

    /// Lets the host's interrupts write to the events of new lines.
    fn start(&mut self, fresh: &[usize], grows: bool) -> io::Result<()> {
        if self.started == 0 {
            // Where vectors cannot be added later, the host gets all that there are at once.
            let last = self.lines.iter().rposition(Option::is_some);
            let count = if grows { last.map_or(1, |last| last + 1) } else { self.lines.len() };
            let events: Vec<_> = self.lines.iter().take(count).map(|line| Some(&line.as_ref()?.event)).collect();
            self.host.set_events(self.kind, 0, &events)?;
            self.started = count;
            return Ok(());
        }
        for index in fresh {
            let event = self.lines[*index].as_ref().map(|line| &line.event);
            self.host.set_events(self.kind, u32::try_from(*index).map_err(io::Error::other)?, &[event])?;
            self.started = self.started.max(index + 1);
        }
        Ok(())
    }

    fn stop(&mut self) {
        if self.started > 0
            && let Err(error) = self.host.stop_events(self.kind)
        {
            tracing::warn!(device = self.host.name(), kind = ?self.kind, %error, "interrupts cannot be switched off");
        }
        self.started = 0;
        for line in self.lines.drain(..).flatten() {
            if line.attached
                && let Err(error) = self.routes.detach(&line.event, line.gsi)
            {
                tracing::warn!(device = self.host.name(), %error, "KVM still watches an interrupt");
            }
            self.routes.release(line.gsi);
        }
    }

    /// Whether an interrupt came while the vector was masked.
    pub(super) fn is_pending(&self, vector: usize) -> bool {
        let Some(Some(line)) = self.lines.get(vector) else { return false };
        !line.attached && is_readable(&line.event)
    }
}

fn is_readable(event: &EventFd) -> bool {
    // SAFETY: the event is open as long as it is borrowed here.
    let descriptor = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    poll(&mut [PollFd::new(descriptor, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

impl Drop for Vectors {
    fn drop(&mut self) {
        self.stop();
    }
}
