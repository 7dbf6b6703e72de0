//! The guest image, built and read back by erofs-utils.

#![expect(clippy::unwrap_used, reason = "a test ends where a value is missing")]

use std::fs;
use std::path::Path;
use std::process::Command;

use rootfs_builder::{Error, guest_image};

/// A static ELF executable of `size` bytes (one PT_LOAD program header).
fn agent(dir: &Path, size: usize) -> std::path::PathBuf {
    let mut file: Vec<u8> = (0..size).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    file[..120].fill(0);
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    for (at, value) in [(16, 2), (18, 62), (32, 64), (54, 56), (56, 1), (64, 1)] {
        file[at] = value;
    }
    let path = dir.join("agent");
    fs::write(&path, file).unwrap();
    path
}

/// The image of an agent and the busybox of this machine.
fn build(agent: &Path, output: &Path) -> Result<guest_image::GuestImage, Error> {
    guest_image::build(agent, guest_image::BUSYBOX.as_ref(), output)
}

fn dump(image: &Path, path: &str) -> String {
    let output = Command::new("dump.erofs").arg("-e").arg(format!("--path={path}")).arg(image).output().unwrap();
    assert!(output.status.success(), "{path} is missing: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn two_builds_of_one_agent_are_equal_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path(), 1_500_001);
    let first = build(&agent, &dir.path().join("first")).unwrap();
    let second = build(&agent, &dir.path().join("second/image")).unwrap();
    assert_eq!(first.sha256, second.sha256);
    assert!(fs::read(&first.path).unwrap() == fs::read(&second.path).unwrap());
}

#[test]
fn images_of_different_agents_differ_in_content_and_uuid() {
    let dir = tempfile::tempdir().unwrap();
    let first = build(&agent(dir.path(), 50_000), &dir.path().join("first")).unwrap();
    let second = build(&agent(dir.path(), 50_001), &dir.path().join("second")).unwrap();
    assert_ne!(first.sha256, second.sha256);
    assert_ne!(first.uuid, second.uuid);
}

#[test]
fn the_image_is_a_clean_file_system_with_the_agent_a_shell_and_all_mount_points() {
    let dir = tempfile::tempdir().unwrap();
    let image = build(&agent(dir.path(), 300_000), &dir.path().join("image")).unwrap();
    let checked = Command::new("fsck.erofs").arg(&image.path).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    assert!(dump(&image.path, "/sbin/kata-agent").contains("Access: 0755"));
    // dump.erofs shows the permission bits alone, not the sticky one.
    assert!(dump(&image.path, "/tmp").contains("Access: 0777"));
    for path in ["/proc", "/sys", "/dev", "/run", "/lib/modules", "/etc/resolv.conf", "/etc/hosts", "/etc/passwd"] {
        dump(&image.path, path);
    }
    assert!(dump(&image.path, "/bin/busybox").contains("Access: 0755"));
    assert!(dump(&image.path, "/bin/sh").contains("symlink"));
}

#[test]
fn the_agent_can_be_mapped_by_dax() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path(), 300_001);
    let image = build(&agent, &dir.path().join("image")).unwrap();
    let shown = dump(&image.path, "/sbin/kata-agent");
    // Layout 0 is EROFS_INODE_FLAT_PLAIN: whole blocks, no tail inside the inode.
    assert!(shown.contains("Layout: 0"), "{shown}");
    assert!(shown.contains("1 extents found"), "{shown}");
    let offset = shown
        .lines()
        .find_map(|line| line.trim().strip_prefix("0:")?.split('|').nth(1)?.rsplit(':').next())
        .map(|range| range.split("..").next().unwrap().trim().parse::<usize>().unwrap())
        .unwrap();
    assert_eq!(offset % 4096, 0, "{shown}");
    let content = fs::read(&image.path).unwrap();
    assert_eq!(content.len() as u64 % guest_image::PMEM_ALIGNMENT, 0);
    let agent = fs::read(agent).unwrap();
    assert!(content[offset..offset + agent.len()] == agent[..]);
}

#[test]
fn an_agent_that_is_too_large_is_refused_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path(), 12 << 20);
    let output = dir.path().join("image");
    let error = build(&agent, &output).unwrap_err();
    assert!(matches!(error, Error::TooLarge { limit: guest_image::MAX_SIZE, .. }), "{error}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["agent"]);
}

#[test]
fn a_script_as_agent_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("agent");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    let error = build(&script, &dir.path().join("image")).unwrap_err().to_string();
    assert!(error.contains("no ELF file") && error.contains("crt-static"), "{error}");
}
