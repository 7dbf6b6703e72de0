//! The virtual machine as the pod process sees it, and its making by dragonball.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use config::Config;
use dragonball::manage::Manager;
use dragonball::{
    ConsoleOutput, DeviceConfig, DiskConfig, FsConfig, MachineConfig, NetConfig, PmemConfig, VfioConfig, VsockConfig,
};

use crate::host::share;
use crate::network::Network;
use crate::sizing::Range;

pub use dragonball::ExitReason;
pub use dragonball::manage::ChangeError;

/// What makes virtual machines.
pub trait Launcher: Send + Sync {
    /// Starts the machine; it runs when this returns. Blocks for as long as that takes.
    ///
    /// # Errors
    ///
    /// [`LaunchError`]; nothing of the machine is left then.
    fn launch(&self, plan: &Plan) -> Result<Box<dyn Machine>, LaunchError>;
}

/// A running virtual machine. Dropping it ends it.
pub trait Machine: Send + Sync {
    /// Readable once the machine has ended; never read from.
    fn exit_event(&self) -> BorrowedFd<'_>;
    /// Why it ended; `None` while it runs.
    fn exit_reason(&self) -> Option<ExitReason>;
    /// Asks it to end at once; the exit event tells when it has.
    fn stop(&self);
    /// The last of what the guest wrote to its console.
    fn console_tail(&self) -> String;
    /// What happened when, in nanoseconds of CLOCK_MONOTONIC.
    fn stamps(&self) -> Vec<(&'static str, u64)>;
    /// What changes it while it runs; of no use once it has ended.
    fn hardware(&self) -> Arc<dyn Hardware>;
}

/// What a running machine consists of, to be changed. Each call blocks until the guest has followed or the deadline is
/// over.
pub trait Hardware: Send + Sync {
    /// Has this many vCPUs; answers how many there are.
    ///
    /// # Errors
    ///
    /// [`ChangeError`].
    fn resize_vcpus(&self, count: u8, deadline: Duration) -> Result<u8, ChangeError>;
    /// Has this many bytes of memory; answers how many there are.
    ///
    /// # Errors
    ///
    /// [`ChangeError`].
    fn resize_memory(&self, bytes: u64, deadline: Duration) -> Result<u64, ChangeError>;
    /// Gives a device of the host to the guest: a driver has a disk then.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the guest does not have it then.
    fn add_device(&self, device: &HostDevice, deadline: Duration) -> Result<Plugged, ChangeError>;
    /// Takes a device of this name back that was given by [`Self::add_device`].
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the guest goes on having it then.
    fn remove_device(&self, name: &str, deadline: Duration) -> Result<(), ChangeError>;
    /// Gives the guest a network card of this name, which no other device has: a driver of the guest has it then.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the guest does not have it then.
    fn add_card(&self, name: &str, card: &NetConfig, deadline: Duration) -> Result<(), ChangeError>;
    /// Takes a card back that was given by [`Self::add_card`].
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the guest goes on having it then.
    fn remove_card(&self, name: &str, deadline: Duration) -> Result<(), ChangeError>;
    /// The addresses, on the guest's PCI bus, of the devices of the host that the machine was started with.
    ///
    /// # Errors
    ///
    /// [`ChangeError::Ended`].
    fn first_devices(&self) -> Result<FirstDevices, ChangeError>;
}

/// A device of the host for a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostDevice {
    /// The PCI functions of a group, by their file of VFIO.
    Group(PathBuf),
    /// A block device, or a file that is one for the guest.
    Disk {
        /// Its path.
        path: PathBuf,
        /// Whether the guest's writes are refused.
        read_only: bool,
    },
}

impl HostDevice {
    /// What it is on the host; one path is one device.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Group(path) | Self::Disk { path, .. } => path,
        }
    }

    fn config(&self) -> DeviceConfig {
        match self {
            Self::Group(path) => DeviceConfig::Vfio(vfio(path)),
            Self::Disk { path, read_only } => DeviceConfig::Blk(disk(path, *read_only)),
        }
    }
}

/// A device that was given to a running machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugged {
    /// What the machine calls it.
    pub name: String,
    /// On the guest's PCI bus.
    pub address: String,
}

/// Addresses of the devices that a machine was started with: of each kind, in the order of its plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FirstDevices {
    /// Those of [`HostDevice::Group`].
    pub groups: Vec<String>,
    /// Those of [`HostDevice::Disk`].
    pub disks: Vec<String>,
}

/// What the configuration, the annotations, the limits and the devices of a sandbox decide.
#[derive(Debug, Clone)]
pub struct Blueprint {
    /// The configuration with the annotations applied.
    pub config: Config,
    /// The machine's size.
    pub size: Range,
    /// The pod's network.
    pub network: Network,
    /// Devices of the host that the machine starts with.
    pub devices: Vec<HostDevice>,
    /// Whether more of them, or network cards, may come.
    pub devices_can_come: bool,
    /// The guest's host name.
    pub hostname: String,
    /// The guest's kernel parameters, by their names with dots.
    pub sysctls: HashMap<String, String>,
    /// Bytes that the guest's /dev/shm may have; 0 leaves that to the guest.
    pub shm_size: u64,
}

/// What a sandbox's machine consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Read-only guest image.
    pub image: PathBuf,
    /// Added to the machine's own kernel command line.
    pub cmdline: String,
    /// vCPUs and memory.
    pub size: Range,
    /// Whether guest memory is in huge pages from the start.
    pub huge_pages: bool,
    /// Devices of the host.
    pub devices: Vec<HostDevice>,
    /// Whether devices of the host and network cards can come later.
    pub devices_can_come: bool,
    /// Network cards.
    pub cards: Vec<NetConfig>,
    /// Directory that the containers share with the host.
    pub shared: PathBuf,
    /// Unix socket of the vsock device.
    pub vsock: PathBuf,
    /// File for the debug UART's output; none without debugging.
    pub debug_console: Option<PathBuf>,
}

/// A machine that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The caller asked for something that does not exist or is out of range.
    #[error("the virtual machine cannot be started with this configuration")]
    Config(#[source] dragonball::ConfigError),
    /// The host did not give what the machine needs.
    #[error("the virtual machine cannot be started")]
    Start(#[source] dragonball::StartError),
    /// The guest image is no file system of the kind that the kernel is told to mount.
    #[error("guest image {path}: {problem}; build it again with `make`, or correct `image` in the configuration")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl Blueprint {
    /// Whether anything can be added to the machine while it runs.
    #[must_use]
    pub fn is_pluggable(&self) -> bool {
        self.size.vcpus_can_come() || self.devices_can_come
    }
}

impl Plan {
    /// The machine of a sandbox whose sockets and shared directory are given.
    #[must_use]
    pub fn new(blueprint: &Blueprint, vsock: &Path, shared: &Path, debug_console: Option<PathBuf>) -> Self {
        let config = &blueprint.config;
        let hypervisor = &config.hypervisor;
        let mut cmdline =
            String::from("root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/sbin/kata-agent");
        if config.agent.enable_debug {
            cmdline.push_str(" agent.log=debug");
        }
        if !hypervisor.kernel_params.trim().is_empty() {
            cmdline.push(' ');
            cmdline.push_str(hypervisor.kernel_params.trim());
        }
        Self {
            kernel: hypervisor.kernel.clone(),
            image: hypervisor.image.clone(),
            cmdline,
            size: blueprint.size,
            huge_pages: hypervisor.enable_hugepages,
            devices: blueprint.devices.clone(),
            devices_can_come: blueprint.devices_can_come,
            cards: blueprint.network.cards.clone(),
            shared: shared.to_owned(),
            vsock: vsock.to_owned(),
            debug_console,
        }
    }
}

/// Makes machines with dragonball, in this process.
#[derive(Debug, Default)]
pub struct Dragonball;

impl Launcher for Dragonball {
    fn launch(&self, plan: &Plan) -> Result<Box<dyn Machine>, LaunchError> {
        check_image(&plan.image)?;
        let mut config = MachineConfig::new(&plan.kernel);
        config.cmdline.clone_from(&plan.cmdline);
        let Range { boot, max, .. } = plan.size;
        config.vcpus = boot.vcpus;
        config.vcpus_max = Some(max.vcpus);
        config.hot_plug = plan.size.vcpus_can_come() || plan.devices_can_come;
        for device in &plan.devices {
            match device {
                HostDevice::Group(path) => config.vfio.push(vfio(path)),
                HostDevice::Disk { path, read_only } => config.disks.push(disk(path, *read_only)),
            }
        }
        config.net.clone_from(&plan.cards);
        config.memory = boot.memory;
        config.memory_max = Some(max.memory);
        config.huge_pages = plan.huge_pages;
        config.pmem = vec![PmemConfig { path: plan.image.clone(), read_only: true }];
        config.fs = vec![FsConfig {
            tag: protocols::SHARED_TAG.to_owned(),
            directory: plan.shared.clone(),
            guest_only: Some(share::ROOT.to_owned()),
        }];
        config.vsock = Some(VsockConfig { guest_cid: protocols::GUEST_CID, socket: plan.vsock.clone() });
        // The console is there for its tail alone, which error reports quote.
        config.console = ConsoleOutput::File(PathBuf::from("/dev/null"));
        if let Some(path) = &plan.debug_console {
            config.debug_uart = ConsoleOutput::File(path.clone());
        }
        match dragonball::start(config) {
            Ok(vm) => Ok(Box::new(vm)),
            Err(dragonball::StartError::Config(error)) => Err(LaunchError::Config(error)),
            Err(error) => Err(LaunchError::Start(error)),
        }
    }
}

fn vfio(path: &Path) -> VfioConfig {
    VfioConfig { path: path.to_owned(), clique: None, peer_to_peer: false }
}

fn disk(path: &Path, read_only: bool) -> DiskConfig {
    DiskConfig { path: path.to_owned(), read_only }
}

impl Machine for dragonball::Vm {
    fn exit_event(&self) -> BorrowedFd<'_> {
        Self::exit_event(self)
    }

    fn exit_reason(&self) -> Option<ExitReason> {
        Self::exit_reason(self)
    }

    fn stop(&self) {
        Self::stop(self);
    }

    fn console_tail(&self) -> String {
        Self::console_tail(self)
    }

    fn stamps(&self) -> Vec<(&'static str, u64)> {
        Self::stamps(self)
    }

    fn hardware(&self) -> Arc<dyn Hardware> {
        Arc::new(self.manager())
    }
}

/// What dragonball calls devices, and their names begin with where nobody named them.
const VFIO_KIND: &str = "vfio";
const DISK_KIND: &str = "blk";

impl Hardware for Manager {
    fn resize_vcpus(&self, count: u8, deadline: Duration) -> Result<u8, ChangeError> {
        Self::resize_vcpus(self, count, deadline).map(|count| count.present)
    }

    fn resize_memory(&self, bytes: u64, deadline: Duration) -> Result<u64, ChangeError> {
        Self::resize_memory(self, bytes, deadline).map(|size| size.present)
    }

    fn add_device(&self, device: &HostDevice, deadline: Duration) -> Result<Plugged, ChangeError> {
        let added = Self::add_device(self, None, &device.config(), deadline)?;
        Ok(Plugged { name: added.name, address: added.address })
    }

    fn remove_device(&self, name: &str, deadline: Duration) -> Result<(), ChangeError> {
        Self::remove_device(self, name, deadline)
    }

    fn add_card(&self, name: &str, card: &NetConfig, deadline: Duration) -> Result<(), ChangeError> {
        Self::add_device(self, Some(name.to_owned()), &DeviceConfig::Net(card.clone()), deadline).map(drop)
    }

    fn remove_card(&self, name: &str, deadline: Duration) -> Result<(), ChangeError> {
        Self::remove_device(self, name, deadline)
    }

    fn first_devices(&self) -> Result<FirstDevices, ChangeError> {
        let devices = self.info()?.devices;
        // By their slots, which they got in the order of the configuration.
        let of = |kind: &str| {
            let ours = devices.iter().filter(|device| device.kind == kind && device.name.starts_with(kind));
            ours.map(|device| device.address.clone()).collect()
        };
        Ok(FirstDevices { groups: of(VFIO_KIND), disks: of(DISK_KIND) })
    }
}

/// EROFS super block: at byte 1024, magic 0xE0F5E1E2 little-endian (linux/fs/erofs/erofs_fs.h).
const EROFS_MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

/// A guest whose root cannot be mounted panics a second later with a text that names no file: this one does.
///
/// # Errors
///
/// [`LaunchError::Image`].
pub fn check_image(path: &Path) -> Result<(), LaunchError> {
    use std::os::unix::fs::FileExt;
    let bad = |problem: String| LaunchError::Image { path: path.to_owned(), problem };
    let file = std::fs::File::open(path).map_err(|error| bad(format!("cannot be opened: {error}")))?;
    let size = file.metadata().map_err(|error| bad(format!("cannot be examined: {error}")))?.len();
    let mut block = [0; 40];
    file.read_exact_at(&mut block, 1024).map_err(|error| bad(format!("has no super block: {error}")))?;
    let [m0, m1, m2, m3, ..] = block;
    if [m0, m1, m2, m3] != EROFS_MAGIC {
        return Err(bad("is not an EROFS file system".to_owned()));
    }
    // blkszbits at 12, blocks at 36. What lies beyond the file would be the guest's to fault on.
    let blocks = u32::from_le_bytes([block[36], block[37], block[38], block[39]]);
    let wanted = u64::from(blocks).checked_shl(u32::from(block[12])).unwrap_or(u64::MAX);
    if wanted > size {
        return Err(bad(format!("was cut off: it has {size} bytes, its file system {wanted}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_without_the_magic_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = check_image(file.path()).unwrap_err().to_string();
        assert!(message.contains("has no super block"), "{message}");
        std::fs::write(file.path(), vec![0; 4096]).unwrap();
        let message = check_image(file.path()).unwrap_err().to_string();
        assert!(
            message.contains("is not an EROFS") && message.contains(&file.path().display().to_string()),
            "{message}"
        );
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&[0xE2, 0xE1, 0xF5, 0xE0]);
        std::fs::write(file.path(), image).unwrap();
        check_image(file.path()).unwrap();
    }

    #[test]
    fn an_image_that_was_cut_off_is_refused_with_both_sizes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&[0xE2, 0xE1, 0xF5, 0xE0]);
        image[1024 + 12] = 12;
        image[1024 + 36] = 2;
        std::fs::write(file.path(), image).unwrap();
        let message = check_image(file.path()).unwrap_err().to_string();
        assert!(message.contains("4096 bytes") && message.contains("8192"), "{message}");
        file.as_file().set_len(8192).unwrap();
        check_image(file.path()).unwrap();
    }
}
