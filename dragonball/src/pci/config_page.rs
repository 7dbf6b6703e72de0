//! Configuration space that the guest reads as memory.
//!
//! A guest reads some hundred registers of a function while it sets it up, and each read is an exit to this process. What
//! the registers hold changes only when the guest writes them: so it is shown a page of theirs that it may only read.
//! Reads find their answer there, writes come as they always did.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes as _, MmapRegion, VolatileMemory as _};

use crate::memory::layout::Range;
use crate::memory::{AddressSpace, SlotAccess, SlotId};

/// Configuration space of one function: a page (PCI Express Base Specification 5.0, §7.2.2).
const LENGTH: usize = 4096;
/// What reads where no function is.
const ABSENT: u8 = 0xff;

/// The page of one function number in one slot. It stays when its function goes: KVM forgets where all of the guest's
/// memory is when a page is taken away.
pub(crate) struct ConfigPage {
    space: AddressSpace,
    address: u64,
    shown: Mutex<Option<Shown>>,
}

/// A page that the guest sees.
struct Shown {
    space: AddressSpace,
    slot: Option<SlotId>,
    mapping: Arc<MmapRegion>,
}

impl ConfigPage {
    /// The page at `address`, which the guest does not see yet.
    pub(crate) fn new(space: AddressSpace, address: u64) -> Self {
        Self { space, address, shown: Mutex::new(None) }
    }

    fn shown(&self) -> MutexGuard<'_, Option<Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guest see `registers`, and zeroes behind them. Where KVM refuses, its reads are exits as before.
    pub(crate) fn show(&self, registers: &[u8]) {
        let mut shown = self.shown();
        match shown.as_ref() {
            Some(shown) => write(&shown.mapping, registers, 0),
            None => {
                *shown = Shown::new(&self.space, self.address, registers)
                    .inspect_err(|error| tracing::debug!(%error, self.address, "registers are not shown as memory"))
                    .ok();
            }
        }
    }

    /// What the guest reads there, if it reads memory.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn content(&self) -> Option<Vec<u8>> {
        let shown = self.shown();
        let mapping = &shown.as_ref()?.mapping;
        let mut content = vec![0; mapping.size()];
        mapping.get_slice(0, mapping.size()).ok()?.read_slice(&mut content, 0).ok()?;
        Some(content)
    }

    /// The function's registers have changed.
    pub(crate) fn update(&self, registers: &[u8]) {
        if let Some(shown) = self.shown().as_ref() {
            write(&shown.mapping, registers, 0);
        }
    }

    /// The function is gone: there is nothing at its place.
    pub(crate) fn vacate(&self) {
        if let Some(shown) = self.shown().as_ref() {
            write(&shown.mapping, &[], ABSENT);
        }
    }

    /// Makes the guest's reads exits, because they shall do more than tell what the registers hold.
    pub(crate) fn hide(&self) {
        let shown = self.shown().take();
        drop(shown);
    }
}

impl Shown {
    fn new(space: &AddressSpace, address: u64, registers: &[u8]) -> io::Result<Self> {
        let mapping = MmapRegion::new(LENGTH).map_err(io::Error::other)?;
        write(&mapping, registers, 0);
        let mapping = Arc::new(mapping);
        let range = Range { start: address, length: LENGTH as u64 };
        // SAFETY: the mapping is a page and stays until the slot is removed: `drop` sees to it.
        let slot = unsafe { space.add(range, mapping.as_ptr() as u64, SlotAccess::ReadOnly)? };
        Ok(Self { space: space.clone(), slot: Some(slot), mapping })
    }
}

/// Writes `registers`, and `rest` behind them, by 32 bits at a time: vCPUs read meanwhile.
fn write(mapping: &MmapRegion, registers: &[u8], rest: u8) {
    let Ok(page) = mapping.get_slice(0, mapping.size()) else { return };
    for offset in (0..mapping.size()).step_by(4) {
        let byte = |index: usize| registers.get(offset + index).copied().unwrap_or(rest);
        let value = u32::from_le_bytes(std::array::from_fn(byte));
        // Aligned and in the page, so that neither can fail; a register that is the same is not touched.
        if page.read_obj::<u32>(offset).ok() != Some(value) {
            let _ = page.store(value, offset, Ordering::Release);
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.slot.take().map(|slot| self.space.remove(slot)) {
            tracing::error!(%error, "KVM does not take a page of registers from the guest; it stays mapped");
            std::mem::forget(Arc::clone(&self.mapping));
        }
    }
}
