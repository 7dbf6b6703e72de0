//! Runs commands inside the lab machine for the lab driver.
//!
//! `lab-guest serve` answers on every command port for as long as the machine lives; `lab-guest daemon LOG PROGRAM
//! ARGUMENTS…` starts a service in the background and returns when the service says that it is ready; `lab-guest mended
//! PROGRAM ARGUMENTS…` runs a program while virtualization is mended, in a machine where it is not for ever.

mod daemon;
mod keep;
mod mend;
mod port;
mod reactor;
mod serve;
mod session;
mod spawn;
mod stream;

use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["serve"] => serve(),
        ["daemon", log, program @ ..] if !program.is_empty() => daemon::start(log.as_ref(), program),
        ["mended", program, arguments @ ..] => mended(program, arguments),
        _ => Err(std::io::Error::other(
            "Use: lab-guest serve | lab-guest daemon LOG PROGRAM [ARGUMENT…] | lab-guest mended PROGRAM [ARGUMENT…]",
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-guest: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves, with virtualization mended if the kernel's command line says so.
fn serve() -> std::io::Result<()> {
    let wanted = std::fs::read_to_string("/proc/cmdline")?.split_whitespace().any(|word| word == "lab.mend");
    let unmended =
        |error: &std::io::Error| eprintln!("lab-guest: guests may hang or die, for KVM stays as it is: {error}");
    let _mend = wanted.then(|| (mend::Mend::put().inspect_err(unmended), keep::Kept::make().inspect_err(unmended)));
    serve::serve_all()
}

/// Runs a program with virtualization mended.
fn mended(program: &str, arguments: &[&str]) -> std::io::Result<()> {
    let _mend = (mend::Mend::put()?, keep::Kept::make()?);
    let status = Command::new(program).args(arguments).status()?;
    if status.success() { Ok(()) } else { Err(std::io::Error::other(format!("{program}: {status}"))) }
}
