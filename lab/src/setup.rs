//! Snapshots of machines with more in them: files pushed and commands run once, and then restored as often as needed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process;
use std::time::SystemTime;

use cache::{Cache, Key};
use tool::{io, run};

use crate::command::{Command, Input};
use crate::error::Error;
use crate::machine::Machine;
use crate::prepare::{Prepared, prepare, save};
use crate::progress::Progress;
use crate::qemu::{End, Start};
use crate::rundir::RunDir;
use crate::snapshot::Snapshot;

/// Machines with a setup that are kept, the longest unused go first: each takes half a gigabyte.
const KEPT: usize = 6;
const KIND: &str = "lab-setup";
/// Touched at each use.
const USED: &str = "used";

/// What is done in a machine before it is saved. Saved under the hash of the snapshot, all files and all commands: a
/// setup that was done before is restored as fast as a bare snapshot.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    files: Vec<(PathBuf, String)>,
    commands: Vec<Command>,
}

impl Setup {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies a file or directory into the machine, as [`Machine::push`]; all files come before the first command.
    #[must_use]
    pub fn push(mut self, source: impl Into<PathBuf>, target: impl Into<String>) -> Self {
        self.files.push((source.into(), target.into()));
        self
    }

    /// Runs a command, which must succeed.
    #[must_use]
    pub fn run(mut self, command: Command) -> Self {
        self.commands.push(command);
        self
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.commands.is_empty()
    }

    /// Removes the machine saved with this setup from the cache, if there is one.
    ///
    /// # Errors
    /// When it cannot be removed, or a file of the setup cannot be read.
    pub fn forget(&self, snapshot: Snapshot) -> Result<(), Error> {
        let cache = Cache::open()?;
        let name = self.key(&prepare(snapshot)?)?.name();
        cache.retain(KIND, |path| !path.ends_with(&name)).map(drop).map_err(Error::from)
    }

    fn key(&self, base: &Prepared) -> Result<Key, Error> {
        let mut key = Key::new("1").with("base", base.id().as_bytes());
        for (source, target) in &self.files {
            key = with_tree(key.with("target", target.as_bytes()), source, "")?;
        }
        for command in &self.commands {
            key = key.with("command", &serde_json::to_vec(&command.wire).unwrap_or_default());
        }
        Ok(key)
    }

    fn apply(&self, machine: &Machine) -> Result<(), Error> {
        for (source, target) in &self.files {
            machine.push(source, target)?;
        }
        for command in &self.commands {
            machine.run(command, Input::Empty)?.check()?;
        }
        machine.run(&Command::new("sync"), Input::Empty)?.check().map(drop)
    }
}

/// Adds names, modes and contents of all that is at `path`.
fn with_tree(key: Key, path: &Path, name: &str) -> Result<Key, Error> {
    let data =
        if name.is_empty() { fs::metadata(path) } else { fs::symlink_metadata(path) }.map_err(io("find", path))?;
    let key = key.with("name", name.as_bytes()).with("mode", &data.permissions().mode().to_le_bytes());
    if data.is_symlink() {
        let target = fs::read_link(path).map_err(io("read", path))?;
        return Ok(key.with("link", target.as_os_str().as_encoded_bytes()));
    }
    if !data.is_dir() {
        return Ok(key.with_file(path)?);
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(io("list", path))? {
        names.push(entry.map_err(io("list", path))?.file_name());
    }
    names.sort();
    names.iter().try_fold(key, |key, inside| {
        let name = format!("{name}/{}", inside.to_string_lossy());
        with_tree(key, &path.join(inside), &name)
    })
}

/// Finds a snapshot with a setup in the cache, or makes all that is missing.
pub(crate) fn prepare_with(snapshot: Snapshot, setup: &Setup) -> Result<Prepared, Error> {
    let base = prepare(snapshot)?;
    if setup.is_empty() {
        return Ok(base);
    }
    let cache = Cache::open()?;
    let key = setup.key(&base)?;
    let known = cache.get(KIND, &key).is_some();
    let dir = cache.get_or_build(KIND, &key, |dir| extend(snapshot, &base, setup, dir))?;
    let used = dir.join(USED);
    fs::write(&used, "").map_err(io("write", &used))?;
    if !known {
        forget_unused(&cache)?;
    }
    Ok(base.at(dir))
}

/// Restores a machine whose files are its own, sets it up and saves it.
fn extend(snapshot: Snapshot, base: &Prepared, setup: &Setup, dir: &Path) -> Result<(), Error> {
    let progress = Progress::start(&format!("Setting up a lab machine from the snapshot {snapshot}"), 0);
    let own = base.at(dir.to_owned());
    run("cp", process::Command::new("cp").arg("--sparse=always").args([base.memory(), own.memory()]))?;
    own.create_disk(&base.disk(), "qcow2")?;
    // Setups are made one at a time, under the cache's lock; the name is free.
    let run_dir = RunDir::of(&format!("setup-{snapshot}"))?;
    let plan = own.plan(snapshot, &run_dir, Start::Extend, End::WithThread);
    let machine = Machine::launch(run_dir, &plan)?;
    machine.receive(&base.state())?;
    setup.apply(&machine)?;
    drop(progress);
    save(machine, &own.state())
}

fn forget_unused(cache: &Cache) -> Result<(), Error> {
    let mut entries: Vec<(SystemTime, PathBuf)> = Vec::new();
    let parent = cache.root().join(KIND);
    for entry in fs::read_dir(&parent).map_err(io("list", &parent))? {
        let path = entry.map_err(io("list", &parent))?.path();
        if let Ok(time) = fs::metadata(path.join(USED)).and_then(|data| data.modified()) {
            entries.push((time, path));
        }
    }
    entries.sort();
    let unused: Vec<_> = entries.iter().rev().skip(KEPT).map(|(_, path)| path.as_path()).collect();
    cache.retain(KIND, |path| !unused.contains(&path))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(path: &Path) -> String {
        with_tree(Key::new("1"), path, "").unwrap().name()
    }

    #[test]
    fn a_trees_key_changes_with_whatever_is_pushed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("bin/file");
        fs::create_dir(dir.path().join("bin")).unwrap();
        fs::write(&file, "one").unwrap();
        let mut seen = vec![name(dir.path())];
        assert_eq!(name(dir.path()), seen[0]);
        fs::write(&file, "two").unwrap();
        seen.push(name(dir.path()));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        seen.push(name(dir.path()));
        std::os::unix::fs::symlink("file", dir.path().join("bin/link")).unwrap();
        seen.push(name(dir.path()));
        fs::rename(dir.path().join("bin"), dir.path().join("sbin")).unwrap();
        seen.push(name(dir.path()));
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count);
    }
}
