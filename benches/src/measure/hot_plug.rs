//! How long a device takes to come to a running guest: from the request until the guest's kernel tells of it, which is
//! when the device node exists.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use dragonball::control_socket::{ControlAnswer, ControlRequest, ask};
use dragonball::manage::AttachTimes;
use dragonball::{DeviceConfig, DiskConfig, NetConfig, VfioConfig};

use super::lines::Lines;
use super::machine::{Machine, Parts, Process};
use super::qmp::Qmp;
use super::{Samples, push, retry};

/// How often each device comes to one guest, and goes again.
const ADDITIONS: usize = 20;
/// Memory in MiB of guests that get virtio devices, and of those that get a device of the host.
const SMALL: u64 = 256;
const LARGE: u64 = 2048;
/// The devices' name in their machines.
const NAME: &str = "hot";
/// An interface that the machine itself does not know.
const TAP: &str = "hot0";

/// What comes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Device {
    /// A disk, with this file.
    Disk(PathBuf),
    /// A network card with a tap interface.
    Card,
    /// The host's device at this address.
    Host(String),
}

impl Device {
    /// Its name in samples.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Disk(_) => "blk",
            Self::Card => "net",
            Self::Host(_) => "vfio",
        }
    }

    fn config(&self) -> DeviceConfig {
        match self {
            Self::Disk(file) => DeviceConfig::Blk(DiskConfig { path: file.clone(), read_only: false }),
            Self::Card => DeviceConfig::Net(NetConfig::new(TAP)),
            Self::Host(address) => {
                let path = Path::new("/sys/bus/pci/devices").join(address);
                DeviceConfig::Vfio(VfioConfig { path, clique: None, peer_to_peer: false })
            }
        }
    }

    /// Whether a line of the guest says that it has the device: an event of its kernel, as busybox's `uevent` prints it.
    fn is_told_by(&self, line: &str) -> bool {
        let Some(path) = line.strip_prefix("add@") else { return false };
        let class = match self {
            Self::Disk(_) => "/block/",
            Self::Card => "/net/",
            // A function of a bus: its parent is the root, or the port that it came by.
            Self::Host(_) => {
                return path.starts_with("/devices/pci") && path.rsplit('/').next().is_some_and(is_function);
            }
        };
        path.split_once(class).is_some_and(|(_, name)| !name.contains('/'))
    }
}

/// Whether `name` is a PCI function's, as `0000:00:05.0`.
fn is_function(name: &str) -> bool {
    let mut parts = name.split([':', '.']);
    name.len() == 12 && parts.clone().count() == 4 && parts.all(|part| u32::from_str_radix(part, 16).is_ok())
}

/// Lets a disk and a card come to each machine, [`ADDITIONS`] times in each of `rounds` guests; samples `MACHINE DEVICE`,
/// in milliseconds.
///
/// # Errors
/// When a guest does not start, or does not tell of a device within its limit.
pub fn measure(parts: Parts<'_>, rounds: usize) -> Result<Samples> {
    let disk = tempfile::NamedTempFile::new().context("Cannot make a disk")?;
    disk.as_file().set_len(64 << 20).context("Cannot make a disk")?;
    make_tap()?;
    let devices = [Device::Disk(disk.path().to_owned()), Device::Card];
    measure_devices(parts, &devices, SMALL, (rounds, ADDITIONS))
}

/// The same with a device of the host, which comes once to each guest, with the steps that [`Machine::Dragonball`] tells:
/// samples `STEP`.
///
/// # Errors
/// As [`measure`]; and when the device cannot be taken from the host.
pub fn measure_host_device(parts: Parts<'_>, address: &str, rounds: usize) -> Result<Samples> {
    take_from_host(address)?;
    touch_free_memory()?;
    measure_devices(parts, &[Device::Host(address.to_owned())], LARGE, (rounds, 1))
}

fn measure_devices(
    parts: Parts<'_>,
    devices: &[Device],
    memory: u64,
    (rounds, additions): (usize, usize),
) -> Result<Samples> {
    let mut samples = Samples::new();
    for _ in 0..rounds {
        for machine in Machine::ALL {
            let mut guest = retry(|| Guest::start(machine, parts, memory))
                .with_context(|| format!("The guest of {} did not start", machine.name()))?;
            for device in devices {
                for _ in 0..additions {
                    let added = guest.add(device);
                    let (milliseconds, times) =
                        added.with_context(|| format!("{} did not get its {}", machine.name(), device.name()))?;
                    push(&mut samples, &format!("{} {}", machine.name(), device.name()), milliseconds);
                    times.into_iter().flat_map(steps).for_each(|(step, value)| push(&mut samples, step, value));
                    let removed = guest.remove(device);
                    removed.with_context(|| format!("{} did not lose its {}", machine.name(), device.name()))?;
                }
            }
        }
    }
    Ok(samples)
}

/// The steps in which a device of the host comes, as samples and for people.
pub const STEPS: [(&str, &str); 5] = [
    ("open", "opening the group and its devices"),
    ("dma map", "meanwhile, filling guest memory and mapping it into the IOMMU"),
    ("bar map", "reset, and mapping the device's memory"),
    ("announce", "announcement until the guest touches it"),
    ("driver", "from then until the guest has set it up"),
];

/// Their names with their milliseconds.
fn steps(times: AttachTimes) -> [(&'static str, f64); 5] {
    let AttachTimes { open, dma_map, bar_map, announce, driver } = times;
    let values = [open, dma_map, bar_map, announce, driver].map(|microseconds| microseconds as f64 / 1e3);
    std::array::from_fn(|index| (STEPS[index].0, values[index]))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("Cannot run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Makes the tap interface; it ends with the machine that this runs in.
fn make_tap() -> Result<()> {
    run(Command::new("ip").args(["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"]))
}

/// What is left of free memory when the rest is touched, in bytes.
const UNTOUCHED: usize = 512 << 20;

/// Touches the machine's free memory once: the memory of an emulated machine is made when it is, which would be counted
/// for the guest that happens to come first.
fn touch_free_memory() -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").context("Cannot read /proc/meminfo")?;
    let available =
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.strip_suffix("kB")?.trim().parse().ok());
    let available: usize = available.context("/proc/meminfo says nothing of available memory")?;
    let mut memory = vec![0_u8; (available << 10).saturating_sub(UNTOUCHED)];
    memory.chunks_mut(4096).for_each(|page| page[0] = 1);
    std::hint::black_box(&memory);
    Ok(())
}

/// Gives the host's device to the driver `vfio-pci`.
fn take_from_host(address: &str) -> Result<()> {
    let device = Path::new("/sys/bus/pci/devices").join(address);
    let write = |path: PathBuf, text: &str| {
        std::fs::write(&path, text).with_context(|| format!("Cannot write {text} to {}", path.display()))
    };
    write(device.join("driver_override"), "vfio-pci")?;
    if device.join("driver").exists() {
        write(device.join("driver/unbind"), address)?;
    }
    write("/sys/bus/pci/drivers_probe".into(), address)
}

/// A running guest that tells its kernel's events.
struct Guest {
    control: Control,
    lines: Lines,
    limit: Duration,
    _process: Process,
    _directory: tempfile::TempDir,
}

/// How a machine is changed.
enum Control {
    Dragonball(PathBuf),
    Q35(Qmp),
}

impl Guest {
    fn start(machine: Machine, parts: Parts<'_>, memory: u64) -> Result<Self> {
        let directory = tempfile::tempdir().context("Cannot make a directory")?;
        let socket = directory.path().join("control");
        let mut command = match machine {
            Machine::Dragonball => dragonball(parts, memory, &socket),
            Machine::Q35 => q35(parts, memory, &socket),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("Cannot start {}", machine.name()))?;
        let mut process = Process(child);
        let output = process.0.stdout.take().context("The process has no pipe")?;
        let limit = Duration::from_secs(parts.limit.into());
        let mut lines = Lines::new(output.into());
        lines.find(limit, |line| line == READY)?;
        let control = match machine {
            Machine::Dragonball => Control::Dragonball(socket),
            Machine::Q35 => Control::Q35(Qmp::connect(&socket, limit)?),
        };
        Ok(Self { control, lines, limit, _process: process, _directory: directory })
    }

    /// Adds the device; answers the milliseconds until the guest told of it, and the machine's own times.
    fn add(&mut self, device: &Device) -> Result<(f64, Option<AttachTimes>)> {
        let before = Instant::now();
        let (control, lines, limit) = (&mut self.control, &mut self.lines, self.limit);
        std::thread::scope(|scope| {
            let adding = scope.spawn(|| control.add(device, limit));
            let told = lines.find(limit, |line| device.is_told_by(line));
            let milliseconds = before.elapsed().as_secs_f64() * 1e3;
            let added = adding.join().map_err(|_| anyhow::anyhow!("The thread that added it panicked"))?;
            // What the machine says explains why the guest said nothing.
            let times = added?;
            told.map(|()| (milliseconds, times))
        })
    }

    fn remove(&mut self, device: &Device) -> Result<()> {
        self.control.remove(device, self.limit)
    }
}

impl Control {
    fn add(&mut self, device: &Device, limit: Duration) -> Result<Option<AttachTimes>> {
        match self {
            Self::Dragonball(socket) => {
                let deadline_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
                let request =
                    ControlRequest::AddDevice { name: Some(NAME.to_owned()), device: device.config(), deadline_ms };
                match ask(socket, &request)? {
                    ControlAnswer::Device(info) => Ok(info.times),
                    other => anyhow::bail!("An answer to something else: {other:?}"),
                }
            }
            Self::Q35(qmp) => {
                if let Some((command, arguments)) = backend(device) {
                    qmp.execute(command, &arguments)?;
                }
                qmp.execute("device_add", &frontend(device))?;
                Ok(None)
            }
        }
    }

    fn remove(&mut self, device: &Device, limit: Duration) -> Result<()> {
        match self {
            Self::Dragonball(socket) => {
                let deadline_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
                ask(socket, &ControlRequest::RemoveDevice { name: NAME.to_owned(), deadline_ms })?;
                Ok(())
            }
            Self::Q35(qmp) => {
                qmp.execute("device_del", &serde_json::json!({ "id": NAME }))?;
                qmp.await_event("DEVICE_DELETED", |data| data["device"] == NAME)?;
                match device {
                    Device::Disk(_) => qmp.execute("blockdev-del", &serde_json::json!({ "node-name": "file" })),
                    Device::Card => qmp.execute("netdev_del", &serde_json::json!({ "id": "tap" })),
                    Device::Host(_) => Ok(()),
                }
            }
        }
    }
}

/// QEMU's command for the host's side of a device, if that is a thing of its own.
fn backend(device: &Device) -> Option<(&'static str, serde_json::Value)> {
    match device {
        Device::Disk(file) => {
            let arguments = serde_json::json!({ "driver": "file", "node-name": "file", "filename": file });
            Some(("blockdev-add", arguments))
        }
        Device::Card => {
            let tap =
                serde_json::json!({ "type": "tap", "id": "tap", "ifname": TAP, "script": "no", "downscript": "no" });
            Some(("netdev_add", tap))
        }
        Device::Host(_) => None,
    }
}

/// The arguments of QEMU's `device_add`.
fn frontend(device: &Device) -> serde_json::Value {
    let mut arguments = match device {
        Device::Disk(_) => serde_json::json!({ "driver": "virtio-blk-pci", "drive": "file" }),
        Device::Card => serde_json::json!({ "driver": "virtio-net-pci", "netdev": "tap", "romfile": "" }),
        Device::Host(address) => serde_json::json!({ "driver": "vfio-pci", "host": address }),
    };
    arguments["id"] = NAME.into();
    arguments["bus"] = PORT.into();
    arguments
}

/// What the guest says when it listens to its kernel.
const READY: &str = "ready";
const COMMAND_LINE: &str =
    "quiet loglevel=0 panic=-1 reboot=t console=hvc0 root=/dev/vda rootfstype=erofs ro init=/init job=hot-plug";
/// QEMU's port that devices come to.
const PORT: &str = "port0";

/// Its memory is in huge pages, as QEMU's is unless it is told otherwise.
fn dragonball(parts: Parts<'_>, memory: u64, socket: &Path) -> Command {
    let mut command = Command::new("/usr/bin/dragonball");
    command.args(["run", "--huge-pages", "--cpus", "1", "--memory", &format!("{memory}M")]);
    command.args(["--console", "-", "--kernel"]);
    command.arg(parts.kernel).args(["--disk", &format!("{},ro", parts.tools.display()), "--control"]).arg(socket);
    command.args(["--cmdline", COMMAND_LINE]);
    command
}

/// QEMU's usual machine, with a port that takes the largest device; it uses ACPI hot-plug at its ports.
fn q35(parts: Parts<'_>, memory: u64, socket: &Path) -> Command {
    let mut command = Command::new("/usr/bin/qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-cpu", "host", "-smp", "1"]);
    command.args(["-M", "q35,accel=kvm", "-m", &memory.to_string(), "-kernel"]).arg(parts.kernel);
    command.args(["-append", COMMAND_LINE]);
    let tools = parts.tools.display();
    command.args(["-blockdev", &format!("driver=file,node-name=tools,filename={tools},read-only=on")]);
    command.args(["-device", "virtio-blk-pci,drive=tools"]);
    command.args(["-chardev", "stdio,id=console,signal=off"]);
    command.args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console"]);
    command.args(["-device", &format!("pcie-root-port,id={PORT},chassis=1,slot=1,pref64-reserve=16G")]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_told_by_its_own_event_alone() {
        let disk = Device::Disk("/disk".into());
        let host = Device::Host("0000:01:00.0".to_owned());
        let pci = "add@/devices/pci0000:00/0000:00:05.0";
        for (device, line, told) in [
            (&disk, "add@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb", true),
            (&disk, "remove@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb", false),
            (&disk, "add@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb/vdb1", false),
            (&Device::Card, "add@/devices/pci0000:00/0000:00:05.0/virtio3/net/eth0", true),
            (&Device::Card, "add@/devices/pci0000:00/0000:00:05.0/virtio3/net/eth0/queues/rx-0", false),
            (&host, pci, true),
            (&host, "add@/devices/pci0000:00/0000:00:05.0/virtio3", false),
            (&host, "bind@/devices/pci0000:00/0000:00:05.0", false),
        ] {
            assert_eq!(device.is_told_by(line), told, "{device:?} {line}");
        }
    }
}
