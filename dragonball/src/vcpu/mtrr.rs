//! The registers that decide memory types, on each vCPU: the 28 MTRRs and the PAT.
//!
//! All vCPUs start with [`Mtrrs::BOOT`]: everything is write-back by default and no range says otherwise, so that the
//! kernel may choose any type by its page tables, write-back for persistent memory and write-combining for frame buffers.
//! The processor manual wants the MTRRs of all processors to be the same (Intel SDM vol. 3A, §12.11.8), so a vCPU that
//! is added later gets what the guest has written on the first one. The PAT is not copied: each kernel programs it on
//! every processor that it starts, from its reset value, as on a real machine.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use memory_types::{MTRR_REGISTERS, MemoryType, Mtrrs};

use crate::virtio::device::{DeviceError, SavedState};
use crate::virtio::state;

/// `IA32_PAT`.
const PAT: u32 = 0x277;
/// The format of [`VcpuMemoryTypes::save`].
const VERSION: u16 = 1;

/// What decides the memory types of one vCPU.
#[derive(Clone, Copy, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct VcpuMemoryTypes {
    /// The memory type range registers.
    pub mtrrs: Mtrrs,
    /// The page attribute table, `IA32_PAT`: eight types that page table entries choose from.
    pub pat: u64,
}

impl VcpuMemoryTypes {
    /// The eight types that page table entries choose from; reserved encodings are missing.
    #[must_use]
    pub fn page_types(&self) -> [Option<MemoryType>; 8] {
        self.pat.to_le_bytes().map(MemoryType::from_pat)
    }

    /// Packs the registers, to be set on another vCPU.
    ///
    /// # Errors
    /// None that a caller could cause.
    pub fn save(&self) -> Result<SavedState, DeviceError> {
        state::encode(VERSION, self)
    }

    /// Unpacks what [`Self::save`] packed, for a vCPU whose physical addresses have `address_bits` bits.
    ///
    /// # Errors
    /// When the format is another one, or a register holds what no processor takes.
    pub fn restore(saved: &SavedState, address_bits: u8) -> Result<Self, DeviceError> {
        let made: Self = state::decode(VERSION, saved)?;
        made.mtrrs.check(address_bits).map_err(|error| DeviceError::InvalidState(error.to_string()))?;
        if made.page_types().contains(&None) {
            return Err(DeviceError::InvalidState(format!(
                "the PAT cannot be {:#x}: it has a reserved type",
                made.pat
            )));
        }
        Ok(made)
    }
}

fn entry((index, data): (u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

fn list(entries: &[kvm_msr_entry]) -> io::Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Reads the registers of a vCPU that does not run.
///
/// # Errors
/// When KVM does not give one of them.
pub(crate) fn get(vcpu: &VcpuFd) -> io::Result<VcpuMemoryTypes> {
    let numbers = Mtrrs::BOOT.registers().into_iter().chain([(PAT, 0)]);
    let mut registers = list(&numbers.map(entry).collect::<Vec<_>>())?;
    let count = vcpu.get_msrs(&mut registers)?;
    let registers = registers.as_slice();
    if let Some(missing) = registers.get(count) {
        return Err(io::Error::other(format!("KVM does not give the register {:#x}", missing.index)));
    }
    let value = |index| registers.iter().find(|entry| entry.index == index).map_or(0, |entry| entry.data);
    Ok(VcpuMemoryTypes { mtrrs: Mtrrs::read(value), pat: value(PAT) })
}

/// Sets the MTRRs of a vCPU that does not run.
///
/// # Errors
/// When KVM does not take one of them.
pub(crate) fn set(vcpu: &VcpuFd, mtrrs: &Mtrrs) -> io::Result<()> {
    let entries: [kvm_msr_entry; MTRR_REGISTERS] = mtrrs.registers().map(entry);
    let count = vcpu.set_msrs(&list(&entries)?)?;
    match entries.get(count) {
        Some(refused) => {
            Err(io::Error::other(format!("KVM does not take {:#x} in the register {:#x}", refused.data, refused.index)))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use memory_types::VariableRange;

    use super::*;
    use crate::host;
    use crate::memory::layout::{self, HighMemory};

    /// A value of the PAT as Linux sets it.
    const LINUX_PAT: u64 = 0x0407_0506_0007_0106;

    fn some() -> VcpuMemoryTypes {
        let mut mtrrs = Mtrrs { default_type: 0xc06, fixed: [0x0606_0606_0606_0606; 11], ..Mtrrs::BOOT };
        mtrrs.variable[2] = VariableRange::new(0xC000_0000, 1 << 30, MemoryType::Uncached, 36).unwrap();
        VcpuMemoryTypes { mtrrs, pat: LINUX_PAT }
    }

    #[test]
    fn registers_come_back_as_they_were_saved() {
        let saved = some().save().unwrap();
        assert_eq!(VcpuMemoryTypes::restore(&saved, 36).unwrap(), some());
    }

    #[test]
    fn a_state_that_no_processor_takes_is_refused() {
        let reserved_type = Mtrrs { default_type: 0x802, ..Mtrrs::BOOT };
        let bad_mtrr = VcpuMemoryTypes { mtrrs: reserved_type, ..some() };
        let bad_pat = VcpuMemoryTypes { pat: 2, ..some() };
        let other_version = SavedState { version: VERSION + 1, ..some().save().unwrap() };
        for bad in [bad_mtrr.save().unwrap(), bad_pat.save().unwrap(), other_version] {
            assert!(matches!(VcpuMemoryTypes::restore(&bad, 46), Err(DeviceError::InvalidState(_))));
        }
    }

    #[test]
    fn no_window_for_devices_is_uncached_by_the_registers_that_a_machine_starts_with() {
        for bits in [36, 39, 46, 52] {
            for memory in [128 << 20, 3 << 30, 64 << 30] {
                let pluggable = layout::pluggable(memory, 2 * memory);
                let Some(window) = HighMemory::above(memory, pluggable, bits).pci_window() else { continue };
                let runs = Mtrrs::BOOT.runs_in(window.start, window.length, bits).unwrap();
                assert!(runs.iter().all(|run| run.memory_type == MemoryType::WriteBack), "{bits} bits: {runs:?}");
                assert_eq!(runs.len(), 1);
            }
        }
    }

    #[test]
    fn kvm_takes_and_gives_all_registers() {
        let Ok(kvm) = crate::kvm::open() else { return eprintln!("SKIPPED: this host gives no /dev/kvm") };
        let vm = crate::kvm::create_vm(&kvm).unwrap();
        let supported = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&crate::vcpu::cpuid::for_vcpu(&supported, 0, 1).unwrap()).unwrap();
        let reset = get(&vcpu).unwrap();
        assert!(!reset.mtrrs.are_enabled());
        for wanted in [Mtrrs::BOOT, some().mtrrs] {
            set(&vcpu, &wanted).unwrap();
            assert_eq!(get(&vcpu).unwrap(), VcpuMemoryTypes { mtrrs: wanted, pat: reset.pat });
        }
        some().mtrrs.check(host::address_bits()).unwrap();
        let bad = Mtrrs { default_type: 0x802, ..Mtrrs::BOOT };
        assert!(set(&vcpu, &bad).unwrap_err().to_string().contains("0x2ff"));
    }
}
