//! The kernel's source, from Debian's `linux-source` package.

use std::path::{Path, PathBuf};
use std::process::Command;

use cache::{Cache, Key};
use debian::Suite;
use tool::io;

use crate::build::Error;

/// The suite whose kernel it is.
const SUITE: &str = "trixie";
/// The package; its number is the kernel's series.
const PACKAGE: &str = "linux-source-6.12";

/// An unpacked source tree.
#[derive(Clone, Debug)]
pub struct Source {
    /// The package's version, such as `6.12.107-1`.
    pub version: String,
    /// The tree; nobody writes to it.
    pub tree: PathBuf,
}

/// The newest source of the suite, downloaded and unpacked once.
///
/// # Errors
/// When the archive cannot be read or the package cannot be unpacked.
pub fn fetch(cache: &Cache, report: &dyn Fn(&str)) -> Result<Source, Error> {
    report("Reading Debian's package lists");
    let suite = Suite::open(cache, SUITE)?;
    let version = suite.versions(&[PACKAGE])?.pop().unwrap_or_default();
    let key = Key::new("1").with("package", PACKAGE.as_bytes()).with("version", version.as_bytes());
    let entry = cache.get_or_build("kernel-source", &key, |entry| {
        report(&format!("Downloading {PACKAGE} {version} (150 MB)"));
        let deb = suite.download(&[PACKAGE])?.pop().unwrap_or_default();
        report(&format!("Unpacking {PACKAGE} {version}"));
        unpack(&deb, entry)
    })?;
    Ok(Source { version, tree: entry.join("linux") })
}

fn unpack(deb: &Path, entry: &Path) -> Result<(), Error> {
    let package = entry.join("package");
    let tree = entry.join("linux");
    for dir in [&package, &tree] {
        std::fs::create_dir(dir).map_err(io("create", dir))?;
    }
    debian::unpack(deb, &package)?;
    let tarball = package.join(format!("usr/src/{PACKAGE}.tar.xz"));
    tool::run("tar", Command::new("tar").arg("-xJf").arg(&tarball).args(["--strip-components=1", "-C"]).arg(&tree))?;
    std::fs::remove_dir_all(&package).map_err(io("remove", &package))?;
    Ok(())
}
