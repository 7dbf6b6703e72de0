//! What a guest does with the devices that were passed to it, and what it says on its console about that.
//!
//! It knows the devices of the lab by their ids: QEMU's `edu`, `nvme`, `ivshmem-plain`, `pci-testdev` and `ati-vga`, and
//! the GPU model. Each [`Action`] prints one line for each function that it tried, `NAME: ok` with what was seen or `NAME:
//! FAILED` with the reason, then `devices: N ok, M failed`. As the first process of a guest it loads the kernel modules
//! under `/modules`, in the order of their names, checks all devices, and powers the machine off.

mod edu;
mod gpu;
mod interrupt;
mod memory;
mod nvme;
mod pci;
mod window;

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

use pci::Function;

/// What a check has seen, or why it failed.
type Outcome = Result<String, String>;

/// What the program shall do.
#[derive(Clone, Copy)]
enum Action {
    /// `check`, or nothing: use each device.
    Check,
    /// `much`: each GPU moves 256 MiB there and back.
    Much,
    /// `pin`: each `edu` interrupts by its pin.
    Pin,
    /// `read ADDRESS`: each GPU reads a page at this address on the bus, and tells whether it met a fault.
    Read(u64),
    /// `write ADDRESS`: the same, writing.
    Write(u64),
    /// `through ADDRESS`: each `edu` writes a page to this address on the bus and reads it back.
    Through(u64),
}

impl Action {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let action = arguments.next();
        let mut address = || {
            let text = arguments.next().ok_or("give an address")?;
            let digits = text.strip_prefix("0x").ok_or("give the address as 0x…")?;
            u64::from_str_radix(digits, 16).map_err(|error| format!("{text}: {error}"))
        };
        Ok(match action.as_deref() {
            None | Some("check") => Self::Check,
            Some("much") => Self::Much,
            Some("pin") => Self::Pin,
            Some("read") => Self::Read(address()?),
            Some("write") => Self::Write(address()?),
            Some("through") => Self::Through(address()?),
            Some(other) => {
                return Err(format!("{other}: give check, much, pin, read ADDRESS, write ADDRESS or through ADDRESS"));
            }
        })
    }

    /// Does it with one function; nothing where it is not about that one.
    fn apply(self, function: &Function) -> Option<Outcome> {
        const EDU: (u16, u16) = (0x1234, 0x11e8);
        const GPU: (u16, u16) = (0x10de, 0x20b0);
        Some(match (self, function.id()) {
            (Self::Check, EDU) => edu::check(function),
            (Self::Check, GPU) => gpu::check(function),
            (Self::Check, (0x1b36, 0x0010)) => nvme::check(function),
            (Self::Check, (0x1af4, 0x1110)) => window::shared(function),
            (Self::Check, (0x1b36, 0x0005)) => window::empty(function),
            (Self::Check, (0x1002, 0x5046)) => window::display(function),
            (Self::Much, GPU) => gpu::move_much(function),
            (Self::Pin, EDU) => edu::interrupt_by_pin(function),
            (Self::Read(address), GPU) => gpu::access(function, address, false),
            (Self::Write(address), GPU) => gpu::access(function, address, true),
            (Self::Through(address), EDU) => edu::copy_through(function, address),
            _ => return None,
        })
    }
}

fn main() {
    if std::process::id() == 1 {
        if let Err(error) = prepare() {
            println!("guest: FAILED: {error}");
        }
        apply(Action::Check);
        // Does not return; where it is refused, the end of the first process is a panic, which ends the machine too.
        let _ = reboot(RebootMode::RB_POWER_OFF);
        return;
    }
    match Action::parse(std::env::args().skip(1)) {
        Ok(action) => apply(action),
        Err(error) => println!("{error}"),
    }
}

fn apply(action: Action) {
    let functions = Function::all().unwrap_or_default();
    let (mut ok, mut failed) = (0, 0);
    for function in &functions {
        match action.apply(function) {
            None => {}
            Some(Ok(seen)) => {
                ok += 1;
                println!("{function}: ok: {seen}");
            }
            Some(Err(reason)) => {
                failed += 1;
                println!("{function}: FAILED: {reason}");
            }
        }
    }
    println!("devices: {ok} ok, {failed} failed");
}

fn prepare() -> io::Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("debugfs", "/sys/kernel/debug")]
    {
        let _ = fs::create_dir_all(place);
        // The kernel may have mounted /dev itself, and may have been built without debugfs.
        let _ = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>);
    }
    load_modules()
}

fn load_modules() -> io::Result<()> {
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
