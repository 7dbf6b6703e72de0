//! Devices of the host in a specification: those that go to the guest as a whole, and all others, which are refused.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{SpecError, in_guest};
use crate::machine::HostDevice;

/// A device of the host that a container asked for, and its nodes in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// The device.
    pub device: HostDevice,
    /// Permissions of its nodes.
    pub file_mode: Option<u32>,
    /// Owner of its nodes.
    pub uid: Option<u32>,
    /// Group of its nodes.
    pub gid: Option<u32>,
    /// Path of a disk's node.
    pub node: String,
}

impl Passed {
    /// Whether the container may only read it.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        matches!(self.device, HostDevice::Disk { read_only: true, .. })
    }
}

/// Where the kernel says what a device number stands for (sysfs).
const NUMBERS: &str = "/sys/dev";

/// The devices that a specification passes, each group once, each disk by each of its nodes.
pub(super) fn passed(linux: &Map<String, Value>) -> Vec<Passed> {
    passed_by(linux, Path::new(NUMBERS))
}

fn passed_by(linux: &Map<String, Value>, numbers: &Path) -> Vec<Passed> {
    let mut all: Vec<Passed> = Vec::new();
    for device in linux.get("devices").and_then(Value::as_array).into_iter().flatten() {
        let number = |key: &str| device.get(key).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
        let (file_mode, uid, gid) = (number("fileMode"), number("uid"), number("gid"));
        match kind(device, numbers) {
            Kind::Group(path) if all.iter().all(|other| other.device.path() != path) => {
                all.push(Passed { device: HostDevice::Group(path), file_mode, uid, gid, node: String::new() });
            }
            Kind::Disk { path, read_only } => {
                let read_only = read_only || !may_be_written(linux, device);
                let node = text(device, "path").to_owned();
                all.push(Passed { device: HostDevice::Disk { path, read_only }, file_mode, uid, gid, node });
            }
            Kind::Group(_) | Kind::Control | Kind::Other => {}
        }
    }
    all
}

/// Whether the rules let a container write to a device: the last that is about it says so, and without any it may.
fn may_be_written(linux: &Map<String, Value>, device: &Value) -> bool {
    let rules = linux.get("resources").and_then(|resources| resources.get("devices")).and_then(Value::as_array);
    let is_about = |rule: &&Value| {
        let same = |key: &str| rule.get(key).and_then(Value::as_i64).is_none_or(|n| n == -1 || n == field(device, key));
        let access = rule.get("access").and_then(Value::as_str);
        matches!(text(rule, "type"), "" | "a" | "b")
            && same("major")
            && same("minor")
            && access.is_none_or(|access| access.contains('w'))
    };
    let last = rules.and_then(|rules| rules.iter().rfind(is_about));
    last.is_none_or(|rule| rule.get("allow").and_then(Value::as_bool).unwrap_or_default())
}

/// Takes what the guest gets as a whole out of the devices and of the rules for them, and refuses what no guest has.
pub(super) fn rewrite(linux: &mut Map<String, Value>) -> Result<(), SpecError> {
    rewrite_by(linux, Path::new(NUMBERS))
}

fn rewrite_by(linux: &mut Map<String, Value>, numbers: &Path) -> Result<(), SpecError> {
    let mut gone = Vec::new();
    if let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) {
        devices.retain(|device| {
            let stays = kind(device, numbers) == Kind::Other;
            if !stays {
                gone.push((is_block(device), field(device, "major"), field(device, "minor")));
            }
            stays
        });
        devices.iter().try_for_each(check)?;
    }
    let resources = linux.get_mut("resources").and_then(|resources| resources.get_mut("devices"));
    if let Some(rules) = resources.and_then(Value::as_array_mut) {
        // Their numbers stand for something else in the guest.
        rules.retain(|rule| !gone.contains(&(is_block(rule), field(rule, "major"), field(rule, "minor"))));
    }
    Ok(())
}

/// What a device of a specification is.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// PCI functions for the guest.
    Group(PathBuf),
    /// A disk for the guest.
    Disk {
        path: PathBuf,
        read_only: bool,
    },
    /// The way to VFIO and to its IOMMUs, without a device.
    Control,
    Other,
}

/// By its number: the path is the container's to choose.
fn kind(device: &Value, numbers: &Path) -> Kind {
    let directory = if is_block(device) { "block" } else { "char" };
    let entry = numbers.join(directory).join(format!("{}:{}", field(device, "major"), field(device, "minor")));
    let event = std::fs::read_to_string(entry.join("uevent")).unwrap_or_default();
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or_default();
    let path = || Path::new("/dev").join(name);
    match text(device, "type") {
        "b" if !name.is_empty() => {
            let read_only = std::fs::read_to_string(entry.join("ro")).is_ok_and(|text| text.trim() == "1");
            Kind::Disk { path: path(), read_only }
        }
        "c" | "u" => character_kind(name, path),
        _ => Kind::Other,
    }
}

fn character_kind(name: &str, path: impl Fn() -> PathBuf) -> Kind {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match name.strip_prefix("vfio/") {
        Some("vfio") => Kind::Control,
        Some(group) if is_number(group) => Kind::Group(path()),
        Some(other) if other.strip_prefix("devices/vfio").is_some_and(is_number) => Kind::Group(path()),
        Some(_) => Kind::Other,
        None if name == "iommu" => Kind::Control,
        None => Kind::Other,
    }
}

fn is_block(device: &Value) -> bool {
    text(device, "type") == "b"
}

fn text<'a>(device: &'a Value, key: &str) -> &'a str {
    device.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn field(device: &Value, key: &str) -> i64 {
    device.get(key).and_then(Value::as_i64).unwrap_or_default()
}

fn check(device: &Value) -> Result<(), SpecError> {
    let (kind, major, minor) = (text(device, "type"), field(device, "major"), field(device, "minor"));
    // A FIFO is made, not opened: it needs no driver.
    if kind == "p" || (matches!(kind, "c" | "u") && in_guest(major, minor).is_some()) {
        return Ok(());
    }
    Err(SpecError::Device { path: text(device, "path").to_owned(), kind: kind.to_owned(), major, minor })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A host with a VFIO group, a device of its own file, both control files, and a disk.
    fn host() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (number, name) in [
            ("char/10:196", "vfio/vfio"),
            ("char/243:0", "vfio/12"),
            ("char/511:3", "vfio/devices/vfio3"),
            ("char/10:125", "iommu"),
            ("char/4:64", "ttyS0"),
            ("block/8:16", "sdb"),
            ("block/253:0", "mapper/data"),
        ] {
            let directory = root.path().join(number);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("uevent"), format!("MAJOR=1\nDEVNAME={name}\n")).unwrap();
        }
        std::fs::write(root.path().join("block/8:16/ro"), "0\n").unwrap();
        std::fs::write(root.path().join("block/253:0/ro"), "1\n").unwrap();
        root
    }

    fn linux(devices: &[(&str, &str, i64, i64)]) -> Map<String, Value> {
        let devices: Vec<Value> = devices
            .iter()
            .map(|(path, kind, major, minor)| json!({"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 0o660}))
            .collect();
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 243, "minor": 0, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        ]);
        json!({"devices": devices, "resources": {"devices": rules}}).as_object().unwrap().clone()
    }

    #[test]
    fn a_device_is_known_by_its_number_whatever_it_is_called_in_the_container() {
        let host = host();
        let fields = linux(&[
            ("/dev/vfio/vfio", "c", 10, 196),
            ("/dev/gpu", "c", 243, 0),
            ("/dev/again", "c", 243, 0),
            ("/dev/other", "c", 511, 3),
            ("/dev/iommu", "c", 10, 125),
            ("/dev/null", "c", 1, 3),
        ]);
        let passed = passed_by(&fields, host.path());
        let paths: Vec<_> = passed.iter().map(|passed| passed.device.path().display().to_string()).collect();
        assert_eq!(paths, ["/dev/vfio/12", "/dev/vfio/devices/vfio3"]);
        assert_eq!((passed[0].file_mode, passed[0].uid), (Some(0o660), None));
    }

    /// The specification's only disk, after a rule more.
    fn disk(host: &Path, number: (i64, i64), rule: Value) -> Passed {
        let mut fields = linux(&[("/dev/volume", "b", number.0, number.1)]);
        fields["resources"]["devices"].as_array_mut().unwrap().push(rule);
        passed_by(&fields, host).pop().unwrap()
    }

    #[test]
    fn a_disk_may_be_written_to_if_the_rules_and_the_host_say_so() {
        let host = host();
        let rule = |access: &str| json!({"allow": true, "type": "b", "major": 8, "minor": 16, "access": access});
        for (access, read_only) in [("rwm", false), ("rm", true)] {
            let passed = disk(host.path(), (8, 16), rule(access));
            assert_eq!(passed.device, HostDevice::Disk { path: PathBuf::from("/dev/sdb"), read_only }, "{access}");
            assert_eq!((passed.node.as_str(), passed.file_mode), ("/dev/volume", Some(0o660)));
        }
        let all = json!({"allow": true, "access": "rwm"});
        assert!(!disk(host.path(), (8, 16), all.clone()).is_read_only());
        let passed = disk(host.path(), (253, 0), all);
        assert_eq!(passed.device, HostDevice::Disk { path: PathBuf::from("/dev/mapper/data"), read_only: true });
    }

    #[test]
    fn nothing_of_them_is_left_for_the_guest_but_what_it_has_itself() {
        let host = host();
        let mut fields = linux(&[
            ("/dev/vfio/12", "c", 243, 0),
            ("/dev/vfio/vfio", "c", 10, 196),
            ("/dev/volume", "b", 8, 16),
            ("/dev/null", "c", 1, 3),
        ]);
        rewrite_by(&mut fields, host.path()).unwrap();
        assert_eq!(fields["devices"].as_array().unwrap().len(), 1);
        let rules = fields["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules.len(), 2);
        assert!(rules.iter().all(|rule| rule["major"] != json!(243)));
    }

    #[test]
    fn a_path_alone_makes_no_device() {
        let host = host();
        for (path, kind, major, minor) in [
            ("/dev/vfio/9", "c", 243, 9),
            ("/dev/vfio/12", "b", 243, 0),
            ("/dev/x", "c", 4, 64),
            ("/dev/sdb", "b", 8, 17),
        ] {
            let mut fields = linux(&[(path, kind, major, minor)]);
            assert!(passed_by(&fields, host.path()).is_empty(), "{path}");
            let text = rewrite_by(&mut fields, host.path()).unwrap_err().to_string();
            assert!(text.contains(path) && text.contains("no such device"), "{text}");
        }
    }
}
