//! `kata-ctl exec`: a command in the guest itself, beside its containers.
//!
//! To the pod process it is one more process of the Task API, in the "container" that stands for the guest: so it has
//! streams, a terminal, signals and an exit status as those of containers have.

mod session;
mod streams;

use std::io::IsTerminal;
use std::process::ExitCode;

use protocols::containerd::ttrpc;

use super::CtlError;
use super::node::{self, StateDir};
use super::task;
use session::Session;
use streams::Fifos;

/// What `kata-ctl exec` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    state: StateDir,
    /// Give the command a terminal; a shell has one wherever this command has.
    #[arg(long, short)]
    tty: bool,
    /// The sandbox: its id, or namespace/id.
    #[arg(value_name = "SANDBOX")]
    what: String,
    /// The command and its arguments; a shell without.
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Why a command was not executed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExecError {
    #[error("sandbox {0} does not serve the Task API; see `kata-ctl list`")]
    Unreachable(String),
    #[error("{0}")]
    Refused(String),
}

impl From<ttrpc::Error> for ExecError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused(status.message),
            error => Self::Refused(format!("the pod process does not answer: {error}")),
        }
    }
}

/// The exit code when the command was not executed, as of docker's exec; any other is the command's own.
pub(super) const NOT_EXECUTED: u8 = 125;

const SHELL: &str = "sh";

pub(super) fn run(args: &Args) -> Result<ExitCode, CtlError> {
    let sandbox = node::find(&args.state.root, &args.what)?;
    let has_terminal = std::io::stdin().is_terminal();
    let terminal = args.tty || args.command.is_empty() && has_terminal;
    let command = if args.command.is_empty() { vec![SHELL.to_owned()] } else { args.command.clone() };
    let executed = super::runtime()?.block_on(async {
        let client = task::connect(&sandbox).await.ok_or_else(|| ExecError::Unreachable(sandbox.name()))?;
        let fifos = Fifos::make(&sandbox.paths, terminal)?;
        Session::new(client, fifos, terminal).execute(&command).await
    });
    // What has not read its input to the end waits for it in a thread, which ends with this process.
    executed.map(|status| ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}
