//! A disk of the node for a case: a file behind a loop device.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// A block device that goes when this is dropped.
#[derive(Debug)]
pub struct LoopDevice {
    /// Its node.
    pub path: PathBuf,
}

impl LoopDevice {
    /// Makes `file` a disk.
    ///
    /// # Errors
    /// When the node has no loop devices.
    pub fn new(file: &Path) -> Result<Self> {
        let made =
            Command::new("losetup").args(["--find", "--show"]).arg(file).output().context("Cannot run losetup")?;
        ensure!(made.status.success(), "losetup: {}", String::from_utf8_lossy(&made.stderr).trim());
        Ok(Self { path: PathBuf::from(String::from_utf8(made.stdout)?.trim()) })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A device that is still open goes when it is closed.
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}
