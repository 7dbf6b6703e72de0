//! `kata-ctl logs`: what a sandbox's guest wrote to its console.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use config::Config;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::CtlError;
use super::node::{self, StateDir};

/// What `kata-ctl logs` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    state: StateDir,
    /// The sandbox: its id, or namespace/id.
    #[arg(value_name = "SANDBOX")]
    what: String,
    /// Go on with what comes, until the sandbox ends.
    #[arg(long, short)]
    follow: bool,
}

/// Why a sandbox has no console log.
#[derive(Debug, thiserror::Error)]
#[error(
    "sandbox {sandbox} has no console log: set `enable_debug = true` in [hypervisor.dragonball] of {configuration} and \
     start the pod again (its log is kept while it runs)"
)]
pub(super) struct NoConsole {
    sandbox: String,
    configuration: String,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, CtlError> {
    let sandbox = node::find(&args.state.root, &args.what)?;
    let path = sandbox.paths.console();
    let mut file = match File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // Whichever file the runtime reads, or would read.
            let found = Config::load(None).map(|(_, path)| path.display().to_string());
            let configuration = found.unwrap_or_else(|_| config::SYSTEM_FILE.to_owned());
            return Err(NoConsole { sandbox: sandbox.name(), configuration }.into());
        }
        result => result.map_err(CtlError::file("read", &path))?,
    };
    // Before the first read: what is written after it is told.
    let changes = if args.follow { Some(watch(&path)?) } else { None };
    let mut printer = Printer::default();
    printer.print_rest(&mut file)?;
    while let Some(changes) = &changes {
        // The last link goes with the end of the sandbox.
        let is_over = file.metadata()?.nlink() == 0;
        printer.print_rest(&mut file)?;
        if is_over {
            break;
        }
        match changes.read_events() {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(CtlError::file("watch", &path)(errno.into())),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells of what is written to the file, and of its removal.
fn watch(path: &Path) -> Result<Inotify, CtlError> {
    let flags = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_DELETE_SELF;
    let watched = Inotify::init(InitFlags::IN_CLOEXEC).and_then(|watch| watch.add_watch(path, flags).map(|_| watch));
    watched.map_err(|errno| CtlError::file("watch", path)(errno.into()))
}

/// Prints what a guest wrote: as it is to a file or another program, and without anything that a terminal would obey to
/// a terminal.
#[derive(Debug, Default)]
struct Printer {
    /// The beginning of a character whose rest has not come yet.
    pending: Vec<u8>,
}

impl Printer {
    /// All that can be read now.
    fn print_rest(&mut self, file: &mut File) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        let mut chunk = [0; 16 << 10];
        loop {
            let count = file.read(&mut chunk)?;
            if count == 0 {
                return out.flush();
            }
            if out.is_terminal() {
                out.write_all(self.tame(&chunk[..count]).as_bytes())?;
            } else {
                out.write_all(&chunk[..count])?;
            }
        }
    }

    fn tame(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    break;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.pending.drain(..valid);
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + invalid);
                }
            }
        }
        // A serial console ends its lines with a carriage return, too.
        text.retain(|char| char != '\r');
        text.chars().map(|char| if char.is_control() && !matches!(char, '\n' | '\t') { '?' } else { char }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_command_the_terminal_of_who_reads_its_log() {
        let mut printer = Printer::default();
        let text = printer.tame(b"[ 0.1] ok\r\n\x1b]0;title\x07\xc2\x9b31m\ttab\n");
        assert_eq!(text, "[ 0.1] ok\n?]0;title??31m\ttab\n");
    }

    #[test]
    fn a_character_that_comes_in_two_parts_is_one_character() {
        let mut printer = Printer::default();
        let text = [printer.tame(b"a\xe2\x82"), printer.tame(b"\xac\xff"), printer.tame(b"b")].concat();
        assert_eq!(text, "a€\u{fffd}b");
    }
}
