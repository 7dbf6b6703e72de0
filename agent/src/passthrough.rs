//! Devices of the host that a container asked for: what the guest's drivers made of them is put into the container.
//!
//! A function without a driver, or whose driver makes no nodes, is no error: it can be used through sysfs, which every
//! container sees.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocols::DISK_BY_PATH;
use protocols::agent::PciDevice;
use protocols::containerd::types::mount::Mount;
use serde_json::{Map, Value, json};
use tokio::task::spawn_blocking;

use crate::error::{Error, Result};
use crate::uevents::Uevents;

/// How long a driver may take to make its first node. A disk is found after its driver has started.
const NODE_DEADLINE: Duration = Duration::from_secs(10);
/// Nodes of one device; a disk has one for each partition.
const NODES: usize = 1024;
/// Directories between a function and the last of its nodes: an NVMe partition has four.
const DEPTH: usize = 8;
/// Devices of one container.
const DEVICES: usize = 31;
/// PCI base classes whose drivers make nodes: mass storage and displays.
const CLASSES_WITH_NODES: [u8; 2] = [0x01, 0x03];

/// Where sysfs and the device nodes are.
struct Places {
    functions: PathBuf,
    probe: PathBuf,
    nodes: PathBuf,
}

/// A device node of the guest.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    /// Below `/dev`.
    name: String,
    block: bool,
    /// Not a part of another.
    whole: bool,
    major: u32,
    minor: u32,
}

/// Adds the nodes of `devices` to a specification, and the rules that allow their use.
pub(crate) async fn admit(spec: &[u8], devices: &[PciDevice]) -> Result<Vec<u8>> {
    if devices.len() > DEVICES {
        return Err(Error::invalid(format!("{} devices: the limit is {DEVICES}", devices.len())));
    }
    let mut fields: Map<String, Value> =
        serde_json::from_slice(spec).map_err(|error| Error::invalid(format!("the spec is no JSON object: {error}")))?;
    let places = Places::guest();
    for device in devices {
        places.admit(&mut fields, device).await?;
    }
    serde_json::to_vec(&fields).map_err(|error| Error::invalid(error.to_string()))
}

/// Mounts with the guest's name for each source that is a disk in a slot of the PCI bus; waits for its driver.
pub(crate) async fn name_disks(mounts: &[Mount]) -> Result<Vec<Mount>> {
    let places = Places::guest();
    let mut named = Vec::new();
    for mount in mounts {
        let mut mount = mount.clone();
        if let Some(address) = mount.source.strip_prefix(DISK_BY_PATH) {
            let disk = places.disk(address).await?;
            mount.source = places.nodes.join(disk.name).to_string_lossy().into_owned();
        }
        named.push(mount);
    }
    Ok(named)
}

impl Places {
    fn guest() -> Self {
        Self {
            functions: PathBuf::from("/sys/bus/pci/devices"),
            probe: PathBuf::from("/sys/bus/pci/drivers_probe"),
            nodes: PathBuf::from("/dev"),
        }
    }

    /// Adds the nodes of a device to a specification: all, or a disk's alone by the name that it is to have.
    async fn admit(&self, spec: &mut Map<String, Value>, device: &PciDevice) -> Result<()> {
        if !device.node.is_empty() {
            let disk = self.disk(&device.address).await?;
            return self.add(spec, device, &disk, &device.node);
        }
        let nodes = self.nodes_of(&device.address).await?;
        tracing::debug!(device.address, ?nodes, "a device of the host is in the guest");
        nodes.iter().try_for_each(|node| self.add(spec, device, node, &format!("/dev/{}", node.name)))
    }

    /// The node of the whole disk at `address`.
    async fn disk(&self, address: &str) -> Result<Node> {
        let nodes = self.nodes_of(address).await?;
        let disk = nodes.into_iter().find(|node| node.block && node.whole);
        disk.ok_or_else(|| Error::invalid(format!("the PCI device {address} is no disk")))
    }

    /// The nodes of all functions in the slot of `address`, when their drivers have made them.
    async fn nodes_of(&self, address: &str) -> Result<Vec<Node>> {
        let slot = slot(address)?;
        let failed = || Error::io::<io::Error>(format!("cannot look at the PCI device {address}"));
        let events = Uevents::listen().map_err(failed())?;
        let reached = async {
            let functions = events.until(|| self.functions(slot)).await?;
            let mut nodes = Vec::new();
            for function in functions {
                self.settle(&function).await?;
                let wait = makes_nodes(&function)?;
                nodes.extend(
                    events.until(|| Ok(Some(nodes_below(&function)?).filter(|n| !wait || !n.is_empty()))).await?,
                );
            }
            Ok(nodes)
        };
        match tokio::time::timeout(NODE_DEADLINE, reached).await {
            Ok(nodes) => nodes.map_err(failed()),
            Err(_) => Err(Error::Deadline {
                what: format!("the driver of PCI device {address} has made no device node"),
                seconds: NODE_DEADLINE.as_secs(),
            }),
        }
    }

    /// The functions in a slot; nothing while there is none.
    fn functions(&self, slot: &str) -> io::Result<Option<Vec<PathBuf>>> {
        let mut functions = Vec::new();
        for entry in fs::read_dir(&self.functions)? {
            let entry = entry?;
            if entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix(slot))
                .is_some_and(|rest| rest.starts_with('.'))
            {
                functions.push(entry.path());
            }
        }
        functions.sort();
        Ok(Some(functions).filter(|functions| !functions.is_empty()))
    }

    /// Returns when the kernel has tried its drivers on a function: a request to do so waits for one that is under way.
    async fn settle(&self, function: &Path) -> io::Result<()> {
        let name = function.file_name().unwrap_or_default().to_owned();
        let probe = self.probe.clone();
        // An error means that no driver wants it, or one has it.
        let probed = spawn_blocking(move || drop(fs::write(probe, name.as_encoded_bytes()))).await;
        probed.map_err(io::Error::other)
    }

    /// Adds a node to a specification as `name`.
    fn add(&self, spec: &mut Map<String, Value>, device: &PciDevice, node: &Node, name: &str) -> Result<()> {
        let path = self.nodes.join(&node.name);
        let kind = if node.block { "b" } else { "c" };
        let own = fs::metadata(&path).map_err(Error::io(format!("cannot look at {}", path.display())))?;
        let linux = child(spec, "linux", json!({}))?;
        let linux = linux.as_object_mut().ok_or_else(|| Error::invalid("`linux` of the spec is no object"))?;
        let mode = device.file_mode.unwrap_or_else(|| own.mode()) & 0o777;
        push(
            linux,
            "devices",
            json!({
                "path": name, "type": kind, "major": node.major, "minor": node.minor,
                "fileMode": mode, "uid": device.uid.unwrap_or_else(|| own.uid()), "gid": device.gid.unwrap_or_else(|| own.gid()),
            }),
        )?;
        let resources = child(linux, "resources", json!({}))?;
        let resources =
            resources.as_object_mut().ok_or_else(|| Error::invalid("`resources` of the spec is no object"))?;
        let access = if device.read_only { "rm" } else { "rwm" };
        let rule = json!({"allow": true, "type": kind, "major": node.major, "minor": node.minor, "access": access});
        push(resources, "devices", rule)
    }
}

/// The field of this name; made where there is none.
fn child<'a>(object: &'a mut Map<String, Value>, name: &str, empty: Value) -> Result<&'a mut Value> {
    let field = object.entry(name).or_insert(Value::Null);
    if field.is_null() {
        *field = empty;
    }
    Ok(field)
}

fn push(object: &mut Map<String, Value>, name: &str, value: Value) -> Result<()> {
    let list = child(object, name, json!([]))?.as_array_mut();
    list.ok_or_else(|| Error::invalid(format!("`{name}` of the spec is no list")))?.push(value);
    Ok(())
}

/// The address without its function, checked: it becomes part of a path.
fn slot(address: &str) -> Result<&str> {
    let hexadecimal = |part: &str, digits: usize| part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit());
    let parts = address.rsplit_once('.').filter(|(slot, function)| {
        let fields: Vec<&str> = slot.split(':').collect();
        matches!(fields[..], [domain, bus, slot] if hexadecimal(domain, 4) && hexadecimal(bus, 2) && hexadecimal(slot, 2))
            && hexadecimal(function, 1)
    });
    let bad = || Error::invalid(format!("PCI address {address:?}: expected one such as 0000:00:05.0"));
    parts.map(|(slot, _)| slot).ok_or_else(bad)
}

/// Whether a function's driver will make nodes.
fn makes_nodes(function: &Path) -> io::Result<bool> {
    let class = fs::read_to_string(function.join("class"))?;
    let class = u32::from_str_radix(class.trim().trim_start_matches("0x"), 16).map_err(io::Error::other)?;
    let [_, base, ..] = class.to_be_bytes();
    Ok(function.join("driver").exists() && CLASSES_WITH_NODES.contains(&base))
}

/// The nodes that a function's driver has made: sysfs has a file `dev` for each.
fn nodes_below(function: &Path) -> io::Result<Vec<Node>> {
    let mut nodes = Vec::new();
    collect(&fs::canonicalize(function)?, DEPTH, &mut nodes)?;
    nodes.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(nodes)
}

/// What goes away while it is looked at is not there.
fn collect(directory: &Path, depth: usize, nodes: &mut Vec<Node>) -> io::Result<()> {
    nodes.extend(node_at(directory));
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for entry in entries.flatten() {
        // Symbolic links lead to other devices.
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, nodes)?;
        }
        if nodes.len() > NODES {
            return Err(io::Error::other(format!("more than {NODES} device nodes")));
        }
    }
    Ok(())
}

fn node_at(directory: &Path) -> Option<Node> {
    let numbers = fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = numbers.trim().split_once(':')?;
    let event = fs::read_to_string(directory.join("uevent")).ok()?;
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME="))?.to_owned();
    let subsystem = fs::read_link(directory.join("subsystem")).ok()?;
    let block = subsystem.file_name().is_some_and(|name| name == "block");
    let whole = !directory.join("partition").exists();
    Some(Node { name, block, whole, major: major.parse().ok()?, minor: minor.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A sysfs with one function in slot 5: a disk with a partition, if its driver has made them.
    fn sysfs(with_disk: bool) -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().expect("a directory");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, text).expect("a file");
        };
        write("functions/0000:00:05.0/class", "0x010802\n");
        write("functions/0000:00:15.0/class", "0x020000\n");
        write("drivers/nvme/x", "");
        fs::create_dir_all(root.path().join("class/block")).expect("a directory");
        let function = root.path().join("functions/0000:00:05.0");
        symlink(root.path().join("drivers/nvme"), function.join("driver")).expect("a link");
        if with_disk {
            for (place, name, numbers) in [("disk", "nvme0n1", "259:0"), ("disk/part", "nvme0n1p1", "259:1")] {
                write(&format!("functions/0000:00:05.0/{place}/dev"), &format!("{numbers}\n"));
                let event = format!("MAJOR=259\nDEVNAME={name}\nDEVTYPE=disk\n");
                write(&format!("functions/0000:00:05.0/{place}/uevent"), &event);
                symlink(root.path().join("class/block"), function.join(place).join("subsystem")).expect("a link");
                write(&format!("nodes/{name}"), "");
            }
            write("functions/0000:00:05.0/disk/part/partition", "1\n");
            // Not a way to other devices.
            symlink("/dev", function.join("link")).expect("a link");
        }
        (root, function)
    }

    fn places(root: &Path) -> Places {
        Places { functions: root.join("functions"), probe: root.join("probe"), nodes: root.join("nodes") }
    }

    #[test]
    fn addresses_that_are_no_slots_are_refused() {
        assert_eq!(slot("0000:00:05.0").expect("a slot"), "0000:00:05");
        for bad in ["", "0000:00:05", "00:05.0", "0000:00:05.", "0000:00:../..", "0000:00:05.0/../x", "g000:00:05.0"] {
            assert!(slot(bad).is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn the_nodes_of_a_function_are_found_below_it_and_nowhere_else() {
        let (root, function) = sysfs(true);
        let node = |name: &str, whole, minor| Node { name: name.to_owned(), block: true, whole, major: 259, minor };
        assert_eq!(nodes_below(&function).expect("nodes"), [node("nvme0n1", true, 0), node("nvme0n1p1", false, 1)]);
        assert_eq!(places(root.path()).functions("0000:00:05").expect("an answer"), Some(vec![function]));
        assert_eq!(places(root.path()).functions("0000:00:06").expect("an answer"), None);
    }

    #[tokio::test]
    async fn the_container_gets_the_nodes_and_may_use_them() {
        let (root, _) = sysfs(true);
        let device = PciDevice {
            address: "0000:00:05.0".to_owned(),
            file_mode: Some(0o660),
            gid: Some(6),
            ..Default::default()
        };
        let places = places(root.path());
        let mut spec = Map::new();
        places.admit(&mut spec, &device).await.expect("nodes");
        let added = &spec["linux"]["devices"][1];
        assert_eq!(
            (&added["path"], &added["type"], &added["minor"]),
            (&json!("/dev/nvme0n1p1"), &json!("b"), &json!(1))
        );
        assert_eq!((&added["fileMode"], &added["gid"]), (&json!(0o660), &json!(6)));
        let rule = json!({"allow": true, "type": "b", "major": 259, "minor": 1, "access": "rwm"});
        assert_eq!(spec["linux"]["resources"]["devices"][1], rule);
    }

    #[tokio::test]
    async fn a_disk_is_in_the_container_by_its_own_name_and_without_its_partitions() {
        let (root, function) = sysfs(true);
        let places = places(root.path());
        let address = "0000:00:05.0".to_owned();
        let device = PciDevice { address, node: "/dev/volume".to_owned(), read_only: true, ..Default::default() };
        let mut spec = Map::new();
        places.admit(&mut spec, &device).await.expect("a disk");
        let devices = spec["linux"]["devices"].as_array().expect("a list");
        assert_eq!((devices.len(), &devices[0]["path"], &devices[0]["minor"]), (1, &json!("/dev/volume"), &json!(0)));
        assert_eq!(spec["linux"]["resources"]["devices"][0]["access"], json!("rm"));
        fs::remove_dir_all(function.join("disk")).expect("a directory");
        fs::write(function.join("class"), "0x020000\n").expect("a file");
        let text = places.admit(&mut spec, &device).await.expect_err("no disk").to_string();
        assert!(text.contains("0000:00:05.0 is no disk"), "{text}");
    }

    #[tokio::test]
    async fn a_driver_that_makes_no_nodes_is_waited_for_only_where_it_should() {
        let (root, function) = sysfs(false);
        let device = PciDevice { address: "0000:00:05.0".to_owned(), ..Default::default() };
        assert!(makes_nodes(&function).expect("a class"));
        fs::write(function.join("class"), "0x020000\n").expect("a file");
        assert!(places(root.path()).nodes_of(&device.address).await.expect("none").is_empty());
        // No driver: nobody will make any.
        fs::write(function.join("class"), "0x030200\n").expect("a file");
        fs::remove_file(function.join("driver")).expect("a link");
        assert!(places(root.path()).nodes_of(&device.address).await.expect("none").is_empty());
    }
}
