//! A container's statistics, as containerd's cgroup v2 metrics.

use std::fs;
use std::str::FromStr;

use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protocols::containerd::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};

use crate::cgroup::{Cgroup, flat_value};
use crate::error::{Error, Result};

/// The name that containerd registers for these metrics.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Reads all that the guest's controllers say. What a controller that is not there would say is left out.
pub(crate) fn collect(cgroup: &Cgroup) -> Result<Any> {
    let metrics = Metrics {
        pids: field(pids(cgroup)),
        cpu: field(cpu(cgroup)),
        memory: field(memory(cgroup)),
        memory_events: field(memory_events(cgroup)),
        io: field(io(cgroup)),
        network: network(),
        ..Default::default()
    };
    let value = protobuf::Message::write_to_bytes(&metrics).map_err(|error| Error::Io {
        what: "cannot encode the metrics".into(),
        source: std::io::Error::other(error),
    })?;
    Ok(Any { type_url: TYPE_URL.into(), value, ..Default::default() })
}

fn field<T>(value: Option<T>) -> MessageField<T> {
    MessageField::from_option(value)
}

/// A number, or the kernel's word for none: `max` means no limit, for which containerd has the largest number.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        digits => u64::from_str(digits).unwrap_or(0),
    }
}

fn flat(text: &str, key: &str) -> u64 {
    flat_value(text, key).map_or(0, number)
}

fn pids(cgroup: &Cgroup) -> Option<PidsStat> {
    Some(PidsStat {
        current: number(&cgroup.read("pids.current")?),
        limit: cgroup.read("pids.max").map_or(0, |text| number(&text)),
        ..Default::default()
    })
}

fn cpu(cgroup: &Cgroup) -> Option<CPUStat> {
    let text = cgroup.read("cpu.stat")?;
    Some(CPUStat {
        usage_usec: flat(&text, "usage_usec"),
        user_usec: flat(&text, "user_usec"),
        system_usec: flat(&text, "system_usec"),
        nr_periods: flat(&text, "nr_periods"),
        nr_throttled: flat(&text, "nr_throttled"),
        throttled_usec: flat(&text, "throttled_usec"),
        nr_bursts: flat(&text, "nr_bursts"),
        burst_usec: flat(&text, "burst_usec"),
        ..Default::default()
    })
}

fn memory(cgroup: &Cgroup) -> Option<MemoryStat> {
    let text = cgroup.read("memory.stat")?;
    let value = |key| flat(&text, key);
    let file = |name| cgroup.read(name).map_or(0, |text| number(&text));
    Some(MemoryStat {
        anon: value("anon"),
        file: value("file"),
        kernel_stack: value("kernel_stack"),
        slab: value("slab"),
        sock: value("sock"),
        shmem: value("shmem"),
        file_mapped: value("file_mapped"),
        file_dirty: value("file_dirty"),
        file_writeback: value("file_writeback"),
        anon_thp: value("anon_thp"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        unevictable: value("unevictable"),
        slab_reclaimable: value("slab_reclaimable"),
        slab_unreclaimable: value("slab_unreclaimable"),
        pgfault: value("pgfault"),
        pgmajfault: value("pgmajfault"),
        pgrefill: value("pgrefill"),
        pgscan: value("pgscan"),
        pgsteal: value("pgsteal"),
        pgactivate: value("pgactivate"),
        pgdeactivate: value("pgdeactivate"),
        pglazyfree: value("pglazyfree"),
        pglazyfreed: value("pglazyfreed"),
        workingset_refault: value("workingset_refault_anon") + value("workingset_refault_file"),
        workingset_activate: value("workingset_activate_anon") + value("workingset_activate_file"),
        workingset_nodereclaim: value("workingset_nodereclaim"),
        thp_fault_alloc: value("thp_fault_alloc"),
        thp_collapse_alloc: value("thp_collapse_alloc"),
        usage: file("memory.current"),
        usage_limit: file("memory.max"),
        max_usage: file("memory.peak"),
        swap_usage: file("memory.swap.current"),
        swap_limit: file("memory.swap.max"),
        swap_max_usage: file("memory.swap.peak"),
        ..Default::default()
    })
}

fn memory_events(cgroup: &Cgroup) -> Option<MemoryEvents> {
    let text = cgroup.read("memory.events")?;
    Some(MemoryEvents {
        low: flat(&text, "low"),
        high: flat(&text, "high"),
        max: flat(&text, "max"),
        oom: flat(&text, "oom"),
        oom_kill: flat(&text, "oom_kill"),
        oom_group_kill: flat(&text, "oom_group_kill"),
        ..Default::default()
    })
}

fn io(cgroup: &Cgroup) -> Option<IOStat> {
    let usage = cgroup.read("io.stat")?.lines().filter_map(io_entry).collect();
    Some(IOStat { usage, ..Default::default() })
}

/// One line of `io.stat`: `8:0 rbytes=… wbytes=… rios=… wios=… …`.
fn io_entry(line: &str) -> Option<IOEntry> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        match key {
            "rbytes" => entry.rbytes = number(value),
            "wbytes" => entry.wbytes = number(value),
            "rios" => entry.rios = number(value),
            "wios" => entry.wios = number(value),
            _ => {}
        }
    }
    Some(entry)
}

/// The sandbox's interfaces: its containers share them.
fn network() -> Vec<NetworkStat> {
    fs::read_to_string("/proc/net/dev")
        .map_or_else(|_| Vec::new(), |text| text.lines().filter_map(network_entry).collect())
}

/// One line of `/proc/net/dev`; its two heading lines have no colon after a name.
fn network_entry(line: &str) -> Option<NetworkStat> {
    let (name, counters) = line.split_once(':')?;
    let counters: Vec<u64> = counters.split_whitespace().map(number).collect();
    if name.trim() == "lo" || counters.len() < 12 {
        return None;
    }
    Some(NetworkStat {
        name: name.trim().to_owned(),
        rx_bytes: counters[0],
        rx_packets: counters[1],
        rx_errors: counters[2],
        rx_dropped: counters[3],
        tx_bytes: counters[8],
        tx_packets: counters[9],
        tx_errors: counters[10],
        tx_dropped: counters[11],
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_text_becomes_numbers() {
        let entry = io_entry("254:16 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0").expect("an entry");
        assert_eq!((entry.major, entry.minor, entry.rbytes, entry.wios), (254, 16, 4096, 3));
        assert_eq!(io_entry("garbage"), None);
        let line = "  eth0: 100 2 3 4 0 0 0 0 200 5 6 7 0 0 0 0";
        let stat = network_entry(line).expect("an entry");
        assert_eq!((stat.name.as_str(), stat.rx_bytes, stat.tx_bytes, stat.tx_dropped), ("eth0", 100, 200, 7));
        assert_eq!(network_entry(" face |bytes    packets errs drop"), None);
        assert_eq!((number("max\n"), number("12\n")), (u64::MAX, 12));
    }
}
