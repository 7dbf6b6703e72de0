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
        let config = File::options().read(true).write(true).open(self.file("config"))?;
        let mut command = [0];
        config.read_exact_at(&mut command, COMMAND)?;
        config.write_all_at(&[command[0] | MEMORY_AND_MASTER], COMMAND)
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
