//! `kata-ctl list` and `kata-ctl top`: the sandboxes of this node, and what they hold.

use std::cmp::Reverse;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::node::StateDir;
use super::survey::{Seen, State, survey};
use super::table::{Table, size};
use super::task::Ask;
use super::{CtlError, runtime};

/// What `kata-ctl list` takes.
#[derive(Debug, clap::Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    state: StateDir,
    /// Print JSON: [{namespace, id, state, pid, usage, containers}], sizes in bytes.
    #[arg(long)]
    json: bool,
}

/// What `kata-ctl top` takes.
#[derive(Debug, clap::Args)]
pub(super) struct TopArgs {
    #[command(flatten)]
    state: StateDir,
    /// Look again every so many seconds, until interrupted.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
    /// Print JSON as `list` does, a line for each look.
    #[arg(long)]
    json: bool,
}

pub(super) fn list(args: &ListArgs) -> Result<ExitCode, CtlError> {
    let seen = runtime()?.block_on(survey(args.state.root.clone(), Ask::State))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&seen)?)?;
    } else {
        write!(out, "{}", table(&seen))?;
    }
    let dead = seen.iter().filter(|seen| seen.state == State::Dead).count();
    if dead > 0 && std::io::stderr().is_terminal() {
        eprintln!("dead: {dead}; containerd deletes what it knows of, `kata-ctl cleanup` shows what is left then");
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn top(args: &TopArgs) -> Result<ExitCode, CtlError> {
    runtime()?.block_on(async {
        let Some(seconds) = args.watch else {
            look(args, false).await?;
            return Ok(ExitCode::SUCCESS);
        };
        let mut again = tokio::time::interval(Duration::from_secs(seconds));
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        loop {
            tokio::select! {
                _ = again.tick() => look(args, true).await?,
                _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
                _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            }
        }
    })
}

/// Looks once and prints it: over what was printed before, on a terminal.
async fn look(args: &TopArgs, again: bool) -> Result<(), CtlError> {
    /// The cursor to the upper left, and nothing below it (ECMA-48, CUP and ED).
    const CLEAR: &str = "\x1b[H\x1b[J";
    let mut seen = survey(args.state.root.clone(), Ask::State).await?;
    seen.sort_by_key(|seen| Reverse(seen.memory()));
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&seen)?)?;
    } else {
        let clear = if again && out.is_terminal() { CLEAR } else { "" };
        let total: u64 = seen.iter().map(Seen::memory).sum();
        let running = seen.iter().filter(|seen| seen.state == State::Running).count();
        write!(out, "{clear}{running} sandboxes hold {}\n{}", size(total), table(&seen))?;
        if again && clear.is_empty() {
            writeln!(out)?;
        }
    }
    Ok(out.flush()?)
}

fn table(seen: &[Seen]) -> Table {
    let mut table =
        Table::new(&["NAMESPACE", "SANDBOX", "STATE", "PID", "VCPUS", "MEMORY", "RESIDENT", "PROCESS", "CONTAINERS"]);
    for seen in seen {
        let usage = seen.usage.as_ref();
        let guest = usage.and_then(|usage| usage.guest);
        let unknown = || "-".to_owned();
        table.row([
            seen.namespace.clone(),
            seen.id.clone(),
            seen.state.word().to_owned(),
            seen.pid.map_or_else(unknown, |pid| pid.to_string()),
            usage.filter(|usage| usage.vcpus > 0).map_or_else(unknown, |usage| usage.vcpus.to_string()),
            guest.map_or_else(unknown, |guest| size(guest.size)),
            guest.map_or_else(unknown, |guest| size(guest.resident)),
            usage.map_or_else(unknown, |usage| size(usage.own_pss)),
            containers(seen),
        ]);
    }
    table
}

fn containers(seen: &Seen) -> String {
    let Some(containers) = &seen.containers else {
        return if seen.state == State::Running { "no answer".to_owned() } else { "-".to_owned() };
    };
    let texts: Vec<String> = containers.iter().map(|it| format!("{} {}", it.id, it.state)).collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(", ") }
}
