//! The text format of Prometheus (exposition formats, version 0.0.4).
//!
//! Names of sandboxes and containers need no escapes: they have letters, digits, dots, dashes and underlines.

use std::fmt::{Display, Write};

use crate::ctl::process::{GuestMemory, Usage};
use crate::ctl::survey::{Seen, State};
use crate::ctl::task::{Container, ContainerUsage};

/// One metric of each sandbox whose pod process runs.
struct OfSandbox {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&Usage) -> Option<String>,
}

const OF_SANDBOX: &[OfSandbox] = &[
    OfSandbox {
        name: "kata_pod_process_rss_bytes",
        kind: "gauge",
        help: "Resident memory of the pod process without guest memory.",
        value: |usage| Some(usage.own_rss.to_string()),
    },
    OfSandbox {
        name: "kata_pod_process_pss_bytes",
        kind: "gauge",
        help: "The pod process's share of its resident memory (PSS), without guest memory.",
        value: |usage| Some(usage.own_pss.to_string()),
    },
    OfSandbox {
        name: "kata_pod_process_cpu_seconds_total",
        kind: "counter",
        help: "Time of the host's CPUs that the pod process took, vCPUs included.",
        value: |usage| Some(format!("{:.2}", usage.cpu_seconds)),
    },
    OfSandbox {
        name: "kata_guest_memory_bytes",
        kind: "gauge",
        help: "Memory that the guest has.",
        value: |usage| guest(usage, |guest| guest.size),
    },
    OfSandbox {
        name: "kata_guest_memory_resident_bytes",
        kind: "gauge",
        help: "Guest memory that the host has given.",
        value: |usage| guest(usage, |guest| guest.resident),
    },
    OfSandbox {
        name: "kata_guest_vcpus",
        kind: "gauge",
        help: "vCPUs that the guest has.",
        value: |usage| Some(usage.vcpus.to_string()),
    },
];

fn guest(usage: &Usage, value: fn(GuestMemory) -> u64) -> Option<String> {
    usage.guest.map(value).map(|value| value.to_string())
}

/// One metric of each container that runs.
struct OfContainer {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(ContainerUsage) -> String,
}

const OF_CONTAINER: &[OfContainer] = &[
    OfContainer {
        name: "kata_container_cpu_seconds_total",
        kind: "counter",
        help: "Time of the guest's CPUs that the container took.",
        value: |usage| format!("{}.{:06}", usage.cpu_usec / 1_000_000, usage.cpu_usec % 1_000_000),
    },
    OfContainer {
        name: "kata_container_memory_bytes",
        kind: "gauge",
        help: "Guest memory that the container uses, page cache included.",
        value: |usage| usage.memory.to_string(),
    },
    OfContainer {
        name: "kata_container_pids",
        kind: "gauge",
        help: "Processes and threads of the container.",
        value: |usage| usage.pids.to_string(),
    },
];

/// Everything that was seen.
pub(super) fn render(seen: &[Seen]) -> String {
    let mut out = String::new();
    head(&mut out, "kata_sandboxes", "gauge", "Sandboxes of this node.");
    for state in [State::Running, State::Dead, State::Starting] {
        let count = seen.iter().filter(|seen| seen.state == state).count();
        sample(&mut out, "kata_sandboxes", &[("state", state.word())], count);
    }
    head(&mut out, "kata_sandbox_answers", "gauge", "Whether the pod process answers: 1, or 0.");
    for seen in seen.iter().filter(|seen| seen.state == State::Running) {
        sample(&mut out, "kata_sandbox_answers", &of(seen), u8::from(seen.containers.is_some()));
    }
    for metric in OF_SANDBOX {
        head(&mut out, metric.name, metric.kind, metric.help);
        for seen in seen {
            if let Some(value) = seen.usage.as_ref().and_then(metric.value) {
                sample(&mut out, metric.name, &of(seen), value);
            }
        }
    }
    head(&mut out, "kata_containers", "gauge", "Containers of the sandbox, by their state.");
    for seen in seen {
        for state in ["created", "running", "paused", "stopped"] {
            let Some(containers) = &seen.containers else { continue };
            let count = containers.iter().filter(|container| container.state == state).count();
            let [namespace, sandbox] = of(seen);
            sample(&mut out, "kata_containers", &[namespace, sandbox, ("state", state)], count);
        }
    }
    for metric in OF_CONTAINER {
        head(&mut out, metric.name, metric.kind, metric.help);
        for (seen, container) in seen.iter().flat_map(|seen| containers(seen).map(move |container| (seen, container))) {
            let Some(usage) = container.usage else { continue };
            let [namespace, sandbox] = of(seen);
            sample(&mut out, metric.name, &[namespace, sandbox, ("container", &container.id)], (metric.value)(usage));
        }
    }
    out
}

fn containers(seen: &Seen) -> impl Iterator<Item = &Container> {
    seen.containers.iter().flatten()
}

fn of(seen: &Seen) -> [(&'static str, &str); 2] {
    [("namespace", &seen.namespace), ("sandbox", &seen.id)]
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value:?}")).collect();
    let _ = writeln!(out, "{name}{{{}}} {value}", labels.join(","));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_has_no_sample_and_every_metric_has_its_type() {
        let usage = Usage { own_rss: 5 << 20, own_pss: 2 << 20, guest: None, vcpus: 1, cpu_seconds: 1.5 };
        let used = ContainerUsage { cpu_usec: 1_000_007, memory: 4096, pids: 3 };
        let containers = vec![Container { id: "c".to_owned(), state: "running", exit_status: None, usage: Some(used) }];
        let running = Seen {
            namespace: "k8s.io".to_owned(),
            id: "a".to_owned(),
            state: State::Running,
            pid: Some(1),
            usage: Some(usage),
            containers: Some(containers),
        };
        let dead = Seen { id: "b".to_owned(), state: State::Dead, usage: None, containers: None, ..running.clone() };
        let text = render(&[running, dead]);
        for line in [
            "kata_sandboxes{state=\"running\"} 1",
            "kata_sandboxes{state=\"dead\"} 1",
            "kata_sandbox_answers{namespace=\"k8s.io\",sandbox=\"a\"} 1",
            "kata_pod_process_pss_bytes{namespace=\"k8s.io\",sandbox=\"a\"} 2097152",
            "kata_pod_process_cpu_seconds_total{namespace=\"k8s.io\",sandbox=\"a\"} 1.50",
            "kata_container_cpu_seconds_total{namespace=\"k8s.io\",sandbox=\"a\",container=\"c\"} 1.000007",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("kata_guest_memory_bytes{") && !text.contains("sandbox=\"b\""), "{text}");
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        for name in samples.filter_map(|line| line.split_once('{')).map(|(name, _)| name) {
            assert!(text.contains(&format!("# TYPE {name} ")) && text.contains(&format!("# HELP {name} ")), "{name}");
        }
    }
}
