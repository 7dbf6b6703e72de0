//! A terminal that a case owns, with a program on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use anyhow::{Context, Result, bail};
use nix::pty::{Winsize, openpty};

use crate::event::{Deadline, readable};

/// Calls of tty_ioctl(4).
mod ioctl {
    nix::ioctl_write_ptr_bad!(
        /// Sets a terminal's size.
        set_window_size,
        libc::TIOCSWINSZ,
        nix::pty::Winsize
    );
    nix::ioctl_write_int_bad!(
        /// Makes a terminal the one of the caller's session.
        set_controlling_terminal,
        libc::TIOCSCTTY
    );
}

/// A program whose terminal is ours. Dropped, it is killed.
#[derive(Debug)]
pub struct OnTerminal {
    child: Child,
    master: File,
    seen: String,
}

impl OnTerminal {
    /// Starts `command` as the leader of a session whose terminal is `columns` × `rows`.
    ///
    /// # Errors
    /// When there is no terminal to be had or the program cannot be started.
    pub fn start(command: &mut Command, columns: u16, rows: u16) -> Result<Self> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).context("openpty")?;
        let slave = pair.slave;
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
        // SAFETY: between fork and exec only setsid(2) and ioctl(2) run, both async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                // SAFETY: descriptor 0 is the terminal that was just installed; the argument is an integer.
                ioctl::set_controlling_terminal(0, 0)?;
                Ok(())
            });
        }
        let child = command.spawn().context("Cannot start the program on the terminal")?;
        // The command keeps copies of the terminal; drop them, so that its end is seen.
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        Ok(Self { child, master: File::from(pair.master), seen: String::new() })
    }

    /// Types.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).context("write to the terminal")
    }

    /// Changes the terminal's size; the kernel tells the program by `SIGWINCH`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open and `size` is the structure that TIOCSWINSZ reads.
        unsafe { ioctl::set_window_size(self.master.as_raw_fd(), &raw const size) }.context("TIOCSWINSZ").map(drop)
    }

    /// Reads until `wanted` was shown since the last call; answers everything shown up to it.
    ///
    /// # Errors
    /// With what was shown, at the deadline or when the program ends before.
    pub fn expect(&mut self, wanted: &str, deadline: Deadline) -> Result<String> {
        loop {
            if let Some(at) = self.seen.find(wanted) {
                let rest = self.seen.split_off(at + wanted.len());
                return Ok(std::mem::replace(&mut self.seen, rest));
            }
            if !self.read(deadline).with_context(|| format!("Expected {wanted:?}, shown: {:?}", self.seen))? {
                bail!("The program ended before it showed {wanted:?}; shown: {:?}", self.seen);
            }
        }
    }

    /// Waits for the program's end; answers its exit code and what it showed since the last call.
    ///
    /// # Errors
    /// At the deadline.
    pub fn finish(mut self, deadline: Deadline) -> Result<(i32, String)> {
        while self.read(deadline).with_context(|| format!("Shown: {:?}", self.seen))? {}
        let code = self.child.wait()?.code().context("The program was ended by a signal")?;
        Ok((code, std::mem::take(&mut self.seen)))
    }

    /// `false` at the end: no process has the terminal open any more.
    fn read(&mut self, deadline: Deadline) -> Result<bool> {
        readable(self.master.as_fd(), "output on the terminal", deadline)?;
        let mut bytes = [0; 4096];
        match self.master.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.seen += &String::from_utf8_lossy(&bytes[..count]);
                Ok(true)
            }
            // What Linux answers when the other side is closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
            Err(error) => Err(error).context("read from the terminal"),
        }
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_program_on_the_terminal_sees_its_size_and_every_change() {
        let deadline = Deadline::after(Duration::from_secs(30));
        let script = "stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do read -r line; done";
        let mut terminal = OnTerminal::start(Command::new("sh").args(["-c", script]), 81, 25).unwrap();
        assert!(terminal.expect("ready", deadline).unwrap().contains("25 81"));
        terminal.resize(132, 43).unwrap();
        terminal.type_text("\n").unwrap();
        terminal.expect("43 132", deadline).unwrap();
        assert_eq!(terminal.finish(deadline).unwrap().0, 3);
    }
}
