//! Disks of the node: as devices of containers, and as their root file systems.

use std::fs;
use std::os::unix::fs::FileExt as _;

use anyhow::{Result, ensure};

use super::cri::{forever, run_pod};
use crate::context::{BUSYBOX, Context};
use crate::harness::Case;
use crate::loop_device::LoopDevice;

pub(super) const CASES: &[Case] = &[
    Case::any("disks: a container has a block device of the node by its name, and writes to it", device),
    Case::any(
        "disks: a raw volume is shared by a pod's containers, and read-only to one that may only read",
        raw_volume,
    )
    .with_pods(),
    Case::kata(
        "disks: a volume that is there to be read is not given to a later container for writing",
        not_for_writing,
    )
    .with_pods(),
    Case::any("disks: a container's root file system is on a disk of its own", root),
];

const SIZE: u64 = 16 << 20;

/// A disk with a few bytes at its beginning.
fn disk(context: &Context) -> Result<LoopDevice> {
    let file = context.work.join("disk");
    fs::File::create(&file)?.set_len(SIZE)?;
    fs::OpenOptions::new().write(true).open(&file)?.write_all_at(b"node", 0)?;
    LoopDevice::new(&file)
}

/// The four bytes at `offset` of the disk, as the node reads them.
fn read(device: &LoopDevice, offset: u64) -> Result<[u8; 4]> {
    let mut bytes = [0; 4];
    // What the node has read before may be older than what a guest wrote.
    let flushed = std::process::Command::new("blockdev").arg("--flushbufs").arg(&device.path).status()?;
    ensure!(flushed.success(), "blockdev --flushbufs: {flushed}");
    fs::File::open(&device.path)?.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn device(context: &Context) -> Result<()> {
    let disk = disk(context)?;
    let name = disk.path.display().to_string();
    let script = format!(
        "test -b {name} && head -c 4 {name} && wc -c < {name} && \
         echo -n guest | dd of={name} bs=1 seek=4096 conv=notrunc,fsync 2> /dev/null && ls /dev | grep -c loop"
    );
    let said = context.ctr.run(&["--device", &name], BUSYBOX, &context.id("disk"), &["sh", "-c", &script])?;
    ensure!(said.expect_code(0)?.text() == format!("node{SIZE}\n1"));
    ensure!(read(&disk, 4096)? == *b"gues");
    // Without asking, there is none.
    let said = context.ctr.run(&[], BUSYBOX, &context.id("none"), &["test", "-b", &name])?;
    said.expect_code(1).map(drop)
}

fn raw_volume(context: &Context) -> Result<()> {
    let disk = disk(context)?;
    let pod = run_pod(context, "raw")?;
    let writes = pod.run(forever("writes").with_device(&disk.path, "/dev/volume", "rwm"))?;
    let reads = pod.run(forever("reads").with_device(&disk.path, "/dev/other", "rm"))?;
    writes.shell("echo -n pod1 | dd of=/dev/volume conv=notrunc,fsync 2> /dev/null")?;
    ensure!(reads.shell("head -c 4 /dev/other")? == "pod1");
    ensure!(read(&disk, 0)? == *b"pod1");
    let refused = reads.exec(&["sh", "-c", "echo x > /dev/other"], 0)?;
    ensure!(refused.exit_code != 0, "{refused:?}");
    writes.remove()?;
    ensure!(reads.shell("head -c 4 /dev/other")? == "pod1");
    reads.remove()?;
    // It left with the last of them, and comes again.
    let again = pod.run(forever("again").with_device(&disk.path, "/dev/volume", "rwm"))?;
    again.shell("echo -n pod2 | dd of=/dev/volume conv=notrunc,fsync 2> /dev/null")?;
    ensure!(read(&disk, 0)? == *b"pod2");
    pod.remove()
}

fn not_for_writing(context: &Context) -> Result<()> {
    let disk = disk(context)?;
    let pod = run_pod(context, "raw")?;
    let reads = pod.run(forever("reads").with_device(&disk.path, "/dev/volume", "rm"))?;
    let refused = pod.run(forever("writes").with_device(&disk.path, "/dev/volume", "rwm")).map(drop);
    let text = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(text.contains("is in the guest for reading only"), "{text:?}");
    ensure!(reads.shell("head -c 4 /dev/volume")? == "node");
    pod.remove()
}

fn root(context: &Context) -> Result<()> {
    let run = |id: &str, script: &str| {
        let options = ["--snapshotter", "blockfile"];
        context.ctr.run(&options, BUSYBOX, &context.id(id), &["sh", "-c", script])?.expect_code(0)
    };
    let script = "echo own > /file && cat /file && test -x /bin/busybox && awk '$2 == \"/\" { print $3 }' /proc/mounts";
    for id in ["one", "two"] {
        let said = run(id, script)?.text();
        ensure!(said == "own\next4", "{said:?}");
    }
    let said = run("other", "test ! -e /file && awk '$2 == \"/\" { print $1 }' /proc/mounts")?.text();
    ensure!(!context.is_kata() || said.starts_with("/dev/vd"), "{said:?}");
    Ok(())
}
