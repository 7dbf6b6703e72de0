//! What the CPUID instruction tells the guest: what KVM supports, with the machine's topology and without what a guest
//! of ours would only lose time on.
//!
//! Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.

use std::io;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Where a field lies in a register: lowest bit and width.
#[derive(Clone, Copy)]
struct Field(u32, u32);

impl Field {
    fn set(self, register: &mut u32, value: u32) {
        let mask = ((1_u64 << self.1) - 1) << self.0;
        // The mask lies within 32 bits.
        let mask = u32::try_from(mask).unwrap_or(u32::MAX);
        *register = *register & !mask | value << self.0 & mask;
    }
}

const INITIAL_APIC_ID: Field = Field(24, 8);
const LOGICAL_PROCESSORS: Field = Field(16, 8);

mod leaf_1 {
    pub(super) const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const ECX_X2APIC: u32 = 1 << 21;
    pub(super) const ECX_HYPERVISOR: u32 = 1 << 31;
    pub(super) const ECX_PERFORMANCE: u32 = 1 << 15;
    pub(super) const EDX_MTRR: u32 = 1 << 12;
    pub(super) const EDX_PAT: u32 = 1 << 16;
    pub(super) const EDX_HTT: u32 = 1 << 28;
    pub(super) const EDX_DEBUG_STORE: u32 = 1 << 21;
}

/// AMD's performance counters: `PerfCtrExtCore` and `PerfCtrExtNB` in leaf 0x8000_0001 ECX.
const AMD_COUNTERS: u32 = 1 << 23 | 1 << 24;

/// The table of the vCPU with APIC id `id` among `count`: one socket with one thread per core.
///
/// # Errors
/// When the table would be longer than KVM takes.
pub(crate) fn for_vcpu(supported: &CpuId, id: u8, count: u8) -> io::Result<CpuId> {
    let (id, count) = (u32::from(id), u32::from(count));
    let supported = supported.as_slice();
    let mut entries: Vec<_> = supported.iter().filter(|entry| !TOPOLOGY.contains(&entry.function)).copied().collect();
    for entry in &mut entries {
        adjust(entry, id, count);
    }
    for leaf in TOPOLOGY {
        if supported.iter().any(|entry| entry.function == leaf) {
            entries.extend(extended_topology(leaf, id, count));
        }
    }
    CpuId::from_entries(&entries).map_err(|_| io::Error::other("the CPUID table is longer than KVM takes"))
}

/// The leaves of the extended topology. KVM gives them without content: they are the VMM's to fill.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

fn adjust(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    match entry.function {
        0x1 => features(entry, id, count),
        0x4 => intel_cache(entry, count),
        // Performance counters: their probing costs exits, and what they count belongs to the host.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !AMD_COUNTERS,
        0x8000_0008 => amd_core_count(entry, count),
        0x8000_001d => amd_cache(entry, count),
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

fn features(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    INITIAL_APIC_ID.set(&mut entry.ebx, id);
    LOGICAL_PROCESSORS.set(&mut entry.ebx, count);
    entry.ecx |= leaf_1::ECX_HYPERVISOR | leaf_1::ECX_TSC_DEADLINE | leaf_1::ECX_X2APIC;
    entry.ecx &= !leaf_1::ECX_PERFORMANCE;
    entry.edx |= leaf_1::EDX_MTRR | leaf_1::EDX_PAT;
    entry.edx &= !leaf_1::EDX_DEBUG_STORE;
    if count > 1 {
        entry.edx |= leaf_1::EDX_HTT;
    } else {
        entry.edx &= !leaf_1::EDX_HTT;
    }
}

/// Bits that number `count` things: the width of the core part of an APIC id.
fn id_width(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

/// Leaf 4 (and AMD's 0x8000_001D): caches of level 1 and 2 belong to one core, the last level to all.
fn intel_cache(entry: &mut kvm_cpuid_entry2, count: u32) {
    const CORES: Field = Field(26, 6);
    if entry.eax & 0x1f != 0 {
        sharing(entry, count);
        CORES.set(&mut entry.eax, ((1 << id_width(count)) - 1).min(63));
    }
}

fn amd_cache(entry: &mut kvm_cpuid_entry2, count: u32) {
    if entry.eax & 0x1f != 0 {
        sharing(entry, count);
    }
}

fn sharing(entry: &mut kvm_cpuid_entry2, count: u32) {
    const SHARERS: Field = Field(14, 12);
    let level = entry.eax >> 5 & 7;
    SHARERS.set(&mut entry.eax, if level < 3 { 0 } else { count - 1 });
}

/// Leaves 0xB and 0x1F: subleaf 0 is the thread, 1 the core, 2 ends the list.
fn extended_topology(leaf: u32, id: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let levels = [(0, 1, THREAD << 8), (id_width(count), count, CORE << 8 | 1), (0, 0, 2)];
    let mut index = 0;
    levels.map(|(eax, ebx, ecx)| {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        let entry = kvm_cpuid_entry2 { function: leaf, index, flags, eax, ebx, ecx, edx: id, ..Default::default() };
        index += 1;
        entry
    })
}

fn amd_core_count(entry: &mut kvm_cpuid_entry2, count: u32) {
    const CORES: Field = Field(0, 8);
    const APIC_ID_WIDTH: Field = Field(12, 4);
    CORES.set(&mut entry.ecx, count - 1);
    APIC_ID_WIDTH.set(&mut entry.ecx, id_width(count));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    /// The entry of a leaf and subleaf in the table of a vCPU.
    fn lookup(id: u8, count: u8, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let supported = [1, 4, 0xa, 0xb, 0x8000_0008, 0x8000_001e].map(|leaf| entry(leaf, 0));
        let table = for_vcpu(&CpuId::from_entries(&supported).unwrap(), id, count).unwrap();
        let mut found = table.as_slice().iter().filter(|entry| (entry.function, entry.index) == (function, index));
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "only once");
        entry
    }

    #[test]
    fn every_place_that_names_the_apic_id_agrees() {
        for (id, count) in [(0, 1), (0, 2), (3, 4), (200, 254)] {
            let expected = u32::from(id);
            assert_eq!(lookup(id, count, 1, 0).ebx >> 24, expected);
            assert!((0..3).all(|index| lookup(id, count, 0xb, index).edx == expected));
            assert_eq!(lookup(id, count, 0x8000_001e, 0).eax, expected);
        }
    }

    #[test]
    fn the_core_count_is_the_same_by_every_way_of_asking() {
        for count in [1_u8, 2, 3, 8, 254] {
            let leaf = |function, index| lookup(0, count, function, index);
            let count = u32::from(count);
            assert_eq!(leaf(1, 0).ebx >> 16 & 0xff, count);
            assert_eq!(leaf(0xb, 1).ebx, count);
            assert!(1 << leaf(0xb, 1).eax >= count, "the id is wide enough");
            assert_eq!(leaf(0x8000_0008, 0).ecx & 0xff, count - 1);
            assert_eq!(leaf(1, 0).edx & leaf_1::EDX_HTT != 0, count > 1);
        }
    }

    #[test]
    fn counters_are_hidden_and_memory_types_shown() {
        assert_eq!(lookup(0, 1, 0xa, 0).eax, 0);
        let types = leaf_1::EDX_MTRR | leaf_1::EDX_PAT;
        assert_eq!(lookup(0, 1, 1, 0).edx & types, types);
    }
}
