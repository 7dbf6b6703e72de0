//! Where running machines keep their sockets and logs, and how one sees whether a machine lives.
//!
//! Each machine has a directory. The file `life` in it is locked by an open file that only the machine's QEMU holds:
//! the lock is there exactly as long as the process, however that ends.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use tool::io;

use crate::error::Error;
use crate::hardware::DeviceFiles;
use crate::qemu::PORTS;

/// The directory of one machine.
#[derive(Clone, Debug)]
pub(crate) struct RunDir {
    name: String,
    path: PathBuf,
}

/// Where all machines of this user are.
fn base() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => Path::new(&dir).join("tatami-lab"),
        None if nix::unistd::geteuid().is_root() => PathBuf::from("/run/tatami-lab"),
        None => std::env::temp_dir().join(format!("tatami-lab-{}", nix::unistd::geteuid())),
    }
}

/// The names of all directories, of machines that live or have ended by themselves.
pub(crate) fn names() -> Result<Vec<String>, Error> {
    let base = base();
    let entries = match fs::read_dir(&base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io("list", &base)(error).into()),
    };
    let mut names: Vec<_> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|name| valid(name)).collect();
    names.sort();
    Ok(names)
}

fn valid(name: &str) -> bool {
    name.len() <= 32
        && name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.chars().all(|part| part.is_ascii_alphanumeric() || "-_.".contains(part))
}

impl RunDir {
    /// The directory of the machine `name`, whether it is there or not.
    pub(crate) fn of(name: &str) -> Result<Self, Error> {
        if !valid(name) {
            return Err(Error::Name(name.to_owned()));
        }
        Ok(Self { name: name.to_owned(), path: base().join(name) })
    }

    /// The machine's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The socket for requests to QEMU.
    pub(crate) fn qmp(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// The socket of a command port.
    pub(crate) fn port(&self, index: usize) -> PathBuf {
        self.path.join(format!("command{index}.sock"))
    }

    /// The lock of a command port, held by the driver that uses it.
    pub(crate) fn port_lock(&self, index: usize) -> PathBuf {
        self.path.join(format!("command{index}.lock"))
    }

    /// What the machine wrote to its console.
    pub(crate) fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What QEMU wrote.
    pub(crate) fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }

    /// What the machine was started from.
    pub(crate) fn description(&self) -> PathBuf {
        self.path.join("machine.json")
    }

    /// What the model of device number `index` wrote.
    pub(crate) fn model_log(&self, index: usize) -> PathBuf {
        self.path.join(format!("model{index}.log"))
    }

    /// There while the machine is paused.
    pub(crate) fn paused(&self) -> PathBuf {
        self.path.join("paused")
    }

    /// Whether there is anything of the machine, be it dead.
    pub(crate) fn exists(&self) -> bool {
        self.path.is_dir()
    }

    fn life(&self) -> PathBuf {
        self.path.join("life")
    }

    /// Takes the directory for a new machine; answers the lock on its life.
    pub(crate) fn claim(&self) -> Result<OwnedFd, Error> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path).map_err(io("create", &self.path))?;
        let path = self.life();
        let life = File::options().create(true).truncate(false).write(true).open(&path).map_err(io("open", &path))?;
        life.try_lock().map_err(|_| Error::Runs(self.name.clone()))?;
        for entry in fs::read_dir(&self.path).map_err(io("list", &self.path))? {
            let entry = entry.map_err(io("list", &self.path))?.path();
            if entry != path {
                fs::remove_file(&entry).map_err(io("remove", &entry))?;
            }
        }
        Ok(life.into())
    }

    /// Listening sockets for requests and for each port.
    pub(crate) fn listen(&self) -> Result<(OwnedFd, Vec<OwnedFd>), Error> {
        let listen = |path: PathBuf| UnixListener::bind(&path).map(OwnedFd::from).map_err(io("listen on", &path));
        let ports = (0..PORTS).map(|index| listen(self.port(index))).collect::<Result<_, _>>()?;
        Ok((listen(self.qmp())?, ports))
    }

    /// Whether the machine lives.
    pub(crate) fn alive(&self) -> bool {
        let Ok(life) = File::options().write(true).open(self.life()) else { return false };
        life.try_lock_shared().is_err()
    }

    /// Waits until the machine has ended.
    pub(crate) fn wait_for_end(&self) {
        if let Ok(life) = File::options().write(true).open(self.life()) {
            // Given as soon as the holder has gone; an error would mean that there is nothing to wait for.
            let _ = life.lock();
        }
    }

    /// Removes the directory of a machine that has ended.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io("remove", &self.path)(error).into()),
            _ => Ok(()),
        }
    }
}

impl DeviceFiles for RunDir {
    fn model_socket(&self, index: usize) -> PathBuf {
        self.path.join(format!("model{index}.sock"))
    }

    fn device_disk(&self, index: usize) -> PathBuf {
        self.path.join(format!("device{index}.img"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_directory() {
        for bad in ["", ".", "..", "a/b", "-x", "1a", "a b", &"a".repeat(33)] {
            assert!(RunDir::of(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "bench-1", "Suite_2.1", &"a".repeat(32)] {
            assert!(RunDir::of(good).is_ok(), "{good:?}");
        }
    }
}
