//! `kernel-config`: builds the guest kernel and explains what is in it.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use cache::Cache;
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use kernel_config::build::{Builder, Kernel, Progress};
use kernel_config::profile::Profile;

/// How many compiled files make a new line where there is no terminal.
const LINE_EVERY: u64 = 200;

/// The guest kernel: what it is made of and why, and its build
///
/// The kernel is built from Debian's kernel source. Every symbol of its configuration that matters stands in a
/// fragment with its value and its reason; a build fails when Kconfig did not grant one of them.
#[derive(Parser)]
#[command(name = "kernel-config", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Build the kernel of a profile, or take it from the cache
    ///
    /// Example: kernel-config build --output target/dist/usr/share/kata-containers
    Build {
        /// Which kernel
        #[arg(long, value_enum, default_value_t = Profile::Base)]
        profile: Profile,
        /// Copy vmlinux and, with modules, lib/modules into this directory
        #[arg(long, value_name = "DIR")]
        output: Option<PathBuf>,
        /// Keep the object files in this directory and build only what changed (for work on the fragments)
        #[arg(long, value_name = "DIR")]
        build_tree: Option<PathBuf>,
        /// How many compilers run at once [default: one per CPU]
        #[arg(long, value_name = "N")]
        jobs: Option<usize>,
        /// Print the result as JSON
        #[arg(long)]
        json: bool,
    },
    /// List the fragments and symbols of a profile, each with its reason
    Show {
        /// Which kernel
        #[arg(long, value_enum, default_value_t = Profile::Base)]
        profile: Profile,
        /// Print the list as JSON
        #[arg(long)]
        json: bool,
    },
    /// Tell in which profiles a symbol stands, with which value, and why
    ///
    /// Example: kernel-config explain VMGENID
    Explain {
        /// The symbol, with or without CONFIG_
        symbol: String,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Action::Build { profile, output, build_tree, jobs, json } => {
            build(profile, output.as_deref(), build_tree.as_deref(), jobs, json)
        }
        Action::Show { profile, json } => show(profile, json),
        Action::Explain { symbol } => explain(&symbol),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {error:#}", console::style("error:").red().bold().for_stderr());
            ExitCode::FAILURE
        }
    }
}

fn build(
    profile: Profile,
    output: Option<&Path>,
    build_tree: Option<&Path>,
    jobs: Option<usize>,
    json: bool,
) -> Result<()> {
    let cache = Cache::open()?;
    let jobs = jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let build_tree = build_tree.map(std::path::absolute).transpose().context("The build tree has no path")?;
    let builder = Builder { cache: &cache, jobs, build_tree: build_tree.as_deref() };
    let report = Report::new();
    let kernel = builder.build(profile, &report)?;
    report.bar.finish_and_clear();
    if let Some(output) = output {
        copy(&kernel, output)?;
    }
    print_kernel(&kernel, json)
}

fn copy(kernel: &Kernel, output: &Path) -> Result<()> {
    std::fs::create_dir_all(output).with_context(|| format!("Cannot create {}", output.display()))?;
    let mut names = vec!["vmlinux"];
    if kernel.manifest.modules {
        names.push("lib");
    }
    for name in names {
        let status = std::process::Command::new("cp")
            .args(["--archive", "--remove-destination"])
            .arg(kernel.directory.join(name))
            .arg(output)
            .status()
            .context("Cannot run cp")?;
        if !status.success() {
            bail!("Cannot copy {name} to {}", output.display());
        }
    }
    Ok(())
}

fn print_kernel(kernel: &Kernel, json: bool) -> Result<()> {
    let vmlinux = kernel.directory.join("vmlinux");
    let manifest = &kernel.manifest;
    if json {
        let mut value = serde_json::to_value(manifest)?;
        value["directory"] = serde_json::to_value(&kernel.directory)?;
        println!("{value:#}");
        return Ok(());
    }
    println!("{} ({}, {:.1} MB)", vmlinux.display(), manifest.release, manifest.vmlinux_bytes as f64 / 1e6);
    Ok(())
}

fn show(profile: Profile, json: bool) -> Result<()> {
    let fragments = profile.fragments()?;
    let mut out = std::io::stdout().lock();
    if json {
        let all: serde_json::Map<String, serde_json::Value> = fragments
            .iter()
            .map(|fragment| Ok((fragment.name.clone(), serde_json::to_value(&fragment.symbols)?)))
            .collect::<Result<_>>()?;
        writeln!(out, "{:#}", serde_json::Value::Object(all))?;
        return Ok(());
    }
    for fragment in &fragments {
        writeln!(out, "{} — {}", console::style(&fragment.name).bold(), fragment.about)?;
        for (symbol, request) in &fragment.symbols {
            writeln!(out, "  {:<36} {}", format!("{symbol}={}", request.value), request.reason)?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn explain(symbol: &str) -> Result<()> {
    let symbol = symbol.strip_prefix("CONFIG_").unwrap_or(symbol);
    let mut found = false;
    let mut names = Vec::new();
    for profile in Profile::ALL {
        let requests = profile.requests()?;
        if let Some(origin) = requests.get(symbol) {
            found = true;
            let value = console::style(format!("{symbol}={}", origin.request.value)).bold();
            println!("{:<9} {value} ({}): {}", profile.name(), origin.fragment, origin.request.reason);
        }
        names.extend(requests.into_keys());
    }
    if found {
        return Ok(());
    }
    let near = names.iter().max_by(|a, b| strsim::jaro_winkler(a, symbol).total_cmp(&strsim::jaro_winkler(b, symbol)));
    let hint = near.map(|name| format!("; did you mean {name}?")).unwrap_or_default();
    bail!("No fragment asks for {symbol}: it is off unless another symbol selects it{hint}")
}

/// A progress bar on a terminal, plain lines elsewhere.
struct Report {
    bar: ProgressBar,
    terminal: bool,
}

impl Report {
    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {wide_msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { bar, terminal }
    }
}

impl Progress for Report {
    fn step(&self, what: &str) {
        self.bar.set_prefix(what.to_owned());
        self.bar.set_message("");
        if !self.terminal {
            eprintln!("kernel: {what}");
        }
    }

    fn compiled(&self, file: &str) {
        self.bar.inc(1);
        let count = self.bar.position();
        self.bar.set_message(format!("{count} files, {file}"));
        if !self.terminal && count.is_multiple_of(LINE_EVERY) {
            eprintln!("kernel: {count} files compiled");
        }
    }
}
