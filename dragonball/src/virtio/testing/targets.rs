//! What a fuzzer drives, by name: every device and register page that faces the guest. `make fuzz` does it for minutes;
//! the tests here do it for seconds, from the stored seeds and from random bytes.

use std::sync::LazyLock;

use super::board::board;
use super::pci::PciMachine;
use super::scenes;
use super::script::Script;
use crate::vfio::scene::drive_host_device;

/// Takes any bytes as a program of what to do.
pub type Target = fn(&[u8]);

/// All of them: `dragonball/fuzz` has a program for each.
pub const TARGETS: [(&str, Target); 12] = [
    ("balloon", scenes::balloon),
    ("blk", scenes::blk),
    ("board", board),
    ("console", scenes::console),
    ("fs", scenes::fs),
    ("mem", scenes::mem),
    ("net", scenes::net),
    ("pci_config", pci_config),
    ("pmem", scenes::pmem),
    ("queue", scenes::queue),
    ("vfio", host_device),
    ("vsock", scenes::vsock),
];

/// Does what `bytes` say to the target of this name.
///
/// # Panics
/// When the target does, or there is none of this name.
pub fn drive(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = target.expect("a name from the list of targets");
    target(bytes);
}

/// Configuration space and registers of virtio devices, their MSI-X tables and moving BARs included. Does nothing where
/// there is no `/dev/kvm`, of which any kind will do.
fn pci_config(bytes: &[u8]) {
    static MACHINE: LazyLock<Option<PciMachine>> = LazyLock::new(PciMachine::new);
    if let Some(machine) = &*MACHINE {
        machine.run(Script::new(bytes));
    }
}

/// The same of a device of the host.
fn host_device(bytes: &[u8]) {
    drive_host_device(Script::new(bytes));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// How many programs each target gets, unless `TATAMI_FUZZ_CASES` says another number.
    const CASES: u32 = 1024;
    /// The longest random program, in bytes.
    const LENGTH: usize = 2000;

    fn fuzz() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz"))
    }

    /// Programs that a fuzzer found to reach something of their own.
    fn seeds(name: &str) -> Vec<Vec<u8>> {
        let files = std::fs::read_dir(fuzz().join("seeds").join(name)).unwrap();
        let seeds: Vec<_> = files.map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect();
        assert!(!seeds.is_empty(), "{name} has no seeds");
        seeds
    }

    #[rstest::rstest]
    fn whatever_a_guest_does_nothing_panics_spins_or_escapes(
        #[values(
            "balloon",
            "blk",
            "board",
            "console",
            "fs",
            "mem",
            "net",
            "pci_config",
            "pmem",
            "queue",
            "vfio",
            "vsock"
        )]
        name: &str,
    ) {
        let seeds = seeds(name);
        seeds.iter().for_each(|seed| drive(name, seed));
        // A piece of a seed leads to deep places, random bytes go on from there.
        let start = (0..=seeds.len(), any::<prop::sample::Index>());
        let programs = (start, prop::collection::vec(any::<u8>(), 0..LENGTH)).prop_map(|((seed, cut), random)| {
            let mut program = seeds.get(seed).cloned().unwrap_or_default();
            program.truncate(cut.index(program.len() + 1));
            program.extend(random);
            program
        });
        let cases = std::env::var("TATAMI_FUZZ_CASES").map_or(CASES, |cases| cases.parse().unwrap());
        let mut runner = TestRunner::new(ProptestConfig::with_cases(cases));
        let outcome = runner.run(&programs, |program| {
            drive(name, &program);
            Ok(())
        });
        assert_eq!(outcome, Ok(()));
    }

    #[test]
    fn each_target_has_its_program_and_no_program_is_without_a_target() {
        let names = |directory: &str| -> BTreeSet<String> {
            let entries = std::fs::read_dir(fuzz().join(directory)).unwrap();
            let stem = |entry: std::io::Result<std::fs::DirEntry>| {
                entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned()
            };
            entries.map(stem).collect()
        };
        let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(names("fuzz_targets"), targets);
        assert_eq!(names("seeds"), targets);
    }
}
