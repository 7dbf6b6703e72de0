//! The containerd runtime `io.containerd.kata.v2`: each pod in its own virtual machine.
//!
//! containerd executes `containerd-shim-kata-v2 start` ([`start`]), which executes itself once more as the *pod process*
//! ([`pod`]): the process that serves containerd's Task API, owns the virtual machine, and talks to the agent in it.
//! `delete` ([`delete`]) undoes whatever a pod process left behind, from its undo journal.
//!
//! [`run`] is the whole program; it takes the [`machine::Launcher`] that makes virtual machines, so that tests can put
//! a guest of their own behind the same sockets.

pub mod args;
pub mod ctl;
pub mod delete;
pub mod error;
pub mod host;
pub mod info;
pub mod machine;
pub mod network;
pub mod paths;
pub mod pod;
pub mod root_disk;
pub mod sizing;
pub mod spec;
pub mod start;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use args::{Action, Args};
use machine::Launcher;

/// Name that containerd looks the binary up by.
pub const BINARY: &str = "containerd-shim-kata-v2";
/// The runtime type of that name.
pub const RUNTIME_TYPE: &str = "io.containerd.kata.v2";

/// Runs the command that containerd (or `start`) gave. Standard output carries the answer and nothing else.
#[must_use]
pub fn run(arguments: impl Iterator<Item = OsString>, root: &Path, launcher: Arc<dyn Launcher>) -> ExitCode {
    let args = match Args::parse(arguments) {
        Ok(args) => args,
        Err(error) => return fail(&error),
    };
    let result = match args.action {
        Action::Start => start::run(&args, root).map_err(|error| fail(&error)),
        Action::Delete => delete::run(&args, root).map_err(|error| fail(&error)),
        Action::Pod => pod::run(args, root, launcher).map_err(|error| fail(&error)),
        Action::Info => info::run().map_err(|error| fail(&error)),
        Action::Version => {
            println!("{BINARY}:\n  Version: {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Help => {
            println!("{}", args::HELP);
            Ok(())
        }
    };
    result.map_or_else(|code| code, |()| ExitCode::SUCCESS)
}

/// containerd shows both outputs of a command that failed.
fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("{BINARY}: {}", error::chain(error));
    ExitCode::FAILURE
}
