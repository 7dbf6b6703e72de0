//! What the kernel tells of a pod process: its memory, that of its guest, its processors.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use journal::ProcessId;
use serde::Serialize;

/// What dragonball calls guest memory in `/proc/<pid>/smaps`.
const GUEST_RAM: &str = "[anon:guest-ram]";

/// A pod process and its machine, as far as the kernel knows them. Sizes are in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Usage {
    /// Resident memory of the pod process without its guest's.
    pub(super) own_rss: u64,
    /// The same, each page divided by the number of its users.
    pub(super) own_pss: u64,
    /// Guest memory; none where the kernel keeps no names of anonymous memory: the guest's is counted as the process's
    /// own there.
    pub(super) guest: Option<GuestMemory>,
    /// vCPUs; 0 before the machine starts.
    pub(super) vcpus: usize,
    /// Time on the host's CPUs that all threads took, vCPUs included, in seconds.
    pub(super) cpu_seconds: f64,
}

/// Guest memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct GuestMemory {
    /// What the guest has.
    pub(super) size: u64,
    /// What of it the host has given: pages that were touched and not given back.
    pub(super) resident: u64,
}

impl Usage {
    /// What ending the sandbox would free, about.
    pub(super) fn total(&self) -> u64 {
        self.own_pss + self.guest.map_or(0, |guest| guest.resident)
    }

    /// Of a running process; nothing when it has ended meanwhile.
    pub(super) fn of(process: ProcessId) -> std::io::Result<Option<Self>> {
        let directory = PathBuf::from(format!("/proc/{}", process.pid));
        let read = || -> std::io::Result<Self> {
            let maps = parse(BufReader::new(std::fs::File::open(directory.join("smaps"))?))?;
            let mut usage = sum(&maps);
            usage.vcpus = count_vcpus(&directory)?;
            usage.cpu_seconds = cpu_seconds(&std::fs::read_to_string(directory.join("stat"))?);
            Ok(usage)
        };
        match read() {
            // A number that was read while its process ended may be another's by now.
            _ if !process.is_alive() => Ok(None),
            result => result.map(Some),
        }
    }
}

/// One map of a process.
#[derive(Debug, Default)]
struct Map {
    start: u64,
    end: u64,
    writable: bool,
    /// Of a file.
    file: bool,
    guest: bool,
    rss: u64,
    pss: u64,
}

/// Reads `/proc/<pid>/smaps` (proc(5)): a line with the range of each map, and lines of its properties.
fn parse(text: impl BufRead) -> std::io::Result<Vec<Map>> {
    let mut maps: Vec<Map> = Vec::new();
    for line in text.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, end)) = range(first) {
            let permissions = words.next().unwrap_or_default();
            let inode = words.nth(2).unwrap_or("0");
            maps.push(Map {
                start,
                end,
                writable: permissions.contains('w'),
                file: inode != "0",
                guest: words.next() == Some(GUEST_RAM),
                ..Map::default()
            });
            continue;
        }
        let bytes = words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or_default().saturating_mul(1024);
        match (first, maps.last_mut()) {
            ("Rss:", Some(map)) => map.rss = bytes,
            ("Pss:", Some(map)) => map.pss = bytes,
            _ => {}
        }
    }
    Ok(maps)
}

fn range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

fn sum(maps: &[Map]) -> Usage {
    let mut usage = Usage::default();
    let mut guest = GuestMemory::default();
    for (number, map) in maps.iter().enumerate() {
        if map.guest || is_kernel(maps, number) {
            // What is reserved for memory that may come can be accessed by nobody.
            guest.size += if map.writable { map.end - map.start } else { 0 };
            guest.resident += map.rss;
        } else {
            usage.own_rss += map.rss;
            usage.own_pss += map.pss;
        }
    }
    usage.guest = maps.iter().any(|map| map.guest).then_some(guest);
    usage
}

/// Whether this is the guest's kernel: pages of its file that are mapped in the middle of guest memory.
fn is_kernel(maps: &[Map], number: usize) -> bool {
    let piece = |map: &Map| map.file && map.writable;
    let adjoin = |lower: &Map, upper: &Map| lower.end == upper.start;
    if !maps.get(number).is_some_and(piece) {
        return false;
    }
    let below = (1..=number).rev().take_while(|at| adjoin(&maps[at - 1], &maps[*at])).map(|at| &maps[at - 1]);
    let above = (number + 1..maps.len()).take_while(|at| adjoin(&maps[at - 1], &maps[*at])).map(|at| &maps[at]);
    let reaches_guest =
        |mut others: Box<dyn Iterator<Item = &Map> + '_>| others.find(|map| !piece(map)).is_some_and(|map| map.guest);
    reaches_guest(Box::new(below)) && reaches_guest(Box::new(above))
}

/// Each vCPU is a thread of its own, which ends when the vCPU leaves.
fn count_vcpus(directory: &std::path::Path) -> std::io::Result<usize> {
    let mut count = 0;
    for thread in std::fs::read_dir(directory.join("task"))? {
        // A thread may end while it is looked at.
        let name = std::fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
        let number = name.trim_end().strip_prefix("vcpu").unwrap_or_default();
        count += usize::from(!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
    }
    Ok(count)
}

/// Fields 14 and 15 of `/proc/<pid>/stat`; the first one behind the name, which may hold spaces, is field 3.
fn cpu_seconds(stat: &str) -> f64 {
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields).unwrap_or_default();
    let ticks: u64 =
        fields.split_ascii_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // The kernel's interface has this unit on every architecture that this runs on (USER_HZ).
    const TICKS: f64 = 100.0;
    #[expect(clippy::cast_precision_loss, reason = "a count of ticks has far less than 53 bits")]
    let ticks = ticks as f64;
    ticks / TICKS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(lines: &[(&str, u64, u64)]) -> Vec<Map> {
        let text: String = lines
            .iter()
            .map(|(head, rss, pss)| format!("{head}\nSize: 1 kB\nRss: {rss} kB\nPss: {pss} kB\nPss_Dirty: 7 kB\n"))
            .collect();
        parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn guest_memory_is_told_from_the_process_and_from_what_is_only_reserved() {
        let usage = sum(&maps(&[
            ("1000-2000 r-xp 00000000 08:01 5 /usr/bin/containerd-shim-kata-v2", 4, 2),
            ("10000-20000 rw-p 00000000 00:00 0 [anon:guest-ram]", 40, 40),
            ("20000-30000 ---p 00000000 00:00 0 [anon:guest-ram]", 0, 0),
            ("40000-50000 rw-p 00000000 00:00 0 [heap]", 8, 8),
        ]));
        assert_eq!(usage.guest, Some(GuestMemory { size: 0x10000, resident: 40 << 10 }));
        assert_eq!((usage.own_rss, usage.own_pss), (12 << 10, 10 << 10));
        assert_eq!(usage.total(), 50 << 10);
    }

    #[test]
    fn the_guests_kernel_is_guest_memory_and_a_library_beside_it_is_not() {
        let usage = sum(&maps(&[
            ("8000-10000 rw-p 00000000 08:01 9 /usr/lib/libc.so", 16, 4),
            ("10000-20000 rw-p 00000000 00:00 0 [anon:guest-ram]", 1, 1),
            ("20000-24000 rw-p 00000000 08:01 6 /usr/share/kata-containers/vmlinux", 2, 1),
            ("24000-30000 rw-p 00010000 08:01 6 /usr/share/kata-containers/vmlinux", 3, 1),
            ("30000-40000 rw-p 00000000 00:00 0 [anon:guest-ram]", 4, 4),
        ]));
        assert_eq!(usage.guest, Some(GuestMemory { size: 0x30000, resident: 10 << 10 }));
        assert_eq!(usage.own_rss, 16 << 10);
    }

    #[test]
    fn without_names_of_memory_nothing_is_said_of_the_guest() {
        assert_eq!(sum(&maps(&[("10000-20000 rw-p 00000000 00:00 0", 40, 40)])).guest, None);
    }

    #[test]
    fn cpu_time_is_found_behind_a_name_with_spaces() {
        let stat = "42 (a) b) S 1 1 1 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 4 0 1000 1 1";
        assert!((cpu_seconds(stat) - 2.0).abs() < f64::EPSILON);
    }
}
