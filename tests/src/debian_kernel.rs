//! Debian's own cloud kernel for guests: a bzImage, with drivers as modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use cache::{Cache, Key};
use debian::Suite;

const SUITE: &str = "trixie";
/// The kernel's metapackage.
const PACKAGE: &str = "linux-image-cloud-amd64";
/// The drivers of our machines' devices that it does not have built in.
const DRIVERS: [&str; 6] = ["virtio_blk", "virtio_net", "virtio_pmem", "nd_pmem", "virtio_mem", "virtio_balloon"];
/// The names in the cache entry.
const IMAGE: &str = "vmlinuz";
const MODULES: &str = "modules";

/// A kernel and its modules, in the order in which they are loaded.
#[derive(Debug)]
pub struct DebianKernel {
    /// The bzImage.
    pub image: PathBuf,
    /// The modules, not compressed.
    pub modules: Vec<PathBuf>,
}

impl DebianKernel {
    /// The newest, from the cache or fetched now.
    ///
    /// # Errors
    /// When the package cannot be had, or is not as kernels' packages are.
    pub fn newest(cache: &Cache) -> Result<Self> {
        let suite = Suite::open(cache, SUITE)?;
        let build = suite.newest_kernel(PACKAGE)?;
        let mut key = Key::new("1").with(&build.name, build.version.as_bytes());
        for driver in DRIVERS {
            key = key.with("driver", driver.as_bytes());
        }
        let entry = cache.get_or_build("debian-kernel", &key, |entry| -> Result<()> {
            let package = suite.download(&[&build.name])?.pop().context("Nothing was downloaded")?;
            fill(&package, entry)
        })?;
        let mut modules = fs::read_dir(entry.join(MODULES))
            .and_then(|files| files.map(|file| Ok(file?.path())).collect::<std::io::Result<Vec<_>>>())
            .with_context(|| format!("Cannot read {}", entry.display()))?;
        modules.sort();
        Ok(Self { image: entry.join(IMAGE), modules })
    }
}

/// Takes the kernel and the modules out of its package.
fn fill(package: &Path, entry: &Path) -> Result<()> {
    let whole = tempfile::tempdir_in(entry).context("Cannot make a directory")?;
    debian::unpack(package, whole.path())?;
    // As on a machine with a merged /usr; kmod looks below /lib.
    std::os::unix::fs::symlink("usr/lib", whole.path().join("lib")).context("Cannot make a link")?;
    let image = first_file(&whole.path().join("boot"), "vmlinuz-")?;
    fs::copy(&image, entry.join(IMAGE)).with_context(|| format!("Cannot copy {}", image.display()))?;
    let release = image.file_name().unwrap_or_default().to_string_lossy().replacen("vmlinuz-", "", 1);
    tool::run("depmod (package kmod)", Command::new("depmod").arg("-b").arg(whole.path()).arg(&release))?;
    fs::create_dir(entry.join(MODULES)).context("Cannot make a directory")?;
    for (number, module) in in_loading_order(whole.path(), &release)?.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let target = entry.join(MODULES).join(format!("{number:02}-{}", name.trim_end_matches(".xz")));
        let content = if name.ends_with(".xz") {
            tool::run("xz (package xz-utils)", Command::new("xz").arg("-dc").arg(module))?
        } else {
            fs::read(module).with_context(|| format!("Cannot read {}", module.display()))?
        };
        fs::write(&target, content).with_context(|| format!("Cannot write {}", target.display()))?;
    }
    Ok(())
}

/// A file of a directory whose name begins so.
fn first_file(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let files = fs::read_dir(directory).with_context(|| format!("Cannot read {}", directory.display()))?;
    let mut paths = files.filter_map(|file| Some(file.ok()?.path()));
    paths
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .with_context(|| format!("{} has no {prefix}*", directory.display()))
}

/// The drivers' modules below `root`, each after those that it needs.
fn in_loading_order(root: &Path, release: &str) -> Result<Vec<PathBuf>> {
    let mut modules = Vec::new();
    for driver in DRIVERS {
        let mut command = Command::new("modprobe");
        command.arg("-d").arg(root).args(["-S", release, "--show-depends", driver]);
        let said = tool::run("modprobe (package kmod)", &mut command)?;
        for module in String::from_utf8_lossy(&said).lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let module = PathBuf::from(module.trim());
            if !modules.contains(&module) {
                modules.push(module);
            }
        }
    }
    Ok(modules)
}
