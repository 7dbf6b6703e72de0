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
    /// A program cannot be in the guest image, which has no libraries.
    #[error(
        "{path} cannot be in the guest image: {reason}. Build the agent with RUSTFLAGS='-C target-feature=+crt-static', and \
         take busybox from the package busybox-static"
    )]
    Program {
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
