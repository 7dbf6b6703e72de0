//! A container's life as containerd tells it.

use anyhow::{Context as _, Result, ensure};

use crate::context::{BUSYBOX, Context, DEBIAN};
use crate::ctr::Ctr;
use crate::harness::Case;
use crate::observe::{Events, read_until};
use crate::process::{Finished, Running};

pub(super) const CASES: &[Case] = &[
    Case::any("tasks: ls tells a running container and its process", ls),
    Case::any("tasks: ps lists the processes of a container", ps),
    Case::any("tasks: metrics count memory, processes and CPU time under runc's names", metrics),
    Case::any("tasks: a detached container is attached to, and its exit code is told", attach),
    Case::any("tasks: kill -s TERM lets a program end by itself", terminate),
    Case::any("tasks: kill -s KILL ends a program that ignores everything else", kill),
    Case::any("tasks: kill of a container that has ended says so", kill_after_end),
    Case::any("tasks: a running task cannot be deleted without force", delete_running),
    Case::any("tasks: a container can be started again after its task was deleted", again),
    Case::kata("tasks: uname tells the guest's kernel and not the host's", own_kernel),
    Case::any("tasks: redis serves from a detached container, redis-benchmark by exec", redis)
        .with_services()
        .whatever_containerd(),
];

fn ls(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("ls"), &["sleep", "1000"])?;
    let task = container.status()?;
    ensure!(task.status == "RUNNING" && task.pid > 1, "{task:?}");
    ensure!(std::path::Path::new(&format!("/proc/{}", task.pid)).exists(), "The host has no process {}", task.pid);
    container.remove()?;
    ensure!(context.ctr.tasks()?.is_empty());
    Ok(())
}

fn ps(context: &Context) -> Result<()> {
    let script = "sleep 1000 & sleep 1000 & wait";
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("ps"), &["sh", "-c", script])?;
    let listed = context.ctr.ok(&["task", "ps", &container.id])?;
    let pids: Vec<i32> =
        listed.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok()).collect();
    ensure!(!pids.is_empty() && pids.iter().all(|pid| *pid > 0), "{listed:?}");
    container.remove().map(drop)
}

/// Names of the metrics that `ctr task metrics` prints, and their values.
fn numbers(ctr: &Ctr, id: &str) -> Result<Vec<(String, u64)>> {
    let printed = ctr.ok(&["task", "metrics", id])?;
    let number = |line: &str| {
        let (name, value) = line.trim().split_once(char::is_whitespace)?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    Ok(printed.lines().filter_map(number).collect())
}

fn metrics(context: &Context) -> Result<()> {
    let mut answers = Vec::new();
    for ctr in [&context.runc(), &context.ctr] {
        let container = ctr.detach(&[], BUSYBOX, &context.id("metrics"), &["sh", "-c", "sleep 1000"])?;
        answers.push(numbers(ctr, &container.id)?);
        container.remove()?;
    }
    let names = |answer: &[(String, u64)]| answer.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    ensure!(!answers[0].is_empty(), "runc tells no metrics");
    ensure!(names(&answers[0]) == names(&answers[1]), "runc: {:?}, this runtime: {:?}", answers[0], answers[1]);
    let value = |part: &str| answers[1].iter().find(|(name, _)| name.contains(part)).map_or(0, |(_, value)| *value);
    ensure!(value("memory.usage") > 4096, "{:?}", answers[1]);
    ensure!(value("cpu") > 0, "{:?}", answers[1]);
    Ok(())
}

fn attach(context: &Context) -> Result<()> {
    let script = "read -r line; echo \"got $line\"; exit 7";
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("attach"), &["sh", "-c", script])?;
    let finished = container.attach(b"hello\n")?.finish(context.ctr.deadline())?.expect_code(7)?;
    ensure!(finished.text() == "got hello", "{finished:?}");
    container.remove_container()
}

/// A program that says "ready" when it handles signals, and is sent `signal` then; answers how `ctr run` ends.
fn signalled(context: &Context, script: &str, signal: &str) -> Result<Finished> {
    let id = context.id("signal");
    let mut run =
        Running::start_with_pipes(&mut context.ctr.run_command(&["--rm"], BUSYBOX, &id, &["sh", "-c", script]))?;
    let mut output = run.take_stdout()?;
    read_until(&mut output, "ready\n", context.ctr.deadline())?;
    run.collect_stdout_of(output);
    context.ctr.ok(&["task", "kill", "-s", signal, &id])?;
    run.finish(context.ctr.deadline())
}

fn terminate(context: &Context) -> Result<()> {
    let script = "trap 'echo goodbye; exit 12' TERM; echo ready; sleep 1000 & while :; do wait; done";
    let finished = signalled(context, script, "SIGTERM")?.expect_code(12)?;
    ensure!(finished.text() == "goodbye", "{finished:?}");
    Ok(())
}

fn kill(context: &Context) -> Result<()> {
    let script = "trap '' TERM INT HUP; echo ready; sleep 1000 & while :; do wait; done";
    signalled(context, script, "SIGKILL")?.expect_code(137).map(drop)
}

fn kill_after_end(context: &Context) -> Result<()> {
    let id = context.id("ended");
    let mut events = Events::subscribe(&context.ctr)?;
    let container = context.ctr.detach(&[], BUSYBOX, &id, &["true"])?;
    events.of("/tasks/exit", &id, context.ctr.deadline())?;
    ensure!(container.status()?.status == "STOPPED");
    let refused = context.ctr.any(&["task", "kill", "-s", "SIGTERM", &id])?;
    let text = refused.error_text();
    ensure!(refused.code != 0 && (text.contains("already finished") || text.contains("not found")), "{refused:?}");
    ensure!(container.remove()? == 0);
    Ok(())
}

fn delete_running(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("running"), &["sleep", "1000"])?;
    let refused = context.ctr.any(&["task", "delete", &container.id])?;
    ensure!(refused.code != 0 && refused.error_text().contains("failed precondition"), "{refused:?}");
    ensure!(container.status()?.status == "RUNNING");
    container.remove().map(drop)
}

fn again(context: &Context) -> Result<()> {
    let id = context.id("again");
    context.ctr.ok(&["container", "create", "--runtime", &context.ctr.runtime, BUSYBOX, &id, "echo", "once more"])?;
    for round in 1..=2 {
        let started = context.ctr.any(&["task", "start", &id])?.expect_code(0);
        let started = started.with_context(|| format!("round {round}"))?;
        ensure!(started.text() == "once more", "{started:?}");
        // `ctr task start` in the foreground deletes the task itself.
        ensure!(context.ctr.tasks()?.is_empty());
    }
    context.ctr.ok(&["container", "delete", &id]).map(drop)
}

fn own_kernel(context: &Context) -> Result<()> {
    let id = context.id("uname");
    let release = context.ctr.run(&[], BUSYBOX, &id, &["uname", "-r"])?.expect_code(0)?.text();
    let host = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    ensure!(!release.is_empty() && release != host, "guest {release:?}, host {host:?}");
    Ok(())
}

fn redis(context: &Context) -> Result<()> {
    let server = ["redis-server", "--save", "", "--appendonly", "no", "--dir", "/tmp"];
    let container = context.ctr.detach(&[], DEBIAN, &context.id("redis"), &server)?;
    let ready = "until redis-cli ping 2>/dev/null | grep -q PONG; do :; done";
    container.exec("ready", &[], &["bash", "-c", ready], b"")?.expect_code(0)?;
    let measured = container.exec("benchmark", &[], &["redis-benchmark", "-q", "-n", "1000", "-t", "set,get"], b"")?;
    let text = measured.expect_code(0)?.text();
    ensure!(text.contains("SET:") && text.contains("GET:") && text.contains("requests per second"), "{text:?}");
    let attached = container.attach(b"")?;
    container.kill("SIGTERM")?;
    attached.finish(context.ctr.deadline())?.expect_code(0).context("redis did not end by itself")?;
    container.remove_container()
}
