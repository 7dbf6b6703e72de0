//! What containers do with their root file system.

use super::*;

#[test]
fn files_are_made_written_read_and_cut() {
    let mut client = Client::new();
    let (file, handle) = client.create(ROOT_ID, "file", 0o640).unwrap();
    assert_eq!(file.attr.mode & 0o777, 0o640);
    let data = (0..100_000_u32).flat_map(u32::to_le_bytes).take(100_000).collect::<Vec<_>>();
    assert_eq!(client.write(file.nodeid, handle, 0, &data).unwrap(), 100_000);
    assert!(client.read(file.nodeid, handle, 0, 120_000).unwrap() == data);
    assert_eq!(client.read(file.nodeid, handle, 99_990, 100).unwrap(), data[99_990..]);
    assert_eq!(client.read(file.nodeid, handle, 100_000, 100).unwrap(), b"");
    assert!(fs::read(client.host("file")).unwrap() == data);
    client.release(file.nodeid, handle);

    let handle = client.open(file.nodeid, libc::O_RDWR | libc::O_TRUNC).unwrap();
    assert_eq!(fs::metadata(client.host("file")).unwrap().len(), 0);
    let resize = SetattrIn { valid: 8, size: 5000, ..SetattrIn::default() };
    client.call(Opcode::Setattr, file.nodeid, resize.as_slice()).unwrap();
    assert_eq!(fs::metadata(client.host("file")).unwrap().len(), 5000);
    let sync = FsyncIn { fh: handle, ..FsyncIn::default() };
    client.call(Opcode::Fsync, file.nodeid, sync.as_slice()).unwrap();
    let grow = FallocateIn { fh: handle, offset: 0, length: 10_000, ..FallocateIn::default() };
    client.call(Opcode::Fallocate, file.nodeid, grow.as_slice()).unwrap();
    assert_eq!(fs::metadata(client.host("file")).unwrap().len(), 10_000);
    assert_eq!(client.create(ROOT_ID, "file", 0o640).unwrap_err(), libc::EEXIST);
}

#[test]
fn files_belong_to_the_process_that_made_them_whatever_the_directory_allows_that_user() {
    let mut client = Client::new();
    // The guest's kernel let the process in, for instance by one of its further groups.
    fs::set_permissions(client.directory.path(), fs::Permissions::from_mode(0o770)).unwrap();
    client.user = (1000, 2000);
    client.create(ROOT_ID, "file", 0o6755).unwrap();
    client.mkdir(ROOT_ID, "directory", 0o777).unwrap();
    client.mknod(ROOT_ID, "pipe", libc::S_IFIFO | 0o600, 0).unwrap();
    client.call(Opcode::Symlink, ROOT_ID, b"link\0target\0").unwrap();
    for (name, mode) in [("file", 0o6755), ("directory", 0o755), ("pipe", 0o600), ("link", 0o777)] {
        let metadata = fs::symlink_metadata(client.host(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (1000, 2000, mode), "{name}");
    }
    // A directory with the set-group-id bit gives its group on.
    nix::unistd::chown(&client.host("directory"), None, Some(nix::unistd::Gid::from_raw(3000))).unwrap();
    fs::set_permissions(client.host("directory"), fs::Permissions::from_mode(0o2777)).unwrap();
    let directory = client.walk("directory");
    client.create(directory, "inside", 0o644).unwrap();
    assert_eq!(fs::metadata(client.host("directory/inside")).unwrap().gid(), 3000);
}

#[test]
fn the_umask_of_the_rest_of_the_process_stays() {
    let (ready, wait) = std::sync::mpsc::channel();
    let (done, finish) = std::sync::mpsc::channel::<()>();
    let device = std::thread::spawn(move || {
        let client = Client::new();
        ready.send(()).unwrap();
        finish.recv().unwrap();
        drop(client);
    });
    wait.recv().unwrap();
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("made")).unwrap();
    let mode = fs::metadata(directory.path().join("made")).unwrap().mode();
    done.send(()).unwrap();
    device.join().unwrap();
    assert_ne!(mode & 0o777, 0o777, "the umask of this thread is 0");
}

#[test]
fn ownership_mode_and_times_are_changed() {
    let mut client = Client::new();
    fs::write(client.host("file"), "").unwrap();
    let file = client.walk("file");
    // FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_ATIME | FATTR_MTIME
    let change = SetattrIn {
        valid: 1 | 2 | 4 | 16 | 32,
        mode: 0o604,
        uid: 7,
        gid: 8,
        atime: 1_000_000_000,
        mtime: 1_100_000_000,
        mtimensec: 123_456_789,
        ..SetattrIn::default()
    };
    client.call(Opcode::Setattr, file, change.as_slice()).unwrap();
    let metadata = fs::metadata(client.host("file")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (7, 8, 0o604));
    assert_eq!(
        (metadata.atime(), metadata.mtime(), metadata.mtime_nsec()),
        (1_000_000_000, 1_100_000_000, 123_456_789)
    );

    symlink("nowhere", client.host("link")).unwrap();
    let link = client.walk("link");
    let own = SetattrIn { valid: 2 | 4 | 32, uid: 9, gid: 9, mtime: 5, ..SetattrIn::default() };
    client.call(Opcode::Setattr, link, own.as_slice()).unwrap();
    let metadata = fs::symlink_metadata(client.host("link")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mtime()), (9, 9, 5));
}

#[test]
fn links_nodes_and_renames_work() {
    let mut client = Client::new();
    client.call(Opcode::Symlink, ROOT_ID, b"link\0/some/target\0").unwrap();
    assert_eq!(fs::read_link(client.host("link")).unwrap(), Path::new("/some/target"));
    let link = client.walk("link");
    assert_eq!(client.call(Opcode::Readlink, link, &[]).unwrap(), b"/some/target");

    let (file, _) = client.create(ROOT_ID, "a", 0o644).unwrap();
    let body = [LinkIn { oldnodeid: file.nodeid }.as_slice(), b"b\0"].concat();
    let second = Client::entry(client.call(Opcode::Link, ROOT_ID, &body).unwrap());
    assert_eq!((second.nodeid, second.attr.nlink), (file.nodeid, 2));

    client.mknod(ROOT_ID, "pipe", libc::S_IFIFO | 0o600, 0).unwrap();
    assert!(fs::metadata(client.host("pipe")).unwrap().file_type().is_fifo());
    client.mknod(ROOT_ID, "null", libc::S_IFCHR | 0o600, 0x0103).unwrap();
    assert!(fs::metadata(client.host("null")).unwrap().file_type().is_char_device());
    // What overlayfs takes for a deleted file.
    client.mknod(ROOT_ID, "whiteout", libc::S_IFCHR, 0).unwrap();

    let rename = |client: &mut Client, from: &str, to: &str, flags: u32| {
        let names = [name_bytes(from), name_bytes(to)].concat();
        let body = [Rename2In { newdir: ROOT_ID, flags, ..Rename2In::default() }.as_slice(), &names].concat();
        client.call(Opcode::Rename2, ROOT_ID, &body).map(|_| ())
    };
    assert_eq!(rename(&mut client, "pipe", "a", libc::RENAME_NOREPLACE).unwrap_err(), libc::EEXIST);
    rename(&mut client, "pipe", "link", libc::RENAME_EXCHANGE).unwrap();
    assert!(fs::symlink_metadata(client.host("pipe")).unwrap().is_symlink());
    rename(&mut client, "pipe", "moved", 0).unwrap();
    assert!(fs::symlink_metadata(client.host("moved")).unwrap().is_symlink());
}

#[test]
fn extended_attributes_are_kept() {
    let mut client = Client::new();
    fs::write(client.host("file"), "").unwrap();
    let file = client.walk("file");
    let value = b"some value";
    let set = SetxattrIn { size: 10, flags: 0 };
    let body = [set.as_slice(), b"trusted.test\0", value].concat();
    client.call(Opcode::Setxattr, file, &body).unwrap();
    let get = |size: u32| [GetxattrIn { size, padding: 0 }.as_slice(), b"trusted.test\0"].concat();
    assert_eq!(client.call(Opcode::Getxattr, file, &get(0)).unwrap()[..4], 10_u32.to_le_bytes());
    assert_eq!(client.call(Opcode::Getxattr, file, &get(100)).unwrap(), value);
    assert_eq!(client.call(Opcode::Getxattr, file, &get(5)).unwrap_err(), libc::ERANGE);
    let list = GetxattrIn { size: 1000, padding: 0 };
    assert_eq!(client.call(Opcode::Listxattr, file, list.as_slice()).unwrap(), b"trusted.test\0");
    client.call(Opcode::Removexattr, file, b"trusted.test\0").unwrap();
    assert_eq!(client.call(Opcode::Getxattr, file, &get(100)).unwrap_err(), libc::ENODATA);
}

#[test]
fn a_file_that_is_unlinked_while_open_can_still_be_used() {
    let mut client = Client::new();
    let (file, handle) = client.create(ROOT_ID, "file", 0o600).unwrap();
    client.write(file.nodeid, handle, 0, b"still here").unwrap();
    client.call(Opcode::Unlink, ROOT_ID, b"file\0").unwrap();
    assert!(!client.host("file").exists());
    assert_eq!(client.read(file.nodeid, handle, 0, 100).unwrap(), b"still here");
    let resize = SetattrIn { valid: 8, size: 5, ..SetattrIn::default() };
    client.call(Opcode::Setattr, file.nodeid, resize.as_slice()).unwrap();
    assert_eq!(client.read(file.nodeid, handle, 0, 100).unwrap(), b"still");
    client.release(file.nodeid, handle);
    client.forget(file.nodeid, 1);
    assert_eq!(client.held(), 0);
}

#[test]
fn a_file_that_the_host_replaces_is_seen_at_the_next_lookup() {
    let mut client = Client::new();
    fs::write(client.host("config"), "old").unwrap();
    let old = client.walk("config");
    let handle = client.open(old, libc::O_RDONLY).unwrap();
    fs::write(client.host("new"), "replaced").unwrap();
    fs::rename(client.host("new"), client.host("config")).unwrap();
    let entry = client.lookup(ROOT_ID, "config").unwrap();
    assert_ne!(entry.nodeid, old);
    assert_eq!(entry.attr.size, 8);
    assert_eq!((entry.entry_valid, entry.attr_valid), (0, 1));
    assert_eq!(client.read(old, handle, 0, 100).unwrap(), b"old");
    fs::remove_file(client.host("config")).unwrap();
    assert_eq!(client.lookup(ROOT_ID, "config").unwrap_err(), libc::ENOENT);
}

#[test]
fn names_are_kept_where_the_guest_alone_changes_them() {
    let mut client = Client::new();
    for directory in ["rootfs", "one/rootfs/rootfs", "one/mounts/rootfs"] {
        fs::create_dir_all(client.host(directory)).unwrap();
    }
    for (path, kept) in [
        ("rootfs", 0),
        ("one", 0),
        ("one/rootfs", 60),
        ("one/rootfs/rootfs", 60),
        ("one/mounts", 0),
        ("one/mounts/rootfs", 0),
    ] {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = if parent.is_empty() { ROOT_ID } else { client.walk(parent) };
        let entry = client.lookup(parent, name).unwrap();
        assert_eq!((entry.entry_valid, entry.attr_valid), (kept, kept.max(1)), "{path}");
    }
    // A file that is in both is everyone's.
    fs::write(client.host("one/rootfs/file"), "").unwrap();
    fs::hard_link(client.host("one/rootfs/file"), client.host("one/mounts/file")).unwrap();
    let (rootfs, mounts) = (client.walk("one/rootfs"), client.walk("one/mounts"));
    let kept = |client: &mut Client, parent| {
        let entry = client.lookup(parent, "file").unwrap();
        (entry.entry_valid, entry.attr_valid)
    };
    assert_eq!(kept(&mut client, rootfs), (60, 60));
    assert_eq!(kept(&mut client, mounts), (0, 1));
    assert_eq!(kept(&mut client, rootfs), (60, 1));
}

#[test]
fn the_content_of_a_file_is_kept_where_the_guest_alone_changes_it_until_it_changes() {
    let mut client = Client::new();
    for directory in ["one/rootfs", "one/mounts"] {
        fs::create_dir_all(client.host(directory)).unwrap();
        fs::write(client.host(&format!("{directory}/file")), "first").unwrap();
    }
    let (own, shared) = (client.walk("one/rootfs/file"), client.walk("one/mounts/file"));
    assert!(!client.keeps_pages(own, libc::O_RDONLY), "the guest may have pages of long ago");
    assert!(client.settles(own));
    assert!(client.keeps_pages(own, libc::O_RDONLY) && client.keeps_pages(own, libc::O_RDWR));
    assert!(!client.keeps_pages(shared, libc::O_RDONLY), "others change it, some of them by memory that they map");

    // A change of as many bytes, by the host against the rule.
    fs::write(client.host("one/rootfs/file"), "other").unwrap();
    assert!(!client.keeps_pages(own, libc::O_RDONLY));
    assert!(client.settles(own));
    assert!(!client.keeps_pages(own, libc::O_RDWR | libc::O_TRUNC));
    // What it writes itself, it reads again.
    assert!(client.settles(own));
    let handle = client.open(own, libc::O_RDWR).unwrap();
    client.write(own, handle, 0, b"third").unwrap();
    client.release(own, handle);
    assert!(!client.keeps_pages(own, libc::O_RDONLY));
}

#[test]
fn what_was_opened_to_be_read_is_closed_without_a_request() {
    let mut client = Client::new();
    fs::write(client.host("file"), "content").unwrap();
    let file = client.walk("file");
    // FOPEN_NOFLUSH
    let closes_alone = |client: &mut Client, flags| client.open_flags(file, flags) & 32 != 0;
    assert!(closes_alone(&mut client, libc::O_RDONLY) && closes_alone(&mut client, libc::O_RDONLY | libc::O_NOFOLLOW));
    assert!(!closes_alone(&mut client, libc::O_WRONLY) && !closes_alone(&mut client, libc::O_RDWR));
}

#[test]
fn a_default_access_control_list_stands_in_for_the_umask() {
    let mut client = Client::new();
    client.mkdir(ROOT_ID, "plain", 0o777).unwrap();
    // Version 2, then tag, permissions and id of each entry (linux/posix_acl_xattr.h).
    let entries: [(u16, u16); 3] = [(1, 7), (4, 7), (32, 1)];
    let entries = entries.map(|(tag, permissions)| [tag.to_le_bytes(), permissions.to_le_bytes(), [255; 2], [255; 2]]);
    let list = [&2_u32.to_le_bytes()[..], entries.as_flattened().as_flattened()].concat();
    let set = SetxattrIn { size: u32::try_from(list.len()).unwrap(), flags: 0 };
    let body = [set.as_slice(), b"system.posix_acl_default\0", &list].concat();
    client.call(Opcode::Setxattr, ROOT_ID, &body).unwrap();
    client.mkdir(ROOT_ID, "listed", 0o777).unwrap();
    for (name, mode) in [("plain", 0o755), ("listed", 0o771)] {
        assert_eq!(fs::metadata(client.host(name)).unwrap().mode() & 0o7777, mode, "{name}");
    }
}

#[test]
fn directories_are_listed_whole_in_both_ways_and_nothing_stays_held() {
    let mut client = Client::new();
    client.mkdir(ROOT_ID, "directory", 0o755).unwrap();
    for number in 0..300 {
        fs::write(client.host(&format!("directory/file {number}")), "").unwrap();
    }
    let directory = client.walk("directory");
    client.forget(directory, 1);
    let plain = client.list(directory, false);
    let plus = client.list(directory, true);
    assert_eq!(plain.len(), 300);
    assert_eq!(plain, plus);
    assert_eq!(client.held(), 1);
    assert_eq!(client.call(Opcode::Rmdir, ROOT_ID, b"directory\0").unwrap_err(), libc::ENOTEMPTY);
    assert_eq!(client.call(Opcode::Unlink, directory, b"file 7\0").unwrap(), b"");
    assert_eq!(client.list(directory, true).len(), 299);
}

#[test]
fn writing_takes_the_set_user_id_bit_away_where_the_guest_asks_for_it() {
    let mut client = Client::new();
    let (file, handle) = client.create(ROOT_ID, "file", 0o6755).unwrap();
    // WRITE_KILL_SUIDGID
    let write = WriteIn { fh: handle, size: 1, fuse_flags: 4, flags: 2, ..WriteIn::default() };
    client.call(Opcode::Write, file.nodeid, &[write.as_slice(), b"x"].concat()).unwrap();
    assert_eq!(fs::metadata(client.host("file")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn the_file_systems_size_is_that_of_the_host() {
    let mut client = Client::new();
    let answer = client.call(Opcode::Statfs, ROOT_ID, &[]).unwrap();
    let guest = Kstatfs::from_slice(&answer[..size_of::<Kstatfs>()]).unwrap();
    let host = nix::sys::statvfs::statvfs(client.directory.path()).unwrap();
    assert_eq!((guest.blocks, u64::from(guest.bsize)), (host.blocks(), host.block_size()));
}
