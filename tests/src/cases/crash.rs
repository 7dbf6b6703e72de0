//! `kill -9` of the pod process and of `start` at chosen moments: containerd sees the end, its own
//! commands work, and nothing is left.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::context::{BUSYBOX, Context};
use crate::ctr::Container;
use crate::event::Deadline;
use crate::harness::Case;
use crate::observe::{Events, Journal, pod_process, read_until};
use crate::pidfd::Pidfd;
use crate::process::Running;

pub(super) const CASES: &[Case] = &[
    Case::kata("crash: kill -9 of the pod process at its first side effect leaves nothing", |context| {
        at_step(context, 0)
    }),
    Case::kata("crash: kill -9 of the pod process after a quarter of its start leaves nothing", |context| {
        at_step(context, 1)
    }),
    Case::kata("crash: kill -9 of the pod process in the middle of its start leaves nothing", |context| {
        at_step(context, 2)
    }),
    Case::kata("crash: kill -9 of the pod process at its last side effect leaves nothing", |context| {
        at_step(context, 4)
    }),
    Case::any("crash: kill -9 of the shim when the task is created leaves nothing", when_created),
    Case::any("crash: kill -9 of the shim when the task has started leaves nothing", when_started),
    Case::any("crash: kill -9 of the shim while its container writes leaves nothing", while_writing),
    Case::any("crash: kill -9 of the shim during an exec leaves nothing", during_exec),
    Case::any("crash: kill -9 of the shim when its container has ended leaves nothing", when_ended),
    Case::kata("crash: kill -9 of the pod process when delete begins to undo leaves nothing", when_delete_undoes),
    Case::kata(
        "crash: kill -9 of the pod process when delete has removed the journal leaves nothing",
        when_journal_is_gone,
    ),
    Case::kata("crash: kill -9 of start as soon as it runs leaves nothing", |context| start_at(context, 0)),
    Case::kata("crash: kill -9 of start at the pod process's first side effect leaves nothing", |context| {
        start_at(context, 1)
    }),
    Case::kata("crash: kill -9 of start at the pod process's second side effect leaves nothing", |context| {
        start_at(context, 2)
    }),
    Case::kata("crash: a pod process that nobody connects to ends by itself and leaves nothing", never_connected),
];

/// A start is cut into this many parts.
const PARTS: usize = 4;
const FOREVER: &[&str] = &["sleep", "1000"];
const WRITES: &[&str] = &["sh", "-c", "echo first; while :; do echo more; done"];

fn kill(process: &Pidfd) -> Result<()> {
    match process.signal(Signal::SIGKILL) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error).context("kill -9"),
        _ => Ok(()),
    }
}

/// Options that put ctr's own FIFOs where the case ends: ctr forgets them when it did not delete the task itself.
fn with_fifos(context: &Context, options: &[&str]) -> Vec<String> {
    let directory = context.work.join("fifos").display().to_string();
    options.iter().map(|option| (*option).to_owned()).chain(["--fifo-dir".to_owned(), directory]).collect()
}

/// `ctr run` that has not started.
fn run_command(context: &Context, options: &[&str], id: &str, program: &[&str]) -> Command {
    let options = with_fifos(context, options);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    context.ctr.run_command(&options, BUSYBOX, id, program)
}

/// A container that runs when this returns.
fn detach<'a>(context: &'a Context, program: &[&str]) -> Result<Container<'a>> {
    let options = with_fifos(context, &[]);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    context.ctr.detach(&options, BUSYBOX, &context.id("crash"), program)
}

/// containerd's own commands must work on what a crash left of a container.
fn put_away(context: &Context, id: &str) -> Result<()> {
    let deleted = context.ctr.any(&["task", "delete", id])?;
    let text = deleted.error_text();
    // containerd removes the task of a dead shim by itself: then it is not found any more.
    ensure!(deleted.code == 137 || deleted.code == 0 || text.contains("not found"), "ctr task delete: {deleted:?}");
    ensure!(context.ctr.tasks()?.iter().all(|task| task.id != id), "The task is still listed");
    let deleted = context.ctr.any(&["container", "delete", id])?;
    ensure!(deleted.code == 0 || deleted.error_text().contains("not found"), "ctr container delete: {deleted:?}");
    Ok(())
}

/// Runs a container with `options`, kills its pod process after `before`, and puts away what containerd has of it.
pub(super) fn run_and_kill(
    context: &Context,
    options: &[&str],
    before: impl FnOnce(&Container<'_>) -> Result<()>,
) -> Result<()> {
    let id = context.id("killed");
    let mut events = Events::subscribe(&context.ctr)?;
    let options = with_fifos(context, options);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let container = context.ctr.detach(&options, BUSYBOX, &id, FOREVER)?;
    before(&container)?;
    kill(&pod_process(context, &id)?)?;
    events.of("/tasks/exit", &id, context.ctr.deadline())?;
    put_away(context, &id)
}

/// Side effects of one whole start, by its journal.
fn steps(context: &Context) -> Result<usize> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("measure"), FOREVER)?;
    let steps = Journal::of(&context.ctr, &container.id)?.lines();
    container.remove()?;
    ensure!(steps >= PARTS, "A start writes {steps} lines to its journal: too few to choose moments from");
    Ok(steps)
}

/// Kills at one of the moments that cut a start into [`PARTS`] parts.
fn at_step(context: &Context, part: usize) -> Result<()> {
    let line = (steps(context)? * part / PARTS).max(1);
    let id = context.id("crash");
    let journal = Journal::of(&context.ctr, &id)?;
    let start = Running::start(run_command(context, &["-d"], &id, FOREVER), None)?;
    ensure!(journal.until(line, start.pidfd(), context.ctr.deadline())?, "The start ended before line {line}");
    kill(&pod_process(context, &id)?)?;
    let finished = start.finish(context.ctr.deadline())?;
    // Killed at its last line, the pod may have been ready already; before that, ctr must have been told.
    ensure!(part == PARTS || finished.code != 0, "The start succeeded without its pod process: {finished:?}");
    put_away(context, &id)
}

fn when_created(context: &Context) -> Result<()> {
    let id = context.id("crash");
    let mut events = Events::subscribe(&context.ctr)?;
    let start = Running::start(run_command(context, &["-d"], &id, FOREVER), None)?;
    events.of("/tasks/create", &id, context.ctr.deadline())?;
    kill(&pod_process(context, &id)?)?;
    let finished = start.finish(context.ctr.deadline())?;
    // The shim tells of the task before it answers Create. Killed in between, containerd never had a task to tell of.
    if !finished.error_text().contains("failed to create shim task") {
        events.of("/tasks/delete", &id, context.ctr.deadline())?;
    }
    put_away(context, &id)
}

fn when_started(context: &Context) -> Result<()> {
    let id = context.id("crash");
    let mut events = Events::subscribe(&context.ctr)?;
    let start = Running::start(run_command(context, &["-d"], &id, FOREVER), None)?;
    events.of("/tasks/start", &id, context.ctr.deadline())?;
    kill(&pod_process(context, &id)?)?;
    start.finish(context.ctr.deadline())?;
    events.of("/tasks/exit", &id, context.ctr.deadline()).context("containerd does not see the exit")?;
    put_away(context, &id)
}

fn while_writing(context: &Context) -> Result<()> {
    let id = context.id("crash");
    let mut events = Events::subscribe(&context.ctr)?;
    let mut run = Running::start_with_pipes(&mut run_command(context, &[], &id, WRITES))?;
    let mut output = run.take_stdout()?;
    read_until(&mut output, "first", context.ctr.deadline())?;
    run.collect_stdout_of(output);
    kill(&pod_process(context, &id)?)?;
    events.of("/tasks/exit", &id, context.ctr.deadline()).context("containerd does not see the exit")?;
    let finished = run.finish(context.ctr.deadline())?;
    ensure!(finished.code != 0, "ctr run ended as if the container had: {}", finished.code);
    put_away(context, &id)
}

fn during_exec(context: &Context) -> Result<()> {
    let container = detach(context, FOREVER)?;
    let mut events = Events::subscribe(&context.ctr)?;
    let exec_options = with_fifos(context, &[]);
    let exec_options: Vec<&str> = exec_options.iter().map(String::as_str).collect();
    let mut exec = Running::start_with_pipes(&mut container.exec_command("writes", &exec_options, WRITES))?;
    let mut output = exec.take_stdout()?;
    read_until(&mut output, "first", context.ctr.deadline())?;
    exec.collect_stdout_of(output);
    kill(&pod_process(context, &container.id)?)?;
    events.of("/tasks/exit", &container.id, context.ctr.deadline()).context("containerd does not see the exit")?;
    exec.finish(context.ctr.deadline())?;
    put_away(context, &container.id)
}

fn when_ended(context: &Context) -> Result<()> {
    let mut events = Events::subscribe(&context.ctr)?;
    let container = detach(context, &["true"])?;
    events.of("/tasks/exit", &container.id, context.ctr.deadline())?;
    kill(&pod_process(context, &container.id)?)?;
    events.of("/tasks/delete", &container.id, context.ctr.deadline())?;
    put_away(context, &container.id)
}

fn when_delete_undoes(context: &Context) -> Result<()> {
    let container = detach(context, FOREVER)?;
    let journal = Journal::of(&context.ctr, &container.id)?;
    let (lines, pod) = (journal.lines(), pod_process(context, &container.id)?);
    let delete = Running::start(context.ctr.command(&["task", "delete", "--force", &container.id]), Some(Vec::new()))?;
    // Either the journal grows by what is undone, or the pod process undoes everything at once and is gone.
    journal.until(lines + 1, &pod, context.ctr.deadline())?;
    kill(&pod)?;
    delete.finish(context.ctr.deadline())?;
    put_away(context, &container.id)
}

fn when_journal_is_gone(context: &Context) -> Result<()> {
    let container = detach(context, FOREVER)?;
    let journal = Journal::of(&context.ctr, &container.id)?;
    let pod = pod_process(context, &container.id)?;
    let delete = Running::start(context.ctr.command(&["task", "delete", "--force", &container.id]), Some(Vec::new()))?;
    journal.until_gone(&pod, context.ctr.deadline())?;
    kill(&pod)?;
    delete.finish(context.ctr.deadline())?;
    put_away(context, &container.id)
}

/// A bundle as containerd hands it to a shim.
pub(super) fn bundle(context: &Context) -> Result<PathBuf> {
    let bundle = context.work.join("bundle");
    fs::create_dir_all(bundle.join("rootfs"))?;
    let specification = context.ctr.ok(&["oci", "spec"])?;
    fs::write(bundle.join("config.json"), specification)?;
    Ok(bundle)
}

/// The shim's `start`, as containerd calls it.
pub(super) fn start_command(context: &Context, bundle: &std::path::Path, id: &str) -> Command {
    let mut command = Command::new(&context.shim);
    command
        .args(["-namespace", &context.ctr.namespace, "-id", id, "-address"])
        .arg(&context.ctr.address)
        .args(["-publish-binary", "containerd", "start"])
        .env("TTRPC_ADDRESS", format!("{}.ttrpc", context.ctr.address.display()))
        .env("GRPC_ADDRESS", &context.ctr.address)
        .env("KATA_CONF_FILE", context.config().path())
        .env("NAMESPACE", &context.ctr.namespace)
        .current_dir(bundle);
    command
}

/// Kills `start` when the pod process has announced `lines` side effects.
fn start_at(context: &Context, lines: usize) -> Result<()> {
    let (bundle, id) = (bundle(context)?, context.id("start"));
    let journal = Journal::of(&context.ctr, &id)?;
    let mut start = Running::start_with_pipes(&mut start_command(context, &bundle, &id))?;
    let printed = start.take_stdout()?;
    if lines > 0 && !journal.until(lines, start.pidfd(), context.ctr.deadline())? {
        bail!("start ended before the pod process announced {lines} side effects");
    }
    kill(start.pidfd())?;
    let finished = start.finish(context.ctr.deadline())?;
    drop(printed);
    ensure!(finished.code == 137 || finished.code == 0, "{finished:?}");
    Ok(())
}

fn never_connected(context: &Context) -> Result<()> {
    let (bundle, id) = (bundle(context)?, context.id("alone"));
    let start = Running::start(start_command(context, &bundle, &id), Some(Vec::new()))?;
    let finished = start.finish(context.ctr.deadline())?.expect_code(0)?;
    ensure!(finished.text().contains("/run/"), "start printed no address: {finished:?}");
    let pod = pod_process(context, &id)?;
    let ended = crate::event::wait(
        &[(std::os::fd::AsFd::as_fd(&pod), nix::poll::PollFlags::POLLIN)],
        Deadline::after(context.within(60)),
    )?;
    if ended.is_none() {
        kill(&pod)?;
        bail!("The pod process waits for ever for a connection");
    }
    Ok(())
}
