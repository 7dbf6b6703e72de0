//! How a kernel gets into guest memory and what it is told there.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::config::MachineConfig;
use crate::memory::layout::{self, CMDLINE, HIGH_RAM, Range, START_INFO};
use crate::memory::{GuestRam, mapping};

mod bzimage;
pub(crate) mod cmdline;
pub(crate) mod elf;
mod pvh;

pub(crate) use bzimage::GDT as LONG_MODE_GDT;

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Entry {
    /// 32-bit protected mode without paging, EBX = address of the start information.
    Pvh {
        /// Where.
        address: u32,
        /// The start information.
        start_info: u64,
    },
    /// 64-bit mode on the boot page tables, RSI = address of the boot parameters.
    Linux64 {
        /// Where.
        address: u64,
        /// The boot parameters.
        boot_params: u64,
    },
}

/// What the kernel is told beside its memory map and command line.
#[derive(Clone, Copy, Debug)]
struct Payload {
    initrd: Option<Range>,
    rsdp: u64,
}

/// Why booting is impossible.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be booted: {reason}", path.display())]
pub struct BootError {
    /// The file.
    path: std::path::PathBuf,
    /// What is wrong with it, and the remedy.
    reason: String,
}

impl BootError {
    fn new(path: &Path, reason: impl ToString) -> Self {
        Self { path: path.to_path_buf(), reason: reason.to_string() }
    }
}

enum Kernel {
    Elf(elf::Elf),
    BzImage(bzimage::BzImage),
}

/// Loads kernel, initial RAM disk and command line, and writes what the kernel looks for. The ACPI root pointer will be
/// at `rsdp`.
///
/// # Errors
/// When a file is not what it should be, or does not fit in guest memory.
pub(crate) fn load(config: &MachineConfig, ram: &GuestRam, rsdp: u64) -> Result<Entry, BootError> {
    let path = &config.kernel;
    let file = File::open(path).map_err(|error| BootError::new(path, error))?;
    let low_ram = config.memory.min(layout::RAM_32_END);
    let kernel = parse(&file).map_err(|reason| BootError::new(path, reason))?;
    let (entry, kernel_end) = match &kernel {
        Kernel::Elf(elf) => load_elf(elf, &file, ram, low_ram).map_err(|reason| BootError::new(path, reason))?,
        Kernel::BzImage(image) => {
            let (address, end) = image.load(&file, ram, low_ram).map_err(|error| BootError::new(path, error))?;
            (Entry::Linux64 { address, boot_params: START_INFO }, end)
        }
    };
    let initrd = match &config.initrd {
        Some(initrd) => Some(load_initrd(initrd, ram, kernel_end, low_ram)?),
        None => None,
    };
    let payload = Payload { initrd, rsdp };
    write_cmdline(config, ram)
        .and_then(|()| match &kernel {
            Kernel::Elf(_) => pvh::write_start_info(ram, config.memory, &payload),
            Kernel::BzImage(image) => image.write_boot_params(ram, config.memory, &payload),
        })
        .map_err(|error| BootError::new(path, error))?;
    Ok(entry)
}

fn parse(file: &File) -> Result<Kernel, String> {
    match elf::parse(file) {
        Ok(elf) => Ok(Kernel::Elf(elf)),
        Err(elf::ElfError::NotElf) => bzimage::parse(file).map(Kernel::BzImage).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn load_elf(elf: &elf::Elf, file: &File, ram: &GuestRam, low_ram: u64) -> Result<(Entry, u64), String> {
    let mut end = HIGH_RAM;
    for segment in &elf.segments {
        let segment_end = segment.address + segment.memory_size;
        if segment.address < HIGH_RAM || segment_end > low_ram {
            return Err(format!(
                "it wants memory from {:#x} to {segment_end:#x}, the machine has {HIGH_RAM:#x} to {low_ram:#x}: give \
                 the machine more memory",
                segment.address
            ));
        }
        ram.load(file, segment.file_offset, segment.file_size, segment.address).map_err(|error| error.to_string())?;
        end = end.max(segment_end);
    }
    Ok((Entry::Pvh { address: elf.pvh_entry, start_info: START_INFO }, end))
}

/// Puts the RAM disk at the very end of the memory below 3 GiB, as far from the kernel as it can be: the kernel
/// allocates from below while it unpacks.
fn load_initrd(path: &Path, ram: &GuestRam, kernel_end: u64, low_ram: u64) -> Result<Range, BootError> {
    let fail = |error: io::Error| BootError::new(path, error);
    let file = File::open(path).map_err(fail)?;
    let length = file.metadata().map_err(fail)?.len();
    let start = low_ram.checked_sub(length).map(|start| start - start % mapping::PAGE);
    let Some(start) = start.filter(|start| *start >= kernel_end) else {
        let room = low_ram.saturating_sub(kernel_end);
        let reason = format!("it has {length} bytes, the kernel leaves {room}: give the machine more memory");
        return Err(BootError::new(path, reason));
    };
    ram.load(&file, 0, length, start).map_err(fail)?;
    Ok(Range { start, length })
}

fn write_cmdline(config: &MachineConfig, ram: &GuestRam) -> io::Result<()> {
    let mut bytes = cmdline::of(config).into_bytes();
    bytes.push(0);
    ram.write(&bytes, CMDLINE)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn file_with(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn machine(kernel: &[u8]) -> (tempfile::NamedTempFile, MachineConfig) {
        let file = file_with(kernel);
        let config = MachineConfig { memory: 64 << 20, ..MachineConfig::new(file.path()) };
        (file, config)
    }

    #[test]
    fn kernel_initrd_and_command_line_are_in_guest_memory() {
        let (_kernel, mut config) = machine(&elf::tests::kernel(0x100_0000, b"kernel code"));
        let initrd = file_with(&[5; 10_000]);
        config.initrd = Some(initrd.path().to_path_buf());
        config.cmdline = "one=1".to_owned();
        let ram = GuestRam::new(config.memory).unwrap();
        let entry = load(&config, &ram, 0xE_0000).unwrap();
        assert_eq!(entry, Entry::Pvh { address: 0x100_0000, start_info: START_INFO });
        let read = |address: u64, length: usize| {
            let mut bytes = vec![0; length];
            ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        assert_eq!(read(0x100_0000, 11), b"kernel code");
        let end = 64 << 20;
        assert_eq!(read(end - 3 * 4096, 10_000), vec![5; 10_000]);
        let cmdline = read(CMDLINE, CMDLINE_LIMIT);
        let cmdline = std::ffi::CStr::from_bytes_until_nul(&cmdline).unwrap().to_str().unwrap().to_owned();
        assert!(cmdline.ends_with(" one=1") && cmdline.contains("panic=-1"), "{cmdline}");
    }

    const CMDLINE_LIMIT: usize = crate::config::CMDLINE_MAX;

    #[test]
    fn a_kernel_that_does_not_fit_is_refused() {
        for address in [0x1000, 0x1000_0000] {
            let (_kernel, config) = machine(&elf::tests::kernel(address, b"code"));
            let ram = GuestRam::new(config.memory).unwrap();
            let error = load(&config, &ram, 0).unwrap_err();
            assert!(error.to_string().contains("more memory"), "{error}");
        }
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused() {
        let (_kernel, mut config) = machine(&elf::tests::kernel(0x100_0000, b"code"));
        let initrd = file_with(b"");
        initrd.as_file().set_len(60 << 20).unwrap();
        config.initrd = Some(initrd.path().to_path_buf());
        let ram = GuestRam::new(config.memory).unwrap();
        assert!(load(&config, &ram, 0).unwrap_err().to_string().contains("more memory"));
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        let (_kernel, config) = machine(b"not a kernel");
        let ram = GuestRam::new(config.memory).unwrap();
        assert!(load(&config, &ram, 0).unwrap_err().to_string().contains("neither an ELF file nor a bzImage"));
    }
}
