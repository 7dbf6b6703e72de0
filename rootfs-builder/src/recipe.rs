//! The OCI images that the demo and the suites use, made from Debian packages.
//!
//! Packages are unpacked, not installed: their scripts do not run, and what those would
//! have made that a program needs (accounts, links, the loader's cache) is made here.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use cache::{Cache, Key};
use debian::Suite;
use tool::io;

use crate::archive::{self, Start};
use crate::busybox::applets;
use crate::error::Error;
use crate::layer::{self, Owners};
use crate::progress::Progress;

/// The Debian release that images are made of.
const SUITE: &str = "trixie";
/// The code that makes an archive of the packages: another version of it may make another archive.
const MAKERS: &[&str] =
    &[include_str!("recipe.rs"), include_str!("busybox.rs"), include_str!("layer.rs"), include_str!("archive.rs")];

/// Which image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Image {
    /// One static busybox with links for its applets.
    Busybox,
    /// Busybox that sleeps: what the pods of a runtime without virtual machines are held by.
    Pause,
    /// A small Debian with redis, nginx and python3.
    Debian,
    /// A small Debian with postgres.
    Postgres,
}

impl Image {
    /// The name under which containerd will know the image.
    #[must_use]
    pub fn default_name(self) -> &'static str {
        match self {
            Self::Busybox => "docker.io/library/busybox:latest",
            Self::Pause => "docker.io/library/pause:latest",
            Self::Debian => "docker.io/library/debian:trixie-slim",
            Self::Postgres => "docker.io/library/postgres:latest",
        }
    }

    fn packages(self) -> Vec<&'static str> {
        match self {
            Self::Busybox | Self::Pause => vec!["busybox-static"],
            Self::Debian => [BASE, &["nginx", "procps", "python3", "redis-server", "redis-tools"]].concat(),
            Self::Postgres => [BASE, &["postgresql"]].concat(),
        }
    }

    fn start(self) -> Start {
        const BUSYBOX_PATH: &str = "/bin:/usr/bin:/sbin:/usr/sbin";
        let (command, path): (&[&str], _) = match self {
            Self::Busybox => (&["sh"], BUSYBOX_PATH),
            Self::Pause => (&["sleep", "infinity"], BUSYBOX_PATH),
            Self::Debian | Self::Postgres => {
                (&["bash"], "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            }
        };
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        Start { command, environment: vec![format!("PATH={path}")] }
    }

    fn populate(self, root: &Path, packages: &[PathBuf], progress: &Progress) -> Result<Owners, Error> {
        match self {
            Self::Busybox | Self::Pause => busybox(root, packages),
            Self::Debian | Self::Postgres => debian_root(root, packages, progress),
        }
    }
}

/// Writes `image` as an OCI archive to `output`; `name` is what containerd will call it.
///
/// The result is kept in `cache` by the names and versions of all packages in it.
///
/// # Errors
/// When packages cannot be had or a file operation fails.
pub fn build(image: Image, name: &str, output: &Path, cache: &Cache, progress: &Progress) -> Result<(), Error> {
    archive::check_name(name)?;
    progress.step("Package lists");
    let suite = Suite::open(cache, SUITE)?;
    progress.step("Packages");
    let packages: Vec<PathBuf> = suite
        .download_with_dependencies(&image.packages())?
        .into_iter()
        .filter(|package| !is_left_out(package))
        .collect();
    let mut key =
        Key::new(&MAKERS.concat()).with("image", format!("{image:?}").as_bytes()).with("name", name.as_bytes());
    for package in &packages {
        key = key.with("package", package.file_name().unwrap_or_default().as_encoded_bytes());
    }
    let entry = cache.get_or_build("oci", &key, |entry| {
        let root = tempfile::tempdir_in(entry).map_err(io("create a directory in", entry))?;
        progress.step("Files");
        let owners = image.populate(root.path(), &packages, progress)?;
        progress.step("Layer");
        let layer = layer::pack(root.path(), &owners)?;
        progress.step("Archive");
        archive::write(name, &layer, &image.start(), &entry.join("image.tar")).map(drop)
    })?;
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent).map_err(io("create", parent))?;
    }
    fs::copy(entry.join("image.tar"), output).map_err(io("write", output))?;
    Ok(())
}

/// The packages of a Debian that has a shell and its tools.
const BASE: &[&str] = &[
    "base-files",
    "base-passwd",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "libc-bin",
    "mawk",
    "sed",
    "tar",
];

/// Packages that only install or configure others, and what only they need; postgres' compiler for large queries, too,
/// without which it works.
const LEFT_OUT: &[&str] = &[
    "adduser",
    "bsdutils",
    "debconf",
    "init-system-helpers",
    "iproute2",
    "libllvm19",
    "libperl5.40",
    "libz3-4",
    "login",
    "login.defs",
    "logrotate",
    "lsb-base",
    "passwd",
    "perl",
    "perl-base",
    "perl-modules-5.40",
    "postgresql",
    "postgresql-client-common",
    "postgresql-common",
    "ssl-cert",
    "sysvinit-utils",
    "util-linux",
];

fn is_left_out(package: &Path) -> bool {
    let file = package.file_name().unwrap_or_default().to_string_lossy();
    LEFT_OUT.contains(&file.split('_').next().unwrap_or_default())
}

fn busybox(root: &Path, packages: &[PathBuf]) -> Result<Owners, Error> {
    for package in packages {
        debian::unpack(package, root)?;
    }
    let shipped = [root.join("usr/bin/busybox"), root.join("bin/busybox")].into_iter().find(|path| path.is_file());
    let binary = shipped
        .and_then(|path| fs::read(&path).ok())
        .ok_or(Error::Package { package: "busybox-static", file: "/usr/bin/busybox" })?;
    fs::remove_dir_all(root.join("usr")).map_err(io("remove", &root.join("usr")))?;
    for name in ["bin", "etc", "proc", "sys", "dev", "root", "home", "var", "usr", "run"] {
        directory(root, name, 0o755)?;
    }
    directory(root, "tmp", 0o1777)?;
    directory(root, "root", 0o700)?;
    file(root, "bin/busybox", &binary, 0o755)?;
    for applet in applets(&root.join("bin/busybox"))? {
        link(root, &format!("bin/{applet}"), "busybox")?;
    }
    for (name, target) in [("sbin", "bin"), ("usr/bin", "../bin"), ("usr/sbin", "../bin")] {
        link(root, name, target)?;
    }
    file(root, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n", 0o644)?;
    file(root, "etc/group", b"root:x:0:\nnogroup:x:65534:\n", 0o644)?;
    Ok(Owners::new())
}

/// Accounts beyond base-passwd's: name, number, home.
const ACCOUNTS: &[(&str, u64, &str)] = &[("redis", 999, "/var/lib/redis"), ("postgres", 998, "/var/lib/postgresql")];
/// Directories that belong to an account, with its number (33 is Debian's www-data).
const OWNED: &[(&str, u64)] =
    &[("var/lib/redis", 999), ("var/log/redis", 999), ("etc/redis", 999), ("var/log/nginx", 33), ("var/lib/nginx", 33)];
/// Documentation and translations: most of a package's files, none of a container's need.
const STRIPPED: &[&str] = &[
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/doc-base",
    "usr/share/i18n",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/share/menu",
    "usr/lib/postgresql/17/lib/bitcode",
    "usr/lib/systemd",
    "usr/share/perl5",
    "usr/share/pixmaps",
    "usr/share/applications",
    "usr/share/debconf",
];

fn debian_root(root: &Path, packages: &[PathBuf], progress: &Progress) -> Result<Owners, Error> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        directory(root, &format!("usr/{name}"), 0o755)?;
        link(root, name, &format!("usr/{name}"))?;
    }
    for (at, package) in packages.iter().enumerate() {
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        progress.detail(&format!(
            "Files: {} of {}, {}",
            at + 1,
            packages.len(),
            name.split('_').next().unwrap_or_default()
        ));
        debian::unpack(package, root)?;
    }
    strip(root)?;
    accounts(root)?;
    links_of_alternatives(root)?;
    for (name, _) in OWNED {
        directory(root, name, 0o755)?;
    }
    for (name, mode) in
        [("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777), ("root", 0o700)]
    {
        directory(root, name, mode)?;
    }
    for (name, target) in [("var/run", "/run"), ("var/lock", "/run/lock")] {
        let path = root.join(name);
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path).map_err(io("remove", &path))?;
            link(root, name, target)?;
        }
    }
    loader_cache(root)?;
    Ok(OWNED.iter().map(|(name, number)| (PathBuf::from(name), (*number, *number))).collect())
}

/// Removes what [`STRIPPED`] names, and of the documentation all but the licences.
fn strip(root: &Path) -> Result<(), Error> {
    for name in STRIPPED {
        let path = root.join(name);
        if path.is_dir() {
            fs::remove_dir_all(&path).map_err(io("remove", &path))?;
        }
    }
    let documentation = root.join("usr/share/doc");
    for package in fs::read_dir(&documentation).map_err(io("list", &documentation))?.flatten() {
        if !package.path().is_dir() {
            continue;
        }
        for entry in fs::read_dir(package.path()).map_err(io("list", &package.path()))?.flatten() {
            let path = entry.path();
            if entry.file_name() != "copyright" {
                let removed = if path.is_dir() && !path.is_symlink() {
                    fs::remove_dir_all(&path)
                } else {
                    fs::remove_file(&path)
                };
                removed.map_err(io("remove", &path))?;
            }
        }
    }
    Ok(())
}

/// What the scripts of base-passwd and of the services do.
fn accounts(root: &Path) -> Result<(), Error> {
    for (master, name) in [("passwd.master", "etc/passwd"), ("group.master", "etc/group")] {
        let path = root.join("usr/share/base-passwd").join(master);
        let mut content = fs::read_to_string(&path).map_err(io("read", &path))?;
        for (account, number, home) in ACCOUNTS {
            content += &match name {
                "etc/passwd" => format!("{account}:x:{number}:{number}::{home}:/usr/sbin/nologin\n"),
                _ => format!("{account}:x:{number}:\n"),
            };
        }
        file(root, name, content.replace(":*:", ":x:").as_bytes(), 0o644)?;
    }
    Ok(())
}

/// What update-alternatives and nginx' script do.
fn links_of_alternatives(root: &Path) -> Result<(), Error> {
    let links = [
        ("usr/bin/awk", "mawk"),
        ("usr/bin/which", "which.debianutils"),
        ("etc/nginx/sites-enabled/default", "/etc/nginx/sites-available/default"),
    ];
    for (name, target) in links {
        let path = root.join(name);
        if !path.is_symlink() {
            link(root, name, target)?;
        }
    }
    let page = root.join("usr/share/nginx/html/index.html");
    if page.is_file() {
        let content = fs::read(&page).map_err(io("read", &page))?;
        directory(root, "var/www/html", 0o755)?;
        file(root, "var/www/html/index.nginx-debian.html", &content, 0o644)?;
    }
    Ok(())
}

/// `ldconfig` for the tree: the loader finds libraries by one file instead of a search.
fn loader_cache(root: &Path) -> Result<(), Error> {
    tool::run("ldconfig (package libc-bin)", Command::new("/sbin/ldconfig").args(["-X", "-r"]).arg(root))?;
    // It remembers inodes and times of the machine that builds.
    let auxiliary = root.join("var/cache/ldconfig");
    if auxiliary.is_dir() {
        fs::remove_dir_all(&auxiliary).map_err(io("remove", &auxiliary))?;
    }
    Ok(())
}

fn directory(root: &Path, name: &str, mode: u32) -> Result<(), Error> {
    let path = root.join(name);
    fs::create_dir_all(&path)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
        .map_err(io("create", &path))?;
    Ok(())
}

fn file(root: &Path, name: &str, content: &[u8], mode: u32) -> Result<(), Error> {
    let path = root.join(name);
    fs::write(&path, content)
        .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
        .map_err(io("write", &path))?;
    Ok(())
}

fn link(root: &Path, name: &str, target: &str) -> Result<(), Error> {
    let path = root.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io("create", parent))?;
    }
    Ok(symlink(target, &path).map_err(io("link", &path))?)
}
