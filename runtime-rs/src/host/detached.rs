//! Bind mounts that are prepared out of sight and appear in one step (open_tree(2), mount_setattr(2), move_mount(2)).
//!
//! A recursive bind mount of a shared tree is the peer of its origin: unmounting the copy would unmount what is mounted
//! in the original. The copy is therefore made a slave *before* it appears anywhere: a crash at any instant leaves
//! either nothing or a mount that is safe to unmount.

use std::ffi::CString;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::mount::MsFlags;

/// Makes `target` a view of `source`, with the mounts below it if `flags` has `MS_REC`.
///
/// # Errors
///
/// What the kernel says.
pub(crate) fn bind(source: &Path, target: &Path, flags: MsFlags) -> std::io::Result<()> {
    let recursive = flags.contains(MsFlags::MS_REC);
    let tree = open_tree(source, recursive)?;
    set_attributes(&tree, attributes(flags), recursive)?;
    move_to(&tree, target)
}

fn c_string(path: &Path) -> std::io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| Error::new(std::io::ErrorKind::InvalidInput, error))
}

/// The flags of mount(2) as mount_setattr(2) takes them.
fn attributes(flags: MsFlags) -> u64 {
    [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NODIRATIME, libc::MOUNT_ATTR_NODIRATIME),
    ]
    .into_iter()
    .filter(|(flag, _)| flags.contains(*flag))
    .fold(0, |bits, (_, attribute)| bits | attribute)
}

fn open_tree(source: &Path, recursive: bool) -> std::io::Result<OwnedFd> {
    let source = c_string(source)?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE.cast_unsigned();
    }
    // SAFETY: the path is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags) };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor, nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Error::last_os_error()),
    }
}

fn set_attributes(tree: &OwnedFd, set: u64, recursive: bool) -> std::io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: libc::MS_SLAVE, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open; the path is a NUL-terminated literal; the structure is valid for reads of the size
    // that is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

fn move_to(tree: &OwnedFd, target: &Path) -> std::io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: the descriptor is open; both paths are NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}
