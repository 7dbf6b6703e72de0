//! Guests that send what no kernel sends.

use rstest::rstest;

use super::*;

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let mut client = Client::new();
    client.mkdir(ROOT_ID, "directory", 0o755).unwrap();
    let directory = client.walk("directory");
    for name in ["..", ".", "", "directory/..", "/etc", "a/b"] {
        for parent in [ROOT_ID, directory] {
            assert_eq!(client.lookup(parent, name).unwrap_err(), libc::EINVAL, "{name:?}");
            assert!(client.mkdir(parent, name, 0o755).is_err(), "{name:?}");
            assert!(client.create(parent, name, 0o644).is_err(), "{name:?}");
        }
    }
}

#[test]
fn a_symbolic_link_out_of_the_directory_is_a_link_and_not_followed() {
    let mut client = Client::new();
    symlink("/etc", client.host("link")).unwrap();
    let link = client.lookup(ROOT_ID, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(client.lookup(link.nodeid, "passwd").is_err());
    assert!(client.open(link.nodeid, libc::O_RDONLY).is_err());
    assert!(client.open(link.nodeid, libc::O_DIRECTORY).is_err());
}

#[test]
fn special_files_are_never_opened_on_the_host() {
    let mut client = Client::new();
    let pipe = client.mknod(ROOT_ID, "pipe", libc::S_IFIFO | 0o666, 0).unwrap().nodeid;
    let disk = client.mknod(ROOT_ID, "memory", libc::S_IFCHR | 0o666, 0x0101).unwrap().nodeid;
    for node in [pipe, disk] {
        assert_eq!(client.open(node, libc::O_RDONLY).unwrap_err(), libc::EBADF);
    }
}

#[test]
fn inodes_and_handles_that_do_not_exist_are_refused() {
    let mut client = Client::new();
    let (file, handle) = client.create(ROOT_ID, "file", 0o644).unwrap();
    assert_eq!(client.lookup(77, "x").unwrap_err(), libc::EBADF);
    assert_eq!(client.read(file.nodeid, handle + 1, 0, 1).unwrap_err(), libc::EBADF);
    assert_eq!(client.read(ROOT_ID, handle, 0, 1).unwrap_err(), libc::EBADF);
    // More forgets than lookups, and of what was never looked up.
    client.forget(file.nodeid, u64::MAX);
    client.forget(77, 1);
    client.forget(ROOT_ID, u64::MAX);
    assert_eq!(client.held(), 1);
    client.walk("file");
}

#[test]
fn nothing_works_before_the_file_system_is_mounted() {
    let mut client = Client::unmounted();
    assert_eq!(client.lookup(ROOT_ID, "x").unwrap_err(), libc::EBADF);
    assert_eq!(client.call(Opcode::Statfs, ROOT_ID, &[]).unwrap_err(), libc::EBADF);
}

#[test]
fn requests_without_a_service_are_refused_and_those_without_an_answer_get_none() {
    let mut client = Client::new();
    for opcode in [Opcode::Setlk as u32, Opcode::Ioctl as u32, Opcode::SetupMapping as u32, 0, 1000, u32::MAX] {
        let answer = client.call_raw(opcode, ROOT_ID, &[0; 200]);
        assert_eq!(answer[4..8], (-libc::ENOSYS).to_le_bytes(), "{opcode}");
    }
    for opcode in [Opcode::Interrupt, Opcode::Forget, Opcode::BatchForget] {
        assert_eq!(client.call_raw(opcode as u32, ROOT_ID, &[]), b"", "{opcode:?}");
    }
}

#[rstest]
#[case(Opcode::Getxattr, &[0xff; 4])]
#[case(Opcode::Listxattr, &[0xff; 4])]
#[case(Opcode::Read, &[0xff; 40])]
#[case(Opcode::Readdir, &[0xff; 40])]
#[case(Opcode::Readdirplus, &[0xff; 40])]
#[case(Opcode::Write, &[0xff; 40])]
#[case(Opcode::Setattr, &[0xff; 88])]
#[case(Opcode::BatchForget, &[0xff; 8])]
#[case(Opcode::Init, &[0xff; 64])]
fn sizes_beyond_all_bounds_are_no_danger(#[case] opcode: Opcode, #[case] body: &[u8]) {
    let mut client = Client::new();
    for length in 0..=body.len() {
        client.call_raw(opcode as u32, ROOT_ID, &body[..length]);
    }
    client.create(ROOT_ID, "file", 0o644).unwrap();
}

#[test]
fn a_header_that_lies_about_the_length_is_answered() {
    let mut client = Client::new();
    for length in [0, 39, 41, 1000, 1 << 20, (1 << 20) + 4097, u32::MAX] {
        let segment = client.write_request(Opcode::Lookup as u32, ROOT_ID, b"x\0");
        vm_memory::Bytes::write_obj(&*client.harness.memory, length, segment.address()).unwrap();
        let written = client.harness.request(1, &[segment, client.answer]);
        assert_eq!(written, 16, "{length}");
    }
}

#[test]
fn an_answer_without_room_is_cut_off_and_a_request_without_a_header_is_a_protocol_error() {
    let mut client = Client::new();
    fs::write(client.host("file"), "data").unwrap();
    for room in [0, 1, 15, 16, 20] {
        let segment = client.write_request(Opcode::Lookup as u32, ROOT_ID, b"file\0");
        let small = Segment::Writable(client.answer.address(), room);
        assert!(client.harness.request(1, &[segment, small]) <= room);
    }
    let segment = Segment::Readable(client.request.address(), 7);
    client.harness.submit(1, &[segment, client.answer]);
    assert!(matches!(client.harness.try_settle(9), Err(DeviceError::Protocol(_))));
}

#[test]
fn a_guest_cannot_take_the_descriptors_of_the_whole_process() {
    let mut client = Client::new();
    let (file, _) = client.create(ROOT_ID, "file", 0o644).unwrap();
    client.harness.device.directory.set_limit(10);
    let refused = (0..20).find_map(|_| client.open(file.nodeid, libc::O_RDONLY).err());
    assert_eq!(refused, Some(libc::ENFILE));
    assert_eq!(client.held(), 10);
    assert_eq!(client.lookup(ROOT_ID, "file").unwrap_err(), libc::ENFILE);
    // What it has, it can use and give back.
    client.release(file.nodeid, 5);
    client.walk("file");
}
