//! The figures of disks, network cards, devices that come later, and idle VMs.

use anyhow::{Context as _, Result};

use super::{Inputs, kernel, sample};
use crate::measure::block::{self, Measure};
use crate::measure::machine::Machine;
use crate::measure::{Samples, hot_plug, net};
use crate::report::{Figure, Goal, Report};
use crate::site::Site;

/// Seconds in which a guest's tools have done all.
const LIMIT: &str = "120";

/// Where a figure is reported, in which unit, and what is better.
#[derive(Clone, Copy)]
struct Kind {
    group: &'static str,
    unit: &'static str,
    less_is_better: bool,
}

/// Adds the figures of one quantity of both machines, whose samples are `MACHINE SUFFIX`.
fn compare(report: &mut Report, samples: &Samples, suffix: &str, what: &str, kind: Kind) -> Result<()> {
    let [own, peer] = Machine::ALL.map(|machine| sample(samples, &format!("{} {suffix}", machine.name()), 1.0));
    let (own, peer) = (own?, peer?);
    let [own_name, peer_name] = Machine::ALL.map(|machine| format!("{}: {what}", machine.name()));
    let goal = if kind.less_is_better { Goal::RatioAtMost(1.0) } else { Goal::RatioAtLeast(1.0) };
    let figure = Figure::new(kind.group, own_name, kind.unit, &own).against(&peer_name, &own, &peer).with_goal(goal);
    report.figures.extend([figure, Figure::new(kind.group, peer_name, kind.unit, &peer)]);
    Ok(())
}

/// Runs a measurement whose guests start from the image of tools.
fn guests(site: &Site, measurement: &str, (rounds, limit): (usize, &str), inputs: &Inputs) -> Result<Samples> {
    let base = site.provide(&kernel(&inputs.dist), "base")?;
    let tools = inputs.tools.as_ref().context("The image of tools was not made")?;
    let tools = site.provide(tools, "tools")?;
    let rounds = rounds.to_string();
    site.measure(&[measurement, "--kernel", &base, "--tools", &tools, "--rounds", &rounds, "--limit", limit])
}

/// Disks, by fio: in wall time, because one processor in virtual time would make a thread for requests pure loss.
pub(super) fn block(site: &Site, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let samples = guests(site, "block", (inputs.rounds, LIMIT), inputs)?;
    for (job, _, measure, what) in block::QUANTITIES {
        let less_is_better = measure == Measure::Latency;
        let kind = Kind { group: "virtio-blk, wall time", unit: measure.unit(), less_is_better };
        compare(report, &samples, job, what, kind)?;
    }
    report.notes.push(
        "virtio-blk: Debian's fio in the guest, a file in the lab machine's memory as the disk; QEMU's has an iothread \
         and io_uring."
            .to_owned(),
    );
    Ok(())
}

/// Network cards, by iperf3 and ping: in wall time, because iperf3 measures for seconds, and one in virtual time lasts
/// minutes.
pub(super) fn net(site: &Site, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let samples = guests(site, "net", (inputs.rounds, LIMIT), inputs)?;
    for (_, way) in net::WAYS {
        for (quantity, what, unit, less_is_better) in [
            ("send", "TCP to the host", "Mbit/s", false),
            ("receive", "TCP to the guest", "Mbit/s", false),
            ("ping", "ping from the guest: mean round trip", "µs", true),
        ] {
            let kind = Kind { group: "virtio-net, wall time", unit, less_is_better };
            compare(report, &samples, &format!("{way} {quantity}"), &format!("{what}, {way}"), kind)?;
        }
    }
    report.notes.push(
        "virtio-net: Debian's iperf3 and ping in the guest against the lab machine, over the same tap interface."
            .to_owned(),
    );
    Ok(())
}

/// Guests that devices come to, at most.
const HOT_PLUG_ROUNDS_MAX: usize = 3;
/// Virtual seconds for each device: a guest that hangs makes one last a minute.
const HOT_PLUG_LIMIT: &str = "5";

/// Disks and network cards that come later.
pub(super) fn hot_plug(site: &Site, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let samples = guests(site, "hot-plug", (inputs.rounds.min(HOT_PLUG_ROUNDS_MAX), HOT_PLUG_LIMIT), inputs)?;
    let group = "Hot-plug, virtual time";
    for (device, what) in [("blk", "a disk until its node"), ("net", "a network card until its interface")] {
        let [own, peer] = Machine::ALL.map(|machine| sample(&samples, &format!("{} {device}", machine.name()), 1.0));
        let (own, peer) = (own?, peer?);
        for (percent, name) in [(50, "median"), (99, "99th percentile")] {
            let [own_name, peer_name] = Machine::ALL.map(|machine| format!("{}: {what}, {name}", machine.name()));
            let figure = Figure::new(group, own_name, "ms", &own).against(&peer_name, &own, &peer);
            let figure = figure.at_percentile(percent, &own, Some(&peer)).with_goal(Goal::RatioAtMost(0.7));
            let of_peer = Figure::new(group, peer_name, "ms", &peer).at_percentile(percent, &peer, None);
            report.figures.extend([figure, of_peer]);
        }
    }
    report.notes.push(
        "Hot-plug: from the request on the control socket until the guest's kernel tells of the new disk or interface; \
         QEMU's devices come to a PCI Express port by ACPI."
            .to_owned(),
    );
    Ok(())
}

/// A GPU of the host that comes later. QEMU opens it by its group on either kernel, as it does by default.
pub(super) fn vfio(site: &Site, inputs: &Inputs, group: &'static str, report: &mut Report) -> Result<()> {
    const GUEST_LIMIT: &str = "300";
    let base = site.provide(&kernel(&inputs.dist), "base")?;
    let tools = inputs.tools.as_ref().context("The image of tools was not made")?;
    let tools = site.provide(tools, "tools")?;
    let (rounds, address) = (inputs.rounds.to_string(), Site::gpu());
    let guests = ["vfio", "--kernel", &base, "--tools", &tools, "--rounds", &rounds, "--limit", GUEST_LIMIT];
    let samples = site.measure(&[&guests[..], &["--address", &address]].concat())?;
    let [own, peer] = Machine::ALL.map(|machine| sample(&samples, &format!("{} vfio", machine.name()), 1.0));
    let (own, peer) = (own?, peer?);
    let [own_name, peer_name] =
        Machine::ALL.map(|machine| format!("{}: from the request until the guest has it", machine.name()));
    let figure = Figure::new(group, own_name, "ms", &own).against(&peer_name, &own, &peer);
    report.figures.extend([figure.with_goal(Goal::RatioAtMost(0.7)), Figure::new(group, peer_name, "ms", &peer)]);
    for (step, what) in hot_plug::STEPS {
        let values = sample(&samples, step, 1.0)?;
        report.figures.push(Figure::new(group, format!("dragonball: {what}"), "ms", &values));
    }
    report.notes.push(format!(
        "{group}: both guests' memory is in transparent huge pages, QEMU's by default, dragonball's by --huge-pages. QEMU is \
         asked for vfio-pci by device_add and opens the group."
    ));
    Ok(())
}

/// Idle VMs.
pub(super) fn idle(site: &Site, inputs: &Inputs, report: &mut Report) -> Result<()> {
    let base = site.provide(&kernel(&inputs.dist), "base")?;
    let image = site.provide(&inputs.dist.join("usr/share/kata-containers/kata-containers.img"), "image")?;
    let samples = site.measure(&["idle", "--kernel", &base, "--image", &image])?;
    let group = "Idle VM, wall time";
    let own = sample(&samples, "vmm", 1.0)?;
    let figure = Figure::new(group, "thread switches over 30 s, all threads but vCPUs", "1/s", &own);
    report.figures.push(figure.with_goal(Goal::AtMost(0.0)));
    let vcpu = sample(&samples, "vcpu", 1.0)?;
    report.figures.push(Figure::new(group, "thread switches over 30 s, vCPU threads", "1/s", &vcpu));
    report.notes.push("Idle VM: image, vsock, shared directory and network card as a pod has them.".to_owned());
    Ok(())
}
