//! What a virtual machine consists of, and the checks that a configuration must pass before anything is built.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::host;

mod net;

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
    /// An uncompressed `vmlinux` with a PVH entry point, or a `bzImage`. Its pages are mapped, not copied: replace the
    /// file by renaming another one over it, never by writing into it, while machines run.
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

    /// Checks what can be checked without making the device.
    ///
    /// # Errors
    /// The first thing that is wrong, with the remedy.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::Pmem(pmem) => require_file("persistent memory image", &pmem.path),
            Self::Blk(disk) => require_open("disk", &disk.path, "a file or block device").map(drop),
            Self::Vfio(vfio) => match vfio.clique.filter(|clique| *clique > CLIQUE_MAX) {
                Some(clique) => Err(ConfigError::Clique(clique)),
                None => Ok(()),
            },
            Self::Net(net) => net.validate(),
            Self::Fs(fs) => {
                if fs.tag.is_empty() || fs.tag.len() > TAG_MAX {
                    return Err(ConfigError::Tag(fs.tag.clone()));
                }
                require_directory("shared directory", &fs.directory)
            }
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

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Too little or too much guest memory.
    #[error("Guest memory of {given} bytes is out of range: give {min} to {max} bytes ({limit})")]
    MemoryRange {
        /// What was asked for, in bytes.
        given: u64,
        /// The least, in bytes.
        min: u64,
        /// The most on this host, in bytes.
        max: u64,
        /// What sets the upper limit.
        limit: &'static str,
    },
    /// Guest memory that is no multiple of the granule.
    #[error("Guest memory of {0} bytes is not a multiple of 2 MiB: round it up to {next} bytes", next = .0.next_multiple_of(MEMORY_GRANULE))]
    MemoryGranule(u64),
    /// A maximum of guest memory below what the machine starts with.
    #[error(
        "The most guest memory, {max} bytes, is less than the {memory} bytes that the guest starts with: give at least those"
    )]
    MemoryMax {
        /// The maximum that was asked for, in bytes.
        max: u64,
        /// The memory that was asked for, in bytes.
        memory: u64,
    },
    /// No vCPU, or too many.
    #[error("{given} vCPUs are out of range: give 1 to {max}")]
    Vcpus {
        /// What was asked for.
        given: u8,
        /// The most on this host.
        max: u8,
    },
    /// A maximum below the number of vCPUs, or above it in a machine that cannot get more.
    #[error(
        "At most {max} vCPUs do not go with {vcpus} at the start: give at least as many, and more only with hot-plug"
    )]
    VcpusMax {
        /// How many at the start.
        vcpus: u8,
        /// The maximum as given.
        max: u8,
    },
    /// A file or directory cannot be used.
    #[error("The {role} {} cannot be used: check that it exists and is {kind} that this user may access", path.display())]
    Unusable {
        /// What it is for.
        role: &'static str,
        /// The path as given.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// An empty file where content is needed.
    #[error("The {role} {} is empty: build or copy it again", path.display())]
    Empty {
        /// What it is for.
        role: &'static str,
        /// The path as given.
        path: PathBuf,
    },
    /// A kernel command line that the guest could not take.
    #[error("The kernel command line has {given} bytes, the guest takes at most {max}: shorten it")]
    CmdlineLength {
        /// Its length with the machine's own part.
        given: usize,
        /// The longest that the guest takes.
        max: usize,
    },
    /// A kernel command line with a control or non-ASCII character.
    #[error("The kernel command line has the character {0:?}: use printable ASCII only")]
    CmdlineCharacter(char),
    /// A shared directory's tag that is empty, too long, or used twice.
    #[error("The tag {0:?} cannot be used: give each shared directory its own tag of 1 to 36 bytes")]
    Tag(String),
    /// What is no address of a card.
    #[error("{0:?} is no address of a network card: give a unicast one, for instance 02:00:00:00:00:01")]
    Mac(String),
    /// What is no name of an interface.
    #[error("{0:?} is no name of an interface: give 1 to 15 printable ASCII characters other than / : and %")]
    InterfaceName(String),
    /// Two cards on one tap interface.
    #[error("The tap {0} cannot serve two network cards: give each its own")]
    TapTwice(String),
    /// No queue pair, or too many.
    #[error("{given} queue pairs of a network card are out of range: give 1 to {NET_QUEUES_MAX}")]
    NetQueues {
        /// What was asked for.
        given: usize,
    },
    /// An MTU that no network works with.
    #[error("An MTU of {0} bytes is too small: give at least {MTU_MIN}")]
    Mtu(u16),
    /// A context id that is reserved.
    #[error("The vsock context id {0} is reserved: give 3 to 4294967294")]
    GuestCid(u32),
    /// A socket path that does not fit `sun_path`.
    #[error("The vsock socket path {} is too long: keep it within {max} bytes", path.display())]
    SocketPath {
        /// The path as given.
        path: PathBuf,
        /// The longest that leaves room for the port suffix.
        max: usize,
    },
    /// More devices than the PCI bus has slots.
    #[error("{given} devices were asked for, the machine has room for {DEVICES_MAX}: remove some")]
    TooManyDevices {
        /// How many were asked for.
        given: usize,
    },
    /// A clique that the capability has no number for.
    #[error("The clique {0} is out of range: give 0 to {CLIQUE_MAX}")]
    Clique(u8),
    /// Two consoles on standard input and output.
    #[error("The console and the debug UART cannot both use standard input and output: send one of them to a file")]
    StdioTwice,
}

/// `sun_path` holds 108 bytes; a NUL and the suffix `_4294967295` must fit too (unix(7)).
const SOCKET_PATH_MAX: usize = 108 - 1 - 11;
/// The longest tag of a shared directory (virtio 1.2, §5.11.4).
const TAG_MAX: usize = 36;

impl MachineConfig {
    /// Checks everything that can be checked without building the machine.
    ///
    /// # Errors
    /// The first thing that is wrong, with its limit and the remedy.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let limits = host::Limits::of_this_host();
        self.validate_memory(&limits)?;
        self.validate_vcpus(limits.vcpus)?;
        self.validate_cmdline()?;
        self.validate_devices()?;
        self.validate_taps()?;
        self.validate_files()
    }

    fn validate_memory(&self, limits: &host::Limits) -> Result<(), ConfigError> {
        let (max, limit) = limits.guest_memory();
        if self.memory < MEMORY_MIN || self.memory > max {
            return Err(ConfigError::MemoryRange { given: self.memory, min: MEMORY_MIN, max, limit });
        }
        let memory_max = self.memory_max();
        if memory_max < self.memory {
            return Err(ConfigError::MemoryMax { max: memory_max, memory: self.memory });
        }
        if memory_max > max {
            return Err(ConfigError::MemoryRange { given: memory_max, min: MEMORY_MIN, max, limit });
        }
        match [self.memory, memory_max].into_iter().find(|size| !size.is_multiple_of(MEMORY_GRANULE)) {
            Some(size) => Err(ConfigError::MemoryGranule(size)),
            None => Ok(()),
        }
    }

    fn validate_vcpus(&self, host_max: u8) -> Result<(), ConfigError> {
        let max = host_max.min(VCPUS_MAX);
        for given in [self.vcpus, self.vcpus_max()] {
            if given == 0 || given > max {
                return Err(ConfigError::Vcpus { given, max });
            }
        }
        let more = self.vcpus_max() != self.vcpus;
        if self.vcpus_max() < self.vcpus || more && !self.hot_plug {
            return Err(ConfigError::VcpusMax { vcpus: self.vcpus, max: self.vcpus_max() });
        }
        Ok(())
    }

    fn validate_cmdline(&self) -> Result<(), ConfigError> {
        if let Some(character) = self.cmdline.chars().find(|c| !matches!(c, ' '..='~')) {
            return Err(ConfigError::CmdlineCharacter(character));
        }
        let given = crate::boot::cmdline::of(self).len() + 1;
        if given > CMDLINE_MAX {
            return Err(ConfigError::CmdlineLength { given, max: CMDLINE_MAX });
        }
        Ok(())
    }

    fn validate_devices(&self) -> Result<(), ConfigError> {
        let given = self.device_count();
        if given > DEVICES_MAX {
            return Err(ConfigError::TooManyDevices { given });
        }
        for (index, fs) in self.fs.iter().enumerate() {
            if self.fs.iter().take(index).any(|other| other.tag == fs.tag) {
                return Err(ConfigError::Tag(fs.tag.clone()));
            }
        }
        if let Some(vsock) = &self.vsock {
            if !(3..u32::MAX).contains(&vsock.guest_cid) {
                return Err(ConfigError::GuestCid(vsock.guest_cid));
            }
            if vsock.socket.as_os_str().len() > SOCKET_PATH_MAX {
                return Err(ConfigError::SocketPath { path: vsock.socket.clone(), max: SOCKET_PATH_MAX });
            }
        }
        if self.console == ConsoleOutput::Stdio && self.debug_uart == ConsoleOutput::Stdio {
            return Err(ConfigError::StdioTwice);
        }
        Ok(())
    }

    fn validate_files(&self) -> Result<(), ConfigError> {
        require_file("kernel", &self.kernel)?;
        if let Some(initrd) = &self.initrd {
            require_file("initrd", initrd)?;
        }
        self.devices().chain(self.host_devices()).try_for_each(|device| device.validate())
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

    /// The most vCPUs that the machine may ever have.
    pub(crate) fn vcpus_max(&self) -> u8 {
        self.vcpus_max.unwrap_or(self.vcpus)
    }
}

fn require_open(role: &'static str, path: &Path, kind: &'static str) -> Result<File, ConfigError> {
    File::open(path).map_err(|source| ConfigError::Unusable { role, path: path.to_path_buf(), kind, source })
}

fn require_directory(role: &'static str, path: &Path) -> Result<(), ConfigError> {
    let kind = "a directory";
    std::fs::read_dir(path).map(drop).map_err(|source| ConfigError::Unusable {
        role,
        path: path.to_path_buf(),
        kind,
        source,
    })
}

fn require_file(role: &'static str, path: &Path) -> Result<(), ConfigError> {
    const KIND: &str = "a regular file";
    let unusable = |source| ConfigError::Unusable { role, path: path.to_path_buf(), kind: KIND, source };
    // The type is asked for first: opening a FIFO would wait for its other end.
    let metadata = std::fs::metadata(path).map_err(unusable)?;
    if !metadata.is_file() {
        return Err(unusable(std::io::ErrorKind::InvalidInput.into()));
    }
    require_open(role, path, KIND)?;
    if metadata.len() == 0 {
        return Err(ConfigError::Empty { role, path: path.to_path_buf() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration that passes, its kernel in the directory.
    fn good(directory: &tempfile::TempDir) -> MachineConfig {
        let kernel = directory.path().join("vmlinux");
        std::fs::write(&kernel, b"kernel").unwrap();
        MachineConfig::new(kernel)
    }

    /// What is wrong with a good configuration after `change`.
    fn refusal(change: impl FnOnce(&mut MachineConfig, &Path)) -> String {
        let directory = tempfile::tempdir().unwrap();
        let mut config = good(&directory);
        assert!(config.validate().is_ok());
        change(&mut config, directory.path());
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn memory_that_no_machine_can_have_is_refused_with_the_range() {
        for memory in [0, MEMORY_MIN - MEMORY_GRANULE, 100 << 40, u64::MAX] {
            let text = refusal(|config, _| config.memory = memory);
            assert!(text.contains("out of range: give 33554432 to"), "{memory}: {text}");
        }
        let text = refusal(|config, _| config.memory = (128 << 20) + 1);
        assert!(text.contains("round it up to 136314880"), "{text}");
    }

    #[test]
    fn memory_that_can_never_be_plugged_is_refused() {
        let text = refusal(|config, _| config.memory_max = Some(64 << 20));
        assert!(text.contains("67108864 bytes, is less than the 134217728 bytes"), "{text}");
        let text = refusal(|config, _| config.memory_max = Some((256 << 20) + 1));
        assert!(text.contains("round it up to 270532608"), "{text}");
        let text = refusal(|config, _| config.memory_max = Some(u64::MAX));
        assert!(text.contains("out of range"), "{text}");
    }

    #[test]
    fn a_processor_that_addresses_less_than_the_host_has_sets_the_limit() {
        let limits = host::Limits { memory: 1 << 40, address_bits: 39, vcpus: 8 };
        assert_eq!(limits.guest_memory(), (1 << 38, "half of what the processor can address"));
        let limits = host::Limits { memory: (1 << 33) + 4096, address_bits: 46, vcpus: 8 };
        assert_eq!(limits.guest_memory(), (1 << 33, "the RAM of this host"));
    }

    #[test]
    fn vcpus_are_at_least_one_and_at_most_what_the_host_gives() {
        assert!(refusal(|config, _| config.vcpus = 0).contains("give 1 to"));
        assert!(refusal(|config, _| config.vcpus = 255).contains("give 1 to"));
        let config = MachineConfig { vcpus: 5, ..MachineConfig::new("vmlinux") };
        assert!(config.validate_vcpus(4).unwrap_err().to_string().contains("give 1 to 4"));
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_with_its_role() {
        let missing = |directory: &Path| directory.join("missing");
        let cases: [(&str, String); 6] = [
            ("kernel", refusal(|config, dir| config.kernel = missing(dir))),
            ("kernel", refusal(|config, dir| config.kernel = dir.to_path_buf())),
            ("initrd", refusal(|config, dir| config.initrd = Some(missing(dir)))),
            (
                "persistent memory image",
                refusal(|config, dir| {
                    config.pmem.push(PmemConfig { path: missing(dir), read_only: true });
                }),
            ),
            ("disk", refusal(|config, dir| config.disks.push(DiskConfig { path: missing(dir), read_only: true }))),
            (
                "shared directory",
                refusal(|config, dir| {
                    config.fs.push(FsConfig { tag: "work".to_owned(), directory: missing(dir) });
                }),
            ),
        ];
        for (role, text) in cases {
            assert!(text.starts_with(&format!("The {role} /")) && text.contains("check that it exists"), "{text}");
        }
        let empty = refusal(|config, dir| {
            config.kernel = dir.join("empty");
            std::fs::write(&config.kernel, b"").unwrap();
        });
        assert!(empty.contains("is empty"), "{empty}");
    }

    #[test]
    fn a_command_line_that_the_guest_cannot_take_is_refused() {
        assert!(refusal(|config, _| config.cmdline = "x".repeat(CMDLINE_MAX)).contains("at most 2048: shorten it"));
        for text in ["one\ntwo", "zero\0", "\u{e9}"] {
            assert!(refusal(|config, _| config.cmdline = text.to_owned()).contains("printable ASCII"), "{text:?}");
        }
    }

    #[test]
    fn tags_are_short_and_different() {
        let tags = |tags: &[&str]| {
            refusal(|config, dir| {
                let fs = |tag: &&str| FsConfig { tag: (*tag).to_owned(), directory: dir.to_path_buf() };
                config.fs = tags.iter().map(fs).collect();
            })
        };
        for bad in [&[""][..], &["a", "b", "a"], &["0123456789012345678901234567890123456"]] {
            assert!(tags(bad).contains("its own tag of 1 to 36 bytes"), "{bad:?}");
        }
    }

    #[test]
    fn a_socket_device_needs_a_free_context_id_and_a_short_path() {
        let vsock =
            |guest_cid, socket: PathBuf| refusal(|config, _| config.vsock = Some(VsockConfig { guest_cid, socket }));
        for reserved in [0, 1, 2, u32::MAX] {
            assert!(vsock(reserved, "/run/s".into()).contains("is reserved"), "{reserved}");
        }
        assert!(vsock(3, format!("/{}", "s".repeat(SOCKET_PATH_MAX)).into()).contains("too long"));
    }

    #[test]
    fn a_machine_with_more_devices_than_slots_is_refused() {
        let text = refusal(|config, dir| {
            let path = dir.join("vmlinux");
            config.disks = vec![DiskConfig { path, read_only: true }; DEVICES_MAX];
        });
        assert!(text.contains("32 devices were asked for, the machine has room for 31"), "{text}");
    }

    #[test]
    fn only_one_console_gets_standard_input() {
        let text = refusal(|config, _| {
            config.console = ConsoleOutput::Stdio;
            config.debug_uart = ConsoleOutput::Stdio;
        });
        assert!(text.contains("send one of them to a file"), "{text}");
    }
}
