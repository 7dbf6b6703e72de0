//! Memory types as a Linux guest reads and changes them, on all its vCPUs.
//!
//! What the kernel keeps of page tables' types is in debugfs: a kernel without it is tested without that part, and the
//! test says so.

#![expect(clippy::unwrap_used, reason = "a test fails by panics")]

use std::time::Duration;

use dragonball::manage::MemoryTypesInfo;
use dragonball::{DeviceConfig, ExitReason, MachineConfig, PmemConfig};
use memory_types::MemoryType;

use crate::guest::{self, Guest};

/// How long the guest gets: the lab emulates its processors.
const LONG: Duration = Duration::from_secs(120);
/// A range of the 32-bit PCI window in which no device is.
const RANGE: (u64, u64) = (0xe000_0000, 16 << 20);

/// What the host reads in the vCPUs' registers when they are the same everywhere.
fn equal(guest: &Guest, vcpus: usize) -> MemoryTypesInfo {
    let info = guest.vm.manager().memory_types().unwrap();
    assert_eq!(info.vcpus.len(), vcpus);
    assert!(info.equal, "{:?}", info.vcpus);
    let pats: Vec<u64> = info.vcpus.values().map(|types| types.pat).collect();
    assert!(pats.windows(2).all(|pair| pair[0] == pair[1]), "{pats:x?}");
    info
}

fn type_of(info: &MemoryTypesInfo, address: u64) -> MemoryType {
    let runs = info.runs.as_ref().unwrap();
    runs.iter().find(|run| (run.start..run.end).contains(&address)).unwrap().memory_type
}

#[test]
fn what_a_guest_writes_to_its_mtrrs_is_on_every_vcpu_that_there_is_and_that_comes() {
    let Some(kernel) = guest::kernel() else { return };
    let config = MachineConfig {
        hot_plug: true,
        vcpus: 2,
        vcpus_max: Some(4),
        memory: 256 << 20,
        memory_max: Some(512 << 20),
        ..MachineConfig::new(kernel)
    };
    let mut guest = Guest::start(config);
    let (start, length) = RANGE;
    assert_eq!(guest.run("cat /proc/mtrr"), "", "everything is the default at first");
    assert_eq!(type_of(&equal(&guest, 2), start), MemoryType::WriteBack);

    guest.run(&format!("echo 'base={start:#x} size={length:#x} type=uncachable' > /proc/mtrr"));
    let table = guest.run("cat /proc/mtrr");
    assert!(table.contains("uncachable") && table.lines().count() == 1, "{table}");
    let info = equal(&guest, 2);
    assert_eq!([start - 1, start, start + length - 1].map(|address| type_of(&info, address)), {
        [MemoryType::WriteBack, MemoryType::Uncached, MemoryType::Uncached]
    });

    // Those that come have it before the guest starts them, and after; one that went and comes back too.
    for count in [4, 1, 3] {
        guest.resize_vcpus(count);
        let before = equal_mtrrs(&guest);
        guest.bring_online(count);
        assert_eq!(equal(&guest, usize::from(count)).runs, before.runs);
        assert_eq!(guest.run("cat /proc/mtrr"), table);
    }
    guest.run("echo 'disable=0' > /proc/mtrr");
    assert_eq!(guest.run("cat /proc/mtrr"), "");
    let info = equal(&guest, 3);
    assert_eq!(info.runs.unwrap().len(), 1);
    assert!(info.ranges.iter().all(|typed| typed.memory_type == Some(MemoryType::WriteBack)));

    let complaints =
        guest.run("dmesg | grep -i 'inconsistent.*mtrr\\|mtrr.*inconsistent\\|mtrr: your CPUs\\|mtrr: .*fault'");
    assert_eq!(complaints, "");
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}

/// A vCPU that the guest has not started has the reset value of the PAT.
fn equal_mtrrs(guest: &Guest) -> MemoryTypesInfo {
    let info = guest.vm.manager().memory_types().unwrap();
    assert!(info.equal, "{:?}", info.vcpus);
    info
}

#[test]
fn page_tables_give_persistent_memory_and_registers_the_types_that_they_need() {
    let Some(kernel) = guest::kernel() else { return };
    let mut guest = Guest::start(MachineConfig { hot_plug: true, memory: 256 << 20, ..MachineConfig::new(kernel) });
    if !guest.shows_page_table_types() {
        eprintln!("SKIPPED: the guest kernel has no debugfs to show the types of page tables in");
        return;
    }
    let image = guest.directory().join("pmem");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let pmem = DeviceConfig::Pmem(PmemConfig { path: image, read_only: false });
    let device = guest.vm.manager().add_device(Some("memory".to_owned()), &pmem, LONG).unwrap();
    let place = |what: &str| device.ranges.iter().find(|range| range.what == what).unwrap().start;
    guest.run("n=0; until [ -b /dev/pmem0 ] || [ $n = 600 ]; do sleep 0.1; n=$((n+1)); done");
    let list = guest.run("cat /sys/kernel/debug/x86/pat_memtype_list");
    let type_at = |address: u64| {
        let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        let parse = |line: &str| {
            let (range, kind) = line.strip_prefix("PAT: [mem ")?.split_once(']')?;
            let (start, end) = range.split_once('-')?;
            (hex(start)..hex(end)).contains(&address).then(|| kind.trim().to_owned())
        };
        list.lines().find_map(parse).unwrap_or_else(|| panic!("{address:#x} is not in the list: {list}"))
    };
    assert_eq!(type_at(place("memory")), "write-back");
    assert_eq!(type_at(place("BAR0")), "uncached-minus");
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}
