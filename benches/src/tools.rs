//! Debian's fio, iperf3 and ping in a disk image that a guest starts from, and that the lab machine can mount.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use cache::{Cache, Key};
use debian::Suite;

const SUITE: &str = "trixie";
const PACKAGES: [&str; 4] = ["busybox-static", "fio", "iperf3", "iputils-ping"];
/// What is taken from the packages, with the libraries that it needs.
const PROGRAMS: [&str; 4] = [BUSYBOX, "usr/bin/fio", "usr/bin/iperf3", "usr/bin/ping"];
/// Linked statically.
const BUSYBOX: &str = "usr/bin/busybox";
/// Where the image has its libraries.
pub const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// Below [`LIBRARIES`]: the place itself, and where Ceph's libraries lie, which fio is linked with.
const PRIVATE_LIBRARIES: [&str; 2] = ["", "ceph"];
/// Their loader, in the same place.
pub const LOADER: &str = "ld-linux-x86-64.so.2";
/// Programs of busybox that the guest's `/init` uses.
const APPLETS: [&str; 7] = ["dd", "grep", "ip", "mount", "reboot", "sh", "uevent"];
/// Where the guest mounts.
const DIRECTORIES: [&str; 6] = ["bin", "dev", "etc", "proc", "sys", "tmp"];
/// The image's name in its cache entry.
const IMAGE: &str = "image";
const INIT: &str = include_str!("tools/init.sh");
pub(crate) const BLOCK_JOBS: &str = include_str!("tools/block.fio");

/// The image (EROFS), from the cache or made now.
///
/// # Errors
/// When packages cannot be had, or `mkfs.erofs` fails.
pub fn image(cache: &Cache) -> Result<PathBuf> {
    let suite = Suite::open(cache, SUITE)?;
    let packages = suite.resolve(&PACKAGES)?;
    let mut key = Key::new("1").with("init", INIT.as_bytes()).with("jobs", BLOCK_JOBS.as_bytes());
    for package in &packages {
        key = key.with(&package.name, package.version.as_bytes());
    }
    let entry = cache.get_or_build("bench-tools", &key, |entry| make(&suite, entry))?;
    Ok(entry.join(IMAGE))
}

/// Makes the image in `entry`, out of files that do not stay.
fn make(suite: &Suite, entry: &Path) -> Result<()> {
    let [packages, tree] = ["packages", "tree"].map(|name| entry.join(name));
    fs::create_dir(&packages)?;
    for package in suite.download_with_dependencies(&PACKAGES)? {
        debian::unpack(&package, &packages)?;
    }
    populate(&packages, &tree)?;
    let mut command = Command::new("mkfs.erofs");
    command.args(["-x-1", "-T0", "--all-root"]).arg(entry.join(IMAGE)).arg(&tree);
    tool::run("mkfs.erofs (package erofs-utils)", &mut command)?;
    for files in [&packages, &tree] {
        fs::remove_dir_all(files).with_context(|| format!("Cannot remove {}", files.display()))?;
    }
    Ok(())
}

/// Makes the guest's file system of unpacked `packages`.
fn populate(packages: &Path, tree: &Path) -> Result<()> {
    for name in DIRECTORIES {
        fs::create_dir_all(tree.join(name))?;
    }
    for program in PROGRAMS {
        take(packages, tree, Path::new(program))?;
        if program != BUSYBOX {
            for library in libraries(packages, program)? {
                take(packages, tree, &library)?;
            }
        }
    }
    for applet in APPLETS {
        symlink(Path::new("/").join(BUSYBOX), tree.join("bin").join(applet))?;
    }
    symlink("usr/lib", tree.join("lib"))?;
    symlink("usr/lib64", tree.join("lib64"))?;
    fs::create_dir(tree.join("usr/lib64"))?;
    symlink(Path::new("/").join(LIBRARIES).join(LOADER), tree.join("usr/lib64").join(LOADER))?;
    fs::write(tree.join("etc/block.fio"), BLOCK_JOBS)?;
    fs::write(tree.join("init"), INIT)?;
    Ok(fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?)
}

/// Copies one file to the same place below `tree`.
fn take(packages: &Path, tree: &Path, path: &Path) -> Result<()> {
    let target = tree.join(path);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(packages.join(path), &target).with_context(|| format!("No package holds {}", path.display()))?;
    Ok(())
}

/// The libraries that `program` is loaded with, its loader among them: what the packages' own loader finds.
fn libraries(packages: &Path, program: &str) -> Result<Vec<PathBuf>> {
    let places = PRIVATE_LIBRARIES.map(|place| packages.join(LIBRARIES).join(place).display().to_string()).join(":");
    let loader = packages.join(LIBRARIES).join(LOADER);
    let mut command = Command::new(&loader);
    command.args(["--inhibit-cache", "--library-path", &places, "--list"]).arg(packages.join(program));
    let listed = tool::run("the loader of libc6", &mut command)?;
    let mut libraries: Vec<PathBuf> = String::from_utf8_lossy(&listed)
        .lines()
        .filter_map(|line| Path::new(library(line)?).strip_prefix(packages).ok().map(Path::to_owned))
        .collect();
    libraries.push(Path::new(LIBRARIES).join(LOADER));
    Ok(libraries)
}

/// The path in a line such as `libm.so.6 => /usr/lib/libm.so.6 (0x00007f1c)`.
fn library(line: &str) -> Option<&str> {
    line.split_once(" => ")?.1.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loader_s_list_names_paths_where_there_are_files() {
        assert_eq!(library("\tlibm.so.6 => /usr/lib/libm.so.6 (0x00007f1c)"), Some("/usr/lib/libm.so.6"));
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007ffd)"), None);
    }
}
