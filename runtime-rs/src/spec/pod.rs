//! A pod that no container stands for: what the Sandbox API says of it, in the words of a specification.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use protocols::cri::{LinuxContainerResources, PodSandboxConfig};
use serde_json::{Value, json};

use super::{MountEntry, ROLE_KEYS, SHARED_MEMORY, Spec};
use crate::sizing::{SANDBOX_MEMORY, SANDBOX_PERIOD, SANDBOX_QUOTA};

/// What systemd calls the cgroups of containerd's pods.
const SCOPE_PREFIX: &str = "cri-containerd";

impl Spec {
    /// What the specification of pod `id`'s sandbox container would be, if it had one. An empty `network_namespace` is the
    /// host's.
    #[must_use]
    pub fn of_pod(config: &PodSandboxConfig, id: &str, network_namespace: &str) -> Self {
        let mut annotations = config.annotations.clone();
        annotations.insert(ROLE_KEYS[0].0.to_owned(), "sandbox".to_owned());
        if let Some(resources) = config.linux.resources.as_ref() {
            annotations.extend(announced(resources));
        }
        let namespaces = match network_namespace {
            "" => json!([]),
            path => json!([{"type": "network", "path": path}]),
        };
        let cgroups_path = cgroups_path(&config.linux.cgroup_parent, id);
        let fields = json!({
            "hostname": config.hostname,
            "annotations": annotations,
            "linux": {"sysctl": config.linux.sysctls, "cgroupsPath": cgroups_path, "namespaces": namespaces},
        });
        let Value::Object(fields) = fields else { unreachable!("an object was written") };
        Self { fields, bundle: PathBuf::new() }
    }

    /// Adds what a pod's container comes without when no container stands for the pod: the pod's `files`, by their places in
    /// the container, unless the specification has something there, and the pod's shared memory in place of one of its own.
    pub fn complete(&mut self, files: &[(&str, &Path)]) {
        let readonly = self.fields.get("root").and_then(|root| root.get("readonly")).and_then(Value::as_bool);
        let access = if readonly == Some(true) { "ro" } else { "rw" };
        let shared_memory = (SHARED_MEMORY, Path::new(SHARED_MEMORY), "rw");
        let is_own_memory = |mount: &Value| {
            let entry = mount.as_object().map(MountEntry::of);
            entry.is_some_and(|entry| entry.is_shared_memory() && !entry.is_bind())
        };
        let added = files.iter().map(|(place, source)| (*place, *source, access)).chain([shared_memory]);
        let mounts = self.fields.entry("mounts").or_insert_with(|| json!([]));
        let Some(mounts) = mounts.as_array_mut() else { return };
        mounts.retain(|mount| !is_own_memory(mount));
        for (place, source, access) in added {
            let has = |mount: &Value| {
                let entry = mount.as_object().map(MountEntry::of);
                entry.is_some_and(|entry| entry.destination.trim_end_matches('/') == place)
            };
            if !mounts.iter().any(has) {
                let options = ["rbind", "rprivate", access];
                mounts.push(json!({"destination": place, "type": "bind", "source": source, "options": options}));
            }
        }
    }
}

/// As containerd tells it of sandbox containers.
fn announced(resources: &LinuxContainerResources) -> HashMap<String, String> {
    [
        (SANDBOX_PERIOD, resources.cpu_period),
        (SANDBOX_QUOTA, resources.cpu_quota),
        (SANDBOX_MEMORY, resources.memory_limit_in_bytes),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_string()))
    .collect()
}

/// In the notation of the cgroup driver that the kubelet uses: that of systemd knows slices by their own names.
fn cgroups_path(parent: &str, id: &str) -> String {
    let slice = parent.rsplit('/').next().filter(|name| name.ends_with(".slice"));
    match slice {
        _ if parent.is_empty() => String::new(),
        Some(slice) => format!("{slice}:{SCOPE_PREFIX}:{id}"),
        None => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;
    use protocols::cri::LinuxPodSandboxConfig;

    use super::*;
    use crate::sizing::Demand;
    use crate::spec::{NetworkPlace, Role};

    #[test]
    fn a_pod_of_the_sandbox_api_says_what_a_sandbox_container_would() {
        let resources = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            memory_limit_in_bytes: 1 << 30,
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1/".to_owned(),
            sysctls: HashMap::from([("net.core.somaxconn".to_owned(), "7".to_owned())]),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        let config =
            PodSandboxConfig { hostname: "web".to_owned(), linux: MessageField::some(linux), ..Default::default() };
        let spec = Spec::of_pod(&config, "p", "/run/netns/x");
        assert_eq!(spec.role("p"), Role::Sandbox("p".to_owned()));
        assert_eq!((spec.hostname(), spec.cgroups_path()), ("web", "/kubepods/pod1/p"));
        assert_eq!(spec.network(), NetworkPlace::Path("/run/netns/x".into()));
        assert_eq!(spec.sysctls()["net.core.somaxconn"], "7");
        let demand = Demand::of_sandbox(&spec.annotations()).unwrap();
        assert_eq!(demand.memory, 1 << 30);
        let bare = Spec::of_pod(&PodSandboxConfig::default(), "p", "");
        assert_eq!((bare.network(), bare.cgroups_path()), (NetworkPlace::Host, ""));
        assert!(Demand::of_sandbox(&bare.annotations()).is_none());
    }

    #[test]
    fn a_systemd_slice_is_named_without_those_above_it() {
        assert_eq!(cgroups_path("/kubepods.slice/kubepods-pod1.slice", "p"), "kubepods-pod1.slice:cri-containerd:p");
    }

    #[test]
    fn a_container_gets_the_pod_s_files_and_memory_where_it_has_none() {
        let fields = json!({"mounts": [
            {"destination": "/etc/hosts/", "type": "bind", "source": "/kubelet/hosts"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
        ]});
        let Value::Object(fields) = fields else { panic!("no object") };
        let mut spec = Spec { fields, bundle: PathBuf::new() };
        spec.complete(&[("/etc/hosts", Path::new("/p/hosts")), ("/etc/resolv.conf", Path::new("/p/resolv.conf"))]);
        let mounts = spec.fields["mounts"].as_array().unwrap();
        let sources: Vec<_> = mounts.iter().map(|mount| mount["source"].as_str().unwrap()).collect();
        assert_eq!(sources, ["/kubelet/hosts", "/p/resolv.conf", SHARED_MEMORY]);
    }
}
