//! The guest kernel: what it is made of and why, and its build.
//!
//! A kernel is a [`profile::Profile`]: a list of [`fragment::Fragment`]s, data files in which every symbol has a
//! value and a reason. [`build::Builder`] turns a profile into an uncompressed `vmlinux` with a PVH entry from
//! Debian's kernel source, and refuses to answer with one that lacks something that was asked for.

pub mod build;
pub mod dotconfig;
pub mod fragment;
pub mod image;
pub mod make;
pub mod profile;
pub mod source;
