//! The kernel's lists of memory as text.

use memory_types::MemoryType;

use super::{MTRRS_MAX, Range};

/// What RAM is called in an answer.
pub(super) const RAM: &str = "RAM";
/// The most lines of a list that count.
const LINES_MAX: usize = 32 << 10;

/// A number in C's notation.
pub(super) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// `/proc/mtrr`: lines like `reg00: base=0x0e0000000 ( 3584MB), size=   16MB, count=1: uncachable`.
pub(super) fn mtrrs(text: &str) -> Vec<Range<MemoryType>> {
    let range = |line: &str| {
        let (_, base) = line.split_once("base=")?;
        let start = number(base.split_whitespace().next()?)?;
        let (_, size) = line.split_once("size=")?;
        let size = size.split_once(',')?.0.trim();
        let (unit, digits) = match size.strip_suffix("MB") {
            Some(digits) => (20, digits),
            None => (10, size.strip_suffix("KB")?),
        };
        let length = digits.parse::<u64>().ok()?.checked_mul(1 << unit).filter(|length| *length > 0)?;
        let is = MemoryType::from_linux(line.rsplit(':').next()?.trim())?;
        Some(Range { start, end: start.checked_add(length)?, is })
    };
    text.lines().take(MTRRS_MAX).filter_map(range).collect()
}

/// debugfs's `x86/pat_memtype_list`: lines like `PAT: [mem 0x00000000c0100000-0x00000000c0104000] uncached-minus`, whose
/// second address is the one after the last.
pub(super) fn page_table_types(text: &str) -> Vec<Range<MemoryType>> {
    let range = |line: &str| {
        let (addresses, kind) = line.split_once("[mem ")?.1.split_once(']')?;
        let (start, end) = addresses.split_once('-')?;
        let (start, end) = (number(start.trim())?, number(end.trim())?);
        (start < end).then_some(Range { start, end, is: MemoryType::from_linux(kind.trim())? })
    };
    text.lines().take(LINES_MAX).filter_map(range).collect()
}

/// The RAM in `/proc/iomem`: lines like `00100000-bfffffff : System RAM`, further ones below a device that adds memory.
pub(super) fn ram(text: &str) -> Vec<Range<String>> {
    let range = |line: &str| {
        let (addresses, name) = line.split_once(" : ")?;
        let (start, last) = addresses.trim().split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(last, 16).ok()?.checked_add(1)?;
        (name.starts_with("System RAM") && start < end).then(|| Range { start, end, is: RAM.to_owned() })
    };
    text.lines().take(LINES_MAX).filter_map(range).collect()
}

/// A PCI device's `resource` in sysfs: a line of first address, last address and flags for each of its resources, of
/// which the first six are its base address registers.
pub(super) fn registers(device: &str, text: &str) -> Vec<Range<String>> {
    const REGISTERS: usize = 6;
    /// `IORESOURCE_MEM` (linux/ioport.h).
    const MEMORY: u64 = 0x200;
    let range = |(index, line): (usize, &str)| {
        let mut fields = line.split_whitespace().map(number);
        let (start, last, flags) = (fields.next()??, fields.next()??, fields.next()??);
        let end = last.checked_add(1)?;
        (flags & MEMORY != 0 && start != 0 && start < end).then(|| Range {
            start,
            end,
            is: format!("{device} BAR{index}"),
        })
    };
    text.lines().take(REGISTERS).enumerate().filter_map(range).collect()
}
