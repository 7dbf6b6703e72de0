//! docker's programs from Debian's unstable suite: its stable one has an older docker.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use cache::{Cache, Key};
use debian::Suite;

const SUITE: &str = "sid";
/// Daemon, client, and what is the first process of containers that ask for one.
const PACKAGES: [&str; 3] = ["docker.io", "docker-cli", "tini-static"];
/// Programs in the packages, and what docker calls them.
const PROGRAMS: [(&str, &str); 4] = [
    ("usr/sbin/dockerd", "dockerd"),
    ("usr/sbin/docker-proxy", "docker-proxy"),
    ("usr/bin/docker", "docker"),
    ("usr/bin/tini-static", "docker-init"),
];

/// The directory with the newest programs, from the cache or fetched now.
///
/// # Errors
/// When the packages cannot be had, or are not as they were.
pub fn newest(cache: &Cache) -> Result<PathBuf> {
    let suite = Suite::open(cache, SUITE)?;
    let versions = suite.versions(&PACKAGES)?;
    let key =
        PACKAGES.iter().zip(&versions).fold(Key::new("1"), |key, (name, version)| key.with(name, version.as_bytes()));
    cache.get_or_build("docker", &key, |entry| -> Result<()> {
        let whole = tempfile::tempdir_in(entry).context("Cannot make a directory")?;
        for package in suite.download(&PACKAGES)? {
            debian::unpack(&package, whole.path())?;
        }
        for (path, name) in PROGRAMS {
            let program = whole.path().join(path);
            fs::rename(&program, entry.join(name)).with_context(|| format!("Cannot move {}", program.display()))?;
        }
        Ok(())
    })
}
