//! Content: holes, mappings, appending, and files that are removed while they are open.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::ptr::NonNull;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use nix::unistd::{Whence, lseek64};

use crate::Behaviour;
use crate::observation::{Observed, Steps, answer, together};

pub(crate) const BEHAVIOURS: &[Behaviour] = &[
    ("sparse files", sparse_files),
    ("allocation", allocation),
    ("direct input and output", direct),
    ("appending", appending),
    ("truncation", truncation),
    ("shared mappings", shared_mappings),
    ("removed while open", removed_while_open),
    ("copies in the kernel", copies),
    ("synchronization", synchronization),
    ("writes by several threads", writers),
    ("a full file", too_large),
];

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;

fn read_write(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

fn sparse_files(dir: &Path) -> Observed {
    let file = read_write(&dir.join("file"))?;
    let mut steps = Steps::default();
    file.write_all_at(b"begin", 0)?;
    file.write_all_at(b"end", 64 * MIB)?;
    file.sync_all()?;
    let metadata = file.metadata()?;
    steps.see("length", metadata.len());
    steps.see("takes less than a MiB", metadata.blocks() * 512 < MIB);
    let mut hole = [1; 16];
    file.read_exact_at(&mut hole, 32 * MIB)?;
    steps.see("a hole is zero", hole == [0; 16]);
    steps.see("data after the hole", seek(&file, i64::try_from(MIB).unwrap_or(0), Whence::SeekData)?);
    steps.see("the hole ends where", seek(&file, 0, Whence::SeekHole)? <= i64::try_from(MIB).unwrap_or(0));
    steps.result("after the end", seek(&file, i64::try_from(65 * MIB).unwrap_or(0), Whence::SeekData));
    steps.done()
}

fn seek(file: &File, offset: i64, whence: Whence) -> io::Result<i64> {
    Ok(lseek64(file, offset, whence)?)
}

fn allocation(dir: &Path) -> Observed {
    let file = read_write(&dir.join("file"))?;
    let mut steps = Steps::default();
    let reserve = fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1 << 20);
    steps.result("reserved", reserve);
    steps.see("length", file.metadata()?.len());
    steps.result("extended", fallocate(&file, FallocateFlags::empty(), 0, 1 << 20));
    steps.see("length", file.metadata()?.len());
    file.write_all_at(&[7; 3 * PAGE], 0)?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    steps.result("punched", fallocate(&file, punch, 4096, 4096));
    let mut content = [0; 3 * PAGE];
    file.read_exact_at(&mut content, 0)?;
    let sums: Vec<u64> = content.chunks(PAGE).map(|page| page.iter().map(|byte| u64::from(*byte)).sum()).collect();
    steps.see("pages", format!("{sums:?}"));
    steps.done()
}

/// Aligned, as it has to be everywhere; what else is refused is the device's matter below the file system.
fn direct(dir: &Path) -> Observed {
    let path = dir.join("file");
    let mut steps = Steps::default();
    let opened =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(&path);
    let Ok(file) = opened else {
        steps.result("opened", opened);
        return steps.done();
    };
    let mut memory = vec![5_u8; 3 * PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    let page = &mut memory[start..start + PAGE];
    steps.result("written", file.write_all_at(page, 0));
    steps.result("written further", file.write_all_at(page, 4096));
    page.fill(0);
    steps.result("read", file.read_exact_at(page, 4096));
    steps.see("as written", page.iter().all(|byte| *byte == 5));
    steps.see("by the page cache", fs::read(&path)?.len());
    // What is in the page cache and changed by direct output is not old afterwards.
    page.fill(9);
    file.write_all_at(page, 0)?;
    steps.see("not old", fs::read(&path)?[0]);
    steps.done()
}

fn appending(dir: &Path) -> Observed {
    let path = dir.join("file");
    let append = |number: usize| -> io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).open(&path)?;
        (0..50).try_for_each(|_| file.write_all(format!("line {number}\n").as_bytes()))
    };
    let results = together(4, append);
    let text = fs::read_to_string(&path)?;
    let mut steps = Steps::default();
    steps.see("appended", results.iter().filter(|result| result.is_ok()).count());
    steps.see("lines", text.lines().count());
    steps.see("whole", text.lines().filter(|line| line.len() == "line 0".len() && line.starts_with("line ")).count());
    let file = OpenOptions::new().append(true).open(&path)?;
    file.write_all_at(b"end", 0)?;
    steps.see("at the end wherever it is told", fs::read_to_string(&path)?.ends_with("end"));
    steps.done()
}

fn truncation(dir: &Path) -> Observed {
    let path = dir.join("file");
    let mut file = read_write(&path)?;
    let mut steps = Steps::default();
    file.write_all(b"0123456789")?;
    file.set_len(4)?;
    steps.see("shorter", fs::read_to_string(&path)?);
    file.set_len(8)?;
    steps.see("longer", format!("{:?}", fs::read(&path)?));
    steps.see("read past the end", file.read_at(&mut [0; 8], 100)?);
    file.seek(SeekFrom::Start(20))?;
    file.write_all(b"x")?;
    steps.see("written past the end", fs::metadata(&path)?.len());
    File::create(&path)?;
    steps.see("made anew", fs::metadata(&path)?.len());
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut text)?;
    steps.see("by who has it open", text.len());
    steps.done()
}

/// A page of a file, mapped shared.
struct Mapping(NonNull<libc::c_void>);

impl Mapping {
    fn new(file: &File) -> io::Result<Self> {
        let length = NonZeroUsize::new(PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let pages =
            unsafe { mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, 0) };
        Ok(Self(pages?))
    }

    fn set(&self, index: usize, value: u8) {
        // SAFETY: index is below the page's length for all callers, and the page is mapped as long as this lives.
        unsafe { self.0.cast::<u8>().add(index).write_volatile(value) }
    }

    fn get(&self, index: usize) -> u8 {
        // SAFETY: as above.
        unsafe { self.0.cast::<u8>().add(index).read_volatile() }
    }

    fn sync(&self) -> nix::Result<()> {
        // SAFETY: the page is mapped.
        unsafe { msync(self.0, PAGE, MsFlags::MS_SYNC) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing else has the address.
        unsafe { munmap(self.0, PAGE) }.ok();
    }
}

fn shared_mappings(dir: &Path) -> Observed {
    let path = dir.join("file");
    let file = read_write(&path)?;
    file.set_len(PAGE as u64)?;
    let mut steps = Steps::default();
    let (one, two) = (Mapping::new(&file)?, Mapping::new(&File::options().read(true).write(true).open(&path)?)?);
    one.set(0, b'a');
    steps.see("seen in the other", two.get(0));
    steps.result("synchronized", one.sync());
    steps.see("seen by reading", fs::read(&path)?[0]);
    file.write_all_at(b"b", 1)?;
    steps.see("a write is seen", one.get(1));
    fs::remove_file(&path)?;
    one.set(2, b'c');
    steps.see("after removal", two.get(2));
    steps.done()
}

fn removed_while_open(dir: &Path) -> Observed {
    let path = dir.join("file");
    let file = read_write(&path)?;
    let mut steps = Steps::default();
    file.write_all_at(b"content", 0)?;
    fs::remove_file(&path)?;
    let mut content = [0; 7];
    file.read_exact_at(&mut content, 0)?;
    steps.see("read", String::from_utf8_lossy(&content));
    steps.result("written", file.write_all_at(b"more", 7));
    steps.see("length", file.metadata()?.len());
    steps.see("links", file.metadata()?.nlink());
    steps.result("truncated", file.set_len(1));
    steps.result("its mode changed", file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)));
    fs::write(&path, "another")?;
    steps.see("another of the name", fs::read_to_string(&path)?);
    steps.see("the first", file.metadata()?.len());
    steps.done()
}

fn copies(dir: &Path) -> Observed {
    let (source, target) = (dir.join("source"), dir.join("target"));
    let content: Vec<u8> = (0..300_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    fs::write(&source, &content)?;
    let mut steps = Steps::default();
    steps.see("copied", fs::copy(&source, &target)?);
    steps.see("the same", fs::read(&target)? == content);
    let (from, to) = (File::open(&source)?, File::create(&target)?);
    // SAFETY: the descriptors are open, and no offset is kept.
    let sent = unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), std::ptr::null_mut(), content.len()) };
    steps.see("sent", answer(sent)?);
    steps.see("the same", fs::read(&target)? == content);
    steps.done()
}

fn synchronization(dir: &Path) -> Observed {
    let mut steps = Steps::default();
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).custom_flags(libc::O_SYNC).open(dir.join("file"))?;
    steps.result("written", file.write_all(b"content"));
    steps.result("all", file.sync_all());
    steps.result("data", file.sync_data());
    steps.result("directory", File::open(dir)?.sync_all());
    // SAFETY: the descriptor is open.
    steps.result("file system", answer(unsafe { libc::syncfs(file.as_raw_fd()) }));
    steps.done()
}

/// Each writes its own part, and all parts are there.
fn writers(dir: &Path) -> Observed {
    const PART: usize = 100_000;
    let file = read_write(&dir.join("file"))?;
    let results = together(4, |number| {
        let byte = u8::try_from(number + 1).unwrap_or(0);
        (0..PART / 1000).try_for_each(|piece| file.write_all_at(&[byte; 1000], (number * PART + piece * 1000) as u64))
    });
    let content = fs::read(dir.join("file"))?;
    let mut steps = Steps::default();
    steps.see("written", results.iter().filter(|result| result.is_ok()).count());
    let whole =
        content.chunks(PART).enumerate().filter(|(at, part)| part.iter().all(|byte| usize::from(*byte) == at + 1));
    steps.see("whole parts", whole.count());
    steps.done()
}

fn too_large(dir: &Path) -> Observed {
    let file = read_write(&dir.join("file"))?;
    let mut steps = Steps::default();
    steps.result("a negative length", file.set_len(1 << 63));
    let before = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE)?;
    let limit = |soft| nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, soft, before.1);
    // The signal would end the process before the error is seen.
    // SAFETY: ignoring a signal runs no code.
    unsafe { nix::sys::signal::signal(nix::sys::signal::Signal::SIGXFSZ, nix::sys::signal::SigHandler::SigIgn) }?;
    limit(8192)?;
    let (within, beyond) = (file.write_all_at(&[1; 8192], 0), file.write_at(&[1], 8192));
    limit(before.0)?;
    steps.result("within a limit", within);
    steps.result("beyond it", beyond);
    steps.done()
}
