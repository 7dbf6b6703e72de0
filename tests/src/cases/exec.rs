//! More processes in a running container.

use std::thread;

use anyhow::{Result, anyhow, ensure};

use crate::context::{BUSYBOX, Context};
use crate::harness::Case;
use crate::pty::OnTerminal;

pub(super) const CASES: &[Case] = &[
    Case::any("exec: output, input and exit code are the process's own", own_process),
    Case::any("exec: -t gives a terminal and the exit code comes back", with_terminal),
    Case::any("exec: working directory and user are the ones asked for", settings),
    Case::any("exec: a program that does not exist is told by name and the container runs on", missing_program),
    Case::any("exec: five at once do not disturb each other", at_once),
    Case::any("exec: 8 MiB through stdin and back arrive whole", large).whatever_containerd(),
];

const FOREVER: &[&str] = &["sleep", "1000"];

fn own_process(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("exec"), FOREVER)?;
    let script = "cat; echo problem >&2; exit 42";
    let finished = container.exec("one", &[], &["sh", "-c", script], b"input")?.expect_code(42)?;
    ensure!(finished.stdout == b"input" && finished.error_text().contains("problem"), "{finished:?}");
    let again = container.exec("one", &[], &["true"], b"")?;
    ensure!(again.code == 0, "The name of a process that has ended cannot be used again: {again:?}");
    container.remove().map(drop)
}

fn with_terminal(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("exec"), FOREVER)?;
    let mut command = container.exec_command("terminal", &["-t"], &["sh"]);
    let mut terminal = OnTerminal::start(&mut command, 80, 24)?;
    let deadline = context.ctr.deadline();
    terminal.expect("# ", deadline)?;
    terminal.type_text("test -t 0 && echo result $((6 * 7))\n")?;
    terminal.expect("result 42", deadline)?;
    terminal.type_text("exit 7\n")?;
    let (code, shown) = terminal.finish(deadline)?;
    ensure!(code == 7, "exit code {code}, shown: {shown:?}");
    container.remove().map(drop)
}

fn settings(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("exec"), FOREVER)?;
    let options = ["--cwd", "/etc", "--user", "65534:65534"];
    let finished = container.exec("who", &options, &["sh", "-c", "pwd; id -u; id -g"], b"")?.expect_code(0)?;
    ensure!(finished.text() == "/etc\n65534\n65534", "{finished:?}");
    container.remove().map(drop)
}

fn missing_program(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("exec"), FOREVER)?;
    let finished = container.exec("missing", &[], &["/no/such/program"], b"")?;
    let text = finished.error_text();
    ensure!(finished.code != 0 && text.contains("no/such/program"), "{finished:?}");
    ensure!(text.contains("no such file or directory") || text.contains("not found"), "{finished:?}");
    ensure!(container.status()?.status == "RUNNING");
    container.exec("after", &[], &["true"], b"")?.expect_code(0)?;
    container.remove().map(drop)
}

fn at_once(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("exec"), FOREVER)?;
    thread::scope(|scope| {
        let processes: Vec<_> = (0..5)
            .map(|number| {
                let container = &container;
                scope.spawn(move || -> Result<()> {
                    let (name, input) = (format!("number-{number}"), format!("input {number}"));
                    let script = format!("cat; exit {}", 10 + number);
                    let finished = container.exec(&name, &[], &["sh", "-c", &script], input.as_bytes())?;
                    ensure!(finished.expect_code(10 + number)?.text() == input);
                    Ok(())
                })
            })
            .collect();
        processes.into_iter().try_for_each(|process| process.join().map_err(|_| anyhow!("A thread panicked"))?)
    })?;
    container.remove().map(drop)
}

fn large(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("exec"), FOREVER)?;
    let bytes: Vec<u8> = (0..8 << 18).flat_map(|number: u32| number.to_le_bytes()).collect();
    let finished = container.exec("large", &[], &["cat"], &bytes)?.expect_code(0)?;
    ensure!(finished.stdout == bytes, "{} bytes of {} came back, or others", finished.stdout.len(), bytes.len());
    container.remove().map(drop)
}
