//! Tests of the file system device: a FUSE client of a guest's kernel on the rings, a directory of the host behind.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Instant;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, EntryOut, FallocateIn, FsOptions, FsyncIn, GetxattrIn, InHeader, InitIn, Kstatfs, LinkIn, MkdirIn,
    MknodIn, Opcode, OpenIn, OpenOut, OutHeader, ROOT_ID, ReadIn, ReleaseIn, Rename2In, SetattrIn, SetxattrIn, WriteIn,
};
use tempfile::TempDir;
use vm_memory_017::ByteValued;

use super::*;
use crate::virtio::testing::{Harness, Segment};

mod files;
mod hostile;
mod mounts;

/// No test waits for this long.
const HANG_GUARD: Duration = Duration::from_secs(60);
/// Room for an answer.
const ANSWER: u32 = 128 << 10;
/// Room for a request.
const REQUEST: u32 = 128 << 10;

/// A device whose guest alone changes what is in `*/rootfs`.
fn device(tag: &str, directory: &Path) -> Result<Fs, FsError> {
    let (tag, guest_only) = (tag.to_owned(), Some("rootfs".to_owned()));
    Fs::new(&FsConfig { tag, directory: directory.to_owned(), guest_only })
}

/// A guest's kernel that has the file system of a directory mounted.
struct Client {
    harness: Harness<Fs>,
    directory: TempDir,
    request: Segment,
    answer: Segment,
    unique: u64,
    user: (u32, u32),
}

impl Client {
    /// A guest that has not mounted the file system.
    fn unmounted() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut harness = Harness::new(device("test", directory.path()).unwrap());
        let request = harness.allocate(REQUEST);
        let answer = harness.writable(ANSWER);
        let request = Segment::Readable(request, REQUEST);
        Self { harness, directory, request, answer, unique: 0, user: (0, 0) }
    }

    fn new() -> Self {
        let mut client = Self::unmounted();
        client.init();
        client
    }

    fn init(&mut self) -> FsOptions {
        let capable = FsOptions::all();
        let init = InitIn {
            major: 7,
            minor: 38,
            max_readahead: 1 << 17,
            flags: u32::try_from(capable.bits() & u64::from(u32::MAX)).unwrap(),
        };
        let high = u32::try_from(capable.bits() >> 32).unwrap();
        let body = [init.as_slice(), &high.to_le_bytes(), &[0; 44]].concat();
        let answer = self.call(Opcode::Init, 0, &body).unwrap();
        let field = |at: usize| u64::from(u32::from_le_bytes(answer[at..at + 4].try_into().unwrap()));
        FsOptions::from_bits_truncate(field(12) | (field(32) << 32))
    }

    /// Sends a request and returns the answer's body, or the error number.
    fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let answer = self.call_raw(opcode as u32, node, body);
        let header = OutHeader::from_slice(&answer[..16]).unwrap();
        assert_eq!(header.len as usize, answer.len());
        assert_eq!(header.unique, self.unique);
        if header.error == 0 { Ok(answer[16..].to_vec()) } else { Err(-header.error) }
    }

    fn call_raw(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let segment = self.write_request(opcode, node, body);
        let written = self.harness.request(1, &[segment, self.answer]) as usize;
        self.harness.bytes(self.answer)[..written].to_vec()
    }

    fn write_request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Segment {
        self.unique += 1;
        let (uid, gid) = self.user;
        let length = u32::try_from(40 + body.len()).unwrap();
        let header = InHeader {
            len: length,
            opcode,
            unique: self.unique,
            nodeid: node,
            uid,
            gid,
            pid: 1,
            ..InHeader::default()
        };
        let bytes = [header.as_slice(), body].concat();
        vm_memory::Bytes::write_slice(&*self.harness.memory, &bytes, self.request.address()).unwrap();
        Segment::Readable(self.request.address(), length)
    }

    fn entry(answer: Vec<u8>) -> EntryOut {
        *EntryOut::from_slice(&answer[..size_of::<EntryOut>()]).unwrap()
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.call(Opcode::Lookup, parent, &name_bytes(name)).map(Self::entry)
    }

    /// The inode that `path` leads to.
    fn walk(&mut self, path: &str) -> u64 {
        path.split('/').fold(ROOT_ID, |parent, name| self.lookup(parent, name).unwrap().nodeid)
    }

    fn forget(&mut self, node: u64, count: u64) {
        let segment = self.write_request(Opcode::Forget as u32, node, &count.to_le_bytes());
        assert_eq!(self.harness.request(0, &[segment]), 0);
    }

    fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<EntryOut, i32> {
        let body = [MkdirIn { mode, umask: 0o022 }.as_slice(), &name_bytes(name)].concat();
        self.call(Opcode::Mkdir, parent, &body).map(Self::entry)
    }

    fn mknod(&mut self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<EntryOut, i32> {
        let body = [MknodIn { mode, rdev, umask: 0, ..MknodIn::default() }.as_slice(), &name_bytes(name)].concat();
        self.call(Opcode::Mknod, parent, &body).map(Self::entry)
    }

    fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(EntryOut, u64), i32> {
        let flags = (libc::O_CREAT | libc::O_EXCL | libc::O_RDWR).cast_unsigned();
        let body = [CreateIn { flags, mode, umask: 0, fuse_flags: 0 }.as_slice(), &name_bytes(name)].concat();
        let answer = self.call(Opcode::Create, parent, &body)?;
        let handle = OpenOut::from_slice(&answer[size_of::<EntryOut>()..]).unwrap().fh;
        Ok((Self::entry(answer), handle))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = OpenIn { flags: flags.cast_unsigned(), fuse_flags: 0 };
        let opcode = if flags & libc::O_DIRECTORY == 0 { Opcode::Open } else { Opcode::Opendir };
        let answer = self.call(opcode, node, body.as_slice())?;
        Ok(OpenOut::from_slice(&answer).unwrap().fh)
    }

    /// Opens and closes a file; answers what the guest's kernel shall know of it (FOPEN_…).
    fn open_flags(&mut self, node: u64, flags: i32) -> u32 {
        let body = OpenIn { flags: flags.cast_unsigned(), fuse_flags: 0 };
        let answer = self.call(Opcode::Open, node, body.as_slice()).unwrap();
        let opened = *OpenOut::from_slice(&answer).unwrap();
        self.release(node, opened.fh);
        opened.open_flags
    }

    /// Whether the guest's kernel may keep the pages of a file that it opens (FOPEN_KEEP_CACHE).
    fn keeps_pages(&mut self, node: u64, flags: i32) -> bool {
        self.open_flags(node, flags) & 2 != 0
    }

    /// The same, once the file has been opened before and is as old as the host's clock can tell.
    fn settles(&mut self, node: u64) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < HANG_GUARD {
            if self.keeps_pages(node, libc::O_RDONLY) {
                return true;
            }
        }
        false
    }

    fn release(&mut self, node: u64, handle: u64) {
        let body = ReleaseIn { fh: handle, ..ReleaseIn::default() };
        self.call(Opcode::Release, node, body.as_slice()).unwrap();
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = ReadIn { fh: handle, offset, size, ..ReadIn::default() };
        self.call(Opcode::Read, node, body.as_slice())
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let flags = libc::O_RDWR.cast_unsigned();
        let body = [WriteIn { fh: handle, offset, size, flags, ..WriteIn::default() }.as_slice(), data].concat();
        let answer = self.call(Opcode::Write, node, &body)?;
        Ok(u32::from_le_bytes(answer[..4].try_into().unwrap()))
    }

    /// The names in a directory with the inode numbers of their entries, by `READDIR` or `READDIRPLUS`.
    fn list(&mut self, node: u64, plus: bool) -> HashMap<String, u64> {
        let handle = self.open(node, libc::O_DIRECTORY).unwrap();
        let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
        let (mut names, mut offset) = (HashMap::new(), 0);
        loop {
            let body = ReadIn { fh: handle, offset, size: 4096, ..ReadIn::default() };
            let answer = self.call(opcode, node, body.as_slice()).unwrap();
            if answer.is_empty() {
                break;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let dirent = if plus { &rest[size_of::<EntryOut>()..] } else { rest };
                let number = |at: usize| u64::from_le_bytes(dirent[at..at + 8].try_into().unwrap());
                let length = u32::from_le_bytes(dirent[16..20].try_into().unwrap()) as usize;
                let name = String::from_utf8(dirent[24..24 + length].to_vec()).unwrap();
                if plus {
                    let entry = *EntryOut::from_slice(&rest[..size_of::<EntryOut>()]).unwrap();
                    assert_eq!((entry.nodeid, entry.attr.ino), (number(0), number(0)));
                    self.forget(entry.nodeid, 1);
                }
                offset = number(8);
                assert_eq!(names.insert(name, number(0)), None, "a name comes twice");
                rest = &dirent[(24 + length).next_multiple_of(8)..];
            }
        }
        let body = ReleaseIn { fh: handle, ..ReleaseIn::default() };
        self.call(Opcode::Releasedir, node, body.as_slice()).unwrap();
        names
    }

    fn host(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn held(&self) -> u64 {
        self.harness.device.directory.held()
    }
}

fn name_bytes(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

#[test]
fn the_configuration_space_holds_the_tag_and_one_request_queue() {
    let config = Client::unmounted().harness.device.config();
    assert_eq!(config.len(), 40);
    assert_eq!(config[..5], *b"test\0");
    assert_eq!(config[36..], [1, 0, 0, 0]);
}

#[test]
fn bad_tags_and_what_is_no_directory_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for tag in ["", "a tag that is longer than thirty-six b", "zero\0byte"] {
        assert!(matches!(device(tag, directory.path()), Err(FsError::Tag(_))));
    }
    assert!(device(&"x".repeat(36), directory.path()).is_ok());
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [file, directory.path().join("none")] {
        assert!(matches!(device("tag", &path), Err(FsError::Directory { .. })));
    }
}

#[test]
fn large_requests_are_negotiated_and_what_there_is_no_service_for_is_not() {
    let mut client = Client::unmounted();
    let options = client.init();
    assert!(options.contains(FsOptions::MAX_PAGES | FsOptions::BIG_WRITES | FsOptions::HANDLE_KILLPRIV_V2));
    assert!(options.contains(FsOptions::DO_READDIRPLUS | FsOptions::AUTO_INVAL_DATA));
    for absent in [FsOptions::POSIX_LOCKS, FsOptions::FLOCK_LOCKS, FsOptions::WRITEBACK_CACHE, FsOptions::PERFILE_DAX] {
        assert!(!options.contains(absent), "{absent:?}");
    }
}

#[test]
fn a_mounted_file_system_survives_save_and_restore_if_nothing_of_it_is_in_use() {
    let mut client = Client::new();
    fs::write(client.host("file"), "data").unwrap();
    let file = client.lookup(ROOT_ID, "file").unwrap().nodeid;
    let error = client.harness.device.save().unwrap_err();
    assert!(error.to_string().contains("holds 1 files"), "{error}");
    client.forget(file, 1);

    let segment = client.write_request(Opcode::Lookup as u32, ROOT_ID, &name_bytes("file"));
    let answer = client.answer;
    let head = client.harness.submit(1, &[segment, answer]);
    let restored = device("test", client.directory.path()).unwrap();
    client.harness.replace(restored).unwrap();
    // The request that the saved device had not looked at, and then new ones.
    assert_eq!(client.harness.wait_used(1).head, head);
    let answer = client.harness.bytes(answer);
    let file = Client::entry(answer[16..].to_vec()).nodeid;
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(file, handle, 0, 100).unwrap(), b"data");
}

#[test]
fn a_reset_forgets_all_files_and_the_file_system_can_be_mounted_again() {
    let mut client = Client::new();
    let (file, _) = client.create(ROOT_ID, "file", 0o644).unwrap();
    assert_eq!(client.held(), 2);
    client.harness.reset();
    assert_eq!(client.held(), 0);
    client.harness.activate().unwrap();
    client.init();
    assert_eq!(client.open(file.nodeid, libc::O_RDONLY).unwrap_err(), libc::EBADF);
    client.walk("file");
}
