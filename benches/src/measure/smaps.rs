//! A process's memory by map, from `/proc/PID/smaps` (proc(5)).

use std::fs;

use anyhow::{Context as _, Result};

/// Name that the monitor gives to guest memory.
const GUEST_MEMORY_NAME: &str = "guest-ram";

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

/// The memory of process `pid`; a map is guest memory when it is named so or has exactly `guest_size` KiB.
///
/// # Errors
/// When there is no such process.
pub fn usage(pid: u32, guest_size: u64) -> Result<Usage> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(|| format!("Process {pid} is gone"))?;
    Ok(parse(&text, guest_size))
}

fn parse(text: &str, guest_size: u64) -> Usage {
    let mut usage = Usage::default();
    let mut guest = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(field) = first.strip_suffix(':') else {
            guest = line.contains(GUEST_MEMORY_NAME);
            continue;
        };
        let value: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or_default();
        match field {
            "Size" if value == guest_size => guest = true,
            "Rss" if guest => usage.guest += value,
            "Rss" => usage.own_rss += value,
            "Pss" if !guest => usage.own_pss += value,
            _ => {}
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_of_guest_memory_are_told_by_name_or_by_size() {
        let map = |name: &str, size: u64, rss: u64, pss: u64| {
            format!("7f00-7f10 rw-p 00000000 00:01 5 {name}\nSize: {size} kB\nRss: {rss} kB\nPss: {pss} kB\n")
        };
        let text = [
            map("/memfd:guest-ram (deleted)", 4, 3, 3),
            map("", 131_072, 25_000, 25_000),
            map("/usr/bin/dragonball", 900, 800, 80),
            map("[heap]", 131, 100, 100),
        ]
        .concat();
        assert_eq!(parse(&text, 131_072), Usage { own_rss: 900, own_pss: 180, guest: 25_003 });
    }

    #[test]
    fn this_process_has_memory_of_its_own() {
        let usage = usage(std::process::id(), 0).unwrap();
        assert!(usage.own_rss >= usage.own_pss && usage.own_pss > 0);
    }
}
