//! A Linux guest whose memory grows and shrinks.

#![expect(clippy::unwrap_used, reason = "a helper of tests, which fail by panics")]

use std::time::{Duration, Instant};

use dragonball::virtio::balloon::BalloonState;
use dragonball::virtio::mem::MemState;
use dragonball::{ExitReason, MachineConfig};

use crate::guest::{self, Guest};

const MIB: u64 = 1 << 20;
/// What the guest starts with.
const BOOT: u64 = 256 * MIB;
/// What it can have beside that.
const MORE: u64 = 2560 * MIB;
/// How long a wait lasts before the test counts as failed: the lab emulates its processors.
const DEADLINE: Duration = Duration::from_secs(90);

fn deadline() -> Instant {
    Instant::now() + DEADLINE
}

/// Anonymous memory of this process, in bytes: the guest's, and little else.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The guest's memory as it counts itself, in bytes, once that is `least`: it counts a block when it has brought it online,
/// which is after it was plugged.
fn total_of_at_least(guest: &mut Guest, least: u64) -> u64 {
    let online = format!("[ $(awk '/MemTotal/ {{print $2}}' /proc/meminfo) -ge {} ]", least >> 10);
    guest.run(&format!("n=0; until {online} || [ $n = 600 ]; do sleep 0.1; n=$((n+1)); done"));
    total(guest)
}

/// The guest's memory as it counts itself, in bytes.
fn total(guest: &mut Guest) -> u64 {
    guest.run("awk '/MemTotal/ {print $2}' /proc/meminfo").trim().parse::<u64>().unwrap() << 10
}

fn resize(guest: &mut Guest, bytes: u64, enough: impl Fn(u64) -> bool) -> MemState {
    let memory = guest.vm.memory().unwrap();
    assert_eq!(memory.set_requested(bytes).unwrap(), bytes);
    let state = memory.wait(deadline(), |state| enough(state.plugged));
    if !enough(state.plugged) {
        let (asked, there) = (bytes / MIB, state.plugged / MIB);
        panic!("asked for {asked} MiB, there are {there} MiB; {}", guest.what_it_waits_for());
    }
    state
}

fn inflate(guest: &Guest, bytes: u64) -> BalloonState {
    let balloon = guest.vm.balloon().unwrap();
    assert_eq!(balloon.set_target(bytes).unwrap(), bytes);
    let state = balloon.wait(deadline(), |state| state.actual == bytes);
    assert_eq!(state.actual, bytes);
    state
}

#[test]
fn a_guest_grows_shrinks_and_gives_back_what_it_does_not_use() {
    let Some(kernel) = guest::kernel() else { return };
    let config = MachineConfig {
        memory: BOOT,
        memory_max: Some(BOOT + MORE),
        balloon: true,
        vcpus: 2,
        ..MachineConfig::new(kernel)
    };
    let mut guest = Guest::start(config);
    let booted = total(&mut guest);
    assert!(booted <= BOOT, "{booted}");

    resize(&mut guest, MORE, |plugged| plugged == MORE);
    let grown = total_of_at_least(&mut guest, booted + MORE);
    assert!(grown >= booted + MORE, "the guest counts {} MiB", grown / MIB);
    let idle = resident();

    guest.run("dd if=/dev/zero of=/tmp/file bs=1M count=1200 2>/dev/null; sync");
    let used = resident();
    assert!(used >= idle + 1100 * MIB, "{} MiB from {} MiB", used / MIB, idle / MIB);
    let balloon = guest.vm.balloon().unwrap();
    let before = balloon.state().discarded;
    guest.run("rm /tmp/file");
    let mut state = balloon.wait(deadline(), |state| state.discarded >= before + 1000 * MIB);
    // The guest may still be reporting what it never used: that gives nothing back, so what counts is what the host sees.
    let until = deadline();
    while resident() + 900 * MIB > used {
        let reported = state.discarded;
        state = balloon.wait(until, |state| state.discarded > reported);
        let left = resident() / MIB;
        assert!(state.discarded > reported, "{left} MiB of {} MiB are left, and no more is reported", used / MIB);
    }
    println!("resident: idle {} MiB, used {} MiB, freed {} MiB", idle / MIB, used / MIB, resident() / MIB);

    // Used memory is moved, not lost: the sum stays the same.
    guest.run("dd if=/dev/urandom of=/tmp/file bs=1M count=100 2>/dev/null");
    let sum = guest.run("sha256sum /tmp/file");
    for round in 0..3 {
        let small = resize(&mut guest, 256 * MIB, |plugged| plugged <= 512 * MIB);
        println!(
            "round {round}: asked for 256 MiB, {} MiB are left, resident {} MiB",
            small.plugged / MIB,
            resident() / MIB
        );
        assert!(resident() <= BOOT + small.plugged + 64 * MIB);
        resize(&mut guest, MORE, |plugged| plugged == MORE);
    }
    assert_eq!(guest.run("sha256sum /tmp/file"), sum);

    inflate(&guest, 512 * MIB);
    let reports = balloon.request_stats().unwrap();
    let stats = balloon.wait(deadline(), |state| state.reports > reports).stats;
    assert!(stats.total_memory.is_some_and(|total| total <= grown) && stats.free_memory.is_some(), "{stats:?}");
    inflate(&guest, 0);
    assert_eq!(guest.run("sha256sum /tmp/file"), sum);
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}
