//! A disk whose driver is the guest kernel's: what is written to its file system is read back, by interrupts of MSI-X.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::mount::{MsFlags, mount, umount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::Outcome;
use crate::pci::Function;

/// Bytes of the file that is written, a part at a time.
const LENGTH: usize = 64 << 20;
const PART: usize = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(60);
const PLACE: &str = "/mnt-nvme";
/// The file that stays on the disk.
const FILE: &str = "/mnt-nvme/pattern";

/// Mounts the disk's ext4, writes 64 MiB, reads them back, and counts the interrupts of the driver.
pub(crate) fn check(function: &Function) -> Outcome {
    let disk = disk(function)?;
    let explain = |error: nix::Error| format!("{}: {error}", disk.display());
    fs::create_dir_all(PLACE).map_err(|error| error.to_string())?;
    mount(Some(&disk), PLACE, Some("ext4"), MsFlags::empty(), None::<&str>).map_err(explain)?;
    let result = write_and_read().map_err(|error| format!("{FILE}: {error}"));
    umount(PLACE).map_err(explain)?;
    let sum = result?;
    let interrupts = fs::read_to_string("/proc/interrupts").map_err(|error| error.to_string())?;
    let lines: Vec<_> = interrupts.lines().filter(|line| line.contains("nvme")).collect();
    if !lines.iter().any(|line| line.contains("MSIX") || line.contains("MSI-X")) {
        return Err(format!("the driver has no interrupts of MSI-X: {lines:?}"));
    }
    let size = LENGTH >> 20;
    Ok(format!("ext4, {size} MiB written and read back, checksum {sum:#018x}, {} vectors of MSI-X", lines.len()))
}

/// Writes the file, lets the kernel forget it, and reads it: the checksum of both.
fn write_and_read() -> io::Result<u64> {
    let mut file = File::create(FILE)?;
    let mut written = Sum::new();
    for part in 0..LENGTH / PART {
        let data: Vec<u8> =
            (0..PART).map(|index| ((part * PART + index).wrapping_mul(31) >> 3).to_le_bytes()[0]).collect();
        written.add(&data);
        file.write_all(&data)?;
    }
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let (mut file, mut read, mut data) = (File::open(FILE)?, Sum::new(), vec![0; PART]);
    for _ in 0..LENGTH / PART {
        file.read_exact(&mut data)?;
        read.add(&data);
    }
    let (written, read) = (written.0, read.0);
    if written == read {
        Ok(read)
    } else {
        Err(io::Error::other(format!("checksum {written:#x} was written, {read:#x} read")))
    }
}

/// A sum over bytes in their order.
struct Sum(u64);

impl Sum {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, data: &[u8]) {
        const PRIME: u64 = 0x0100_0000_01b3;
        self.0 = data.iter().fold(self.0, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(PRIME));
    }
}

/// The device file of the function's first name space, once the driver has made it.
fn disk(function: &Function) -> Result<PathBuf, String> {
    let until = Instant::now() + DEADLINE;
    let watch = Inotify::init(InitFlags::IN_NONBLOCK).map_err(|error| error.to_string())?;
    watch.add_watch("/dev", AddWatchFlags::IN_CREATE).map_err(|error| error.to_string())?;
    loop {
        let controller = fs::read_dir(function.file("nvme")).ok().and_then(|mut entries| entries.next()?.ok());
        if let Some(controller) = controller {
            let disk = Path::new("/dev").join(format!("{}n1", controller.file_name().to_string_lossy()));
            if disk.exists() {
                return Ok(disk);
            }
        }
        let left = until.checked_duration_since(Instant::now()).ok_or("no driver has made a disk of it")?;
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(watch.as_fd(), PollFlags::POLLIN)], timeout).map_err(|error| error.to_string())?;
        let _ = watch.read_events();
    }
}
