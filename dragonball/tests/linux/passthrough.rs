//! A Linux guest that gets devices of the host, uses them and lets them go.
//!
//! `TATAMI_TEST_DEVICES` names PCI devices behind an IOMMU, which the tests take for themselves, and
//! `TATAMI_TEST_PASSTHROUGH` the static program `lab-passthrough`, which uses them in the guest. `TATAMI_TEST_MODULES` names
//! a directory of kernel modules for guests that have any. `TATAMI_TEST_ROUNDS` says how often devices come and go, 5 times
//! if unset. `TATAMI_TEST_IOMMUFD` says that the host gives its devices by iommufd.

#![expect(clippy::unwrap_used, reason = "a test fails by panics")]

mod host;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use dragonball::manage::{ChangeError, Manager};
use dragonball::{ExitReason, MachineConfig};

use crate::guest::{self, Guest};
use host::{Device, Host, Kind};

/// How long the guest gets: the lab emulates its processors.
const LONG: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// What this process has open and mapped.
fn held() -> (usize, usize) {
    (fs::read_dir("/proc/self/fd").unwrap().count(), fs::read_to_string("/proc/self/maps").unwrap().lines().count())
}

/// Whether this process has an address space of iommufd.
fn has_iommufd() -> bool {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
    links.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target == Path::new("/dev/iommu"))
}

/// A machine of this much memory that can get as much again.
fn machine(memory: u64) -> Option<MachineConfig> {
    let kernel = guest::kernel()?;
    let config = MachineConfig { hot_plug: true, memory, memory_max: Some(2 * memory), ..MachineConfig::new(kernel) };
    Some(MachineConfig { balloon: true, ..config })
}

fn guest(host: &Host, config: MachineConfig) -> Guest {
    Guest::start_with(config, &host.programs())
}

fn add(manager: &Manager, device: &Device) {
    let before = Instant::now();
    manager.add_device(Some(device.address.clone()), &device.config(), LONG).unwrap();
    println!("{:?} {} came in {:?}", device.kind, device.address, before.elapsed());
}

fn remove(manager: &Manager, device: &Device) {
    let before = Instant::now();
    manager.remove_device(&device.address, LONG).unwrap();
    println!("{:?} {} went in {:?}", device.kind, device.address, before.elapsed());
}

/// Lets the guest use all devices that it has; answers what it said.
fn assert_all_work(guest: &mut Guest, expected: usize, when: &str) -> String {
    let before = Instant::now();
    let said = guest.run("passthrough");
    if !said.contains(&format!("devices: {expected} ok, 0 failed")) {
        panic!("{when}: {said}\n{}", guest.run("dmesg | tail -n 20; cat /proc/iomem"));
    }
    println!("{when}, used in {:?}: {said}", before.elapsed());
    said
}

/// Where the guest's kernel shows it, its map of video memory is write-combining.
fn assert_combined(said: &str, shown: bool) {
    let mut memories = said.lines().filter(|line| line.contains("video memory"));
    assert!(!shown || memories.all(|line| line.contains("write-combining")), "{said}");
}

#[test]
fn devices_of_the_host_come_work_and_go_again_and_again() {
    let (Some(config), Some(host)) = (machine(256 * MIB), Host::take()) else { return };
    let functions = host.devices.iter().map(|device| device.functions().len()).sum();
    let mut guest = guest(&host, config);
    let manager = guest.vm.manager();
    let shown = guest.shows_page_table_types();
    let mut first = None;
    for round in 0..Guest::rounds(5) {
        host.devices.iter().for_each(|device| add(&manager, device));
        if round == 0 {
            assert_eq!(has_iommufd(), std::env::var_os("TATAMI_TEST_IOMMUFD").is_some(), "the way of the devices");
        }
        assert_combined(&assert_all_work(&mut guest, functions, &format!("round {round}")), shown);
        host.devices.iter().for_each(|device| remove(&manager, device));
        assert!(guest.run("passthrough").contains("devices: 0 ok, 0 failed"));
        let now = held();
        let before = *first.get_or_insert(now);
        assert_eq!(before.0, now.0, "open files after round {round}");
        assert!(now.1 <= before.1 + 8, "{} maps after round {round}, {} after the first", now.1, before.1);
    }
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
    assert!(matches!(manager.info(), Err(ChangeError::Ended)));
}

#[test]
fn devices_that_a_machine_starts_with_work_and_go() {
    let (Some(config), Some(host)) = (machine(256 * MIB), Host::take()) else { return };
    let Some(device) = host.of_kind(Kind::Gpu) else { return };
    let dragonball::DeviceConfig::Vfio(cold) = device.config() else { return };
    let mut guest = guest(&host, MachineConfig { vfio: vec![cold], ..config });
    assert_all_work(&mut guest, 1, "cold");
    let manager = guest.vm.manager();
    manager.remove_device("vfio0", LONG).unwrap();
    assert_all_work(&mut guest, 0, "gone");
    add(&manager, device);
    assert_all_work(&mut guest, 1, "hot");
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}

#[test]
fn a_gpu_moves_256_mib_there_and_back() {
    let (Some(config), Some(host)) = (machine(1024 * MIB), Host::take()) else { return };
    let Some(device) = host.of_kind(Kind::Gpu) else { return };
    let mut guest = guest(&host, MachineConfig { memory_max: None, ..config });
    add(&guest.vm.manager(), device);
    let said = guest.run("passthrough much");
    println!("{said}");
    assert!(said.contains("devices: 1 ok, 0 failed"), "{said}");
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}

#[test]
fn memory_that_came_after_a_device_is_in_its_reach_until_it_goes() {
    let (Some(config), Some(host)) = (machine(256 * MIB), Host::take()) else { return };
    let (Some(gpu), Some(edu)) = (host.of_kind(Kind::Gpu), host.of_kind(Kind::Edu)) else { return };
    let mut guest = guest(&host, config);
    let manager = guest.vm.manager();
    add(&manager, gpu);
    add(&manager, edu);
    let room = manager.info().unwrap().map.into_iter().find(|range| range.what == "room for more RAM").unwrap();
    // In the middle of what comes, and later of what is gone.
    let place = room.start + room.length / 2;
    let access = |guest: &mut Guest, how: &str| guest.run(&format!("passthrough {how} {place:#x}"));
    for size in [512 * MIB, 256 * MIB, 512 * MIB, 256 * MIB] {
        let reached = manager.resize_memory(size, LONG).unwrap().present;
        assert_eq!(reached, size, "the guest did not answer within {LONG:?}: its memory");
        if size == 512 * MIB {
            assert!(access(&mut guest, "read").contains("ok: reached"));
            assert_all_work(&mut guest, 2, "more memory");
        } else {
            for how in ["read", "write"] {
                let said = access(&mut guest, how);
                assert!(said.contains(&format!("ok: fault at {place:#x}")), "{how}: {said}");
            }
            let said = access(&mut guest, "through");
            assert!(said.contains("ok: not reached"), "{said}");
            assert_all_work(&mut guest, 2, "less memory");
        }
    }
    let log = Command::new("dmesg").output().unwrap();
    let faults = String::from_utf8_lossy(&log.stdout).into_owned();
    let fault = faults.lines().find(|line| line.contains("DMAR") && line.contains(&format!("{place:x}")));
    println!("{}", fault.unwrap_or_else(|| panic!("the IOMMU met no fault at {place:#x}")));
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}

#[test]
fn a_device_interrupts_by_its_pin() {
    let (Some(config), Some(host)) = (machine(256 * MIB), Host::take()) else { return };
    let Some(edu) = host.of_kind(Kind::Edu).filter(|_| Host::has_module("uio_pci_generic")) else { return };
    let mut guest = guest(&host, config);
    let manager = guest.vm.manager();
    for round in 0..2 {
        add(&manager, edu);
        let said = guest.run("passthrough pin");
        assert!(said.contains("devices: 1 ok, 0 failed"), "round {round}: {said}");
        println!("{said}");
        remove(&manager, edu);
    }
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}

#[test]
fn a_device_reaches_another_ones_memory_where_it_may() {
    let (Some(config), Some(host)) = (machine(256 * MIB), Host::take()) else { return };
    let (Some(display), Some(edu)) = (host.of_kind(Kind::Display), host.of_kind(Kind::Edu)) else { return };
    let mut guest = guest(&host, config);
    let manager = guest.vm.manager();
    // The first device decides by which way all come: iommufd maps no device's memory.
    manager.add_device(None, &edu.config_with(true), LONG).unwrap();
    for (may, expected) in [(true, "reached"), (false, "not reached")] {
        let name = display.address.clone();
        manager.add_device(Some(name.clone()), &display.config_with(may), LONG).unwrap();
        // Switches its memory on.
        assert_all_work(&mut guest, 3, "one device and two functions");
        let devices = manager.info().unwrap().devices;
        let own = devices.into_iter().find(|device| device.name == name).unwrap();
        let frame = own.ranges.into_iter().find(|range| range.what == "BAR0").unwrap();
        let said = guest.run(&format!("passthrough through {:#x}", frame.start));
        assert!(said.lines().any(|line| line.ends_with(&format!("ok: {expected}"))), "{said}");
        assert_eq!(said.matches(&format!("ok: {expected}\n")).count(), 2, "{said}");
        manager.remove_device(&name, LONG).unwrap();
    }
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}
