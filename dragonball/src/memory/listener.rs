//! Who else reaches guest memory: host devices that a guest owns (VFIO) do so through the IOMMU, by the guest's addresses.
//!
//! While one is attached, its pages are pinned: what is discarded behind its back would leave the device with a page that
//! the guest does not see any more. So nothing is discarded meanwhile but what was taken from the device first.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::blocks::{BLOCK, Run};
use super::layout::Range;
use super::mapping;
use crate::virtio::device::{GuestMemory, Region};

/// Wants to know which memory the guest has, before the guest uses it.
///
/// Memory comes and goes in the same pieces: a whole region of boot memory, or one block of 2 MiB. Both methods are
/// called with a lock held: they must not come back to [`DmaListeners`].
pub(crate) trait DmaListener: Send + Sync {
    /// The guest gets `range`, which lies at `host` in this process. Its first access comes after this has returned.
    ///
    /// # Errors
    /// Refuses the memory; the guest does not get it.
    fn plugged(&self, range: Range, host: u64) -> io::Result<()>;

    /// The guest has let go of `range`, which was announced by [`Self::plugged`]. When this returns, no access from the
    /// device can reach it: it is discarded next.
    fn unplugged(&self, range: Range);
}

/// All listeners of a machine; clones are the same.
#[derive(Clone)]
pub(crate) struct DmaListeners {
    memory: GuestMemory,
    attached: Arc<Mutex<Vec<Arc<dyn DmaListener>>>>,
}

/// A listener that is attached, until this is dropped. It is told nothing then: it takes all memory from its device itself.
#[must_use = "a listener is detached by the drop"]
pub(crate) struct Attachment {
    listener: Arc<dyn DmaListener>,
    listeners: DmaListeners,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.listeners.attached().retain(|other| !Arc::ptr_eq(other, &self.listener));
    }
}

/// What became of memory that nobody needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Discard {
    /// The host has it back.
    Done,
    /// It stays: a device might reach it.
    Inhibited,
}

impl DmaListeners {
    /// Nobody listens to `memory` yet.
    pub(crate) fn new(memory: GuestMemory) -> Self {
        Self { memory, attached: Arc::default() }
    }

    /// Fills all memory that the guest has, which [`Self::attach`] with a listener that pins it would do slower; for as long
    /// as it is `wanted`.
    pub(crate) fn fill(&self, wanted: &(dyn Fn() -> bool + Sync)) {
        // Held until the end: what is discarded meanwhile would be filled for nobody.
        let _attached = self.attached();
        self.pieces().for_each(|(range, host)| mapping::fill(host, range.length, wanted));
    }

    /// Tells `listener` all memory that the guest has, and from then on what comes and goes.
    ///
    /// # Errors
    /// The listener's own; it is not attached then, and was told that all is unplugged again.
    pub(crate) fn attach(&self, listener: Arc<dyn DmaListener>) -> io::Result<Attachment> {
        let mut attached = self.attached();
        let mut told = Vec::new();
        for (range, host) in self.pieces() {
            if let Err(error) = listener.plugged(range, host) {
                told.into_iter().rev().for_each(|range| listener.unplugged(range));
                return Err(error);
            }
            told.push(range);
        }
        attached.push(Arc::clone(&listener));
        Ok(Attachment { listener, listeners: self.clone() })
    }

    /// Tells that the guest gets `range`.
    ///
    /// # Errors
    /// The first listener's that refuses; those before it were told that the range is unplugged again.
    pub(super) fn plugged(&self, range: Range, host: u64) -> io::Result<()> {
        let attached = self.attached();
        if !attached.is_empty() {
            mapping::fill(host, range.length, &|| true);
        }
        for (done, listener) in attached.iter().enumerate() {
            if let Err(error) = listener.plugged(range, host) {
                attached[..done].iter().rev().for_each(|listener| listener.unplugged(range));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Tells that the guest has let go of `range`.
    pub(super) fn unplugged(&self, range: Range) {
        self.attached().iter().rev().for_each(|listener| listener.unplugged(range));
    }

    /// Gives `range`, which the guest has and does not need, back to the host. The guest still has it: it is filled anew
    /// when it is touched.
    ///
    /// # Errors
    /// When the range is not of whole pages of one region that the guest has, or the host refuses.
    pub(crate) fn discard(&self, range: Range) -> io::Result<Discard> {
        // Held until the end: a listener that is attached meanwhile would pin what is discarded.
        let attached = self.attached();
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let region = self.memory.find_region(vm_memory::GuestAddress(range.start)).ok_or_else(invalid)?;
        let offset = range.start - region.start_addr().0;
        if region.blocks().is_some_and(|blocks| !blocks.hold(offset, range.length)) {
            return Err(invalid());
        }
        if !attached.is_empty() {
            return Ok(Discard::Inhibited);
        }
        mapping::discard(region.mapping(), offset, range.length)?;
        Ok(Discard::Done)
    }

    /// All memory that the guest has: the range and the host address of each piece.
    fn pieces(&self) -> impl Iterator<Item = (Range, u64)> {
        self.memory.iter().flat_map(|region| {
            let runs = region.blocks().map(|blocks| blocks.runs());
            let fixed = runs.is_none().then(|| whole(region));
            let blocks = runs.into_iter().flatten().flat_map(Run::numbers).map(|number| block(region, number));
            fixed.into_iter().chain(blocks)
        })
    }

    fn attached(&self) -> MutexGuard<'_, Vec<Arc<dyn DmaListener>>> {
        // The list is complete at all times.
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn whole(region: &Region) -> (Range, u64) {
    (Range { start: region.start_addr().0, length: region.len() }, region.mapping().as_ptr() as u64)
}

/// Guest range and host address of a block of pluggable memory.
pub(super) fn block(region: &Region, number: u64) -> (Range, u64) {
    let (whole, host) = whole(region);
    (Range { start: whole.start + number * BLOCK, length: BLOCK }, host + number * BLOCK)
}
