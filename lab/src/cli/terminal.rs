//! The user's terminal while a command in the machine has it.

use std::io;

use lab::{Handle, Size};
use nix::sys::signal::{SigSet, Signal};

pub(crate) use terminal::RawTerminal;

/// The terminal's size.
pub(crate) fn size() -> Size {
    let terminal::Size { rows, columns } = terminal::size();
    Size { rows, columns }
}

/// Passes changes of the terminal's size on. To be called before other threads exist that could get the signal.
pub(crate) fn pass_sizes_on(handle: Handle) -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGWINCH);
    signals.thread_block()?;
    // Waits until this process ends, or until the command has.
    std::thread::spawn(move || while signals.wait().is_ok() && handle.resize(size()).is_ok() {});
    Ok(())
}
