//! Why an image could not be built.

use std::path::PathBuf;

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The build cache failed.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// A Debian package could not be had or unpacked.
    #[error(transparent)]
    Debian(#[from] debian::Error),
    /// A file operation or a program failed.
    #[error(transparent)]
    Tool(#[from] tool::Error),
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
    /// A package does not hold what an image needs of it.
    #[error("The package {package} holds no {file}")]
    Package {
        /// Its name.
        package: &'static str,
        /// What is missing.
        file: &'static str,
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
