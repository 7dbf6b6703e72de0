//! What is made of the kernel's lists.

use memory_types::MemoryType::{Uncached, UncachedMinus, WriteBack, WriteCombining};

use super::*;

const MTRRS: &str = "\
reg00: base=0x0e0000000 ( 3584MB), size=   16MB, count=1: uncachable
reg01: base=0x000000000 (    0MB), size=  512KB, count=1: write-back
";
const PAGE_TABLES: &str = "\
PAT memtype list:
PAT: [mem 0x00000000c0100000-0x00000000c0104000] uncached-minus
PAT: [mem 0x0000000100000000-0x0000000101000000] write-back
PAT: [mem 0x0000004000000000-0x0000004000001000] write-combining
";
const IOMEM: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-0fffffff : System RAM
  01000000-01a02f0c : Kernel code
140000000-14fffffff : virtio0
  140000000-147ffffff : System RAM (virtio_mem)
";
const RESOURCE: &str = "\
0x00000000c0100000 0x00000000c0103fff 0x0000000000040200
0x0000004000000000 0x00000041ffffffff 0x000000000014220c
0x0000000000000000 0x0000000000000000 0x0000000000000000
0x000000000000c000 0x000000000000c01f 0x0000000000040101
";

fn range<T>(start: u64, end: u64, is: T) -> Range<T> {
    Range { start, end, is }
}

fn sources(default_type: Option<u64>) -> Sources {
    let mut ranges = parse::ram(IOMEM);
    ranges.push(range(1 << 32, (1 << 32) + (16 << 20), "persistent memory".to_owned()));
    ranges.extend(parse::registers("0000:00:03.0", RESOURCE));
    let page_tables = Some(parse::page_table_types(PAGE_TABLES));
    Sources { mtrrs: parse::mtrrs(MTRRS), page_tables, ranges, default_type }
}

/// Start, length, and the three types of the ranges of this name.
fn types(answer: &MemoryTypesResponse, what: &str) -> Vec<(u64, u64, [agent::MemoryType; 3])> {
    let of = |range: &MemoryRange| {
        let types = [range.mtrr, range.page_tables, range.effective].map(|kind| kind.enum_value().unwrap());
        (range.start, range.length, types)
    };
    answer.ranges.iter().filter(|range| range.what == what).map(of).collect()
}

#[test]
fn lists_of_the_kernel_are_understood() {
    let mtrrs = [range(0xe000_0000, 0xe100_0000, Uncached), range(0, 512 << 10, WriteBack)];
    assert_eq!(parse::mtrrs(MTRRS), mtrrs);
    let page_tables = [
        range(0xc010_0000, 0xc010_4000, UncachedMinus),
        range(1 << 32, 0x1_0100_0000, WriteBack),
        range(0x40_0000_0000, 0x40_0000_1000, WriteCombining),
    ];
    assert_eq!(parse::page_table_types(PAGE_TABLES), page_tables);
    let ram = [(0x1000, 0x9_fc00), (0x10_0000, 0x1000_0000), (0x1_4000_0000, 0x1_4800_0000)];
    assert_eq!(parse::ram(IOMEM), ram.map(|(start, end)| range(start, end, "RAM".to_owned())));
    let registers = [(0xc010_0000, 0xc010_4000, "d BAR0"), (0x40_0000_0000, 0x42_0000_0000, "d BAR1")];
    let registers = registers.map(|(start, end, name)| range(start, end, name.to_owned()));
    assert_eq!(parse::registers("d", RESOURCE), registers);
}

#[test]
fn what_is_no_list_of_the_kernel_gives_nothing_and_does_no_harm() {
    let lines = [
        "",
        ":",
        "base=",
        "reg00: base=0xffffffffffffffff ( 1MB), size=99999999999999999999MB, count=1: write-back",
        "reg00: base=0xfffffffffffff000 (MB), size=8MB, count=1: write-back",
        "reg00: base=0x0 (0MB), size=0MB, count=1: write-back",
        "PAT: [mem 0x2-0x1] write-back",
        "PAT: [mem 0x1-0x2] what",
        "[mem -]",
        "ffffffffffffffff-ffffffffffffffff : System RAM",
        "5-4 : System RAM",
        "0x5 0x4 0x200",
        "0x5 0xffffffffffffffff 0x200",
        "0x5",
    ];
    for line in lines {
        assert_eq!(parse::mtrrs(line), [], "{line}");
        assert_eq!(parse::page_table_types(line), [], "{line}");
        assert_eq!(parse::ram(line), [], "{line}");
        assert_eq!(parse::registers("d", line), [], "{line}");
    }
}

#[test]
fn every_range_has_the_types_that_both_lists_give_it() {
    use agent::MemoryType::{UNCACHED, UNCACHED_MINUS, UNKNOWN, WRITE_BACK, WRITE_COMBINING};
    let answer = sources(Some(0x806)).answer().unwrap();
    assert_eq!((answer.variable_ranges.len(), answer.page_tables_shown), (2, true));
    assert_eq!(types(&answer, "RAM")[1], (0x10_0000, 0xff0_0000, [WRITE_BACK; 3]));
    assert_eq!(types(&answer, "persistent memory"), [(1 << 32, 16 << 20, [WRITE_BACK; 3])]);
    let bar = [(0xc010_0000, 0x4000, [WRITE_BACK, UNCACHED_MINUS, UNCACHED])];
    assert_eq!(types(&answer, "0000:00:03.0 BAR0"), bar);
    // A page of it is mapped, the rest is not.
    let video = [
        (0x40_0000_0000, 0x1000, [WRITE_BACK, WRITE_COMBINING, WRITE_COMBINING]),
        (0x40_0000_1000, 0x1_ffff_f000, [WRITE_BACK, UNKNOWN, UNKNOWN]),
    ];
    assert_eq!(types(&answer, "0000:00:03.0 BAR1"), video);
}

#[test]
fn without_the_default_type_only_what_page_tables_decide_is_known() {
    use agent::MemoryType::{UNCACHED_MINUS, UNKNOWN, WRITE_BACK, WRITE_COMBINING};
    let answer = sources(None).answer().unwrap();
    let ram = types(&answer, "RAM");
    assert_eq!(ram[0], (0x1000, (512 << 10) - 0x1000, [WRITE_BACK; 3]), "a variable range covers it");
    assert_eq!(ram[2], (0x10_0000, 0xff0_0000, [UNKNOWN, WRITE_BACK, UNKNOWN]));
    assert_eq!(types(&answer, "persistent memory")[0].2, [UNKNOWN, WRITE_BACK, WRITE_BACK]);
    assert_eq!(types(&answer, "0000:00:03.0 BAR0")[0].2, [UNKNOWN, UNCACHED_MINUS, UNKNOWN]);
    assert_eq!(types(&answer, "0000:00:03.0 BAR1")[0].2, [UNKNOWN, WRITE_COMBINING, WRITE_COMBINING]);
}

#[test]
fn fixed_ranges_and_mtrrs_that_are_off_are_not_guessed_away() {
    use agent::MemoryType::{UNCACHED, UNKNOWN, WRITE_BACK};
    let fixed = sources(Some(0xc06)).answer().unwrap();
    assert_eq!(types(&fixed, "RAM")[0].2, [UNKNOWN, WRITE_BACK, UNKNOWN]);
    assert_eq!(types(&fixed, "RAM")[1].2, [WRITE_BACK; 3]);
    let off = sources(Some(0)).answer().unwrap();
    assert!(types(&off, "RAM").iter().all(|(.., types)| *types == [UNCACHED, WRITE_BACK, UNCACHED]));
}

#[test]
fn a_kernel_that_does_not_show_its_page_tables_is_said_to() {
    use agent::MemoryType::{UNKNOWN, WRITE_BACK};
    let answer = Sources { page_tables: None, ..sources(Some(0x806)) }.answer().unwrap();
    assert!(!answer.page_tables_shown);
    assert_eq!(types(&answer, "0000:00:03.0 BAR1")[0].2, [WRITE_BACK, UNKNOWN, UNKNOWN]);
}
