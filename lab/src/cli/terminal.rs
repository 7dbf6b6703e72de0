//! The user's terminal while a command in the machine has it.

use std::io::{self, IsTerminal};

use lab::{Handle, Size};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Hands every key to the machine until this is dropped.
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Enters raw mode; none when standard input is no terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // An error says that the terminal has gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// The terminal's size; 24 × 80 when there is none.
pub(crate) fn size() -> Size {
    let (rows, columns) = console::Term::stdout().size_checked().unwrap_or((24, 80));
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
