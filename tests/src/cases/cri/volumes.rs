//! Volumes of the node in containers.

use std::fs;

use anyhow::{Result, ensure};

use super::{forever, run_pod};
use crate::context::Context;
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any(
        "cri: a directory of the node is the same in two containers, and read-only where it was asked",
        directory,
    )
    .with_pods(),
    Case::any("cri: a file of the node is a file in the container, and its changes are seen", file).with_pods(),
    Case::any("cri: the kubelet's way of updating a configuration is seen in the container", configuration).with_pods(),
];

fn directory(context: &Context) -> Result<()> {
    let volume = context.work.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("from-node"), "node\n")?;
    let pod = run_pod(context, "volume")?;
    let writes = pod.run(forever("writes").with_mount(&volume, "/data", false))?;
    let reads = pod.run(forever("reads").with_mount(&volume, "/data", true))?;
    writes.shell("cat /data/from-node && echo pod > /data/from-pod && mkdir /data/sub && ln -s sub /data/link")?;
    ensure!(fs::read_to_string(volume.join("from-pod"))? == "pod\n");
    ensure!(reads.shell("cat /data/from-node /data/from-pod; ls -d /data/link/.")? == "node\npod\n/data/link/.\n");
    let refused = reads.exec(&["touch", "/data/file"], 0)?;
    ensure!(refused.exit_code != 0 && !volume.join("file").exists(), "{refused:?}");
    pod.remove()
}

fn file(context: &Context) -> Result<()> {
    let source = context.work.join("file");
    fs::write(&source, "one\n")?;
    let pod = run_pod(context, "file")?;
    let container = pod.run(forever("one").with_mount(&source, "/etc/some.conf", false))?;
    ensure!(container.shell("cat /etc/some.conf")? == "one\n");
    fs::write(&source, "two\n")?;
    ensure!(container.shell("cat /etc/some.conf; echo three > /etc/some.conf")? == "two\n");
    ensure!(fs::read_to_string(&source)? == "three\n");
    pod.remove()
}

/// A config map's volume: a link to a directory with the files, which is exchanged as one.
fn configuration(context: &Context) -> Result<()> {
    let volume = context.work.join("config");
    fs::create_dir_all(volume.join("..one"))?;
    fs::write(volume.join("..one/key"), "old\n")?;
    std::os::unix::fs::symlink("..one", volume.join("..data"))?;
    std::os::unix::fs::symlink("..data/key", volume.join("key"))?;
    let pod = run_pod(context, "config")?;
    let container = pod.run(forever("one").with_mount(&volume, "/config", true))?;
    ensure!(container.shell("cat /config/key")? == "old\n");
    fs::create_dir(volume.join("..two"))?;
    fs::write(volume.join("..two/key"), "new\n")?;
    std::os::unix::fs::symlink("..two", volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    fs::remove_dir_all(volume.join("..one"))?;
    ensure!(container.shell("cat /config/key")? == "new\n");
    pod.remove()
}
