//! containerd's configuration, as far as it says which runtimes the CRI has.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::ContainerdError;
use crate::RUNTIME_TYPE;

/// A larger file is refused (bytes): a configuration has a few KiB.
const MAX_FILE: u64 = 4 << 20;
/// The first version whose drop-ins add to a plugin's tables. Only containerd from 2.0 on reads it; before that, a
/// drop-in that names a plugin replaced all that the main file says of it.
pub(super) const MERGING_VERSION: i64 = 3;

/// What a main file that did not exist gets: every containerd since 1.3 reads it.
const NEW_VERSION: i64 = 2;
/// What containerd without a main file imports from 2.2 on; the others then have no files there.
const DEFAULT_IMPORT: &str = "conf.d/*.toml";

/// The main file with those that it imports.
#[derive(Debug, Default)]
pub(in crate::ctl) struct Configuration {
    /// The main file's text; none if there is no such file: containerd's defaults are in force.
    pub(super) text: Option<String>,
    /// The main file's version; the oldest has no key for it. Without a main file it is that of what may be written.
    pub(in crate::ctl) version: i64,
    /// Patterns of other files, as the main file gives them.
    pub(super) imports: Vec<String>,
    /// All that say something of this runtime.
    pub(in crate::ctl) handlers: Vec<Handler>,
    /// Whether the CRI is switched off.
    pub(in crate::ctl) has_no_cri: bool,
}

/// A runtime of the CRI that is this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::ctl) struct Handler {
    /// What a RuntimeClass names.
    pub(in crate::ctl) name: String,
    /// The shim; containerd looks for it in its PATH when this says nothing.
    pub(in crate::ctl) path: Option<PathBuf>,
    /// Where it is set.
    pub(in crate::ctl) file: PathBuf,
}

impl Configuration {
    /// Reads the file `path` of a system whose root is `destdir`, and what it imports.
    ///
    /// # Errors
    ///
    /// [`ContainerdError`]; a missing main file is none.
    pub(in crate::ctl) fn read(destdir: &Path, path: &Path) -> Result<Self, ContainerdError> {
        let text = read_file(&below(destdir, path))?;
        let table = text.as_ref().map(|text| parse(text, path)).transpose()?;
        let mut imports = vec![DEFAULT_IMPORT.to_owned()];
        let mut found = match &table {
            Some(table) => {
                imports = strings(table, "imports");
                Self {
                    version: table.get("version").and_then(Value::as_integer).unwrap_or(1),
                    handlers: handlers(table, path),
                    has_no_cri: disables_cri(table),
                    ..Self::default()
                }
            }
            None => Self { version: NEW_VERSION, ..Self::default() },
        };
        for import in imports.iter().flat_map(|pattern| matches(destdir, path, pattern)) {
            let Some(text) = read_file(&below(destdir, &import))? else { continue };
            found.handlers.extend(handlers(&parse(&text, &import)?, &import));
            if table.is_none() {
                found.version = MERGING_VERSION;
            }
        }
        Ok(Self { text, imports, ..found })
    }

    /// Whether the file imports `path`.
    pub(super) fn imports(&self, main: &Path, path: &Path) -> bool {
        let full = |pattern: &String| absolute(main, pattern);
        self.imports.iter().map(full).any(|pattern| pattern.parent() == path.parent() && name_matches(&pattern, path))
    }
}

/// `path` in a system whose root is `destdir`.
pub(in crate::ctl) fn below(destdir: &Path, path: &Path) -> PathBuf {
    destdir.join(path.strip_prefix("/").unwrap_or(path))
}

/// Nothing if there is no such file.
pub(super) fn read_file(path: &Path) -> Result<Option<String>, ContainerdError> {
    use std::io::Read;
    let failed = |source| ContainerdError::File { action: "read", path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(failed)?,
    };
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(ContainerdError::TooLarge { path: path.to_owned(), limit: MAX_FILE });
    }
    Ok(Some(text))
}

pub(super) fn parse(text: &str, path: &Path) -> Result<Table, ContainerdError> {
    text.parse().map_err(|error: toml::de::Error| {
        let before = text.get(..error.span().unwrap_or(0..0).start).unwrap_or_default();
        let line = 1 + before.matches('\n').count();
        ContainerdError::Syntax { path: path.to_owned(), line, message: error.message().to_owned() }
    })
}

/// The plugin that knows the CRI's runtimes, by the version of the file.
pub(super) fn plugin(version: i64) -> &'static str {
    if version >= MERGING_VERSION { "io.containerd.cri.v1.runtime" } else { "io.containerd.grpc.v1.cri" }
}

/// The runtimes of the CRI in a file of this version.
fn runtimes(table: &Table, version: i64) -> impl Iterator<Item = (&String, &Value)> {
    let mut place = table.get("plugins").and_then(|plugins| plugins.get(plugin(version)));
    for key in ["containerd", "runtimes"] {
        place = place.and_then(|value| value.get(key));
    }
    place.and_then(Value::as_table).into_iter().flatten()
}

/// Whether a text names runtimes at all. In containerd before 2.0 those of the defaults are gone then.
pub(super) fn names_runtimes(text: &str, version: i64) -> bool {
    text.parse().is_ok_and(|table: Table| runtimes(&table, version).next().is_some())
}

fn handlers(table: &Table, file: &Path) -> Vec<Handler> {
    let mut found = Vec::new();
    // A newer containerd reads files of both kinds.
    for version in [2, MERGING_VERSION] {
        for (name, runtime) in runtimes(table, version) {
            if runtime.get("runtime_type").and_then(Value::as_str) == Some(RUNTIME_TYPE) {
                let path = runtime.get("runtime_path").and_then(Value::as_str).filter(|path| !path.is_empty());
                found.push(Handler { name: name.clone(), path: path.map(PathBuf::from), file: file.to_owned() });
            }
        }
    }
    found
}

/// Packages of docker switch it off by `cri`; the full names do the same.
fn disables_cri(table: &Table) -> bool {
    let names = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
    strings(table, "disabled_plugins").iter().any(|name| names.contains(&name.as_str()))
}

fn strings(table: &Table, key: &str) -> Vec<String> {
    let array = table.get(key).and_then(Value::as_array);
    array.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// An import as containerd finds it: from the directory of the file that names it.
fn absolute(main: &Path, pattern: &str) -> PathBuf {
    main.parent().unwrap_or_else(|| Path::new("/")).join(pattern)
}

/// The files that an import names, sorted. Its last part may have asterisks.
fn matches(destdir: &Path, main: &Path, pattern: &str) -> Vec<PathBuf> {
    let pattern = absolute(main, pattern);
    if !pattern.to_string_lossy().contains('*') {
        return vec![pattern];
    }
    let Some(directory) = pattern.parent() else { return Vec::new() };
    let entries = std::fs::read_dir(below(destdir, directory)).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| directory.join(entry.file_name())).collect();
    found.retain(|path| name_matches(&pattern, path));
    found.sort();
    found
}

/// Whether the last part of `path` is what the last part of `pattern` says, in which an asterisk stands for anything.
fn name_matches(pattern: &Path, path: &Path) -> bool {
    let (Some(pattern), Some(name)) = (pattern.file_name(), path.file_name()) else { return false };
    let (pattern, name) = (pattern.to_string_lossy(), name.to_string_lossy());
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        let Some((_, behind)) = name.split_once(part) else { return false };
        name = behind;
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_match_as_a_shell_would() {
        let is = |pattern: &str, name: &str| name_matches(Path::new(pattern), Path::new(name));
        assert!(
            is("/a/*.toml", "/a/kata.toml") && is("*", "x") && is("a*b*c", "a1b2c") && is("kata.toml", "kata.toml")
        );
        assert!(!is("*.toml", "kata.conf") && !is("a*b*c", "ac") && !is("b*", "ab") && !is("kata.toml", "kata"));
    }

    #[test]
    fn the_handler_is_found_in_both_layouts_and_in_imported_files() {
        let root = tempfile::tempdir().unwrap();
        let main = Path::new("/etc/containerd/config.toml");
        let write = |name: &str, text: &str| {
            let path = below(root.path(), Path::new(name));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let names = || {
            let found = Configuration::read(root.path(), main).unwrap();
            found.handlers.into_iter().map(|handler| handler.name).collect::<Vec<_>>()
        };
        assert!(names().is_empty());
        write(
            "/etc/containerd/config.toml",
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.kata]\n\
             runtime_type = 'io.containerd.kata.v2'\n\
             [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n",
        );
        assert_eq!(names(), ["kata"]);
        write("/etc/containerd/config.toml", "version = 3\nimports = ['conf.d/*.toml']\n");
        write(
            "/etc/containerd/conf.d/x.toml",
            "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.safe]\n\
             runtime_type = 'io.containerd.kata.v2'\nruntime_path = '/opt/shim'\n",
        );
        assert_eq!(names(), ["safe"]);
        write("/etc/containerd/conf.d/y.toml", "[plugins\n");
        let error = Configuration::read(root.path(), main).unwrap_err().to_string();
        assert!(error.contains("/etc/containerd/conf.d/y.toml, line 1"), "{error}");
    }
}
