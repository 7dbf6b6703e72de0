//! Removal of a directory with all that is in it, which never follows a link and never crosses a mount.

use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Deeper trees are refused: each level holds a descriptor, and only a hostile guest builds them.
const MAX_DEPTH: usize = 256;

/// Removes `path` and everything below it.
///
/// # Errors
///
/// The first refusal; what stands on another mount is never touched (`EXDEV` or `EBUSY`).
pub(crate) fn remove(path: &Path) -> std::io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(ErrorKind::InvalidInput, format!("{} has no parent directory", path.display())));
    };
    let parent = nix::fcntl::open(parent, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?;
    remove_at(parent.as_fd(), Path::new(name), MAX_DEPTH)
}

fn remove_at(parent: BorrowedFd<'_>, name: &Path, depth: usize) -> std::io::Result<()> {
    if depth == 0 {
        let text = format!("directories are nested deeper than {MAX_DEPTH}; remove them by hand");
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    let directory = match open_directory(parent, name) {
        Ok(directory) => directory,
        // A file, a link or a special file.
        Err(nix::Error::ENOTDIR | nix::Error::ELOOP) => {
            return unlinkat(parent, name, UnlinkatFlags::NoRemoveDir).map_err(Error::from);
        }
        Err(errno) => return Err(errno.into()),
    };
    let mut listing = Dir::from_fd(directory)?;
    let names: Vec<std::ffi::CString> = listing
        .iter()
        .map(|entry| entry.map(|entry| entry.file_name().to_owned()))
        .filter(|name| !name.as_ref().is_ok_and(|name| matches!(name.to_bytes(), b"." | b"..")))
        .collect::<Result<_, _>>()?;
    for name in names {
        let name: &Path = Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name.as_bytes()));
        remove_at(listing.as_fd(), name, depth - 1)?;
    }
    unlinkat(parent, name, UnlinkatFlags::RemoveDir).map_err(Error::from)
}

fn open_directory(parent: BorrowedFd<'_>, name: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(parent, name, how)
}
