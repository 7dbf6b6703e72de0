//! What can be said against a configuration before anything is made of it.

use std::fs::File;
use std::path::Path;

use super::{
    CLIQUE_MAX, CMDLINE_MAX, ConfigError, ConsoleOutput, DEVICES_MAX, DeviceConfig, MEMORY_GRANULE, MEMORY_MIN,
    MachineConfig, VCPUS_MAX,
};
use crate::host;

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
}

impl DeviceConfig {
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
    use std::path::PathBuf;

    use super::super::{DiskConfig, FsConfig, PmemConfig, VsockConfig};
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
                    config.fs.push(FsConfig { tag: "work".to_owned(), directory: missing(dir), guest_only: None });
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
                let fs =
                    |tag: &&str| FsConfig { tag: (*tag).to_owned(), directory: dir.to_path_buf(), guest_only: None };
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
