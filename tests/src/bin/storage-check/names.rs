//! Names: links, renames, removal, listings.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;

use crate::Behaviour;
use crate::observation::{Observed, Steps, together};

pub(crate) const BEHAVIOURS: &[Behaviour] = &[
    ("hard links", hard_links),
    ("symbolic links", symbolic_links),
    ("renames", renames),
    ("rename storm", rename_storm),
    ("exclusive creation", exclusive_creation),
    ("long names", long_names),
    ("removal", removal),
    ("listing while removing", listing),
    ("special files", special_files),
    ("unnamed files", unnamed_files),
    ("many files", many_files),
];

fn hard_links(dir: &Path) -> Observed {
    let (one, two) = (dir.join("one"), dir.join("two"));
    let mut steps = Steps::default();
    fs::write(&one, "content")?;
    fs::hard_link(&one, &two)?;
    steps.see("links", fs::metadata(&one)?.nlink());
    steps.see("one inode", fs::metadata(&one)?.ino() == fs::metadata(&two)?.ino());
    fs::write(&two, "changed")?;
    steps.see("by the first", fs::read_to_string(&one)?);
    steps.result("again", fs::hard_link(&one, &two));
    steps.result("of a directory", fs::hard_link(dir, dir.join("directory")));
    fs::remove_file(&one)?;
    steps.see("links left", fs::metadata(&two)?.nlink());
    steps.see("content left", fs::read_to_string(&two)?);
    steps.done()
}

fn symbolic_links(dir: &Path) -> Observed {
    let link = dir.join("link");
    let mut steps = Steps::default();
    symlink("target", &link)?;
    steps.see("reads", fs::read_link(&link)?.display());
    steps.result("dangling", File::open(&link));
    fs::write(dir.join("target"), "content")?;
    steps.see("followed", fs::read_to_string(&link)?);
    let not_followed = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&link);
    steps.result("not followed", not_followed);
    steps.see("length", fs::symlink_metadata(&link)?.len());
    let long = "x/".repeat(2000);
    steps.result("long", symlink(&long, dir.join("long")));
    steps.see("as long", fs::read_link(dir.join("long"))?.as_os_str().len());
    symlink("loop", dir.join("loop"))?;
    steps.result("loop", File::open(dir.join("loop")));
    steps.done()
}

fn rename_with(flags: RenameFlags, from: &Path, to: &Path) -> nix::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)
}

fn renames(dir: &Path) -> Observed {
    let at = |name: &str| dir.join(name);
    let mut steps = Steps::default();
    fs::write(at("a"), "a")?;
    fs::write(at("b"), "b")?;
    steps.result("no replacing", rename_with(RenameFlags::RENAME_NOREPLACE, &at("a"), &at("b")));
    steps.result("exchange", rename_with(RenameFlags::RENAME_EXCHANGE, &at("a"), &at("b")));
    steps.see("exchanged", fs::read_to_string(at("a"))?);
    fs::rename(at("a"), at("b"))?;
    steps.see("replaced", fs::read_to_string(at("b"))?);
    fs::create_dir_all(at("directory/inner"))?;
    steps.result("into itself", fs::rename(at("directory"), at("directory/inner/x")));
    fs::create_dir(at("empty"))?;
    steps.result("over a full directory", fs::rename(at("empty"), at("directory")));
    steps.result("a file over a directory", fs::rename(at("b"), at("empty")));
    steps.result("a directory over a file", fs::rename(at("empty"), at("b")));
    steps.result("over an empty directory", fs::rename(at("directory"), at("empty")));
    steps.see("moved", at("empty/inner").is_dir());
    steps.done()
}

/// Files that are renamed back and forth by several threads: none is lost, none is there twice.
fn rename_storm(dir: &Path) -> Observed {
    const THREADS: usize = 4;
    const ROUNDS: usize = 100;
    for name in ["left", "right"] {
        fs::create_dir(dir.join(name))?;
    }
    for number in 0..THREADS {
        fs::write(dir.join(format!("left/{number}")), number.to_string())?;
    }
    let results = together(THREADS, |number| -> io::Result<()> {
        let (left, right) = (dir.join(format!("left/{number}")), dir.join(format!("right/{number}")));
        for _ in 0..ROUNDS {
            fs::rename(&left, &right)?;
            fs::rename(&right, &left)?;
        }
        fs::rename(&left, &right)
    });
    let mut steps = Steps::default();
    for result in results {
        steps.result("renamed", result);
    }
    let names: BTreeSet<_> = fs::read_dir(dir.join("right"))?.flatten().map(|entry| entry.file_name()).collect();
    steps.see("right", format!("{names:?}"));
    steps.see("left", fs::read_dir(dir.join("left"))?.count());
    steps.see("content", fs::read_to_string(dir.join("right/3"))?);
    steps.done()
}

fn exclusive_creation(dir: &Path) -> Observed {
    let create = |_| File::create_new(dir.join("one"));
    let winners = together(8, create).into_iter().filter(Result::is_ok).count();
    let mut steps = Steps::default();
    steps.see("winners", winners);
    steps.result("again", File::create_new(dir.join("one")));
    steps.result("of a directory", fs::create_dir(dir.join("one")));
    steps.done()
}

fn long_names(dir: &Path) -> Observed {
    let mut steps = Steps::default();
    steps.result("255 bytes", File::create(dir.join("n".repeat(255))));
    steps.result("256 bytes", File::create(dir.join("n".repeat(256))));
    steps.result("bytes that are no text", File::create(dir.join(odd_name())));
    let found = fs::read_dir(dir)?.flatten().any(|entry| entry.file_name() == odd_name());
    steps.see("found", found);
    steps.done()
}

fn odd_name() -> std::ffi::OsString {
    std::os::unix::ffi::OsStringExt::from_vec(vec![0xff, b'\n', b' ', 0x80])
}

fn removal(dir: &Path) -> Observed {
    let mut steps = Steps::default();
    fs::create_dir_all(dir.join("full/inner"))?;
    fs::write(dir.join("file"), "")?;
    steps.result("full directory", fs::remove_dir(dir.join("full")));
    steps.result("directory as a file", fs::remove_file(dir.join("full")));
    steps.result("file as a directory", fs::remove_dir(dir.join("file")));
    steps.result("nothing", fs::remove_file(dir.join("nothing")));
    steps.result("below a file", fs::remove_file(dir.join("file/x")));
    steps.see("links of a directory", fs::metadata(dir.join("full"))?.nlink());
    let open = File::open(dir.join("full/inner"))?;
    fs::remove_dir(dir.join("full/inner"))?;
    steps.see("still open", open.metadata()?.is_dir());
    steps.done()
}

/// A listing that goes on while its entries are removed names every one of them once.
fn listing(dir: &Path) -> Observed {
    const FILES: usize = 300;
    for number in 0..FILES {
        File::create(dir.join(format!("file-{number}")))?;
    }
    let mut names = BTreeSet::new();
    let mut twice = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        fs::remove_file(entry.path())?;
        twice += usize::from(!names.insert(entry.file_name()));
    }
    let mut steps = Steps::default();
    steps.see("named", names.len());
    steps.see("twice", twice);
    steps.see("left", fs::read_dir(dir)?.count());
    steps.done()
}

fn special_files(dir: &Path) -> Observed {
    let mut steps = Steps::default();
    mkfifo(&dir.join("fifo"), Mode::from_bits_truncate(0o640))?;
    steps.see("fifo", fs::metadata(dir.join("fifo"))?.file_type().is_fifo());
    steps.result("socket", UnixListener::bind(dir.join("socket")));
    steps.see("is one", fs::metadata(dir.join("socket"))?.file_type().is_socket());
    let mode = Mode::from_bits_truncate(0o600);
    steps.result("device", mknod(&dir.join("device"), SFlag::S_IFCHR, mode, makedev(1, 3)));
    let metadata = fs::metadata(dir.join("device"))?;
    steps.see("is one", metadata.file_type().is_char_device());
    steps.see("number", metadata.rdev() == makedev(1, 3));
    steps.done()
}

/// A file without a name (`O_TMPFILE`) that gets one when it is whole.
fn unnamed_files(dir: &Path) -> Observed {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let mut steps = Steps::default();
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir);
    let Ok(mut file) = opened else {
        steps.result("made", opened);
        return steps.done();
    };
    file.write_all(b"whole")?;
    steps.see("names", fs::read_dir(dir)?.count());
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let linked = nix::unistd::linkat(
        AT_FDCWD,
        path.as_str(),
        AT_FDCWD,
        &dir.join("named"),
        nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW,
    );
    steps.result("linked", linked);
    steps.see("content", fs::read_to_string(dir.join("named"))?);
    steps.done()
}

/// A tree of files, made, walked and removed.
fn many_files(dir: &Path) -> Observed {
    let (directories, files) = size_of_tree();
    for directory in 0..directories {
        let directory = dir.join(directory.to_string());
        fs::create_dir(&directory)?;
        for file in 0..files {
            fs::write(directory.join(file.to_string()), file.to_string())?;
        }
    }
    let (mut found, mut bytes) = (0_u64, 0);
    for directory in fs::read_dir(dir)? {
        for file in fs::read_dir(directory?.path())? {
            found += 1;
            bytes += file?.metadata()?.len();
        }
    }
    let mut steps = Steps::default();
    steps.see("files", found);
    steps.see("bytes", bytes);
    steps.done()
}

/// How many directories, with how many files each: `STORAGE_CHECK_FILES` says how many files there are in all.
fn size_of_tree() -> (u32, u32) {
    let wanted = std::env::var("STORAGE_CHECK_FILES").ok().and_then(|files| files.parse().ok()).unwrap_or(300_u32);
    (wanted.div_ceil(100), 100)
}
