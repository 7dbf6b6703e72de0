//! What programs observe of a file system: `storage-check DIRECTORY [NAME]…`.
//!
//! Each behaviour works in an empty directory of its own below DIRECTORY and answers what it observed, which is printed as
//! `NAME: OBSERVATION`, one line each. There is no right or wrong: two file systems behave alike if their lines are the same.
//! Nothing that differs between runs (times, numbers of inodes) is part of an observation. It needs root: owners change.
//!
//! `storage-check --wait DIRECTORY NAME` says `waiting`, and ends when it is told that NAME has come or was replaced there.

mod attributes;
mod data;
mod locks;
mod names;
mod notices;
mod observation;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use observation::Observed;

/// A behaviour: its name, and how it is observed in an empty directory.
type Behaviour = (&'static str, fn(&Path) -> Observed);

const USAGE: &str = "Usage: storage-check DIRECTORY [NAME]…\n       storage-check --wait DIRECTORY NAME\n\
                     The names of the first are those of the lines that it prints.";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(directory) = arguments.next() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let names: Vec<_> = arguments.collect();
    if directory == "--wait" {
        let [directory, name] = &names[..] else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        return match notices::wait_for(Path::new(directory), name) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", directory.display());
                ExitCode::FAILURE
            }
        };
    }
    let all = [names::BEHAVIOURS, data::BEHAVIOURS, attributes::BEHAVIOURS, locks::BEHAVIOURS, notices::BEHAVIOURS];
    for (name, observe) in all.concat() {
        if names.is_empty() || names.iter().any(|wanted| wanted == name) {
            println!("{name}: {}", in_empty_directory(Path::new(&directory), name, observe));
        }
    }
    ExitCode::SUCCESS
}

/// What is observed; an error that no behaviour expects is an observation, too.
fn in_empty_directory(parent: &Path, name: &str, observe: fn(&Path) -> Observed) -> String {
    let directory = parent.join(name.replace(' ', "-"));
    if let Err(error) = fs::create_dir(&directory) {
        return format!("no directory for it: {error}");
    }
    let observed = observe(&directory).unwrap_or_else(|error| format!("stopped: {error}"));
    match fs::remove_dir_all(&directory) {
        Ok(()) => observed,
        Err(error) => format!("{observed}, and its directory stays: {error}"),
    }
}
