//! Tests of plugging on a real VM, with listeners that look at what is there when they are told.

use std::sync::Mutex;

use vm_memory::Bytes;

use super::*;
use crate::memory::listener::{Discard, DmaListener};
use crate::memory::mapping::is_resident;
use crate::memory::{GuestRam, layout};

const BOOT: u64 = 32 << 20;

/// What a listener saw.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    Plugged { start: u64, accessible: bool, visible: bool },
    Unplugged { start: u64, kept: bool, visible: bool },
}

/// Notes what it is told; refuses the range that starts at `refused`.
struct Listener {
    memory: GuestMemory,
    refused: Option<u64>,
    events: Mutex<Vec<Event>>,
}

impl Listener {
    fn new(memory: &GuestMemory, refused: Option<u64>) -> Arc<Self> {
        Arc::new(Self { memory: Arc::clone(memory), refused, events: Mutex::default() })
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    fn visible(&self, range: Range) -> bool {
        self.memory.check_range(GuestAddress(range.start), 1)
    }
}

impl DmaListener for Listener {
    fn plugged(&self, range: Range, host: u64) -> io::Result<()> {
        if self.refused == Some(range.start) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let accessible = maps(host).starts_with("rw");
        let event = Event::Plugged { start: range.start, accessible, visible: self.visible(range) };
        self.events.lock().unwrap().push(event);
        Ok(())
    }

    fn unplugged(&self, range: Range) {
        let region = self.memory.find_region(GuestAddress(range.start)).unwrap();
        let host = region.mapping().as_ptr() as u64 + (range.start - region.start_addr().0);
        let event = Event::Unplugged { start: range.start, kept: is_resident(host), visible: self.visible(range) };
        self.events.lock().unwrap().push(event);
    }
}

/// The protection of the mapping at `address`, as `/proc/self/maps` writes it.
fn maps(address: u64) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let found = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        (parse(start)..parse(end)).contains(&address).then(|| rest[..4].to_owned())
    });
    found.unwrap()
}

struct Machine {
    memory: GuestMemory,
    space: AddressSpace,
    listeners: DmaListeners,
    plug: PluggableMemory,
}

fn machine(length: u64) -> Machine {
    let ram = GuestRam::with_pluggable(BOOT, layout::pluggable(BOOT, BOOT + length), false).unwrap();
    let space = AddressSpace::new(crate::kvm::create_vm(&crate::kvm::open().unwrap()).unwrap());
    space.add_ram(&ram).unwrap();
    let memory = Arc::clone(ram.memory());
    let listeners = DmaListeners::new(Arc::clone(&memory));
    let plug = PluggableMemory::new(&memory, Some(space.clone()), listeners.clone()).unwrap();
    Machine { memory, space, listeners, plug }
}

impl Machine {
    fn address(&self, block: u64) -> u64 {
        self.plug.range().start + block * BLOCK
    }

    /// The slots of pluggable memory that the guest sees.
    fn slots(&self) -> Vec<u64> {
        let start = self.plug.range().start;
        let ranges = self.space.ranges();
        let mut slots: Vec<u64> =
            ranges.iter().filter(|range| range.start >= start).map(|range| (range.start - start) / SLOT).collect();
        slots.sort_unstable();
        slots
    }

    fn host(&self, block: u64) -> u64 {
        self.plug.region().unwrap().mapping().as_ptr() as u64 + block * BLOCK
    }

    fn fill(&self, block: u64) {
        self.memory.write_slice(&vec![7; 2 << 20], GuestAddress(self.address(block))).unwrap();
    }
}

fn run(first: u64, count: u64) -> Run {
    Run { first, count }
}

#[test]
fn a_slot_is_shown_with_its_first_block_and_hidden_with_its_last() {
    let mut machine = machine(4 * SLOT);
    assert!(machine.slots().is_empty());
    machine.plug.plug(run(63, 2)).unwrap();
    machine.plug.plug(run(255, 1)).unwrap();
    assert_eq!(machine.slots(), [0, 1, 3]);
    machine.plug.unplug(run(63, 1)).unwrap();
    assert_eq!(machine.slots(), [1, 3]);
    machine.plug.unplug_all().unwrap();
    assert!(machine.slots().is_empty());
    assert_eq!(machine.plug.plugged(), 0);
}

#[test]
fn unplugged_memory_goes_back_to_the_host_and_comes_back_empty() {
    let mut machine = machine(SLOT);
    machine.plug.plug(run(0, 3)).unwrap();
    (0..3).for_each(|block| machine.fill(block));
    assert!(is_resident(machine.host(1)));
    machine.plug.unplug(run(1, 1)).unwrap();
    let resident = [0, 1, 2].map(|block| is_resident(machine.host(block)));
    assert_eq!(resident, [true, false, true]);
    assert!(maps(machine.host(1)).starts_with("---"), "nobody can fill it again");
    assert!(machine.memory.write_slice(&[1], GuestAddress(machine.address(1))).is_err());
    machine.plug.plug(run(1, 1)).unwrap();
    let mut seen = [1; 4096];
    machine.memory.read_slice(&mut seen, GuestAddress(machine.address(1))).unwrap();
    assert_eq!(seen, [0; 4096]);
}

#[test]
fn a_listener_hears_of_memory_before_it_is_used_and_of_its_loss_before_it_is_discarded() {
    let mut machine = machine(SLOT);
    let listener = Listener::new(&machine.memory, None);
    machine.plug.plug(run(0, 1)).unwrap();
    let attachment = machine.listeners.attach(Arc::clone(&listener) as _).unwrap();
    let (first, second) = (machine.address(0), machine.address(1));
    let told = [0, first].map(|start| Event::Plugged { start, accessible: true, visible: true });
    assert_eq!(listener.take(), told, "what is there already");

    machine.plug.plug(run(1, 1)).unwrap();
    assert_eq!(listener.take(), [Event::Plugged { start: second, accessible: true, visible: false }]);
    (0..2).for_each(|block| machine.fill(block));
    machine.plug.unplug(run(0, 2)).unwrap();
    let gone = [second, first].map(|start| Event::Unplugged { start, kept: true, visible: false });
    assert_eq!(listener.take(), gone);
    assert!(!is_resident(machine.host(0)));

    drop(attachment);
    machine.plug.plug(run(1, 1)).unwrap();
    assert!(listener.take().is_empty(), "a listener that was detached");
}

#[test]
fn a_listener_that_refuses_leaves_nothing_plugged_and_nobody_else_told() {
    let mut machine = machine(SLOT);
    let willing = Listener::new(&machine.memory, None);
    let refusing = Listener::new(&machine.memory, Some(machine.address(2)));
    let _attachments = [&willing, &refusing].map(|one| machine.listeners.attach(Arc::clone(one) as _).unwrap());
    willing.take();
    machine.plug.plug(run(0, 4)).unwrap_err();
    let starts: Vec<u64> = willing
        .take()
        .into_iter()
        .map(|event| match event {
            Event::Plugged { start, .. } | Event::Unplugged { start, .. } => (start - machine.address(0)) / BLOCK,
        })
        .collect();
    assert_eq!(starts, [0, 1, 2, 2, 1, 0]);
    assert!(machine.slots().is_empty() && maps(machine.host(0)).starts_with("---"));
    machine.plug.plug(run(0, 2)).unwrap();
}

#[test]
fn a_listener_that_refuses_what_is_there_is_not_attached() {
    let mut machine = machine(SLOT);
    machine.plug.plug(run(0, 2)).unwrap();
    let refusing = Listener::new(&machine.memory, Some(machine.address(1)));
    assert!(machine.listeners.attach(Arc::clone(&refusing) as _).is_err());
    let unplugged = refusing.take().into_iter().filter(|event| matches!(event, Event::Unplugged { .. })).count();
    assert_eq!(unplugged, 2, "boot memory and the first block");
    machine.plug.plug(run(2, 1)).unwrap();
    assert!(refusing.take().is_empty());
}

#[test]
fn nothing_is_discarded_while_a_listener_is_attached() {
    let mut machine = machine(SLOT);
    machine.plug.plug(run(0, 1)).unwrap();
    machine.fill(0);
    machine.memory.write_slice(&[7; 4096], GuestAddress(8192)).unwrap();
    let boot = Range { start: 8192, length: 4096 };
    let plugged = Range { start: machine.address(0), length: BLOCK };
    let attachment = machine.listeners.attach(Listener::new(&machine.memory, None)).unwrap();
    for range in [boot, plugged] {
        assert_eq!(machine.listeners.discard(range).unwrap(), Discard::Inhibited);
    }
    assert!(is_resident(machine.host(0)));
    drop(attachment);
    for range in [boot, plugged] {
        assert_eq!(machine.listeners.discard(range).unwrap(), Discard::Done);
    }
    assert!(!is_resident(machine.host(0)));
    let mut seen = [1; 4096];
    machine.memory.read_slice(&mut seen, GuestAddress(8192)).unwrap();
    assert_eq!(seen, [0; 4096]);
}

#[test]
fn what_is_not_memory_of_the_guest_is_not_discarded() {
    let machine = machine(SLOT);
    let (unplugged, gap) = (machine.address(0), BOOT);
    for (start, length) in
        [(unplugged, BLOCK), (gap, 4096), (0, BOOT + 4096), (1, 4096), (0, 1), (u64::MAX - 4095, 4096)]
    {
        assert!(machine.listeners.discard(Range { start, length }).is_err(), "{start:#x} {length:#x}");
    }
}

#[test]
fn blocks_that_are_there_twice_or_not_at_all_are_refused() {
    let mut machine = machine(SLOT);
    machine.plug.plug(run(1, 1)).unwrap();
    for bad in [run(0, 2), run(1, 1), run(64, 1), run(63, 2), run(0, 0), run(u64::MAX, 2)] {
        assert!(machine.plug.plug(bad).is_err(), "{bad:?}");
    }
    for bad in [run(0, 2), run(2, 1), run(64, 1), run(1, 0), run(u64::MAX, 2)] {
        assert!(machine.plug.unplug(bad).is_err(), "{bad:?}");
    }
    assert_eq!(machine.plug.plugged(), BLOCK);
}
