//! The command line: what it takes, and what each command does.

mod terminal;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use lab::{Command, Device, Event, Hardware, Input, Kernel, Machine, Process, Setup, Snapshot, Status};
use serde_json::json;

/// Exit status of the lab's own failures; lower ones are those of the command that ran.
pub(crate) const FAILURE: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// 128 + SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// A nested test machine for hosts without hardware virtualization.
///
/// The machine is Debian with containerd, in an emulated computer whose CPU has AMD's virtualization: KVM works in it.
/// It is built and booted once (some minutes, from Debian packages), kept as a snapshot, and restored in less than a
/// second. A restored machine forgets everything when it ends.
#[derive(Debug, Parser)]
#[command(
    name = "lab",
    version,
    after_help = "Example:\n  lab up try\n  lab push try target/dist /\n  lab run try -- ctr version\n  lab shell try\n  lab down try"
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Say whether this host's KVM is hardware virtualization, and why; exit status 1 when it is not
    Probe {
        /// As JSON; exit status 0 whatever was found
        #[arg(long)]
        json: bool,
    },
    /// Fetch packages and make disk, kernel and initrd of the lab machine
    Build {
        /// Take the newest packages instead of those of the last build
        #[arg(long)]
        update: bool,
    },
    /// Remove from the cache what machines of today are not made of
    Prune,
    /// Make snapshots, unless they are there (`up` does it when needed)
    Snapshot {
        /// Which: base, containerd-2.1, icount; all when none is named
        names: Vec<Snapshot>,
    },
    /// Start a machine from a snapshot
    #[command(alias = "restore")]
    Up {
        /// The machine's name, of your choice
        name: String,
        /// Which kind of machine: base (containerd 1.7), containerd-2.1, or icount (time counts instructions)
        #[arg(long, default_value = "base")]
        snapshot: Snapshot,
        /// Copy this into the machine, which is then kept as it is: the next start with the same is fast
        #[arg(long = "with", value_name = "SOURCE:TARGET")]
        files: Vec<String>,
        /// Run this script in the machine (after --with), which is then kept as it is
        #[arg(long = "setup", value_name = "SCRIPT")]
        scripts: Vec<String>,
        /// Boot with this device behind an IOMMU: edu, nvme, ati+edu, gpu[:SIZE], ivshmem[:SIZE], testdev[:SIZE];
        /// the first one is 0000:01:00.0, the next one 0000:02:00.0, and so on
        #[arg(long = "device", value_name = "DEVICE")]
        devices: Vec<Device>,
        /// Boot with an IOMMU and this kernel: debian (VFIO groups) or iommufd (also IOMMUFD and /dev/vfio/devices)
        #[arg(long)]
        kernel: Option<Kernel>,
        /// Boot with this much memory, in MiB (a snapshot has 4096)
        #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1024..=1_048_576))]
        memory: Option<u32>,
    },
    /// Run a command in a machine; its exit status becomes this one's
    Run(Run),
    /// Open a shell in a machine
    Shell {
        /// The machine's name
        name: String,
    },
    /// Copy a file or directory into a machine
    Push {
        /// The machine's name
        name: String,
        /// What to copy
        source: PathBuf,
        /// What it becomes there; a directory's content is merged, and a slash at the end means "into"
        target: String,
    },
    /// Copy a file or directory from a machine
    Pull {
        /// The machine's name
        name: String,
        /// What to copy
        source: String,
        /// What it becomes here; a slash at the end means "into"
        target: PathBuf,
    },
    /// List the machines that run
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a machine wrote to its console since it was started
    Log {
        /// The machine's name
        name: String,
    },
    /// Stop a machine's CPUs and virtual time (an idle icount machine keeps a core of the host busy)
    Stop {
        /// The machines' names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Let stopped machines go on
    Start {
        /// The machines' names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// End machines; all that was written in them is gone
    Down {
        /// The machines' names
        #[arg(required_unless_present = "all")]
        names: Vec<String>,
        /// End all machines that run
        #[arg(long, conflicts_with = "names")]
        all: bool,
    },
}

#[derive(Debug, Args)]
struct Run {
    /// Pass standard input on; without it the command reads nothing
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Working directory in the machine
    #[arg(short = 'C', long, value_name = "DIR")]
    directory: Option<String>,
    /// Set a variable in the command's environment
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// The machine's name
    name: String,
    /// The command and its arguments; for pipes and the like: bash -c '…'
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// Does what the command line asks; answers the exit status.
pub(crate) fn execute(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.command {
        Subcommands::Probe { json } => return probe(json),
        Subcommands::Build { update } => lab::build(update)?,
        Subcommands::Prune => lab::prune()?.iter().for_each(|path| println!("Removed {}", path.display())),
        Subcommands::Snapshot { names } => {
            let all = Snapshot::ALL.to_vec();
            for snapshot in if names.is_empty() { all } else { names } {
                lab::make(snapshot)?;
            }
        }
        Subcommands::Up { name, snapshot, files, scripts, devices, kernel, memory } => {
            let setup = setup(&files, scripts)?;
            drop(if devices.is_empty() && kernel.is_none() && memory.is_none() {
                Machine::restore_kept(snapshot, &setup, &name)?
            } else {
                let hardware = devices.into_iter().fold(Hardware::new(), Hardware::device);
                let hardware = hardware.kernel(kernel.unwrap_or_default());
                let hardware = memory.into_iter().fold(hardware, Hardware::memory);
                Machine::boot_kept(&hardware, snapshot, &setup, &name)?
            });
        }
        Subcommands::Run(run) => return run_command(run),
        Subcommands::Shell { name } => {
            let command = vec!["bash".to_owned(), "-l".to_owned()];
            let shell = Run { interactive: true, tty: true, directory: None, environment: Vec::new(), name, command };
            return run_command(shell);
        }
        Subcommands::Push { name, source, target } => Machine::attach(&name)?.push(&source, &target)?,
        Subcommands::Pull { name, source, target } => Machine::attach(&name)?.pull(&source, &target)?,
        Subcommands::List { json } => list(json)?,
        Subcommands::Log { name } => log(&name)?,
        Subcommands::Stop { names } => each(&names, |name| Machine::attach(name)?.pause())?,
        Subcommands::Start { names } => each(&names, |name| Machine::attach(name)?.resume())?,
        Subcommands::Down { names, all } => {
            each(&if all { Machine::names()? } else { names }, Machine::end_named)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn probe(as_json: bool) -> anyhow::Result<ExitCode> {
    let probe = lab::probe::probe();
    if as_json {
        println!("{}", serde_json::to_string_pretty(&probe)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{probe}");
    Ok(ExitCode::from(u8::from(!probe.hardware)))
}

fn setup(files: &[String], scripts: Vec<String>) -> anyhow::Result<Setup> {
    let mut setup = Setup::new();
    for file in files {
        let Some((source, target)) = file.rsplit_once(':') else {
            bail!("--with {file:?} has no ':'; give SOURCE:TARGET");
        };
        setup = setup.push(source, target);
    }
    Ok(scripts.into_iter().fold(setup, |setup, script| setup.run(Command::shell(script))))
}

/// Does something to each machine, to the last one even if one fails.
fn each(names: &[String], mut action: impl FnMut(&str) -> Result<(), lab::Error>) -> anyhow::Result<()> {
    let mut failures = 0;
    for name in names {
        if let Err(error) = action(name) {
            eprintln!("lab: {:#}", anyhow::Error::from(error));
            failures += 1;
        }
    }
    if failures > 0 {
        bail!("{failures} of {} machines failed", names.len());
    }
    Ok(())
}

fn list(as_json: bool) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for (name, description) in Machine::list()? {
        // One that ends just now is listed without a state.
        let running = Machine::attach(&name).map(|machine| machine.running()).ok();
        rows.push((name, description, running));
    }
    let mut out = io::stdout().lock();
    if as_json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, description, running)| {
                json!({
                    "name": name,
                    "snapshot": description.snapshot,
                    "devices": description.devices,
                    "pid": description.pid,
                    "running": running,
                })
            })
            .collect();
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?);
    }
    writeln!(out, "{:<20} {:<16} {:>8}  STATE", "NAME", "SNAPSHOT", "PID")?;
    for (name, description, running) in rows {
        let state = running.map_or("ending", |running| if running { "running" } else { "stopped" });
        writeln!(out, "{name:<20} {:<16} {:>8}  {state}", description.snapshot, description.pid)?;
    }
    Ok(())
}

fn log(name: &str) -> anyhow::Result<()> {
    let path = Machine::console_of(name)?;
    let text = fs::read(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    Ok(io::stdout().write_all(&text)?)
}

fn run_command(run: Run) -> anyhow::Result<ExitCode> {
    let machine = Machine::attach(&run.name)?;
    let mut words = run.command.into_iter();
    let mut command = Command::new(words.next().unwrap_or_default()).args(words);
    for variable in &run.environment {
        let Some((name, value)) = variable.split_once('=') else {
            bail!("--env {variable:?} has no '='; give NAME=VALUE");
        };
        command = command.env(name, value);
    }
    if let Some(directory) = run.directory {
        command = command.directory(directory);
    }
    let _terminal = run.tty.then(terminal::RawTerminal::enter).transpose()?.flatten();
    if run.tty {
        let size = terminal::size();
        command = command.terminal(size.rows, size.columns);
        command = command.env("TERM", std::env::var("TERM").unwrap_or_else(|_| "vt100".to_owned()));
    }
    let input = if run.interactive { Input::Reader(Box::new(io::stdin())) } else { Input::Empty };
    let process = machine.spawn(&command, input)?;
    follow(process, run.tty)
}

/// Passes a command's output on until it ends; answers its exit status.
fn follow(mut process: Process, tty: bool) -> anyhow::Result<ExitCode> {
    if tty {
        terminal::pass_sizes_on(process.handle())?;
    }
    loop {
        match process.next_event() {
            Ok(Event::Stdout(bytes)) => match write_all(io::stdout().lock(), &bytes) {
                // As a local command would: its reader has what it wanted.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::from(BROKEN_PIPE)),
                written => written?,
            },
            Ok(Event::Stderr(bytes)) => write_all(io::stderr().lock(), &bytes)?,
            Ok(Event::Ended(status)) => return Ok(exit_code(status)),
            Err(lab::Error::Refused { message, errno }) => {
                eprintln!("lab: {message}");
                return Ok(ExitCode::from(match errno {
                    Some(libc::ENOENT) => NOT_FOUND,
                    Some(libc::EACCES | libc::ENOEXEC) => NOT_EXECUTABLE,
                    _ => FAILURE,
                }));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_all(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

fn exit_code(status: Status) -> ExitCode {
    ExitCode::from(u8::try_from(status.code()).unwrap_or(FAILURE))
}
