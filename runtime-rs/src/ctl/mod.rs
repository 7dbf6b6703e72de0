//! `kata-ctl`, the administrator's tool: what runs on this node, what it holds, what is left behind, and whether the
//! node is fit for it. One file for each command.
//!
//! It looks from outside: at state directories, at `/proc`, and at the Task API that containerd uses as well. So it
//! works with pods of another version, costs them nothing while nobody asks, and changes nothing unless it is told to.

mod check;
mod cleanup;
mod containerd;
mod exec;
mod list;
mod logs;
mod metrics;
mod node;
mod process;
mod survey;
mod table;
mod task;
mod timeline;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::chain;

/// Looks into the container runtime io.containerd.kata.v2.
#[derive(Debug, Parser)]
#[command(name = "kata-ctl", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the sandboxes of this node with their containers and what they hold.
    ///
    /// MEMORY is what the guest has, RESIDENT what of it the host has given, and PROCESS the pod process's own share
    /// (PSS), without guest memory.
    #[command(
        after_help = "Examples:\n  kata-ctl list\n  kata-ctl list --json | jq '.[] | select(.state == \"dead\")'"
    )]
    List(list::ListArgs),
    /// Show the sandboxes by what they hold of the host's memory, the largest first.
    #[command(after_help = "Examples:\n  kata-ctl top\n  kata-ctl top --watch 5")]
    Top(list::TopArgs),
    /// Say whether this node is fit to run pods in virtual machines, and what to do where it is not.
    ///
    /// The exit code is 1 when there is an error; a warning is something that works with less than it could.
    #[command(
        after_help = "Examples:\n  kata-ctl check\n  kata-ctl check --json | jq '.[] | select(.level != \"ok\")'"
    )]
    Check(check::Args),
    /// Tell containerd's CRI of this runtime, and take that back.
    ///
    /// `ctr` and `nerdctl` need none of it: they name the runtime by its type, io.containerd.kata.v2.
    #[command(
        after_help = "Examples:\n  kata-ctl containerd show\n  kata-ctl containerd add && systemctl restart containerd"
    )]
    Containerd(containerd::Args),
    /// Execute a command, or a shell, in a sandbox's guest itself, beside its containers, as root.
    ///
    /// Pods allow it that were started with `debug_console_enabled` in the [agent.kata] table of the configuration. The
    /// exit code is the command's, 125 when it was not executed.
    #[command(after_help = "Examples:\n  kata-ctl exec redis\n  kata-ctl exec k8s.io/8a1f… dmesg | tail\n  \
        kata-ctl exec --tty redis top")]
    Exec(exec::Args),
    /// Show what a sandbox's guest wrote to its console.
    ///
    /// There is a log with `enable_debug` in the [hypervisor.dragonball] table of the configuration, while the sandbox
    /// runs.
    #[command(after_help = "Examples:\n  kata-ctl logs redis\n  kata-ctl logs --follow k8s.io/8a1f…")]
    Logs(logs::Args),
    /// Print what the sandboxes of this node hold, as Prometheus reads it, or serve it on a socket.
    #[command(after_help = "Examples:\n  kata-ctl metrics > /var/lib/node_exporter/kata.prom\n  \
        kata-ctl metrics --listen unix:/run/kata-metrics.sock &\n  curl --unix-socket /run/kata-metrics.sock http://localhost/metrics")]
    Metrics(metrics::Args),
    /// Show what no living sandbox owns any more, and remove it with --yes.
    ///
    /// Looked for are sandboxes whose pod process has ended, mounts, state directories and sockets below the state
    /// directory that no journal knows, and unused cgroups that this runtime made. What is younger than a minute may be
    /// half made and is left alone. The exit code is 0 when nothing is left, 1 when something is, and 2 when that cannot be told.
    #[command(after_help = "Examples:\n  kata-ctl cleanup\n  kata-ctl cleanup --yes")]
    Cleanup(cleanup::Args),
    /// Show where the time of a pod's start went, hop by hop.
    ///
    /// The runtime writes one file per pod, when the pod ends, to the directory that `timeline_dir` in the [runtime]
    /// table of its configuration names.
    #[command(
        after_help = "Examples:\n  kata-ctl timeline redis\n  kata-ctl timeline /tmp/timeline/redis.json --svg redis.svg"
    )]
    Timeline(timeline::Args),
}

/// Why a command did not do what it was to do.
#[derive(Debug, thiserror::Error)]
enum CtlError {
    #[error(transparent)]
    Timeline(#[from] timeline::ShowError),
    #[error(transparent)]
    Exec(#[from] exec::ExecError),
    #[error(transparent)]
    NoConsole(#[from] logs::NoConsole),
    #[error(transparent)]
    Containerd(#[from] containerd::ContainerdError),
    #[error(transparent)]
    Journal(#[from] journal::JournalError),
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("no sandbox {what:?} has its state in {}; see `kata-ctl list`", root.display())]
    NoSandbox { what: String, root: PathBuf },
    #[error("{0:?} is the id of {n} sandboxes: give one of {all}", n = .1.len(), all = .1.join(", "))]
    Ambiguous(String, Vec<String>),
    #[error("cannot print JSON")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    System(#[from] std::io::Error),
}

impl CtlError {
    /// A [`CtlError::File`] for this path.
    fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { action, path, source }
    }
}

/// Runs the command that the arguments of this process name.
#[must_use]
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let result = match &command {
        Command::List(args) => list::list(args),
        Command::Top(args) => list::top(args),
        Command::Check(args) => check::run(args),
        Command::Containerd(args) => containerd::run(args),
        Command::Metrics(args) => metrics::run(args),
        Command::Exec(args) => exec::run(args),
        Command::Logs(args) => logs::run(args),
        Command::Cleanup(args) => cleanup::run(args),
        Command::Timeline(args) => timeline::run(args),
    };
    match result {
        Ok(code) => code,
        // Whoever reads the output wants no more of it: `kata-ctl list | head -n 1`.
        Err(CtlError::System(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kata-ctl: {}", chain(&error));
            ExitCode::from(if matches!(command, Command::Exec(_)) { exec::NOT_EXECUTED } else { FAILED })
        }
    }
}

/// The exit code of a command that could not do its work; 1 is an answer: something is left, something is wrong.
const FAILED: u8 = 2;

/// What runs the commands that ask pod processes.
fn runtime() -> Result<tokio::runtime::Runtime, CtlError> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}
