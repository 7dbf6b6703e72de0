//! Debian packages of any suite, from the machine's own mirror.
//!
//! The mirror and the signing keys come from the machine's own apt configuration when
//! the code runs. Each suite gets an apt of its own (state, lists and archives in the
//! cache), so that nothing is installed on the machine and its sources stay as they are.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cache::{Cache, Key};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

use tool::io;

/// Why packages could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// A file operation or a program failed.
    #[error(transparent)]
    Tool(#[from] tool::Error),
    /// apt said that it downloaded a package, and did not.
    #[error("apt-get download {package} left no {package}_*.deb in {archives}")]
    NotDownloaded {
        /// Its name.
        package: String,
        /// Where it should be.
        archives: PathBuf,
    },
    /// A kernel's metapackage depends on no kernel.
    #[error("{0} depends on no package that is a kernel")]
    NoKernel(String),
    /// The machine's apt knows no Debian mirror.
    #[error("apt on this machine names no Debian mirror; add one to /etc/apt/sources.list.d")]
    NoMirror,
}

/// Runs a command, called by all its words in messages.
fn run(command: &mut Command) -> Result<Vec<u8>, Error> {
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_string_lossy);
    let program = words.collect::<Vec<_>>().join(" ");
    Ok(tool::run(&program, command)?)
}

/// The address of the Debian archive that this machine's apt uses.
///
/// # Errors
/// [`Error::NoMirror`] when it has none.
pub fn mirror() -> Result<String, Error> {
    let targets = run(Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)"]))?;
    String::from_utf8_lossy(&targets)
        .lines()
        .find_map(|line| line.strip_suffix(" Debian Debian"))
        .map(|address| address.trim_end_matches('/').to_owned())
        .ok_or(Error::NoMirror)
}

/// One package as apt chose it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name, e.g. `containerd`.
    pub name: String,
    /// Its version, e.g. `1.7.24~ds1-6`.
    pub version: String,
}

/// The packages in the output of `apt-get install --simulate`: lines like `Inst name (version origin [arch])`.
fn parse_simulation(output: &str) -> Vec<Package> {
    output
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
            let version = rest.split_once('(')?.1.split(' ').next()?;
            Some(Package { name: name.to_owned(), version: version.to_owned() })
        })
        .collect()
}

/// One suite (`trixie`, `sid`, …) with an apt of its own.
#[derive(Debug)]
pub struct Suite {
    name: String,
    root: PathBuf,
}

impl Suite {
    /// Opens `name`; its package lists are fetched at most once a day.
    ///
    /// # Errors
    /// When the mirror cannot be read or apt refuses the suite.
    pub fn open(cache: &Cache, name: &str) -> Result<Self, Error> {
        let mirror = mirror()?;
        let today = run(Command::new("date").args(["-u", "+%F"]))?;
        let key = Key::new("1").with("mirror", mirror.as_bytes()).with("suite", name.as_bytes()).with("day", &today);
        let root = cache.get_or_build("apt", &key, |root| {
            for dir in ["lists/partial", "archives/partial", "etc"] {
                let path = root.join(dir);
                fs::create_dir_all(&path).map_err(io("create", &path))?;
            }
            let sources = root.join("etc/sources.list");
            fs::write(&sources, format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {name} main\n"))
                .map_err(io("write", &sources))?;
            fs::write(root.join("status"), "").map_err(io("write", &sources))?;
            run(Self::apt("apt-get", root).arg("update")).map(drop)
        })?;
        Ok(Self { name: name.to_owned(), root })
    }

    /// The suite's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Version of the candidate of each package, in the order asked: an input for cache keys.
    ///
    /// # Errors
    /// When apt does not know one of them.
    pub fn versions(&self, packages: &[&str]) -> Result<Vec<String>, Error> {
        let shown = run(Self::apt("apt-cache", &self.root).args(["show", "--no-all-versions"]).args(packages))?;
        let shown = String::from_utf8_lossy(&shown);
        Ok(shown.lines().filter_map(|line| line.strip_prefix("Version: ")).map(str::to_owned).collect())
    }

    /// Downloads just these packages and answers their `.deb` files, in the order asked.
    ///
    /// # Errors
    /// When apt does not know one of them or the download fails.
    pub fn download(&self, packages: &[&str]) -> Result<Vec<PathBuf>, Error> {
        let archives = self.root.join("archives");
        run(Self::apt("apt-get", &self.root).current_dir(&archives).arg("download").args(packages))?;
        packages.iter().map(|package| newest(&archives, package)).collect()
    }

    /// These packages and all that they depend on (no recommendations), sorted by name.
    ///
    /// Nothing counts as installed already, essential packages neither: ask for those that are needed.
    ///
    /// # Errors
    /// When apt cannot satisfy them.
    pub fn resolve(&self, packages: &[&str]) -> Result<Vec<Package>, Error> {
        let listed = run(Self::apt("apt-get", &self.root)
            .args(["install", "--simulate", "--no-install-recommends"])
            .args(packages))?;
        let mut resolved = parse_simulation(&String::from_utf8_lossy(&listed));
        resolved.sort();
        Ok(resolved)
    }

    /// The kernel that a metapackage, as `linux-image-amd64`, leads to: the newest build.
    ///
    /// # Errors
    /// When apt does not know it; [`Error::NoKernel`] when it is no such package.
    pub fn newest_kernel(&self, metapackage: &str) -> Result<Package, Error> {
        let packages = self.resolve(&[metapackage])?.into_iter();
        packages
            .filter(|package| package.name != metapackage)
            .find(|package| package.name.starts_with("linux-image-"))
            .ok_or_else(|| Error::NoKernel(metapackage.to_owned()))
    }

    /// Downloads these packages and all that they depend on (no recommendations).
    ///
    /// # Errors
    /// When apt cannot satisfy them or the download fails.
    pub fn download_with_dependencies(&self, packages: &[&str]) -> Result<Vec<PathBuf>, Error> {
        let wanted = self.resolve(packages)?;
        let names: Vec<&str> = wanted.iter().map(|package| package.name.as_str()).collect();
        self.download(&names)
    }

    fn apt(program: &str, root: &Path) -> Command {
        let mut command = Command::new(program);
        let set = |name: &str, path: &str| format!("{name}={}", root.join(path).display());
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8").arg("-q");
        for option in [
            set("Dir::State::Lists", "lists"),
            set("Dir::State::status", "status"),
            set("Dir::Cache", "."),
            set("Dir::Cache::archives", "archives"),
            set("Dir::Etc::sourcelist", "etc/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            "Dir::Etc::preferencesparts=-".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            // Unstable's Release file is short-lived; the signature is still checked.
            "Acquire::Check-Valid-Until=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

fn newest(archives: &Path, package: &str) -> Result<PathBuf, Error> {
    let prefix = format!("{package}_");
    let mut found: Vec<_> = fs::read_dir(archives)
        .map_err(io("list", archives))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&prefix) && name.ends_with(".deb")
        })
        .collect();
    found.sort_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok());
    found.pop().ok_or_else(|| Error::NotDownloaded { package: package.to_owned(), archives: archives.to_owned() })
}

/// Unpacks the files of a `.deb` into `target`, without running its scripts.
///
/// # Errors
/// When `dpkg-deb` fails.
pub fn unpack(deb: &Path, target: &Path) -> Result<(), Error> {
    run(Command::new("dpkg-deb").arg("--extract").arg(deb).arg(target)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_installation_lists_names_and_versions() {
        let output = "NOTE: This is only a simulation!\n\
            Inst gcc-14-base (14.2.0-19 Debian:13.7/stable [amd64]) []\n\
            Inst runc [1.0-1] (1.1.15+ds1-2+b4 Debian:13.7/stable [amd64])\n\
            Conf runc (1.1.15+ds1-2+b4 Debian:13.7/stable [amd64])\n";
        let package = |name: &str, version: &str| Package { name: name.to_owned(), version: version.to_owned() };
        assert_eq!(parse_simulation(output), [package("gcc-14-base", "14.2.0-19"), package("runc", "1.1.15+ds1-2+b4")]);
    }
}
