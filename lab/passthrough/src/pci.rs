//! PCI functions of the guest, used through sysfs.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u8 = 1 << 1 | 1 << 2;

/// A function.
pub(crate) struct Function {
    directory: PathBuf,
    vendor: u16,
    device: u16,
}

impl Function {
    /// All of the machine, by address.
    pub(crate) fn all() -> io::Result<Vec<Self>> {
        let mut directories: Vec<_> =
            fs::read_dir("/sys/bus/pci/devices")?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        directories.sort();
        Ok(directories.into_iter().filter_map(Self::at).collect())
    }

    fn at(directory: PathBuf) -> Option<Self> {
        let number = |name: &str| {
            let text = fs::read_to_string(directory.join(name)).ok()?;
            u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
        };
        let (vendor, device) = (number("vendor")?, number("device")?);
        Some(Self { directory, vendor, device })
    }

    /// Vendor and device.
    pub(crate) fn id(&self) -> (u16, u16) {
        (self.vendor, self.device)
    }

    /// A file of its directory.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Switches memory decoding and bus mastering on.
    pub(crate) fn enable(&self) -> io::Result<()> {
        fs::write(self.file("enable"), "1")?;
        let config = self.config()?;
        let mut command = [0];
        config.read_exact_at(&mut command, COMMAND)?;
        config.write_all_at(&[command[0] | MEMORY_AND_MASTER], COMMAND)
    }

    fn config(&self) -> io::Result<File> {
        File::options().read(true).write(true).open(self.file("config"))
    }

    /// 16 bits of configuration space; nothing where the function does not answer.
    pub(crate) fn config_16(&self, offset: u64) -> Option<u16> {
        let mut bytes = [0; 2];
        self.config().ok()?.read_exact_at(&mut bytes, offset).ok()?;
        Some(u16::from_le_bytes(bytes))
    }

    /// 32 bits of configuration space.
    pub(crate) fn config_32(&self, offset: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.config().ok()?.read_exact_at(&mut bytes, offset).ok()?;
        Some(u32::from_le_bytes(bytes))
    }

    /// Writes configuration space.
    pub(crate) fn set_config(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.config()?.write_all_at(data, offset)
    }

    /// Where the capability of this kind is.
    pub(crate) fn capability(&self, id: u8) -> Option<u64> {
        const FIRST: u64 = 0x34;
        const MOST: usize = 48;
        let mut at = u64::from(self.config_16(FIRST)?.to_le_bytes()[0] & !3);
        for _ in 0..MOST {
            let [found, next] = self.config_16(at).filter(|_| at != 0)?.to_le_bytes();
            if found == id {
                return Some(at);
            }
            at = u64::from(next & !3);
        }
        None
    }

    /// Gives it to the kernel's driver for devices whose drivers are programs, and tells by which file that one speaks.
    pub(crate) fn uio(&self) -> Result<PathBuf, String> {
        let explain = |error: io::Error| format!("uio_pci_generic does not take it: {error}");
        let driver = PathBuf::from("/sys/bus/pci/drivers/uio_pci_generic");
        if !self.file("uio").exists() {
            let id = format!("{:04x} {:04x}", self.vendor, self.device);
            match fs::write(driver.join("new_id"), id) {
                // It knows the kind from before.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let name = self.directory.file_name().unwrap_or_default();
                    fs::write(driver.join("bind"), name.as_encoded_bytes()).map_err(explain)?;
                }
                other => other.map_err(explain)?,
            }
        }
        let mut entries = fs::read_dir(self.file("uio")).map_err(explain)?;
        let entry = entries.next().ok_or("uio_pci_generic made no file for it")?.map_err(explain)?;
        Ok(PathBuf::from("/dev").join(entry.file_name()))
    }

    /// Maps `length` bytes of the file of a BAR, such as `resource0`.
    pub(crate) fn map(&self, name: &str, offset: u64, length: usize) -> Result<Registers, String> {
        let path = self.file(name);
        let explain = |error: &dyn fmt::Display| format!("{}: {error}", path.display());
        let file = File::options().read(true).write(true).open(&path).map_err(|error| explain(&error))?;
        let size = NonZeroUsize::new(length).ok_or("nothing to map")?;
        let offset = libc::off_t::try_from(offset).map_err(|error| explain(&error))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, &file, offset) };
        Ok(Registers { start: start.map_err(|error| explain(&error))?.cast(), length })
    }

    /// First and last address and flags of each BAR.
    pub(crate) fn resource(&self, index: usize) -> Option<(u64, u64)> {
        let text = fs::read_to_string(self.file("resource")).ok()?;
        let mut fields = text.lines().nth(index)?.split_whitespace();
        let mut number = || u64::from_str_radix(fields.next()?.trim_start_matches("0x"), 16).ok();
        Some((number()?, number()?))
    }
}

impl fmt::Display for Function {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.directory.file_name().unwrap_or_default().to_string_lossy();
        write!(formatter, "{name} {:04x}:{:04x}", self.vendor, self.device)
    }
}

/// Mapped memory of a device.
pub(crate) struct Registers {
    start: NonNull<u8>,
    length: usize,
}

impl Registers {
    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= self.length,
            "inside of the mapping"
        );
        // SAFETY: inside of the mapping, as was just checked.
        unsafe { self.start.as_ptr().add(offset).cast() }
    }

    /// Reads a register of 32 bits.
    pub(crate) fn read(&self, offset: usize) -> u32 {
        // SAFETY: the place is mapped and aligned.
        unsafe { self.place::<u32>(offset).read_volatile() }
    }

    /// Writes a register of 32 bits.
    pub(crate) fn write(&self, offset: usize, value: u32) {
        // SAFETY: the place is mapped and aligned.
        unsafe { self.place::<u32>(offset).write_volatile(value) };
    }

    /// Reads a register of 64 bits.
    pub(crate) fn read_64(&self, offset: usize) -> u64 {
        // SAFETY: the place is mapped and aligned.
        unsafe { self.place::<u64>(offset).read_volatile() }
    }

    /// Writes a register of 64 bits.
    pub(crate) fn write_64(&self, offset: usize, value: u64) {
        // SAFETY: the place is mapped and aligned.
        unsafe { self.place::<u64>(offset).write_volatile(value) };
    }

    /// Looks at a register until `is_done`; false when that takes more looks than any device of the lab needs.
    pub(crate) fn wait(&self, offset: usize, is_done: impl Fn(u32) -> bool) -> bool {
        const LOOKS: u32 = 2_000_000;
        (0..LOOKS).any(|_| is_done(self.read(offset)))
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own. That it stays when this fails harms nobody.
        let _ = unsafe { munmap(self.start.cast(), self.length) };
    }
}
