//! Child processes with a deadline.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use anyhow::{Context, Result, bail};

use crate::event::{Deadline, wait};
use crate::pidfd::Pidfd;

/// How a program ended and what it wrote.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its exit code; 128 + n when signal n ended it, as a shell says it.
    pub code: i32,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Standard output as text, without white space at its ends.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text, without white space at its ends.
    #[must_use]
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// Demands an exit code.
    ///
    /// # Errors
    /// With both outputs, when it is another.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code != code {
            bail!("Exit code {}, not {code}; stdout: {:?}, stderr: {:?}", self.code, self.text(), self.error_text());
        }
        Ok(self)
    }
}

/// A program that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    pidfd: Pidfd,
    name: String,
    stdout: Option<Receiver<Vec<u8>>>,
    stderr: Receiver<Vec<u8>>,
}

impl Running {
    /// Starts `command` with its standard input from `stdin`, or held open when that is `None`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut command: Command, stdin: Option<Vec<u8>>) -> Result<Self> {
        let mut running = Self::start_with_pipes(&mut command)?;
        running.collect_stdout();
        if let (Some(bytes), Some(mut pipe)) = (stdin, running.child.stdin.take()) {
            // A program that ends early closes its end: that is its right.
            thread::spawn(move || pipe.write_all(&bytes).ok());
        }
        Ok(running)
    }

    /// Starts `command`; the caller moves the bytes of its standard input and output.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with_pipes(command: &mut Command) -> Result<Self> {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        let name = format!("{} {}", command.get_program().to_string_lossy(), arguments.join(" "));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("Cannot run {name}"))?;
        let pidfd = Pidfd::open(i32::try_from(child.id())?).context("pidfd_open")?;
        let stderr = collect(child.stderr.take().context("no pipe")?);
        Ok(Self { child, pidfd, name, stdout: None, stderr })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process by descriptor.
    #[must_use]
    pub fn pidfd(&self) -> &Pidfd {
        &self.pidfd
    }

    /// Its standard input; dropping it is the end of file.
    ///
    /// # Errors
    /// When it was taken before.
    pub fn take_stdin(&mut self) -> Result<ChildStdin> {
        self.child.stdin.take().context("Standard input was taken before")
    }

    /// Its standard output.
    ///
    /// # Errors
    /// When it was taken before.
    pub fn take_stdout(&mut self) -> Result<ChildStdout> {
        self.child.stdout.take().context("Standard output was taken before")
    }

    /// Reads what is left of its standard output in the background.
    pub fn collect_stdout(&mut self) {
        self.stdout = self.child.stdout.take().map(collect);
    }

    /// Reads what is left of `output`, its standard output that was taken before, in the background.
    pub fn collect_stdout_of(&mut self, output: ChildStdout) {
        self.stdout = Some(collect(output));
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// At the deadline, when it is killed; the error holds what it wrote to standard error.
    pub fn finish(mut self, deadline: Deadline) -> Result<Finished> {
        let ended = wait(&[(self.pidfd.as_fd(), nix::poll::PollFlags::POLLIN)], deadline)?;
        if ended.is_none() {
            self.child.kill().ok();
        }
        let status = self.child.wait().context("wait")?;
        let take = |output: &Receiver<Vec<u8>>| output.recv_timeout(deadline.left().max(GRACE)).unwrap_or_default();
        let stdout = self.stdout.as_ref().map(take).unwrap_or_default();
        let finished = Finished { code: code(status), stdout, stderr: take(&self.stderr) };
        if ended.is_none() {
            let (out, error) = (finished.text(), finished.error_text());
            bail!("{} did not end before its deadline; stdout: {out:?}, stderr: {error:?}", self.name);
        }
        Ok(finished)
    }
}

/// For the last bytes of a program that has ended.
const GRACE: std::time::Duration = std::time::Duration::from_secs(1);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails when it was waited for already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Runs `command` to its end with `stdin` as its whole input.
///
/// # Errors
/// When it cannot be started or does not end before the deadline.
pub fn run(command: Command, stdin: &[u8], deadline: Deadline) -> Result<Finished> {
    Running::start(command, Some(stdin.to_vec()))?.finish(deadline)
}

fn collect(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).ok();
        sender.send(bytes).ok();
    });
    receiver
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sh(script: &str, stdin: &[u8], deadline: Duration) -> Result<Finished> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, stdin, Deadline::after(deadline))
    }

    #[test]
    fn both_outputs_and_the_exit_code_come_back() {
        let finished = sh("cat; echo problem >&2; exit 7", b"input", Duration::from_secs(30)).unwrap();
        assert_eq!((finished.code, finished.text(), finished.error_text()), (7, "input".into(), "problem".into()));
    }

    #[test]
    fn a_signal_is_told_as_a_shell_tells_it() {
        assert_eq!(sh("kill -9 $$", b"", Duration::from_secs(30)).unwrap().code, 137);
    }

    #[test]
    fn a_program_that_hangs_is_ended_and_named() {
        let error = sh("echo begun >&2; exec cat < /dev/zero > /dev/null", b"", Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }
}
