//! One thing that is left behind.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use journal::{Effect, JournalError, ProcessId};
use serde::Serialize;

use crate::error::chain;
use crate::paths::Paths;

use super::search;

/// What is younger may be half made: whoever makes it has not written down yet that he is there.
const YOUNG: Duration = Duration::from_secs(60);

/// Something that no living sandbox owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub(super) enum Finding {
    /// The journal of a pod process that has ended.
    Journal { namespace: String, id: String, pid: Option<i32>, effects: Vec<Effect> },
    /// A mount that no journal knows.
    Mount { target: PathBuf },
    /// A sandbox's state directory without a journal.
    State { path: PathBuf },
    /// A sandbox's sockets without its state.
    Sockets { path: PathBuf },
    /// An unused cgroup that this runtime made.
    Cgroup { path: PathBuf },
    /// An empty directory.
    Directory { path: PathBuf },
}

impl Finding {
    /// Removes it from the state directory `root`, every step whatever the others do; what is gone is no failure.
    ///
    /// # Errors
    ///
    /// A text for each thing that stays.
    pub(super) fn remove(&self, root: &Path) -> Result<(), Vec<String>> {
        let undo = |effect: Effect| effect.undo().map_err(|error| vec![chain(&error)]);
        match self {
            Self::Journal { namespace, id, .. } => replay(root, namespace, id),
            Self::Mount { target } => undo(Effect::Mount { target: target.clone() }),
            Self::State { path } => remove_state(root, path),
            // A sandbox of that name may have begun meanwhile.
            Self::Sockets { path } if search::owns_sockets(root, path) => Ok(()),
            Self::Sockets { path } => undo(Effect::Tree { path: path.clone() }).map(|()| remove_parents(root, path)),
            Self::Cgroup { path } => undo(Effect::Cgroup { path: path.clone() }),
            Self::Directory { path } => {
                undo(Effect::Directory { path: path.clone() }).map(|()| remove_parents(root, path))
            }
        }
    }
}

/// Replays a journal if it still is that of a pod process which has ended.
fn replay(root: &Path, namespace: &str, id: &str) -> Result<(), Vec<String>> {
    let paths = Paths::new(root, namespace, id).map_err(|error| vec![error.to_string()])?;
    let journal = paths.journal();
    let ended =
        |owners: &[ProcessId]| !owners.iter().any(ProcessId::is_alive) && (!owners.is_empty() || !is_young(&journal));
    let name = |error: JournalError| vec![chain(&error)];
    let Some(replay) = journal::replay_if(&journal, ended).map_err(name)? else { return Ok(()) };
    if replay.failures.is_empty() {
        paths.remove_empty();
        return Ok(());
    }
    Err(replay.failures.iter().map(|failure| chain(failure)).collect())
}

/// What the state directory of a sandbox holds besides its journal.
pub(super) const STATE: &[&str] = &["mounts", "shared", "console.log"];

/// Removes a state directory with what the runtime puts there, and the parents that are empty then.
fn remove_state(root: &Path, path: &Path) -> Result<(), Vec<String>> {
    let mut failures = Vec::new();
    for name in STATE {
        let path = path.join(name);
        let effect = if path.is_dir() { Effect::Directory { path } } else { Effect::File { path } };
        failures.extend(effect.undo().err().map(|error| chain(&error)));
    }
    failures.extend(Effect::Directory { path: path.to_owned() }.undo().err().map(|error| chain(&error)));
    if failures.is_empty() {
        remove_parents(root, path);
        return Ok(());
    }
    Err(failures)
}

/// Removes the parents that are empty now, up to the root; the others refuse.
fn remove_parents(root: &Path, path: &Path) {
    let parents = path.ancestors().skip(1).take_while(|parent| parent.starts_with(root));
    parents.take_while(|parent| std::fs::remove_dir(parent).is_ok()).for_each(drop);
}

/// Whether a file or directory was changed a short while ago. One that cannot be examined is gone, or not ours to
/// judge.
pub(super) fn is_young(path: &Path) -> bool {
    let modified = std::fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age < YOUNG))
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Journal { namespace, id, pid, effects, .. } => {
                write!(formatter, "sandbox {namespace}/{id}")?;
                match pid {
                    Some(pid) => write!(formatter, ", whose pod process {pid} has ended")?,
                    None => write!(formatter, ", whose pod process never began")?,
                }
                let kinds = kinds(effects);
                if kinds.is_empty() { Ok(()) } else { write!(formatter, ", with {kinds}") }
            }
            Self::Mount { target } => write!(formatter, "mount {}", target.display()),
            Self::State { path } => write!(formatter, "state directory {} without a journal", path.display()),
            Self::Sockets { path } => write!(formatter, "sockets {} of no sandbox", path.display()),
            Self::Cgroup { path } => write!(formatter, "unused cgroup {}", path.display()),
            Self::Directory { path } => write!(formatter, "empty directory {}", path.display()),
        }
    }
}

/// How many effects there are of each kind, as the journal names them.
fn kinds(effects: &[Effect]) -> String {
    let mut counts = BTreeMap::<String, usize>::new();
    for effect in effects.iter().filter(|effect| !matches!(effect, Effect::Process { .. })) {
        let value = serde_json::to_value(effect).unwrap_or_default();
        *counts.entry(value["kind"].as_str().unwrap_or("effect").to_owned()).or_default() += 1;
    }
    let texts: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} × {kind}")).collect();
    texts.join(", ")
}
