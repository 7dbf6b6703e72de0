//! Devices and vCPUs that come and go while the machine runs.
//!
//! Each change is a small state machine on the `vmm` thread: a request begins it, what the guest does or a deadline ends
//! it, and nothing waits in between.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memory_types::Mtrrs;

use super::devices::{Devices, PreparedDevice, range_info};
use super::event_loop::Loop;
use super::memory_types::Inquiry;
use super::vcpus::Vcpus;
use crate::config::MachineConfig;
use crate::control::{DeviceNumber, Request, VcpuEvent};
use crate::manage::{AttachTimes, Change, ChangeError, DeviceInfo, MachineInfo, Presence, Reply, VcpuCount};
use crate::memory::layout::{self, MemoryKind, Range};
use crate::platform::hotplug::{CpuEvent, HotPlugRegisters, Told};
use crate::threads;
use crate::vcpu::mtrr::VcpuMemoryTypes;
use crate::vm::Shared;

/// The part of a machine that changes while it runs.
pub(crate) struct HotPlug {
    pub(super) vcpus: Vcpus,
    devices: Devices,
    /// Missing where the machine was started without hot-plug.
    registers: Option<Arc<HotPlugRegisters>>,
    shared: Arc<Shared>,
    /// Where memory may come.
    pluggable: Option<Range>,
    /// What is under way, by slot.
    moves: BTreeMap<u8, Move>,
    resize: Option<Resize>,
    /// Those that stop and reset devices of the host which have left.
    retiring: Vec<JoinHandle<()>>,
    /// How many vCPUs were last asked for.
    vcpus_asked: u8,
    pause: Option<Pause>,
    inquiry: Option<Inquiry>,
}

/// A device on its way.
struct Move {
    begin: Instant,
    given: Duration,
    /// When the guest found a device of the host.
    found: Option<Instant>,
    direction: Direction,
}

impl Move {
    fn new(given: Duration, direction: Direction) -> Self {
        Self { begin: Instant::now(), given, found: None, direction }
    }

    fn end(&self) -> Instant {
        self.begin + self.given
    }
}

/// Devices of the host that were stopped and reset.
pub(crate) struct Retired {
    /// What of the PCI windows is free.
    ranges: Vec<Range>,
    /// Who waits for that.
    reply: Option<Reply<()>>,
}

enum Direction {
    In(Reply<DeviceInfo>),
    Out(Reply<()>),
}

/// vCPUs on their way.
struct Resize {
    end: Instant,
    /// Those that start when the first vCPU has told the memory types that they shall have.
    starting: Vec<u8>,
    /// Those of which the guest has not told that they came, or that have not gone.
    awaited: BTreeMap<u8, CpuEvent>,
    reply: Reply<VcpuCount>,
}

/// vCPUs that shall stand still and do not yet.
struct Pause {
    awaited: BTreeSet<u8>,
    reply: Reply<()>,
}

impl HotPlug {
    pub(super) fn new(
        config: &MachineConfig,
        devices: Devices,
        vcpus: Vcpus,
        registers: Option<Arc<HotPlugRegisters>>,
        shared: Arc<Shared>,
    ) -> Self {
        let pluggable = layout::pluggable(config.memory, config.memory_max());
        let vcpus_asked = config.vcpus;
        Self {
            vcpus,
            devices,
            registers,
            shared,
            pluggable,
            moves: BTreeMap::new(),
            resize: None,
            retiring: Vec::new(),
            vcpus_asked,
            pause: None,
            inquiry: None,
        }
    }

    /// Begins a change.
    pub(super) fn change(&mut self, event_loop: &mut Loop, change: Change) {
        match change {
            Change::Add { name, device, deadline, reply } => {
                self.add(event_loop, (name, device), deadline, reply);
            }
            Change::Remove { name, deadline, reply } => self.remove(&name, deadline, reply),
            Change::Vcpus { count, deadline, reply } => self.resize(count, deadline, reply),
            Change::PowerButton(reply) => reply.send(self.pluggable().map(|registers| registers.press_power_button())),
            Change::Pause { paused, reply } => self.pause(paused, reply),
            Change::Info(reply) => reply.send(Ok(self.info())),
            Change::MemoryTypes(reply) => self.ask_memory_types(reply),
        }
    }

    fn pluggable(&self) -> Result<Arc<HotPlugRegisters>, ChangeError> {
        self.registers.clone().ok_or(ChangeError::NotPluggable)
    }

    fn add(
        &mut self,
        event_loop: &mut Loop,
        (name, device): (Option<String>, PreparedDevice),
        given: Duration,
        reply: Reply<DeviceInfo>,
    ) {
        let added = self.pluggable().and_then(|registers| Ok((registers, self.devices.add(name, device)?)));
        match added {
            Ok((registers, (slot, number, worker))) => {
                event_loop.add_worker(number, worker);
                self.set_presence(slot, Presence::Announced);
                self.moves.insert(slot, Move::new(given, Direction::In(reply)));
                registers.announce(slot);
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    fn remove(&mut self, name: &str, given: Duration, reply: Reply<()>) {
        match self.removable(name) {
            Ok((registers, slot)) => {
                self.set_presence(slot, Presence::Leaving);
                self.moves.insert(slot, Move::new(given, Direction::Out(reply)));
                registers.ask_back(slot);
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    fn removable(&mut self, name: &str) -> Result<(Arc<HotPlugRegisters>, u8), ChangeError> {
        let registers = self.pluggable()?;
        let slot = self.devices.find(name).ok_or_else(|| ChangeError::NotFound(name.to_owned()))?;
        if self.devices.at(slot).is_some_and(|attached| attached.fixed) {
            return Err(ChangeError::Fixed(name.to_owned()));
        }
        if self.moves.contains_key(&slot) {
            return Err(ChangeError::Busy(format!("the device {name:?}")));
        }
        Ok((registers, slot))
    }

    fn set_presence(&mut self, slot: u8, presence: Presence) {
        if let Some(attached) = self.devices.at(slot) {
            attached.presence = presence;
        }
    }

    /// A driver of the guest has taken a device.
    pub(super) fn activated(&mut self, number: DeviceNumber) {
        if let Some(slot) = self.devices.find_number(number) {
            self.arrived(slot);
        }
    }

    /// The guest has begun to set a device of the host up.
    pub(super) fn found(&mut self, number: DeviceNumber) {
        let slot = self.devices.find_number(number);
        if let Some(moving) = slot.and_then(|slot| self.moves.get_mut(&slot)) {
            moving.found = Some(Instant::now());
        }
    }

    /// The guest is through with a new device. Whether one of the host has a driver then is the guest's affair: one may be
    /// loaded later. A virtio device without a driver is waited for, because none can work without.
    fn settled(&mut self, slot: u8) {
        if self.devices.prepared(slot).is_some() {
            self.arrived(slot);
        }
    }

    /// Ends the addition of a device well, if one is under way.
    fn arrived(&mut self, slot: u8) {
        let Some(Move { direction: Direction::In(_), .. }) = self.moves.get(&slot) else { return };
        let Some(Move { begin, found, direction: Direction::In(reply), .. }) = self.moves.remove(&slot) else { return };
        self.set_presence(slot, Presence::Present);
        if let (Some(prepared), Some(found)) = (self.devices.prepared(slot), found)
            && let Some(attached) = self.devices.at(slot)
        {
            attached.times = Some(AttachTimes {
                open: microseconds(prepared.open),
                dma_map: microseconds(prepared.dma_map),
                bar_map: microseconds(prepared.bar_map),
                announce: microseconds(found - begin),
                driver: microseconds(found.elapsed()),
            });
        }
        if let Some(info) = self.devices.info_of(slot) {
            reply.send(Ok(info));
        }
    }

    /// The guest told something by its registers.
    pub(super) fn told(&mut self, event_loop: &mut Loop, told: Told) {
        match told {
            Told::PciEjected(slots) => slots_of(slots).for_each(|slot| self.ejected(event_loop, slot)),
            Told::PciSettled(slots) => slots_of(slots).for_each(|slot| self.settled(slot)),
            // The first vCPU has no method to let it go by.
            Told::CpuEjected(0) => {}
            Told::CpuEjected(id) => self.take_vcpu(id),
            Told::CpuReport { id, event, done } => self.reported(id, event, done),
        }
    }

    /// The guest has let a device go, asked or not: like a person who pulls a card, it may.
    fn ejected(&mut self, event_loop: &mut Loop, slot: u8) {
        if self.devices.at(slot).is_none_or(|attached| attached.fixed) {
            return;
        }
        let reply = match self.moves.remove(&slot).map(|done| done.direction) {
            Some(Direction::Out(reply)) => Some(reply),
            Some(Direction::In(reply)) => {
                reply.send(Err(ChangeError::Declined));
                None
            }
            None => {
                tracing::info!(slot, "the guest let a device go");
                None
            }
        };
        self.take_out(event_loop, slot, reply);
    }

    /// Empties a slot, and answers `reply` when nothing of its device is left.
    fn take_out(&mut self, event_loop: &mut Loop, slot: u8, reply: Option<Reply<()>>) {
        if let Some(registers) = &self.registers {
            registers.withdraw(slot);
            registers.keep(slot);
        }
        let detached = self.devices.detach(slot);
        if let Some(number) = detached.worker {
            event_loop.remove_worker(number);
        }
        let Some(leaving) = detached.leaving else {
            reply.into_iter().for_each(|reply| reply.send(Ok(())));
            return;
        };
        let control = self.devices.control().clone();
        // The reset of a device may take seconds; the machine goes on meanwhile.
        let retire = move || control.send(Request::Retired(Retired { ranges: leaving.retire(), reply }));
        self.retiring.retain(|thread| !thread.is_finished());
        self.retiring.extend(threads::aside("vfio-retire", retire));
    }

    /// Devices of the host have been reset: their place in the windows is free.
    pub(super) fn retired(&mut self, Retired { ranges, reply }: Retired) {
        self.devices.free(ranges);
        reply.into_iter().for_each(|reply| reply.send(Ok(())));
    }

    /// Ends what the guest had its time for, and sets the timer for the next.
    pub(super) fn expire(&mut self, event_loop: &mut Loop) {
        if self.moves.is_empty() && self.resize.is_none() {
            return event_loop.wake_at(None);
        }
        let now = Instant::now();
        let due: Vec<u8> = self.moves.iter().filter(|(_, moving)| moving.end() <= now).map(|(slot, _)| *slot).collect();
        for slot in due {
            // A guest that does not say when it is through, but has set a device of the host up, has it.
            if self.moves.get(&slot).is_some_and(|moving| moving.found.is_some()) {
                self.arrived(slot);
            }
            if let Some(moving) = self.moves.remove(&slot) {
                self.give_up(event_loop, slot, moving);
            }
        }
        if self.resize.as_ref().is_some_and(|resize| resize.end <= now) {
            self.give_up_resize();
        }
        let ends = self.moves.values().map(Move::end).chain(self.resize.as_ref().map(|resize| resize.end));
        event_loop.wake_at(ends.min());
    }

    fn give_up(&mut self, event_loop: &mut Loop, slot: u8, moving: Move) {
        let Some(registers) = self.registers.clone() else { return };
        match moving.direction {
            Direction::In(reply) if registers.withdraw(slot) => {
                self.take_out(event_loop, slot, None);
                reply.send(Err(ChangeError::Unseen(moving.given)));
            }
            Direction::In(reply) => {
                // The guest may be at it: the slot is free when it has let go.
                self.set_presence(slot, Presence::Leaving);
                registers.ask_back(slot);
                reply.send(Err(ChangeError::NoDriver(moving.given)));
            }
            Direction::Out(reply) => {
                registers.keep(slot);
                self.set_presence(slot, Presence::Present);
                reply.send(Err(ChangeError::InUse(moving.given)));
            }
        }
    }

    fn resize(&mut self, count: u8, given: Duration, reply: Reply<VcpuCount>) {
        let registers = match self.resizable(count) {
            Ok(registers) => registers,
            Err(error) => return reply.send(Err(error)),
        };
        self.vcpus_asked = count;
        let (running, free) = (self.vcpus.running(), self.vcpus.free());
        let (wanted, present) = (usize::from(count), running.len());
        let mut awaited = BTreeMap::new();
        let starting: Vec<u8> = free.into_iter().take(wanted.saturating_sub(present)).collect();
        if !starting.is_empty() {
            // The first vCPU is never taken away.
            self.vcpus.ask_memory_types(0);
        }
        // The first vCPU is never among them: `count` is at least 1.
        for id in running.into_iter().rev().take(present.saturating_sub(wanted)) {
            registers.ask_back_cpu(id);
            awaited.insert(id, CpuEvent::Go);
        }
        self.resize = Some(Resize { end: Instant::now() + given, starting, awaited, reply });
        self.settle_resize();
    }

    /// Starts those that waited for the first vCPU's memory types.
    fn start_vcpus(&mut self, mtrrs: &Mtrrs) {
        let (Some(resize), Some(registers)) = (&mut self.resize, &self.registers) else { return };
        for id in std::mem::take(&mut resize.starting) {
            if let Err(error) = self.vcpus.start(id, mtrrs) {
                tracing::warn!(%error, id, "a vCPU cannot be started");
                break;
            }
            registers.add_cpu(id);
            resize.awaited.insert(id, CpuEvent::Came);
        }
        self.settle_resize();
    }

    fn resizable(&self, count: u8) -> Result<Arc<HotPlugRegisters>, ChangeError> {
        let (registers, max) = (self.pluggable()?, self.vcpus.max());
        if count == 0 || count > max {
            return Err(ChangeError::Vcpus { given: count, max });
        }
        if self.resize.is_some() {
            return Err(ChangeError::Busy("the number of vCPUs".to_owned()));
        }
        Ok(registers)
    }

    /// The guest told how it got on with a vCPU.
    fn reported(&mut self, id: u8, event: CpuEvent, done: bool) {
        match (event, done) {
            (CpuEvent::Came, true) | (CpuEvent::Go, false) => self.no_longer_await(id),
            (CpuEvent::Came, false) => self.take_vcpu(id),
            // It has been taken at the guest's write to the eject register, before this.
            (CpuEvent::Go, true) => {}
        }
    }

    /// Stops a vCPU that the guest does not use.
    fn take_vcpu(&mut self, id: u8) {
        if let Some(registers) = &self.registers {
            registers.remove_cpu(id);
        }
        self.vcpus.stop(id);
    }

    /// A vCPU did as it was told.
    pub(super) fn vcpu_event(&mut self, id: u8, event: VcpuEvent) {
        match event {
            VcpuEvent::MemoryTypes(read) => return self.memory_types_read(id, read.map(|types| *types)),
            VcpuEvent::Paused => {}
            VcpuEvent::Stopped => {
                self.vcpus.stopped(id);
                self.no_longer_await(id);
                self.inquiry = self.inquiry.take().and_then(|inquiry| inquiry.gone(id));
            }
        }
        if let Some(pause) = &mut self.pause {
            pause.awaited.remove(&id);
        }
        self.settle_pause();
    }

    fn ask_memory_types(&mut self, reply: Reply<BTreeMap<u8, VcpuMemoryTypes>>) {
        if self.inquiry.is_some() {
            return reply.send(Err(ChangeError::Busy("the question for memory types".to_owned())));
        }
        self.inquiry = Some(Inquiry::start(&self.vcpus, reply));
    }

    /// A vCPU has told its memory types, to whoever asked.
    fn memory_types_read(&mut self, id: u8, read: io::Result<VcpuMemoryTypes>) {
        if id == 0 {
            let mtrrs = read.as_ref().map_or_else(
                |error| {
                    tracing::warn!(%error, "the first vCPU's memory types cannot be read: new ones start as it did");
                    Mtrrs::BOOT
                },
                |types| types.mtrrs,
            );
            self.start_vcpus(&mtrrs);
        }
        self.inquiry = self.inquiry.take().and_then(|inquiry| inquiry.answered(id, read));
    }

    fn no_longer_await(&mut self, id: u8) {
        if let Some(resize) = &mut self.resize {
            resize.awaited.remove(&id);
        }
        self.settle_resize();
    }

    fn settle_resize(&mut self) {
        if let Some(resize) = self.resize.take_if(|resize| resize.starting.is_empty() && resize.awaited.is_empty()) {
            resize.reply.send(Ok(self.vcpu_count()));
        }
    }

    /// vCPUs that the guest has not heard of go again; those that it was to let go stay.
    fn give_up_resize(&mut self) {
        let (Some(resize), Some(registers)) = (self.resize.take(), self.registers.clone()) else { return };
        for (id, event) in &resize.awaited {
            if registers.withdraw_cpu(*id) && *event == CpuEvent::Came {
                self.take_vcpu(*id);
            }
        }
        resize.reply.send(Ok(self.vcpu_count()));
    }

    fn vcpu_count(&self) -> VcpuCount {
        VcpuCount { asked: self.vcpus_asked, present: self.vcpus.present(), max: self.vcpus.max() }
    }

    fn pause(&mut self, paused: bool, reply: Reply<()>) {
        if self.pause.is_some() {
            return reply.send(Err(ChangeError::Busy("the machine's pause".to_owned())));
        }
        let awaited = if paused { self.vcpus.running().into_iter().collect() } else { BTreeSet::new() };
        self.vcpus.pause(paused);
        self.pause = Some(Pause { awaited, reply });
        self.settle_pause();
    }

    fn settle_pause(&mut self) {
        if let Some(pause) = self.pause.take_if(|pause| pause.awaited.is_empty()) {
            pause.reply.send(Ok(()));
        }
    }

    fn info(&self) -> MachineInfo {
        let memory = self.shared.memory_size();
        let ram = layout::memory_map(memory.boot)
            .into_iter()
            .map(|(range, kind)| range_info(range, if kind == MemoryKind::Ram { "RAM" } else { "reserved" }));
        let registers = self.registers.as_ref().map(|_| range_info(layout::HOT_PLUG, "hot-plug registers"));
        let mut map: Vec<_> = ram.chain(registers).collect();
        map.extend(self.pluggable.map(|range| range_info(range, "room for more RAM")));
        map.push(range_info(layout::PCI_32, "32-bit PCI window"));
        map.push(range_info(layout::IOAPIC, "IOAPIC"));
        map.extend(self.devices.window_64().map(|range| range_info(range, "64-bit PCI window")));
        map.sort_by_key(|range| range.start);
        MachineInfo {
            vcpus: self.vcpu_count(),
            memory,
            balloon: self.shared.balloon_size(),
            hot_plug: self.registers.is_some(),
            map,
            devices: self.devices.info(),
        }
    }
}

impl Drop for HotPlug {
    /// A device that has left is free for others when the machine has ended.
    fn drop(&mut self) {
        for thread in self.retiring.drain(..) {
            // What it was to do is done either way.
            let _ = thread.join();
        }
    }
}

/// The slots whose bits are set.
fn slots_of(bits: u32) -> impl Iterator<Item = u8> {
    (0..32).filter(move |slot| bits & 1 << slot != 0)
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
