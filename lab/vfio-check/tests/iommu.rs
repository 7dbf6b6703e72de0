//! Boots lab machines with devices behind an IOMMU and drives them from inside, by groups and by IOMMUFD.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::time::Duration;

use lab::{Command, Device, Hardware, Input, Kernel, Machine, Setup, Snapshot};

const LIMIT: Duration = Duration::from_secs(300);

/// Boots a machine with these devices and drives them all; answers what was said.
fn drive(name: &str, kernel: Kernel, by: &str, devices: &[Device]) -> String {
    let hardware = devices.iter().fold(Hardware::new().kernel(kernel), |hardware, device| hardware.device(*device));
    let name = format!("vfio-{name}-{}", std::process::id());
    let machine = Machine::boot(&hardware, Snapshot::Base, &Setup::new(), &name).unwrap();
    machine.push(env!("CARGO_BIN_EXE_vfio-check").as_ref(), "/usr/bin/vfio-check").unwrap();
    let programs = "ls -l /proc/$(pgrep -o lab-guest)/fd | grep -c bpf_link";
    let programs = machine.run(&Command::shell(programs), Input::Empty).unwrap().text();
    assert_eq!(programs, "2\n", "virtualization is mended (lab/guest/src/mend.rs)");
    let addresses = (0..devices.len()).map(Hardware::address);
    let command = Command::new("vfio-check").args(["--by", by]).args(addresses).limit(LIMIT);
    let output = machine.run(&command, Input::Empty).unwrap();
    let console = std::fs::read_to_string(machine.console()).unwrap_or_default();
    assert!(output.success(), "{}{}\n{console}", output.text(), String::from_utf8_lossy(&output.stderr));
    println!("{}", output.text());
    output.text()
}

const GPU: Device = Device::Gpu(8 << 30);

#[test]
fn a_gpu_computes_copies_interrupts_and_resets_by_its_group() {
    let said = drive("gpu", Kernel::Debian, "group", &[GPU]);
    assert!(said.contains("class 030200"), "{said}");
    assert!(said.contains("reset: ok"), "{said}");
}

#[test]
fn each_kind_of_device_can_be_driven_by_its_group() {
    let devices =
        [Device::AtiAndEdu, Device::Edu, Device::Nvme, Device::Ivshmem(4 << 30), Device::TestDevice(64 << 30)];
    let said = drive("kinds", Kernel::Debian, "group", &devices);
    for expected in [
        "0000:01:00.0: group of 2: 0000:01:00.0 0000:01:00.1\n",
        "0000:01:00.1: DMA both ways, MSI: ok",
        "0000:02:00.0: group of 1: 0000:02:00.0\n",
        "0000:02:00.0: DMA both ways, MSI: ok",
        "1b36:0010 class 010802, MSI 0, MSI-X 65",
        "BAR2 0x100000000 (mappable)",
        "BAR2 0x1000000000 (mappable)",
    ] {
        assert!(said.contains(expected), "{expected}\n{said}");
    }
}

#[test]
#[ignore = "needs a kernel whose first build takes a quarter of an hour; `make test-vfio` runs it"]
fn a_gpu_and_a_device_of_two_functions_can_be_driven_by_iommufd() {
    let said = drive("iommufd", Kernel::Iommufd, "iommufd", &[GPU, Device::AtiAndEdu]);
    assert!(said.contains("0000:01:00.0: reset: ok"), "{said}");
    assert!(said.contains("0000:02:00.1: DMA both ways, MSI: ok"), "{said}");
}

#[test]
#[ignore = "needs a kernel whose first build takes a quarter of an hour; `make test-vfio` runs it"]
fn the_kernel_with_iommufd_has_groups_too() {
    drive("both", Kernel::Iommufd, "group", &[Device::Edu]);
}
