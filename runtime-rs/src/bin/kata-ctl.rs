//! The administrator's tool: what the runtime measured, in words and pictures.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use config::Config;
use runtime_rs::error::chain;
use timeline::{Timeline, TimelineError};

/// Looks into the container runtime io.containerd.kata.v2.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show where the time of a pod's start went, hop by hop.
    ///
    /// The runtime writes one file per pod, when the pod ends, to the directory that `timeline_dir` in the [runtime]
    /// table of its configuration names.
    #[command(
        after_help = "Examples:\n  kata-ctl timeline redis\n  kata-ctl timeline /tmp/timeline/redis.json --svg redis.svg"
    )]
    Timeline {
        /// A file, or the id of a container whose file lies in `timeline_dir`.
        #[arg(value_name = "FILE_OR_ID")]
        what: String,
        /// Also draw it to this file.
        #[arg(long, value_name = "OUT")]
        svg: Option<PathBuf>,
        /// Print JSON: {id, stamps: [{name, lane, at_ns}]}, CLOCK_MONOTONIC.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, thiserror::Error)]
enum CtlError {
    #[error("{0:?} is no file, and the configuration cannot tell where the timelines are")]
    NoConfig(String, #[source] config::ConfigError),
    #[error("{0:?} is no file, and `timeline_dir` in [runtime] of {path} is not set; set it and start the pod again", path = .1.display())]
    NoDirectory(String, PathBuf),
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{}", path.display())]
    Format { path: PathBuf, source: TimelineError },
    #[error("cannot print")]
    Print(#[from] std::io::Error),
}

fn main() -> ExitCode {
    let Command::Timeline { what, svg, json } = Cli::parse().command;
    match show(&what, svg.as_deref(), json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kata-ctl: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn show(what: &str, svg: Option<&Path>, json: bool) -> Result<(), CtlError> {
    let path = find(what)?;
    let text = std::fs::read_to_string(&path).map_err(|source| CtlError::File {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let timeline = Timeline::from_json(&text).map_err(|source| CtlError::Format { path: path.clone(), source })?;
    if let Some(out) = svg {
        std::fs::write(out, timeline.svg()).map_err(|source| CtlError::File {
            action: "write",
            path: out.to_owned(),
            source,
        })?;
    }
    let mut stdout = std::io::stdout().lock();
    if json {
        let text = timeline.to_json().map_err(|source| CtlError::Format { path, source })?;
        writeln!(stdout, "{text}")?;
    } else {
        write!(stdout, "{}", timeline.text())?;
        if let Some(out) = svg.filter(|_| stdout.is_terminal()) {
            writeln!(stdout, "drawn to {}", out.display())?;
        }
    }
    Ok(())
}

fn find(what: &str) -> Result<PathBuf, CtlError> {
    let file = Path::new(what);
    if file.is_file() || what.contains('/') {
        return Ok(file.to_owned());
    }
    let (config, path) = Config::load(None).map_err(|error| CtlError::NoConfig(what.to_owned(), error))?;
    match config.runtime.timeline_dir {
        Some(directory) => Ok(directory.join(format!("{what}.json"))),
        None => Err(CtlError::NoDirectory(what.to_owned(), path)),
    }
}
