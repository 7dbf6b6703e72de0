//! Which memory type the guest gives to its RAM, to persistent memory and to the registers of its devices.
//!
//! Two things decide: the MTRRs, of which Linux shows the variable ranges in `/proc/mtrr`, and the page tables, whose types
//! it lists in debugfs (`x86/pat_memtype_list`), where it was built with that. The file system is mounted for the moment
//! of reading alone, in no namespace: no container ever sees it.

mod parse;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use memory_types::{MemoryType, VARIABLE_RANGES, effective};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use protobuf::EnumOrUnknown;
use protocols::agent::{self, MemoryRange, MemoryTypesResponse};

use crate::error::{Error, Result};
use crate::sys;

/// The longest list of the kernel that is read, in bytes.
const LIST_MAX: u64 = 4 << 20;
/// The most ranges of an answer, so that it fits into a message.
const RANGES_MAX: usize = 16 << 10;
/// Where fixed ranges end, which Linux does not show: their bit in the default type says whether they count.
const FIXED_END: u64 = 1 << 20;
const FIXED_COUNT: u64 = 1 << 10;
const MTRRS_COUNT: u64 = 1 << 11;

/// Addresses in a row, and what is there or which type they have.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Range<T> {
    start: u64,
    /// The address after the last.
    end: u64,
    is: T,
}

/// What the guest's kernel tells.
struct Sources {
    mtrrs: Vec<Range<MemoryType>>,
    /// Nothing where the kernel does not show them.
    page_tables: Option<Vec<Range<MemoryType>>>,
    /// RAM, persistent memory, registers: ascending.
    ranges: Vec<Range<String>>,
    /// `IA32_MTRR_DEF_TYPE`, where the host knows it.
    default_type: Option<u64>,
}

/// Reads what the kernel tells, and says what comes of it.
pub(crate) fn collect(default_type: Option<u64>) -> Result<MemoryTypesResponse> {
    // A processor without MTRRs has no such file; everything has the default type then.
    let mtrrs = read_if_there(Path::new("/proc/mtrr"))?.map_or_else(Vec::new, |text| parse::mtrrs(&text));
    let page_tables = page_table_types().map(|text| parse::page_table_types(&text));
    let iomem = read_if_there(Path::new("/proc/iomem"))?.unwrap_or_default();
    let mut ranges = parse::ram(&iomem);
    ranges.extend(persistent_memory(Path::new("/sys/bus/nd/devices"))?);
    ranges.extend(registers(Path::new("/sys/bus/pci/devices"))?);
    ranges.sort_by_key(|range| range.start);
    Sources { mtrrs, page_tables, ranges, default_type }.answer()
}

impl Sources {
    fn answer(&self) -> Result<MemoryTypesResponse> {
        let mut ranges = Vec::new();
        for range in &self.ranges {
            ranges.extend(self.parts(range));
            if ranges.len() > RANGES_MAX {
                return Err(Error::precondition(format!("the guest has more than {RANGES_MAX} ranges of memory")));
            }
        }
        let variable = |range: &Range<MemoryType>| MemoryRange {
            start: range.start,
            length: range.end - range.start,
            mtrr: message(Some(range.is)),
            ..Default::default()
        };
        Ok(MemoryTypesResponse {
            variable_ranges: self.mtrrs.iter().map(variable).collect(),
            page_tables_shown: self.page_tables.is_some(),
            ranges,
            ..Default::default()
        })
    }

    /// The parts of `range` that differ in their types.
    fn parts(&self, range: &Range<String>) -> Vec<MemoryRange> {
        let page_tables = self.page_tables.as_deref().unwrap_or_default();
        let typed = self.mtrrs.iter().chain(page_tables);
        let edges = typed.flat_map(|typed| [typed.start, typed.end]).chain([FIXED_END]);
        let mut edges: Vec<u64> = edges.filter(|edge| (range.start + 1..range.end).contains(edge)).collect();
        edges.extend([range.start, range.end]);
        edges.sort_unstable();
        edges.dedup();
        let mut parts: Vec<MemoryRange> = Vec::new();
        for edge in edges.windows(2) {
            let part = self.part(&range.is, edge[0], edge[1]);
            let types = |part: &MemoryRange| (part.mtrr, part.page_tables, part.effective);
            match parts.last_mut() {
                Some(last) if types(last) == types(&part) => last.length += part.length,
                _ => parts.push(part),
            }
        }
        parts
    }

    /// A part that has one type.
    fn part(&self, what: &str, start: u64, end: u64) -> MemoryRange {
        let mtrr = self.mtrr_type_at(start);
        let listed = type_at(self.page_tables.as_deref().unwrap_or_default(), start);
        // The kernel's own map of all RAM, which no list repeats.
        let page_tables = listed.or_else(|| (what == parse::RAM).then_some(MemoryType::WriteBack));
        let effective = match (mtrr, page_tables) {
            (Some(mtrr), Some(pages)) => Some(effective(mtrr, pages)),
            // These are what they are whatever the MTRRs say.
            (None, Some(pages @ (MemoryType::Uncached | MemoryType::WriteCombining))) => Some(pages),
            // Linux lists it only where it found the MTRRs to say the same (`pat_x_mtrr_type` in its memtype.c).
            (None, Some(MemoryType::WriteBack)) if listed.is_some() => Some(MemoryType::WriteBack),
            _ => None,
        };
        MemoryRange {
            start,
            length: end - start,
            what: what.to_owned(),
            mtrr: message(mtrr),
            page_tables: message(page_tables),
            effective: message(effective),
            ..Default::default()
        }
    }

    fn mtrr_type_at(&self, address: u64) -> Option<MemoryType> {
        let default = self.default_type;
        if default.is_some_and(|default| default & MTRRS_COUNT == 0) {
            return Some(MemoryType::Uncached);
        }
        if default.is_some_and(|default| default & FIXED_COUNT != 0) && address < FIXED_END {
            return None;
        }
        let variable = self.mtrrs.iter().filter(|range| (range.start..range.end).contains(&address));
        memory_types::overlap(variable.map(|range| Some(range.is)))
            .or_else(|| MemoryType::from_mtrr(default?.to_le_bytes()[0]))
    }
}

fn type_at(ranges: &[Range<MemoryType>], address: u64) -> Option<MemoryType> {
    ranges.iter().find(|range| (range.start..range.end).contains(&address)).map(|range| range.is)
}

fn message(kind: Option<MemoryType>) -> EnumOrUnknown<agent::MemoryType> {
    EnumOrUnknown::new(match kind {
        None => agent::MemoryType::UNKNOWN,
        Some(MemoryType::Uncached) => agent::MemoryType::UNCACHED,
        Some(MemoryType::UncachedMinus) => agent::MemoryType::UNCACHED_MINUS,
        Some(MemoryType::WriteCombining) => agent::MemoryType::WRITE_COMBINING,
        Some(MemoryType::WriteThrough) => agent::MemoryType::WRITE_THROUGH,
        Some(MemoryType::WriteProtected) => agent::MemoryType::WRITE_PROTECTED,
        Some(MemoryType::WriteBack) => agent::MemoryType::WRITE_BACK,
    })
}

/// The kernel's list of the types of its page tables; nothing where it shows none.
fn page_table_types() -> Option<String> {
    let read = || -> io::Result<String> {
        let root: OwnedFd = sys::mount_detached(c"debugfs")?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(&root, "x86/pat_memtype_list", flags, Mode::empty())?;
        read_bounded(File::from(file))
    };
    read().inspect_err(|error| tracing::debug!(%error, "the types of page tables are not shown")).ok()
}

fn read_bounded(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(LIST_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match File::open(path).and_then(read_bounded) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("cannot read {}", path.display()))(error)),
    }
}

/// The regions of persistent memory. Their attributes are numbers in C's notation.
fn persistent_memory(devices: &Path) -> Result<Vec<Range<String>>> {
    let mut found = Vec::new();
    for name in names(devices)?.into_iter().filter(|name| name.starts_with("region")) {
        let attribute = |attribute: &str| -> Result<Option<u64>> {
            let text = read_if_there(&devices.join(&name).join(attribute))?;
            Ok(text.and_then(|text| parse::number(text.trim())))
        };
        if let (Some(start), Some(size)) = (attribute("resource")?, attribute("size")?)
            && let Some(end) = start.checked_add(size).filter(|end| *end > start)
        {
            found.push(Range { start, end, is: "persistent memory".to_owned() });
        }
    }
    Ok(found)
}

/// The base address registers of all PCI devices.
fn registers(devices: &Path) -> Result<Vec<Range<String>>> {
    let mut found = Vec::new();
    for name in names(devices)? {
        let text = read_if_there(&devices.join(&name).join("resource"))?.unwrap_or_default();
        found.extend(parse::registers(&name, &text));
    }
    Ok(found)
}

/// The entries of a directory of sysfs; none where there is no such bus.
fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(format!("cannot list {}", directory.display()))(error)),
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// There are no more variable ranges than this; a longer list is not the kernel's.
const MTRRS_MAX: usize = 16 * VARIABLE_RANGES;

#[cfg(test)]
mod tests;
