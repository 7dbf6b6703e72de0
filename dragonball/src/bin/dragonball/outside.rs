//! What comes from outside of the machine: signals, its control socket, and the terminal that it runs on.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use dragonball::Vm;
use dragonball::control_socket::{listen_at, serve};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// What was waited for.
pub(crate) enum Event {
    /// The machine has ended.
    Ended,
    /// The guest wrote to the boot timer.
    Booted,
    /// Somebody wants the machine to end.
    StopSignal,
}

/// Signals that stop the machine: they end it, not this process, so that everything is cleaned up.
pub(crate) struct StopSignals(SignalFd);

impl StopSignals {
    /// Takes the signals from here on. To be called before there are other threads.
    pub(crate) fn new() -> io::Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// Waits for the next event.
    pub(crate) fn wait(&self, vm: &Vm, waits_for_boot: bool) -> io::Result<Event> {
        loop {
            let boot_interest = if waits_for_boot { PollFlags::POLLIN } else { PollFlags::empty() };
            let mut sources = [
                PollFd::new(vm.boot_event(), boot_interest),
                PollFd::new(vm.exit_event(), PollFlags::POLLIN),
                PollFd::new(self.0.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut sources, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready = sources.map(|source| source.any().unwrap_or_default());
            match ready {
                [true, ..] => return Ok(Event::Booted),
                [_, true, _] => return Ok(Event::Ended),
                [.., true] => {
                    self.0.read_signal()?;
                    return Ok(Event::StopSignal);
                }
                _ => {}
            }
        }
    }
}

/// The terminal while the guest has it: keys go to the guest as they are. Dropping this gives it back.
pub(crate) struct RawTerminal(Option<Termios>);

impl RawTerminal {
    /// Does nothing where standard input is no terminal.
    pub(crate) fn new() -> Self {
        let stdin = io::stdin();
        let Ok(before) = tcgetattr(&stdin) else { return Self(None) };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        if tcsetattr(&stdin, SetArg::TCSANOW, &raw).is_err() {
            return Self(None);
        }
        Self(Some(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Nothing to be done when the terminal is gone.
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// The control socket; dropping it removes the file.
pub(crate) struct ControlSocket {
    path: PathBuf,
    listener: UnixListener,
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[error("The control socket {} cannot be made: give a path where nothing is, of at most 107 bytes", path.display())]
pub(crate) struct ControlSocketError {
    path: PathBuf,
    source: io::Error,
}

impl ControlSocket {
    /// Makes it at `path`.
    pub(crate) fn new(path: &Path) -> Result<Self, ControlSocketError> {
        let listener = listen_at(path).map_err(|source| ControlSocketError { path: path.to_path_buf(), source })?;
        Ok(Self { path: path.to_path_buf(), listener })
    }

    /// Lets the machine answer there.
    pub(crate) fn serve(&self, vm: &Vm) -> io::Result<()> {
        serve(self.listener.try_clone()?, vm.manager())
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            eprintln!("dragonball: {} is left behind: {error}", self.path.display());
        }
    }
}
