//! The sandboxes of this node, as their state directories tell.
//!
//! A sandbox is a directory `<root>/<namespace>/<id>` with a journal. Other programs have directories below `/run` of
//! the same shape, so whatever has no journal is not taken for one.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use journal::{JournalError, ProcessId};

use super::CtlError;
use crate::paths::{self, Paths, RUN_DIR};

/// Where the state is; every command that looks at sandboxes takes it.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct StateDir {
    /// The state directory of the runtime.
    #[arg(long, value_name = "DIR", default_value = RUN_DIR)]
    pub(super) root: PathBuf,
}

/// One sandbox.
#[derive(Debug, Clone)]
pub(super) struct Sandbox {
    pub(super) namespace: String,
    pub(super) id: String,
    pub(super) paths: Paths,
    pub(super) owner: Owner,
}

/// Whose a sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The pod process runs.
    Alive(ProcessId),
    /// The pod process has ended without undoing everything.
    Dead(ProcessId),
    /// Its journal records no process: it is being made in this instant, or its making was cut off in that instant.
    Nobody,
}

impl Sandbox {
    /// The pod process, if it runs.
    pub(super) fn process(&self) -> Option<ProcessId> {
        match self.owner {
            Owner::Alive(process) => Some(process),
            Owner::Dead(_) | Owner::Nobody => None,
        }
    }

    /// As a person names it.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.id)
    }

    /// The ids of its containers: each has a directory in the shared one, but for a sandbox container, which is the
    /// sandbox's namesake.
    pub(super) fn containers(&self) -> Vec<String> {
        let shared = names(&self.paths.mounts()).unwrap_or_default();
        let mut ids: Vec<String> = shared.into_iter().filter(|name| paths::check("id", name).is_ok()).collect();
        if !ids.contains(&self.id) {
            ids.push(self.id.clone());
        }
        ids.sort();
        ids
    }
}

/// All sandboxes below `root`, by namespace and id.
///
/// # Errors
///
/// [`CtlError::File`] when the directory exists and cannot be read, [`CtlError::Journal`] for a journal.
pub(super) fn sandboxes(root: &Path) -> Result<Vec<Sandbox>, CtlError> {
    let mut found = Vec::new();
    for namespace in names(root)? {
        if paths::check("namespace", &namespace).is_err() {
            continue;
        }
        for id in names(&root.join(&namespace))? {
            let Ok(paths) = Paths::new(root, &namespace, &id) else { continue };
            if let Some(owner) = owner(&paths)? {
                found.push(Sandbox { namespace: namespace.clone(), id, paths, owner });
            }
        }
    }
    Ok(found)
}

/// Whose the sandbox is; nothing when there is no journal.
pub(super) fn owner(paths: &Paths) -> Result<Option<Owner>, JournalError> {
    let journal = paths.journal();
    if !journal.is_file() {
        return Ok(None);
    }
    let owners = journal::owners(&journal)?;
    Ok(Some(match (owners.iter().find(|owner| owner.is_alive()), owners.last()) {
        (Some(owner), _) => Owner::Alive(*owner),
        (None, Some(owner)) => Owner::Dead(*owner),
        // It may have been undone while it was looked at.
        (None, None) if !journal.is_file() => return Ok(None),
        (None, None) => Owner::Nobody,
    }))
}

/// The one sandbox that `what` names: `id`, or `namespace/id`.
///
/// # Errors
///
/// [`CtlError::NoSandbox`] and [`CtlError::Ambiguous`].
pub(super) fn find(root: &Path, what: &str) -> Result<Sandbox, CtlError> {
    let mut found: Vec<Sandbox> =
        sandboxes(root)?.into_iter().filter(|it| it.id == what || it.name() == what).collect();
    match (found.pop(), found.is_empty()) {
        (Some(sandbox), true) => Ok(sandbox),
        (Some(sandbox), false) => {
            found.push(sandbox);
            Err(CtlError::Ambiguous(what.to_owned(), found.iter().map(Sandbox::name).collect()))
        }
        (None, _) => Err(CtlError::NoSandbox { what: what.to_owned(), root: root.to_owned() }),
    }
}

/// The names in a directory, sorted; none when it does not exist or is no directory. A name that is not UTF-8 is none
/// that containerd gives.
pub(super) fn names(directory: &Path) -> Result<Vec<String>, CtlError> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        result => result.map_err(CtlError::file("read", directory))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(CtlError::file("read", directory))?.file_name());
    }
    let mut names: Vec<String> = names.into_iter().map(OsString::into_string).filter_map(Result::ok).collect();
    names.sort();
    Ok(names)
}
