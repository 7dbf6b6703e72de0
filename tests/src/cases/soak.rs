//! Pods that come and go for long: what a node does all its life.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::cri::{forever, run_pod, script};
use crate::context::{BUSYBOX, Context};
use crate::cri::lines;
use crate::event::Deadline;
use crate::harness::Case;
use crate::leftovers::{Snapshot, describe, settle};
use crate::observe::pod_process;

pub(super) const CASES: &[Case] = &[
    Case::any("soak: 110 pods are made and removed, eight at a time, five times", pods).for_soak(),
    Case::kata("soak: pods and containers of all kinds come, fail, are killed and go", mixed).for_soak(),
];

/// What a node of Kubernetes has at most by default.
const PODS: usize = 110;
const ROUNDS: usize = 5;
const AT_ONCE: usize = 8;

fn pods(context: &Context) -> Result<()> {
    for round in 1..=ROUNDS {
        let before = Snapshot::take(&context.scope)?;
        at_once(|number| (number < PODS).then(|| plain(context, number)))
            .with_context(|| format!("round {round} of {ROUNDS}"))?;
        context.of_pods().collect_garbage()?;
        let left = settle(&before, &context.scope, Deadline::after(context.within(10)))?;
        ensure!(left.is_empty(), "After round {round} something stays behind{}", describe(&left));
        eprintln!("round {round} of {ROUNDS}: {PODS} pods made and removed");
    }
    Ok(())
}

/// As long as the run was told to; each thread does one kind after another.
fn mixed(context: &Context) -> Result<()> {
    const KINDS: [fn(&Context, usize) -> Result<()>; 6] = [plain, output, attempts, out_of_memory, killed, many_execs];
    let end = Deadline::after(context.soak.unwrap_or_default());
    let done = AtomicUsize::new(0);
    at_once(|number| {
        (!end.passed()).then(|| {
            KINDS[number % KINDS.len()](context, number)?;
            done.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
    })?;
    eprintln!("{} pods and containers came and went", done.load(Ordering::Relaxed));
    Ok(())
}

/// Does `work` with the numbers from 0 on, [`AT_ONCE`] at a time, until it answers nothing or fails.
fn at_once(work: impl Fn(usize) -> Option<Result<()>> + Sync) -> Result<()> {
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(Ok(())));
    let is_whole = || failure.lock().unwrap_or_else(PoisonError::into_inner).is_ok();
    let one_after_another = || {
        while is_whole() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            match work(number) {
                None => return,
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    let mut first = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    if first.is_ok() {
                        *first = Err(error.context(format!("number {number}")));
                    }
                }
            }
        }
    };
    thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(one_after_another))));
    failure.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// A pod whose container says something and is stopped.
fn plain(context: &Context, number: usize) -> Result<()> {
    let pod = run_pod(context, "soak")?;
    let name = format!("plain-{number}");
    let container = pod.run(forever(&name))?;
    ensure!(container.shell(&format!("echo {number}"))? == format!("{number}\n"));
    container.stop(10)?;
    pod.remove()
}

/// A container alone, with much output.
fn output(context: &Context, _: usize) -> Result<()> {
    let program = ["sh", "-c", "seq 100000"];
    let finished = context.ctr.run(&[], BUSYBOX, &context.id("soak"), &program)?.expect_code(0)?;
    ensure!(finished.text().lines().count() == 100_000, "{} lines", finished.text().lines().count());
    Ok(())
}

/// A pod whose container fails and is made again.
fn attempts(context: &Context, number: usize) -> Result<()> {
    let pod = run_pod(context, "soak")?;
    for attempt in 0..3 {
        let name = format!("attempt-{number}-{attempt}");
        let ended = pod.run(script(&name, &format!("echo {attempt}; exit {attempt}")))?.ended()?;
        ensure!(ended.exit_code == attempt, "{ended:?}");
        let log = lines(&context.work.join(format!("{name}.log")))?;
        ensure!(log.len() == 1 && log[0].text == attempt.to_string(), "{log:?}");
    }
    pod.remove()
}

/// A container that takes more memory than it may.
fn out_of_memory(context: &Context, _: usize) -> Result<()> {
    let program = ["sh", "-c", "head -c 100000000 /dev/zero | tail"];
    let finished = context.ctr.run(&["--memory-limit", "20000000"], BUSYBOX, &context.id("soak"), &program)?;
    ensure!(finished.code != 0, "{finished:?}");
    Ok(())
}

/// A pod whose process is killed.
fn killed(context: &Context, number: usize) -> Result<()> {
    let pod = run_pod(context, "soak")?;
    let container = pod.run(forever(&format!("killed-{number}")))?;
    pod_process(context, &pod.id)?.signal(Signal::SIGKILL)?;
    container.ended()?;
    pod.ended()?;
    pod.remove()
}

/// A pod with many processes that come and go.
fn many_execs(context: &Context, number: usize) -> Result<()> {
    let pod = run_pod(context, "soak")?;
    let container = pod.run(forever(&format!("execs-{number}")))?;
    for exec in 0..10 {
        let done = container.exec(&["sh", "-c", &format!("exit {exec}")], 0)?;
        ensure!(done.exit_code == exec, "{done:?}");
    }
    pod.remove()
}
