//! A split ring as its driver sees it (virtio 1.2, §2.7).

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::device::GuestMemory;

/// Descriptor flag `VIRTQ_DESC_F_NEXT`: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag `VIRTQ_DESC_F_WRITE`: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: u64 = 16;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Segment {
    /// The device reads it: address and length in bytes.
    Readable(GuestAddress, u32),
    /// The device writes it: address and length in bytes.
    Writable(GuestAddress, u32),
}

impl Segment {
    /// Where it is.
    pub fn address(self) -> GuestAddress {
        match self {
            Self::Readable(address, _) | Self::Writable(address, _) => address,
        }
    }

    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "an empty segment is a test case like any other")]
    pub fn len(self) -> u32 {
        match self {
            Self::Readable(_, length) | Self::Writable(_, length) => length,
        }
    }

    fn flags(self) -> u16 {
        match self {
            Self::Readable(..) => 0,
            Self::Writable(..) => WRITE,
        }
    }
}

/// A descriptor as it lies in memory: every field as the test wants it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Length of the buffer in bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`] and [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

/// A buffer that the device gave back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Used {
    /// The head of its chain.
    pub head: u16,
    /// How many bytes the device says that it wrote.
    pub written: u32,
}

/// One ring in guest memory.
pub struct DriverRing {
    memory: GuestMemory,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    /// The available index when the doorbell was last considered.
    announced: u16,
    /// The driver does not use this ring.
    disabled: bool,
    /// Descriptors that are in no chain.
    free: Vec<u16>,
    /// The chain of each head that the device has.
    chains: Vec<Vec<u16>>,
}

impl DriverRing {
    /// A ring of `size` entries at `address`.
    pub(super) fn new(memory: GuestMemory, address: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let available = address + DESCRIPTOR_SIZE * entries;
        // Each part ends in an event index (virtio 1.2, §2.7.6 and §2.7.8).
        let used = (available + 6 + 2 * entries).next_multiple_of(4);
        let mut ring = Self {
            memory,
            size,
            descriptors: address,
            available,
            used,
            next_available: 0,
            next_used: 0,
            announced: 0,
            disabled: false,
            free: Vec::new(),
            chains: Vec::new(),
        };
        ring.reset();
        ring
    }

    /// The first address behind the ring, aligned for the next one.
    pub(super) fn end(&self) -> u64 {
        (self.used + 6 + 8 * u64::from(self.size)).next_multiple_of(16)
    }

    /// Empties the ring.
    pub(super) fn reset(&mut self) {
        let length = usize::try_from(self.end() - self.descriptors).expect("a ring's length");
        self.memory.write_slice(&vec![0; length], GuestAddress(self.descriptors)).expect("a ring in guest memory");
        (self.next_available, self.next_used, self.announced) = (0, 0, 0);
        self.free = (0..self.size).rev().collect();
        self.chains = vec![Vec::new(); usize::from(self.size)];
    }

    /// The same ring for a device, as a transport would set it up.
    pub(super) fn device_queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).expect("a ring's size");
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).expect("an aligned address");
        queue.try_set_avail_ring_address(GuestAddress(self.available)).expect("an aligned address");
        queue.try_set_used_ring_address(GuestAddress(self.used)).expect("an aligned address");
        queue.set_ready(true);
        queue
    }

    /// Leaves the ring out of the next activation.
    pub fn disable(&mut self) {
        self.disabled = true;
    }

    /// Whether the ring is left out.
    pub(super) fn is_disabled(&self) -> bool {
        self.disabled
    }

    /// How many entries the ring has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many descriptors are in no chain.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Guest address of the used ring's header, the place where a device's writes are seen.
    pub fn used_address(&self) -> GuestAddress {
        GuestAddress(self.used)
    }

    /// Makes a chain of `segments` available; returns its head.
    ///
    /// # Panics
    /// When the ring has too few free descriptors, or there is no segment.
    pub fn add(&mut self, segments: &[Segment]) -> u16 {
        let chain = self.free.split_off(self.free.len().checked_sub(segments.len()).expect("free descriptors"));
        for (position, (&index, segment)) in chain.iter().zip(segments).enumerate() {
            let next = chain.get(position + 1).copied();
            let flags = segment.flags() | if next.is_some() { NEXT } else { 0 };
            let (address, length) = (segment.address().0, segment.len());
            self.write_descriptor(index, Descriptor { address, length, flags, next: next.unwrap_or(0) });
        }
        let head = *chain.first().expect("a segment");
        self.chains[usize::from(head)] = chain;
        self.make_available(head);
        head
    }

    /// Makes a chain of `segments` available whose descriptors lie in a table at `table`; returns its head.
    ///
    /// # Panics
    /// When the ring has no free descriptor, or the table does not fit into guest memory.
    pub fn add_indirect(&mut self, table: GuestAddress, segments: &[Segment]) -> u16 {
        for (position, segment) in (0_u16..).zip(segments) {
            let last = usize::from(position) + 1 == segments.len();
            let flags = segment.flags() | if last { 0 } else { NEXT };
            let (address, length) = (segment.address().0, segment.len());
            self.write_descriptor_at(table.0, position, Descriptor { address, length, flags, next: position + 1 });
        }
        let head = self.free.pop().expect("a free descriptor");
        let length = u32::try_from(DESCRIPTOR_SIZE).expect("16") * u32::try_from(segments.len()).expect("a table");
        self.write_descriptor(head, Descriptor { address: table.0, length, flags: INDIRECT, next: 0 });
        self.chains[usize::from(head)] = vec![head];
        self.make_available(head);
        head
    }

    /// Writes descriptor `index` as it is.
    ///
    /// # Panics
    /// When it lies outside guest memory.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.write_descriptor_at(self.descriptors, index, descriptor);
    }

    fn write_descriptor_at(&self, table: u64, index: u16, descriptor: Descriptor) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&descriptor.address.to_le_bytes());
        raw[8..12].copy_from_slice(&descriptor.length.to_le_bytes());
        raw[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        raw[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        let address = table + DESCRIPTOR_SIZE * u64::from(index);
        self.memory.write_slice(&raw, GuestAddress(address)).expect("a descriptor in guest memory");
    }

    /// Puts `head` into the available ring, whatever it is.
    pub fn make_available(&mut self, head: u16) {
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.store(slot, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Sets the index of the available ring, whatever it says about the entries before it.
    pub fn set_available_index(&self, index: u16) {
        self.store(self.available + 2, index);
    }

    /// Asks for an interrupt only once the device's used index passes `index` (with `RING_EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.store(self.available + 4 + 2 * u64::from(self.size), index);
    }

    /// Whether the device asked for the doorbell for what was made available since the last call (virtio 1.2, §2.7.7.1
    /// without `RING_EVENT_IDX` and §2.7.10 with it).
    pub(super) fn wants_doorbell(&mut self, event_index: bool) -> bool {
        let (before, now) = (std::mem::replace(&mut self.announced, self.next_available), self.next_available);
        if !event_index {
            // VIRTQ_USED_F_NO_NOTIFY
            return self.load(self.used) & 1 == 0;
        }
        let event = self.load(self.used + 4 + 8 * u64::from(self.size));
        now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
    }

    /// The used index as the device wrote it.
    pub fn used_index(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// Takes the next used buffer, if there is one; its descriptors are free again.
    ///
    /// # Panics
    /// When the device gave back what it did not have.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_index() == self.next_used {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let mut raw = [0; 8];
        self.memory.read_slice(&mut raw, GuestAddress(slot)).expect("a ring in guest memory");
        let [a, b, c, d, e, f, g, h] = raw;
        let head = u16::try_from(u32::from_le_bytes([a, b, c, d])).expect("the head of a chain");
        let written = u32::from_le_bytes([e, f, g, h]);
        self.next_used = self.next_used.wrapping_add(1);
        // An interrupt is wanted for the next one, as Linux does.
        self.set_used_event(self.next_used);
        self.free.append(&mut self.chains[usize::from(head)]);
        Some(Used { head, written })
    }

    /// Takes the next used buffer, whatever the device gave back; false when there is none.
    pub(super) fn take_used_of_any_kind(&mut self) -> bool {
        if self.used_index() == self.next_used {
            return false;
        }
        let slot = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let head = usize::from(self.load(slot));
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(chain) = self.chains.get_mut(head) {
            self.free.append(chain);
        }
        true
    }

    fn store(&self, address: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(address), std::sync::atomic::Ordering::SeqCst)
            .expect("a ring in guest memory");
    }

    fn load(&self, address: u64) -> u16 {
        self.memory
            .load(GuestAddress(address), std::sync::atomic::Ordering::SeqCst)
            .map(u16::from_le)
            .expect("a ring in guest memory")
    }
}
