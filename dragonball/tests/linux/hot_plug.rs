//! A Linux guest, its kernel unmodified, that gets devices and vCPUs and lets them go.

#![expect(clippy::unwrap_used, reason = "a helper of tests, which fail by panics")]

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use dragonball::manage::Manager;
use dragonball::{DeviceConfig, DiskConfig, ExitReason, FsConfig, MachineConfig, NetConfig, PmemConfig, VhostMode};

use crate::guest::{self, Guest};

/// How long the guest gets: the lab emulates its processors.
const LONG: Duration = Duration::from_secs(120);

fn machine(kernel: std::path::PathBuf) -> MachineConfig {
    MachineConfig { hot_plug: true, vcpus_max: Some(8), memory: 256 << 20, ..MachineConfig::new(kernel) }
}

fn disk(path: &Path) -> DeviceConfig {
    DeviceConfig::Blk(DiskConfig { path: path.to_path_buf(), read_only: false })
}

fn file(directory: &Path, name: &str, length: u64) -> std::path::PathBuf {
    let path = directory.join(name);
    File::create(&path).unwrap().set_len(length).unwrap();
    path
}

fn add(manager: &Manager, name: &str, device: &DeviceConfig) {
    let info = manager.add_device(Some(name.to_owned()), device, LONG).unwrap();
    assert_eq!(info.name, name);
}

/// How many descriptors this process has open.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn every_kind_of_device_comes_works_and_goes_again_and_again() {
    let Some(kernel) = guest::kernel() else { return };
    let mut guest = Guest::start(machine(kernel));
    let manager = guest.vm.manager();
    let directory = guest.directory().to_path_buf();
    let image = file(&directory, "disk", 16 << 20);
    let pmem = file(&directory, "pmem", 16 << 20);
    std::fs::create_dir(directory.join("share")).unwrap();
    std::fs::write(directory.join("share/hello"), "from the host\n").unwrap();
    let share = FsConfig { tag: "share".to_owned(), directory: directory.join("share"), guest_only: None };
    let net = NetConfig { vhost: VhostMode::Off, ..NetConfig::new("tatami-test0") };
    let devices = [
        ("disk", disk(&image)),
        ("memory", DeviceConfig::Pmem(PmemConfig { path: pmem, read_only: false })),
        ("share", DeviceConfig::Fs(share)),
        ("card", DeviceConfig::Net(net)),
    ];
    let present =
        || -> Vec<_> { manager.info().unwrap().devices.into_iter().map(|device| (device.slot, device.name)).collect() };
    let empty = present();
    let mut open = None;
    for round in 0..5 {
        devices.iter().for_each(|(name, device)| add(&manager, name, device));
        let use_all = format!(
            "mkdir -p /mnt; mount -t virtiofs share /mnt && cat /mnt/hello; echo {round} > /mnt/round; umount /mnt; \
             echo data{round} | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null; dd if=/dev/vda bs=5 count=1 2>/dev/null; \
             echo; echo pmem | dd of=/dev/pmem0 bs=512 conv=sync,notrunc 2>/dev/null; dd if=/dev/pmem0 bs=4 count=1 2>/dev/null; \
             echo; cat /sys/class/net/eth0/mtu"
        );
        assert_eq!(guest.run(&use_all), format!("from the host\ndata{round}\npmem\n1500\n"));
        assert_eq!(std::fs::read_to_string(directory.join("share/round")).unwrap(), format!("{round}\n"));
        for (name, _) in &devices {
            manager.remove_device(name, LONG).unwrap();
        }
        let left = guest.run("ls /dev/vda /dev/pmem0 /sys/class/net/eth0 2>/dev/null");
        assert_eq!(left, "");
        assert!(!Path::new("/sys/class/net/tatami-test0").exists(), "the tap interface went with the card");
        assert_eq!(present(), empty, "nothing is left in the machine");
        assert_eq!(*open.get_or_insert_with(descriptors), descriptors(), "nothing is left open");
    }
    assert_eq!(&std::fs::read(&image).unwrap()[..5], b"data4");
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}

#[test]
fn a_device_is_taken_from_a_guest_that_was_resized_in_the_middle() {
    let Some(kernel) = guest::kernel() else { return };
    let mut guest = Guest::start(machine(kernel));
    let manager = guest.vm.manager();
    let image = file(guest.directory(), "disk", 16 << 20);
    // One alone: others that come up would make KVM find it.
    guest.resize_vcpus(2);
    assert_eq!(guest.run("echo 1 > /sys/devices/system/cpu/cpu1/online; nproc"), "2\n");
    let work = "for cpu in 1 2 3; do (while true; do :; done) & done";
    guest.run(work);
    for _ in 0..2 {
        guest.resize_vcpus(8);
        assert_eq!(
            guest.run("for n in 1 2 3 4 5 6 7; do echo 1 > /sys/devices/system/cpu/cpu$n/online; done; nproc"),
            "8\n"
        );
        add(&manager, "disk", &disk(&image));
        guest.resize_vcpus(2);
        assert_eq!(guest.run("nproc; test -b /dev/vda && echo there"), "2\nthere\n");
        manager.remove_device("disk", LONG).unwrap();
    }
    assert_eq!(guest.run("dmesg | grep -c -i 'inconsistent.*MTRR'"), "0\n");
    assert_eq!(guest.power_off(), ExitReason::PowerOff);
}
