//! Bytes in and out of a container.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest, Sha256};

use crate::context::{BUSYBOX, Context};
use crate::event::readable;
use crate::harness::Case;
use crate::observe::read_until;
use crate::process::{Running, run};

pub(super) const CASES: &[Case] = &[
    Case::any("stdio: stdout and stderr arrive apart", apart),
    Case::any("stdio: 64 MiB through stdout arrive whole with a slow reader", large_stdout).whatever_containerd(),
    Case::any("stdio: 64 MiB through stdin arrive whole", large_stdin).whatever_containerd(),
    Case::any("stdio: the end of stdin ends cat", end_of_stdin),
    Case::any("stdio: input and output alternate while a container runs", conversation),
    Case::any("stdio: a container that closes its output early ends all the same", early_close),
    Case::any("stdio: what a container wrote just before its end arrives", last_bytes),
];

/// Blocks of 1 MiB that `large_stdout` and `large_stdin` send.
const BLOCKS: usize = 64;
const BLOCK_LEN: usize = 1 << 20;
/// Bytes of a pipe that has room for one page: whoever writes waits for its reader at every page.
const ONE_PAGE: i32 = 4096;

/// `seq 200000 | head -c 1048576`: every place in a block is different.
fn block() -> Vec<u8> {
    let mut text = String::new();
    let mut number = 1;
    while text.len() < BLOCK_LEN {
        writeln!(text, "{number}").ok();
        number += 1;
    }
    text.truncate(BLOCK_LEN);
    text.into_bytes()
}

/// All blocks, each after a line with its number, so that blocks that change places are noticed.
fn stream() -> Vec<u8> {
    let block = block();
    (1..=BLOCKS).flat_map(|number| [format!("block {number}\n").as_bytes(), &block].concat()).collect()
}

fn apart(context: &Context) -> Result<()> {
    let id = context.id("apart");
    let finished = context.ctr.run(&[], BUSYBOX, &id, &["sh", "-c", "echo out; echo error >&2"])?.expect_code(0)?;
    ensure!((finished.text(), finished.error_text()) == ("out".into(), "error".into()), "{finished:?}");
    Ok(())
}

fn large_stdout(context: &Context) -> Result<()> {
    let script = format!(
        "seq 200000 | head -c {BLOCK_LEN} > /tmp/block; \
         for number in $(seq {BLOCKS}); do echo block $number; cat /tmp/block; done"
    );
    let id = context.id("stdout");
    let mut running =
        Running::start_with_pipes(&mut context.ctr.run_command(&["--rm"], BUSYBOX, &id, &["sh", "-c", &script]))?;
    let deadline = crate::event::Deadline::after(context.within(120));
    // With an input that stays open, ctr loses the last pages of a slow reader's output, with runc too.
    drop(running.take_stdin()?);
    let mut output = running.take_stdout()?;
    nix::fcntl::fcntl(&output, nix::fcntl::FcntlArg::F_SETPIPE_SZ(ONE_PAGE)).context("F_SETPIPE_SZ")?;
    let (mut arrived, mut page) = (Vec::new(), [0; ONE_PAGE as usize]);
    loop {
        readable(output.as_fd(), "the container's output", deadline)
            .with_context(|| format!("after {} bytes", arrived.len()))?;
        let count = output.read(&mut page)?;
        if count == 0 {
            break;
        }
        arrived.extend_from_slice(&page[..count]);
    }
    running.finish(deadline)?.expect_code(0)?;
    expect_same(&arrived, &stream())
}

/// An error that says where the streams part: what is lost at the end has another cause than what is lost before it.
fn expect_same(arrived: &[u8], wanted: &[u8]) -> Result<()> {
    let same = arrived.iter().zip(wanted).take_while(|(one, other)| one == other).count();
    ensure!(
        same == wanted.len() && same == arrived.len(),
        "{} bytes of {} arrived, the first {same} of them right",
        arrived.len(),
        wanted.len()
    );
    Ok(())
}

fn large_stdin(context: &Context) -> Result<()> {
    let id = context.id("stdin");
    let command = context.ctr.run_command(&["--rm"], BUSYBOX, &id, &["sha256sum"]);
    let stream = stream();
    let deadline = crate::event::Deadline::after(context.within(120));
    let finished = run(command, &stream, deadline)?.expect_code(0)?;
    let wanted = rootfs_builder::guest_image::hex(&Sha256::digest(&stream));
    ensure!(finished.text().starts_with(&wanted), "{:?}, not {wanted}", finished.text());
    Ok(())
}

fn end_of_stdin(context: &Context) -> Result<()> {
    let id = context.id("cat");
    let mut running = Running::start_with_pipes(&mut context.ctr.run_command(&["--rm"], BUSYBOX, &id, &["cat"]))?;
    let (mut input, mut output) = (running.take_stdin()?, running.take_stdout()?);
    // ctr loses an end of file that comes before the container has started: wait for a first answer.
    input.write_all(b"one\n")?;
    read_until(&mut output, "one\n", context.ctr.deadline())?;
    input.write_all(b"two")?;
    drop(input);
    running.collect_stdout_of(output);
    let finished = running.finish(context.ctr.deadline())?.expect_code(0)?;
    ensure!(finished.stdout == b"two", "{finished:?}");
    Ok(())
}

fn conversation(context: &Context) -> Result<()> {
    let id = context.id("conversation");
    let script = "while read -r line; do echo \"heard $line\"; done; echo end";
    let mut running =
        Running::start_with_pipes(&mut context.ctr.run_command(&["--rm"], BUSYBOX, &id, &["sh", "-c", script]))?;
    let (mut input, mut output) = (running.take_stdin()?, running.take_stdout()?);
    let deadline = context.ctr.deadline();
    for number in 0..20 {
        writeln!(input, "{number}")?;
        let wanted = format!("heard {number}\n");
        let mut answer = vec![0; wanted.len()];
        let mut filled = 0;
        while filled < answer.len() {
            readable(output.as_fd(), "an answer", deadline)?;
            let count = output.read(&mut answer[filled..])?;
            ensure!(count > 0, "The container ended in the middle");
            filled += count;
        }
        ensure!(answer == wanted.as_bytes(), "{:?}", String::from_utf8_lossy(&answer));
    }
    drop(input);
    running.collect_stdout_of(output);
    let finished = running.finish(deadline)?.expect_code(0)?;
    ensure!(finished.text() == "end", "{finished:?}");
    Ok(())
}

fn early_close(context: &Context) -> Result<()> {
    let id = context.id("close");
    let script = "echo before; exec >&- 2>&-; sleep 1; exit 5";
    let finished = context.ctr.run(&[], BUSYBOX, &id, &["sh", "-c", script])?.expect_code(5)?;
    ensure!(finished.text() == "before", "{finished:?}");
    Ok(())
}

/// The output pump must not lose to the news of the exit.
fn last_bytes(context: &Context) -> Result<()> {
    let id = context.id("last");
    let script = "seq 20000; echo last";
    let finished = context.ctr.run(&[], BUSYBOX, &id, &["sh", "-c", script])?.expect_code(0)?;
    let text = finished.text();
    ensure!(text.ends_with("20000\nlast"), "ends with {:?}", &text[text.len().saturating_sub(40)..]);
    ensure!(text.lines().count() == 20_001, "{} lines", text.lines().count());
    Ok(())
}
