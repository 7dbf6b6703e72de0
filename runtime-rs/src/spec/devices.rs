//! Devices of the host in a specification: those that go to the guest as a whole, and all others, which are refused.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{SpecError, in_guest};

/// A device of the host that a container asked for by its file of VFIO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// `/dev/vfio/<group>` or `/dev/vfio/devices/vfio<number>`, as the host names it.
    pub path: PathBuf,
    /// Permissions of its nodes in the container.
    pub file_mode: Option<u32>,
    /// Owner of its nodes in the container.
    pub uid: Option<u32>,
    /// Group of its nodes in the container.
    pub gid: Option<u32>,
}

/// Where the kernel says what a device number stands for (sysfs).
const NUMBERS: &str = "/sys/dev/char";

/// The devices that a specification passes, each once.
pub(super) fn passed(linux: &Map<String, Value>) -> Vec<Passed> {
    passed_by(linux, Path::new(NUMBERS))
}

fn passed_by(linux: &Map<String, Value>, numbers: &Path) -> Vec<Passed> {
    let mut all: Vec<Passed> = Vec::new();
    for device in linux.get("devices").and_then(Value::as_array).into_iter().flatten() {
        let number = |key: &str| device.get(key).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
        if let Kind::Device(path) = kind(device, numbers)
            && all.iter().all(|other| other.path != path)
        {
            let (file_mode, uid, gid) = (number("fileMode"), number("uid"), number("gid"));
            all.push(Passed { path, file_mode, uid, gid });
        }
    }
    all
}

/// Takes what belongs to VFIO out of the devices and of the rules for them, and refuses what no guest has.
pub(super) fn rewrite(linux: &mut Map<String, Value>) -> Result<(), SpecError> {
    rewrite_by(linux, Path::new(NUMBERS))
}

fn rewrite_by(linux: &mut Map<String, Value>, numbers: &Path) -> Result<(), SpecError> {
    let mut gone = Vec::new();
    if let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) {
        devices.retain(|device| {
            let stays = kind(device, numbers) == Kind::Other;
            if !stays {
                gone.push((field(device, "major"), field(device, "minor")));
            }
            stays
        });
        devices.iter().try_for_each(check)?;
    }
    let resources = linux.get_mut("resources").and_then(|resources| resources.get_mut("devices"));
    if let Some(rules) = resources.and_then(Value::as_array_mut) {
        // Their numbers stand for something else in the guest.
        rules.retain(|rule| !gone.contains(&(field(rule, "major"), field(rule, "minor"))));
    }
    Ok(())
}

/// What a device of a specification is.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// A device for the guest.
    Device(PathBuf),
    /// The way to VFIO and to its IOMMUs, without a device.
    Control,
    Other,
}

fn kind(device: &Value, numbers: &Path) -> Kind {
    let text = |key| device.get(key).and_then(Value::as_str).unwrap_or_default();
    if !matches!(text("type"), "c" | "u") {
        return Kind::Other;
    }
    let (major, minor) = (field(device, "major"), field(device, "minor"));
    // By its number: the path is the container's to choose.
    let event = std::fs::read_to_string(numbers.join(format!("{major}:{minor}/uevent"))).unwrap_or_default();
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or_default();
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match name.strip_prefix("vfio/") {
        Some("vfio") => Kind::Control,
        Some(group) if is_number(group) => Kind::Device(Path::new("/dev").join(name)),
        Some(other) if other.strip_prefix("devices/vfio").is_some_and(is_number) => {
            Kind::Device(Path::new("/dev").join(name))
        }
        Some(_) => Kind::Other,
        None if name == "iommu" => Kind::Control,
        None => Kind::Other,
    }
}

fn field(device: &Value, key: &str) -> i64 {
    device.get(key).and_then(Value::as_i64).unwrap_or_default()
}

fn check(device: &Value) -> Result<(), SpecError> {
    let text = |key| device.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, major, minor) = (text("type"), field(device, "major"), field(device, "minor"));
    // A FIFO is made, not opened: it needs no driver.
    if kind == "p" || (matches!(kind.as_str(), "c" | "u") && in_guest(major, minor).is_some()) {
        return Ok(());
    }
    Err(SpecError::Device { path: text("path"), kind, major, minor })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A host with a VFIO group, a device of its own file, both control files, and a disk.
    fn host() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (number, name) in [
            ("10:196", "vfio/vfio"),
            ("243:0", "vfio/12"),
            ("511:3", "vfio/devices/vfio3"),
            ("10:125", "iommu"),
            ("4:64", "ttyS0"),
        ] {
            let directory = root.path().join(number);
            std::fs::create_dir(&directory).unwrap();
            std::fs::write(directory.join("uevent"), format!("MAJOR=1\nDEVNAME={name}\n")).unwrap();
        }
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
        let paths: Vec<_> = passed.iter().map(|passed| passed.path.display().to_string()).collect();
        assert_eq!(paths, ["/dev/vfio/12", "/dev/vfio/devices/vfio3"]);
        assert_eq!((passed[0].file_mode, passed[0].uid), (Some(0o660), None));
    }

    #[test]
    fn nothing_of_them_is_left_for_the_guest_but_what_it_has_itself() {
        let host = host();
        let mut fields =
            linux(&[("/dev/vfio/12", "c", 243, 0), ("/dev/vfio/vfio", "c", 10, 196), ("/dev/null", "c", 1, 3)]);
        rewrite_by(&mut fields, host.path()).unwrap();
        assert_eq!(fields["devices"].as_array().unwrap().len(), 1);
        let rules = fields["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules.len(), 2);
        assert!(rules.iter().all(|rule| rule["major"] != json!(243)));
    }

    #[test]
    fn a_path_alone_makes_no_device() {
        let host = host();
        for (path, kind, major, minor) in
            [("/dev/vfio/9", "c", 243, 9), ("/dev/vfio/12", "b", 243, 0), ("/dev/x", "c", 4, 64)]
        {
            let mut fields = linux(&[(path, kind, major, minor)]);
            assert!(passed_by(&fields, host.path()).is_empty(), "{path}");
            let text = rewrite_by(&mut fields, host.path()).unwrap_err().to_string();
            assert!(text.contains(path) && text.contains("no such device"), "{text}");
        }
    }
}
