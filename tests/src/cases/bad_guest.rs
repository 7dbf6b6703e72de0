//! Guests that never answer: each is reported as what it did.

use anyhow::{Context as _, Result, ensure};

use crate::context::{BUSYBOX, Context};
use crate::event::Deadline;
use crate::guest_program::GuestProgram;
use crate::harness::Case;
use crate::process::run;

pub(super) const CASES: &[Case] = &[
    Case::kata("bad guest: one that powers off before the agent answers is reported so", |context| {
        reported(context, GuestProgram::PowerOff, &[], &["powered off", "before its agent answered"])
    }),
    Case::kata("bad guest: one that panics before the agent answers is reported so, with its console", |context| {
        reported(context, GuestProgram::Exit, &[], &["panic", "before its agent answered", "Attempted to kill init"])
    }),
    Case::kata("bad guest: one that triple-faults before the agent answers is reported so", |context| {
        let parameters = ("hypervisor.dragonball.kernel_params", "\"reboot=t\"");
        reported(context, GuestProgram::Restart, &[parameters], &["triple fault", "before its agent answered"])
    }),
    Case::kata("bad guest: one that hangs is reported with the deadline that it missed", |context| {
        let deadline = ("agent.kata.reconnect_timeout_ms", "3000");
        reported(context, GuestProgram::Hang, &[deadline], &["did not answer within 3s", "reconnect_timeout_ms"])
    }),
    Case::kata("bad guest: one without an agent is reported as a panic, with its console", |context| {
        let parameters = ("hypervisor.dragonball.kernel_params", "\"init=/sbin/missing\"");
        reported(context, GuestProgram::Hang, &[parameters], &["before its agent answered", "/sbin/missing"])
    }),
];

fn reported(context: &Context, program: GuestProgram, changes: &[(&str, &str)], words: &[&str]) -> Result<()> {
    let image = program.image(&context.work)?;
    let image = toml::Value::String(image.display().to_string()).to_string();
    let mut all = vec![("hypervisor.dragonball.image", image.as_str())];
    all.extend(changes);
    let changed = context.config().with(&all)?;
    let id = context.id("guest");
    let command = context.ctr.run_command(&["--rm"], BUSYBOX, &id, &["true"]);
    let finished = run(command, b"", Deadline::after(context.within(15)))?;
    drop(changed);
    let text = finished.error_text();
    ensure!(finished.code != 0, "It succeeded: {finished:?}");
    for word in words {
        ensure!(text.to_lowercase().contains(&word.to_lowercase()), "The error does not say {word:?}: {text}");
    }
    // The next container is not the worse for it.
    let id = context.id("next");
    context.ctr.run(&[], BUSYBOX, &id, &["true"])?.expect_code(0).context("the container after it").map(drop)
}
