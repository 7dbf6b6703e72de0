//! Containers on a terminal.

use anyhow::{Result, ensure};

use crate::context::{BUSYBOX, Context};
use crate::harness::Case;
use crate::pty::OnTerminal;

pub(super) const CASES: &[Case] = &[
    Case::any("terminal: -t gives a terminal that resizes with the caller's", resizes),
    Case::any("terminal: what is typed reaches the program and its exit code comes back", typed),
    Case::any("terminal: control-C interrupts the program in the container", interrupted),
    Case::any("terminal: exec -t gives a terminal of its own that resizes", exec_resizes),
];

/// Says the size at every change, answers every line, and ends at the line "end"; a signal interrupts `read`.
const TELL_SIZE: &str = "test -t 0 && test -t 1 && test -t 2 && echo on a terminal; trap 'stty size' WINCH; echo ready; \
                         until read -r line && test \"$line\" = end; do echo \"heard <$line>\"; done; exit 6";

fn resizes(context: &Context) -> Result<()> {
    let id = context.id("tty");
    let mut command = context.ctr.run_command(&["--rm", "-t"], BUSYBOX, &id, &["sh", "-c", TELL_SIZE]);
    tells_sizes(context, OnTerminal::start(&mut command, 80, 24)?)
}

fn tells_sizes(context: &Context, mut terminal: OnTerminal) -> Result<()> {
    let deadline = context.ctr.deadline();
    let shown = terminal.expect("ready", deadline)?;
    ensure!(shown.contains("on a terminal"), "shown: {shown:?}");
    // ctr listens for changes a little after it has started the program, and what changes before that is lost. So the size
    // changes again at each answer of the program until two have arrived: the first may be the one that ctr tells before it
    // listens. Then it does listen, and the last one arrives too.
    let (mut rows, mut arrived) = (43, 0);
    let shown = loop {
        terminal.resize(132, rows)?;
        terminal.type_text("\n")?;
        let shown = terminal.expect("heard <", deadline)?;
        arrived += shown.matches(" 132").count();
        if arrived > 1 {
            break shown;
        }
        rows += 1;
    };
    let last = format!("{rows} 132");
    if !shown.contains(&last) {
        terminal.expect(&last, deadline)?;
    }
    terminal.type_text("end\n")?;
    let (code, shown) = terminal.finish(deadline)?;
    ensure!(code == 6, "exit code {code}, shown: {shown:?}");
    Ok(())
}

fn typed(context: &Context) -> Result<()> {
    let id = context.id("tty");
    let mut terminal = OnTerminal::start(&mut context.ctr.run_command(&["--rm", "-t"], BUSYBOX, &id, &["sh"]), 80, 24)?;
    let deadline = context.ctr.deadline();
    terminal.expect("# ", deadline)?;
    // The result does not stand in what is typed, so its echo cannot be taken for it.
    terminal.type_text("echo result $((6 * 7)); tty\n")?;
    terminal.expect("result 42", deadline)?;
    terminal.expect("/dev/", deadline)?;
    terminal.type_text("exit 3\n")?;
    let (code, shown) = terminal.finish(deadline)?;
    ensure!(code == 3, "exit code {code}, shown: {shown:?}");
    Ok(())
}

fn interrupted(context: &Context) -> Result<()> {
    let id = context.id("tty");
    let script = "trap 'echo interrupted; exit 4' INT; echo ready; sleep 1000 & while :; do wait; done";
    let mut command = context.ctr.run_command(&["--rm", "-t"], BUSYBOX, &id, &["sh", "-c", script]);
    let mut terminal = OnTerminal::start(&mut command, 80, 24)?;
    let deadline = context.ctr.deadline();
    terminal.expect("ready", deadline)?;
    terminal.type_text("\x03")?;
    let (code, shown) = terminal.finish(deadline)?;
    ensure!(shown.contains("interrupted") && code == 4, "exit code {code}, shown: {shown:?}");
    Ok(())
}

fn exec_resizes(context: &Context) -> Result<()> {
    let id = context.id("tty");
    let container = context.ctr.detach(&[], BUSYBOX, &id, &["sleep", "1000"])?;
    let mut command = container.exec_command("terminal", &["-t"], &["sh", "-c", TELL_SIZE]);
    tells_sizes(context, OnTerminal::start(&mut command, 80, 24)?)?;
    container.remove().map(drop)
}
