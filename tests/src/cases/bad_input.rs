//! Input that cannot work: a clear error within seconds, and nothing left.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use super::crash::{bundle, start_command};
use crate::context::{BUSYBOX, Context};
use crate::event::Deadline;
use crate::harness::Case;
use crate::process::{Finished, run};

pub(super) const CASES: &[Case] = &[
    Case::any("bad input: an entrypoint that does not exist is told by name", missing_entrypoint),
    Case::any("bad input: a bundle without config.json is told by name", no_specification),
    Case::kata("bad input: a config.json that is no JSON is told by name", broken_specification),
    Case::kata("bad input: a missing guest kernel is told by its path", |context| {
        refused(context, &[("hypervisor.dragonball.kernel", "\"/no/such/vmlinux\"")], &["/no/such/vmlinux"])
    }),
    Case::kata("bad input: a guest kernel that is no kernel is told by its path", no_kernel),
    Case::kata("bad input: a missing guest image is told by its path", |context| {
        refused(context, &[("hypervisor.dragonball.image", "\"/no/such/image\"")], &["/no/such/image"])
    }),
    Case::kata("bad input: a guest image that is no EROFS is told by its path", no_erofs),
    Case::kata("bad input: a guest image that was cut off is told by its path", cut_erofs),
    Case::kata("bad input: an unknown key is told with the one that was meant", |context| {
        let words = ["default_memori", "default_memory"];
        refused(context, &[("hypervisor.dragonball.default_memori", "256")], &words)
    }),
    Case::kata("bad input: a key of the wrong type is told with its name", |context| {
        refused(context, &[("hypervisor.dragonball.default_vcpus", "\"two\"")], &["default_vcpus"])
    }),
    Case::kata("bad input: a file that is no TOML is told with its line", no_toml),
    Case::kata("bad input: 0 MB of memory are refused with the limit", |context| {
        refused(context, &[("hypervisor.dragonball.default_memory", "0")], &["default_memory", "64"])
    }),
    Case::kata("bad input: 100 TB of memory are refused with the limit", |context| {
        refused(context, &[("hypervisor.dragonball.default_memory", "104857600")], &["default_memory", "104857600"])
    }),
    Case::kata("bad input: a block device that the VM does not have is refused by name", block_device),
    Case::kata("bad input: a character device that the VM does not have is refused by name", character_device),
];

/// A command that must fail; `words` must stand in its error text.
fn fails(finished: &Finished, words: &[&str]) -> Result<()> {
    let text = finished.error_text();
    ensure!(finished.code != 0, "It succeeded: {finished:?}");
    for word in words {
        ensure!(text.contains(word), "The error does not say {word:?}: {text}");
    }
    Ok(())
}

/// `ctr run` must fail soon, whatever the machine's speed.
fn run_fails(context: &Context, options: &[&str], program: &[&str], words: &[&str]) -> Result<()> {
    let id = context.id("bad");
    let options: Vec<&str> = ["--rm"].iter().chain(options).copied().collect();
    let command = context.ctr.run_command(&options, BUSYBOX, &id, program);
    let finished = run(command, b"", Deadline::after(context.within(5)))?;
    fails(&finished, words)
}

/// A configuration with these changes must be refused, and the next container with the right one must run.
fn refused(context: &Context, changes: &[(&str, &str)], words: &[&str]) -> Result<()> {
    let changed = context.config().with(changes)?;
    run_fails(context, &[], &["true"], words)?;
    drop(changed);
    Ok(())
}

fn missing_entrypoint(context: &Context) -> Result<()> {
    for ctr in [&context.runc(), &context.ctr] {
        let id = context.id("entrypoint");
        let finished = ctr.run(&[], BUSYBOX, &id, &["/no/such/entrypoint"])?;
        fails(&finished, &["/no/such/entrypoint", "no such file or directory"]).context(ctr.runtime.clone())?;
    }
    Ok(())
}

fn no_specification(context: &Context) -> Result<()> {
    let bundle = bundle(context)?;
    fs::remove_file(bundle.join("config.json"))?;
    let command = start_command(context, &bundle, &context.id("bundle"));
    let finished = run(command, b"", Deadline::after(context.within(5)))?;
    ensure!(finished.code != 0, "It succeeded: {finished:?}");
    // containerd shows both outputs of a start that failed.
    let text = finished.text() + &finished.error_text();
    ensure!(text.contains("config.json") && text.contains("o such file"), "{text}");
    Ok(())
}

fn broken_specification(context: &Context) -> Result<()> {
    let bundle = bundle(context)?;
    fs::write(bundle.join("config.json"), "{ \"process\": ")?;
    let command = start_command(context, &bundle, &context.id("bundle"));
    let finished = run(command, b"", Deadline::after(context.within(5)))?;
    ensure!(finished.code != 0, "It succeeded: {finished:?}");
    let text = finished.text() + &finished.error_text();
    ensure!(text.contains("config.json"), "{text}");
    Ok(())
}

fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

fn no_kernel(context: &Context) -> Result<()> {
    let file = context.work.join("not-a-kernel");
    fs::write(&file, [0xa5; 65536])?;
    refused(context, &[("hypervisor.dragonball.kernel", &quoted(&file))], &["not-a-kernel"])
}

fn no_erofs(context: &Context) -> Result<()> {
    let file = context.work.join("not-an-image");
    fs::write(&file, vec![0xa5; 2 << 20])?;
    refused(context, &[("hypervisor.dragonball.image", &quoted(&file))], &["not-an-image"])
}

fn cut_erofs(context: &Context) -> Result<()> {
    let file = context.work.join("cut-image");
    let whole =
        fs::read(context.config().value("dragonball", "image")?).context("Cannot read the installed guest image")?;
    ensure!(whole.len() > 2 << 20, "The installed image is too small to be cut");
    fs::write(&file, &whole[..2 << 20])?;
    refused(context, &[("hypervisor.dragonball.image", &quoted(&file))], &["cut-image"])
}

fn no_toml(context: &Context) -> Result<()> {
    let changed = context.config().replace("[hypervisor.dragonball]\nkernel = = \"x\"\n")?;
    let name = context.config().path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    run_fails(context, &[], &["true"], &[&name, "line 2"])?;
    drop(changed);
    Ok(())
}

/// A device node of the host for which there is no device in the VM.
fn device(context: &Context, name: &str, kind: nix::sys::stat::SFlag, major: u64, minor: u64) -> Result<()> {
    let node = context.work.join(name);
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
    nix::sys::stat::mknod(&node, kind, mode, nix::sys::stat::makedev(major, minor)).context("mknod")?;
    let path = node.display().to_string();
    // ctr 2 does not show the code of an error; the shim's own tests look at it.
    run_fails(context, &["--device", &path], &["true"], &[name, "the virtual machine has no such device"])
}

fn block_device(context: &Context) -> Result<()> {
    device(context, "disk-of-the-host", nix::sys::stat::SFlag::S_IFBLK, 7, 77)
}

fn character_device(context: &Context) -> Result<()> {
    // 10:232 is /dev/kvm (Documentation/admin-guide/devices.txt).
    device(context, "kvm-of-the-host", nix::sys::stat::SFlag::S_IFCHR, 10, 232)
}
