//! A virtual machine from the command line.

use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};
use dragonball::footprint::give_back_code;
use dragonball::{ConsoleOutput, ExitReason, MachineConfig, Vm, start};
use outside::{ControlSocket, RawTerminal, StopSignals};

mod cli;
mod ctl;
mod mtrr;
mod outside;

fn main() -> ExitCode {
    one_arena();
    match Cli::parse().command {
        Command::Run(run) => run_machine(*run),
        Command::Ctl(ctl) => ctl::run(ctl).map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS),
    }
}

fn run_machine(run: cli::Run) -> ExitCode {
    log_to_stderr();
    let control = match run.control.as_deref().map(ControlSocket::new).transpose() {
        Ok(control) => control,
        Err(error) => return fail(&error),
    };
    let (boot_timer, stamps) = (run.boot_timer, run.stamps);
    let config = MachineConfig::from(run);
    let uses_terminal = config.console == ConsoleOutput::Stdio || config.debug_uart == ConsoleOutput::Stdio;
    let signals = match StopSignals::new() {
        Ok(signals) => signals,
        Err(error) => return fail(&error),
    };
    let vm = match start(config) {
        Ok(vm) => vm,
        Err(error) => return fail(&error),
    };
    if let Some(Err(error)) = control.as_ref().map(|control| control.serve(&vm)) {
        return fail(&error);
    }
    give_back_code();
    let raw = uses_terminal.then(RawTerminal::new);
    wait(&vm, boot_timer, &signals);
    drop(raw);
    if stamps {
        print_stamps(&vm);
    }
    report(vm)
}

/// The machine's threads allocate little and seldom: one heap for all of them instead of one each.
fn one_arena() {
    // SAFETY: sets a number inside of the allocator, before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn log_to_stderr() {
    // Reading the filter costs time, which a machine without it shall not pay.
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    } else {
        tracing_subscriber::fmt().with_max_level(tracing::Level::WARN).with_writer(std::io::stderr).init();
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("dragonball: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        eprintln!("  because: {inner}");
        cause = inner.source();
    }
    ExitCode::FAILURE
}

/// Waits for the machine's end; a stop signal brings it about.
fn wait(vm: &Vm, boot_timer: bool, signals: &StopSignals) {
    let mut waits_for_boot = boot_timer;
    while vm.exit_reason().is_none() {
        match signals.wait(vm, waits_for_boot) {
            Ok(outside::Event::Ended) => return,
            Ok(outside::Event::Booted) => {
                waits_for_boot = false;
                print_boot_time(vm);
            }
            Ok(outside::Event::StopSignal) | Err(_) => vm.stop(),
        }
    }
    if waits_for_boot {
        print_boot_time(vm);
    }
}

fn print_boot_time(vm: &Vm) {
    match vm.boot_time() {
        // A raw terminal does not return the carriage by itself.
        Some(time) => eprint!("boot time: {} us\r\n", time.as_micros()),
        None => eprintln!("boot time: the guest did not write to the boot timer"),
    }
}

fn print_stamps(vm: &Vm) {
    let stamps = vm.stamps();
    let first = stamps.first().map_or(0, |(_, time)| *time);
    for (name, time) in stamps {
        eprintln!("{:>10} us  {name}", time.saturating_sub(first) / 1000);
    }
}

/// Says what happened where that is not what a user hopes for, and gives the exit status.
fn report(vm: Vm) -> ExitCode {
    let tail = vm.console_tail();
    let reason = vm.wait();
    let status = match reason {
        ExitReason::PowerOff => 0,
        ExitReason::Reset => 3,
        ExitReason::Panic => 4,
        ExitReason::TripleFault => 5,
        ExitReason::Stopped => 6,
        ExitReason::Failed(_) => 1,
    };
    if status != 0 {
        eprintln!("dragonball: the machine has ended: {reason}");
        if matches!(reason, ExitReason::Panic | ExitReason::TripleFault | ExitReason::Failed(_)) && !tail.is_empty() {
            eprintln!("The last of its console:\n{tail}");
        }
    }
    ExitCode::from(status)
}
