//! What the builders of kernel, images and lab share: they run programs and handle files, and their errors name the one
//! that failed.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// How much of what a failed program wrote goes into its error, in bytes.
const TAIL: usize = 2000;

/// A file operation or a program failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("Cannot {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A program could not be started.
    #[error("Cannot run {program}; is it installed?")]
    Start {
        /// Its name.
        program: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status}): {output}")]
    Failed {
        /// Its name.
        program: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote.
        output: String,
    },
}

/// Makes an [`Error::Io`] of what the operating system answered.
pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// Makes an [`Error::Start`] of what the operating system answered.
pub fn start(program: &str) -> impl FnOnce(io::Error) -> Error {
    let program = program.to_owned();
    move |source| Error::Start { program, source }
}

/// Runs a command, called `program` in messages, to its end and answers its standard output.
///
/// # Errors
/// [`Error::Start`], and [`Error::Failed`] with the end of its standard error.
pub fn run(program: &str, command: &mut Command) -> Result<Vec<u8>, Error> {
    let Output { status, stdout, stderr } = command.output().map_err(start(program))?;
    if status.success() {
        return Ok(stdout);
    }
    let output = tail(&String::from_utf8_lossy(&stderr), TAIL).to_owned();
    Err(Error::Failed { program: program.to_owned(), status: status.to_string(), output })
}

/// The last `limit` bytes or so of a text, from a character's start.
#[must_use]
pub fn tail(text: &str, limit: usize) -> &str {
    let start = text.len().saturating_sub(limit);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text[start..].trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<Vec<u8>, Error> {
        run("the shell", Command::new("/bin/sh").args(["-c", script]))
    }

    #[test]
    fn a_program_answers_its_output_or_why_it_failed() {
        assert_eq!(shell("echo yes; echo no >&2").unwrap(), b"yes\n");
        let text = shell("echo wrong >&2; exit 3").unwrap_err().to_string();
        assert_eq!(text, "the shell failed (exit status: 3): wrong");
        let missing = run("nothing", &mut Command::new("/nonexistent")).unwrap_err();
        assert_eq!(missing.to_string(), "Cannot run nothing; is it installed?");
    }

    #[test]
    fn a_tail_begins_at_a_character() {
        assert_eq!(tail("abcdef", 3), "def");
        assert_eq!(tail("aöö\n", 4), "ö");
        assert_eq!(tail("short", 100), "short");
    }
}
