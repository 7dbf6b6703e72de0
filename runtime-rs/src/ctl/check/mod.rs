//! `kata-ctl check`: whether this node is fit for pods in virtual machines.

mod files;
mod host;

use std::fmt;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::CtlError;
use super::containerd::CONFIG;
use super::node::StateDir;

/// What `kata-ctl check` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    state: StateDir,
    /// containerd's configuration file.
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    containerd_config: PathBuf,
    /// Look for installed files and configurations below this directory, as `make install DESTDIR=…` puts them there.
    #[arg(long, value_name = "DIR", default_value = "/")]
    destdir: PathBuf,
    /// Print JSON: [{what, level, text, remedy}].
    #[arg(long)]
    json: bool,
}

/// How good one thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// It works with less than it could.
    Warning,
    /// No pod starts, or none of those that need this.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    what: &'static str,
    level: Level,
    text: String,
    /// What to do; nothing where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, text: impl Into<String>) -> Self {
        Self { what, level: Level::Ok, text: text.into(), remedy: None }
    }

    fn warning(what: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what, level: Level::Warning, text: text.into(), remedy: Some(remedy.into()) }
    }

    fn error(what: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what, level: Level::Error, text: text.into(), remedy: Some(remedy.into()) }
    }

    /// With the level in its colour, if `colour`.
    fn line(&self, colour: bool) -> String {
        let (word, code) = match self.level {
            Level::Ok => ("ok", 32),
            Level::Warning => ("warning", 33),
            Level::Error => ("error", 31),
        };
        let word = if colour { format!("\x1b[{code}m{word:<7}\x1b[m") } else { format!("{word:<7}") };
        let remedy = self.remedy.as_ref().map(|remedy| format!("\n{:9}→ {remedy}", "")).unwrap_or_default();
        format!("{word}  {}: {}{remedy}", self.what, self.text)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.line(false))
    }
}

pub(super) fn run(args: &Args) -> Result<ExitCode, CtlError> {
    let mut findings = host::look();
    findings.extend(files::look(args));
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?;
    } else {
        let colour = out.is_terminal();
        for finding in &findings {
            writeln!(out, "{}", finding.line(colour))?;
        }
    }
    let has_errors = findings.iter().any(|finding| finding.level == Level::Error);
    Ok(if has_errors { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
