//! The size of a machine, from annotations and from the limits of its containers.

use libtest_mimic::Trial;
use protocols::containerd::ttrpc;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::node::{Io, Node, TaskHandle, code};
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("the limits of a pod's containers add up in its machine, and leave with them", adds_up),
        trial("an update makes the machine grow before the limits, and shrink after them", updates),
        trial("a limit that the machine cannot have is refused, and leaves everything as it was", refused),
        trial("a machine that does not grow as asked is brought back to its size", does_not_grow),
        trial("annotations make the machine, and unknown ones are refused by name", annotations),
        trial("a machine of fixed size is made for what its orchestrator announces", fixed),
    ]
}

fn limits(cpus: i64, mib: i64) -> Value {
    json!({"cpu": {"quota": cpus * 100_000, "period": 100_000}, "memory": {"limit": mib << 20}})
}

/// The specification of a pod's sandbox or member, with more annotations and with limits.
fn spec(kind: &str, more: &[(&str, &str)], resources: Value) -> Value {
    let mut annotations = json!({"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "pod"});
    for (name, value) in more {
        annotations[*name] = json!(value);
    }
    json!({"annotations": annotations, "linux": {"resources": resources}})
}

async fn container(node: &Node, id: &str, spec: Value) -> TaskHandle {
    let bundle = node.bundle(id, &["/bin/sleep", "600"], spec);
    node.connect(id, &bundle).await
}

async fn running(node: &Node, id: &str, spec: Value) -> TaskHandle {
    let task = container(node, id, spec).await;
    task.create(&Io::default()).await.unwrap();
    task.start("").await.unwrap();
    task
}

async fn end(task: &TaskHandle) {
    task.kill("", 9).await.unwrap();
    task.wait("").await.unwrap();
    task.delete("").await.unwrap();
}

async fn finish(node: &Node, pod: &TaskHandle) {
    end(pod).await;
    pod.shutdown().await;
    node.expect_nothing_left().await;
}

/// A configuration that does not depend on the machine of the test.
const MAXIMA: &str = "default_maxvcpus = 6\ndefault_maxmemory = 1024";
const MADE: &str = "made with (Size { vcpus: 1, memory: 268435456 }, Size { vcpus: 6, memory: 1073741824 })";

async fn adds_up() {
    let node = Node::new().await;
    node.configure(MAXIMA);
    let mut hardware = node.hardware();
    let pod = running(&node, "pod", spec("sandbox", &[], Value::Null)).await;
    hardware.expect(&[MADE]).await;
    let first = running(&node, "a", spec("container", &[], limits(2, 128))).await;
    hardware.expect(&["384 MiB", "3 vCPUs", "online: 3 vCPUs, 384 MiB"]).await;
    let unlimited = running(&node, "b", spec("container", &[], Value::Null)).await;
    let second = running(&node, "c", spec("container", &[], limits(1, 64))).await;
    hardware.expect(&["448 MiB", "4 vCPUs", "online: 4 vCPUs, 448 MiB"]).await;
    end(&unlimited).await;
    end(&first).await;
    hardware.expect(&["2 vCPUs", "320 MiB"]).await;
    // Its start failed in the guest: it goes again with what it was to have.
    let bundle = node.bundle("d", &["/no/such/program"], spec("container", &[], limits(1, 0)));
    node.connect("d", &bundle).await.create(&Io::default()).await.unwrap_err();
    hardware.expect(&["3 vCPUs", "online: 3 vCPUs, 320 MiB", "2 vCPUs"]).await;
    end(&second).await;
    hardware.expect(&["1 vCPUs", "256 MiB"]).await;
    finish(&node, &pod).await;
}

async fn updates() {
    let node = Node::new().await;
    node.configure(MAXIMA);
    let mut hardware = node.hardware();
    let task = running(&node, "one", json!({"linux": {"resources": limits(1, 64)}})).await;
    hardware.expect(&[MADE, "320 MiB", "2 vCPUs", "online: 2 vCPUs, 320 MiB"]).await;
    // CPUs of the host are not the guest's.
    task.update(json!({"cpu": {"quota": 300_000, "period": 100_000, "cpus": "0-1"}})).await.unwrap();
    let resources = r#"limits {"cpu":{"period":100000,"quota":300000}}"#;
    hardware.expect(&["4 vCPUs", "online: 4 vCPUs, 320 MiB", resources]).await;
    task.update(json!({"memory": {"limit": 32 << 20}})).await.unwrap();
    hardware.expect(&[r#"limits {"memory":{"limit":33554432}}"#, "288 MiB"]).await;
    // One up, the other down.
    task.update(limits(1, 128)).await.unwrap();
    let resources = r#"limits {"cpu":{"period":100000,"quota":100000},"memory":{"limit":134217728}}"#;
    hardware.expect(&["384 MiB", "online: 4 vCPUs, 384 MiB", resources, "2 vCPUs"]).await;
    // The guest refuses: the machine is as before.
    assert_eq!(code(&task.update(json!({"cpu": {"quota": 200_000, "shares": -7}})).await.unwrap_err()), Code::UNKNOWN);
    hardware.expect(&["3 vCPUs", "online: 3 vCPUs, 384 MiB", "2 vCPUs"]).await;
    assert_eq!(code(&task.update(json!(7)).await.unwrap_err()), Code::INVALID_ARGUMENT);
    finish(&node, &task).await;
}

async fn refused() {
    let node = Node::new().await;
    node.configure("default_maxmemory = 300");
    let task = running(&node, "one", json!({"linux": {"resources": limits(0, 32)}})).await;
    let error = task.update(json!({"memory": {"limit": 64 << 20}})).await.unwrap_err();
    assert_eq!(code(&error), Code::RESOURCE_EXHAUSTED);
    assert!(error.to_string().contains("need 320 MiB") && error.to_string().contains("can have 300 MiB"), "{error}");
    finish(&node, &task).await;
    // Before a machine is started.
    let task = container(&node, "two", json!({"linux": {"resources": limits(0, 64)}})).await;
    assert_eq!(code(&task.create(&Io::default()).await.unwrap_err()), Code::RESOURCE_EXHAUSTED);
    task.shutdown().await;
    node.expect_nothing_left().await;
}

async fn does_not_grow() {
    let node = Node::new().await;
    node.configure(&format!("{MAXIMA}\nkernel_params = \"limit=2\""));
    let mut hardware = node.hardware();
    let pod = running(&node, "pod", spec("sandbox", &[], Value::Null)).await;
    hardware.expect(&[MADE]).await;
    let task = container(&node, "a", spec("container", &[], limits(3, 64))).await;
    let error = task.create(&Io::default()).await.unwrap_err();
    assert_eq!(code(&error), Code::DEADLINE_EXCEEDED);
    let text = error.to_string();
    assert!(text.contains("4 vCPUs") && text.contains("reached 2 vCPUs"), "{text}");
    hardware.expect(&["320 MiB", "2 vCPUs", "1 vCPUs", "256 MiB"]).await;
    // The next one is not held up by it.
    let task = running(&node, "b", spec("container", &[], limits(1, 0))).await;
    hardware.expect(&["2 vCPUs", "online: 2 vCPUs, 256 MiB"]).await;
    end(&task).await;
    finish(&node, &pod).await;
}

async fn annotations() {
    let node = Node::new().await;
    let mut hardware = node.hardware();
    let size = [
        ("io.katacontainers.config.hypervisor.default_vcpus", "2"),
        ("io.katacontainers.config.hypervisor.default_memory", "512"),
        // It says that no limits follow.
        ("io.kubernetes.cri.sandbox-memory", "0"),
    ];
    let pod = running(&node, "pod", spec("sandbox", &size, Value::Null)).await;
    let size = "Size { vcpus: 2, memory: 536870912 }";
    hardware.expect(&[&format!("made with ({size}, {size})")]).await;
    finish(&node, &pod).await;
    for (name, value, part) in [
        ("io.katacontainers.config.hypervisor.default_vcpu", "2", "hypervisor.default_vcpus"),
        ("io.katacontainers.config.hypervisor.default_maxvcpus", "2", "enable_annotations"),
        ("io.katacontainers.config.hypervisor.default_memory", "1", "least of 64 MiB"),
    ] {
        let _ = std::fs::remove_dir_all(node.path("bundle-test-pod"));
        let task = container(&node, "pod", spec("sandbox", &[(name, value)], Value::Null)).await;
        let error = task.create(&Io::default()).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT, "{error}");
        assert!(error.to_string().contains(part), "{error}");
        task.shutdown().await;
        node.expect_nothing_left().await;
    }
}

async fn fixed() {
    let node = Node::new().await;
    node.configure("[hypervisor.dragonball]\ndefault_maxvcpus = 6\n[runtime]\nstatic_sandbox_resource_mgmt = true");
    let mut hardware = node.hardware();
    let announced = [
        ("io.kubernetes.cri.sandbox-cpu-quota", "150000"),
        ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ("io.kubernetes.cri.sandbox-memory", "67108864"),
    ];
    let pod = running(&node, "pod", spec("sandbox", &announced, Value::Null)).await;
    let size = "Size { vcpus: 3, memory: 335544320 }";
    hardware.expect(&[&format!("made with ({size}, {size})")]).await;
    let task = running(&node, "a", spec("container", &[], limits(1, 64))).await;
    task.update(json!({"memory": {"limit": 1 << 30}})).await.unwrap();
    hardware.expect(&[r#"limits {"memory":{"limit":1073741824}}"#]).await;
    end(&task).await;
    finish(&node, &pod).await;
}
