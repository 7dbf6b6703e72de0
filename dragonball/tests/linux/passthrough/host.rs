//! The host's devices that guests of these tests get, and what guests use them with.

#![expect(clippy::unwrap_used, reason = "a helper of tests, which fail by panics")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dragonball::{DeviceConfig, VfioConfig};

use crate::guest;

/// What of the lab's devices one is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Edu,
    /// Its driver is a kernel module.
    Nvme,
    SharedMemory,
    /// A large BAR that nothing lies behind.
    LargeBar,
    /// With an `edu` as the second function of its group.
    Display,
    Gpu,
}

impl Kind {
    fn of(address: &str) -> Self {
        let number = |name: &str| {
            let text = fs::read_to_string(place(address).join(name)).unwrap();
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
        };
        match (number("vendor"), number("device")) {
            (0x1234, 0x11e8) => Self::Edu,
            (0x1b36, 0x0010) => Self::Nvme,
            (0x1af4, 0x1110) => Self::SharedMemory,
            (0x1b36, 0x0005) => Self::LargeBar,
            (0x1002, 0x5046) => Self::Display,
            (0x10de, 0x20b0) => Self::Gpu,
            other => panic!("{address} is no device of the lab: {other:x?}"),
        }
    }
}

/// A device of the host.
pub(super) struct Device {
    pub(super) address: String,
    pub(super) kind: Kind,
}

impl Device {
    /// All functions of its group.
    pub(super) fn functions(&self) -> Vec<String> {
        let group = fs::read_dir(place(&self.address).join("iommu_group/devices")).unwrap();
        group.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Gives its group to vfio-pci, as an administrator does.
    fn take_from_host(&self) {
        if self.kind == Kind::Nvme {
            self.format();
        }
        for function in self.functions() {
            let device = place(&function);
            fs::write(device.join("driver_override"), "vfio-pci").unwrap();
            if device.join("driver").exists() {
                fs::write(device.join("driver/unbind"), &function).unwrap();
            }
            fs::write("/sys/bus/pci/drivers_probe", &function).unwrap();
        }
    }

    /// Makes a file system on a disk, if the host still has its driver on it.
    fn format(&self) {
        let Ok(mut controllers) = fs::read_dir(place(&self.address).join("nvme")) else { return };
        let controller = controllers.next().unwrap().unwrap().file_name();
        let disk = Path::new("/dev").join(format!("{}n1", controller.to_string_lossy()));
        assert!(Command::new("mkfs.ext4").arg("-qF").arg(disk).status().unwrap().success());
    }

    pub(super) fn config(&self) -> DeviceConfig {
        self.config_with(false)
    }

    pub(super) fn config_with(&self, peer_to_peer: bool) -> DeviceConfig {
        DeviceConfig::Vfio(VfioConfig { path: place(&self.address), clique: None, peer_to_peer })
    }
}

/// A device of the host as sysfs has it.
fn place(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

/// What the tests have.
pub(super) struct Host {
    pub(super) devices: Vec<Device>,
    program: Vec<u8>,
}

impl Host {
    /// The devices to pass, taken from the host, and what uses them; says so where there are none.
    pub(super) fn take() -> Option<Self> {
        let (Some(devices), Some(program)) =
            (std::env::var_os("TATAMI_TEST_DEVICES"), std::env::var_os("TATAMI_TEST_PASSTHROUGH"))
        else {
            eprintln!("SKIPPED: TATAMI_TEST_DEVICES and TATAMI_TEST_PASSTHROUGH name nothing to pass");
            return None;
        };
        let addresses = devices.to_string_lossy().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let devices = addresses.into_iter().map(|address| Device { kind: Kind::of(&address), address });
        let devices: Vec<_> = devices.filter(|device| device.kind != Kind::Nvme || Self::has_module("nvme")).collect();
        // Some kernels have it built in.
        let there = Path::new("/sys/bus/pci/drivers/vfio-pci").exists();
        assert!(there || Command::new("modprobe").arg("vfio-pci").status().unwrap().success());
        devices.iter().for_each(Device::take_from_host);
        Some(Self { devices, program: fs::read(program).unwrap() })
    }

    /// What a guest needs to use the devices.
    pub(super) fn programs(&self) -> [(&str, &[u8]); 1] {
        [("bin/passthrough", &self.program)]
    }

    /// Whether guests have the module of this name; says so where they have not.
    pub(super) fn has_module(name: &str) -> bool {
        let file = format!("{name}.ko");
        let found = guest::modules().iter().any(|(path, _)| path.ends_with(&file));
        if !found {
            eprintln!("SKIPPED: TATAMI_TEST_MODULES has no {file}");
        }
        found
    }

    /// The first device of a kind; says so where there is none.
    pub(super) fn of_kind(&self, kind: Kind) -> Option<&Device> {
        let found = self.devices.iter().find(|device| device.kind == kind);
        if found.is_none() {
            eprintln!("SKIPPED: TATAMI_TEST_DEVICES names no {kind:?}");
        }
        found
    }
}
