//! What was checked, and how long it took.

use std::time::Instant;

use anyhow::{Context, Result};

/// Tells of the checks of one device as they are made.
pub(crate) struct Report {
    device: String,
}

impl Report {
    pub(crate) fn new(device: impl Into<String>) -> Self {
        Self { device: device.into() }
    }

    /// Makes a check and says how it went; an error has the check's name.
    pub(crate) fn check<T>(&mut self, name: &str, check: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = check().with_context(|| format!("{}: {name}", self.device))?;
        println!("{}: {name}: ok ({} ms)", self.device, start.elapsed().as_millis());
        Ok(result)
    }

    /// Says something that has no verdict.
    pub(crate) fn note(&self, text: &str) {
        println!("{}: {text}", self.device);
    }
}
