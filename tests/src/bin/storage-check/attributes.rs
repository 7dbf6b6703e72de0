//! Attributes: owners, modes, times, extended attributes and access control lists.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, UtimensatFlags, umask, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{AccessFlags, Gid, Uid, access, setgid, setgroups, setuid};

use crate::Behaviour;
use crate::observation::{Observed, Steps, answer, c_path, code, in_another_process, of_code};

pub(crate) const BEHAVIOURS: &[Behaviour] = &[
    ("owners and modes", owners),
    ("inherited groups", inherited_groups),
    ("permissions", permissions),
    ("extended attributes", extended_attributes),
    ("large attributes", large_attributes),
    ("capabilities of files", file_capabilities),
    ("access control lists", access_control),
    ("inherited access control", inherited_access),
    ("times", times),
    ("size of the file system", size),
];

/// A user of no one else, and a group that it is in.
const USER: u32 = 4321;
const GROUP: u32 = 8765;

fn mode(path: &Path) -> io::Result<String> {
    Ok(format!("{:o}", fs::metadata(path)?.mode() & 0o7777))
}

/// What `work` gives a process of [`USER`] and [`GROUP`].
fn as_user<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<String> {
    let code = in_another_process(|| {
        let become_user = || -> io::Result<T> {
            setgroups(&[Gid::from_raw(GROUP)])?;
            setgid(Gid::from_raw(GROUP))?;
            setuid(Uid::from_raw(USER))?;
            work()
        };
        code(&become_user())
    })?;
    Ok(of_code(code))
}

fn owners(dir: &Path) -> Observed {
    let path = dir.join("file");
    let mut steps = Steps::default();
    File::create(&path)?;
    chown(&path, Some(USER), Some(GROUP))?;
    let metadata = fs::metadata(&path)?;
    steps.see("owner", format!("{}:{}", metadata.uid(), metadata.gid()));
    fs::set_permissions(&path, Permissions::from_mode(0o6755))?;
    steps.see("mode", mode(&path)?);
    chown(&path, Some(USER + 1), None)?;
    steps.see("after another owner", mode(&path)?);
    chown(&path, Some(USER), None)?;
    fs::set_permissions(&path, Permissions::from_mode(0o6777))?;
    let written = as_user(|| io::Write::write_all(&mut OpenOptions::new().append(true).open(&path)?, b"x"))?;
    steps.see("written by its owner", written);
    steps.see("mode after that", mode(&path)?);
    let before = umask(Mode::from_bits_truncate(0o027));
    File::create(dir.join("masked"))?;
    fs::create_dir(dir.join("masked-directory"))?;
    umask(before);
    steps.see("masked", format!("{} {}", mode(&dir.join("masked"))?, mode(&dir.join("masked-directory"))?));
    steps.see("given away by its owner", as_user(|| chown(&path, Some(0), None))?);
    steps.done()
}

fn inherited_groups(dir: &Path) -> Observed {
    let parent = dir.join("parent");
    fs::create_dir(&parent)?;
    chown(&parent, None, Some(GROUP))?;
    fs::set_permissions(&parent, Permissions::from_mode(0o2775))?;
    File::create(parent.join("file"))?;
    fs::create_dir(parent.join("directory"))?;
    let mut steps = Steps::default();
    steps.see("file", fs::metadata(parent.join("file"))?.gid());
    steps.see("directory", fs::metadata(parent.join("directory"))?.gid());
    steps.see("and so on", mode(&parent.join("directory"))?);
    steps.done()
}

fn permissions(dir: &Path) -> Observed {
    let secret = dir.join("secret");
    let mut steps = Steps::default();
    fs::write(&secret, "secret")?;
    fs::set_permissions(&secret, Permissions::from_mode(0o600))?;
    steps.see("another's file", as_user(|| File::open(&secret))?);
    steps.see("by access", as_user(|| Ok(access(&secret, AccessFlags::R_OK)?))?);
    chown(&secret, None, Some(GROUP))?;
    fs::set_permissions(&secret, Permissions::from_mode(0o640))?;
    steps.see("the group's", as_user(|| File::open(&secret))?);
    steps.see("to be written", as_user(|| OpenOptions::new().write(true).open(&secret))?);
    steps.see("another's directory", as_user(|| File::create(dir.join("x")))?);
    fs::set_permissions(dir, Permissions::from_mode(0o1777))?;
    steps.see("everyone's", as_user(|| File::create(dir.join("mine")))?);
    steps.see("who owns it", fs::metadata(dir.join("mine"))?.uid());
    steps.see("another's in it", as_user(|| fs::remove_file(&secret))?);
    steps.see("one's own", as_user(|| fs::remove_file(dir.join("mine")))?);
    fs::create_dir(dir.join("closed"))?;
    fs::write(dir.join("closed/file"), "")?;
    fs::set_permissions(dir.join("closed"), Permissions::from_mode(0o700))?;
    steps.see("below a closed one", as_user(|| fs::metadata(dir.join("closed/file")))?);
    steps.done()
}

/// Extended attributes by path, as xattr(7) has them.
mod xattr {
    use super::{CString, Path, answer, c_path, io};

    pub(super) fn set(path: &Path, name: &str, value: &[u8], flags: i32) -> io::Result<()> {
        let (path, name) = (c_path(path)?, CString::new(name)?);
        // SAFETY: the strings end with a zero, and the value is as long as said.
        let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
        answer(set).map(drop)
    }

    pub(super) fn get(path: &Path, name: &str) -> io::Result<Vec<u8>> {
        let (path, name) = (c_path(path)?, CString::new(name)?);
        let mut value = vec![0; 1 << 16];
        // SAFETY: the value may have as many bytes as said.
        let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        value.truncate(usize::try_from(answer(length)?).unwrap_or(0));
        Ok(value)
    }

    /// Names in their order.
    pub(super) fn list(path: &Path) -> io::Result<Vec<String>> {
        let path = c_path(path)?;
        let mut names = vec![0_u8; 1 << 16];
        // SAFETY: the list may have as many bytes as said.
        let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
        names.truncate(usize::try_from(answer(length)?).unwrap_or(0));
        let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
        let mut names: Vec<_> = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
        names.sort();
        Ok(names)
    }

    pub(super) fn remove(path: &Path, name: &str) -> io::Result<()> {
        let (path, name) = (c_path(path)?, CString::new(name)?);
        // SAFETY: the strings end with a zero.
        answer(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
    }
}

fn extended_attributes(dir: &Path) -> Observed {
    let path = dir.join("file");
    let mut steps = Steps::default();
    File::create(&path)?;
    for name in ["user.one", "trusted.one"] {
        steps.result(name, xattr::set(&path, name, b"value", 0));
        steps.result("reads", xattr::get(&path, name));
    }
    steps.result("created twice", xattr::set(&path, "user.one", b"v", libc::XATTR_CREATE));
    steps.result("replaced", xattr::set(&path, "user.one", b"changed", libc::XATTR_REPLACE));
    steps.result("none to replace", xattr::set(&path, "user.two", b"v", libc::XATTR_REPLACE));
    steps.see("value", format!("{:?}", xattr::get(&path, "user.one").map(|value| value.len()).ok()));
    steps.result("none to read", xattr::get(&path, "user.two"));
    steps.see("names", format!("{:?}", xattr::list(&path)?));
    steps.result("removed", xattr::remove(&path, "user.one"));
    steps.result("removed twice", xattr::remove(&path, "user.one"));
    steps.result("without a class", xattr::set(&path, "none", b"v", 0));
    steps.done()
}

fn large_attributes(dir: &Path) -> Observed {
    let path = dir.join("file");
    File::create(&path)?;
    let mut steps = Steps::default();
    steps.result("1000 bytes", xattr::set(&path, "user.large", &[1; 1000], 0));
    steps.see("as long", xattr::get(&path, "user.large").map_or(0, |value| value.len()));
    steps.result("65537 bytes", xattr::set(&path, "user.huge", &[1; 65537], 0));
    let long = format!("user.{}", "n".repeat(251));
    steps.result("a long name", xattr::set(&path, &long, b"v", 0));
    steps.done()
}

/// `struct vfs_cap_data` of version 2: permitted `CAP_NET_BIND_SERVICE`.
const CAPABILITIES: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn file_capabilities(dir: &Path) -> Observed {
    let path = dir.join("file");
    let mut steps = Steps::default();
    File::create(&path)?;
    steps.result("set", xattr::set(&path, "security.capability", &CAPABILITIES, 0));
    steps.see("as set", xattr::get(&path, "security.capability").is_ok_and(|value| value == CAPABILITIES));
    fs::write(&path, "changed")?;
    steps.result("after a write", xattr::get(&path, "security.capability"));
    steps.done()
}

/// A list as `linux/posix_acl_xattr.h` has it: version 2, then tag, permissions and id of each entry.
fn list_for_user(user: u32, permissions: u16) -> Vec<u8> {
    const UNNAMED: u32 = u32::MAX;
    let entries = [(1, 6, UNNAMED), (2, permissions, user), (4, 0, UNNAMED), (16, 7, UNNAMED), (32, 0, UNNAMED)];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(u16::to_le_bytes(tag));
        list.extend(u16::to_le_bytes(permissions));
        list.extend(u32::to_le_bytes(id));
    }
    list
}

fn access_control(dir: &Path) -> Observed {
    let path = dir.join("file");
    let mut steps = Steps::default();
    fs::write(&path, "content")?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    steps.see("before", as_user(|| File::open(&path))?);
    steps.result("set", xattr::set(&path, "system.posix_acl_access", &list_for_user(USER, 4), 0));
    steps.see("read by who is named", as_user(|| File::open(&path))?);
    steps.see("written", as_user(|| OpenOptions::new().write(true).open(&path))?);
    steps.see("mode", mode(&path)?);
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    steps.see("masked by the mode", as_user(|| File::open(&path))?);
    steps.result("removed", xattr::remove(&path, "system.posix_acl_access"));
    steps.result("then", xattr::get(&path, "system.posix_acl_access"));
    steps.done()
}

fn inherited_access(dir: &Path) -> Observed {
    let mut steps = Steps::default();
    let set = xattr::set(dir, "system.posix_acl_default", &list_for_user(USER, 6), 0);
    steps.result("set", set);
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    let before = umask(Mode::from_bits_truncate(0o077));
    let made = File::create(dir.join("file")).and_then(|_| fs::create_dir(dir.join("directory")));
    umask(before);
    made?;
    steps.see("modes", format!("{} {}", mode(&dir.join("file"))?, mode(&dir.join("directory"))?));
    steps.see("used", as_user(|| OpenOptions::new().write(true).open(dir.join("file")))?);
    steps.result("goes on", xattr::get(&dir.join("directory"), "system.posix_acl_default"));
    steps.done()
}

fn times(dir: &Path) -> Observed {
    let path = dir.join("file");
    let mut steps = Steps::default();
    File::create(&path)?;
    let set = |access: TimeSpec, change: TimeSpec| {
        utimensat(AT_FDCWD, &path, &access, &change, UtimensatFlags::FollowSymlink)
    };
    set(TimeSpec::new(1_000_000_000, 123_456_789), TimeSpec::new(2_000_000_000, 987_654_321))?;
    let seen = || -> io::Result<String> {
        let it = fs::metadata(&path)?;
        Ok(format!("{}.{:09} {}.{:09}", it.atime(), it.atime_nsec(), it.mtime(), it.mtime_nsec()))
    };
    steps.see("set", seen()?);
    set(TimeSpec::UTIME_OMIT, TimeSpec::new(1, 0))?;
    steps.see("one of them", seen()?);
    fs::write(&path, "x")?;
    steps.see("a write is newer", fs::metadata(&path)?.mtime() > 1_700_000_000);
    let changed = fs::metadata(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    let after = fs::metadata(&path)?;
    let time = |it: &fs::Metadata| (it.ctime(), it.ctime_nsec());
    steps.see("a change of mode is told", time(&after) >= time(&changed));
    let before = fs::metadata(dir)?;
    fs::remove_file(&path)?;
    let after = fs::metadata(dir)?;
    steps.see("a removal is told", (after.mtime(), after.mtime_nsec()) >= (before.mtime(), before.mtime_nsec()));
    steps.see(
        "set by another",
        as_user(|| {
            Ok(utimensat(AT_FDCWD, dir, &TimeSpec::new(1, 0), &TimeSpec::new(1, 0), UtimensatFlags::FollowSymlink)?)
        })?,
    );
    steps.done()
}

fn size(dir: &Path) -> Observed {
    let of_directory = nix::sys::statvfs::statvfs(dir)?;
    let mut steps = Steps::default();
    steps.see("longest name", of_directory.name_max());
    steps.see("blocks", of_directory.blocks());
    steps.see("of bytes", of_directory.fragment_size());
    let file = File::create(dir.join("file"))?;
    // SAFETY: a structure of numbers may be zero.
    let mut of_file: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the structure is what the call fills.
    answer(unsafe { libc::fstatvfs(file.as_raw_fd(), &raw mut of_file) })?;
    steps.see("by a file", of_file.f_blocks == of_directory.blocks());
    steps.done()
}
