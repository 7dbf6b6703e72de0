//! Busybox: one static executable that is many programs, by the names that lead to it.

use std::path::Path;
use std::process::Command;

use crate::error::Error;

/// The names of its programs, sorted and without its own.
pub(crate) fn applets(busybox: &Path) -> Result<Vec<String>, Error> {
    let listed = tool::run("busybox (package busybox-static)", Command::new(busybox).arg("--list"))?;
    let mut names: Vec<String> = String::from_utf8_lossy(&listed).lines().map(str::to_owned).collect();
    names.retain(|name| name != "busybox");
    names.sort();
    Ok(names)
}
