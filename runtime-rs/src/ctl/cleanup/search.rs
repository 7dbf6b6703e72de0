//! What no living sandbox owns.
//!
//! The order of looking is the reverse of the order of making: what belongs to a sandbox that begins meanwhile is
//! either not seen, or its owner is. Where a maker is not written down from the first instant, only what is not young counts.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use journal::Effect;

use super::finding::{Finding, STATE, is_young};
use super::mounts;
use crate::ctl::CtlError;
use crate::ctl::node::{self, Owner, Sandbox};
use crate::host::cgroup;
use crate::paths::{self, Paths};

/// Deeper cgroups are nobody's that this runtime made: it makes what an orchestrator names.
const MAX_DEPTH: usize = 64;
/// The parent of all socket directories, which no namespace is called.
const ALL_SOCKETS: &str = ".s";

/// Everything that is left behind below `root`, which is a real path, and in the cgroups below `cgroups`.
pub(super) fn look(root: &Path, cgroups: &Path) -> Result<Vec<Finding>, CtlError> {
    let unused_cgroups = unused_cgroups(cgroups);
    let mounts = mounts::below(root)?;
    let sockets = node::names(&root.join(ALL_SOCKETS))?;
    let sandboxes = node::sandboxes(root)?;

    let mut findings = Vec::new();
    for sandbox in &sandboxes {
        findings.extend(ended(sandbox)?);
    }
    findings.extend(stray_mounts(root, mounts, &sandboxes));
    findings.extend(stray_states(root)?);
    let stray_sockets = sockets.into_iter().filter(|name| is_hash(name)).map(|name| root.join(ALL_SOCKETS).join(name));
    findings.extend(stray_sockets.filter(|path| !owns_sockets(root, path)).map(|path| Finding::Sockets { path }));
    if !unused_cgroups.is_empty() {
        findings.extend(stray_cgroups(unused_cgroups, &sandboxes)?);
    }
    findings.extend(empty_directories(root)?);
    Ok(findings)
}

/// The journal of a pod process that has ended.
fn ended(sandbox: &Sandbox) -> Result<Option<Finding>, CtlError> {
    let pid = match sandbox.owner {
        Owner::Alive(_) => return Ok(None),
        Owner::Nobody if is_young(&sandbox.paths.journal()) => return Ok(None),
        Owner::Nobody => None,
        Owner::Dead(process) => Some(process.pid),
    };
    let effects = journal::standing(&sandbox.paths.journal())?;
    let (namespace, id) = (sandbox.namespace.clone(), sandbox.id.clone());
    Ok(Some(Finding::Journal { namespace, id, pid, effects }))
}

/// Mounts where this runtime makes them, `<namespace>/<id>/{mounts,shared}` and below, that no journal can know.
fn stray_mounts(root: &Path, mounts: Vec<PathBuf>, sandboxes: &[Sandbox]) -> Vec<Finding> {
    let is_stray = |target: &PathBuf| {
        let mut parts = target.strip_prefix(root).into_iter().flatten().map(|part| part.to_str().unwrap_or_default());
        let (Some(namespace), Some(id), Some(part)) = (parts.next(), parts.next(), parts.next()) else { return false };
        let valid = Paths::new(root, namespace, id).is_ok() && matches!(part, "mounts" | "shared");
        valid && !sandboxes.iter().any(|sandbox| target.starts_with(&sandbox.paths.state))
    };
    mounts.into_iter().filter(is_stray).map(|target| Finding::Mount { target }).collect()
}

/// State directories without a journal that hold nothing but what this runtime puts there. Others have directories of
/// that depth in `/run`, too: an empty one, or one with other things in it, is not taken for a sandbox's.
fn stray_states(root: &Path) -> Result<Vec<Finding>, CtlError> {
    let mut found = Vec::new();
    for namespace in node::names(root)? {
        for id in node::names(&root.join(&namespace))? {
            let Ok(paths) = Paths::new(root, &namespace, &id) else { continue };
            let inside = node::names(&paths.state)?;
            let ours = !inside.is_empty() && inside.iter().all(|name| STATE.contains(&name.as_str()));
            if ours && !is_young(&paths.state) {
                found.push(Finding::State { path: paths.state });
            }
        }
    }
    Ok(found)
}

/// Directories of namespaces and sandboxes, and that of all sockets, with nothing in them.
fn empty_directories(root: &Path) -> Result<Vec<Finding>, CtlError> {
    let mut found = Vec::new();
    for name in node::names(root)? {
        let path = root.join(&name);
        if name != ALL_SOCKETS {
            if paths::check("namespace", &name).is_err() {
                continue;
            }
            let below = node::names(&path)?;
            let states = below.iter().filter(|id| paths::check("id", id).is_ok()).map(|id| path.join(id));
            found.extend(states.filter(|path| is_empty(path)));
        }
        found.extend(Some(path).filter(|path| is_empty(path)));
    }
    found.retain(|path| !is_young(path));
    Ok(found.into_iter().map(|path| Finding::Directory { path }).collect())
}

fn is_empty(path: &Path) -> bool {
    let is_directory = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    is_directory && std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Whether a state directory exists whose sockets these are.
pub(super) fn owns_sockets(root: &Path, sockets: &Path) -> bool {
    let namespaces = node::names(root).unwrap_or_default();
    let mut ids = namespaces.iter().flat_map(|namespace| {
        let ids = node::names(&root.join(namespace)).unwrap_or_default();
        ids.into_iter().map(move |id| (namespace, id))
    });
    ids.any(|(namespace, id)| Paths::new(root, namespace, &id).is_ok_and(|paths| paths.sockets == sockets))
}

/// Whether this can be the name of a socket directory.
fn is_hash(name: &str) -> bool {
    name.len() == 20 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Of the cgroups that nobody is in, those that no journal names: a pod process writes one down before it makes it.
fn stray_cgroups(unused: Vec<PathBuf>, sandboxes: &[Sandbox]) -> Result<Vec<Finding>, CtlError> {
    let mut claimed = HashSet::new();
    for sandbox in sandboxes {
        let effects = journal::standing(&sandbox.paths.journal())?;
        claimed.extend(effects.into_iter().filter_map(|effect| match effect {
            Effect::Cgroup { path } => Some(path),
            _ => None,
        }));
    }
    Ok(unused.into_iter().filter(|path| !claimed.contains(path)).map(|path| Finding::Cgroup { path }).collect())
}

/// The cgroups with this runtime's mark that can be removed: no process is in them, and no cgroup of others. The
/// deepest come first.
fn unused_cgroups(mount: &Path) -> Vec<PathBuf> {
    let mut unused = Vec::new();
    for child in children(mount) {
        search_cgroup(&child, MAX_DEPTH, &mut unused);
    }
    unused
}

/// Whether all of this cgroup can go; collects what can.
fn search_cgroup(path: &Path, depth: usize, unused: &mut Vec<PathBuf>) -> bool {
    if depth == 0 {
        return false;
    }
    let mut free = true;
    for child in children(path) {
        free &= search_cgroup(&child, depth - 1, unused);
    }
    let events = std::fs::read_to_string(path.join("cgroup.events")).unwrap_or_default();
    let can_go = free && cgroup::is_marked(path) && events.lines().any(|line| line == "populated 0");
    if can_go {
        unused.push(path.to_owned());
    }
    can_go
}

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}
