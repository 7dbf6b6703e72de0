//! The runtime's configuration file, changed for one case and put back.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where a package installs it.
pub const DEFAULT: &str = "/usr/share/defaults/kata-containers/configuration.toml";
/// Where an administrator overrides it.
pub const OVERRIDE: &str = "/etc/kata-containers/configuration.toml";

/// The file that the runtime reads while the suites run.
#[derive(Debug)]
pub struct KataConfig {
    path: PathBuf,
    base: String,
}

impl KataConfig {
    /// The file at `path`; the runtime must look there before it looks at [`DEFAULT`].
    ///
    /// `dist` is the directory that holds the installation instead of `/`; the agent's deadlines are multiplied by
    /// `slowness`.
    ///
    /// # Errors
    /// When the installation's own file is missing or is no TOML.
    pub fn at(path: &Path, dist: Option<&Path>, slowness: u32) -> Result<Self> {
        let installed = match dist {
            Some(dist) => dist.join(DEFAULT.trim_start_matches('/')),
            None => PathBuf::from(DEFAULT),
        };
        let text = fs::read_to_string(&installed).with_context(|| format!("Cannot read {}", installed.display()))?;
        let base = match dist {
            Some(dist) => relocate(&text, dist)?,
            None => text,
        };
        let timeout = |limit: u32, most: u32| limit.saturating_mul(slowness).min(most).to_string();
        let (answer, create) = (timeout(30_000, 600_000), timeout(60, 3600));
        let deadlines =
            [("agent.kata.reconnect_timeout_ms", answer.as_str()), ("agent.kata.create_container_timeout", &create)];
        Ok(Self { path: path.to_owned(), base: change(&base, &deadlines)? })
    }

    /// Writes the unchanged configuration.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self) -> Result<()> {
        write(&self.path, &self.base)
    }

    /// A string value of the unchanged configuration.
    ///
    /// # Errors
    /// When it has no such key.
    pub fn value(&self, section: &str, key: &str) -> Result<String> {
        let document: toml::Table = self.base.parse().context("The installed configuration is no TOML")?;
        let value = document.get("hypervisor").and_then(|table| table.get(section)).and_then(|table| table.get(key));
        let value = value.and_then(toml::Value::as_str).map(str::to_owned);
        value.with_context(|| format!("The installed configuration has no hypervisor.{section}.{key}"))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the installed file with `changes` (`section.key`, TOML value) until the answer is dropped.
    ///
    /// # Errors
    /// When the installed file has no such section or the file cannot be written.
    pub fn with(&self, changes: &[(&str, &str)]) -> Result<Changed> {
        self.replace(&change(&self.base, changes)?)
    }

    /// Writes `content` until the answer is dropped.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn replace(&self, content: &str) -> Result<Changed> {
        let before = fs::read(&self.path).ok();
        write(&self.path, content)?;
        Ok(Changed { path: self.path.clone(), before })
    }
}

fn write(path: &Path, content: &str) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("Cannot create {}", parent.display()))?;
    }
    fs::write(path, content).with_context(|| format!("Cannot write {}", path.display()))
}

/// The configuration of an installation below `dist`.
fn relocate(text: &str, dist: &Path) -> Result<String> {
    let document: toml::Table = text.parse().context("The configuration is no TOML")?;
    let table = document.get("hypervisor").and_then(|table| table.get("dragonball"));
    let mut changes = Vec::new();
    for key in ["kernel", "image"] {
        let path = table.and_then(|table| table.get(key)).and_then(toml::Value::as_str);
        let path = path.with_context(|| format!("The configuration has no hypervisor.dragonball.{key}"))?;
        let moved = dist.join(path.trim_start_matches('/')).display().to_string();
        changes.push((format!("hypervisor.dragonball.{key}"), toml::Value::String(moved).to_string()));
    }
    let changes: Vec<(&str, &str)> = changes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    change(text, &changes)
}

/// Sets `section.key` to a TOML value for each of `changes`.
fn change(installed: &str, changes: &[(&str, &str)]) -> Result<String> {
    let mut document: toml::Table = installed.parse().context("The installed configuration is no TOML")?;
    for (name, value) in changes {
        let value: toml::Table =
            format!("value = {value}").parse().with_context(|| format!("{value} is no TOML value"))?;
        let mut names: Vec<&str> = name.split('.').collect();
        let key = names.pop().unwrap_or_default();
        let mut table = &mut document;
        for section in names {
            let entry = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            match entry {
                toml::Value::Table(inner) => table = inner,
                _ => bail!("{section} of {name} is no section"),
            }
        }
        table.extend(value.into_iter().map(|(_, value)| (key.to_owned(), value)));
    }
    Ok(document.to_string())
}

/// Puts the file back when it is dropped.
#[derive(Debug)]
pub struct Changed {
    path: PathBuf,
    before: Option<Vec<u8>>,
}

impl Drop for Changed {
    fn drop(&mut self) {
        let restored = match &self.before {
            Some(content) => fs::write(&self.path, content),
            None => fs::remove_file(&self.path),
        };
        if let Err(error) = restored {
            eprintln!("Cannot put {} back: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_replaces_one_value_and_keeps_the_others() {
        let installed =
            "[hypervisor.dragonball]\nkernel = \"/k\"\ndefault_memory = 256\n[runtime]\nenable_debug = false\n";
        let changed =
            change(installed, &[("hypervisor.dragonball.default_memory", "0"), ("agent.kata.x", "\"y\"")]).unwrap();
        let document: toml::Table = changed.parse().unwrap();
        assert_eq!(document["hypervisor"]["dragonball"]["default_memory"].as_integer(), Some(0));
        assert_eq!(document["hypervisor"]["dragonball"]["kernel"].as_str(), Some("/k"));
        assert_eq!(document["runtime"]["enable_debug"].as_bool(), Some(false));
        assert_eq!(document["agent"]["kata"]["x"].as_str(), Some("y"));
    }

    #[test]
    fn an_installation_elsewhere_is_found_there() {
        let text = "[hypervisor.dragonball]\nkernel = \"/usr/k\"\nimage = \"/usr/i\"\ndefault_memory = 256\n";
        let moved: toml::Table = relocate(text, Path::new("/dist")).unwrap().parse().unwrap();
        assert_eq!(moved["hypervisor"]["dragonball"]["kernel"].as_str(), Some("/dist/usr/k"));
        assert_eq!(moved["hypervisor"]["dragonball"]["image"].as_str(), Some("/dist/usr/i"));
        assert_eq!(moved["hypervisor"]["dragonball"]["default_memory"].as_integer(), Some(256));
    }

    #[test]
    fn the_file_is_as_before_when_the_case_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("etc/configuration.toml");
        let config = KataConfig { path: path.clone(), base: String::new() };
        let outer = config.replace("a = 1\n").unwrap();
        let inner = config.replace("a = 2\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "a = 2\n");
        drop(inner);
        assert_eq!(fs::read_to_string(&path).unwrap(), "a = 1\n");
        drop(outer);
        assert!(!path.exists());
    }
}
