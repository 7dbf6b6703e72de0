//! Memory that a guest gets and gives back while it runs, block by block.
//!
//! The whole range has its host addresses from the start, closed to everybody (`PROT_NONE`): it costs nothing. A block
//! that is plugged is opened, and the memory slot that it lies in is shown to the guest. So a guest that touches a block
//! which it does not have ends its own machine, and never makes the host spend memory.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::address_space::SlotId;
pub(crate) use super::blocks::{BLOCK, PluggedBlocks, Run};
use super::layout::Range;
use super::listener::{self, DmaListeners};
use super::{AddressSpace, Region, SlotAccess, mapping};
use crate::virtio::device::GuestMemory;

/// Bytes of a memory slot (128 MiB): what Linux adds to its memory at once.
pub(crate) const SLOT: u64 = 128 << 20;
const BLOCKS_PER_SLOT: u64 = SLOT / BLOCK;

/// The region of guest memory for pluggable memory at `range`, which is a multiple of [`SLOT`] long.
///
/// # Errors
/// When the host has no addresses left.
pub(crate) fn region(range: Range) -> io::Result<Region> {
    let blocks = Arc::new(PluggedBlocks::new(range.length));
    Region::pluggable(mapping::reserve(range.length)?, GuestAddress(range.start), blocks)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Pluggable memory of a machine.
pub(crate) struct PluggableMemory {
    memory: GuestMemory,
    range: Range,
    blocks: Arc<PluggedBlocks>,
    /// Where the guest sees it; nothing in a test without a VM.
    space: Option<AddressSpace>,
    /// The slots that the guest sees, by their number in the range.
    shown: Vec<Option<SlotId>>,
    listeners: DmaListeners,
}

impl PluggableMemory {
    /// The pluggable region of `memory`; nothing when it has none.
    pub(crate) fn new(memory: &GuestMemory, space: Option<AddressSpace>, listeners: DmaListeners) -> Option<Self> {
        let region = memory.iter().find(|region| region.blocks().is_some())?;
        let range = Range { start: region.start_addr().0, length: region.len() };
        let blocks = Arc::clone(region.blocks()?);
        let shown = (0..range.length.div_ceil(SLOT)).map(|_| None).collect();
        Some(Self { memory: Arc::clone(memory), range, blocks, space, shown, listeners })
    }

    /// Where it lies.
    pub(crate) fn range(&self) -> Range {
        self.range
    }

    /// Which blocks the guest has.
    pub(crate) fn blocks(&self) -> &PluggedBlocks {
        &self.blocks
    }

    /// Bytes that the guest has.
    pub(crate) fn plugged(&self) -> u64 {
        self.blocks.plugged() * BLOCK
    }

    /// Gives the blocks of `run`, of which the guest has none, to the guest: opened, shown, announced to all listeners,
    /// and only then to the devices.
    ///
    /// # Errors
    /// When the run is not one of unplugged blocks, or the host, KVM or a listener refuses; nothing is plugged then.
    pub(crate) fn plug(&mut self, run: Run) -> io::Result<()> {
        if run.count == 0 || !self.blocks.exist(run) || self.blocks.any(run) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let done = self.open(run).and_then(|()| self.show(run)).and_then(|()| self.announce(run));
        if done.is_err() {
            self.hide_empty(run);
            self.close(run);
            return done;
        }
        self.blocks.set(run, true);
        Ok(())
    }

    /// Takes the blocks of `run`, of which the guest has all, from the guest: from the devices, from all listeners, and
    /// only then from memory.
    ///
    /// # Errors
    /// When the run is not one of plugged blocks, or the host refuses to close them; the guest then keeps them all.
    pub(crate) fn unplug(&mut self, run: Run) -> io::Result<()> {
        if run.count == 0 || !self.blocks.all(run) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // First what can fail. It closes the blocks to this process and the guest, and leaves what a device has pinned.
        mapping::seal(self.region()?.mapping(), run.first * BLOCK, run.count * BLOCK)?;
        self.blocks.set(run, false);
        for number in run.numbers().rev() {
            self.listeners.unplugged(listener::block(self.region()?, number).0);
        }
        self.hide_empty(run);
        self.close(run);
        Ok(())
    }

    /// Takes everything from the guest.
    ///
    /// # Errors
    /// The first one of [`Self::unplug`]; what can be taken is taken.
    pub(crate) fn unplug_all(&mut self) -> io::Result<()> {
        let runs = self.blocks.runs();
        let results: Vec<_> = runs.into_iter().map(|run| self.unplug(run)).collect();
        results.into_iter().collect()
    }

    fn region(&self) -> io::Result<&Region> {
        self.memory.find_region(GuestAddress(self.range.start)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn open(&self, run: Run) -> io::Result<()> {
        mapping::open(self.region()?.mapping(), run.first * BLOCK, run.count * BLOCK)
    }

    /// Lets nobody access the blocks of `run` and gives their memory back to the host. What fails is logged: the guest has
    /// no use for them any more.
    fn close(&self, run: Run) {
        let (offset, length) = (run.first * BLOCK, run.count * BLOCK);
        let closed = self.region().and_then(|region| {
            let sealed = mapping::seal(region.mapping(), offset, length);
            mapping::discard(region.mapping(), offset, length).and(sealed)
        });
        if let Err(error) = closed {
            tracing::warn!(%error, first = run.first, count = run.count, "unplugged memory stays with the process");
        }
    }

    /// Shows the slots that `run` touches to the guest.
    fn show(&mut self, run: Run) -> io::Result<()> {
        let Some(space) = self.space.clone() else { return Ok(()) };
        let host = self.region()?.mapping().as_ptr() as u64;
        for (number, shown) in (0_u64..).zip(&mut self.shown) {
            if !touches(run, number) || shown.is_some() {
                continue;
            }
            let offset = number * SLOT;
            let range = Range { start: self.range.start + offset, length: SLOT.min(self.range.length - offset) };
            // SAFETY: the mapping is as long as the region and stays in place as long as guest memory, which the `vmm`
            // thread holds until it has joined the vCPUs; only the protection of its blocks changes.
            *shown = Some(unsafe { space.add(range, host + offset, SlotAccess::ReadWrite)? });
        }
        Ok(())
    }

    /// Hides those of the slots that `run` touches of which the guest has no block. One that KVM keeps is used again later.
    fn hide_empty(&mut self, run: Run) {
        let Some(space) = self.space.clone() else { return };
        for (number, shown) in (0_u64..).zip(&mut self.shown) {
            let blocks = Run { first: number * BLOCKS_PER_SLOT, count: BLOCKS_PER_SLOT };
            if !touches(run, number) || self.blocks.any(blocks) {
                continue;
            }
            if let Some(slot) = shown.take()
                && let Err((slot, error)) = space.try_remove(slot)
            {
                tracing::warn!(%error, "KVM keeps an empty memory slot");
                *shown = Some(slot);
            }
        }
    }

    fn announce(&self, run: Run) -> io::Result<()> {
        let region = self.region()?;
        for number in run.numbers() {
            let (range, host) = listener::block(region, number);
            if let Err(error) = self.listeners.plugged(range, host) {
                (run.first..number).rev().for_each(|done| self.listeners.unplugged(listener::block(region, done).0));
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Whether `run` has a block in slot `number`.
fn touches(run: Run, number: u64) -> bool {
    let first = number * BLOCKS_PER_SLOT;
    run.first < first + BLOCKS_PER_SLOT && first < run.numbers().end
}

#[cfg(test)]
mod tests;
