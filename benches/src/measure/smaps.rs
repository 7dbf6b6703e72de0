//! A process's memory by map, from `/proc/PID/smaps` (proc(5)).

use std::fs;

use anyhow::{Context as _, Result};

/// Memory of one process, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Resident, in maps that are not guest memory.
    pub own_rss: u64,
    /// The same, each page divided by the number of its users.
    pub own_pss: u64,
    /// Guest memory that the guest or its monitor touched.
    pub guest: u64,
}

/// One map of a process.
struct Map {
    start: u64,
    end: u64,
    rss: u64,
    pss: u64,
}

/// The memory of process `pid`, whose guest has `guest_size` KiB of memory.
///
/// # Errors
/// When there is no such process.
pub fn usage(pid: u32, guest_size: u64) -> Result<Usage> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(|| format!("Process {pid} is gone"))?;
    Ok(sum(&parse(&text), guest_size))
}

fn parse(text: &str) -> Vec<Map> {
    let mut maps: Vec<Map> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, end)) = range(first) {
            maps.push(Map { start, end, rss: 0, pss: 0 });
            continue;
        }
        let value: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or_default();
        match (first, maps.last_mut()) {
            ("Rss:", Some(map)) => map.rss = value,
            ("Pss:", Some(map)) => map.pss = value,
            _ => {}
        }
    }
    maps
}

/// The addresses of a map's first line.
fn range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// Guest memory is the run of adjoining maps that is as large as the guest's memory: one map, or many where parts of
/// it are mapped from the kernel's file. Not every kernel keeps the name that a monitor gives to it.
fn sum(maps: &[Map], guest_size: u64) -> Usage {
    let guest = (0..maps.len()).find_map(|first| run(&maps[first..], guest_size).map(|length| first..first + length));
    let mut usage = Usage::default();
    for (number, map) in maps.iter().enumerate() {
        if guest.as_ref().is_some_and(|guest| guest.contains(&number)) {
            usage.guest += map.rss;
        } else {
            usage.own_rss += map.rss;
            usage.own_pss += map.pss;
        }
    }
    usage
}

/// How many of the first maps adjoin and have `size` KiB together.
fn run(maps: &[Map], size: u64) -> Option<usize> {
    let start = maps.first()?.start;
    let adjoining = 1 + maps.windows(2).take_while(|pair| pair[0].end == pair[1].start).count();
    maps[..adjoining].iter().position(|map| map.end - start == size * 1024).map(|last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_the_run_of_adjoining_maps_of_its_size() {
        let map = |range: &str, rss: u64, pss: u64| {
            format!("{range} rw-p 00000000 00:01 5 /x\nSize: 1 kB\nRss: {rss} kB\nPss: {pss} kB\nPss_Dirty: 9 kB\n")
        };
        let text = [
            map("1000-2000", 4, 2),
            map("100000-180000", 300, 300),
            map("180000-1c0000", 200, 20),
            map("1c0000-200000", 100, 10),
            map("200000-201000", 4, 4),
        ]
        .concat();
        assert_eq!(sum(&parse(&text), 1024), Usage { own_rss: 8, own_pss: 6, guest: 600 });
        assert_eq!(sum(&parse(&text), 512).guest, 300);
        assert_eq!(sum(&parse(&text), 2048).guest, 0);
    }

    #[test]
    fn this_process_has_memory_of_its_own() {
        let usage = usage(std::process::id(), 0).unwrap();
        assert!(usage.own_rss >= usage.own_pss && usage.own_pss > 0);
    }
}
