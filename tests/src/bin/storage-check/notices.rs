//! Notices of changes that programs make themselves, by inotify(7).

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::Behaviour;
use crate::observation::{Observed, Steps};

pub(crate) const BEHAVIOURS: &[Behaviour] = &[("notices of changes", changes)];

/// Ends when the kernel tells that `name` has come to `directory`.
pub(crate) fn wait_for(directory: &Path, name: &OsStr) -> io::Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(directory, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
    println!("waiting");
    loop {
        if inotify.read_events()?.iter().any(|event| event.name.as_deref() == Some(name)) {
            return Ok(());
        }
    }
}

fn changes(dir: &Path) -> Observed {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let wanted = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVE
        | AddWatchFlags::IN_DELETE;
    inotify.add_watch(dir, wanted)?;
    let (one, two) = (dir.join("one"), dir.join("two"));
    let mut file = OpenOptions::new().append(true).create(true).open(&one)?;
    file.write_all(b"content")?;
    drop(file);
    fs::set_permissions(&one, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    fs::rename(&one, &two)?;
    fs::remove_file(&two)?;
    let mut steps = Steps::default();
    loop {
        match inotify.read_events() {
            Ok(events) => {
                for event in events {
                    let name = event.name.unwrap_or_default();
                    steps.see(&name.to_string_lossy(), format!("{:#x}", event.mask.bits()));
                }
            }
            Err(Errno::EAGAIN) => return steps.done(),
            Err(error) => return Err(error.into()),
        }
    }
}
