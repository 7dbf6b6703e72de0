//! The shared directory: fuse-backend-rs' passthrough file system, with what it lacks for a container's root.
//!
//! - Every size that the guest names is bounded before memory is reserved for it.
//! - The guest sees the device's own inode numbers (`nodeid`) everywhere, which are unique across mounts.
//! - The number of descriptors is bounded, and what the guest holds is counted.
//! - Larger requests are negotiated than the library does by itself, and access control lists.
//! - How long the guest may use a name without looking it up, and a file's content without reading it, depends on who
//!   changes them.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, ROOT_ID, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{Mode, umask};

use super::version::Version;
use super::{CACHE_TIMEOUT, GUEST_ONLY_TIMEOUT, RESERVED_DESCRIPTORS};

/// The longest value and the longest list of names of extended attributes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR: u32 = 64 << 10;
/// The most bytes of directory entries that are read for one request.
const MAX_READDIR: u32 = 128 << 10;
/// The most descriptors, however high the process' limit is.
const MAX_DESCRIPTORS: u64 = 1 << 20;

/// What is negotiated beyond what the library asks for: requests of more than a page, reads and lookups that do not
/// wait for each other, page cache that is dropped when the host changed a file, and access control lists, with which the
/// host has to decide what a umask means.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::AUTO_INVAL_DATA)
    .union(FsOptions::CACHE_SYMLINKS)
    .union(FsOptions::POSIX_ACL)
    .union(FsOptions::DONT_MASK);

/// `FOPEN_NOFLUSH` (linux/fuse.h), which the library does not know: closing is no request. What was opened to be read
/// has nothing for the host then.
// SAFETY: the type is a number of bits, each of which may be set.
const NO_FLUSH: OpenOptions = unsafe { OpenOptions::from_bits_unchecked(1 << 5) };

/// A directory of the host as the guest's kernel uses it.
pub(super) struct SharedDirectory {
    inner: PassthroughFs<()>,
    /// What the guest's kernel was given and has not forgotten.
    lookups: Mutex<HashMap<u64, Known>>,
    /// Name of the directories that the guest alone changes.
    guest_only: Option<CString>,
    /// Open files and directories.
    handles: AtomicU64,
    /// The most inodes and handles together: each is a descriptor.
    limit: AtomicU64,
    /// What the guest's kernel can do, once it has mounted the file system.
    session: Mutex<Option<u64>>,
}

/// An inode that the guest's kernel knows.
#[derive(Clone, Copy)]
struct Known {
    /// How often it was given.
    count: u64,
    place: Place,
    /// The version that the guest's kernel has nothing older of: it drops a file's pages when it opens it.
    opened: Option<Version>,
}

/// Where an inode is, which says who changes the names in it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// The shared directory itself.
    Root,
    /// Right below it: what belongs together.
    Top,
    /// In a directory that the guest alone changes.
    GuestOnly,
    /// Anywhere else.
    Everyones,
}

/// How long the guest may take the attributes of an inode for what they were.
fn attr_timeout(known: Option<&Known>) -> Duration {
    let guest_only = known.is_some_and(|known| known.place == Place::GuestOnly);
    if guest_only { GUEST_ONLY_TIMEOUT } else { CACHE_TIMEOUT }
}

impl SharedDirectory {
    /// Shares the directory `path`; `guest_only` names the directories in those below it that only the guest changes.
    pub(super) fn open(path: &Path, guest_only: Option<String>) -> io::Result<Self> {
        if !path.metadata()?.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotADirectory));
        }
        let root = path.to_str().filter(|path| !path.contains('\0'));
        let config = Config {
            root_dir: root.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?.to_owned(),
            cache_policy: CachePolicy::Auto,
            xattr: true,
            killpriv_v2: true,
            ..Config::default()
        };
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(Self {
            inner: PassthroughFs::new(config)?,
            lookups: Mutex::default(),
            guest_only: guest_only.map(CString::new).transpose()?,
            handles: AtomicU64::new(0),
            limit: AtomicU64::new(soft.saturating_sub(RESERVED_DESCRIPTORS).min(MAX_DESCRIPTORS)),
            session: Mutex::default(),
        })
    }

    /// How many inodes and open files the guest holds, the root directory aside.
    pub(super) fn held(&self) -> u64 {
        self.lookups().len() as u64 + self.handles.load(Ordering::Relaxed)
    }

    /// Sets how many inodes and open files the guest may hold.
    #[cfg(test)]
    pub(super) fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// What the guest's kernel can do, if it has mounted the file system.
    pub(super) fn session(&self) -> Option<u64> {
        *lock(&self.session)
    }

    /// Goes on as if the guest's kernel had just mounted the file system.
    pub(super) fn resume_session(&self, capabilities: u64) -> io::Result<()> {
        self.init(FsOptions::from_bits_truncate(capabilities)).map(|_| ())
    }

    /// Forgets the guest's kernel and all that it holds.
    pub(super) fn end_session(&self) {
        if lock(&self.session).take().is_some() {
            self.inner.destroy();
        }
        self.lookups().clear();
        self.handles.store(0, Ordering::Relaxed);
    }

    fn lookups(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        lock(&self.lookups)
    }

    /// Fails when another descriptor would be one too many.
    fn check_limit(&self) -> io::Result<()> {
        if self.held() < self.limit.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENFILE))
        }
    }

    /// Notes that the guest's kernel gets `entry`, under the device's inode number, as `name` in `parent`.
    fn give(&self, mut entry: Entry, parent: u64, name: &CStr) -> Entry {
        (entry.entry_timeout, entry.attr_timeout) = (Duration::ZERO, CACHE_TIMEOUT);
        let mut lookups = self.lookups();
        let place = match lookups.get(&parent).map_or(Place::Root, |parent| parent.place) {
            Place::Root => Place::Top,
            Place::Top if self.guest_only.as_deref() == Some(name) => Place::GuestOnly,
            Place::GuestOnly => Place::GuestOnly,
            Place::Top | Place::Everyones => Place::Everyones,
        };
        if entry.inode != ROOT_ID {
            let known = lookups.entry(entry.inode).or_insert(Known { count: 0, place, opened: None });
            known.count = known.count.saturating_add(1);
            if known.place != place {
                // It is in two places.
                known.place = Place::Everyones;
            }
        }
        if place == Place::GuestOnly {
            entry.entry_timeout = GUEST_ONLY_TIMEOUT;
            entry.attr_timeout = attr_timeout(lookups.get(&entry.inode));
        }
        entry.attr.st_ino = entry.inode;
        entry
    }

    fn take_back(&self, inode: u64, count: u64) {
        let mut lookups = self.lookups();
        if let Some(held) = lookups.get_mut(&inode) {
            held.count = held.count.saturating_sub(count);
            if held.count == 0 {
                lookups.remove(&inode);
            }
        }
    }

    /// Whether the guest's kernel may keep the pages that it has of a file which is being opened. Only where nobody else
    /// changes it: what others have mapped, they change unseen.
    fn keeps_pages(&self, ctx: &Context, inode: u64) -> bool {
        let mut lookups = self.lookups();
        let Some(known) = lookups.get_mut(&inode).filter(|known| known.place == Place::GuestOnly) else { return false };
        let Ok((attributes, _)) = self.inner.getattr(ctx, inode, None) else { return false };
        let version = Version::of(&attributes);
        let settled = version.is_settled(SystemTime::now()).then_some(version);
        let before = std::mem::replace(&mut known.opened, settled);
        settled.is_some() && before == settled
    }

    fn opened(&self, handle: Option<u64>) {
        self.handles.fetch_add(u64::from(handle.is_some()), Ordering::Relaxed);
    }

    fn closed(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_ok() {
            self.handles.fetch_sub(1, Ordering::Relaxed);
        }
        result
    }
}

/// The lock of plain data, which is whole whatever its holder did.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does `work` with the umask of a process of the guest: the host's kernel leaves it out where a directory has a default
/// access control list. It is the device thread's own (see `thread`), and else none.
fn masked<T>(mask: u32, work: impl FnOnce() -> T) -> T {
    umask(Mode::from_bits_truncate(mask));
    let done = work();
    umask(Mode::empty());
    done
}

/// A name as the guest's kernel looks it up. Linux never asks for `.` and `..`, and `..` could lead out of a directory
/// that the host moved.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        name if name.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

impl FileSystem for SharedDirectory {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.end_session();
        let wanted = (self.inner.init(capable)? | OPTIONS) - FsOptions::PERFILE_DAX;
        *lock(&self.session) = Some(capable.bits());
        Ok(wanted)
    }

    fn destroy(&self) {
        self.end_session();
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.check_limit()?;
        self.inner.lookup(ctx, parent, name).map(|entry| self.give(entry, parent, name))
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        self.take_back(inode, count);
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    fn getattr(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let (mut attributes, _) = self.inner.getattr(ctx, inode, handle)?;
        attributes.st_ino = inode;
        Ok((attributes, attr_timeout(self.lookups().get(&inode))))
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (mut attributes, _) = self.inner.setattr(ctx, inode, attr, handle, valid)?;
        attributes.st_ino = inode;
        Ok((attributes, attr_timeout(self.lookups().get(&inode))))
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, linkname: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.check_limit()?;
        self.inner.symlink(ctx, linkname, parent, name).map(|entry| self.give(entry, parent, name))
    }

    fn mknod(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, rdev: u32, umask: u32) -> io::Result<Entry> {
        self.check_limit()?;
        let made = masked(umask, || self.inner.mknod(ctx, parent, name, mode, rdev, 0));
        made.map(|entry| self.give(entry, parent, name))
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        self.check_limit()?;
        let made = masked(umask, || self.inner.mkdir(ctx, parent, name, mode, 0));
        made.map(|entry| self.give(entry, parent, name))
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.inner.rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        self.check_limit()?;
        self.inner.link(ctx, inode, newparent, newname).map(|entry| self.give(entry, newparent, newname))
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        self.check_limit()?;
        let (handle, mut options, passthrough) = self.inner.open(ctx, inode, flags, fuse_flags)?;
        self.opened(handle);
        options.set(OpenOptions::KEEP_CACHE, self.keeps_pages(ctx, inode));
        if flags & libc::O_ACCMODE.cast_unsigned() == libc::O_RDONLY.cast_unsigned() {
            options |= NO_FLUSH;
        }
        Ok((handle, options, passthrough))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.check_limit()?;
        let unmasked = CreateIn { umask: 0, ..args };
        let created = masked(args.umask, || self.inner.create(ctx, parent, name, unmasked));
        let (entry, handle, options, passthrough) = created?;
        self.opened(handle);
        Ok((self.give(entry, parent, name), handle, options, passthrough))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.inner.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.inner.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, flags, fuse_flags)
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(&self, ctx: &Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        self.inner.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.closed(self.inner.release(ctx, inode, flags, handle, flush, flock_release, lock_owner))
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(&self, ctx: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.inner.setxattr(ctx, inode, name, value, flags)
    }

    fn getxattr(&self, ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.inner.getxattr(ctx, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size.min(MAX_XATTR))
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(&self, ctx: &Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.check_limit()?;
        let opened = self.inner.opendir(ctx, inode, flags)?;
        self.opened(opened.0);
        Ok(opened)
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.inner.readdir(ctx, inode, handle, size.min(MAX_READDIR), offset, add_entry)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.check_limit()?;
        self.inner.readdirplus(ctx, inode, handle, size.min(MAX_READDIR), offset, &mut |name, entry| {
            let number = entry.inode;
            let entry = self.give(entry, inode, &CString::new(name.name).unwrap_or_default());
            let added = add_entry(DirEntry { ino: number, ..name }, entry);
            if !matches!(added, Ok(1..)) {
                self.take_back(number, 1);
            }
            added
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.closed(self.inner.releasedir(ctx, inode, flags, handle))
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(&self, ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
