//! GPU models beside a machine: each a process that serves one device to the machine's QEMU and ends with it.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cache::{Cache, Key};
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, setsid};
use tool::io as io_error;

use crate::error::Error;
use crate::hardware::{Device, DeviceFiles, Hardware};
use crate::image::files_under;
use crate::program;
use crate::rundir::RunDir;

const PACKAGE: &str = "gpu-model";

/// Bytes of a disk that is a device.
const DISK_SIZE: u64 = 1 << 30;

/// The key of the model's program: what it is built from in this repository.
fn key() -> Result<Key, Error> {
    let sources = program::package(PACKAGE);
    let mut key = Key::new("1").with_file(&sources.join("Cargo.toml"))?;
    for source in files_under(&sources.join("src"))? {
        key = key.with_file(&source)?;
    }
    Ok(key)
}

/// The name of today's program in the cache, whether it is there or not.
pub(crate) fn program_id() -> Result<String, Error> {
    Ok(key()?.name())
}

/// Finds the model's program in the cache, or builds it.
fn program(cache: &Cache) -> Result<PathBuf, Error> {
    let dir = cache.get_or_build("lab-gpu-model", &key()?, |dir| {
        let (built, kept) = (program::build(PACKAGE, "the GPU model")?, dir.join(PACKAGE));
        fs::copy(&built, &kept).map_err(io_error("copy", &built))?;
        fs::set_permissions(&kept, fs::Permissions::from_mode(0o755)).map_err(io_error("change", &kept))?;
        Ok::<(), Error>(())
    })?;
    Ok(dir.join(PACKAGE))
}

/// Makes the content of each device that is a disk, empty.
pub(crate) fn create_disks(hardware: &Hardware, dir: &RunDir) -> Result<(), Error> {
    for (index, device) in hardware.devices().iter().enumerate() {
        if *device == Device::Nvme {
            let path = dir.device_disk(index);
            File::create(&path).and_then(|file| file.set_len(DISK_SIZE)).map_err(io_error("create", &path))?;
        }
    }
    Ok(())
}

/// Starts a model for each GPU, listening where QEMU will find it. The models live as long as somebody holds what this
/// answers: to be left to QEMU alone.
pub(crate) fn start(hardware: &Hardware, dir: &RunDir) -> Result<Vec<OwnedFd>, Error> {
    if !hardware.has_models() {
        return Ok(Vec::new());
    }
    let program = program(&Cache::open()?)?;
    let mut lives = Vec::new();
    for (index, device) in hardware.devices().iter().enumerate() {
        if let Device::Gpu(memory) = device {
            lives.push(spawn(&program, *memory, &dir.model_socket(index), &dir.model_log(index))?);
        }
    }
    Ok(lives)
}

fn spawn(program: &Path, memory: u64, socket: &Path, log: &Path) -> Result<OwnedFd, Error> {
    let listener = UnixListener::bind(socket).map_err(io_error("listen on", socket))?;
    let output = File::create(log).map_err(io_error("create", log))?;
    let (life, theirs) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from).map_err(tool::start(PACKAGE))?;
    let mut command = Command::new(program);
    command.args(["--inherited", "--memory", &format!("{}M", memory >> 20)]);
    command.stdin(OwnedFd::from(listener)).stdout(theirs).stderr(output);
    // SAFETY: setsid is async-signal-safe, and the closure touches nothing else.
    unsafe {
        command.pre_exec(|| setsid().map(drop).map_err(io::Error::from));
    }
    let mut child = command.spawn().map_err(tool::start(PACKAGE))?;
    // Reaps it; why it ended is in its log.
    std::thread::spawn(move || child.wait());
    Ok(life)
}
