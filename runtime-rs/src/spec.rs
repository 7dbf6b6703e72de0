//! The OCI specification: read from the bundle, and rewritten for the guest.
//!
//! What names something of the host is replaced by what the guest has instead, or refused: the container must never get
//! something else than it asked for. The specification stays JSON all the way, so that a field that is newer than this
//! runtime reaches the agent untouched.

mod devices;
mod pod;
mod volumes;

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use protocols::{BUNDLES_DIR, MAX_SPEC, SHARED_DIR};
use serde_json::{Map, Value, json};

use crate::sizing::Demand;

pub use devices::Passed;

/// Why a container cannot be made from this specification.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The bundle's file cannot be read or is no JSON object.
    #[error("{}: {problem}; give a bundle with a valid OCI config.json", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A device that does not exist in the guest.
    #[error(
        "device {path} ({kind} {major}:{minor}): the virtual machine has no such device; remove it from the container, \
         give it as a whole by /dev/vfio/<group> if it is a PCI device, or set `privileged_without_host_devices = true` for this runtime in containerd if the container is privileged"
    )]
    Device {
        /// Path in the container.
        path: String,
        /// `b`, `c`, `u` or `p`.
        kind: String,
        /// Major number.
        major: i64,
        /// Minor number.
        minor: i64,
    },
    /// A mount whose source does not exist or is of no use to a guest.
    #[error("mount of {source_path} on {destination}: {problem}")]
    Mount {
        /// Path on the host.
        source_path: String,
        /// Path in the container.
        destination: String,
        /// What is wrong, and the remedy.
        problem: String,
    },
}

/// What a container is to its sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// A sandbox of its own, as `ctr run` and docker make them.
    Single(String),
    /// The sandbox container of an orchestrator: it stands for the pod and has no process of its own.
    Sandbox(String),
    /// A container in the sandbox of this id.
    Member(String),
}

/// Annotations that tell the role, and those that name the sandbox: containerd's CRI, then CRI-O.
const ROLE_KEYS: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

impl Role {
    /// The role of container `id`.
    #[must_use]
    pub fn of(annotations: &HashMap<String, String>, id: &str) -> Self {
        for (kind, sandbox) in ROLE_KEYS {
            match (annotations.get(kind).map(String::as_str), annotations.get(sandbox)) {
                (Some("sandbox"), _) => return Self::Sandbox(id.to_owned()),
                (Some("container"), Some(sandbox)) => return Self::Member(sandbox.clone()),
                _ => {}
            }
        }
        Self::Single(id.to_owned())
    }

    /// The sandbox's id.
    #[must_use]
    pub fn sandbox(&self) -> &str {
        match self {
            Self::Single(id) | Self::Sandbox(id) | Self::Member(id) => id,
        }
    }
}

/// Where a container's network is (runtime-spec, "Linux Namespaces").
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkPlace {
    /// In a new namespace, in which there is nothing but loopback.
    Own,
    /// In the namespace of this file.
    Path(PathBuf),
    /// With the host: the specification names no namespace.
    Host,
}

/// A specification as the bundle has it.
#[derive(Debug)]
pub struct Spec {
    fields: Map<String, Value>,
    bundle: PathBuf,
}

/// A file or directory of the host that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Names it among the container's shared mounts.
    pub number: usize,
    /// Path on the host.
    pub source: PathBuf,
    /// With the mounts below it.
    pub recursive: bool,
    /// The container sees a copy, which is changed when this is.
    pub copied: bool,
}

/// A specification for the agent.
#[derive(Debug)]
pub struct GuestSpec {
    /// As JSON.
    pub json: Vec<u8>,
    /// What the host must share first.
    pub binds: Vec<Bind>,
    /// It is to be in the PID namespace of its sandbox.
    pub sandbox_pidns: bool,
}

impl Spec {
    /// Reads `<bundle>/config.json`.
    ///
    /// # Errors
    ///
    /// [`SpecError::Unreadable`].
    pub fn read(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        let bad = |problem: String| SpecError::Unreadable { path: path.clone(), problem };
        let mut text = Vec::new();
        let file = std::fs::File::open(&path).map_err(|error| bad(error.to_string()))?;
        file.take(MAX_SPEC as u64 + 1).read_to_end(&mut text).map_err(|error| bad(error.to_string()))?;
        if text.len() > MAX_SPEC {
            return Err(bad(format!("larger than the limit of {MAX_SPEC} bytes")));
        }
        let fields = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
        Ok(Self { fields, bundle: bundle.to_owned() })
    }

    /// What container `id` is to its sandbox.
    #[must_use]
    pub fn role(&self, id: &str) -> Role {
        Role::of(&self.annotations(), id)
    }

    /// Its annotations.
    #[must_use]
    pub fn annotations(&self) -> HashMap<String, String> {
        text_map(self.fields.get("annotations"))
    }

    /// What it is limited to.
    #[must_use]
    pub fn limits(&self) -> Demand {
        let resources = self.fields.get("linux").and_then(|linux| linux.get("resources"));
        resources.map_or_else(Demand::default, |resources| Demand::of(resources, Demand::default()))
    }

    /// The host name that the sandbox gets; empty for none.
    #[must_use]
    pub fn hostname(&self) -> &str {
        self.fields.get("hostname").and_then(Value::as_str).unwrap_or_default()
    }

    /// The kernel parameters of the sandbox that it stands for, by their names with dots.
    #[must_use]
    pub fn sysctls(&self) -> HashMap<String, String> {
        text_map(self.fields.get("linux").and_then(|linux| linux.get("sysctl")))
    }

    /// The directory of the host that is its /dev/shm, unless that is the host's own.
    #[must_use]
    pub fn shared_memory(&self) -> Option<PathBuf> {
        let mounts = self.fields.get("mounts").and_then(Value::as_array).into_iter().flatten();
        let mut binds = mounts.filter_map(Value::as_object).map(MountEntry::of).filter(MountEntry::is_bind);
        let source = binds.find(MountEntry::is_shared_memory)?.source;
        (source != SHARED_MEMORY).then(|| PathBuf::from(source))
    }

    /// The cgroup that the host keeps the pod in; empty for none.
    #[must_use]
    pub fn cgroups_path(&self) -> &str {
        self.fields.get("linux").and_then(|linux| linux.get("cgroupsPath")).and_then(Value::as_str).unwrap_or_default()
    }

    /// The network namespace that it is to be in.
    #[must_use]
    pub fn network(&self) -> NetworkPlace {
        let namespaces = self.fields.get("linux").and_then(|linux| linux.get("namespaces")).and_then(Value::as_array);
        let is_network = |namespace: &&Value| namespace.get("type").and_then(Value::as_str) == Some("network");
        match namespaces.into_iter().flatten().find(is_network) {
            Some(namespace) => match namespace.get("path").and_then(Value::as_str) {
                Some(path) if !path.is_empty() => NetworkPlace::Path(PathBuf::from(path)),
                _ => NetworkPlace::Own,
            },
            None => NetworkPlace::Host,
        }
    }

    /// Whether somebody is about to put interfaces into a network namespace of its own: who makes a network for a container
    /// makes the names for it, too, or has hooks that do.
    #[must_use]
    pub fn awaits_network(&self) -> bool {
        let mounts = self.fields.get("mounts").and_then(Value::as_array).into_iter().flatten();
        let mut entries = mounts.filter_map(Value::as_object).map(MountEntry::of);
        let hooks = |kind: &str| self.fields.get("hooks")?.get(kind)?.as_array().filter(|list| !list.is_empty());
        entries.any(|entry| entry.is_bind() && entry.destination == RESOLVER_FILE)
            || ["prestart", "createRuntime"].into_iter().any(|kind| hooks(kind).is_some())
    }

    /// The root file system on the host, for a container that comes without rootfs mounts.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        let path = self.fields.get("root").and_then(|root| root.get("path")).and_then(Value::as_str);
        self.bundle.join(path.unwrap_or("rootfs"))
    }

    /// The devices of the host that go to its guest.
    #[must_use]
    pub fn devices(&self) -> Vec<Passed> {
        self.fields.get("linux").and_then(Value::as_object).map(devices::passed).unwrap_or_default()
    }

    /// Rewrites the specification for container `id` in the guest.
    ///
    /// # Errors
    ///
    /// [`SpecError::Device`] and [`SpecError::Mount`].
    pub fn into_guest(mut self, id: &str) -> Result<GuestSpec, SpecError> {
        let root = object(&mut self.fields, "root");
        root.insert("path".to_owned(), json!(format!("{BUNDLES_DIR}/{id}/rootfs")));
        let binds = rewrite_mounts(&mut self.fields, id)?;
        rewrite_hooks(&mut self.fields);
        if let Some(process) = self.fields.get_mut("process").and_then(Value::as_object_mut) {
            // Labels of the host's security modules; the guest has none.
            process.remove("apparmorProfile");
            process.remove("selinuxLabel");
        }
        let sandbox_pidns = rewrite_linux(object(&mut self.fields, "linux"), id)?;
        let json = serde_json::to_vec(&self.fields)
            .map_err(|error| SpecError::Unreadable { path: self.bundle, problem: error.to_string() })?;
        Ok(GuestSpec { json, binds, sandbox_pidns })
    }
}

/// The texts of an object, by their names.
fn text_map(value: Option<&Value>) -> HashMap<String, String> {
    let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
    value.and_then(Value::as_object).into_iter().flatten().filter_map(text).collect()
}

/// The object of this name, made if there is none.
fn object<'a>(fields: &'a mut Map<String, Value>, name: &str) -> &'a mut Map<String, Value> {
    let value = fields.entry(name).or_insert(Value::Null);
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(object) => object,
        _ => unreachable!("just made an object"),
    }
}

fn rewrite_hooks(fields: &mut Map<String, Value>) {
    let Some(hooks) = fields.get_mut("hooks").and_then(Value::as_object_mut) else { return };
    // All others run programs of the host (runtime-spec, "POSIX-platform Hooks").
    hooks.retain(|kind, list| {
        let keep = kind == "startContainer";
        if !keep && list.as_array().is_some_and(|list| !list.is_empty()) {
            tracing::warn!(kind, "hooks of the host are not run for a container in a virtual machine");
        }
        keep
    });
}

/// Answers what [`rewrite_namespaces`] does.
fn rewrite_linux(linux: &mut Map<String, Value>, id: &str) -> Result<bool, SpecError> {
    linux.insert("cgroupsPath".to_owned(), json!(format!("/{id}")));
    // Labels and CPU cache classes of the host.
    linux.remove("mountLabel");
    linux.remove("intelRdt");
    let sandbox_pidns = rewrite_namespaces(linux);
    if let Some(seccomp) = linux.get_mut("seccomp").and_then(Value::as_object_mut) {
        // A socket of the host.
        seccomp.remove("listenerPath");
        seccomp.remove("listenerMetadata");
    }
    devices::rewrite(linux)?;
    if let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) {
        keep_guest_resources(resources);
    }
    Ok(sandbox_pidns)
}

/// Keeps of a container's resources what means something in the guest.
pub fn keep_guest_resources(resources: &mut Map<String, Value>) {
    // Devices and network classes of the host.
    for host_only in ["blockIO", "network", "rdma"] {
        resources.remove(host_only);
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        // CPUs and nodes of the host: as in Kata, the guest's have nothing to do with them.
        cpu.remove("cpus");
        cpu.remove("mems");
    }
}

/// The virtual machine is the pod's network; a namespace that the specification names by a path belongs to the pod, and
/// the pod's own are the guest's. Answers whether it names a PID namespace so: that is the agent's to find.
fn rewrite_namespaces(linux: &mut Map<String, Value>) -> bool {
    let mut sandbox_pidns = false;
    let Some(namespaces) = linux.get_mut("namespaces").and_then(Value::as_array_mut) else { return false };
    namespaces.retain_mut(|namespace| {
        let kind = namespace.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let named = namespace.as_object_mut().and_then(|namespace| namespace.remove("path")).is_some();
        match kind.as_str() {
            "network" => false,
            "ipc" | "uts" => !named,
            "pid" => {
                sandbox_pidns = named;
                true
            }
            _ => true,
        }
    });
    sandbox_pidns
}

/// Character devices that every guest has: path, major, minor (Documentation/admin-guide/devices.txt).
const GUEST_DEVICES: [(&str, i64, i64); 10] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/console", 5, 1),
    ("/dev/ptmx", 5, 2),
    ("/dev/net/tun", 10, 200),
    ("/dev/fuse", 10, 229),
];

fn in_guest(major: i64, minor: i64) -> Option<&'static str> {
    GUEST_DEVICES.iter().find(|(_, a, b)| (*a, *b) == (major, minor)).map(|(path, _, _)| *path)
}

/// Where programs find who resolves names (resolv.conf(5)).
const RESOLVER_FILE: &str = "/etc/resolv.conf";

/// POSIX shared memory, in a container and in the guest.
const SHARED_MEMORY: &str = "/dev/shm";

/// A mount as the specification has it.
struct MountEntry {
    kind: String,
    source: String,
    destination: String,
    options: Vec<String>,
}

impl MountEntry {
    fn of(mount: &Map<String, Value>) -> Self {
        let text = |key: &str| mount.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        let options = options.filter_map(Value::as_str).map(str::to_owned).collect();
        Self { kind: text("type"), source: text("source"), destination: text("destination"), options }
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|found| found == option)
    }

    fn is_bind(&self) -> bool {
        self.kind == "bind" || self.has("rbind") || self.has("bind")
    }

    fn is_shared_memory(&self) -> bool {
        self.destination.trim_end_matches('/') == SHARED_MEMORY
    }

    fn bad(&self, problem: String) -> SpecError {
        SpecError::Mount { source_path: self.source.clone(), destination: self.destination.clone(), problem }
    }
}

fn rewrite_mounts(fields: &mut Map<String, Value>, id: &str) -> Result<Vec<Bind>, SpecError> {
    let mut binds = Vec::new();
    for mount in fields.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(mount) = mount.as_object_mut() else { continue };
        let entry = MountEntry::of(mount);
        if !entry.is_bind() {
            if entry.source.starts_with("/dev/") {
                let kind = &entry.kind;
                return Err(
                    entry.bad(format!("file system {kind} on a device of the host; mount it there and bind it"))
                );
            }
            continue;
        }
        let path = if entry.is_shared_memory() {
            // Shared by the pod's containers, so it is the guest's own.
            SHARED_MEMORY.to_owned()
        } else if let Some(path) = device_in_guest(Path::new(&entry.source)).map_err(|why| entry.bad(why))? {
            path.to_owned()
        } else {
            let number = binds.len();
            let recursive = entry.has("rbind");
            let copied = entry.has("ro") && volumes::is_copied(Path::new(&entry.source));
            binds.push(Bind { number, source: PathBuf::from(entry.source), recursive, copied });
            let parent = if copied { BUNDLES_DIR } else { SHARED_DIR };
            format!("{parent}/{id}/mounts/{number}")
        };
        mount.insert("source".to_owned(), json!(path));
    }
    Ok(binds)
}

/// For a bind mount: the guest's device of the same number if the source is a device, `None` if it can be shared.
fn device_in_guest(source: &Path) -> Result<Option<&'static str>, String> {
    if !source.is_absolute() {
        return Err("the source is not an absolute path; write the whole path".to_owned());
    }
    let metadata = std::fs::metadata(source).map_err(|error| format!("{error}; create it on the host first"))?;
    if metadata.file_type().is_block_device() {
        return Err(
            "a block device cannot be bound; give it as a device of the container, or mount it and bind the directory"
                .to_owned(),
        );
    }
    if metadata.file_type().is_char_device() {
        let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
        return match in_guest(i64::from(major), i64::from(minor)) {
            Some(path) => Ok(Some(path)),
            None => Err(format!("the virtual machine has no device {major}:{minor}; remove the mount")),
        };
    }
    if metadata.file_type().is_socket() {
        tracing::warn!(source = %source.display(), "nothing in the virtual machine can connect to a socket of the host");
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
