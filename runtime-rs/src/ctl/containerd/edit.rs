//! Changes of containerd's configuration that leave every other line of it as it is.

use std::path::Path;

use toml::de::DeTable;

use super::config::{MERGING_VERSION, names_runtimes, plugin};
use crate::RUNTIME_TYPE;

/// What a RuntimeClass names.
pub(super) const HANDLER: &str = "kata";
const BEGIN: &str = "# BEGIN kata-ctl: removed by `kata-ctl containerd remove`";
const END: &str = "# END kata-ctl";
/// At the end of a line that is ours as a whole.
const MARK: &str = "# kata-ctl";

/// The runtime's table for a file of this version, whose text is `text` otherwise.
///
/// Annotations of a pod reach a runtime only as far as this names them.
pub(super) fn snippet(text: &str, version: i64, runtime_path: Option<&Path>) -> String {
    let runtime_path = runtime_path.map(|path| format!("  runtime_path = {}\n", quote(&path.to_string_lossy())));
    let plugin = plugin(version);
    let runtime = format!(
        "[plugins.{plugin:?}.containerd.runtimes.{HANDLER}]\n  runtime_type = \"{RUNTIME_TYPE}\"\n{}  \
         pod_annotations = [\"io.katacontainers.*\"]\n  privileged_without_host_devices = true\n",
        runtime_path.unwrap_or_default(),
    );
    if takes_drop_in(version) || names_runtimes(text, version) {
        return runtime;
    }
    format!(
        "{runtime}# Before containerd 2.0 there are no other runtimes than those that are named.\n\
         [plugins.{plugin:?}.containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n"
    )
}

/// A whole file with it.
pub(super) fn drop_in(version: i64, runtime_path: Option<&Path>) -> String {
    format!("# Made by `kata-ctl containerd add`.\nversion = {version}\n\n{}", snippet("", version, runtime_path))
}

/// The main file with the runtime at its end; it replaces the one that was put there before.
pub(super) fn with_block(text: &str, version: i64, runtime_path: Option<&Path>) -> String {
    let mut text = without_block(text);
    // A file of ours alone says which version it has.
    let head = if text.trim().is_empty() { format!("version = {version}\n") } else { String::new() };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    let snippet = snippet(&text, version, runtime_path);
    format!("{text}{BEGIN}\n{head}{snippet}{END}\n")
}

/// The main file without what [`with_block`] put there.
pub(super) fn without_block(text: &str) -> String {
    let Some(begin) = text.find(BEGIN) else { return text.to_owned() };
    let Some(end) = text[begin..].find(END).map(|at| begin + at + END.len()) else { return text.to_owned() };
    let rest = text[end..].strip_prefix('\n').unwrap_or_else(|| &text[end..]);
    format!("{}{rest}", &text[..begin])
}

/// The main file with `path` among its imports.
pub(super) fn with_import(text: &str, path: &Path) -> Option<String> {
    let quoted = quote(&path.to_string_lossy());
    match imports(text)? {
        // Keys of the whole file stand before its first table, so the first line is always right.
        None => Some(format!("imports = [{quoted}] {MARK}\n{text}")),
        Some((start, elements)) => {
            let separator = if elements.is_empty() { "" } else { ", " };
            let behind = text.get(start..)?.find('[').map(|at| start + at + 1)?;
            Some(format!("{}{quoted}{separator}{}", &text[..behind], &text[behind..]))
        }
    }
}

/// The main file without `path` among its imports.
pub(super) fn without_import(text: &str, path: &Path) -> Option<String> {
    let line = format!("imports = [{}] {MARK}\n", quote(&path.to_string_lossy()));
    if let Some(at) = text.find(&line) {
        return Some(format!("{}{}", &text[..at], &text[at + line.len()..]));
    }
    let Some((_, elements)) = imports(text)? else { return Some(text.to_owned()) };
    let Some((start, mut end, _)) = elements.into_iter().find(|(_, _, value)| Path::new(value) == path) else {
        return Some(text.to_owned());
    };
    // The comma behind it goes with it.
    let rest = text.get(end..)?;
    let trimmed = rest.trim_start();
    if let Some(behind) = trimmed.strip_prefix(',') {
        end += rest.len() - behind.strip_prefix(' ').unwrap_or(behind).len();
    }
    Some(format!("{}{}", &text[..start], &text[end..]))
}

/// Where the list of imports begins, and where its elements are; nothing if there is no such list.
type Imports = Option<(usize, Vec<(usize, usize, String)>)>;

/// Nothing for a text that is no TOML, or whose imports are no list of strings.
fn imports(text: &str) -> Option<Imports> {
    let table = DeTable::parse(text).ok()?;
    let Some((_, value)) = table.get_ref().iter().find(|(key, _)| *key.get_ref() == "imports") else {
        return Some(None);
    };
    let elements = value.get_ref().as_array()?.iter().map(|element| {
        let span = element.span();
        Some((span.start, span.end, element.get_ref().as_str()?.to_owned()))
    });
    Some(Some((value.span().start, elements.collect::<Option<Vec<_>>>()?)))
}

fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Whether a file of this version takes the runtime as a drop-in.
pub(super) fn takes_drop_in(version: i64) -> bool {
    version >= MERGING_VERSION
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/etc/containerd/conf.d/kata.toml";

    #[test]
    fn a_block_comes_once_and_goes_without_a_trace() {
        for text in ["version = 2\n[grpc]\n  gid = 0\n", "# a comment without an end of line", ""] {
            let once = with_block(text, 2, None);
            assert!(once.parse::<toml::Table>().is_ok(), "{once}");
            assert_eq!(with_block(&once, 2, None), once);
            assert_eq!(without_block(&once).trim_end(), text.trim_end());
        }
        let runtimes = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.crun]\nruntime_type = \"crun\"\n";
        assert!(with_block("version = 2\n", 2, None).contains("runtimes.runc]"));
        assert!(!with_block(&format!("version = 2\n{runtimes}"), 2, None).contains("runtimes.runc]"));
        let moved = with_block(&with_block("version = 2\n", 2, None), 2, Some(Path::new("/opt/kata/bin/shim")));
        assert!(moved.contains("runtime_path = \"/opt/kata/bin/shim\"") && moved.matches(HANDLER).count() > 1);
        assert_eq!(without_block(&moved), "version = 2\n");
    }

    #[test]
    fn an_import_comes_and_goes_and_the_others_stay() {
        for text in [
            "version = 3\n[grpc]\n  gid = 0\n",
            "version = 3\nimports = [ \"/a/*.toml\" ] # mine\n",
            "imports = [\n  '/a/*.toml', # one\n  \"/b\",\n]\nversion = 3\n",
            "version = 3\nimports = []\n",
        ] {
            let with = with_import(text, Path::new(PATH)).unwrap();
            let table: toml::Table = with.parse().unwrap();
            let first = table["imports"].as_array().unwrap()[0].as_str().unwrap().to_owned();
            assert_eq!((first.as_str(), table["version"].as_integer()), (PATH, Some(3)), "{with}");
            assert_eq!(without_import(&with, Path::new(PATH)).unwrap(), text);
        }
        assert_eq!(with_import("imports = 7\n", Path::new(PATH)), None);
        assert_eq!(without_import("version = 3\n", Path::new(PATH)).unwrap(), "version = 3\n");
    }
}
