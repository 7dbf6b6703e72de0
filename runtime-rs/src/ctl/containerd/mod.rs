//! `kata-ctl containerd`: tells containerd's CRI of this runtime, and takes that back.
//!
//! A file of version 3 gets a drop-in and the import of it. In one of version 2 the runtime's table goes to the end of
//! the main file, between two comments: containerd before 2.0 reads that version, and lets a drop-in that names a plugin
//! replace all that the main file says of the plugin.

pub(super) mod config;
mod edit;

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;

use super::CtlError;
use config::{Configuration, below};

/// The file that containerd reads.
pub(super) const CONFIG: &str = "/etc/containerd/config.toml";
/// The drop-in, from the directory of the main file.
const DROP_IN: &str = "conf.d/kata.toml";
/// The oldest version whose plugins have the names that are known here.
const OLDEST_VERSION: i64 = 2;
/// At the end of the name of the copy that is kept.
const BACKUP: &str = ".before-kata";

/// What `kata-ctl containerd` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
    /// containerd's configuration file.
    #[arg(long, value_name = "FILE", default_value = CONFIG, global = true)]
    config: PathBuf,
    /// The root of the system that this is about, if it is not the running one: files are looked for below it.
    #[arg(long, value_name = "DIR", default_value = "/", global = true)]
    destdir: PathBuf,
    /// The shim, if containerd does not find it in its PATH (containerd from 1.7 on).
    #[arg(long, value_name = "FILE", global = true)]
    runtime_path: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Action {
    /// Print what to add to the configuration.
    Show,
    /// Add the runtime to the configuration; a copy of the file is kept. Once it is there, nothing changes any more.
    Add,
    /// Take back what `add` did.
    Remove,
}

/// Why containerd's configuration cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContainerdError {
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{} is larger than the limit of {limit} bytes; is it containerd's configuration?", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("{}, line {line}: {message}; correct the TOML syntax there", path.display())]
    Syntax { path: PathBuf, line: usize, message: String },
    #[error(
        "{} is a configuration of version {version}; bring it to version 2 or newer (`containerd config migrate`)",
        path.display()
    )]
    Version { path: PathBuf, version: i64 },
    #[error("{} cannot be changed without harm; add this by hand:\n{snippet}", path.display())]
    Unclear { path: PathBuf, snippet: String },
}

pub(super) fn run(args: &Args) -> Result<ExitCode, CtlError> {
    let mut out = std::io::stdout().lock();
    match args.action {
        Action::Show => {
            let found = Configuration::read(&args.destdir, &args.config)?;
            let text = found.text.as_deref().unwrap_or_default();
            write!(out, "{}", edit::snippet(&edit::without_block(text), found.version, args.runtime_path.as_deref()))?;
        }
        Action::Add => report(&mut out, &add(args)?, "the runtime is there already")?,
        Action::Remove => report(&mut out, &remove(args)?, "there is nothing to take back")?,
    }
    Ok(ExitCode::SUCCESS)
}

fn report(out: &mut impl Write, changed: &[PathBuf], nothing: &str) -> std::io::Result<()> {
    for path in changed {
        writeln!(out, "changed {}", path.display())?;
    }
    match changed {
        [] => writeln!(out, "nothing changed: {nothing}"),
        _ => writeln!(out, "containerd reads it when it starts: systemctl restart containerd (pods go on running)"),
    }
}

/// Adds the runtime; answers which files that changed.
fn add(args: &Args) -> Result<Vec<PathBuf>, ContainerdError> {
    let (main, runtime_path) = (args.config.as_path(), args.runtime_path.as_deref());
    let found = Configuration::read(&args.destdir, main)?;
    let drop_in = drop_in(main);
    let is_ours =
        |file: &Path| file == drop_in || found.text.as_ref().is_some_and(|text| edit::without_block(text) != *text);
    if found.handlers.iter().any(|handler| !is_ours(&handler.file)) {
        return Ok(Vec::new());
    }
    let version = found.version;
    if version < OLDEST_VERSION {
        return Err(ContainerdError::Version { path: main.to_owned(), version });
    }
    let text = found.text.as_deref().unwrap_or_default();
    let unclear =
        || ContainerdError::Unclear { path: main.to_owned(), snippet: edit::snippet(text, version, runtime_path) };
    if !edit::takes_drop_in(version) {
        let new = edit::with_block(text, version, runtime_path);
        config::parse(&new, main).map_err(|_| unclear())?;
        return replace_all(args, [(main.to_owned(), Some(new))]);
    }
    let new = if found.imports(main, &drop_in) {
        found.text.clone()
    } else {
        let new = edit::with_import(text, &drop_in).ok_or_else(unclear)?;
        config::parse(&new, main).map_err(|_| unclear())?;
        Some(new)
    };
    // The drop-in first: the main file never imports what is not there.
    replace_all(args, [(drop_in, Some(edit::drop_in(version, runtime_path))), (main.to_owned(), new)])
}

/// Takes the runtime back; answers which files that changed.
fn remove(args: &Args) -> Result<Vec<PathBuf>, ContainerdError> {
    let main = args.config.as_path();
    let drop_in = drop_in(main);
    let Some(text) = config::read_file(&below(&args.destdir, main))? else {
        return replace_all(args, [(drop_in, None)]);
    };
    let without = edit::without_block(&text);
    let unclear = || ContainerdError::Unclear {
        path: main.to_owned(),
        snippet: format!("(remove the import of {})", drop_in.display()),
    };
    let without = edit::without_import(&without, &drop_in).ok_or_else(unclear)?;
    // A file that held nothing else was made by `add`.
    let main_text = Some(without).filter(|without| !without.trim().is_empty());
    replace_all(args, [(main.to_owned(), main_text), (drop_in.clone(), None)])
}

fn drop_in(main: &Path) -> PathBuf {
    main.parent().unwrap_or_else(|| Path::new("/")).join(DROP_IN)
}

/// Gives each file its text, or removes it; answers those that were not as they should be.
fn replace_all<const N: usize>(
    args: &Args,
    files: [(PathBuf, Option<String>); N],
) -> Result<Vec<PathBuf>, ContainerdError> {
    let mut changed = Vec::new();
    for (path, text) in files {
        let real = below(&args.destdir, &path);
        let before = config::read_file(&real)?;
        if before == text {
            continue;
        }
        match &text {
            Some(text) => replace(&real, text, before.as_deref())?,
            None => remove_file(&real)?,
        }
        changed.push(path);
    }
    Ok(changed)
}

/// Replaces a file as a whole, at once, and keeps the first one that is replaced. The copy goes when the file is as it
/// was.
fn replace(path: &Path, text: &str, before: Option<&str>) -> Result<(), ContainerdError> {
    let failed = |action| move |source| ContainerdError::File { action, path: path.to_owned(), source };
    let with = |end: &str| {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(end);
        path.with_file_name(name)
    };
    let (new, backup) = (with(".new"), with(BACKUP));
    std::fs::create_dir_all(path.parent().unwrap_or_else(|| Path::new("/")))
        .map_err(failed("make the directory of"))?;
    if let Some(before) = before
        && !backup.exists()
    {
        std::fs::write(&backup, before).map_err(failed("keep a copy of"))?;
    }
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&new)?;
        if let Ok(metadata) = std::fs::metadata(path) {
            file.set_permissions(std::fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
            std::os::unix::fs::fchown(&file, Some(metadata.uid()), Some(metadata.gid()))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    write().map_err(failed("replace"))?;
    if std::fs::read_to_string(&backup).is_ok_and(|kept| kept == text) {
        std::fs::remove_file(&backup).map_err(failed("remove the copy of"))?;
    }
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), ContainerdError> {
    std::fs::remove_file(path).map_err(|source| ContainerdError::File {
        action: "remove",
        path: path.to_owned(),
        source,
    })
}
