//! What a virtual machine consists of.

use std::path::PathBuf;

mod error;
mod net;
mod validate;

pub use error::ConfigError;
pub use net::{MTU_MIN, MacAddress, NET_QUEUES_MAX, NetConfig, TapDescriptors, TapSource, VhostMode};

/// Guest memory is given in multiples of this many bytes (2 MiB), so that the host can back it by huge pages.
pub const MEMORY_GRANULE: u64 = 2 << 20;
/// The least guest memory (32 MiB) that a kernel and its `init` start in.
pub const MEMORY_MIN: u64 = 32 << 20;
/// The most vCPUs of one machine: their APIC ids must stay below the broadcast id 255.
pub const VCPUS_MAX: u8 = 254;
/// The longest kernel command line that Linux takes on x86 (`COMMAND_LINE_SIZE` in its `asm/setup.h`), its NUL included.
pub const CMDLINE_MAX: usize = 2048;
/// The largest number of a clique: the capability has four bits for it.
pub const CLIQUE_MAX: u8 = 15;
/// The most devices of one machine: the slots of PCI bus 0 less the host bridge.
pub const DEVICES_MAX: usize = 31;

/// A virtual machine to be started.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MachineConfig {
    /// An uncompressed `vmlinux` with a PVH entry point, or a `bzImage`. Its pages are mapped, not copied (but into huge
    /// pages): replace the file by renaming another one over it, never by writing into it, while machines run.
    pub kernel: PathBuf,
    /// An initial RAM disk; mapped as the kernel is.
    pub initrd: Option<PathBuf>,
    /// Appended to the machine's own kernel command line.
    pub cmdline: String,
    /// Number of vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// Guest memory in bytes: a multiple of [`MEMORY_GRANULE`], at least [`MEMORY_MIN`], at most what the host has.
    pub memory: u64,
    /// The most memory that the guest can have while it runs, in bytes: `memory`, and what can be plugged beside it. A
    /// multiple of [`MEMORY_GRANULE`]. Without one, and where it equals `memory`, no memory can be plugged.
    pub memory_max: Option<u64>,
    /// Whether guest memory is in the host's huge pages from the start (transparent ones: none need to be reserved). The
    /// guest is faster, and gets devices of the host sooner; more memory is touched than the guest uses, and the kernel's
    /// pages are not shared with other machines. A machine that starts with devices of the host has them anyway, because
    /// all of its memory is touched then.
    pub huge_pages: bool,
    /// Whether the machine has a balloon, through which the guest gives memory back that it does not use.
    pub balloon: bool,
    /// Persistent memory devices, `/dev/pmem0` and on.
    pub pmem: Vec<PmemConfig>,
    /// Block devices, `/dev/vda` and on.
    pub disks: Vec<DiskConfig>,
    /// Network cards, `eth0` and on.
    pub net: Vec<NetConfig>,
    /// Shared directories.
    pub fs: Vec<FsConfig>,
    /// The socket device.
    pub vsock: Option<VsockConfig>,
    /// Devices of the host that belong to the guest, each with its whole IOMMU group.
    pub vfio: Vec<VfioConfig>,
    /// Where the virtio console's output goes; [`ConsoleOutput::None`] leaves the device out.
    pub console: ConsoleOutput,
    /// Where the output of a 16550 UART at port 0x3f8 goes; [`ConsoleOutput::None`] leaves it out. With one, the kernel
    /// is told to use it as its console.
    pub debug_uart: ConsoleOutput,
    /// The most vCPUs that the machine may ever have; nothing: no more than it starts with. Each costs the guest some
    /// memory, and more than it starts with need `hot_plug`.
    pub vcpus_max: Option<u8>,
    /// Whether devices and vCPUs can come and go while the machine runs. Costs the guest a little time when it boots.
    pub hot_plug: bool,
    /// Whether the machine has the boot timer: a byte 123 written to guest-physical address 0xC000_0000 marks the moment
    /// of `init`.
    pub boot_timer: bool,
}

impl MachineConfig {
    /// A machine with one vCPU and 128 MiB that boots `kernel` and has no devices.
    #[must_use]
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            vcpus: 1,
            memory: 128 << 20,
            memory_max: None,
            huge_pages: false,
            balloon: false,
            pmem: Vec::new(),
            disks: Vec::new(),
            net: Vec::new(),
            fs: Vec::new(),
            vsock: None,
            vfio: Vec::new(),
            console: ConsoleOutput::None,
            debug_uart: ConsoleOutput::None,
            vcpus_max: None,
            hot_plug: false,
            boot_timer: false,
        }
    }

    /// The most memory that the guest can have, in bytes.
    pub(crate) fn memory_max(&self) -> u64 {
        self.memory_max.unwrap_or(self.memory)
    }

    /// The devices that could as well have come later, in the order in which the guest finds them.
    pub(crate) fn devices(&self) -> impl Iterator<Item = DeviceConfig> {
        let pmem = self.pmem.iter().cloned().map(DeviceConfig::Pmem);
        let disks = self.disks.iter().cloned().map(DeviceConfig::Blk);
        let net = self.net.iter().cloned().map(DeviceConfig::Net);
        let fs = self.fs.iter().cloned().map(DeviceConfig::Fs);
        pmem.chain(disks).chain(net).chain(fs)
    }

    /// The devices of the host. They come last, because their memory lies above everything else.
    pub(crate) fn host_devices(&self) -> impl Iterator<Item = DeviceConfig> {
        self.vfio.iter().cloned().map(DeviceConfig::Vfio)
    }

    /// How many PCI devices the machine has. An entropy device comes with the others; a machine that has none and gets
    /// none has no PCI bus either, whose probing would take the guest longer than all the rest of the machine.
    pub(crate) fn device_count(&self) -> usize {
        let console = usize::from(self.console != ConsoleOutput::None);
        let vsock = usize::from(self.vsock.is_some());
        let memory = usize::from(self.memory_max() > self.memory) + usize::from(self.balloon);
        let asked_for = self.devices().count() + self.host_devices().count() + vsock + console + memory;
        if asked_for > 0 || self.hot_plug { asked_for + 1 } else { 0 }
    }

    /// Whether the machine has a PCI bus.
    pub(crate) fn has_pci(&self) -> bool {
        self.device_count() > 0
    }

    /// Whether devices of the host may ever be in it.
    pub(crate) fn may_have_host_devices(&self) -> bool {
        self.hot_plug || !self.vfio.is_empty()
    }

    /// Whether guest memory is in huge pages from the start.
    pub(crate) fn has_huge_pages(&self) -> bool {
        self.huge_pages || !self.vfio.is_empty()
    }

    /// The most vCPUs that the machine may ever have.
    pub(crate) fn vcpus_max(&self) -> u8 {
        self.vcpus_max.unwrap_or(self.vcpus)
    }
}

/// A file that the guest sees as persistent memory: its pages are the host's page cache.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct PmemConfig {
    /// The file. Its content must not be truncated while the machine runs.
    pub path: PathBuf,
    /// Whether guest writes are refused; otherwise they stay in the guest's memory and the file does not change.
    pub read_only: bool,
}

/// A file or block device that the guest sees as a disk.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct DiskConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// Whether guest writes are refused.
    pub read_only: bool,
}

/// A directory that the guest can mount by its tag (`mount -t virtiofs TAG /mnt`).
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub struct FsConfig {
    /// The tag, 1 to 36 bytes (virtio 1.2, §5.11.4).
    pub tag: String,
    /// The directory.
    pub directory: PathBuf,
    /// Directories of this name, two levels below `directory`, are changed by the guest alone: it may keep the names in them
    /// for a while. All others it looks up each time.
    #[serde(default)]
    pub guest_only: Option<String>,
}

/// A device that may come while the machine runs.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceConfig {
    /// Persistent memory.
    Pmem(PmemConfig),
    /// A disk.
    Blk(DiskConfig),
    /// A network card.
    Net(NetConfig),
    /// A shared directory.
    Fs(FsConfig),
    /// A device of the host.
    Vfio(VfioConfig),
}

impl DeviceConfig {
    /// What its kind is called.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Pmem(_) => "pmem",
            Self::Blk(_) => "blk",
            Self::Net(_) => "net",
            Self::Fs(_) => "fs",
            Self::Vfio(_) => "vfio",
        }
    }
}

/// The socket device and its host side.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct VsockConfig {
    /// The guest's context id, 3 to 0xffff_fffe.
    pub guest_cid: u32,
    /// Unix socket that the machine listens on: a peer writes `CONNECT <port>\n` to reach a guest port; the guest
    /// reaches host port P where somebody listens on this path with `_P` appended.
    pub socket: PathBuf,
}

/// A device of the host that belongs to the guest, with all functions of its IOMMU group.
#[derive(Clone, Debug, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct VfioConfig {
    /// Its directory in sysfs (`/sys/bus/pci/devices/0000:01:00.0`) or its address alone, the file of its group
    /// (`/dev/vfio/7`), or its own device file (`/dev/vfio/devices/vfio0`).
    pub path: PathBuf,
    /// NVIDIA's number, 0 to [`CLIQUE_MAX`], of the devices whose guest drivers may access each other's memory.
    #[serde(default)]
    pub clique: Option<u8>,
    /// Whether other devices of the machine may access the memory of this one.
    #[serde(default)]
    pub peer_to_peer: bool,
}

/// Where console output goes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum ConsoleOutput {
    /// Nowhere: the device does not exist.
    #[default]
    None,
    /// Standard output; input comes from standard input.
    Stdio,
    /// A file, created or appended to.
    File(PathBuf),
}
