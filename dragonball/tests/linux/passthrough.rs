//! A Linux guest that gets devices of the host, uses them and lets them go.
//!
//! `TATAMI_TEST_DEVICES` names PCI devices behind an IOMMU, which the test takes for itself, and `TATAMI_TEST_PASSTHROUGH`
//! the static program `lab-passthrough`, which uses them in the guest. `TATAMI_TEST_ROUNDS` says how often, 5 times if unset.

#![expect(clippy::unwrap_used, reason = "a test fails by panics")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dragonball::manage::{ChangeError, Manager};
use dragonball::{DeviceConfig, ExitReason, MachineConfig, VfioConfig};

use crate::guest::{self, Guest};

/// How long the guest gets: the lab emulates its processors.
const LONG: Duration = Duration::from_secs(120);

/// A device of the host as sysfs has it.
fn place(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

/// The devices to pass, with their addresses, and the program that uses them; says so where there are none.
fn devices() -> Option<(Vec<String>, Vec<u8>)> {
    let (Some(devices), Some(program)) =
        (std::env::var_os("TATAMI_TEST_DEVICES"), std::env::var_os("TATAMI_TEST_PASSTHROUGH"))
    else {
        eprintln!("SKIPPED: TATAMI_TEST_DEVICES and TATAMI_TEST_PASSTHROUGH name nothing to pass");
        return None;
    };
    let addresses = devices.to_string_lossy().split_whitespace().map(str::to_owned).collect();
    Some((addresses, fs::read(program).unwrap()))
}

/// Gives a device to vfio-pci, as an administrator does.
fn take_from_host(address: &str) {
    assert!(Command::new("modprobe").arg("vfio-pci").status().unwrap().success());
    let device = place(address);
    fs::write(device.join("driver_override"), "vfio-pci").unwrap();
    if device.join("driver").exists() {
        fs::write(device.join("driver/unbind"), address).unwrap();
    }
    fs::write("/sys/bus/pci/drivers_probe", address).unwrap();
}

fn vfio(address: &str) -> DeviceConfig {
    DeviceConfig::Vfio(VfioConfig { path: place(address), clique: None, peer_to_peer: false })
}

/// What this process has open and mapped.
fn held() -> (usize, usize) {
    (fs::read_dir("/proc/self/fd").unwrap().count(), fs::read_to_string("/proc/self/maps").unwrap().lines().count())
}

fn add_all(manager: &Manager, addresses: &[String]) {
    for address in addresses {
        manager.add_device(Some(address.clone()), &vfio(address), LONG).unwrap();
    }
}

#[test]
fn devices_of_the_host_come_work_and_go_again_and_again() {
    let (Some(kernel), Some((addresses, program))) = (guest::kernel(), devices()) else { return };
    addresses.iter().for_each(|address| take_from_host(address));
    let config = MachineConfig {
        hot_plug: true,
        memory: 256 << 20,
        memory_max: Some(512 << 20),
        balloon: true,
        ..MachineConfig::new(kernel)
    };
    let mut guest = Guest::start_with(config, &[("bin/passthrough", &program)]);
    let manager = guest.vm.manager();
    let all_work = format!("devices: {} ok, 0 failed", addresses.len());
    let mut first = None;
    for round in 0..Guest::rounds(5) {
        add_all(&manager, &addresses);
        let said = guest.run("passthrough");
        assert!(said.contains(&all_work), "round {round}: {said}");
        for address in &addresses {
            manager.remove_device(address, LONG).unwrap();
        }
        assert!(guest.run("passthrough").contains("devices: 0 ok, 0 failed"));
        let now = held();
        let before = *first.get_or_insert(now);
        assert_eq!(before.0, now.0, "open files after round {round}");
        assert!(now.1 <= before.1 + 8, "{} maps after round {round}, {} after the first", now.1, before.1);
    }

    // What the guest gets after its devices is theirs as well, and goes back from under them.
    add_all(&manager, &addresses);
    for size in [512 << 20, 256 << 20, 512 << 20] {
        manager.resize_memory(size, LONG).unwrap();
        let said = guest.run("passthrough");
        assert!(said.contains(&all_work), "at {size} bytes: {said}");
    }
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
    assert!(matches!(manager.info(), Err(ChangeError::Ended)));
}
