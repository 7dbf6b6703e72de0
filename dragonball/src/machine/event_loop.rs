//! The `vmm` thread: it owns all devices, works off their events and the requests of vCPUs and the machine's owner, and
//! ends the machine.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::devices::Worker;
use super::hot_plug::HotPlug;
use super::input::Input;
use super::worker::{DeviceWorker, Effect};
use crate::control::{DeviceNumber, Mailbox, Request};
use crate::irq::pin::PinSource;
use crate::virtio::device::EventRegistry;
use crate::vm::{ExitReason, Shared};

/// The most events taken from the kernel at once.
const EVENTS: usize = 32;

/// What the loop gives events to.
enum Subscriber {
    Device(DeviceWorker),
    /// The pins of devices of the host.
    Pins(Vec<Arc<PinSource>>),
    /// The place of a device that is being called with a request.
    Away,
    Mailbox(Arc<EventFd>),
    Input(Input),
    /// Wakes the loop when a guest has had its time.
    Deadline(TimerFd),
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
            Self::Pins(pins) => {
                let pin = usize::try_from(events.data()).ok().and_then(|index| pins.get(index));
                pin.into_iter().for_each(|pin| pin.take_event());
            }
            Self::Mailbox(wake) => {
                // Only resets the counter: the requests are worked off after every round of events.
                let _ = wake.read();
            }
            Self::Input(input) => {
                if input.forward() == super::input::Flow::Ended {
                    let _ = ops.remove(events);
                }
            }
            Self::Deadline(timer) => {
                // Only resets the counter: deadlines are looked at after every round of events.
                let _ = timer.wait();
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let fd = match self {
            Self::Device(_) | Self::Away => return,
            Self::Pins(pins) => return watch_pins(pins, ops),
            Self::Mailbox(wake) => wake.as_raw_fd(),
            Self::Input(input) => input.as_raw_fd(),
            Self::Deadline(timer) => timer.as_raw_fd(),
        };
        if let Err(error) = ops.add(watched(fd, 0, EventSet::IN)) {
            // epoll does not take regular files and `/dev/null` as input: there is nobody to type anything then.
            tracing::debug!(%error, "an event source is not watched");
        }
    }
}

fn watch_pins(pins: &[Arc<PinSource>], ops: &mut EventOps<'_>) {
    for (token, pin) in (0..).zip(pins) {
        if let Err(error) = ops.add(watched(pin.as_raw_fd(), token, EventSet::IN)) {
            tracing::warn!(%error, "the interrupt pin of a device is not watched: its driver must poll");
        }
    }
}

/// Everything that the `vmm` thread owns.
pub(crate) struct Machine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) mailbox: Mailbox,
    pub(crate) workers: Vec<(DeviceNumber, Worker)>,
    pub(crate) hot_plug: HotPlug,
    pub(crate) input: Option<Input>,
    /// Held until the vCPUs have ended.
    pub(crate) memory: crate::memory::GuestRam,
}

/// The body of the `vmm` thread: lets the vCPUs run and returns when the machine has ended.
pub(crate) fn run(machine: Machine) {
    let Machine { shared, mailbox, workers, mut hot_plug, input, memory } = machine;
    let started = Loop::new(&mailbox, workers, input).and_then(|made| {
        hot_plug.vcpus.start_all()?;
        Ok(made)
    });
    let (reason, event_loop) = match started {
        Ok(mut event_loop) => {
            shared.stamp("vcpus started");
            (event_loop.until_end(&mailbox.requests, &mut hot_plug), Some(event_loop))
        }
        Err(error) => (ExitReason::Failed(format!("the machine's threads cannot be set up: {error}")), None),
    };

    hot_plug.vcpus.stop_all();
    // A vCPU that waits for an answer gets none from here on: its request is dropped with the mailbox.
    drop(mailbox);
    hot_plug.vcpus.join_all();
    if let Some(mut event_loop) = event_loop {
        event_loop.stop_devices();
    }
    drop(hot_plug);
    drop(memory);
    shared.ended(reason);
}

/// The loop and what it gives events to.
pub(super) struct Loop {
    manager: EventManager<Subscriber>,
    workers: BTreeMap<DeviceNumber, SubscriberId>,
    deadline: SubscriberId,
    /// When the loop is woken, if nothing else does it before.
    wakes_at: Option<Instant>,
}

impl Loop {
    fn new(mailbox: &Mailbox, workers: Vec<(DeviceNumber, Worker)>, input: Option<Input>) -> io::Result<Self> {
        let mut manager = EventManager::new_with_capacity(EVENTS).map_err(into_io)?;
        manager.add_subscriber(Subscriber::Mailbox(Arc::clone(&mailbox.wake)));
        if let Some(input) = input {
            manager.add_subscriber(Subscriber::Input(input));
        }
        let deadline = manager.add_subscriber(Subscriber::Deadline(TimerFd::new()?));
        let mut made = Self { manager, workers: BTreeMap::new(), deadline, wakes_at: None };
        for (number, worker) in workers {
            made.add_worker(number, worker);
        }
        Ok(made)
    }

    /// Works until something ends the machine.
    fn until_end(&mut self, requests: &Receiver<Request>, hot_plug: &mut HotPlug) -> ExitReason {
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
                        let effect = self.with_worker(number, |worker, events| worker.handle_request(request, events));
                        if effect == Some(Effect::Activated) {
                            hot_plug.activated(number);
                        }
                    }
                    Request::Change(change) => hot_plug.change(self, change),
                    Request::Found(number) => hot_plug.found(number),
                    Request::Retired(retired) => hot_plug.retired(retired),
                    Request::Told { told, done } => {
                        hot_plug.told(self, told);
                        drop(done);
                    }
                    Request::Vcpu { id, event } => hot_plug.vcpu_event(id, event),
                }
            }
            hot_plug.expire(self);
        }
    }

    /// Gives a device to the loop.
    pub(super) fn add_worker(&mut self, number: DeviceNumber, worker: Worker) {
        let id = self.manager.add_subscriber(match worker {
            Worker::Device(worker) => Subscriber::Device(worker),
            Worker::Pins(pins) => Subscriber::Pins(pins),
        });
        self.workers.insert(number, id);
    }

    /// Takes a device from the loop, its rings and its events, and drops it.
    pub(super) fn remove_worker(&mut self, number: DeviceNumber) {
        self.with_worker(number, DeviceWorker::stop);
        if let Some(id) = self.workers.remove(&number) {
            // It is known: it was added and not removed since.
            drop(self.manager.remove_subscriber(id));
        }
    }

    /// Wakes the loop at `deadline`, or no longer.
    pub(super) fn wake_at(&mut self, deadline: Option<Instant>) {
        // Asked for after every round of events: hardly ever another one.
        if self.wakes_at == deadline && deadline.is_none_or(|deadline| deadline > Instant::now()) {
            return;
        }
        self.wakes_at = deadline;
        let Ok(Subscriber::Deadline(timer)) = self.manager.subscriber_mut(self.deadline) else { return };
        let result = match deadline {
            // A timer of 0 would be none.
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                timer.reset(left.max(std::time::Duration::from_nanos(1)), None)
            }
            None => timer.clear(),
        };
        if let Err(error) = result {
            tracing::warn!(%error, "a deadline cannot be set");
        }
    }

    /// Calls `action` with a device and its view of the loop; nothing when there is no such device.
    fn with_worker<T>(
        &mut self,
        number: DeviceNumber,
        action: impl FnOnce(&mut DeviceWorker, &mut dyn EventRegistry) -> T,
    ) -> Option<T> {
        let id = self.workers.get(&number).copied()?;
        // The loop lends either the subscriber or its registrations, so the device leaves the loop for the call.
        let subscriber = self.manager.subscriber_mut(id).ok()?;
        let mut taken = std::mem::replace(subscriber, Subscriber::Away);
        let mut result = None;
        if let (Subscriber::Device(worker), Ok(mut ops)) = (&mut taken, self.manager.event_ops(id)) {
            result = Some(action(worker, &mut Registry(&mut ops)));
        }
        if let Ok(subscriber) = self.manager.subscriber_mut(id) {
            *subscriber = taken;
        }
        result
    }

    fn stop_devices(&mut self) {
        let numbers: Vec<_> = self.workers.keys().copied().collect();
        for number in numbers {
            self.with_worker(number, DeviceWorker::stop);
        }
    }
}
