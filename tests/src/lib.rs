//! End-to-end suites that drive a real containerd on the machine under test.
//!
//! A case is a function that drives containerd by `ctr`, as a user would, or by the CRI, as a kubelet would. Every case runs
//! between two looks at the machine ([`leftovers`]): what is there afterwards and was not
//! there before fails the case, whatever else it found.

pub mod cases;
pub mod containerd;
pub mod context;
pub mod cri;
pub mod ctr;
mod daemon;
pub mod debian_kernel;
pub mod docker;
pub mod docker_programs;
pub mod event;
pub mod guest_program;
pub mod harness;
pub mod kata_config;
pub mod leftovers;
pub mod loop_device;
pub mod observe;
pub mod pidfd;
pub mod process;
pub mod pty;
pub mod second_chance;
pub mod stack;
pub mod task_api;
