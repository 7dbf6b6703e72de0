//! The `vmm` thread: it owns all devices, works off their events and the requests of vCPUs and the machine's owner, and
//! ends the machine.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use super::input::Input;
use crate::control::{DeviceRequest, Mailbox, Request};
use crate::vcpu::{Context, Vcpu};
use crate::virtio::device::{DeviceError, EventRegistry, Interrupt, Outcome, VirtioDevice};
use crate::virtio::pci::Lines;
use crate::vm::{ExitReason, Shared};

/// The most events taken from the kernel at once.
const EVENTS: usize = 32;

/// A device and its side of the transport.
pub(crate) struct DeviceWorker {
    name: &'static str,
    device: Box<dyn VirtioDevice>,
    lines: Arc<Lines>,
}

impl DeviceWorker {
    pub(crate) fn new(name: &'static str, device: Box<dyn VirtioDevice>, lines: Arc<Lines>) -> Self {
        Self { name, device, lines }
    }

    fn handle_request(&mut self, request: DeviceRequest, events: &mut dyn EventRegistry) {
        match request {
            DeviceRequest::Activate(activation) => {
                let result = self.device.activate(activation, events);
                self.settle(result, events);
            }
            DeviceRequest::Reset(done) => {
                self.device.reset(events);
                self.lines.set_config(self.device.config());
                drop(done);
            }
            DeviceRequest::WriteConfig { offset, data, done } => {
                self.device.write_config(offset, &data);
                self.lines.set_config(self.device.config());
                drop(done);
            }
        }
    }

    fn handle_event(&mut self, token: u32, ready: EventSet, events: &mut dyn EventRegistry) {
        match self.device.handle_event(token, ready, events) {
            Ok(Outcome::Done) => {}
            Ok(Outcome::ConfigChanged) => {
                self.lines.set_config(self.device.config());
                self.lines.signal_config();
            }
            Err(error) => self.settle(Err(error), events),
        }
    }

    /// A device that failed is taken from its rings until the driver resets it.
    fn settle(&mut self, result: Result<(), DeviceError>, events: &mut dyn EventRegistry) {
        if let Err(error) = result {
            tracing::warn!(device = self.name, error = %chain(&error), "the device needs a reset by the guest");
            self.device.reset(events);
            self.lines.set_broken();
        }
        self.lines.set_config(self.device.config());
    }
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// What the loop gives events to.
enum Subscriber {
    Device(DeviceWorker),
    /// The place of a device that is being called with a request.
    Away,
    Mailbox(Arc<EventFd>),
    Input(Input),
}

/// The loop as a device sees it.
struct Registry<'a, 'b>(&'a mut EventOps<'b>);

fn watched(fd: RawFd, token: u32, events: EventSet) -> Events {
    Events::with_data_raw(fd, token, events)
}

impl EventRegistry for Registry<'_, '_> {
    fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.0.add(watched(fd, token, events)).map_err(into_io)
    }

    fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.0.modify(watched(fd, token, events)).map_err(into_io)
    }

    fn remove(&mut self, fd: RawFd) -> io::Result<()> {
        self.0.remove(Events::empty_raw(fd)).map_err(into_io)
    }
}

fn into_io(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => errno.into(),
        other => io::Error::other(other),
    }
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self {
            Self::Device(worker) => worker.handle_event(events.data(), events.event_set(), &mut Registry(ops)),
            Self::Away => {}
            Self::Mailbox(wake) => {
                // Only resets the counter: the requests are worked off after every round of events.
                let _ = wake.read();
            }
            Self::Input(input) => {
                if input.forward() == super::input::Flow::Ended {
                    let _ = ops.remove(events);
                }
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let fd = match self {
            Self::Device(_) | Self::Away => return,
            Self::Mailbox(wake) => wake.as_raw_fd(),
            Self::Input(input) => input.as_raw_fd(),
        };
        if let Err(error) = ops.add(watched(fd, 0, EventSet::IN)) {
            // epoll does not take regular files and `/dev/null` as input: there is nobody to type anything then.
            tracing::debug!(%error, "an event source is not watched");
        }
    }
}

/// Everything that the `vmm` thread owns.
pub(crate) struct Machine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) mailbox: Mailbox,
    pub(crate) devices: Vec<DeviceWorker>,
    pub(crate) input: Option<Input>,
    pub(crate) ending: Arc<AtomicBool>,
    /// Held until the vCPUs have ended.
    pub(crate) memory: crate::memory::GuestRam,
}

/// The body of the `vmm` thread: lets the vCPUs run and returns when the machine has ended.
pub(crate) fn run(machine: Machine, vcpus: Vec<VcpuFd>, context: Context) {
    let Machine { shared, mailbox, devices, input, ending, memory } = machine;
    let mut running = Vec::with_capacity(vcpus.len());
    let mut event_loop = None;
    let started = Loop::new(&mailbox, devices, input).and_then(|made| {
        event_loop = Some(made);
        start_vcpus(vcpus, context, &mut running)
    });
    let reason = match (&mut event_loop, started) {
        (Some(event_loop), Ok(())) => {
            shared.stamp("vcpus started");
            event_loop.until_end(&mailbox.requests)
        }
        (_, Err(error)) => ExitReason::Failed(format!("the machine's threads cannot be set up: {error}")),
        (None, Ok(())) => ExitReason::Failed("the event loop is missing".to_owned()),
    };

    ending.store(true, Ordering::Release);
    running.iter().for_each(Vcpu::kick);
    // A vCPU that waits for an answer gets none from here on: its request is dropped with the mailbox.
    drop(mailbox);
    running.into_iter().for_each(Vcpu::join);
    if let Some(event_loop) = &mut event_loop {
        event_loop.reset_devices();
    }
    drop(event_loop);
    drop(memory);
    shared.ended(reason);
}

fn start_vcpus(vcpus: Vec<VcpuFd>, context: Context, running: &mut Vec<Vcpu>) -> io::Result<()> {
    for (id, vcpu) in vcpus.into_iter().enumerate() {
        running.push(Vcpu::start(id, vcpu, context.clone())?);
    }
    Ok(())
}

struct Loop {
    manager: EventManager<Subscriber>,
    devices: Vec<SubscriberId>,
}

impl Loop {
    fn new(mailbox: &Mailbox, devices: Vec<DeviceWorker>, input: Option<Input>) -> io::Result<Self> {
        let mut manager = EventManager::new_with_capacity(EVENTS).map_err(into_io)?;
        manager.add_subscriber(Subscriber::Mailbox(Arc::clone(&mailbox.wake)));
        if let Some(input) = input {
            manager.add_subscriber(Subscriber::Input(input));
        }
        let devices = devices.into_iter().map(|device| manager.add_subscriber(Subscriber::Device(device))).collect();
        Ok(Self { manager, devices })
    }

    /// Works until something ends the machine.
    fn until_end(&mut self, requests: &Receiver<Request>) -> ExitReason {
        loop {
            if let Err(error) = self.manager.run() {
                let interrupted = matches!(&error, event_manager::Error::Epoll(errno) if errno.errno() == libc::EINTR);
                if !interrupted {
                    return ExitReason::Failed(format!("waiting for events failed: {error}"));
                }
            }
            while let Ok(request) = requests.try_recv() {
                match request {
                    Request::End(reason) => return reason,
                    Request::Device { number, request } => {
                        self.with_device(number, |worker, events| worker.handle_request(request, events));
                    }
                }
            }
        }
    }

    /// Calls `action` with a device and its view of the loop.
    fn with_device(&mut self, number: usize, action: impl FnOnce(&mut DeviceWorker, &mut dyn EventRegistry)) {
        let Some(id) = self.devices.get(number).copied() else { return };
        // The loop lends either the subscriber or its registrations, so the device leaves the loop for the call.
        let Ok(subscriber) = self.manager.subscriber_mut(id) else { return };
        let mut taken = std::mem::replace(subscriber, Subscriber::Away);
        if let (Subscriber::Device(worker), Ok(mut ops)) = (&mut taken, self.manager.event_ops(id)) {
            action(worker, &mut Registry(&mut ops));
        }
        if let Ok(subscriber) = self.manager.subscriber_mut(id) {
            *subscriber = taken;
        }
    }

    fn reset_devices(&mut self) {
        for number in 0..self.devices.len() {
            self.with_device(number, |worker, events| worker.device.reset(events));
        }
    }
}
