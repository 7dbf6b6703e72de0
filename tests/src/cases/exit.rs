//! How a container ends, compared with runc in the same run.

use anyhow::{Result, ensure};

use crate::context::{BUSYBOX, Context};
use crate::harness::Case;

pub(super) const CASES: &[Case] = &[
    Case::any("exit: a container that succeeds ends with 0 and its output arrives", succeeds),
    Case::any("exit: code 1 is told as with runc", |context| same_as_runc(context, "exit 1", 1)),
    Case::any("exit: code 42 is told as with runc", |context| same_as_runc(context, "exit 42", 42)),
    Case::any("exit: a command that the shell cannot find gives 127 as with runc", |context| {
        same_as_runc(context, "no-such-command", 127)
    }),
    Case::any("exit: a process killed by SIGKILL gives 137 as with runc", |context| {
        same_as_runc(context, "sh -c 'kill -KILL $$'; exit $?", 137)
    }),
    Case::any("exit: a process ended by SIGTERM gives 143 as with runc", |context| {
        same_as_runc(context, "sh -c 'kill -TERM $$'; exit $?", 143)
    }),
    Case::any("exit: a process ended by SIGSEGV gives 139 as with runc", |context| {
        same_as_runc(context, "sh -c 'kill -SEGV $$'; exit $?", 139)
    }),
    Case::any("exit: environment, working directory, user and host name arrive as with runc", settings),
];

fn succeeds(context: &Context) -> Result<()> {
    let id = context.id("succeeds");
    let finished = context.ctr.run(&[], BUSYBOX, &id, &["echo", "hello"])?.expect_code(0)?;
    ensure!(finished.text() == "hello", "stdout: {:?}", finished.text());
    ensure!(finished.stderr.is_empty(), "stderr: {:?}", finished.error_text());
    Ok(())
}

fn same_as_runc(context: &Context, script: &str, code: i32) -> Result<()> {
    for ctr in [&context.runc(), &context.ctr] {
        let id = context.id("exit");
        let finished = ctr.run(&[], BUSYBOX, &id, &["sh", "-c", script])?;
        ensure!(
            finished.code == code,
            "{} ends with {}, not {code}: {:?}",
            ctr.runtime,
            finished.code,
            finished.error_text()
        );
    }
    Ok(())
}

fn settings(context: &Context) -> Result<()> {
    let options = ["--env", "COLOUR=blue green", "--cwd", "/tmp", "--user", "65534:65534"];
    let script = "echo $COLOUR; pwd; id -u; id -g; hostname; cat /proc/1/comm; umask; ulimit -n";
    let mut answers = Vec::new();
    for ctr in [&context.runc(), &context.ctr] {
        let id = context.id("settings");
        let finished = ctr.run(&options, BUSYBOX, &id, &["sh", "-c", script])?.expect_code(0)?;
        answers.push(finished.text().replace(&id, "ID"));
    }
    ensure!(answers[0] == answers[1], "runc: {:?}, this runtime: {:?}", answers[0], answers[1]);
    Ok(())
}
