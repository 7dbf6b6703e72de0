//! Volumes of the node, as programs see them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::context::{BUSYBOX, Context, DEBIAN};
use crate::harness::Case;
use crate::observe::read_until;
use crate::process::Running;

pub(super) const CASES: &[Case] = &[
    Case::any("storage: programs find a volume to be the node's own file system", as_on_the_node).with_services(),
    Case::any("storage: what the node changes in a volume is seen at once", node_s_changes),
    Case::any("storage: a program that waits for a config map's change is told of it", told_of_changes).with_services(),
];

/// What root of the node may and root of a container may not, as far as it decides what is observed.
const MORE_CAPABILITIES: [&str; 6] =
    ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SYS_RESOURCE", "--cap-add", "CAP_DAC_READ_SEARCH"];

/// Behaviours that are other in a guest, and why.
const DIFFERENCES: &[(&str, &str)] = &[
    // Programs do without, as on other file systems that cannot.
    ("unnamed files", "the device's library does not serve O_TMPFILE (FUSE_TMPFILE)"),
];

/// Has `storage-check` observe a volume from a container, and the same file system from the node.
fn as_on_the_node(context: &Context) -> Result<()> {
    let volume = context.work.join("volume");
    for directory in ["node", "container"] {
        fs::create_dir_all(volume.join(directory))?;
    }
    let program = volume.join("storage-check");
    fs::copy(&context.storage_check, &program)
        .with_context(|| format!("Cannot copy {}", context.storage_check.display()))?;
    let on_node = Command::new(&program).arg(volume.join("node")).output()?;
    ensure!(on_node.status.success(), "{}", String::from_utf8_lossy(&on_node.stderr));
    let in_container = ["/data/storage-check", "/data/container"];
    let id = context.id("storage");
    let volume_option = bind(&volume, "rw");
    let options = [&MORE_CAPABILITIES[..], &[VOLUME, &volume_option]].concat();
    let finished = context.ctr.run(&options, DEBIAN, &id, &in_container)?.expect_code(0)?;
    compare(&observations(&on_node.stdout)?, &observations(&finished.stdout)?, context.is_kata())?;
    expect_empty(&volume.join("container"))
}

/// No name that a program uses is older than its use, and no file older than its opening.
fn node_s_changes(context: &Context) -> Result<()> {
    let volume = context.work.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("file"), "1")?;
    let container = context.ctr.detach(&[VOLUME, &bind(&volume, "rw")], BUSYBOX, &context.id("storage"), FOREVER)?;
    let shell = |script: &str| -> Result<String> {
        Ok(container.exec("shell", &[], &["sh", "-c", script], b"")?.expect_code(0)?.text())
    };
    ensure!(shell("cat /data/file; ls /data")? == "1file");
    for (number, content) in ["22", "333", "4444"].into_iter().enumerate() {
        fs::write(volume.join("file"), content)?;
        fs::write(volume.join(number.to_string()), "")?;
        ensure!(
            shell(&format!("cat /data/file && stat -c %s /data/file && test -e /data/{number}"))?
                == format!("{content}{}", content.len())
        );
        fs::remove_file(volume.join(number.to_string()))?;
        ensure!(shell(&format!("test ! -e /data/{number} && echo gone > /data/file"))?.is_empty());
        ensure!(fs::read_to_string(volume.join("file"))? == "gone\n");
    }
    container.remove().map(drop)
}

/// As a kubelet updates a config map: a new directory, and then the link that all names lead through.
fn told_of_changes(context: &Context) -> Result<()> {
    let tools = context.work.join("tools");
    fs::create_dir(&tools)?;
    fs::copy(&context.storage_check, tools.join("storage-check"))?;
    let volume = context.work.join("volumes/kubernetes.io~configmap/config");
    let version = |name: &str, value: &str| -> Result<()> {
        fs::create_dir_all(volume.join(name))?;
        fs::write(volume.join(name).join("key"), value)?;
        std::os::unix::fs::symlink(name, volume.join("..data_tmp"))?;
        Ok(fs::rename(volume.join("..data_tmp"), volume.join("..data"))?)
    };
    version("..one", "old\n")?;
    std::os::unix::fs::symlink("..data/key", volume.join("key"))?;
    let config = format!("type=bind,src={},dst=/config,options=rbind:ro", volume.display());
    let script = "cat /config/key && /data/storage-check --wait /config ..data && cat /config/key";
    let options = ["--rm", VOLUME, &bind(&tools, "ro"), VOLUME, &config];
    let id = context.id("storage");
    let mut command = context.ctr.run_command(&options, DEBIAN, &id, &["sh", "-c", script]);
    let mut running = Running::start_with_pipes(&mut command)?;
    let mut output = running.take_stdout()?;
    read_until(&mut output, "old\nwaiting\n", context.ctr.deadline())?;
    version("..two", "new\n")?;
    fs::remove_dir_all(volume.join("..one"))?;
    running.collect_stdout_of(output);
    let finished = running.finish(context.ctr.deadline())?.expect_code(0)?;
    ensure!(finished.text() == "new", "{finished:?}");
    Ok(())
}

const FOREVER: &[&str] = &["sleep", "1000"];
/// The option of ctr before each of [`bind`].
const VOLUME: &str = "--mount";

/// The volume at `/data`.
fn bind(volume: &Path, access: &str) -> String {
    format!("type=bind,src={},dst=/data,options=rbind:{access}", volume.display())
}

/// What was observed, by behaviour.
fn observations(output: &[u8]) -> Result<BTreeMap<&str, &str>> {
    let lines = std::str::from_utf8(output)?.lines();
    lines.map(|line| line.split_once(": ").with_context(|| format!("No observation: {line}"))).collect()
}

fn compare(node: &BTreeMap<&str, &str>, container: &BTreeMap<&str, &str>, in_guest: bool) -> Result<()> {
    let expected = |name: &str| in_guest && DIFFERENCES.iter().any(|(known, _)| *known == name);
    let mut surprises = Vec::new();
    for (name, on_node) in node {
        let in_container = container.get(name).copied().unwrap_or("nothing");
        if (in_container != *on_node) != expected(name) {
            surprises.push(format!("{name}\n    on the node:      {on_node}\n    in the container: {in_container}"));
        }
    }
    ensure!(node.len() == container.len(), "{} behaviours on the node, {} here", node.len(), container.len());
    if surprises.is_empty() { Ok(()) } else { bail!("Other than expected:\n  {}", surprises.join("\n  ")) }
}

fn expect_empty(directory: &Path) -> Result<()> {
    let left: Vec<_> = fs::read_dir(directory)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "The node still sees what the container has removed: {left:?}");
    Ok(())
}
