//! Programs from Debian packages that run on any host.
//!
//! They are unpacked into the cache and started by their own dynamic loader with their own libraries, so that the
//! lab depends on no version of anything that the host has installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cache::{Cache, Key};
use debian::Suite;
use tool::io;

use crate::error::Error;
use crate::progress::Progress;

/// The suite that the tools and the machine come from.
pub(crate) const SUITE: &str = "trixie";
const PACKAGES: [&str; 6] = ["e2fsprogs", "kmod", "libc6", "qemu-utils", "xz-utils", "zstd"];
/// The suite of QEMU. [`SUITE`]'s is 10.0: 10.1 is the first with `vfio-user-pci`, 10.2 the first seen whose virtual CPUs lose
/// no interrupt while they enter a guest.
const QEMU_SUITE: &str = "sid";
const QEMU_PACKAGES: [&str; 3] = ["libc6", "qemu-system-x86", "seabios"];
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LOADER: &str = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// The unpacked programs.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    root: PathBuf,
}

impl Tools {
    /// Finds the tools in the cache, or fetches them.
    pub(crate) fn get(cache: &Cache, pin: &str) -> Result<Self, Error> {
        Self::of_suite(cache, pin, ("lab-tools", "the lab's tools"), SUITE, &PACKAGES)
    }

    /// Finds QEMU in the cache, or fetches it. Whatever else a machine needs is in [`Tools::get`]'s.
    pub(crate) fn qemu(cache: &Cache, pin: &str) -> Result<Self, Error> {
        Self::of_suite(cache, pin, ("lab-qemu", "QEMU"), QEMU_SUITE, &QEMU_PACKAGES)
    }

    fn key(pin: &str, packages: &[&str]) -> Key {
        Key::new("1").with("pin", pin.as_bytes()).with("packages", packages.join(" ").as_bytes())
    }

    /// They are kept in the cache as `kind`, and `what` says so to people.
    fn of_suite(
        cache: &Cache,
        pin: &str,
        (kind, what): (&str, &str),
        suite: &str,
        packages: &[&str],
    ) -> Result<Self, Error> {
        let root = cache.get_or_build(kind, &Self::key(pin, packages), |root| {
            let suite = Suite::open(cache, suite)?;
            let progress = Progress::start(&format!("Fetching {what} and libraries"), 0);
            let debs = suite.download_with_dependencies(packages)?;
            drop(progress);
            unpack_all(&format!("Unpacking {what} and libraries"), &debs, root)
        })?;
        Ok(Self { root })
    }

    /// A name for this very set of tools, for keys.
    pub(crate) fn id(&self) -> String {
        self.root.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// A command that runs a program of the tools, given by its path, as `usr/bin/qemu-img`.
    pub(crate) fn command(&self, program: &str) -> Command {
        self.command_as(program, program.rsplit('/').next().unwrap_or(program))
    }

    /// The same under another name, for programs that look at it.
    pub(crate) fn command_as(&self, program: &str, name: &str) -> Command {
        let mut command = Command::new(self.root.join(LOADER));
        command.arg("--argv0").arg(name).arg("--library-path").arg(self.root.join(LIBRARIES));
        command.arg(self.root.join(program)).stdin(Stdio::null());
        command.env("QEMU_MODULE_DIR", self.root.join(LIBRARIES).join("qemu"));
        command.env("MKE2FS_CONFIG", self.root.join("etc/mke2fs.conf"));
        command
    }

    /// Directories with the firmware that QEMU loads.
    pub(crate) fn firmware(&self) -> [PathBuf; 2] {
        ["usr/share/qemu", "usr/share/seabios"].map(|path| self.root.join(path))
    }
}

/// Unpacks packages over each other.
pub(crate) fn unpack_all(what: &str, debs: &[PathBuf], root: &Path) -> Result<(), Error> {
    let progress = Progress::start(what, debs.len() as u64);
    for deb in debs {
        progress.step(&deb.file_name().unwrap_or_default().to_string_lossy());
        debian::unpack(deb, root)?;
    }
    Ok(())
}

/// Creates a directory and those above it.
pub(crate) fn create_dir(path: &Path) -> Result<(), Error> {
    Ok(std::fs::create_dir_all(path).map_err(io("create", path))?)
}
