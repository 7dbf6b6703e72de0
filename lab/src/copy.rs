//! Files to and from a machine, as tar streams.

use std::fs;
use std::io::{self, PipeReader, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::thread::JoinHandle;
use tool::io as io_error;

use crate::command::{Command, Event, Input};
use crate::error::Error;
use crate::machine::Machine;

impl Machine {
    /// Copies a file or directory into the machine: it becomes `target` there, or comes into `target` when that ends
    /// with a slash. A directory's content is merged with what is there; owners become root.
    ///
    /// # Errors
    /// When `source` cannot be read or the machine cannot write.
    pub fn push(&self, source: &Path, target: &str) -> Result<(), Error> {
        let source = &source.canonicalize().map_err(io_error("find", source))?;
        let target = if target.ends_with('/') && source.is_file() {
            format!("{target}{}", source.file_name().unwrap_or_default().to_string_lossy())
        } else {
            target.to_owned()
        };
        let (parent, name) = if source.is_dir() { (target.as_str(), ".") } else { split(&target) };
        let (reader, writer) = io::pipe().map_err(Error::Connection)?;
        let packer = spawn_packer(source.clone(), name.to_owned(), writer);
        let script = "mkdir -p -- \"$1\" && exec tar -x --keep-directory-symlink --no-same-owner -f - -C \"$1\"";
        let command = Command::shell(script).args(["push", parent]);
        let output = self.run(&command, Input::Reader(Box::new(reader)))?;
        // The unpacker's reason comes first: when it stops, the packer only sees a broken pipe.
        let output = output.check()?;
        drop(output);
        join(packer).map_err(io_error("read", source))?;
        Ok(())
    }

    /// Copies a file or directory from the machine: it becomes `target` here, or comes into `target` when that ends
    /// with a slash.
    ///
    /// # Errors
    /// When the machine cannot read it, or `target` cannot be written.
    pub fn pull(&self, source: &str, target: &Path) -> Result<(), Error> {
        let (parent, name) = split(source);
        let target = if target.to_string_lossy().ends_with('/') { target.join(name) } else { target.to_owned() };
        let (reader, mut writer) = io::pipe().map_err(Error::Connection)?;
        let unpacker = spawn_unpacker(reader, target.clone());
        let command = Command::new("tar").args(["-c", "-f", "-", "-C", parent, "--", name]);
        let (mut stderr, mut written) = (Vec::new(), Ok(()));
        let status = self.run_streaming(&command, Input::Empty, |event| match event {
            Event::Stdout(bytes) if written.is_ok() => written = writer.write_all(&bytes),
            Event::Stderr(bytes) => stderr.extend(bytes),
            _ => {}
        })?;
        drop(writer);
        let unpacked = join(unpacker);
        if status.code() != 0 {
            let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
            return Err(Error::Command { command: command.to_string(), code: status.code(), stderr });
        }
        // The unpacker's own reason, if it has one, is why it stopped reading.
        unpacked.and(written).map_err(io_error("write", &target))?;
        Ok(())
    }
}

/// Directory and name of a path in the machine.
fn split(path: &str) -> (&str, &str) {
    match path.trim_end_matches('/').rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((parent, name)) => (parent, name),
        None => (".", path),
    }
}

fn join(thread: JoinHandle<io::Result<()>>) -> io::Result<()> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("The archiver panicked")))
}

fn spawn_packer(source: PathBuf, name: String, writer: impl Write + Send + 'static) -> JoinHandle<io::Result<()>> {
    std::thread::spawn(move || {
        let mut archive = tar::Builder::new(io::BufWriter::with_capacity(256 * 1024, writer));
        archive.follow_symlinks(false);
        if source.is_dir() {
            archive.append_dir_all(name, source)
        } else {
            archive.append_path_with_name(source, name)
        }?;
        archive.into_inner()?.flush()
    })
}

fn spawn_unpacker(reader: PipeReader, target: PathBuf) -> JoinHandle<io::Result<()>> {
    std::thread::spawn(move || {
        let mut reader = reader;
        let result = unpack(&mut reader, &target);
        // Padding after the archive's end, or the rest after an error: the writer must not see a broken pipe.
        io::copy(&mut reader, &mut io::sink())?;
        result
    })
}

/// Unpacks an archive of one file or directory, which becomes `target`.
fn unpack(reader: &mut impl Read, target: &Path) -> io::Result<()> {
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let mut inside = path.components();
        inside.next();
        if inside.clone().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(io::Error::other(format!("The machine's archive names {}", path.display())));
        }
        let place = target.join(inside.as_path());
        // Joining an empty path would add a slash, which no file can have.
        let place = if inside.as_path().as_os_str().is_empty() { target } else { &place };
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        entry.unpack(place)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_the_machine_split_as_dirname_and_basename_do() {
        for (path, parts) in [
            ("/a/b/c", ("/a/b", "c")),
            ("/a", ("/", "a")),
            ("a", (".", "a")),
            ("/a/b/", ("/a", "b")),
            ("./a", (".", "a")),
        ] {
            assert_eq!(split(path), parts, "{path}");
        }
    }

    #[test]
    fn an_archive_cannot_leave_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..10].copy_from_slice(b"a/../../xx");
        header.set_size(0);
        header.set_cksum();
        archive.append(&header, io::empty()).unwrap();
        let bytes = archive.into_inner().unwrap();
        assert!(unpack(&mut bytes.as_slice(), &dir.path().join("target")).is_err());
    }
}
