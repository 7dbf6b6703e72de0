//! Containers side by side and one after another.

use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::context::{BUSYBOX, Context};
use crate::harness::Case;

pub(super) const CASES: &[Case] = &[
    Case::any("many: two containers of one image run at once and see only their own files", two_of_one_image),
    Case::any("many: 8 start, work and end side by side", side_by_side),
    Case::any("many: 20 in a row all succeed", in_a_row),
    Case::any("many: one id in two namespaces is two containers", two_namespaces),
];

fn two_of_one_image(context: &Context) -> Result<()> {
    let first = context.ctr.detach(&[], BUSYBOX, &context.id("first"), &["sleep", "1000"])?;
    let second = context.ctr.detach(&[], BUSYBOX, &context.id("second"), &["sleep", "1000"])?;
    first.exec("write", &[], &["sh", "-c", "echo first > /file; echo first > /etc/group"], b"")?.expect_code(0)?;
    second.exec("write", &[], &["sh", "-c", "test ! -e /file && grep -q root: /etc/group"], b"")?.expect_code(0)?;
    let read = first.exec("read", &[], &["cat", "/file", "/etc/group"], b"")?.expect_code(0)?;
    ensure!(read.text() == "first\nfirst", "{read:?}");
    first.remove()?;
    second.exec("alive", &[], &["true"], b"")?.expect_code(0).context("The second ended with the first")?;
    second.remove().map(drop)
}

fn side_by_side(context: &Context) -> Result<()> {
    thread::scope(|scope| {
        let containers: Vec<_> = (0..8)
            .map(|number| {
                scope.spawn(move || -> Result<()> {
                    let (id, script) = (context.id("parallel"), format!("echo number {number}; exit {number}"));
                    let finished = context.ctr.run(&[], BUSYBOX, &id, &["sh", "-c", &script])?.expect_code(number)?;
                    ensure!(finished.text() == format!("number {number}"), "{finished:?}");
                    Ok(())
                })
            })
            .collect();
        containers.into_iter().try_for_each(|container| container.join().map_err(|_| anyhow!("A thread panicked"))?)
    })
}

fn in_a_row(context: &Context) -> Result<()> {
    for round in 1..=20 {
        let id = context.id("row");
        let finished = context.ctr.run(&[], BUSYBOX, &id, &["echo", "done"])?.expect_code(0);
        let finished = finished.with_context(|| format!("round {round} of 20"))?;
        ensure!(finished.text() == "done", "round {round}: {finished:?}");
    }
    Ok(())
}

fn two_namespaces(context: &Context) -> Result<()> {
    let other = context.other_namespace();
    let id = context.id("twin");
    let here = context.ctr.detach(&[], BUSYBOX, &id, &["sleep", "1000"])?;
    let there = other.detach(&[], BUSYBOX, &id, &["sleep", "1000"])?;
    here.exec("write", &[], &["touch", "/here"], b"")?.expect_code(0)?;
    there.exec("look", &[], &["test", "!", "-e", "/here"], b"")?.expect_code(0).context("Both are one container")?;
    there.remove()?;
    here.exec("alive", &[], &["true"], b"")?.expect_code(0).context("One ended with the other")?;
    here.remove().map(drop)
}
