//! The memory types of a machine as a table.

use dragonball::VcpuMemoryTypes;
use dragonball::manage::MemoryTypesInfo;
use memory_types::{MemoryType, Mtrrs};

use crate::ctl::size;

/// What the vCPUs have in their registers, and what that means for the machine's ranges.
pub(crate) fn table(info: &MemoryTypesInfo) -> String {
    let mut lines = vcpus(info);
    lines.push(String::new());
    match &info.runs {
        Some(runs) => {
            lines.push("address space".to_owned());
            lines.extend(runs.iter().map(|run| row(run.start, run.end - run.start, Some(run.memory_type), "")));
        }
        None => lines.push("address space: the guest's ranges cut it into too many pieces to show".to_owned()),
    }
    lines.push(String::new());
    lines.push("the machine's ranges".to_owned());
    let ranges = info.ranges.iter().map(|typed| (&typed.range, typed.memory_type));
    lines.extend(ranges.map(|(range, kind)| row(range.start, range.length, kind, &range.what)));
    lines.join("\n") + "\n"
}

/// One line for all vCPUs where they are equal, else one for each.
fn vcpus(info: &MemoryTypesInfo) -> Vec<String> {
    match info.vcpus.first_key_value() {
        Some((_, first)) if info.vcpus.values().all(|types| types == first) => {
            let who = match info.vcpus.len() {
                1 => "vCPU 0".to_owned(),
                count => format!("all {count} vCPUs"),
            };
            vec![registers(&who, first)]
        }
        _ => {
            let head = if info.equal {
                "the vCPUs have equal MTRRs and different PATs: each has its reset value until the guest starts it"
            } else {
                "the vCPUs have DIFFERENT MTRRs: the guest has not made them equal (yet)"
            };
            let each = info.vcpus.iter().map(|(id, types)| registers(&format!("vCPU {id}"), types));
            std::iter::once(head.to_owned()).chain(each).collect()
        }
    }
}

fn registers(who: &str, types: &VcpuMemoryTypes) -> String {
    let Mtrrs { variable, .. } = types.mtrrs;
    let default = if types.mtrrs.are_enabled() {
        types.mtrrs.default_memory_type().to_string()
    } else {
        "MTRRs are off, everything is uncached".to_owned()
    };
    let fixed = if types.mtrrs.has_fixed() { "on" } else { "off" };
    let used = variable.iter().filter(|range| range.is_valid()).count();
    let pat = types.page_types().map(|kind| kind.map_or("?", short));
    let count = variable.len();
    format!("{who}: default {default}; fixed ranges {fixed}; {used} of {count} variable ranges; PAT {}", pat.join(" "))
}

/// The types' names in the processor manual.
const fn short(kind: MemoryType) -> &'static str {
    match kind {
        MemoryType::Uncached => "UC",
        MemoryType::UncachedMinus => "UC-",
        MemoryType::WriteCombining => "WC",
        MemoryType::WriteThrough => "WT",
        MemoryType::WriteProtected => "WP",
        MemoryType::WriteBack => "WB",
    }
}

fn row(start: u64, length: u64, kind: Option<MemoryType>, what: &str) -> String {
    let kind = kind.map_or_else(|| "many".to_owned(), |kind| kind.to_string());
    let end = start + length.saturating_sub(1);
    let line = format!("  {start:#014x} – {end:#014x}  {kind:<15}  {:>9}  {what}", size(length));
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use dragonball::manage::{RangeInfo, TypedRange};

    use super::*;

    fn info(second: Mtrrs) -> MemoryTypesInfo {
        let types = |mtrrs| VcpuMemoryTypes { mtrrs, pat: 0x0007_0406_0007_0406 };
        let ram = RangeInfo { start: 0, length: 128 << 20, what: "RAM".to_owned() };
        MemoryTypesInfo {
            vcpus: BTreeMap::from([(0, types(Mtrrs::BOOT)), (1, types(second))]),
            equal: second == Mtrrs::BOOT,
            runs: Mtrrs::BOOT.runs(46),
            ranges: vec![TypedRange { range: ram, memory_type: Some(MemoryType::WriteBack) }],
        }
    }

    #[test]
    fn equal_vcpus_are_one_line() {
        let expected = "\
all 2 vCPUs: default write-back; fixed ranges off; 0 of 8 variable ranges; PAT WB WT UC- UC WB WT UC- UC

address space
  0x000000000000 – 0x3fffffffffff  write-back          64 TiB

the machine's ranges
  0x000000000000 – 0x000007ffffff  write-back         128 MiB  RAM
";
        assert_eq!(table(&info(Mtrrs::BOOT)), expected);
    }

    #[test]
    fn different_vcpus_are_named_each() {
        let off = Mtrrs { default_type: 0, ..Mtrrs::BOOT };
        let text = table(&info(off));
        assert!(text.contains("DIFFERENT") && text.contains("vCPU 1: default MTRRs are off"), "{text}");
    }
}
