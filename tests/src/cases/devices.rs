//! Devices of the machine under test that containers use: as the only container of a sandbox, and in a pod.
//!
//! The static program `lab-passthrough` is the driver: it computes, moves memory by DMA and checks the results.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::{crash, strings};
use crate::context::{BUSYBOX, Context};
use crate::ctr::Container;
use crate::harness::Case;

pub(super) const CASES: &[Case] = &[
    Case::with_devices("devices: a container computes with the devices that it asked for", alone),
    Case::with_devices(
        "devices: a pod's container gets a device while the guest runs, and the next one after it",
        in_pod,
    ),
    Case::with_devices("devices: after the death of a pod's process the next container has the device", after_death),
];

/// What is passed, and the program that uses it.
#[derive(Clone, Debug)]
pub struct HostDevices {
    /// PCI addresses.
    pub addresses: Vec<String>,
    /// `lab-passthrough`.
    pub program: PathBuf,
}

fn devices(context: &Context) -> Result<&HostDevices> {
    context.devices.as_ref().context("No devices were given to the suites")
}

/// Gives a device to vfio-pci, as an administrator does; answers the file of its group.
fn group(address: &str) -> Result<String> {
    let device = Path::new("/sys/bus/pci/devices").join(address);
    let write = |path: PathBuf, text: &str| {
        fs::write(&path, text).with_context(|| format!("Cannot write {text} to {}", path.display()))
    };
    let driver = fs::read_link(device.join("driver")).ok();
    if driver.as_deref().and_then(Path::file_name).is_none_or(|name| name != "vfio-pci") {
        let loaded = std::process::Command::new("modprobe").arg("vfio-pci").status().context("Cannot run modprobe")?;
        ensure!(loaded.success(), "vfio-pci cannot be loaded");
        write(device.join("driver_override"), "vfio-pci")?;
        if driver.is_some() {
            write(device.join("driver/unbind"), address)?;
        }
        write(PathBuf::from("/sys/bus/pci/drivers_probe"), address)?;
    }
    let group = fs::read_link(device.join("iommu_group")).with_context(|| format!("{address} has no IOMMU group"))?;
    Ok(format!("/dev/vfio/{}", group.file_name().unwrap_or_default().to_string_lossy()))
}

/// What `ctr run` is told so that a program of the container can be a driver: sysfs to write to, and the right to lock
/// pages and learn their addresses.
fn driver_options(program: &Path) -> Vec<String> {
    let program = format!("type=bind,src={},dst=/passthrough,options=rbind:ro", program.display());
    let sysfs = "type=sysfs,src=sysfs,dst=/sys,options=rw";
    ["--mount", &program, "--mount", sysfs, "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_IPC_LOCK"]
        .map(str::to_owned)
        .to_vec()
}

fn alone(context: &Context) -> Result<()> {
    let HostDevices { addresses, program } = devices(context)?;
    let mut options = driver_options(program);
    for address in addresses {
        options.extend(["--device".to_owned(), group(address)?]);
    }
    let said = context.ctr.run(&strings(&options), BUSYBOX, &context.id("driver"), &["/passthrough"])?;
    let said = said.expect_code(0)?.text();
    ensure!(said.contains(&format!("devices: {} ok, 0 failed", addresses.len())), "{said}");
    // Without asking, there is none.
    let said = context.ctr.run(&strings(&driver_options(program)), BUSYBOX, &context.id("none"), &["/passthrough"])?;
    let said = said.expect_code(0)?.text();
    ensure!(said.contains("devices: 0 ok, 0 failed"), "{said}");
    Ok(())
}

/// Starts a container of a pod that sleeps.
fn member<'a>(context: &'a Context, pod: &str, id: &str, more: &[String]) -> Result<Container<'a>> {
    let kind = if pod == id { "sandbox" } else { "container" };
    let mut options = vec![
        "--annotation".to_owned(),
        format!("io.kubernetes.cri.container-type={kind}"),
        "--annotation".to_owned(),
        format!("io.kubernetes.cri.sandbox-id={pod}"),
    ];
    options.extend_from_slice(more);
    context.ctr.detach(&strings(&options), BUSYBOX, id, &["sleep", "10000"])
}

fn use_device(container: &Container<'_>, name: &str) -> Result<()> {
    let said = container.exec(name, &[], &["/passthrough"], b"")?.expect_code(0)?.text();
    ensure!(said.contains("devices: 1 ok, 0 failed"), "{said}");
    Ok(())
}

fn in_pod(context: &Context) -> Result<()> {
    let HostDevices { addresses, program } = devices(context)?;
    let groups = addresses.iter().map(|address| group(address)).collect::<Result<Vec<_>>>()?;
    let pod = context.id("pod");
    let sandbox = member(context, &pod, &pod, &[])?;
    for group in groups.iter().chain(&groups) {
        let mut options = driver_options(program);
        options.extend(["--device".to_owned(), group.clone()]);
        let id = context.id("driver");
        let container = member(context, &pod, &id, &options)?;
        use_device(&container, "first")?;
        // It has one owner.
        let other = context.id("other");
        let refused = member(context, &pod, &other, &["--device".to_owned(), group.clone()]).map(|_| ());
        let text = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(text.contains(&format!("belongs to container {id}")), "{text:?}");
        context.ctr.ok(&["container", "delete", &other])?;
        use_device(&container, "second")?;
        container.remove()?;
    }
    sandbox.remove().map(drop)
}

fn after_death(context: &Context) -> Result<()> {
    let HostDevices { addresses, program } = devices(context)?;
    let address = addresses.first().context("No device was given")?;
    let mut options = driver_options(program);
    options.extend(["--device".to_owned(), group(address)?]);
    crash::run_and_kill(context, &strings(&options), |container| use_device(container, "before"))?;
    let driver = fs::read_link(Path::new("/sys/bus/pci/devices").join(address).join("driver"))?;
    ensure!(driver.ends_with("vfio-pci"), "{}", driver.display());
    let said = context.ctr.run(&strings(&options), BUSYBOX, &context.id("next"), &["/passthrough"])?;
    let said = said.expect_code(0)?.text();
    ensure!(said.contains("devices: 1 ok, 0 failed"), "{said}");
    Ok(())
}
