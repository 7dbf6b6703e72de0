//! `kata-ctl timeline`: where the time of a pod's start went.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use config::Config;
use timeline::{Timeline, TimelineError};

use super::CtlError;

/// What `kata-ctl timeline` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A file, or the id of a container whose file lies in `timeline_dir`.
    #[arg(value_name = "FILE_OR_ID")]
    what: String,
    /// Also draw it to this file.
    #[arg(long, value_name = "OUT")]
    svg: Option<PathBuf>,
    /// Print JSON: {id, stamps: [{name, lane, at_ns}]}, CLOCK_MONOTONIC.
    #[arg(long)]
    json: bool,
}

/// Why there is no timeline to show.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShowError {
    #[error("{0:?} is no file, and the configuration cannot tell where the timelines are")]
    NoConfig(String, #[source] config::ConfigError),
    #[error("{0:?} is no file, and `timeline_dir` in [runtime] of {path} is not set; set it and start the pod again", path = .1.display())]
    NoDirectory(String, PathBuf),
    #[error("{}", path.display())]
    Format { path: PathBuf, source: TimelineError },
}

pub(super) fn run(args: &Args) -> Result<ExitCode, CtlError> {
    let path = find(&args.what)?;
    let text = std::fs::read_to_string(&path).map_err(CtlError::file("read", &path))?;
    let timeline = Timeline::from_json(&text).map_err(|source| ShowError::Format { path: path.clone(), source })?;
    if let Some(out) = &args.svg {
        std::fs::write(out, timeline.svg()).map_err(CtlError::file("write", out))?;
    }
    let mut stdout = std::io::stdout().lock();
    if args.json {
        let text = timeline.to_json().map_err(|source| ShowError::Format { path, source })?;
        writeln!(stdout, "{text}")?;
    } else {
        write!(stdout, "{}", timeline.text())?;
        if let Some(out) = args.svg.as_ref().filter(|_| stdout.is_terminal()) {
            writeln!(stdout, "drawn to {}", out.display())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn find(what: &str) -> Result<PathBuf, ShowError> {
    let file = Path::new(what);
    if file.is_file() || what.contains('/') {
        return Ok(file.to_owned());
    }
    let (config, path) = Config::load(None).map_err(|error| ShowError::NoConfig(what.to_owned(), error))?;
    match config.runtime.timeline_dir {
        Some(directory) => Ok(directory.join(format!("{what}.json"))),
        None => Err(ShowError::NoDirectory(what.to_owned(), path)),
    }
}
