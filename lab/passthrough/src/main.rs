//! The first process of a guest that uses the devices which were passed to it, and says on its console what works.
//!
//! It knows the devices of the lab by their ids: QEMU's `edu` and `nvme`, and the GPU model. For each function that it
//! finds it prints one line, `NAME: ok` with what was seen or `NAME: FAILED` with the reason, then `devices: N ok, M
//! failed`, and powers the machine off if it is the first process; else it only uses the devices. Kernel modules under `/modules` are loaded first, in the order of their names.

mod edu;
mod gpu;
mod memory;
mod nvme;
mod pci;

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use pci::Function;

/// What a check has seen, or why it failed.
type Outcome = Result<String, String>;

fn main() {
    let is_first = std::process::id() == 1;
    if is_first && let Err(error) = prepare() {
        println!("guest: FAILED: {error}");
    }
    let functions = Function::all().unwrap_or_default();
    let (mut ok, mut failed) = (0, 0);
    for function in &functions {
        println!("found {function}");
    }
    for function in &functions {
        let outcome = match function.id() {
            (0x1234, 0x11e8) => edu::check(function),
            (0x1b36, 0x0010) => nvme::check(function),
            (0x10de, 0x20b0) => gpu::check(function),
            _ => continue,
        };
        match outcome {
            Ok(seen) => {
                ok += 1;
                println!("{function}: ok: {seen}");
            }
            Err(reason) => {
                failed += 1;
                println!("{function}: FAILED: {reason}");
            }
        }
    }
    println!("devices: {ok} ok, {failed} failed");
    if is_first {
        // Does not return; where it is refused, the end of the first process is a panic, which ends the machine too.
        let _ = reboot(RebootMode::RB_POWER_OFF);
    }
}

fn prepare() -> io::Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("debugfs", "/sys/kernel/debug")]
    {
        let _ = fs::create_dir_all(place);
        // The kernel may have mounted /dev itself, and may have been built without debugfs.
        let _ = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>);
    }
    let Ok(modules) = fs::read_dir("/modules") else { return Ok(()) };
    let mut paths: Vec<_> = modules.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let file = fs::File::open(&path)?;
        nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty())
            .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
    }
    Ok(())
}
