//! What a machine's vCPUs say of memory types, for people and machines to read.

use std::collections::BTreeMap;

use memory_types::{MemoryType, Mtrrs, Run};

use super::{MachineInfo, RangeInfo};
use crate::vcpu::mtrr::VcpuMemoryTypes;

/// The memory types of a machine.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct MemoryTypesInfo {
    /// What each vCPU that runs has in its registers, by its number.
    pub vcpus: BTreeMap<u8, VcpuMemoryTypes>,
    /// Whether the MTRRs of all are the same, as the processor manual wants it.
    pub equal: bool,
    /// The whole address space by the MTRRs of the first vCPU; missing when the guest has cut it into too many pieces.
    pub runs: Option<Vec<Run>>,
    /// What the machine consists of, by the MTRRs of the first vCPU: a range that has several types comes in parts.
    pub ranges: Vec<TypedRange>,
}

/// A range of guest-physical addresses that has one type.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct TypedRange {
    /// The range.
    #[serde(flatten)]
    pub range: RangeInfo,
    /// What the MTRRs say: what the guest's page tables say meets it ([`memory_types::effective`]). Missing when the range
    /// is cut into too many pieces.
    pub memory_type: Option<MemoryType>,
}

impl MemoryTypesInfo {
    /// What `vcpus` say of `machine`, whose addresses have `address_bits` bits.
    pub(super) fn of(vcpus: BTreeMap<u8, VcpuMemoryTypes>, machine: &MachineInfo, address_bits: u8) -> Self {
        let first = vcpus.first_key_value().map_or(Mtrrs::BOOT, |(_, types)| types.mtrrs);
        let equal = vcpus.values().all(|types| types.mtrrs == first);
        let bars = machine.devices.iter().flat_map(|device| {
            device
                .ranges
                .iter()
                .map(|range| RangeInfo { what: format!("{} {}", device.name, range.what), ..range.clone() })
        });
        let mut ranges: Vec<_> = machine.map.iter().cloned().chain(bars).collect();
        ranges.sort_by_key(|range| (range.start, u64::MAX - range.length));
        let ranges = ranges.into_iter().flat_map(|range| parts(&range, &first, address_bits)).collect();
        Self { runs: first.runs(address_bits), equal, ranges, vcpus }
    }
}

fn parts(range: &RangeInfo, mtrrs: &Mtrrs, address_bits: u8) -> Vec<TypedRange> {
    let part = |run: Run| TypedRange {
        range: RangeInfo { start: run.start, length: run.end - run.start, what: range.what.clone() },
        memory_type: Some(run.memory_type),
    };
    match mtrrs.runs_in(range.start, range.length, address_bits) {
        Some(runs) => runs.into_iter().map(part).collect(),
        None => vec![TypedRange { range: range.clone(), memory_type: None }],
    }
}

#[cfg(test)]
mod tests {
    use memory_types::VariableRange;

    use super::*;
    use crate::manage::{DeviceInfo, MemorySize, Presence, VcpuCount};

    const PAT: u64 = 0x0007_0406_0007_0406;

    fn range(start: u64, length: u64, what: &str) -> RangeInfo {
        RangeInfo { start, length, what: what.to_owned() }
    }

    fn machine() -> MachineInfo {
        let card = DeviceInfo {
            name: "gpu".to_owned(),
            kind: "vfio".to_owned(),
            address: "0000:00:03.0".to_owned(),
            slot: 3,
            presence: Presence::Present,
            ranges: vec![range(0xC100_0000, 1 << 20, "BAR0")],
            interrupts: vec![],
            times: None,
        };
        MachineInfo {
            vcpus: VcpuCount { asked: 1, present: 1, max: 1 },
            memory: MemorySize { boot: 1 << 32, asked: 1 << 32, present: 1 << 32, max: 1 << 32 },
            balloon: None,
            hot_plug: true,
            map: vec![range(0, 0xC000_0000, "RAM"), range(0xC010_0000, 0x27F0_0000, "32-bit PCI window")],
            devices: vec![card],
        }
    }

    fn types(mtrrs: Mtrrs) -> VcpuMemoryTypes {
        VcpuMemoryTypes { mtrrs, pat: PAT }
    }

    #[test]
    fn every_range_has_the_type_of_the_first_vcpu_and_comes_in_parts_where_it_has_several() {
        let mut cut = Mtrrs::BOOT;
        cut.variable[0] = VariableRange::new(0xC000_0000, 1 << 30, MemoryType::Uncached, 46).unwrap();
        cut.variable[1] = VariableRange::new(0, 1 << 30, MemoryType::WriteThrough, 46).unwrap();
        let info = MemoryTypesInfo::of(BTreeMap::from([(0, types(cut)), (5, types(Mtrrs::BOOT))]), &machine(), 46);
        assert!(!info.equal);
        assert_eq!(info.runs.unwrap().len(), 4);
        let typed =
            |start, length, what, kind| TypedRange { range: range(start, length, what), memory_type: Some(kind) };
        let expected = [
            typed(0, 1 << 30, "RAM", MemoryType::WriteThrough),
            typed(1 << 30, 2 << 30, "RAM", MemoryType::WriteBack),
            typed(0xC010_0000, 0x27F0_0000, "32-bit PCI window", MemoryType::Uncached),
            typed(0xC100_0000, 1 << 20, "gpu BAR0", MemoryType::Uncached),
        ];
        assert_eq!(info.ranges, expected);
    }

    #[test]
    fn what_is_cut_into_too_many_pieces_is_named_without_a_type() {
        let mut pieces = Mtrrs::BOOT;
        pieces.variable[0] = VariableRange { base: 0, mask: 0x1800 };
        let info = MemoryTypesInfo::of(BTreeMap::from([(0, types(pieces))]), &machine(), 46);
        assert_eq!((info.runs, info.equal), (None, true));
        assert!(info.ranges.len() == 3 && info.ranges.iter().all(|range| range.memory_type.is_none()));
    }
}
