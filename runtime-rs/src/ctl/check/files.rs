//! What is installed: configuration, kernel, image, shim, containerd's configuration; and what dead sandboxes left.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, DEFAULT_FILE, FILE_VARIABLE, SYSTEM_FILE};

use super::{Args, Finding};
use crate::BINARY;
use crate::ctl::containerd::config::{Configuration, below};
use crate::ctl::node::{self, Owner};
use crate::error::chain;
use crate::machine::check_image;

/// Where services look for programs when nobody says otherwise (systemd.exec(5)).
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin";

pub(super) fn look(args: &Args) -> Vec<Finding> {
    let mut findings = Vec::new();
    match load(&args.destdir) {
        Ok((config, path)) => {
            findings.push(Finding::ok("configuration", path.display().to_string()));
            findings.push(kernel(&below(&args.destdir, &config.hypervisor.kernel)));
            findings.push(image(&below(&args.destdir, &config.hypervisor.image)));
        }
        Err(error) => {
            findings.push(Finding::error("configuration", chain(&error), "correct it, or install the runtime again"))
        }
    }
    let containerd = Configuration::read(&args.destdir, &args.containerd_config);
    let given: Vec<PathBuf> =
        containerd.iter().flat_map(|found| &found.handlers).filter_map(|handler| handler.path.clone()).collect();
    findings.push(shim(&args.destdir, &given, &std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned())));
    findings.push(match containerd {
        Ok(found) => cri(&found, &args.containerd_config),
        Err(error) => Finding::error("containerd", chain(&error), "containerd does not start with this configuration"),
    });
    findings.push(dead(&args.state.root));
    findings
}

/// As the runtime does it, with the default places below `destdir`.
fn load(destdir: &Path) -> Result<(Config, PathBuf), ConfigError> {
    let is_named = std::env::var_os(FILE_VARIABLE).is_some_and(|name| !name.is_empty());
    let places = [SYSTEM_FILE, DEFAULT_FILE].map(|path| below(destdir, Path::new(path)));
    match places.iter().find(|place| place.exists()) {
        Some(place) if !is_named && destdir != Path::new("/") => Config::load(Some(place)),
        None if !is_named && destdir != Path::new("/") => {
            Err(ConfigError::Missing(places.each_ref().map(|place| place.display().to_string()).join(" and ")))
        }
        _ => Config::load(None),
    }
}

/// An ELF file, or a Linux image for x86 with its header at 0x202 (Documentation/arch/x86/boot.rst).
fn kernel(path: &Path) -> Finding {
    const WHAT: &str = "guest kernel";
    let remedy = "install it again, or correct `kernel` in [hypervisor.dragonball]";
    let read = |offset: u64| {
        let mut magic = [0; 4];
        std::fs::File::open(path).and_then(|file| file.read_exact_at(&mut magic, offset).map(|()| magic))
    };
    match (read(0), read(0x202)) {
        (Ok(magic), _) if magic == *b"\x7fELF" => Finding::ok(WHAT, path.display().to_string()),
        (_, Ok(magic)) if magic == *b"HdrS" => Finding::ok(WHAT, format!("{} (a bzImage)", path.display())),
        (Err(error), _) => Finding::error(WHAT, format!("{}: {error}", path.display()), remedy),
        _ => Finding::error(WHAT, format!("{} is neither an ELF file nor a bzImage", path.display()), remedy),
    }
}

fn image(path: &Path) -> Finding {
    const WHAT: &str = "guest image";
    match check_image(path) {
        Ok(()) => Finding::ok(WHAT, path.display().to_string()),
        Err(error) => {
            Finding::error(WHAT, chain(&error), "install it again, or correct `image` in [hypervisor.dragonball]")
        }
    }
}

/// Where containerd's configuration says, else in the PATH. A service's own PATH may be another than this shell's.
fn shim(destdir: &Path, given: &[PathBuf], path: &str) -> Finding {
    const WHAT: &str = "shim";
    let is_program = |path: &Path| {
        std::fs::metadata(below(destdir, path))
            .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    if let Some(missing) = given.iter().find(|path| !is_program(path)) {
        let text = format!("{}, which containerd's configuration names, is no program", missing.display());
        return Finding::error(WHAT, text, "correct `runtime_path` there, or install the runtime again");
    }
    let found = given.first().cloned();
    let in_path = || std::env::split_paths(path).map(|directory| directory.join(BINARY)).find(|path| is_program(path));
    match found.or_else(in_path) {
        Some(found) => Finding::ok(WHAT, found.display().to_string()),
        None => Finding::error(
            WHAT,
            format!("{BINARY} is in no directory of PATH ({path})"),
            "install the runtime again, or name it by `kata-ctl containerd add --runtime-path`",
        ),
    }
}

fn cri(found: &Configuration, path: &Path) -> Finding {
    const WHAT: &str = "containerd";
    let remedy = "kata-ctl containerd add && systemctl restart containerd";
    let file = path.display();
    if found.has_no_cri {
        let text = format!("{file} switches the CRI off (disabled_plugins): no kubelet can use this containerd");
        return Finding::warning(WHAT, text, "remove \"cri\" from disabled_plugins if this is a node of Kubernetes");
    }
    if found.version < 2 {
        let text = format!("{file} has version {}, whose names of plugins newer versions do not read", found.version);
        return Finding::warning(WHAT, text, "containerd config migrate");
    }
    match found.handlers.first() {
        Some(handler) => {
            Finding::ok(WHAT, format!("the CRI has the runtime as {:?} ({})", handler.name, handler.file.display()))
        }
        None => {
            Finding::warning(WHAT, format!("the CRI does not have the runtime ({file}); ctr and nerdctl do"), remedy)
        }
    }
}

fn dead(root: &Path) -> Finding {
    const WHAT: &str = "sandboxes";
    let sandboxes = match node::sandboxes(root) {
        Ok(sandboxes) => sandboxes,
        Err(error) => return Finding::warning(WHAT, chain(&error), "run `kata-ctl check` as root"),
    };
    let dead = sandboxes.iter().filter(|sandbox| matches!(sandbox.owner, Owner::Dead(_))).count();
    match dead {
        0 => Finding::ok(WHAT, format!("{} run", sandboxes.len())),
        _ => Finding::warning(
            WHAT,
            format!("{dead} of {} are dead", sandboxes.len()),
            "kata-ctl cleanup shows what is left of them (containerd deletes what it knows of by itself)",
        ),
    }
}
