//! The memory of the process: a test program of its own, because other tests would use code at the same time.
#![expect(clippy::unwrap_used, reason = "the helpers of tests fail by panicking")]

/// How much of the program's and its libraries' code counts as the process's memory, in KiB.
fn resident_code() -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let executable = |line: &str| line.split_whitespace().nth(1) == Some("r-xp") && line.contains('/');
    let mut lines = maps.lines();
    let mut resident = 0;
    while lines.any(executable) {
        let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        resident += rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    }
    resident
}

#[test]
fn the_program_runs_on_with_less_code_in_memory() {
    let before = resident_code();
    dragonball::footprint::give_back_code();
    let after = resident_code();
    assert!(after < before, "{after} KiB after {before}");
}
