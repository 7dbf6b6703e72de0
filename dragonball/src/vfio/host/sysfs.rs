//! What the kernel's sysfs says of PCI functions: their groups, and the drivers that they have.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::vfio::VfioError;

/// The address of a function on the host's PCI buses, written as `0000:01:00.0`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    /// 0 to 7.
    pub(crate) function: u8,
}

impl Address {
    /// The same for all functions of a device.
    pub(crate) fn device(self) -> (u32, u8, u8) {
        (self.domain, self.bus, self.device)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for Address {
    type Err = ();

    /// Takes the form with the domain and the one without.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (slot, function) = text.rsplit_once('.').ok_or(())?;
        let (bus, device) = slot.rsplit_once(':').ok_or(())?;
        let (domain, bus) = bus.rsplit_once(':').unwrap_or(("0", bus));
        let number = |text: &str| u8::from_str_radix(text, 16).map_err(drop);
        let (device, function) = (number(device)?, number(function)?);
        if device > 31 || function > 7 || text.contains('+') {
            return Err(());
        }
        let domain = u32::from_str_radix(domain, 16).map_err(drop)?;
        Ok(Self { domain, bus: number(bus)?, device, function })
    }
}

/// A function of the host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Function {
    /// Its address.
    pub(crate) address: Address,
    /// Its directory.
    pub(crate) directory: PathBuf,
    /// The driver that it is bound to.
    driver: Option<String>,
    /// Base class, subclass and interface.
    class: u32,
}

impl Function {
    /// Whether it leads to other buses: bridges stay with the host.
    fn is_bridge(&self) -> bool {
        const BRIDGE: u32 = 0x06;
        self.class >> 16 == BRIDGE
    }

    /// Whether a driver of VFIO has it: `vfio-pci`, or one of a vendor such as `nvgrace-gpu-vfio-pci`.
    fn is_ours(&self) -> bool {
        self.driver.as_ref().is_some_and(|driver| driver.contains("vfio"))
    }
}

impl fmt::Display for Function {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Some(driver) => write!(formatter, "{} (driver {driver})", self.address),
            None => write!(formatter, "{} (no driver)", self.address),
        }
    }
}

/// Functions that the IOMMU cannot tell apart.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Group {
    /// Its number.
    pub(crate) number: u32,
    /// All of its functions that are no bridges, by address.
    pub(crate) functions: Vec<Function>,
}

impl Group {
    /// Checks that every function can be given to a guest.
    ///
    /// # Errors
    /// When the host uses one of them; the error names them all.
    pub(crate) fn require_viable(&self) -> Result<(), VfioError> {
        let Some(in_use) = self.functions.iter().find(|function| !function.is_ours()) else { return Ok(()) };
        let devices: Vec<_> = self.functions.iter().map(ToString::to_string).collect();
        Err(VfioError::NotViable {
            group: self.number,
            devices: devices.join(", "),
            example: in_use.address.to_string(),
        })
    }
}

/// The mounted sysfs.
#[derive(Clone, Debug)]
pub(crate) struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self { root: "/sys".into() }
    }
}

impl Sysfs {
    #[cfg(test)]
    fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The group that `path` stands for: a function's directory in sysfs or its address alone, the file of a group
    /// (`/dev/vfio/7`), or the file of a device (`/dev/vfio/devices/vfio0`).
    ///
    /// # Errors
    /// When it stands for none, or the function has no group because there is no IOMMU.
    pub(crate) fn group(&self, path: &Path) -> Result<Group, VfioError> {
        let unknown = || VfioError::Unknown { path: path.to_owned() };
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(unknown)?;
        let parent = path.parent().map(Path::as_os_str).unwrap_or_default();
        if parent == "/dev/vfio" {
            return self.group_by_number(name.parse().map_err(|_| unknown())?, path);
        }
        let directory = if parent == "/dev/vfio/devices" {
            self.root.join("class/vfio-dev").join(name).join("device")
        } else {
            let address: Address = name.parse().map_err(|()| unknown())?;
            self.root.join("bus/pci/devices").join(address.to_string())
        };
        if !directory.is_dir() {
            return Err(unknown());
        }
        let link = std::fs::read_link(directory.join("iommu_group"));
        let number = link.ok().and_then(|link| link.file_name()?.to_str()?.parse().ok());
        self.group_by_number(number.ok_or_else(|| VfioError::NoIommu { device: name.to_owned() })?, path)
    }

    fn group_by_number(&self, number: u32, path: &Path) -> Result<Group, VfioError> {
        let unknown = |_| VfioError::Unknown { path: path.to_owned() };
        let entries = std::fs::read_dir(self.root.join(format!("kernel/iommu_groups/{number}/devices")));
        let names = entries.map_err(unknown)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut functions: Vec<_> = names.filter_map(|name| self.function(name.parse().ok()?)).collect();
        functions.retain(|function| !function.is_bridge());
        functions.sort_by_key(|function| function.address);
        if functions.is_empty() {
            return Err(VfioError::Unknown { path: path.to_owned() });
        }
        Ok(Group { number, functions })
    }

    fn function(&self, address: Address) -> Option<Function> {
        let directory = self.root.join("bus/pci/devices").join(address.to_string());
        let class = std::fs::read_to_string(directory.join("class")).ok()?;
        let class = u32::from_str_radix(class.trim().trim_start_matches("0x"), 16).ok()?;
        let driver = std::fs::read_link(directory.join("driver")).ok();
        let driver = driver.and_then(|driver| Some(driver.file_name()?.to_str()?.to_owned()));
        Some(Function { address, directory, driver, class })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, write};
    use std::os::unix::fs::symlink;

    use rstest::rstest;

    use super::*;

    /// A host with a group 7: a bridge, a display and its sound function.
    fn host(drivers: [Option<&str>; 2]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let functions = [
            ("0000:00:01.0", "0x060400", Some("pcieport")),
            ("0000:01:00.0", "0x030200", drivers[0]),
            ("0000:01:00.1", "0x040300", drivers[1]),
        ];
        for (address, class, driver) in functions {
            let directory = root.path().join("bus/pci/devices").join(address);
            create_dir_all(&directory).unwrap();
            create_dir_all(root.path().join("kernel/iommu_groups/7/devices").join(address)).unwrap();
            write(directory.join("class"), format!("{class}\n")).unwrap();
            symlink("../../../kernel/iommu_groups/7", directory.join("iommu_group")).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../../drivers/{driver}"), directory.join("driver")).unwrap();
            }
        }
        let alone = root.path().join("bus/pci/devices/0000:02:00.0");
        create_dir_all(&alone).unwrap();
        let file = root.path().join("class/vfio-dev/vfio3");
        create_dir_all(&file).unwrap();
        symlink("../../../bus/pci/devices/0000:01:00.0", file.join("device")).unwrap();
        root
    }

    #[rstest]
    #[case("/sys/bus/pci/devices/0000:01:00.0")]
    #[case("/sys/bus/pci/devices/0000:01:00.1/")]
    #[case("0000:01:00.1")]
    #[case("01:00.1")]
    #[case("/dev/vfio/7")]
    #[case("/dev/vfio/devices/vfio3")]
    fn every_way_of_naming_a_function_gives_its_whole_group_without_bridges(#[case] path: &str) {
        let root = host([Some("vfio-pci"); 2]);
        let group = Sysfs::at(root.path()).group(Path::new(path)).unwrap();
        let addresses: Vec<_> = group.functions.iter().map(|function| function.address.to_string()).collect();
        assert_eq!((group.number, addresses), (7, vec!["0000:01:00.0".to_owned(), "0000:01:00.1".to_owned()]));
        assert!(group.require_viable().is_ok());
    }

    #[rstest]
    #[case("/dev/vfio/8", "no PCI device")]
    #[case("/dev/vfio/vfio", "no PCI device")]
    #[case("/dev/null", "no PCI device")]
    #[case("0000:09:00.0", "no PCI device")]
    #[case("0000:01:20.0", "no PCI device")]
    #[case("", "no PCI device")]
    #[case("0000:02:00.0", "IOMMU")]
    fn what_is_no_group_is_refused_with_a_remedy(#[case] path: &str, #[case] text: &str) {
        let root = host([Some("vfio-pci"); 2]);
        let error = Sysfs::at(root.path()).group(Path::new(path)).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }

    #[rstest]
    #[case([Some("vfio-pci"), Some("snd_hda_intel")], "0000:01:00.1 (driver snd_hda_intel)")]
    #[case([None, Some("vfio-pci")], "0000:01:00.0 (no driver)")]
    fn a_group_that_the_host_uses_is_refused_with_all_its_drivers(
        #[case] drivers: [Option<&str>; 2],
        #[case] text: &str,
    ) {
        let root = host(drivers);
        let group = Sysfs::at(root.path()).group(Path::new("/dev/vfio/7")).unwrap();
        let error = group.require_viable().unwrap_err().to_string();
        assert!(
            error.contains(text) && error.contains("driver vfio-pci") && error.contains("driver_override"),
            "{error}"
        );
    }

    #[test]
    fn drivers_of_vendors_count_as_vfio() {
        let root = host([Some("nvgrace-gpu-vfio-pci"), Some("vfio-pci")]);
        assert!(Sysfs::at(root.path()).group(Path::new("01:00.0")).unwrap().require_viable().is_ok());
    }
}
