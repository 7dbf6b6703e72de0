//! What a device and its transport share: interrupts, the device configuration, and the mark of a broken device.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::irq::router::IrqRouter;
use crate::pci::msix::Msix;
use crate::virtio::device::Interrupt;

/// The vector that is none (virtio 1.2, §4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

const STATUS_QUEUE: u8 = 1;
const STATUS_CONFIG: u8 = 2;

/// Shared by the vCPUs (through the transport) and the `vmm` thread (through the device).
pub(crate) struct Lines {
    pub(super) msix: Msix,
    /// The vector of configuration changes.
    pub(super) config_vector: AtomicU16,
    /// The vector of each queue.
    pub(super) queue_vectors: Vec<AtomicU16>,
    /// Interrupt status register: read by drivers that do not use MSI-X.
    status: AtomicU8,
    config: Mutex<Vec<u8>>,
    generation: AtomicU8,
    broken: AtomicBool,
}

impl Lines {
    /// Lines of a device with `queues` queues: a vector for each and one for configuration changes.
    pub(super) fn new(router: Arc<IrqRouter>, queues: u16, config: Vec<u8>) -> Self {
        let vector = || AtomicU16::new(NO_VECTOR);
        Self {
            msix: Msix::new(router, queues + 1),
            config_vector: vector(),
            queue_vectors: std::iter::repeat_with(vector).take(usize::from(queues)).collect(),
            status: AtomicU8::new(0),
            config: Mutex::new(config),
            generation: AtomicU8::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// Forgets what the driver set up. The MSI-X table is PCI's and stays.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.queue_vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
        self.status.store(0, Ordering::Release);
        self.broken.store(false, Ordering::Release);
    }

    /// Reads and clears the interrupt status.
    pub(super) fn take_status(&self) -> u8 {
        self.status.swap(0, Ordering::AcqRel)
    }

    /// Copies from the device configuration; what lies behind it reads as zero.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// The interrupt routes that are in use.
    pub(crate) fn routes(&self) -> Vec<u32> {
        self.msix.routes()
    }

    /// The device configuration is now `config`; the driver sees a new generation if that is a change.
    pub(crate) fn set_config(&self, config: Vec<u8>) {
        let mut current = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        if *current != config {
            *current = config;
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The device needs a reset: the driver is told.
    pub(crate) fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
        self.signal_config();
    }

    fn signal(&self, vector: u16, status: u8) {
        if self.msix.enabled() {
            self.msix.signal(vector);
        } else {
            self.status.fetch_or(status, Ordering::AcqRel);
        }
    }
}

impl Interrupt for Lines {
    fn signal_queue(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.signal(vector.load(Ordering::Acquire), STATUS_QUEUE);
        }
    }

    fn signal_config(&self) {
        self.signal(self.config_vector.load(Ordering::Acquire), STATUS_CONFIG);
    }

    fn set_config(&self, config: Vec<u8>) {
        Self::set_config(self, config);
    }
}
