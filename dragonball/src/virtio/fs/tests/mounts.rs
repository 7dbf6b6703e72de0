//! Mounts under the shared directory: they come and go while the VM runs.
//!
//! Each test has its thread in a mount namespace of its own.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// A guest, and a thread that may mount.
fn client() -> Client {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    Client::new()
}

fn mount_tmpfs(path: &Path) {
    mount(Some("test"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

fn unmount(path: &Path) -> Result<(), nix::Error> {
    umount2(path, MntFlags::empty())
}

#[test]
fn a_mount_that_appears_later_is_seen_by_the_next_lookup() {
    let mut client = client();
    fs::create_dir(client.host("rootfs")).unwrap();
    let before = client.walk("rootfs");
    mount_tmpfs(&client.host("rootfs"));
    fs::write(client.host("rootfs/file"), "mounted").unwrap();
    let rootfs = client.walk("rootfs");
    assert_ne!(rootfs, before);
    let file = client.lookup(rootfs, "file").unwrap().nodeid;
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(file, handle, 0, 100).unwrap(), b"mounted");
    client.create(rootfs, "made", 0o644).unwrap();
    assert!(client.host("rootfs/made").exists());
}

#[test]
fn files_of_several_mounts_never_share_an_inode_number() {
    let mut client = client();
    let mut numbers = HashMap::new();
    for container in ["a", "b", "c"] {
        fs::create_dir(client.host(container)).unwrap();
        mount_tmpfs(&client.host(container));
        // A new tmpfs gives its files the same numbers each time.
        let root = client.lookup(ROOT_ID, container).unwrap();
        let mut entries = vec![root];
        for name in ["x", "y"] {
            fs::write(client.host(&format!("{container}/{name}")), "").unwrap();
            entries.push(client.lookup(root.nodeid, name).unwrap());
        }
        let listed = client.list(root.nodeid, false);
        for (entry, name) in entries[1..].iter().zip(["x", "y"]) {
            assert_eq!(listed[name], entry.attr.ino);
        }
        for entry in entries {
            assert_eq!(entry.nodeid, entry.attr.ino);
            assert_eq!(numbers.insert(entry.nodeid, container), None);
        }
    }
    let host = |name: &str| fs::metadata(client.host(name)).unwrap().ino();
    assert_eq!(host("a/x"), host("b/x"), "the host's numbers are the same, or this test shows nothing");
}

#[test]
fn the_host_can_unmount_once_the_guest_has_forgotten() {
    let mut client = client();
    fs::create_dir(client.host("rootfs")).unwrap();
    mount_tmpfs(&client.host("rootfs"));
    let rootfs = client.walk("rootfs");
    let (file, handle) = client.create(rootfs, "file", 0o644).unwrap();
    client.list(rootfs, true);
    client.call(Opcode::Statfs, rootfs, &[]).unwrap();
    assert_eq!(unmount(&client.host("rootfs")), Err(nix::Error::EBUSY));
    client.release(file.nodeid, handle);
    assert_eq!(unmount(&client.host("rootfs")), Err(nix::Error::EBUSY));
    client.forget(file.nodeid, 1);
    assert_eq!(unmount(&client.host("rootfs")), Err(nix::Error::EBUSY));
    client.forget(rootfs, 1);
    assert_eq!(unmount(&client.host("rootfs")), Ok(()));
    assert_eq!(client.held(), 0);
}

#[test]
fn a_mount_that_the_guest_still_holds_can_be_detached_and_goes_away_with_the_last_forget() {
    let mut client = client();
    fs::create_dir(client.host("rootfs")).unwrap();
    // That the file system is gone shows in its backing file, which is free again.
    let backing = tempfile::tempdir().unwrap();
    mount_tmpfs(backing.path());
    mount(Some(backing.path()), &client.host("rootfs"), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let rootfs = client.walk("rootfs");
    let (file, handle) = client.create(rootfs, "file", 0o644).unwrap();
    umount2(&client.host("rootfs"), MntFlags::MNT_DETACH).unwrap();
    fs::remove_dir(client.host("rootfs")).unwrap();
    // The guest's open file works on; a new lookup finds nothing.
    client.write(file.nodeid, handle, 0, b"late").unwrap();
    assert_eq!(client.lookup(ROOT_ID, "rootfs").unwrap_err(), libc::ENOENT);
    assert_eq!(fs::read(backing.path().join("file")).unwrap(), b"late");
    client.release(file.nodeid, handle);
    client.forget(file.nodeid, 1);
    client.forget(rootfs, 1);
    assert_eq!(client.held(), 0);
    assert_eq!(unmount(backing.path()), Ok(()));
}

#[test]
fn a_reset_releases_every_mount() {
    let mut client = client();
    fs::create_dir(client.host("rootfs")).unwrap();
    mount_tmpfs(&client.host("rootfs"));
    let rootfs = client.walk("rootfs");
    client.create(rootfs, "file", 0o644).unwrap();
    client.harness.reset();
    assert_eq!(unmount(&client.host("rootfs")), Ok(()));
}

#[test]
fn an_overlay_as_a_containers_root_works() {
    let mut client = client();
    // An overlay needs directories of a file system that can be its upper layer, which another overlay may not be.
    let layers = tempfile::tempdir().unwrap();
    mount_tmpfs(layers.path());
    for name in ["lower", "upper", "work"] {
        fs::create_dir(layers.path().join(name)).unwrap();
    }
    fs::write(layers.path().join("lower/image"), "from the image").unwrap();
    fs::create_dir(client.host("rootfs")).unwrap();
    let options = ["lower", "upper", "work"]
        .map(|name| format!("{}={}", if name == "work" { "workdir" } else { name }, layers.path().join(name).display()))
        .map(|option| option.replace("lower=", "lowerdir=").replace("upper=", "upperdir="))
        .join(",");
    mount(Some("overlay"), &client.host("rootfs"), Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();

    let rootfs = client.walk("rootfs");
    let image = client.lookup(rootfs, "image").unwrap().nodeid;
    let handle = client.open(image, libc::O_RDWR).unwrap();
    assert_eq!(client.read(image, handle, 0, 100).unwrap(), b"from the image");
    client.write(image, handle, 0, b"FROM").unwrap();
    assert_eq!(client.read(image, handle, 0, 100).unwrap(), b"FROM the image");
    assert_eq!(fs::read(layers.path().join("lower/image")).unwrap(), b"from the image");
    client.call(Opcode::Unlink, rootfs, b"image\0").unwrap();
    assert!(fs::symlink_metadata(layers.path().join("upper/image")).unwrap().file_type().is_char_device());
    client.create(rootfs, "made", 0o644).unwrap();
    assert_eq!(client.list(rootfs, true).len(), 1);
}
