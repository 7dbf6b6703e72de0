//! Runs the kernel's own build system (kbuild).

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use tool::io;

use crate::build::Error;

/// Variables of a surrounding make or shell that would change the build's result.
const FOREIGN: &[&str] =
    &["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "KCFLAGS", "CFLAGS", "LDFLAGS", "ARCH", "CROSS_COMPILE", "LOCALVERSION"];
/// The same for everybody, so that the same source and compiler give the same bytes.
const FIXED: &[(&str, &str)] = &[
    ("KBUILD_BUILD_TIMESTAMP", "2025-01-01 00:00:00 UTC"),
    ("KBUILD_BUILD_VERSION", "1"),
    ("KBUILD_BUILD_USER", "tatami"),
    ("KBUILD_BUILD_HOST", "tatami"),
    ("LC_ALL", "C"),
    ("TZ", "UTC"),
];
/// How much of a failed build's output goes into the error, in lines.
const TAIL: usize = 25;

fn tail<'a>(lines: impl DoubleEndedIterator<Item = &'a str>) -> String {
    let mut last: Vec<&str> = lines.rev().take(TAIL).collect();
    last.reverse();
    last.join("\n")
}

/// A build directory of a source tree.
#[derive(Debug)]
pub(crate) struct Kbuild<'a> {
    /// The source tree.
    pub(crate) source: &'a Path,
    /// Where objects and results go.
    pub(crate) objects: &'a Path,
    /// How many compilers run at once.
    pub(crate) jobs: usize,
    /// The whole output of the build.
    pub(crate) log: PathBuf,
}

impl Kbuild<'_> {
    /// A make of `targets`, with variables such as `KCONFIG_ALLCONFIG=…` among them.
    pub(crate) fn command(&self, targets: &[&str]) -> Command {
        let mut command = Command::new("make");
        for name in FOREIGN {
            command.env_remove(name);
        }
        command
            .envs(FIXED.iter().copied())
            .arg("-C")
            .arg(self.source)
            .arg(format!("O={}", self.objects.display()))
            .arg(format!("-j{}", self.jobs))
            .args(targets);
        command
    }

    /// Runs make, writes all its output to the log and calls `step` with each line of it.
    ///
    /// # Errors
    /// [`Error::Tool`] when make or the log fails, [`Error::Make`] with the log's end.
    pub(crate) fn run(&self, targets: &[&str], step: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let start = || tool::start("make");
        let mut log =
            File::options().append(true).create(true).open(&self.log).map_err(io("write the build log", &self.log))?;
        let (reader, writer) = std::io::pipe().map_err(start())?;
        let mut command = self.command(targets);
        command.stdout(writer.try_clone().map_err(start())?).stderr(writer);
        let mut child = command.spawn().map_err(start())?;
        // The command holds the pipe's writing end: without this the reader would never see its end.
        drop(command);
        for line in BufReader::new(reader).lines() {
            let line = line.map_err(io("read make's output for", &self.log))?;
            writeln!(log, "{line}").map_err(io("write the build log", &self.log))?;
            step(&line);
        }
        if child.wait().map_err(start())?.success() {
            return Ok(());
        }
        let text = std::fs::read_to_string(&self.log).map_err(io("read", &self.log))?;
        Err(Error::Make { targets: targets.join(" "), output: tail(text.lines()), log: self.log.clone() })
    }
}

/// The source file in a line of kbuild's output such as `  CC      mm/slub.o`, if it announces a compilation.
#[must_use]
pub(crate) fn compiled(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().filter(|word| *word != "[M]");
    matches!(words.next()?, "CC" | "AS").then(|| words.next()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_kbuild_are_told_apart() {
        assert_eq!(compiled("  CC      mm/slub.o"), Some("mm/slub.o"));
        assert_eq!(compiled("  CC [M]  drivers/uio/uio.o"), Some("drivers/uio/uio.o"));
        assert_eq!(compiled("  LD      vmlinux"), None);
        assert_eq!(compiled("make[1]: Entering directory"), None);
    }
}
