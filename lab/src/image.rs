//! Builds what the lab machine boots from: root disk, kernel and initrd, all from Debian packages.
//!
//! The root disk holds packages only; the lab's own files come by the initrd, so that a change of theirs does not
//! build the disk anew.

use std::fs;
use std::path::{Path, PathBuf};

use cache::{Cache, Key};
use debian::Suite;
use tool::{io, run};

use crate::error::Error;
use crate::initrd::Archive;
use crate::kernel::extract_vmlinux;
use crate::program;
use crate::progress::Progress;
use crate::tools::{SUITE, Tools, create_dir, unpack_all};

/// Packages of the machine, of [`SUITE`].
const PACKAGES: &[&str] = &[
    "base-files",
    "base-passwd",
    "bash",
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "e2fsprogs",
    "erofs-utils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "iptables",
    "iputils-ping",
    "jq",
    "kmod",
    "libc-bin",
    "libseccomp2",
    "mawk",
    "mount",
    "ncurses-base",
    "netbase",
    "nftables",
    "pciutils",
    "procps",
    "psmisc",
    "qemu-system-x86",
    "runc",
    "seabios",
    "sed",
    "socat",
    "strace",
    "tar",
    "util-linux",
    "xz-utils",
    "zstd",
];
/// The suite of the second containerd.
const NEW_SUITE: &str = "sid";
/// Packages of [`NEW_SUITE`] and where their programs go.
const NEW_PACKAGES: [(&str, &str); 2] = [("containerd", "opt/containerd-2.1/bin"), ("runc", "opt/runc-1.3/bin")];
/// The kernel's metapackage.
const KERNEL: &str = "linux-image-cloud-amd64";
/// What the kernel needs before it can mount the root disk.
const BOOT_MODULES: [&str; 2] = ["virtio_blk", "ext4"];
/// Size of the root disk; it is sparse.
const DISK_SIZE: &str = "8G";

/// What Debian's maintainer scripts would have linked (path, target).
const LINKS: [(&str, &str); 8] = [
    ("usr/bin/awk", "mawk"),
    ("usr/bin/which", "which.debianutils"),
    ("usr/sbin/ip6tables", "ip6tables-nft"),
    ("usr/sbin/iptables", "iptables-nft"),
    ("usr/sbin/iptables-restore", "iptables-nft-restore"),
    ("usr/sbin/iptables-save", "iptables-nft-save"),
    ("var/lock", "/run/lock"),
    ("var/run", "/run"),
];
/// What they would have copied (path, source).
const COPIES: [(&str, &str); 5] = [
    ("etc/group", "usr/share/base-passwd/group.master"),
    ("etc/nsswitch.conf", "usr/share/libc-bin/nsswitch.conf"),
    ("etc/passwd", "usr/share/base-passwd/passwd.master"),
    ("etc/profile", "usr/share/base-files/profile"),
    ("root/.profile", "usr/share/base-files/dot.profile"),
];
/// Directories that they would have made, and those that the machine mounts on.
const DIRECTORIES: [&str; 10] = ["dev", "etc/cni/net.d", "media", "mnt", "proc", "root", "run", "srv", "sys", "tmp"];
/// What nobody reads in the machine; the kernel is started from outside.
const UNREAD: [&str; 5] = ["boot", "usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man"];

/// What is on the machine's disk, kernel and boot modules included.
#[derive(Clone, Debug)]
pub(crate) struct System {
    dir: PathBuf,
}

impl System {
    /// Finds the system in the cache, or builds it.
    pub(crate) fn get(cache: &Cache, tools: &Tools, pin: &str) -> Result<Self, Error> {
        let mut key = Key::new("1")
            .with("pin", pin.as_bytes())
            .with("tools", tools.id().as_bytes())
            .with("packages", PACKAGES.join(" ").as_bytes())
            .with("kernel", KERNEL.as_bytes())
            .with("boot modules", BOOT_MODULES.join(" ").as_bytes())
            .with("disk", DISK_SIZE.as_bytes());
        for (package, place) in NEW_PACKAGES {
            key = key.with(package, place.as_bytes());
        }
        for (path, other) in LINKS.iter().chain(&COPIES) {
            key = key.with(path, other.as_bytes());
        }
        for path in DIRECTORIES.iter().chain(&UNREAD) {
            key = key.with("directory", path.as_bytes());
        }
        let dir = cache.get_or_build("lab-system", &key, |dir| build_system(cache, tools, dir))?;
        Ok(Self { dir })
    }

    /// A name for this very system, for keys.
    pub(crate) fn id(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The root disk, raw ext4; never written to.
    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    /// The uncompressed kernel.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }
}

fn build_system(cache: &Cache, tools: &Tools, dir: &Path) -> Result<(), Error> {
    let root = dir.join("root");
    create_dir(&root)?;
    let manifest = unpack_packages(cache, &root)?;
    write(&dir.join("packages.txt"), manifest.as_bytes())?;
    let kernel = kernel_image(&root)?;
    extract_vmlinux(tools, &kernel, &dir.join("vmlinux"))?;
    let version = kernel.file_name().unwrap_or_default().to_string_lossy().replacen("vmlinuz-", "", 1);
    prepare_modules(tools, &root, &version)?;
    collect_boot_files(&root, &version, dir)?;
    tidy(&root)?;
    make_disk(tools, &root, &dir.join("disk.img"))?;
    Ok(fs::remove_dir_all(&root).map_err(io("remove", &root))?)
}

/// Fetches and unpacks all packages; answers their list with versions.
fn unpack_packages(cache: &Cache, root: &Path) -> Result<String, Error> {
    let suite = Suite::open(cache, SUITE)?;
    let mut resolved = suite.resolve(PACKAGES)?;
    resolved.push(suite.newest_kernel(KERNEL)?);
    let names: Vec<&str> = resolved.iter().map(|package| package.name.as_str()).collect();
    let progress = Progress::start("Fetching the lab machine's packages", 0);
    let debs = suite.download(&names)?;
    let new_suite = Suite::open(cache, NEW_SUITE)?;
    let new_debs = new_suite.download(&NEW_PACKAGES.map(|(package, _)| package))?;
    drop(progress);
    unpack_all("Unpacking the lab machine's packages", &debs, root)?;
    for ((_, place), deb) in NEW_PACKAGES.iter().zip(&new_debs) {
        unpack_programs(deb, &root.join(place))?;
    }
    let mut manifest: String =
        resolved.iter().map(|package| format!("{} {}\n", package.name, package.version)).collect();
    for ((package, _), version) in NEW_PACKAGES.iter().zip(new_suite.versions(&NEW_PACKAGES.map(|(name, _)| name))?) {
        manifest.push_str(&format!("{NEW_SUITE}/{package} {version}\n"));
    }
    Ok(manifest)
}

/// Unpacks just the programs of a package into `place`.
fn unpack_programs(deb: &Path, place: &Path) -> Result<(), Error> {
    create_dir(place)?;
    let whole = place.join(".unpacked");
    create_dir(&whole)?;
    debian::unpack(deb, &whole)?;
    for programs in ["usr/bin", "usr/sbin"].map(|path| whole.join(path)) {
        if !programs.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&programs).map_err(io("list", &programs))? {
            let entry = entry.map_err(io("list", &programs))?;
            fs::rename(entry.path(), place.join(entry.file_name())).map_err(io("move", &entry.path()))?;
        }
    }
    Ok(fs::remove_dir_all(&whole).map_err(io("remove", &whole))?)
}

/// Unpacks the kernel's modules (emulated CPUs are slow at it) and lists their dependencies.
fn prepare_modules(tools: &Tools, root: &Path, version: &str) -> Result<(), Error> {
    let progress = Progress::start("Unpacking kernel modules", 0);
    let modules = root.join("usr/lib/modules").join(version);
    let mut compressed = files_under(&modules)?;
    compressed.retain(|path| path.extension().is_some_and(|extension| extension == "xz"));
    for some in compressed.chunks(500) {
        run("xz", tools.command("usr/bin/xz").args(["-d", "--"]).args(some))?;
    }
    run("depmod", tools.command_as("usr/bin/kmod", "depmod").arg("-b").arg(root).arg(version))?;
    drop(progress);
    Ok(())
}

/// Copies what the initrd is made of: a static busybox, and the boot modules in the order in which they load.
fn collect_boot_files(root: &Path, version: &str, dir: &Path) -> Result<(), Error> {
    let modules = root.join("usr/lib/modules").join(version);
    let index = modules.join("modules.dep");
    let dependencies = fs::read_to_string(&index).map_err(io("read", &index))?;
    let boot = dir.join("boot");
    create_dir(&boot)?;
    let mut order = String::new();
    for path in load_order(&dependencies, &BOOT_MODULES) {
        let name = path.rsplit('/').next().unwrap_or(path);
        copy(&modules.join(path), &boot.join(name))?;
        order.push_str(name);
        order.push('\n');
    }
    write(&boot.join("order"), order.as_bytes())?;
    copy(&root.join("usr/bin/busybox"), &dir.join("busybox"))
}

/// The files of `modules` and of all that they need, each after what it needs itself. The lines of `modules.dep`
/// read `file: needed…`, the last needed one to be loaded first. A module that is not listed is built in.
fn load_order<'a>(dependencies: &'a str, modules: &[&str]) -> Vec<&'a str> {
    let mut order = Vec::new();
    for module in modules {
        let named = |file: &str| file.rsplit('/').next().is_some_and(|name| name == format!("{module}.ko"));
        let Some((file, needed)) =
            dependencies.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| named(file))
        else {
            continue;
        };
        for path in needed.split_whitespace().rev().chain([file]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    order
}

/// Does what maintainer scripts would have done, and drops what nobody reads in the machine.
fn tidy(root: &Path) -> Result<(), Error> {
    for unread in UNREAD.map(|path| root.join(path)) {
        if unread.exists() {
            fs::remove_dir_all(&unread).map_err(io("remove", &unread))?;
        }
    }
    for path in DIRECTORIES {
        create_dir(&root.join(path))?;
    }
    for (path, target) in LINKS {
        let link = root.join(path);
        if link.is_dir() {
            fs::remove_dir(&link).map_err(io("remove", &link))?;
        }
        std::os::unix::fs::symlink(target, &link).map_err(io("link", &link))?;
    }
    for (path, source) in COPIES {
        copy(&root.join(source), &root.join(path))?;
    }
    write(&root.join("etc/hostname"), b"lab\n")?;
    write(&root.join("etc/hosts"), b"127.0.0.1 localhost lab\n::1 localhost\n")
}

fn make_disk(tools: &Tools, root: &Path, disk: &Path) -> Result<(), Error> {
    let progress = Progress::start("Making the root disk", 0);
    run(
        "mke2fs",
        tools
            .command("usr/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal,^metadata_csum"])
            .args(["-E", "lazy_itable_init=1,root_owner=0:0", "-d"])
            .args([root, disk])
            .arg(DISK_SIZE),
    )?;
    drop(progress);
    Ok(())
}

/// The initrd: boot modules of the system, and the lab's own files, which its init puts on the root disk.
#[derive(Clone, Debug)]
pub(crate) struct Initrd {
    dir: PathBuf,
}

/// The lab's own files (name in `/lab`, content).
const FILES: [(&str, &str); 2] = [("rc", include_str!("../root/rc")), ("inittab", include_str!("../root/inittab"))];
/// The package of the command server.
const GUEST: &str = "guest";
const INIT: &str = include_str!("../root/initrd-init");

impl Initrd {
    /// Finds the initrd in the cache, or builds it.
    pub(crate) fn get(cache: &Cache, system: &System) -> Result<Self, Error> {
        let mut key = Key::new("1").with("system", system.id().as_bytes()).with("init", INIT.as_bytes());
        for (name, content) in FILES {
            key = key.with(name, content.as_bytes());
        }
        for source in guest_sources()? {
            key = key.with_file(&source)?;
        }
        let dir = cache.get_or_build("lab-initrd", &key, |dir| build_initrd(system, dir))?;
        Ok(Self { dir })
    }

    /// A name for this very initrd, for keys.
    pub(crate) fn id(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The archive.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join("initrd.img")
    }
}

fn build_initrd(system: &System, dir: &Path) -> Result<(), Error> {
    let mut archive = Archive::default();
    for path in ["bin", "dev", "lab", "modules", "new"] {
        archive.directory(path);
    }
    archive.file("init", INIT.as_bytes());
    archive.file("bin/busybox", &read(&system.dir.join("busybox"))?);
    for (name, content) in FILES {
        archive.file(&format!("lab/{name}"), content.as_bytes());
    }
    archive.file("lab/lab-guest", &read(&program::build(GUEST, "the lab machine's command server")?)?);
    for path in files_under(&system.dir.join("boot"))? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.file(&format!("modules/{name}"), &read(&path)?);
    }
    write(&dir.join("initrd.img"), &archive.finish())
}

/// What the command server is built from in this repository, in a fixed order. Not the versions of its libraries:
/// they change with any dependency of the workspace, and each time all machines would be booted anew.
fn guest_sources() -> Result<Vec<PathBuf>, Error> {
    let mut sources = files_under(&program::package(GUEST).join("src"))?;
    sources.push(program::package(GUEST).join("Cargo.toml"));
    Ok(sources)
}

/// All regular files under `dir`, sorted.
pub(crate) fn files_under(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(io("list", dir))? {
        let path = entry.map_err(io("list", dir))?.path();
        let kind = fs::symlink_metadata(&path).map_err(io("look at", &path))?.file_type();
        if kind.is_dir() {
            files.extend(files_under(&path)?);
        } else if kind.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The kernel in a root tree.
fn kernel_image(root: &Path) -> Result<PathBuf, Error> {
    let boot = root.join("boot");
    let is_kernel =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"));
    files_under(&boot)?
        .into_iter()
        .find(is_kernel)
        .ok_or_else(|| Error::Format { path: boot, problem: "holds no kernel".to_owned() })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    Ok(fs::read(path).map_err(io("read", path))?)
}

fn write(path: &Path, content: &[u8]) -> Result<(), Error> {
    Ok(fs::write(path, content).map_err(io("write", path))?)
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    Ok(fs::copy(from, to).map(drop).map_err(io("copy", from))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_need() {
        let dependencies = "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/fs/mbcache.ko kernel/lib/crc16.ko\n\
            kernel/fs/jbd2/jbd2.ko:\n\
            kernel/drivers/block/virtio_blk.ko:\n\
            kernel/drivers/block/not_virtio_blk.ko: kernel/fs/jbd2/jbd2.ko\n";
        assert_eq!(
            load_order(dependencies, &["virtio_blk", "ext4", "jbd2", "built_in"]),
            [
                "kernel/drivers/block/virtio_blk.ko",
                "kernel/lib/crc16.ko",
                "kernel/fs/mbcache.ko",
                "kernel/fs/jbd2/jbd2.ko",
                "kernel/fs/ext4/ext4.ko"
            ]
        );
    }
}
