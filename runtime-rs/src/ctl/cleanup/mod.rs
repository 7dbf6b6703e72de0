//! `kata-ctl cleanup`: what no living sandbox owns, shown, and removed when that is asked.
//!
//! Nothing is left behind as long as containerd calls `delete`. This is for the rest: a node whose containerd was
//! reinstalled with its state, or whose namespace of containers was removed by hand.

mod finding;
mod mounts;
mod search;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::CtlError;
use super::node::StateDir;
use crate::host::cgroup::MOUNT;
use finding::Finding;

/// What uncovers something else is followed by another look, this often at most.
const ROUNDS: usize = 4;

/// What `kata-ctl cleanup` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    state: StateDir,
    /// Where cgroup v2 is mounted.
    #[arg(long, value_name = "DIR", default_value = MOUNT)]
    cgroups: PathBuf,
    /// Remove it; otherwise it is only shown.
    #[arg(long)]
    yes: bool,
    /// Print JSON: {found, removed, failed, left}.
    #[arg(long)]
    json: bool,
}

/// What was found and done.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// At the first look.
    found: Vec<Finding>,
    /// Without failure.
    removed: Vec<Finding>,
    /// Why something of `left` is left.
    failed: BTreeSet<String>,
    /// At the last look.
    left: Vec<Finding>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, CtlError> {
    // Mounts are told by their real paths.
    let root = match std::fs::canonicalize(&args.state.root) {
        Err(error) if error.kind() == ErrorKind::NotFound => args.state.root.clone(),
        result => result.map_err(CtlError::file("find", &args.state.root))?,
    };
    let look = || search::look(&root, &args.cgroups);
    let mut report = Report { found: look()?, ..Report::default() };
    report.left.clone_from(&report.found);
    if args.yes {
        sweep(&mut report, &root, look)?;
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        print(&report, args.yes, &mut out)?;
    }
    Ok(if report.left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Removes what is there, and looks again as long as that helps.
fn sweep(report: &mut Report, root: &Path, look: impl Fn() -> Result<Vec<Finding>, CtlError>) -> Result<(), CtlError> {
    for _ in 0..ROUNDS {
        if report.left.is_empty() {
            break;
        }
        // A failure of an earlier round may be none any more.
        report.failed.clear();
        for finding in &report.left {
            match finding.remove(root) {
                Ok(()) => report.removed.push(finding.clone()),
                Err(failures) => report.failed.extend(failures),
            }
        }
        let left = look()?;
        if left == report.left {
            break;
        }
        report.left = left;
    }
    // What was removed without failure and is there again has not been removed.
    report.removed.retain(|finding| !report.left.contains(finding));
    Ok(())
}

fn print(report: &Report, removed: bool, out: &mut impl Write) -> Result<(), CtlError> {
    if report.found.is_empty() {
        writeln!(out, "Nothing is left behind.")?;
    } else if removed {
        for finding in &report.removed {
            writeln!(out, "removed {finding}")?;
        }
        for failure in &report.failed {
            writeln!(out, "failed: {failure}")?;
        }
        for finding in &report.left {
            writeln!(out, "left: {finding}")?;
        }
    } else {
        for finding in &report.found {
            writeln!(out, "left behind: {finding}")?;
        }
        writeln!(out, "Nothing was changed; `kata-ctl cleanup --yes` removes it.")?;
    }
    Ok(())
}
