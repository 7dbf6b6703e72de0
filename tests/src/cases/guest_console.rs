//! Commands in the guest itself, beside the containers.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::context::{BUSYBOX, Context};
use crate::ctr::Container;
use crate::harness::Case;
use crate::process::{self, Finished};
use crate::pty::OnTerminal;

pub(super) const CASES: &[Case] = &[
    Case::kata("guest console: commands see the whole guest, and their exit code is kata-ctl's", commands),
    Case::kata("guest console: a shell has a terminal of our size, and its interrupts", shell),
    Case::kata("guest console: a pod that was started without it refuses with what to do", refused),
];

/// A container whose guest executes commands.
fn opened(context: &Context) -> Result<Container<'_>> {
    let _changed = context.config().with(&[("agent.kata.debug_console_enabled", "true")])?;
    context.ctr.detach(&[], BUSYBOX, &context.id("console"), &["sleep", "1000"])
}

fn kata_ctl(context: &Context, arguments: &[&str]) -> Command {
    let mut command = Command::new(context.shim.with_file_name("kata-ctl"));
    command.args(arguments);
    command
}

fn execute(context: &Context, container: &Container<'_>, words: &[&str], input: &[u8]) -> Result<Finished> {
    let arguments = [&["exec", &*container.id], words].concat();
    process::run(kata_ctl(context, &arguments), input, context.ctr.deadline())
}

fn commands(context: &Context) -> Result<()> {
    let container = opened(context)?;
    let seen = execute(context, &container, &["ps", "-o", "pid,args"], b"")?.expect_code(0)?.text();
    let is_init = |line: &str| line.trim().starts_with("1 ") && line.contains("kata-agent");
    ensure!(seen.lines().any(is_init) && seen.contains("sleep 1000"), "The guest's processes are {seen:?}");

    let input: Vec<u8> = (0..1 << 18).flat_map(|number: u32| number.to_le_bytes()).collect();
    let script = "cat; echo problem >&2; exit 42";
    let finished = execute(context, &container, &["sh", "-c", script], &input)?.expect_code(42)?;
    ensure!(finished.stdout == input && finished.error_text() == "problem", "{} bytes", finished.stdout.len());

    let missing = execute(context, &container, &["no-such-program"], b"")?.expect_code(125)?;
    ensure!(missing.error_text().contains("\"no-such-program\": executable file not found"), "{missing:?}");
    container.remove().map(drop)
}

fn shell(context: &Context) -> Result<()> {
    let container = opened(context)?;
    let deadline = context.ctr.deadline();
    let mut terminal = OnTerminal::start(&mut kata_ctl(context, &["exec", &container.id]), 90, 30)?;
    terminal.expect("# ", deadline)?;
    terminal.type_text("stty size; tty; echo result $((6 * 7))\n")?;
    terminal.expect("30 90", deadline)?;
    terminal.expect("/dev/pts/", deadline)?;
    terminal.expect("result 42", deadline)?;
    // The interrupt is for the shell's program, not for kata-ctl.
    terminal.type_text("sh -c 'echo beg''un; exec sleep 1000'\n")?;
    terminal.expect("begun", deadline)?;
    terminal.type_text("\u{3}echo after $?\n")?;
    terminal.expect("after 130", deadline)?;
    terminal.type_text("exit 7\n")?;
    let (code, shown) = terminal.finish(deadline)?;
    ensure!(code == 7, "exit code {code}, shown: {shown:?}");
    container.remove().map(drop)
}

fn refused(context: &Context) -> Result<()> {
    let container = context.ctr.detach(&[], BUSYBOX, &context.id("console"), &["sleep", "1000"])?;
    let refused = execute(context, &container, &["true"], b"")?.expect_code(125)?;
    ensure!(refused.error_text().contains("debug_console_enabled = true"), "{refused:?}");
    container.remove().map(drop)
}
