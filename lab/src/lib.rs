//! A nested test machine for hosts without hardware virtualization.
//!
//! The machine is Debian with containerd in an emulated computer (QEMU without acceleration) whose CPU has AMD's
//! virtualization, so that KVM works in it as on metal, only slower. It is built from Debian packages once, booted
//! once, and restored from a snapshot in less than a second for each use.
//!
//! ```no_run
//! use lab::{Command, Input, Machine, Snapshot};
//!
//! let machine = Machine::restore(Snapshot::Base, "example")?;
//! let output = machine.run(&Command::new("uname").arg("-r"), Input::Empty)?.check()?;
//! println!("{}", output.text());
//! # Ok::<(), lab::Error>(())
//! ```

mod command;
mod connection;
mod copy;
mod ending;
mod error;
mod hardware;
mod image;
mod initrd;
mod kernel;
mod machine;
mod model;
mod prepare;
pub mod probe;
mod program;
mod progress;
mod qemu;
mod qmp;
mod rundir;
mod setup;
mod snapshot;
mod tools;

pub use command::{Command, Event, Handle, Input, Output, Process};
pub use error::Error;
pub use hardware::{Device, Hardware, Kernel};
pub use lab_guest::wire::{Size, Status};
pub use machine::{Description, Machine};
pub use progress::Progress;
pub use setup::Setup;
pub use snapshot::Snapshot;

/// Makes a snapshot, and all that it needs, unless it is in the cache.
///
/// # Errors
/// When packages cannot be had or the machine does not come up.
pub fn make(snapshot: Snapshot) -> Result<(), Error> {
    prepare::prepare(snapshot).map(drop)
}

/// Makes what all snapshots are made from, unless it is in the cache; `update` takes the newest packages.
///
/// # Errors
/// When packages cannot be had.
pub fn build(update: bool) -> Result<(), Error> {
    let cache = cache::Cache::open()?;
    if update {
        prepare::update_pin(&cache)?;
    }
    prepare::materials(&cache).map(drop)
}

/// Removes what is in the cache of machines that are not built like this any more; answers what was removed.
///
/// # Errors
/// When something cannot be removed.
pub fn prune() -> Result<Vec<std::path::PathBuf>, Error> {
    prepare::prune(&cache::Cache::open()?)
}
