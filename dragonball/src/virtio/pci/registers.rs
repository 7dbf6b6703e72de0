//! The common configuration registers: feature negotiation and ring set-up (virtio 1.2, §4.1.4.3).

use virtio_queue::{Queue, QueueT};

use crate::virtio::device::GuestRegions;

/// `VIRTIO_F_VERSION_1`: the only kind of device that this transport carries.
pub(super) const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_RING_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;

/// Bits of `device_status` (virtio 1.2, §2.1).
pub(super) mod status {
    #[cfg(test)]
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    #[cfg(test)]
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
}

/// One ring as the driver set it up.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) enabled: bool,
    /// Descriptor table, available ring and used ring.
    pub(super) addresses: [u64; 3],
}

impl Ring {
    fn new(max_size: u16) -> Self {
        Self { size: max_size, enabled: false, addresses: [0; 3] }
    }

    /// The ring for the device's use; nothing when the driver set it up wrongly.
    pub(super) fn queue(&self, max_size: u16, features: u64, memory: &GuestRegions) -> Option<Queue> {
        let mut queue = Queue::new(max_size).ok()?;
        queue.set_size(self.size);
        let halves = self.addresses.map(|address| {
            let (low, high) = (address & 0xffff_ffff, address >> 32);
            // Both are 32 bits wide now.
            (u32::try_from(low).ok(), u32::try_from(high).ok())
        });
        let [(descriptors, descriptors_high), (available, available_high), (used, used_high)] = halves;
        queue.set_desc_table_address(descriptors, descriptors_high);
        queue.set_avail_ring_address(available, available_high);
        queue.set_used_ring_address(used, used_high);
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_ready(true);
        // The queue keeps its old value where a new one is out of range or not aligned.
        let taken =
            queue.size() == self.size && [queue.desc_table(), queue.avail_ring(), queue.used_ring()] == self.addresses;
        (taken && queue.is_valid(memory)).then_some(queue)
    }
}

/// The registers. Vectors are not here: the device's side needs them, see `Lines`.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(super) struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) rings: Vec<Ring>,
}

/// What a write asks the transport to do beyond the registers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// The driver wrote 0 to the status.
    Reset,
    /// The driver set `DRIVER_OK`.
    Activate,
    /// The driver chose the vector of configuration changes.
    ConfigVector(u16),
    /// The driver chose the vector of the selected queue.
    QueueVector(u16),
}

mod offsets {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const QUEUE_COUNT: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_DOORBELL: u64 = 0x1e;
    pub(super) const QUEUE_ADDRESSES: u64 = 0x20;
    pub(super) const END: u64 = 0x38;
}

/// What the registers say that is kept elsewhere.
pub(super) struct View {
    pub(super) offered: u64,
    pub(super) generation: u8,
    pub(super) broken: bool,
    pub(super) config_vector: u16,
    pub(super) queue_vector: u16,
}

impl Registers {
    pub(super) fn new(queue_sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            rings: queue_sizes.iter().map(|size| Ring::new(*size)).collect(),
        }
    }

    /// Whether the device was handed its rings.
    pub(super) fn active(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    fn selected(&self) -> Option<&Ring> {
        self.rings.get(usize::from(self.queue_select))
    }

    /// Answers a read. Registers have the width that they have: a read of another width or off a register gives zeroes.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], view: &View) {
        let ring = self.selected();
        let half = |value: u64, upper: bool| if upper { value >> 32 } else { value & 0xffff_ffff };
        let value = match (offset, data.len()) {
            (offsets::DEVICE_FEATURE_SELECT, 4) => u64::from(self.device_feature_select),
            (offsets::DEVICE_FEATURE, 4) => feature_half(view.offered, self.device_feature_select),
            (offsets::DRIVER_FEATURE_SELECT, 4) => u64::from(self.driver_feature_select),
            (offsets::DRIVER_FEATURE, 4) => feature_half(self.driver_features, self.driver_feature_select),
            (offsets::CONFIG_VECTOR, 2) => u64::from(view.config_vector),
            (offsets::QUEUE_COUNT, 2) => self.rings.len() as u64,
            (offsets::STATUS, 1) => u64::from(self.status | if view.broken { status::NEEDS_RESET } else { 0 }),
            (offsets::GENERATION, 1) => u64::from(view.generation),
            (offsets::QUEUE_SELECT, 2) => u64::from(self.queue_select),
            (offsets::QUEUE_SIZE, 2) => ring.map_or(0, |ring| u64::from(ring.size)),
            (offsets::QUEUE_VECTOR, 2) => u64::from(view.queue_vector),
            (offsets::QUEUE_ENABLE, 2) => ring.map_or(0, |ring| u64::from(ring.enabled)),
            (offsets::QUEUE_DOORBELL, 2) => ring.map_or(0, |_| u64::from(self.queue_select)),
            (offsets::QUEUE_ADDRESSES..offsets::END, 4 | 8) if offset.is_multiple_of(data.len() as u64) => {
                let (index, upper) = address_register(offset);
                let address = ring.map_or(0, |ring| ring.addresses[index]);
                if data.len() == 8 { address } else { half(address, upper) }
            }
            _ => 0,
        };
        for (byte, source) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = source;
        }
    }

    /// Takes a write. What the driver may not write now is ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], offered: u64) -> Effect {
        let value = little_endian(data);
        // The arms check the width, so that the conversions keep everything.
        let word = u32::try_from(value & 0xffff_ffff).unwrap_or_default();
        let short = u16::try_from(value & 0xffff).unwrap_or_default();
        let byte = u8::try_from(value & 0xff).unwrap_or_default();
        match (offset, data.len()) {
            (offsets::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = word,
            (offsets::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = word,
            (offsets::DRIVER_FEATURE, 4) => self.set_driver_features(word),
            (offsets::CONFIG_VECTOR, 2) => return Effect::ConfigVector(short),
            (offsets::QUEUE_VECTOR, 2) => return Effect::QueueVector(short),
            (offsets::STATUS, 1) => return self.set_status(byte, offered),
            (offsets::QUEUE_SELECT, 2) => self.queue_select = short,
            (offsets::QUEUE_SIZE | offsets::QUEUE_ENABLE, 2) | (offsets::QUEUE_ADDRESSES..offsets::END, 4 | 8) => {
                self.set_ring(offset, data.len(), value)
            }
            _ => {}
        }
        Effect::None
    }

    fn set_driver_features(&mut self, half: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let half = u64::from(half);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | half,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | half << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8, offered: u64) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let mut new = value & !status::NEEDS_RESET | self.status;
        let features_fit = self.driver_features & !offered == 0 && self.driver_features & VERSION_1 != 0;
        if self.status & status::FEATURES_OK == 0 && !features_fit {
            new &= !status::FEATURES_OK;
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        let activates = new & !self.status & status::DRIVER_OK != 0;
        self.status = new;
        if activates { Effect::Activate } else { Effect::None }
    }

    fn set_ring(&mut self, offset: u64, width: usize, value: u64) {
        let active = self.active();
        let Some(ring) = self.rings.get_mut(usize::from(self.queue_select)) else { return };
        // A ring that is enabled is the device's: the driver may change nothing of it any more.
        if active || ring.enabled {
            return;
        }
        match offset {
            offsets::QUEUE_SIZE => ring.size = u16::try_from(value).unwrap_or_default(),
            offsets::QUEUE_ENABLE => ring.enabled = value == 1,
            _ if !offset.is_multiple_of(width as u64) => {}
            _ => {
                let (index, upper) = address_register(offset);
                let address = &mut ring.addresses[index];
                *address = match (width, upper) {
                    (8, _) => value,
                    (_, false) => *address & !0xffff_ffff | value,
                    (_, true) => *address & 0xffff_ffff | value << 32,
                };
            }
        }
    }

    /// Whether saved registers can be taken by a device with these queues that offers `offered`.
    pub(super) fn fits(&self, queue_sizes: &[u16], offered: u64) -> bool {
        let sizes_fit = self.rings.iter().zip(queue_sizes).all(|(ring, max)| ring.size <= *max);
        let negotiated = self.status & status::FEATURES_OK != 0;
        let features_fit = !negotiated || self.driver_features & !offered == 0;
        self.rings.len() == queue_sizes.len() && sizes_fit && features_fit && (negotiated || !self.active())
    }
}

/// Which of the three addresses a register is of, and whether it is the upper half.
fn address_register(offset: u64) -> (usize, bool) {
    let distance = offset - offsets::QUEUE_ADDRESSES;
    (usize::try_from(distance / 8).unwrap_or_default().min(2), distance % 8 >= 4)
}

fn feature_half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

fn little_endian(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
