//! Builds a profile's kernel and keeps it by the hash of all that went into it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cache::{Cache, Key};
use serde::{Deserialize, Serialize};
use tool::io;

use crate::dotconfig::{DotConfig, Refusal, refusals, write_requests};
use crate::fragment::{self, Request};
use crate::image;
use crate::make::{Kbuild, compiled};
use crate::profile::{Profile, Start};
use crate::source::{self, Source};

/// Changes when the files of a result or the way that they are made change.
const FORMAT: &str = "2";
/// Programs that kbuild needs beside the compiler, and Debian's packages that bring them.
const TOOLS: &[(&str, &str)] = &[
    ("gcc", "gcc"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("strip", "binutils"),
    ("cpio", "cpio"),
    ("xz", "xz-utils"),
];

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A data file of the profile is wrong.
    #[error(transparent)]
    Fragment(#[from] fragment::Error),
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// Debian's archive could not be read.
    #[error(transparent)]
    Debian(#[from] debian::Error),
    /// A file operation or a program failed.
    #[error(transparent)]
    Tool(#[from] tool::Error),
    /// The kernel's own build failed.
    #[error("make {targets} failed (all of its output: {log}):\n{output}")]
    Make {
        /// What was to be made.
        targets: String,
        /// The end of what it wrote.
        output: String,
        /// Where the whole output is.
        log: PathBuf,
    },
    /// Programs that the build needs are not installed.
    #[error("The kernel's build needs programs that are not here; apt-get install {0}")]
    Tools(String),
    /// Kconfig did not grant what the fragments ask for.
    #[error(
        "Profile {profile}: the kernel's configuration does not grant what the fragments ask for; \
         add what these symbols depend on, or ask for something else:\n{}", list(.refusals)
    )]
    Refused {
        /// The profile.
        profile: &'static str,
        /// All requests that were not granted.
        refusals: Vec<Refusal>,
    },
    /// The kernel is larger than its profile allows.
    #[error("Profile {profile}: vmlinux has {size} bytes, its limit is {limit}; turn something off or raise the limit")]
    TooLarge {
        /// The profile.
        profile: &'static str,
        /// Bytes it has.
        size: u64,
        /// Bytes it may have.
        limit: u64,
    },
    /// The linked kernel is not what a linker writes.
    #[error("Cannot pack {path}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: image::Error,
    },
    /// A result in the cache cannot be read.
    #[error("{path} is no build result; remove its directory and build again")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
}

fn list(refusals: &[Refusal]) -> String {
    let lines = refusals
        .iter()
        .map(|Refusal { symbol, wanted, found }| format!("  {symbol}: asked for {wanted}, Kconfig gave {found}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// What a build tells of its progress.
pub trait Progress {
    /// A new step begins.
    fn step(&self, what: &str);
    /// One more source file is being compiled.
    fn compiled(&self, file: &str);
}

/// What a build gave; the files of it lie in one directory.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Manifest {
    /// The profile's name.
    pub profile: String,
    /// What `uname -r` says in the guest.
    pub release: String,
    /// Version of Debian's source package.
    pub source: String,
    /// First line of `gcc --version`.
    pub compiler: String,
    /// Size of `vmlinux` in bytes.
    pub vmlinux_bytes: u64,
    /// Whether there is a `lib/modules`.
    pub modules: bool,
}

/// A built kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Holds `vmlinux`, `config`, `System.map`, `manifest.json` and, with modules, `lib/modules`.
    pub directory: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// Builds kernels.
#[derive(Debug)]
pub struct Builder<'a> {
    /// Where sources and results are kept.
    pub cache: &'a Cache,
    /// How many compilers run at once.
    pub jobs: usize,
    /// A build directory that is kept between builds (for work on the fragments), or a new one for each build.
    pub build_tree: Option<&'a Path>,
}

impl Builder<'_> {
    /// The kernel of `profile`: from the cache if the same was built before, else built now.
    ///
    /// # Errors
    /// All of [`Error`]; nothing is kept of a failed build but its log.
    pub fn build(&self, profile: Profile, progress: &dyn Progress) -> Result<Kernel, Error> {
        let requests: BTreeMap<String, Request> =
            profile.requests()?.into_iter().map(|(symbol, origin)| (symbol, origin.request)).collect();
        require_tools()?;
        let source = source::fetch(self.cache, &|what| progress.step(what))?;
        let compiler = first_line(&tool::run("gcc", Command::new("gcc").arg("--version"))?);
        let linker = first_line(&tool::run("ld", Command::new("ld").arg("--version"))?);
        let key = Key::new(FORMAT)
            .with("profile", profile.name().as_bytes())
            .with("requests", write_requests(&requests).as_bytes())
            .with("source", source.version.as_bytes())
            .with("compiler", compiler.as_bytes())
            .with("linker", linker.as_bytes());
        let build = Build { builder: self, profile, requests, source, compiler, progress };
        let directory = self.cache.get_or_build(&kind(profile), &key, |result| build.run(result))?;
        let manifest = read_manifest(&directory)?;
        Ok(Kernel { directory, manifest })
    }
}

/// Where the cache keeps a profile's kernels: builds of different profiles do not wait for each other.
fn kind(profile: Profile) -> String {
    format!("kernel-{}", profile.name())
}

struct Build<'a> {
    builder: &'a Builder<'a>,
    profile: Profile,
    requests: BTreeMap<String, Request>,
    source: Source,
    compiler: String,
    progress: &'a dyn Progress,
}

impl Build<'_> {
    fn run(&self, result: &Path) -> Result<(), Error> {
        let root = self.builder.cache.root();
        let temporary;
        let objects = match self.builder.build_tree {
            Some(kept) => kept,
            None => {
                temporary = tempfile::tempdir_in(root).map_err(io("create a build directory in", root))?;
                temporary.path()
            }
        };
        fs::create_dir_all(objects).map_err(io("create", objects))?;
        let log = root.join(kind(self.profile)).join("build.log");
        fs::write(&log, "").map_err(io("write the build log", &log))?;
        let kbuild = Kbuild { source: &self.source.tree, objects, jobs: self.builder.jobs, log };
        self.configure(&kbuild)?;
        self.compile(&kbuild)?;
        self.install(&kbuild, result)
    }

    fn configure(&self, kbuild: &Kbuild<'_>) -> Result<(), Error> {
        self.progress.step("Configuring");
        let requests = write_requests(&self.requests);
        let path = kbuild.objects.join("requests.config");
        fs::write(&path, &requests).map_err(io("write", &path))?;
        let dotconfig = kbuild.objects.join(".config");
        match self.profile.start() {
            Start::AllOff => {
                let all = format!("KCONFIG_ALLCONFIG={}", path.display());
                kbuild.run(&[&all, "allnoconfig"], &mut |_| ())?;
            }
            Start::Tiny => {
                kbuild.run(&["tinyconfig"], &mut |_| ())?;
                let tiny = fs::read_to_string(&dotconfig).map_err(io("read", &dotconfig))?;
                fs::write(&dotconfig, tiny + &requests).map_err(io("write", &dotconfig))?;
                kbuild.run(&["olddefconfig"], &mut |_| ())?;
            }
        }
        let text = fs::read_to_string(&dotconfig).map_err(io("read", &dotconfig))?;
        let refusals = refusals(&self.requests, &DotConfig::parse(&text));
        if refusals.is_empty() { Ok(()) } else { Err(Error::Refused { profile: self.profile.name(), refusals }) }
    }

    fn has_modules(&self) -> bool {
        self.requests.get("MODULES").is_some_and(|request| !request.value.is_off())
    }

    fn compile(&self, kbuild: &Kbuild<'_>) -> Result<(), Error> {
        self.progress.step("Compiling");
        let targets: &[&str] = if self.has_modules() { &["vmlinux", "modules"] } else { &["vmlinux"] };
        kbuild.run(targets, &mut |line| {
            if let Some(file) = compiled(line) {
                self.progress.compiled(file);
            }
        })
    }

    fn install(&self, kbuild: &Kbuild<'_>, result: &Path) -> Result<(), Error> {
        self.progress.step("Packing");
        let vmlinux = result.join("vmlinux");
        let linked = kbuild.objects.join("vmlinux");
        if self.profile == Profile::Reference {
            tool::run("strip", Command::new("strip").arg("-o").arg(&vmlinux).arg(&linked))?;
        } else {
            let file = fs::read(&linked).map_err(io("read", &linked))?;
            let packed = image::pack(&file).map_err(|source| Error::Image { path: linked, source })?;
            fs::write(&vmlinux, packed).map_err(io("write", &vmlinux))?;
        }
        for (from, to) in [(".config", "config"), ("System.map", "System.map")] {
            let from = kbuild.objects.join(from);
            fs::copy(&from, result.join(to)).map_err(io("copy", &from))?;
        }
        let release = first_line(&tool::run("make kernelrelease", &mut kbuild.command(&["-s", "kernelrelease"]))?);
        if self.has_modules() {
            let root = format!("INSTALL_MOD_PATH={}", result.display());
            kbuild.run(&[&root, "INSTALL_MOD_STRIP=1", "modules_install"], &mut |_| ())?;
            remove_build_link(&result.join("lib/modules").join(&release))?;
        }
        let size = fs::metadata(&vmlinux).map_err(io("read", &vmlinux))?.len();
        if let Some(limit) = self.profile.size_limit().filter(|limit| size > *limit) {
            return Err(Error::TooLarge { profile: self.profile.name(), size, limit });
        }
        let manifest = Manifest {
            profile: self.profile.name().to_owned(),
            release,
            source: self.source.version.clone(),
            compiler: self.compiler.clone(),
            vmlinux_bytes: size,
            modules: self.has_modules(),
        };
        let path = result.join("manifest.json");
        let text =
            serde_json::to_string_pretty(&manifest).map_err(|source| Error::Manifest { path: path.clone(), source })?;
        fs::write(&path, text).map_err(io("write", &path))?;
        Ok(())
    }
}

fn read_manifest(directory: &Path) -> Result<Manifest, Error> {
    let path = directory.join("manifest.json");
    let text = fs::read_to_string(&path).map_err(io("read", &path))?;
    serde_json::from_str(&text).map_err(|source| Error::Manifest { path, source })
}

/// kbuild links the modules to the tree that they were built in, which is gone when they are used.
fn remove_build_link(modules: &Path) -> Result<(), Error> {
    let link = modules.join("build");
    if link.is_symlink() {
        fs::remove_file(&link).map_err(io("remove", &link))?;
    }
    Ok(())
}

fn first_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).lines().next().unwrap_or_default().to_owned()
}

fn require_tools() -> Result<(), Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed = |tool: &str| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file());
    let mut missing: Vec<&str> =
        TOOLS.iter().filter(|(tool, _)| !installed(tool)).map(|(_, package)| *package).collect();
    // objtool links with libelf.
    if !Path::new("/usr/include/libelf.h").exists() {
        missing.push("libelf-dev");
    }
    if missing.is_empty() { Ok(()) } else { Err(Error::Tools(missing.join(" "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_configuration_names_every_symbol_with_what_was_asked_and_given() {
        let refusal = |symbol: &str| Refusal { symbol: symbol.into(), wanted: "y".into(), found: "n".into() };
        let error = Error::Refused { profile: "base", refusals: vec![refusal("VMGENID"), refusal("EROFS_FS")] };
        let text = error.to_string();
        assert!(text.contains("VMGENID: asked for y, Kconfig gave n") && text.contains("EROFS_FS"), "{text}");
    }

    #[test]
    fn no_link_to_the_build_tree_goes_with_the_modules() {
        let modules = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/nonexistent/tree", modules.path().join("build")).unwrap();
        for _ in 0..2 {
            remove_build_link(modules.path()).unwrap();
            assert!(!modules.path().join("build").is_symlink());
        }
    }
}
