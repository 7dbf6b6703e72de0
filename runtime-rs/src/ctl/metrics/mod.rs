//! `kata-ctl metrics`: what the sandboxes of this node hold, as Prometheus reads it.

mod serve;
mod text;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use super::node::StateDir;
use super::survey::survey;
use super::task::Ask;
use super::{CtlError, runtime};

/// What `kata-ctl metrics` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    state: StateDir,
    /// Serve them over HTTP on this socket, as /metrics, until terminated.
    #[arg(long, value_name = "unix:PATH", value_parser = parse_socket)]
    listen: Option<PathBuf>,
    /// Do not ask guests what their containers use: with thousands of pods, that is what takes its time.
    #[arg(long)]
    no_containers: bool,
}

impl Args {
    fn ask(&self) -> Ask {
        if self.no_containers { Ask::State } else { Ask::Usage }
    }
}

fn parse_socket(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:").map(|path| path.strip_prefix("//").unwrap_or(path)) {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err("write unix: and an absolute path, as unix:/run/kata-metrics.sock".to_owned()),
    }
}

pub(super) fn run(args: &Args) -> Result<ExitCode, CtlError> {
    let runtime = runtime()?;
    match &args.listen {
        Some(path) => runtime.block_on(serve::serve(path, args.state.root.clone(), args.ask()))?,
        None => {
            let seen = runtime.block_on(survey(args.state.root.clone(), args.ask()))?;
            write!(std::io::stdout().lock(), "{}", text::render(&seen))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_named_by_an_absolute_path() {
        for text in ["unix:/run/m.sock", "unix:///run/m.sock"] {
            assert_eq!(parse_socket(text), Ok(PathBuf::from("/run/m.sock")));
        }
        for text in ["/run/m.sock", "unix:m.sock", "tcp:0.0.0.0:80", "unix:"] {
            assert!(parse_socket(text).unwrap_err().contains("unix:/run"), "{text}");
        }
    }
}
