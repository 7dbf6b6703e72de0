//! A Linux guest that gets vCPUs and memory and loses them again while it works.
//!
//! `TATAMI_TEST_ROUNDS` says how often, twice if unset.

#![expect(clippy::unwrap_used, reason = "a test fails by panics")]

use std::time::Duration;

use dragonball::{ExitReason, MachineConfig};

use crate::guest::{self, Guest};

const MIB: u64 = 1 << 20;
/// What the guest starts with.
const BOOT: u64 = 256 * MIB;
/// What it gets, where the host has that much.
const MOST: u64 = 4096 * MIB;
/// What it is left with.
const SMALL: u64 = 512 * MIB;
/// What a guest may keep of the memory that it shall give back: what the kernel put there and cannot move.
const KEPT: u64 = 128 * MIB;
/// What the host needs for itself.
const HOST: u64 = 512 * MIB;
/// How long the guest gets: the lab emulates its processors.
const LONG: Duration = Duration::from_secs(120);

/// What works in the guest all the time: data that is written once and read again and again, a file that is copied and
/// compared, and two loops that only compute. The first two tell in a file of each good round, and of the first bad one.
const LOAD: &str = "mkdir /tmp/load; cd /tmp/load; dd if=/dev/urandom of=kept bs=1M count=64 2>/dev/null; \
     sha256sum kept > sum; : > read; : > copied; \
     (while sha256sum -c -s sum; do echo good >> read; done; echo BAD >> read) & \
     (while cp kept copy && cmp -s kept copy; do echo good >> copied; done; echo BAD >> copied) & \
     (while :; do :; done) & (while :; do :; done) & cd /";

/// The most memory that the guest can get, in multiples of 256 MiB of what the host has.
fn most() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total = total.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
    MOST.min((total - HOST) / (256 * MIB) * (256 * MIB))
}

/// How many rounds the load has done; fails where it has lost something.
fn progress(guest: &mut Guest) -> u64 {
    let text = guest.run("cd /tmp/load; cat read copied | sort | uniq -c; cd /");
    assert!(!text.contains("BAD"), "the guest has lost data: {text}");
    text.split_whitespace().next().map_or(0, |count| count.parse().unwrap())
}

fn resize_vcpus(guest: &mut Guest, count: u8) {
    guest.resize_vcpus(count);
    guest.bring_online(count);
}

fn resize_memory(guest: &Guest, bytes: u64, kept: u64) {
    let resized = guest.vm.manager().resize_memory(bytes, LONG).unwrap();
    println!("asked for {} MiB, there are {} MiB", bytes / MIB, resized.present / MIB);
    let reached = resized.present >= bytes && resized.present <= bytes + kept;
    assert!(reached, "the guest did not answer within {LONG:?}: {resized:?}");
}

#[test]
fn a_guest_that_grows_and_shrinks_under_load_loses_nothing() {
    let Some(kernel) = guest::kernel() else { return };
    let most = most();
    let config = MachineConfig {
        hot_plug: true,
        vcpus_max: Some(8),
        memory: BOOT,
        memory_max: Some(most),
        ..MachineConfig::new(kernel)
    };
    let mut guest = Guest::start(config);
    println!("1 to 8 to 2 vCPUs, {} to {} to {} MiB", BOOT / MIB, most / MIB, SMALL / MIB);
    guest.run(LOAD);
    let mut done = progress(&mut guest);
    for round in 0..Guest::rounds(2) {
        resize_vcpus(&mut guest, 8);
        resize_memory(&guest, most, 0);
        resize_vcpus(&mut guest, 2);
        resize_memory(&guest, SMALL, KEPT);
        // The load goes on: each of its two parts does at least one more round.
        let more = guest.run(
            "cd /tmp/load; r=$(wc -l < read); c=$(wc -l < copied); n=0; \
             until [ $(wc -l < read) -gt $r -a $(wc -l < copied) -gt $c ] || [ $n = 900 ]; do sleep 0.1; n=$((n+1)); done; \
             cd /; echo $n",
        );
        let now = progress(&mut guest);
        assert!(now >= done + 2, "the load stands still after round {round}: {more}");
        done = now;
    }
    assert!(guest.vm.manager().memory_types().unwrap().equal);
    let complaints = guest.run("dmesg | grep -e inconsistent -e BUG: -e stall -e WARNING: -e 'Out of memory'");
    assert_eq!(complaints, "");
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}
