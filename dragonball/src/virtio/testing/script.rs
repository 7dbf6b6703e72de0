//! A hostile driver: bytes of a fuzzer as a program of what to do to a device.
//!
//! The interpreter knows the shape of rings and of ordinary requests, so that random bytes get deep into a device, and
//! can also write anything anywhere, as a guest can. Whatever the program, a device must not panic and must come to rest.

use vm_memory::{Bytes, GuestAddress};

use super::{Descriptor, Harness, MEMORY_SIZE, MEMORY_START, RINGS_SIZE, Segment};
use crate::virtio::device::{SavedState, VirtioDevice};

/// How many rounds of events a device may need before it is said to spin. A ring has at most 256 entries, a turn ends after
/// 256 requests, and every connection of a socket device may have its own event.
const ROUNDS: usize = 2000;
/// The most bytes of one request's part.
const PART: u16 = 4096;

/// Reads a fuzzer's bytes; behind their end come zeroes.
#[derive(Clone, Debug)]
pub struct Script<'a> {
    rest: &'a [u8],
}

impl<'a> Script<'a> {
    /// A program of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `count` bytes, or what is left.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(count.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// The next bytes as an array.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// The next two bytes as a number.
    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes as a number.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
}

/// What surrounds a device.
pub trait Scene {
    /// The readable part of a request that makes some sense.
    fn request(&mut self, script: &mut Script<'_>) -> Vec<u8> {
        any_bytes(script)
    }

    /// Something that happens on the host.
    fn host(&mut self, script: &mut Script<'_>) {
        let _ = script;
    }
}

fn any_bytes(script: &mut Script<'_>) -> Vec<u8> {
    let count = usize::from(script.half() % PART);
    script.bytes(count).to_vec()
}

/// Does to the device of `harness`, in `scene`, what `script` says.
///
/// # Panics
/// When the device spins. (When it panics, so does this.)
pub fn run<D: VirtioDevice>(harness: &mut Harness<D>, mut script: Script<'_>, scene: &mut impl Scene) {
    while !script.is_over() {
        let queue = script.byte();
        let operation = queue >> 4;
        let queue = u16::from(queue & 15) % u16::try_from(harness.rings.len()).expect("a few rings");
        match operation {
            0..=4 => {
                let request = scene.request(&mut script);
                ordinary_request(harness, queue, &request, &mut script);
            }
            5 => {
                let request = any_bytes(&mut script);
                ordinary_request(harness, queue, &request, &mut script);
            }
            6 | 7 => descriptor(harness, queue, &mut script),
            8 => harness.rings[usize::from(queue)].make_available(script.half()),
            9 => harness.rings[usize::from(queue)].set_available_index(script.half()),
            10 => memory(harness, &mut script),
            11 | 12 => scene.host(&mut script),
            13 => config(harness, &mut script),
            14 => state(harness, &mut script),
            _ => restart(harness),
        }
        harness.kick(queue);
        if harness.try_settle(ROUNDS).is_err() {
            restart(harness);
        }
    }
}

/// A chain of readable bytes and writable room.
fn ordinary_request<D: VirtioDevice>(harness: &mut Harness<D>, queue: u16, request: &[u8], script: &mut Script<'_>) {
    let ring = &mut harness.rings[usize::from(queue)];
    while ring.take_used_of_any_kind() {}
    if ring.free() < 3 {
        return;
    }
    // Each ring has its own place for the readable part, so that requests of several rings can be under way.
    let place = GuestAddress(MEMORY_START + RINGS_SIZE + u64::from(queue) * 4 * u64::from(PART));
    harness.memory.write_slice(request, place).expect("a buffer in guest memory");
    let length = u32::try_from(request.len()).expect("a short part");
    let room = u32::from(script.half() % PART);
    let cut = u32::from(script.byte()).min(length);
    harness.rings[usize::from(queue)].add(&[
        Segment::Readable(place, cut),
        Segment::Readable(GuestAddress(place.0 + u64::from(cut)), length - cut),
        Segment::Writable(GuestAddress(place.0 + 2 * u64::from(PART)), room),
    ]);
}

fn descriptor<D: VirtioDevice>(harness: &Harness<D>, queue: u16, script: &mut Script<'_>) {
    let size = harness.rings[usize::from(queue)].size();
    let index = script.half() % size;
    let offset = u64::from(script.word());
    // Mostly in guest memory, sometimes just behind it, sometimes anywhere.
    let address = match script.byte() & 7 {
        0 => u64::MAX - offset,
        1 => offset << 16,
        _ => MEMORY_START + offset % (MEMORY_SIZE + 4096),
    };
    let length = if script.byte() & 15 == 0 { script.word() } else { u32::from(script.half() % (2 * PART)) };
    let flags = script.half() & 7;
    harness.rings[usize::from(queue)]
        .write_descriptor(index, Descriptor { address, length, flags, next: script.half() % size.saturating_add(1) });
}

fn memory<D: VirtioDevice>(harness: &Harness<D>, script: &mut Script<'_>) {
    let address = MEMORY_START + u64::from(script.word()) % (MEMORY_SIZE - 256);
    let count = usize::from(script.byte());
    harness.memory.write_slice(script.bytes(count), GuestAddress(address)).expect("a place in guest memory");
}

fn config<D: VirtioDevice>(harness: &mut Harness<D>, script: &mut Script<'_>) {
    let offset = u64::from(script.half());
    let count = usize::from(script.byte() & 15);
    harness.device.write_config(offset, script.bytes(count));
}

/// Saves, and goes on from that state or one that nobody saved.
fn state<D: VirtioDevice>(harness: &mut Harness<D>, script: &mut Script<'_>) {
    let saved = harness.device.save().ok();
    harness.reset_device();
    let state = match saved {
        Some(saved) if script.byte() & 1 == 0 => saved,
        _ => {
            let version = u16::from(script.byte() & 3);
            let count = usize::from(script.byte());
            SavedState { version, data: script.bytes(count).to_vec() }
        }
    };
    // A state that does not fit is refused, and the device starts as if there had been none.
    let _ = harness.device.restore(&state);
    // Its rings are as the guest left them: what is wrong with them may show at once.
    if harness.activate().is_err() {
        restart(harness);
    }
}

fn restart<D: VirtioDevice>(harness: &mut Harness<D>) {
    harness.reset();
    assert_eq!(harness.events.watched(), 0, "a reset device watches nothing");
    harness.activate().expect("a device that was reset can be activated");
}
