//! What KVM shows to the guest: host mappings as memory slots, which may come and go while the vCPUs run.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::GuestRam;
use super::layout::Range;

/// Whether the guest may write to a slot. A write to a read-only one becomes an access to a device that is not there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum SlotAccess {
    /// It may.
    ReadWrite,
    /// It may not.
    ReadOnly,
}

/// A slot that is in use; what [`AddressSpace::remove`] wants back. Not a copy: a number is used again after that.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a slot stays for the machine's life if nobody can remove it"]
pub(crate) struct SlotId(u32);

/// The memory slots of one VM; clones are the same slots, and any thread may use them.
#[derive(Clone, Debug)]
pub(crate) struct AddressSpace {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    vm: Arc<VmFd>,
    /// How many slots KVM has for a VM.
    limit: u32,
    slots: Mutex<BTreeMap<u32, Range>>,
}

impl AddressSpace {
    /// The slots of `vm`, which has none yet.
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        // Each KVM answers this; 32 is what the oldest had.
        let limit = u32::try_from(vm.check_extension_int(Cap::NrMemslots)).map_or(32, |limit| limit.max(32));
        Self { inner: Arc::new(Inner { vm, limit, slots: Mutex::default() }) }
    }

    /// Shows all of `ram` that is always there to the guest, for the machine's life.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn add_ram(&self, ram: &GuestRam) -> io::Result<()> {
        for region in ram.memory().iter().filter(|region| region.blocks().is_none()) {
            let range = Range { start: region.start_addr().0, length: region.len() };
            // SAFETY: the region is mapped as long as the guest memory, which outlives the vCPUs: the `vmm` thread
            // holds it until it has joined them.
            let _for_good = unsafe { self.add(range, region.mapping().as_ptr() as u64, SlotAccess::ReadWrite)? };
        }
        Ok(())
    }

    /// Shows the host mapping at `host` as `range` to the guest; both begin and end at a page. vCPUs may run meanwhile.
    ///
    /// # Errors
    /// When the range overlaps another slot or is not aligned, all slots are in use, or KVM refuses.
    ///
    /// # Safety
    /// `host` must be a mapping of at least the range's length that stays in place until the slot is removed or the
    /// vCPUs have ended.
    pub(crate) unsafe fn add(&self, range: Range, host: u64, access: SlotAccess) -> io::Result<SlotId> {
        let mut slots = self.slots();
        let slot = (0..self.inner.limit).find(|number| !slots.contains_key(number)).ok_or_else(|| {
            let limit = self.inner.limit;
            io::Error::other(format!(
                "all {limit} memory slots of the VM are in use; take a device or memory away first"
            ))
        })?;
        let flags = match access {
            SlotAccess::ReadWrite => 0,
            SlotAccess::ReadOnly => KVM_MEM_READONLY,
        };
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: range.start,
            memory_size: range.length,
            userspace_addr: host,
        };
        // SAFETY: as the caller promises. The slot was free, so this shrinks no other.
        unsafe { self.inner.vm.set_user_memory_region(region)? };
        slots.insert(slot, range);
        Ok(SlotId(slot))
    }

    /// Takes a slot from the guest: its next access there finds no memory. vCPUs may run meanwhile; when this returns,
    /// none of them can reach the mapping any more.
    ///
    /// # Errors
    /// When KVM refuses; the mapping must then stay in place for the machine's life.
    pub(crate) fn remove(&self, slot: SlotId) -> io::Result<()> {
        self.try_remove(slot).map_err(|(_, error)| error)
    }

    /// As [`Self::remove`], for a caller that can go on with the slot when KVM keeps it.
    ///
    /// # Errors
    /// When KVM refuses; the slot is still in use.
    pub(crate) fn try_remove(&self, slot: SlotId) -> Result<(), (SlotId, io::Error)> {
        let mut slots = self.slots();
        let Some(range) = slots.get(&slot.0).copied() else { return Err((slot, io::ErrorKind::NotFound.into())) };
        // Size 0 deletes a slot (KVM_SET_USER_MEMORY_REGION in the kernel's virt/kvm/api.rst).
        let region = kvm_userspace_memory_region { slot: slot.0, guest_phys_addr: range.start, ..Default::default() };
        // SAFETY: a slot that is deleted refers to no memory of this process.
        match unsafe { self.inner.vm.set_user_memory_region(region) } {
            Ok(()) => {
                slots.remove(&slot.0);
                Ok(())
            }
            Err(error) => Err((slot, error.into())),
        }
    }

    /// The ranges that the guest sees as memory now.
    #[cfg(test)]
    pub(crate) fn ranges(&self) -> Vec<Range> {
        self.slots().values().copied().collect()
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, Range>> {
        // A holder that panicked left the map as KVM has it: it is changed last.
        self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::mapping;

    const START: u64 = 1 << 32;
    const LENGTH: u64 = 2 << 20;

    fn space() -> AddressSpace {
        AddressSpace::new(crate::kvm::create_vm(&crate::kvm::open().unwrap()).unwrap())
    }

    fn range(number: u64) -> Range {
        Range { start: START + number * LENGTH, length: LENGTH }
    }

    #[test]
    fn a_removed_slot_frees_its_addresses_and_its_number() {
        let mapping = mapping::anonymous(2 << 20).unwrap();
        let host = mapping.as_ptr() as u64;
        let space = space();
        // SAFETY: the mapping is as long as each range and outlives the VM; no vCPU runs.
        let add = |number| unsafe { space.add(range(number), host, SlotAccess::ReadWrite) };
        let first = add(0).unwrap();
        let _second = add(1).unwrap();
        assert!(add(0).is_err(), "KVM refuses two slots for one range");
        space.remove(first).unwrap();
        assert_eq!(space.ranges(), [range(1)]);
        assert_eq!(add(0).unwrap(), SlotId(0), "the lowest free number");
        assert_eq!(add(2).unwrap(), SlotId(2));
    }

    #[test]
    fn slots_come_and_go_more_often_than_there_are_numbers() {
        let mapping = mapping::anonymous(2 << 20).unwrap();
        let space = space();
        for _ in 0..3 {
            let mut taken = Vec::new();
            for number in 0..40 {
                // SAFETY: the mapping is as long as each range and outlives the VM; no vCPU runs.
                taken.push(unsafe { space.add(range(number), mapping.as_ptr() as u64, SlotAccess::ReadOnly).unwrap() });
            }
            taken.into_iter().for_each(|slot| space.remove(slot).unwrap());
        }
        assert!(space.ranges().is_empty());
    }

    #[test]
    fn a_range_off_a_page_is_refused_and_takes_no_number() {
        let mapping = mapping::anonymous(2 << 20).unwrap();
        let space = space();
        for bad in [Range { start: START + 1, length: LENGTH }, Range { start: START, length: 100 }] {
            // SAFETY: the mapping is as long as each range and outlives the VM; no vCPU runs.
            assert!(unsafe { space.add(bad, mapping.as_ptr() as u64, SlotAccess::ReadWrite) }.is_err());
        }
        assert!(space.ranges().is_empty());
    }
}
