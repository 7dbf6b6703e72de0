//! The size of a pod's machine, as its guest sees it: by annotations, and by the limits of its containers.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::context::{BUSYBOX, Context};
use crate::ctr::Container;
use crate::harness::Case;
use crate::kata_config::Changed;
use crate::task_api;

pub(super) const CASES: &[Case] = &[
    Case::kata("sizes: annotations size the guest, and unknown ones are refused by name", annotations),
    Case::kata("sizes: the limits of two containers add up in their guest, and go with them", add_up),
    Case::kata("sizes: changed limits make a running guest grow and shrink", update),
    Case::kata("sizes: limits that a machine cannot have are refused with the limit", refused),
    Case::kata("sizes: a pod's memory is in huge pages where its annotation or the configuration says so", huge_pages),
];

const MIB: u64 = 1 << 20;

/// CPUs and bytes of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    cpus: u64,
    memory: u64,
}

/// Prints the number of CPUs, and the memory in KiB.
const LOOK: &str = "nproc; awk '/^MemTotal:/ {print $2}' /proc/meminfo";

fn parse(text: &str) -> Result<Seen> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u64>);
    let mut next = || numbers.next().context("A number is missing")?.context("Not a number");
    let (cpus, memory) = (next(), next());
    let seen = cpus.and_then(|cpus| Ok(Seen { cpus, memory: memory? << 10 }));
    seen.with_context(|| format!("The guest says {text:?}"))
}

/// What the guest of a container has.
fn look(container: &Container<'_>) -> Result<Seen> {
    parse(&container.exec("look", &[], &["sh", "-c", LOOK], b"")?.expect_code(0)?.text())
}

/// Waits in the guest of a container until it has this number of CPUs, and at most so many bytes of memory.
fn await_size(container: &Container<'_>, cpus: u64, most: u64) -> Result<()> {
    let kib = most >> 10;
    let script = format!(
        "until [ $(nproc) = {cpus} ] && [ $(awk '/^MemTotal:/ {{print $2}}' /proc/meminfo) -le {kib} ]; do sleep 0.2; done"
    );
    let waited = container.exec("wait", &[], &["sh", "-c", &script], b"");
    waited.and_then(|waited| waited.expect_code(0)).with_context(|| {
        format!("The guest does not come to {cpus} CPUs and {} MiB: {:?}", most / MIB, look(container))
    })?;
    Ok(())
}

/// What `ctr run` is told so that the container sees its own cgroup's files, beside `limits`.
fn with_cgroups(limits: &[String]) -> Vec<&str> {
    let mut options: Vec<&str> = limits.iter().map(String::as_str).collect();
    options.extend(["--mount", "type=cgroup2,src=cgroup2,dst=/cgroups,options=ro"]);
    options
}

/// One of its limits, as the guest's kernel has it.
fn limit(container: &Container<'_>, file: &str) -> Result<String> {
    let script = format!("cat /cgroups$(cut -d: -f3 /proc/1/cgroup)/{file}");
    Ok(container.exec(&file.replace('.', "-"), &[], &["sh", "-c", &script], b"")?.expect_code(0)?.text())
}

/// Room to grow that does not depend on the machine under test.
fn with_room(context: &Context) -> Result<Changed> {
    let maxima = [("hypervisor.dragonball.default_maxvcpus", "4"), ("hypervisor.dragonball.default_maxmemory", "768")];
    context.config().with(&maxima)
}

fn annotations(context: &Context) -> Result<()> {
    let run = |annotations: &[&str]| {
        let options: Vec<&str> = annotations.iter().flat_map(|annotation| ["--annotation", annotation]).collect();
        context.ctr.run(&options, BUSYBOX, &context.id("annotated"), &["sh", "-c", LOOK])
    };
    let finished = run(&[
        "io.katacontainers.config.hypervisor.default_vcpus=2",
        "io.katacontainers.config.hypervisor.default_memory=512",
    ])?;
    let seen = parse(&finished.expect_code(0)?.text())?;
    ensure!(seen.cpus == 2 && (400 * MIB..=512 * MIB).contains(&seen.memory), "{seen:?}");
    for (annotation, part) in [
        ("io.katacontainers.config.hypervisor.default_vcpu=2", "hypervisor.default_vcpus`; correct the name"),
        ("io.katacontainers.config.hypervisor.default_vcpus=65", "more than the limit of 64 vCPUs"),
        ("io.katacontainers.config.hypervisor.default_maxmemory=512", "enable_annotations"),
    ] {
        let refused = run(&[annotation])?;
        ensure!(refused.code != 0 && refused.error_text().contains(part), "{annotation}: {refused:?}");
    }
    Ok(())
}

/// Whether a container's guest memory is in huge pages: as far as it was asked for, which is the kernel's to follow.
fn has_huge_pages(container: &Container<'_>) -> Result<bool> {
    let maps = format!("/proc/{}/smaps", container.status()?.pid);
    let maps = std::fs::read_to_string(&maps).with_context(|| format!("Cannot read {maps}"))?;
    // Nothing else of a pod asks for them.
    let mut flags = maps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    let advised = flags.any(|flags| flags.split_ascii_whitespace().any(|flag| flag == "hg"));
    // The guest's kernel is a file's pages otherwise.
    let has_file = maps.lines().any(|line| line.ends_with("/vmlinux"));
    ensure!(advised != has_file, "advised: {advised}, the kernel's file is mapped: {has_file}");
    Ok(advised)
}

fn huge_pages(context: &Context) -> Result<()> {
    const ASK: &str = "io.katacontainers.config.hypervisor.enable_hugepages=true";
    let has = |options: &[&str]| {
        let container = context.ctr.detach(options, BUSYBOX, &context.id("huge"), &["sleep", "10000"])?;
        let has = has_huge_pages(&container)?;
        container.remove().map(|_| has)
    };
    ensure!(!has(&[])?, "Nobody asked for huge pages");
    {
        let _allowed =
            context.config().with(&[("hypervisor.dragonball.enable_annotations", "[\"enable_hugepages\"]")])?;
        ensure!(has(&["--annotation", ASK])?, "The annotation changes nothing");
    }
    let _changed = context.config().with(&[("hypervisor.dragonball.enable_hugepages", "true")])?;
    ensure!(has(&[])?, "The configuration changes nothing");
    Ok(())
}

/// Starts a container of a pod, or the pod's own.
fn member<'a>(context: &'a Context, pod: &str, id: &str, kind: &str, limits: &[&str]) -> Result<Container<'a>> {
    let role = format!("io.kubernetes.cri.container-type={kind}");
    let sandbox = format!("io.kubernetes.cri.sandbox-id={pod}");
    let mut options = vec!["--annotation", &role, "--annotation", &sandbox];
    options.extend(limits);
    context.ctr.detach(&options, BUSYBOX, id, &["sleep", "10000"])
}

fn add_up(context: &Context) -> Result<()> {
    let _room = with_room(context)?;
    let (pod, first, second) = (context.id("pod"), context.id("first"), context.id("second"));
    let sandbox = member(context, &pod, &pod, "sandbox", &[])?;
    let limits = ["--cpus", "1", "--memory-limit", &(128 * MIB).to_string()].map(str::to_owned);
    let first = member(context, &pod, &first, "container", &limits.each_ref().map(String::as_str))?;
    let before = look(&first)?;
    ensure!(before.cpus == 2 && before.memory > 300 * MIB, "{before:?}");
    let limits = ["--cpus", "1.5", "--memory-limit", &(256 * MIB).to_string()].map(str::to_owned);
    let second = member(context, &pod, &second, "container", &limits.each_ref().map(String::as_str))?;
    let grown = look(&second)?;
    // 1 + 1.5 CPUs, and the one that every machine has.
    ensure!(grown == Seen { cpus: 4, memory: before.memory + 256 * MIB }, "{before:?}, then {grown:?}");
    second.remove()?;
    await_size(&first, 2, before.memory + 64 * MIB)?;
    first.remove()?;
    sandbox.remove().map(drop)
}

fn update(context: &Context) -> Result<()> {
    let _room = with_room(context)?;
    let limits = ["--cpus", "1", "--memory-limit", &(64 * MIB).to_string()].map(str::to_owned);
    let id = context.id("updated");
    let container = context.ctr.detach(&with_cgroups(&limits), BUSYBOX, &id, &["sleep", "10000"])?;
    let before = look(&container)?;
    ensure!(before.cpus == 2, "{before:?}");
    let change = |resources: Value| -> Result<()> {
        task_api::update(context, &id, &resources)?.map_err(|text| anyhow::anyhow!("{resources}: {text}"))
    };
    change(json!({"cpu": {"quota": 300_000, "period": 100_000}, "memory": {"limit": 320 * MIB}}))?;
    let grown = look(&container)?;
    ensure!(grown == Seen { cpus: 4, memory: before.memory + 256 * MIB }, "{before:?}, then {grown:?}");
    let limits = (limit(&container, "cpu.max")?, limit(&container, "memory.max")?);
    ensure!(limits == ("300000 100000".to_owned(), (320 * MIB).to_string()), "{limits:?}");
    change(json!({"cpu": {"quota": 100_000}, "memory": {"limit": 64 * MIB}}))?;
    await_size(&container, 2, before.memory + 64 * MIB)?;
    container.remove().map(drop)
}

fn refused(context: &Context) -> Result<()> {
    let _limit = context.config().with(&[("hypervisor.dragonball.default_maxmemory", "300")])?;
    let memory = (64 * MIB).to_string();
    let refused = context.ctr.run(&["--memory-limit", &memory], BUSYBOX, &context.id("large"), &["true"])?;
    let text = refused.error_text();
    ensure!(refused.code != 0 && text.contains("need 320 MiB") && text.contains("default_maxmemory"), "{refused:?}");
    // A container that runs keeps its limits.
    let id = context.id("kept");
    let limits = ["--memory-limit", "33554432"].map(str::to_owned);
    let container = context.ctr.detach(&with_cgroups(&limits), BUSYBOX, &id, &["sleep", "10000"])?;
    let refused = task_api::update(context, &id, &json!({"memory": {"limit": 64 * MIB}}))?;
    ensure!(refused.as_ref().is_err_and(|text| text.contains("can have 300 MiB")), "{refused:?}");
    let limit = limit(&container, "memory.max")?;
    ensure!(limit == "33554432", "{limit:?}");
    container.remove().map(drop)
}
