//! Tables of what the rewrite keeps, replaces and refuses.

use serde_json::{Value, json};

use super::*;

fn rewrite(spec: &Value) -> Result<(Value, Vec<Bind>), SpecError> {
    let fields = spec.as_object().unwrap().clone();
    let guest = Spec { fields, bundle: PathBuf::from("/bundle") }.into_guest("c1")?;
    Ok((serde_json::from_slice(&guest.json).unwrap(), guest.binds))
}

/// A specification whose Linux part is this.
fn linux(linux: Value) -> Value {
    json!({"root": {"path": "rootfs"}, "linux": linux})
}

/// What a case is about, the pointer to a part, the specification, and what becomes of the part.
type Case = (&'static str, &'static str, Value, Value);

fn assert_rewrites<const N: usize>(cases: [Case; N]) {
    for (what, pointer, before, expected) in cases {
        let (after, _) = rewrite(&before).unwrap();
        assert_eq!(after.pointer(pointer).cloned().unwrap_or_default(), expected, "{what}");
    }
}

#[test]
fn the_network_is_where_the_specification_says() {
    let network = |namespaces: Value| {
        let fields = json!({"linux": {"namespaces": namespaces}});
        let Value::Object(fields) = fields else { unreachable!("just made an object") };
        Spec { fields, bundle: PathBuf::new() }.network()
    };
    let path = json!([{"type": "pid"}, {"type": "network", "path": "/run/netns/a"}]);
    assert_eq!(network(path), NetworkPlace::Path("/run/netns/a".into()));
    for own in [json!([{"type": "network"}]), json!([{"type": "network", "path": ""}])] {
        assert_eq!(network(own), NetworkPlace::Own);
    }
    for host in [json!([{"type": "pid", "path": "/x"}]), json!([]), json!(null)] {
        assert_eq!(network(host), NetworkPlace::Host);
    }
}

#[test]
fn who_binds_a_file_of_resolvers_or_has_hooks_awaits_a_network() {
    let awaits = |fields: Value| {
        let Value::Object(fields) = fields else { unreachable!("just made an object") };
        Spec { fields, bundle: PathBuf::new() }.awaits_network()
    };
    let bind = |destination: &str| json!({"destination": destination, "source": "/x", "options": ["rbind"]});
    assert!(awaits(json!({"mounts": [bind("/etc/hosts"), bind("/etc/resolv.conf")]})));
    assert!(awaits(json!({"hooks": {"createRuntime": [{"path": "/usr/bin/nerdctl"}]}})));
    for alone in [json!({}), json!({"mounts": [bind("/etc/hosts")]}), json!({"hooks": {"createRuntime": []}})] {
        assert!(!awaits(alone));
    }
}

#[test]
fn kernel_parameters_are_those_that_are_texts() {
    let sysctls = |value: Value| {
        let Value::Object(fields) = linux(json!({"sysctl": value})) else { unreachable!("just made an object") };
        Spec { fields, bundle: PathBuf::new() }.sysctls()
    };
    let given = json!({"net.core.somaxconn": "512", "kernel.msgmax": 5});
    assert_eq!(sysctls(given), HashMap::from([("net.core.somaxconn".to_owned(), "512".to_owned())]));
    assert!(sysctls(json!(null)).is_empty());
}

#[test]
fn namespaces_of_the_host_are_dropped_and_own_ones_are_kept() {
    assert_rewrites([
        (
            "network",
            "/linux/namespaces",
            linux(json!({"namespaces": [{"type": "network"}, {"type": "mount"}]})),
            json!([{"type": "mount"}]),
        ),
        (
            "network path",
            "/linux/namespaces",
            linux(json!({"namespaces": [{"type": "network", "path": "/run/netns/a"}]})),
            json!([]),
        ),
        (
            "pod's ipc",
            "/linux/namespaces",
            linux(json!({"namespaces": [{"type": "ipc", "path": "/proc/1/ns/ipc"}, {"type": "uts", "path": "/x"}]})),
            json!([]),
        ),
        (
            "own ipc",
            "/linux/namespaces",
            linux(json!({"namespaces": [{"type": "ipc"}, {"type": "uts"}]})),
            json!([{"type": "ipc"}, {"type": "uts"}]),
        ),
        (
            "pid path",
            "/linux/namespaces",
            linux(json!({"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]})),
            json!([{"type": "pid"}]),
        ),
        (
            "user path",
            "/linux/namespaces",
            linux(json!({"namespaces": [{"type": "user", "path": "/x"}]})),
            json!([{"type": "user"}]),
        ),
    ]);
}

#[test]
fn only_a_pid_namespace_with_a_path_is_the_sandboxes() {
    for (namespace, expected) in
        [(json!({"type": "pid", "path": "/proc/1/ns/pid"}), true), (json!({"type": "pid"}), false), (json!({}), false)]
    {
        let Value::Object(fields) = linux(json!({"namespaces": [namespace]})) else {
            unreachable!("just made an object")
        };
        let guest = Spec { fields, bundle: PathBuf::from("/bundle") }.into_guest("c1").unwrap();
        assert_eq!(guest.sandbox_pidns, expected, "{namespace}");
    }
}

#[test]
fn what_names_the_host_is_replaced_or_dropped_and_the_rest_is_kept() {
    assert_rewrites([
        (
            "root",
            "/root",
            json!({"root": {"path": "/var/x", "readonly": true}}),
            json!({"path": format!("{BUNDLES_DIR}/c1/rootfs"), "readonly": true}),
        ),
        ("cgroup", "/linux/cgroupsPath", linux(json!({"cgroupsPath": "/default/c1"})), json!("/c1")),
        (
            "seccomp",
            "/linux/seccomp",
            linux(json!({"seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "listenerPath": "/s"}})),
            json!({"defaultAction": "SCMP_ACT_ERRNO"}),
        ),
        ("rdt", "/linux/intelRdt", linux(json!({"intelRdt": {}})), Value::Null),
        (
            "memory limit",
            "/linux/resources/memory",
            linux(json!({"resources": {"memory": {"limit": 1}}})),
            json!({"limit": 1}),
        ),
        (
            "cpuset",
            "/linux/resources/cpu",
            linux(json!({"resources": {"cpu": {"cpus": "90-91", "mems": "3", "shares": 5}}})),
            json!({"shares": 5}),
        ),
        ("block io", "/linux/resources/blockIO", linux(json!({"resources": {"blockIO": {"weight": 1}}})), Value::Null),
        (
            "apparmor",
            "/process",
            json!({"process": {"apparmorProfile": "x", "selinuxLabel": "y", "args": ["a"]}}),
            json!({"args": ["a"]}),
        ),
        ("unknown field", "/linux/newField", linux(json!({"newField": [1]})), json!([1])),
        (
            "hooks",
            "/hooks",
            json!({"hooks": {"prestart": [{"path": "/h"}], "startContainer": [{"path": "/g"}]}}),
            json!({"startContainer": [{"path": "/g"}]}),
        ),
    ]);
}

#[test]
fn files_that_the_guest_has_itself_are_named_by_their_paths_there() {
    assert_rewrites([
        (
            "known device",
            "/linux/devices/0/path",
            linux(json!({"devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]})),
            json!("/dev/fuse"),
        ),
        (
            "proc mount",
            "/mounts/0",
            json!({"mounts": [{"type": "proc", "source": "proc", "destination": "/proc"}]}),
            json!({"type": "proc", "source": "proc", "destination": "/proc"}),
        ),
        (
            "shm",
            "/mounts/0/source",
            json!({"mounts": [{"type": "bind", "source": "/run/x/shm", "destination": "/dev/shm"}]}),
            json!("/dev/shm"),
        ),
        (
            "device file",
            "/mounts/0/source",
            json!({"mounts": [{"type": "bind", "source": "/dev/null", "destination": "/etc/masked"}]}),
            json!("/dev/null"),
        ),
    ]);
}

#[test]
fn host_files_are_shared_under_numbers_and_their_options_are_kept() {
    let spec = json!({"mounts": [
        {"type": "tmpfs", "source": "tmpfs", "destination": "/tmp"},
        {"type": "bind", "source": "/etc/hostname", "destination": "/etc/hostname", "options": ["bind", "ro"]},
        {"type": "none", "source": "/usr", "destination": "/usr", "options": ["rbind", "ro"]},
    ]});
    let (after, binds) = rewrite(&spec).unwrap();
    assert_eq!(
        binds,
        [
            Bind { number: 0, source: "/etc/hostname".into(), recursive: false, copied: false },
            Bind { number: 1, source: "/usr".into(), recursive: true, copied: false },
        ]
    );
    assert_eq!(after["mounts"][1]["source"], json!(format!("{SHARED_DIR}/c1/mounts/0")));
    assert_eq!(after["mounts"][2]["source"], json!(format!("{SHARED_DIR}/c1/mounts/1")));
    assert_eq!(after["mounts"][2]["options"], json!(["rbind", "ro"]));
}

#[test]
fn a_config_map_is_copied_unless_the_container_may_write_to_it() {
    let directory = tempfile::tempdir().unwrap();
    let volume = directory.path().join("kubernetes.io~configmap/config");
    std::fs::create_dir_all(&volume).unwrap();
    let mount =
        |access: &str| json!({"type": "bind", "source": volume, "destination": "/c", "options": ["rbind", access]});
    let (after, binds) = rewrite(&json!({"mounts": [mount("ro"), mount("rw")]})).unwrap();
    assert_eq!(binds.iter().map(|bind| bind.copied).collect::<Vec<_>>(), [true, false]);
    assert_eq!(after["mounts"][0]["source"], json!(format!("{BUNDLES_DIR}/c1/mounts/0")));
    assert_eq!(after["mounts"][1]["source"], json!(format!("{SHARED_DIR}/c1/mounts/1")));
}

#[test]
fn what_the_virtual_machine_does_not_have_is_refused_with_the_remedy() {
    for (spec, parts) in [
        (
            json!({"linux": {"devices": [{"path": "/dev/vfio/1", "type": "c", "major": 240, "minor": 1}]}}),
            ["/dev/vfio/1", "c 240:1", "remove it"],
        ),
        (
            json!({"linux": {"devices": [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]}}),
            ["/dev/sda", "b 8:0", "privileged_without_host_devices"],
        ),
        (
            json!({"mounts": [{"type": "bind", "source": "/nonexistent/x", "destination": "/x"}]}),
            ["/nonexistent/x", "No such file", "create it"],
        ),
        (
            json!({"mounts": [{"type": "bind", "source": "relative", "destination": "/x"}]}),
            ["relative", "/x", "absolute"],
        ),
        (
            json!({"mounts": [{"type": "ext4", "source": "/dev/sda1", "destination": "/x"}]}),
            ["/dev/sda1", "ext4", "bind it"],
        ),
    ] {
        let message = rewrite(&spec).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }
}

#[test]
fn a_broken_bundle_is_refused_by_the_name_of_its_file() {
    let bundle = tempfile::tempdir().unwrap();
    for (text, part) in
        [(None, "No such file"), (Some("{"), "EOF"), (Some("[]"), "expected a map"), (Some("{}x"), "trailing")]
    {
        if let Some(text) = text {
            std::fs::write(bundle.path().join("config.json"), text).unwrap();
        }
        let message = Spec::read(bundle.path()).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains(part), "{message}");
    }
}

#[test]
fn annotations_of_both_orchestrators_tell_the_role() {
    let annotations = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<HashMap<_, _>>()
    };
    for (pairs, expected) in [
        (vec![], Role::Single("c".into())),
        (
            vec![("io.kubernetes.cri.container-type", "sandbox"), ("io.kubernetes.cri.sandbox-id", "c")],
            Role::Sandbox("c".into()),
        ),
        (
            vec![("io.kubernetes.cri.container-type", "container"), ("io.kubernetes.cri.sandbox-id", "pod")],
            Role::Member("pod".into()),
        ),
        (
            vec![("io.kubernetes.cri-o.ContainerType", "container"), ("io.kubernetes.cri-o.SandboxID", "pod")],
            Role::Member("pod".into()),
        ),
        (vec![("io.kubernetes.cri.container-type", "container")], Role::Single("c".into())),
    ] {
        assert_eq!(Role::of(&annotations(&pairs), "c"), expected);
    }
}
