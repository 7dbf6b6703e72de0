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
}

impl KataConfig {
    /// The file at `path`; the runtime must look there before it looks at [`DEFAULT`].
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
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
        let installed = fs::read_to_string(DEFAULT).with_context(|| format!("Cannot read {DEFAULT}"))?;
        self.replace(&change(&installed, changes)?)
    }

    /// Writes `content` until the answer is dropped.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn replace(&self, content: &str) -> Result<Changed> {
        let before = fs::read(&self.path).ok();
        if let Some(parent) = self.path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("Cannot create {}", parent.display()))?;
        }
        fs::write(&self.path, content).with_context(|| format!("Cannot write {}", self.path.display()))?;
        Ok(Changed { path: self.path.clone(), before })
    }
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
    fn the_file_is_as_before_when_the_case_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("etc/configuration.toml");
        let config = KataConfig::at(&path);
        let outer = config.replace("a = 1\n").unwrap();
        let inner = config.replace("a = 2\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "a = 2\n");
        drop(inner);
        assert_eq!(fs::read_to_string(&path).unwrap(), "a = 1\n");
        drop(outer);
        assert!(!path.exists());
    }
}
