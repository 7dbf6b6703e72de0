//! The check for leftovers, shown to catch each kind on the machine under test.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount, umount};

use crate::context::Context;
use crate::event::Deadline;
use crate::harness::Case;
use crate::leftovers::{Snapshot, Thing, describe, settle};
use crate::process::run;

pub(super) const CASES: &[Case] = &[
    Case::any("leftovers: a planted process is caught", process),
    Case::any("leftovers: a planted mount is caught", planted_mount),
    Case::any("leftovers: a planted socket is caught", socket),
    Case::any("leftovers: a planted cgroup is caught", cgroup),
    Case::any("leftovers: a planted directory of the runtime is caught", directory),
    Case::any("leftovers: a planted network device is caught", network_device),
];

/// Plants, looks, removes, and looks again: the plant is the one thing that the check tells.
fn caught(
    context: &Context,
    plant: impl FnOnce() -> Result<()>,
    is_plant: impl Fn(&Thing) -> bool,
    remove: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = Snapshot::take(&context.scope)?;
    plant()?;
    let left = settle(&before, &context.scope, Deadline::after(Duration::ZERO));
    remove()?;
    let left = left?;
    ensure!(left.iter().any(is_plant), "The plant was not caught{}", describe(&left));
    let left = settle(&before, &context.scope, Deadline::after(context.within(10)))?;
    ensure!(left.is_empty(), "The plant is gone but something is told{}", describe(&left));
    Ok(())
}

fn process(context: &Context) -> Result<()> {
    let mut planted = None;
    let cell = std::cell::RefCell::new(&mut planted);
    let program = context.work.join("containerd-shim-planted");
    fs::copy("/proc/self/exe", &program).context("Cannot copy this program")?;
    caught(
        context,
        || {
            // It reads its standard input, which stays open as long as the child value lives.
            let child = Command::new(&program).arg("--wait-for-end-of-input").stdin(Stdio::piped()).spawn()?;
            **cell.borrow_mut() = Some(child);
            Ok(())
        },
        |thing| matches!(thing, Thing::Process { command, .. } if command.contains("containerd-shim-planted")),
        || {
            if let Some(child) = cell.borrow_mut().as_mut() {
                child.kill()?;
                child.wait()?;
            }
            Ok(())
        },
    )
}

fn planted_mount(context: &Context) -> Result<()> {
    let point = context.work.join("mount");
    fs::create_dir(&point)?;
    caught(
        context,
        || mount(Some("none"), &point, Some("tmpfs"), MsFlags::empty(), None::<&str>).context("mount"),
        |thing| matches!(thing, Thing::Mount { point: found, kind, .. } if *found == point && kind == "tmpfs"),
        || umount(&point).context("umount"),
    )
}

fn socket(context: &Context) -> Result<()> {
    let parent = Path::new("/run/kata");
    let (made, path) = (!parent.exists(), parent.join(format!("{}.sock", context.scope.marker)));
    fs::create_dir_all(parent)?;
    let listener = UnixListener::bind(&path)?;
    drop(listener);
    fs::remove_file(&path)?;
    let kept = std::cell::RefCell::new(None);
    let result = caught(
        context,
        || {
            *kept.borrow_mut() = Some(UnixListener::bind(&path)?);
            Ok(())
        },
        |thing| matches!(thing, Thing::Socket { name } if Path::new(name) == path),
        || {
            kept.borrow_mut().take();
            fs::remove_file(&path).context("Cannot remove the socket")
        },
    );
    remove_if(made, parent)?;
    result
}

fn cgroup(context: &Context) -> Result<()> {
    let root = [PathBuf::from("/sys/fs/cgroup/unified"), PathBuf::from("/sys/fs/cgroup")]
        .into_iter()
        .find(|root| root.join("cgroup.procs").is_file())
        .context("The machine has no cgroup2")?;
    let path = root.join(format!("{}-planted", context.scope.marker));
    caught(
        context,
        || fs::create_dir(&path).context("Cannot create a cgroup"),
        |thing| matches!(thing, Thing::Cgroup { path: found } if *found == path),
        || fs::remove_dir(&path).context("Cannot remove the cgroup"),
    )
}

fn directory(context: &Context) -> Result<()> {
    let parent = Path::new("/run/kata");
    let (made, path) = (!parent.exists(), parent.join(&context.scope.marker));
    fs::create_dir_all(parent)?;
    let result = caught(
        context,
        || fs::create_dir_all(path.join("sandbox")).context("Cannot create a directory"),
        |thing| matches!(thing, Thing::File { path: found } if *found == path.join("sandbox")),
        || fs::remove_dir_all(&path).context("Cannot remove the directory"),
    );
    remove_if(made, parent)?;
    result
}

fn remove_if(made: bool, directory: &Path) -> Result<()> {
    if made { fs::remove_dir(directory).context("Cannot remove the directory") } else { Ok(()) }
}

fn network_device(context: &Context) -> Result<()> {
    let ip = |arguments: &[&str]| {
        let mut command = Command::new("ip");
        command.args(arguments);
        run(command, b"", context.ctr.deadline())?.expect_code(0).map(drop)
    };
    caught(
        context,
        || ip(&["tuntap", "add", "dev", "planted0", "mode", "tap"]),
        |thing| matches!(thing, Thing::NetworkDevice { name, .. } if name == "planted0"),
        || ip(&["link", "delete", "planted0"]),
    )
}
