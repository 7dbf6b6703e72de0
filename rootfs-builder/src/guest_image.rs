//! The guest image: a read-only EROFS with the agent, a shell, and mount points.
//!
//! The shell is for who looks for a fault; until it is executed, it is bytes of a file that nobody reads.
//!
//! It is mapped into every guest as virtio-pmem and mounted with DAX, so that all guests
//! of a node share the host's page cache: file data is uncompressed, block aligned and
//! never inlined into metadata (`noinline_data`), and the image's size is a multiple of
//! [`PMEM_ALIGNMENT`].

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};
use tool::io;

use crate::busybox::applets;
use crate::error::Error;

/// Largest guest image, in bytes.
pub const MAX_SIZE: u64 = 12 << 20;
/// The image's size is a multiple of this: Linux maps persistent memory in 2 MiB sections.
pub const PMEM_ALIGNMENT: u64 = 2 << 20;
/// Where the kernel finds its init.
pub const AGENT_PATH: &str = "sbin/kata-agent";
/// Where Debian's package busybox-static has its program.
pub const BUSYBOX: &str = "/bin/busybox";
/// The shell and its tools, which links beside it lead to.
const BUSYBOX_PATH: &str = "bin/busybox";

/// Directories, with their modes; most are for what the agent mounts.
const DIRECTORIES: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("lib/modules", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// What libraries in the agent look up by name.
const FILES: &[(&str, &str)] = &[
    ("etc/group", "root:x:0:\n"),
    ("etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ("etc/passwd", "root:x:0:0:root:/root:/sbin/nologin\n"),
];

/// Names that lead to what changes while the guest runs.
const LINKS: &[(&str, &str)] =
    &[("etc/mtab", "/proc/self/mounts"), ("etc/resolv.conf", "/run/resolv.conf"), ("var/run", "/run")];

/// A guest image that was built.
#[derive(Clone, Debug, serde::Serialize)]
pub struct GuestImage {
    /// Where it is.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of the image, hexadecimal.
    pub sha256: String,
    /// The file system's UUID, made from the hash of its programs.
    pub uuid: String,
}

/// Builds the image of the static executables `agent` and `busybox` at `output`.
///
/// `output` appears whole or not at all.
///
/// # Errors
/// When one of them is not a static x86-64 executable, the image exceeds [`MAX_SIZE`], or
/// `mkfs.erofs` or a file operation fails.
pub fn build(agent: &Path, busybox: &Path, output: &Path) -> Result<GuestImage, Error> {
    let programs = [(AGENT_PATH, read_static(agent)?), (BUSYBOX_PATH, read_static(busybox)?)];
    let applets = applets(busybox)?;
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(parent).map_err(io("create", parent))?;
    let work = tempfile::Builder::new()
        .prefix(".guest-image-")
        .tempdir_in(parent)
        .map_err(io("create a directory in", parent))?;
    let tree = work.path().join("tree");
    lay_out(&tree, &programs, &applets)?;
    let uuid = uuid_of(&programs);
    let unfinished = work.path().join("image");
    make_erofs(&tree, &unfinished, &uuid)?;
    let size = pad(&unfinished)?;
    if size > MAX_SIZE {
        return Err(Error::TooLarge { size, limit: MAX_SIZE });
    }
    let content = fs::read(&unfinished).map_err(io("read", &unfinished))?;
    fs::rename(&unfinished, output).map_err(io("write", output))?;
    Ok(GuestImage { path: output.to_owned(), size, sha256: hex(&Sha256::digest(content)), uuid })
}

fn read_static(program: &Path) -> Result<Vec<u8>, Error> {
    let executable = fs::read(program).map_err(io("read", program))?;
    crate::elf::check_static(&executable).map_err(|reason| Error::Program { path: program.to_owned(), reason })?;
    Ok(executable)
}

fn lay_out(tree: &Path, programs: &[(&str, Vec<u8>)], applets: &[String]) -> Result<(), Error> {
    let set_mode = |path: &Path, mode| {
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io("set the mode of", path))
    };
    for (name, _) in DIRECTORIES {
        let path = tree.join(name);
        fs::create_dir_all(&path).map_err(io("create", &path))?;
    }
    for (name, content) in FILES {
        let path = tree.join(name);
        fs::write(&path, content).map_err(io("write", &path))?;
        set_mode(&path, 0o644)?;
    }
    for (name, target) in LINKS {
        let path = tree.join(name);
        symlink(target, &path).map_err(io("link", &path))?;
    }
    for (name, content) in programs {
        let path = tree.join(name);
        fs::write(&path, content).map_err(io("write", &path))?;
        set_mode(&path, 0o755)?;
    }
    for applet in applets {
        let path = tree.join("bin").join(applet);
        symlink("busybox", &path).map_err(io("link", &path))?;
    }
    // Modes last: the caller's umask decided those of the directories, parents included.
    for name in ["", "lib"] {
        set_mode(&tree.join(name), 0o755)?;
    }
    for (name, mode) in DIRECTORIES {
        set_mode(&tree.join(name), *mode)?;
    }
    Ok(())
}

fn make_erofs(tree: &Path, image: &Path, uuid: &str) -> Result<(), Error> {
    let mut command = Command::new("mkfs.erofs");
    // No extended attributes, one time and one owner for all files: nothing of the builder's machine.
    command.args(["-x-1", "-T0", "--all-root", "-Enoinline_data,force-inode-compact", "-U", uuid]).arg(image).arg(tree);
    tool::run("mkfs.erofs (package erofs-utils)", &mut command)?;
    Ok(())
}

fn pad(image: &Path) -> Result<u64, Error> {
    let file = fs::File::options().write(true).open(image).map_err(io("open", image))?;
    let size = file.metadata().map_err(io("read the size of", image))?.len().next_multiple_of(PMEM_ALIGNMENT);
    file.set_len(size).map_err(io("pad", image))?;
    Ok(size)
}

/// A version 8 UUID (RFC 9562 §5.8: content defined by the maker) of the programs' hash.
fn uuid_of(programs: &[(&str, Vec<u8>)]) -> String {
    let hash = programs.iter().fold(Sha256::new(), |hash, (_, content)| hash.chain_update(Sha256::digest(content)));
    let mut bytes: Vec<u8> = hash.finalize().to_vec();
    bytes.truncate(16);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = hex(&bytes);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Lower-case hexadecimal digits of `bytes`.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
