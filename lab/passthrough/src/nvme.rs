//! A disk whose driver is the guest kernel's: what is written is read back, by interrupts of MSI-X.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::os::fd::AsFd;

use crate::Outcome;
use crate::pci::Function;

const LENGTH: usize = 16 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// Writes 16 MiB, reads them back, and counts the interrupts of the driver.
pub(crate) fn check(function: &Function) -> Outcome {
    let disk = disk(function)?;
    let explain = |error: io::Error| format!("{}: {error}", disk.display());
    let file = File::options().read(true).write(true).open(&disk).map_err(explain)?;
    let data: Vec<u8> = (0..LENGTH).map(|index| (index.wrapping_mul(31) >> 3).to_le_bytes()[0]).collect();
    file.write_all_at(&data, 0).and_then(|()| file.sync_all()).map_err(explain)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|error| error.to_string())?;
    let mut seen = vec![0; LENGTH];
    file.read_exact_at(&mut seen, 0).map_err(explain)?;
    if seen != data {
        return Err("what was read is not what was written".to_owned());
    }
    let interrupts = fs::read_to_string("/proc/interrupts").map_err(|error| error.to_string())?;
    let lines: Vec<_> = interrupts.lines().filter(|line| line.contains("nvme")).collect();
    if !lines.iter().any(|line| line.contains("MSIX") || line.contains("MSI-X")) {
        return Err(format!("the driver has no interrupts of MSI-X: {lines:?}"));
    }
    Ok(format!("{} MiB written and read back, {} vectors of MSI-X", LENGTH >> 20, lines.len()))
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
