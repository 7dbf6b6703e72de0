//! The sandbox as a whole: Setup, statistics, and its end.

use std::os::unix::process::ExitStatusExt;

use protobuf::Message;
use protocols::agent::{Dns, Interface, MemoryType, MemoryTypesRequest, NextEventRequest, Route, SetupRequest};
use protocols::containerd::api::{ShutdownRequest, StatsRequest};
use protocols::containerd::cgroups_v2::metrics::Metrics;
use serde_json::json;
use ttrpc::Code;

use crate::harness::{
    Host, Stdio, context, memory_controller, privileged, refusal, shell, spec, storage, unique, within,
};

/// What the kernel makes of a power-off in a PID namespace (reboot(2)); unshare passes it on.
const SIGINT: i32 = 2;

#[tokio::test]
async fn setup_names_the_guest_resolves_mounts_and_tells_its_timeline() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let shared = host.directory.path().join("shared");
    std::fs::create_dir(&shared).expect("a directory");
    std::fs::write(shared.join("file"), "shared").expect("a file");
    let request = SetupRequest {
        hostname: "pod-name".into(),
        dns: Some(Dns { servers: vec!["10.0.0.10".into()], searches: vec!["local".into()], ..Default::default() })
            .into(),
        sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
        storages: vec![
            storage("tmpfs", "tmpfs", "/run/kata-containers/scratch", &["size=1m", "nosuid"]),
            storage("bind", &shared.display().to_string(), protocols::SHARED_DIR, &["rbind", "ro"]),
        ],
        entropy: vec![7; 64],
        ..Default::default()
    };
    let answer = within(host.agent.setup(context(), &request)).await.expect("setup");
    let names: Vec<_> = answer.stamps.iter().map(|stamp| stamp.name.as_str()).collect();
    assert_eq!(names, ["init exec", "mounts done", "dialled", "ready", "setup done"]);
    assert!(answer.stamps.is_sorted_by_key(|stamp| stamp.boottime_ns));
    assert!(0 < answer.received_ns && answer.received_ns <= answer.answered_ns);
    let resolv = std::fs::read_to_string(host.agent_path("/run/resolv.conf")).expect("resolv.conf");
    assert_eq!(resolv, "nameserver 10.0.0.10\nsearch local\n");
    let file = std::fs::read_to_string(host.agent_path(&format!("{}/file", protocols::SHARED_DIR)));
    assert_eq!(file.expect("the shared file"), "shared");

    let mut spec = spec(shell("hostname; cat /proc/sys/net/ipv4/ip_forward; cat /proc/sys/net/ipv4/ip_nonlocal_bind"));
    let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("namespaces");
    namespaces.retain(|namespace| namespace["type"] != "uts");
    spec["hostname"] = "ignored: the name is the sandbox's".into();
    spec["linux"]["sysctl"] = json!({"net.ipv4.ip_nonlocal_bind": "1"});
    assert_eq!(host.run(&unique("names"), &spec).await, (0, "pod-name\n1\n1\n".into(), String::new()));
}

#[tokio::test]
async fn the_guest_says_which_memory_types_it_has() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let request = MemoryTypesRequest { mtrr_default_type: Some(0x806), ..Default::default() };
    let answer = within(host.agent.memory_types(context(), &request)).await.expect("memory types");
    let ram: Vec<_> = answer.ranges.iter().filter(|range| range.what == "RAM").collect();
    let total: u64 = ram.iter().map(|range| range.length).sum();
    assert!(total > 64 << 20, "{total} bytes of RAM");
    assert!(ram.iter().any(|range| range.effective == MemoryType::WRITE_BACK.into()), "{ram:?}");
    assert!(answer.ranges.is_sorted_by_key(|range| range.start));
    let own = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    let count = |text: &str| text.matches(" debugfs ").count();
    assert!(count(&host.agent_mounts()) <= count(&own), "what the agent mounts for the moment stays nowhere");
}

#[tokio::test]
async fn setup_refuses_what_it_cannot_do_and_says_what() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let interface = |mac: &str| Interface { mac: mac.into(), name: "eth0".into(), ..Default::default() };
    let cases = [
        (SetupRequest { entropy: vec![0; 65], ..Default::default() }, Code::INVALID_ARGUMENT, "the limit is 64"),
        (SetupRequest { hostname: "x".repeat(65), ..Default::default() }, Code::INVALID_ARGUMENT, "64 bytes"),
        (
            SetupRequest { interfaces: vec![interface("02:00:00:00:00:99")], ..Default::default() },
            Code::NOT_FOUND,
            "02:00:00:00:00:99",
        ),
        (
            SetupRequest {
                routes: vec![Route { gateway: "10.0.0.1".into(), interface: "nope0".into(), ..Default::default() }],
                ..Default::default()
            },
            Code::UNKNOWN,
            "nope0",
        ),
        (
            SetupRequest { storages: vec![storage("tmpfs", "tmpfs", "/etc", &[])], ..Default::default() },
            Code::INVALID_ARGUMENT,
            "/etc",
        ),
        (
            SetupRequest { storages: vec![storage("nofs", "x", "/run/kata-containers/x", &[])], ..Default::default() },
            Code::UNKNOWN,
            "nofs",
        ),
        (
            SetupRequest { sysctls: [("../../etc/x".to_owned(), "1".to_owned())].into(), ..Default::default() },
            Code::UNKNOWN,
            "no sysctl has such a name",
        ),
    ];
    for (request, code, part) in cases {
        let (got, text) = refusal(within(host.agent.setup(context(), &request)).await);
        assert_eq!((got, text.contains(part)), (code, true), "{text}");
    }
}

#[tokio::test]
async fn a_symlink_on_the_way_to_a_mount_target_leads_nowhere_else() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let inside = host.agent_path("/run/kata-containers/link");
    std::os::unix::fs::symlink("/run", &inside).expect("a symlink");
    let request = SetupRequest {
        storages: vec![storage("tmpfs", "tmpfs", "/run/kata-containers/link/caught", &["ro"])],
        ..Default::default()
    };
    let _ = within(host.agent.setup(context(), &request)).await;
    assert!(!host.agent_path("/run/caught").exists(), "the target left the storage root");
}

#[tokio::test]
async fn interfaces_are_found_by_mac_renamed_and_routed() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let mac = "02:00:00:00:00:17";
    let added = std::process::Command::new("nsenter")
        .args([
            "--target",
            &host.agent_pid().to_string(),
            "--net",
            "ip",
            "link",
            "add",
            "raw0",
            "address",
            mac,
            "type",
            "dummy",
        ])
        .status();
    if !added.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no ip(8) or no dummy interfaces on this machine");
        return;
    }
    let request = SetupRequest {
        interfaces: vec![Interface {
            mac: mac.to_uppercase(),
            name: "eth0".into(),
            addresses: vec!["10.9.0.2/24".into(), "fd09::2/64".into()],
            mtu: 1400,
            ..Default::default()
        }],
        routes: vec![
            Route { gateway: "10.9.0.1".into(), interface: "eth0".into(), ..Default::default() },
            Route { destination: "10.9.0.1/32".into(), interface: "eth0".into(), scope: 253, ..Default::default() },
        ],
        ..Default::default()
    };
    within(host.agent.setup(context(), &request)).await.expect("setup");
    let script = "busybox ip addr show eth0; busybox ip route; busybox ip link show lo";
    let (_, text, _) = host.run(&unique("net"), &spec(shell(script))).await;
    for part in ["inet 10.9.0.2/24", "fd09::2/64", "mtu 1400", "default via 10.9.0.1 dev eth0", "LOOPBACK,UP"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[tokio::test]
async fn statistics_are_containerds_metrics() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let id = unique("stats");
    host.create(&id, &spec(shell("while :; do :; done")), &Stdio::default()).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let request = StatsRequest { id: id.clone(), ..Default::default() };
    let stats = within(host.task.stats(context(), &request)).await.expect("stats").stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).expect("metrics");
    // cpu.stat is part of every cgroup; other files need controllers, which this machine may keep elsewhere.
    assert!(metrics.cpu.is_some());
}

#[tokio::test]
async fn a_process_that_takes_more_memory_than_it_may_is_killed_and_reported() {
    if !privileged() || !memory_controller() {
        return;
    }
    let host = Host::start().await;
    let id = unique("oom");
    // The shell doubles a string until the kernel stops it.
    let mut spec = spec(shell("x=0123456789abcdef; while :; do x=$x$x; done"));
    spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    host.create(&id, &spec, &Stdio::default()).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let event = within(host.agent.next_event(context(), &NextEventRequest::default())).await.expect("an event");
    assert_eq!(event.out_of_memory().container_id, id);
    assert_eq!(host.wait(&id, "").await.expect("wait"), 137);
}

#[tokio::test]
async fn limits_are_set_counted_and_changed() {
    if !privileged() || !memory_controller() {
        return;
    }
    let host = Host::start().await;
    let id = unique("limits");
    let mut spec = spec(shell("while :; do sleep 1000; done"));
    spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 10}});
    host.create(&id, &spec, &Stdio::default()).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let metrics = async || {
        let request = StatsRequest { id: id.clone(), ..Default::default() };
        let stats = within(host.task.stats(context(), &request)).await.expect("stats").stats;
        Metrics::parse_from_bytes(&stats.value).expect("metrics")
    };
    let before = metrics().await;
    assert_eq!((before.memory.usage_limit, before.pids.limit), (64 << 20, 10));
    assert!(before.memory.usage > 0 && before.pids.current > 0);
    let resources = json!({"memory": {"limit": 32 << 20}, "pids": {"limit": 20}});
    host.update(&id, &resources).await.expect("update");
    let after = metrics().await;
    assert_eq!((after.memory.usage_limit, after.pids.limit), (32 << 20, 20));
    assert_eq!(refusal(host.update(&id, &json!("nonsense")).await).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn shutdown_refuses_while_there_are_containers_and_then_powers_off() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let id = unique("shutdown");
    host.create(&id, &spec(shell("true")), &Stdio::default()).await.expect("create");
    let request = ShutdownRequest { id: id.clone(), ..Default::default() };
    let (code, _) = refusal(within(host.task.shutdown(context(), &request)).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    host.delete(&id, "").await.expect("delete");
    within(host.task.shutdown(context(), &request)).await.expect("shutdown");
    assert_eq!(host.ended().await.signal(), Some(SIGINT));
}

#[tokio::test]
async fn an_agent_without_a_host_ends_the_guest() {
    if !privileged() {
        return;
    }
    let mut guest = crate::harness::agent("/nowhere/socket").spawn().expect("unshare");
    let status = within(tokio::task::spawn_blocking(move || guest.wait())).await.expect("no panic");
    assert_eq!(status.expect("an exit status").signal(), Some(SIGINT));
}

#[tokio::test]
async fn a_host_that_goes_away_takes_the_guest_and_its_containers_with_it() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let id = unique("orphaned");
    host.create(&id, &spec(shell("while :; do sleep 1000; done")), &Stdio::default()).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let cgroup = host.agent_cgroup().join(&id);
    assert!(cgroup.exists(), "{}", cgroup.display());
    assert_eq!(host.hang_up().await.signal(), Some(SIGINT));
    assert!(!cgroup.exists());
}
