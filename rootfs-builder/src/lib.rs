//! Builds the guest image and OCI archives, reproducibly and without a registry.
//!
//! Both outputs are a function of their inputs alone: times, owners, identifiers and
//! the order of files are fixed, so that equal inputs give equal bytes on any machine
//! with the same `mkfs.erofs`.

pub mod archive;
mod busybox;
pub mod elf;
mod error;
pub mod guest_image;
pub mod layer;
pub mod progress;
pub mod recipe;

pub use error::Error;
