//! Why an image could not be built.

use std::path::{Path, PathBuf};

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The build cache failed.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// A Debian package could not be had or unpacked.
    #[error(transparent)]
    Debian(#[from] debian::Error),
    /// A file operation failed.
    #[error("Cannot {action} {path}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// The guest agent cannot be PID 1 of an image that holds nothing else.
    #[error("{path} cannot be the guest agent: {reason}. Build it with RUSTFLAGS='-C target-feature=+crt-static'")]
    Agent {
        /// The file that was given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The image is larger than a pod can afford.
    #[error("The guest image is {size} bytes, the limit is {limit}: make the agent smaller (strip it, opt-level s)")]
    TooLarge {
        /// Bytes of the image.
        size: u64,
        /// Bytes that it may have.
        limit: u64,
    },
    /// A program could not be started.
    #[error("Cannot run {program}: {source}. Install the package {package}")]
    Start {
        /// Its name.
        program: &'static str,
        /// The Debian package that holds it.
        package: &'static str,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A program failed.
    #[error("{program} failed: {stderr}")]
    Failed {
        /// Its name.
        program: &'static str,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// An image name is not one that containerd accepts.
    #[error("'{name}' is no image name: give registry/repository:tag, such as docker.io/library/busybox:latest")]
    Name {
        /// The name that was given.
        name: String,
    },
    /// The description of an image could not be put together.
    #[error("Cannot describe the image")]
    Describe(#[from] oci_spec::OciSpecError),
}

/// Turns an operating system's error into [`Error::Io`].
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}
