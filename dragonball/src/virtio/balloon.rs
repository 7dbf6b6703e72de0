//! The balloon (virtio 1.2, §5.5): the guest gives memory back that it does not need.
//!
//! It does so in two ways. Asked by the host ([`BalloonControl::set_target`]), it takes pages out of its own use and puts
//! them into the balloon; when it runs out of memory, it takes some back by itself. And unasked, it reports pages that
//! have been free for a while (`VIRTIO_BALLOON_F_REPORTING`), in pieces of 2 MiB and more, which it uses again without
//! asking. Both go through [`DmaListeners::discard`], which leaves the memory where it is while a device could reach it.
//!
//! The guest also says how it uses its memory, when the host asks: there is no timer in this.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use super::buffers::Request;
use super::device::{
    Activation, DeviceError, DeviceKind, EventRegistry, GuestMemory, Outcome, SavedState, VirtioDevice,
};
use super::ring::{RING_FEATURES, Ring, RingPosition, TURN};
use super::state;
use crate::memory::layout::Range;
use crate::memory::listener::{Discard, DmaListeners};
use crate::memory::range_of;

mod control;
mod pages;
mod stats;

pub use control::{BalloonControl, BalloonState};
pub use stats::BalloonStats;

/// Bytes of the pages that a balloon counts in, whatever the guest's own pages are (virtio 1.2, §5.5.6).
const PAGE: u64 = 4096;
/// `VIRTIO_BALLOON_F_STATS_VQ`.
const STATS: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_REPORTING`.
const REPORTING: u64 = 1 << 5;
/// Inflate, deflate, statistics, free page hinting (which is not offered) and free page reporting.
const QUEUE_SIZES: [u16; 5] = [128, 128, 16, 64, 64];
const STATE_VERSION: u16 = 1;
/// The token of the host's wishes; queues have their indices as tokens.
const CHANGED: u32 = 16;
/// Where the driver writes `virtio_balloon_config.actual`.
const ACTUAL: std::ops::Range<usize> = 4..8;

/// What a queue is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// What queue `index` is for, with these `features` agreed on.
///
/// The specification numbers the queues whether or not they are offered; Linux before 6.11 leaves out those that are not
/// and moves the later ones up. With free page hinting never offered, each number still has one meaning.
fn role(index: u16, features: u64) -> Option<Role> {
    let agreed = |feature: u64, role| (features & feature != 0).then_some(role);
    match index {
        0 => Some(Role::Inflate),
        1 => Some(Role::Deflate),
        2 => agreed(STATS, Role::Stats).or_else(|| agreed(REPORTING, Role::Reporting)),
        3 | 4 => agreed(REPORTING, Role::Reporting),
        _ => None,
    }
}

/// A balloon.
pub struct Balloon {
    listeners: DmaListeners,
    control: BalloonControl,
    /// The target that the driver was last told.
    told: u64,
    life: Life,
}

enum Life {
    Idle(Resume),
    Active(Work),
}

/// Where a restored device goes on.
#[derive(Default, Deserialize, Serialize)]
struct Resume {
    rings: Vec<(u16, RingPosition)>,
    /// The chain in the statistics queue that the device keeps until the host asks.
    stats: Option<u16>,
}

struct Work {
    memory: GuestMemory,
    rings: Vec<(u16, Role, Ring)>,
    stats: Option<u16>,
}

#[derive(Deserialize, Serialize)]
struct State {
    target: u64,
    actual: u64,
    resume: Resume,
}

impl Balloon {
    /// A balloon for at most `max` bytes of the guest's memory, which goes back by way of `listeners`.
    ///
    /// # Errors
    /// When there are no file descriptors left.
    pub(crate) fn new(listeners: DmaListeners, max: u64) -> io::Result<Self> {
        // The configuration counts pages in 32 bits.
        let max = max.min(u64::from(u32::MAX) * PAGE);
        let control = BalloonControl::new(max)?;
        Ok(Self { listeners, control, told: 0, life: Life::Idle(Resume::default()) })
    }

    /// The host's handle on it.
    #[must_use]
    pub fn control(&self) -> BalloonControl {
        self.control.clone()
    }

    /// Serves queue `index`, at most one turn of it.
    fn serve(&mut self, index: u32) -> Result<(), DeviceError> {
        let Life::Active(Work { memory, rings, stats }) = &mut self.life else { return Ok(()) };
        let Some((_, role, ring)) = rings.iter_mut().find(|(number, ..)| u32::from(*number) == index) else {
            return Ok(());
        };
        ring.acknowledge_kick();
        for turn in 0.. {
            if turn == TURN {
                ring.call_again()?;
                break;
            }
            let Some(request) = ring.next(memory)? else { break };
            match role {
                Role::Inflate => inflate(&request, &self.listeners, &self.control)?,
                Role::Deflate => {}
                Role::Stats => {
                    note_stats(&request, &self.control);
                    // Kept until the host asks again. A driver that sends a second one gets the first one back.
                    if let Some(before) = stats.replace(request.head) {
                        ring.push_used(memory, before, 0)?;
                    }
                    continue;
                }
                Role::Reporting => report(&request, memory, &self.listeners, &self.control),
            }
            ring.push_used(memory, request.head, 0)?;
        }
        ring.signal_used(memory)?;
        self.ask_for_stats()
    }

    /// Gives the statistics buffer back to the driver, which fills it anew, if the host asked for that.
    fn ask_for_stats(&mut self) -> Result<(), DeviceError> {
        let Life::Active(Work { memory, rings, stats }) = &mut self.life else { return Ok(()) };
        let Some((_, _, ring)) = rings.iter_mut().find(|(_, role, _)| *role == Role::Stats) else { return Ok(()) };
        if stats.is_some()
            && self.control.stats_wanted.swap(false, Ordering::AcqRel)
            && let Some(head) = stats.take()
        {
            ring.push_used(memory, head, 0)?;
            ring.signal_used(memory)?;
        }
        Ok(())
    }

    fn watch(&self, work: &Work, events: &mut dyn EventRegistry) -> io::Result<()> {
        events.add(self.control.changed.as_raw_fd(), CHANGED, EventSet::IN)?;
        for (done, (index, _, ring)) in work.rings.iter().enumerate() {
            if let Err(error) = events.add(ring.kick().as_raw_fd(), u32::from(*index), EventSet::IN) {
                self.unwatch(&work.rings[..done], events);
                return Err(error);
            }
        }
        Ok(())
    }

    fn unwatch(&self, rings: &[(u16, Role, Ring)], events: &mut dyn EventRegistry) {
        let doorbells = rings.iter().map(|(_, _, ring)| ring.kick().as_raw_fd());
        for fd in doorbells.chain([self.control.changed.as_raw_fd()]) {
            if let Err(error) = events.remove(fd) {
                tracing::debug!(%error, "a descriptor of the balloon was not watched");
            }
        }
    }
}

/// Gives the pages of an inflate request back to the host.
fn inflate(request: &Request<'_>, listeners: &DmaListeners, control: &BalloonControl) -> Result<(), DeviceError> {
    let Some(runs) = pages::runs(&request.readable) else {
        return Err(DeviceError::Protocol(format!(
            "an inflate request has {} bytes; up to {} page numbers of 4 bytes are possible",
            request.readable.len(),
            pages::PAGES_MAX
        )));
    };
    let discarded = runs.into_iter().map(|run| discard_run(listeners, run)).sum();
    count(control, discarded);
    Ok(())
}

/// Discards a run of pages as a whole or, where that is impossible because it is not all of one region or not all there,
/// page by page. Returns the bytes that went back.
fn discard_run(listeners: &DmaListeners, run: Range) -> u64 {
    let discard = |range: Range| match listeners.discard(range) {
        Ok(Discard::Done) => Some(range.length),
        Ok(Discard::Inhibited) => Some(0),
        Err(error) => {
            tracing::debug!(%error, start = range.start, length = range.length, "memory of the balloon stays");
            None
        }
    };
    let by_page = || {
        (0..run.length / PAGE).filter_map(|page| discard(Range { start: run.start + page * PAGE, length: PAGE })).sum()
    };
    discard(run).unwrap_or_else(by_page)
}

/// Gives the free pages of a report back to the host.
fn report(request: &Request<'_>, memory: &GuestMemory, listeners: &DmaListeners, control: &BalloonControl) {
    let pieces = request.writable.range(0, request.writable.len()).filter_map(|slice| range_of(memory, &slice));
    let discarded = pieces.map(|range| discard_run(listeners, range)).sum();
    count(control, discarded);
}

fn count(control: &BalloonControl, discarded: u64) {
    control.state.update(|state| state.discarded = state.discarded.saturating_add(discarded));
}

fn note_stats(request: &Request<'_>, control: &BalloonControl) {
    let stats = BalloonStats::read(&request.readable);
    control.state.update(|state| {
        state.stats = stats;
        state.reports = state.reports.wrapping_add(1);
    });
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        RING_FEATURES | STATS | DEFLATE_ON_OOM | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_balloon_config` without what belongs to features that are not offered: pages wanted, pages had.
    fn config(&self) -> Vec<u8> {
        let state = self.control.state();
        let pages = |bytes: u64| u32::try_from(bytes / PAGE).unwrap_or(u32::MAX).to_le_bytes();
        [pages(state.target), pages(state.actual)].concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter().enumerate() {
            let at = start.saturating_add(index);
            if ACTUAL.contains(&at) {
                config[at] = *byte;
            }
        }
        let actual = config[ACTUAL].try_into().map_or(0, u32::from_le_bytes);
        self.control.state.update(|state| state.actual = u64::from(actual) * PAGE);
    }

    fn activate(&mut self, activation: Activation, events: &mut dyn EventRegistry) -> Result<(), DeviceError> {
        let Life::Idle(resume) = &self.life else {
            return Err(DeviceError::Protocol(String::from("it is active already")));
        };
        let Activation { memory, queues, features, interrupt } = activation;
        let mut rings = Vec::with_capacity(queues.len());
        for active in queues {
            let index = active.index;
            let Some(role) = role(index, features) else { continue };
            let mut ring = Ring::new(active, features, Arc::clone(&interrupt));
            if let Some((_, position)) = resume.rings.iter().find(|(number, _)| *number == index) {
                ring.resume(*position)?;
            }
            rings.push((index, role, ring));
        }
        if let Some(missing) = (0..2).find(|index| !rings.iter().any(|(number, ..)| number == index)) {
            return Err(DeviceError::MissingQueue(missing));
        }
        let work = Work { memory, rings, stats: resume.stats };
        self.watch(&work, events)
            .map_err(|source| DeviceError::Host { action: "watch the balloon's queues", source })?;
        self.life = Life::Active(work);
        self.control.state.update(|state| state.driver = true);
        Ok(())
    }

    fn handle_event(&mut self, token: u32, _: EventSet, _: &mut dyn EventRegistry) -> Result<Outcome, DeviceError> {
        if token != CHANGED {
            return self.serve(token).map(|()| Outcome::Done);
        }
        // Nothing to read is as good as read.
        let _ = self.control.changed.read();
        self.ask_for_stats()?;
        let target = self.control.state().target;
        let told = std::mem::replace(&mut self.told, target);
        Ok(if told == target { Outcome::Done } else { Outcome::ConfigChanged })
    }

    fn reset(&mut self, events: &mut dyn EventRegistry) {
        if let Life::Active(work) = std::mem::replace(&mut self.life, Life::Idle(Resume::default())) {
            self.unwatch(&work.rings, events);
        }
        self.control.state.update(|state| (state.driver, state.actual) = (false, 0));
    }

    fn save(&mut self) -> Result<SavedState, DeviceError> {
        let resume = match &self.life {
            Life::Idle(resume) => Resume { rings: resume.rings.clone(), stats: resume.stats },
            Life::Active(work) => Resume {
                rings: work.rings.iter().map(|(index, _, ring)| (*index, ring.position())).collect(),
                stats: work.stats,
            },
        };
        let BalloonState { target, actual, .. } = self.control.state();
        state::encode(STATE_VERSION, &State { target, actual, resume })
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), DeviceError> {
        let State { target, actual, resume } = state::decode(STATE_VERSION, saved)?;
        let max = self.control.state().max;
        let sizes_fit = [target, actual].iter().all(|size| size.is_multiple_of(PAGE)) && target <= max;
        if !sizes_fit || resume.rings.len() > QUEUE_SIZES.len() {
            return Err(DeviceError::InvalidState(format!(
                "a balloon of {actual:#x} bytes that shall have {target:#x}, of at most {max:#x} in whole pages, with {} queues",
                resume.rings.len()
            )));
        }
        if matches!(self.life, Life::Active(_)) {
            return Err(DeviceError::InvalidState(String::from("the device is in use; reset it first")));
        }
        self.life = Life::Idle(resume);
        self.told = target;
        self.control.state.update(|state| (state.target, state.actual) = (target, actual));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
