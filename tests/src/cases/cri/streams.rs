//! Sessions with the processes of a pod, as people have them.

use anyhow::{Result, ensure};

use super::{forever, run_pod, script};
use crate::context::Context;
use crate::cri::lines;
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("cri: a session in a container has its input, output, errors and exit code", exec).with_pods(),
    Case::any("cri: a session with a terminal follows its size", terminal).with_pods(),
    Case::any("cri: sessions that join a container share its input and output, and its log stays whole", attach)
        .with_pods(),
    Case::any("cri: a session whose client goes leaves its container as it was", given_up).with_pods(),
];

fn exec(context: &Context) -> Result<()> {
    const SIZE: usize = 3_000_000;
    let pod = run_pod(context, "session")?;
    let container = pod.run(forever("one"))?;
    // Nothing comes back before all has gone: this client does one thing at a time.
    let program = format!("head -c {SIZE} > /data; cat /data; echo done >&2; exit 4");
    let mut session = container.session(&["sh", "-c", &program], false)?;
    let input: Vec<u8> = (0..SIZE).map(|at| u8::try_from((at * 31 + at / 257) % 251).unwrap_or_default()).collect();
    for chunk in input.chunks(30_000) {
        session.write(chunk)?;
    }
    let seen = session.finish()?;
    ensure!(seen.stdout == input, "{} of {SIZE} bytes", seen.stdout.len());
    ensure!(seen.stderr == b"done\n" && seen.code == Some(4), "{:?}, {:?}", seen.stderr, seen.code);
    pod.remove()
}

fn terminal(context: &Context) -> Result<()> {
    let pod = run_pod(context, "terminal")?;
    let container = pod.run(forever("one"))?;
    let mut session = container.session(&["sh"], true)?;
    for (columns, rows) in [(101, 31), (77, 23)] {
        session.resize(columns, rows)?;
        session.write(
            format!("until [ \"$(stty size)\" = '{rows} {columns}' ]; do :; done; echo is-$?-{rows}\n").as_bytes(),
        )?;
        session.until(&format!("is-0-{rows}"))?;
    }
    // As Ctrl-C.
    session.write(b"sleep 10000\n")?;
    container.shell("until ps -o args | grep -q '^sleep 10000'; do :; done")?;
    session.write(b"\x03")?;
    session.write(b"exit 6\n")?;
    let seen = session.finish()?;
    ensure!(seen.code == Some(6), "{seen:?}");
    pod.remove()
}

fn attach(context: &Context) -> Result<()> {
    let pod = run_pod(context, "attach")?;
    let mut spec = script("echoes", "while read -r line; do echo got $line; done");
    spec.config.stdin = true;
    let container = pod.run(spec)?;
    let (mut one, mut two) = (container.attach()?, container.attach()?);
    one.write(b"first\n")?;
    one.until("got first\n")?;
    two.until("got first\n")?;
    two.write(b"second\n")?;
    one.until("got second\n")?;
    container.stop(1)?;
    let texts: Vec<String> = lines(&container.log)?.into_iter().map(|line| line.text).collect();
    ensure!(texts == ["got first", "got second"], "{texts:?}");
    pod.remove()
}

fn given_up(context: &Context) -> Result<()> {
    let pod = run_pod(context, "given-up")?;
    let container = pod.run(forever("one"))?;
    for tty in [false, true] {
        let mut session = container.session(&["sh"], tty)?;
        session.write(b"echo up\n")?;
        session.until("up")?;
        drop(session);
        ensure!(container.shell("echo works")? == "works\n");
    }
    pod.remove()
}
