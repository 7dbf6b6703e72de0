//! A directory tree as a layer of an OCI image: a tar archive that depends on the tree's content alone.
//!
//! Entries are in the order of their names, all times are the epoch, and owners come from a
//! table, not from the machine that builds.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use tool::io;

use crate::error::Error;
use crate::guest_image::hex;

/// User and group numbers of one path; everything below a directory is its own entry.
pub type Owners = HashMap<PathBuf, (u64, u64)>;

/// A compressed layer and the hashes that an image names it by.
#[derive(Debug)]
pub struct Layer {
    /// The gzip-compressed tar archive.
    pub compressed: Vec<u8>,
    /// SHA-256 of the archive before compression (the image configuration's `diff_id`), hexadecimal.
    pub diff_id: String,
}

/// Packs everything below `root`; what `owners` does not name belongs to root.
///
/// # Errors
/// When a file cannot be read, or is neither a file, a directory nor a symbolic link.
pub fn pack(root: &Path, owners: &Owners) -> Result<Layer, Error> {
    // Fast: the archive is written once, imported once, and never sent over a network.
    let sink = Hashing { inner: GzEncoder::new(Vec::new(), Compression::fast()), hash: Sha256::new() };
    let mut packer = Packer { root, owners, archive: tar::Builder::new(sink), seen: HashMap::new() };
    packer.directory(root)?;
    let sink = packer.archive.into_inner().map_err(io("pack", root))?;
    let diff_id = hex(&sink.hash.finalize());
    let compressed = sink.inner.finish().map_err(io("compress", root))?;
    Ok(Layer { compressed, diff_id })
}

struct Packer<'a> {
    root: &'a Path,
    owners: &'a Owners,
    archive: tar::Builder<Hashing>,
    /// Name of the first of several hard links, by inode.
    seen: HashMap<(u64, u64), PathBuf>,
}

impl Packer<'_> {
    fn directory(&mut self, directory: &Path) -> Result<(), Error> {
        let mut paths = fs::read_dir(directory)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
            .map_err(io("list", directory))?;
        paths.sort_unstable();
        for path in paths {
            let data = fs::symlink_metadata(&path).map_err(io("examine", &path))?;
            self.entry(&path, &data)?;
            if data.is_dir() {
                self.directory(&path)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, data: &Metadata) -> Result<(), Error> {
        let name = path.strip_prefix(self.root).unwrap_or(path).to_owned();
        let mut header = self.header(&name, data);
        let kind = data.file_type();
        let result = if kind.is_symlink() {
            let target = fs::read_link(path).map_err(io("read", path))?;
            header.set_entry_type(EntryType::Symlink);
            self.archive.append_link(&mut header, &name, target)
        } else if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.archive.append_data(&mut header, &name, std::io::empty())
        } else if let Some(first) = self.first_link(&name, data) {
            header.set_entry_type(EntryType::Link);
            self.archive.append_link(&mut header, &name, first)
        } else if kind.is_file() {
            header.set_entry_type(EntryType::Regular);
            header.set_size(data.len());
            let file = fs::File::open(path).map_err(io("open", path))?;
            self.archive.append_data(&mut header, &name, file)
        } else {
            let what = if kind.is_socket() { "a socket" } else { "a device or pipe" };
            Err(std::io::Error::other(format!("{what} cannot be part of a layer")))
        };
        Ok(result.map_err(io("pack", path))?)
    }

    /// Another name of the same file that is in the archive already.
    fn first_link(&mut self, name: &Path, data: &Metadata) -> Option<PathBuf> {
        if data.nlink() < 2 {
            return None;
        }
        let first = self.seen.entry((data.dev(), data.ino())).or_insert_with(|| name.to_owned());
        (first != name).then(|| first.clone())
    }

    fn header(&self, name: &Path, data: &Metadata) -> Header {
        let (uid, gid) = self.owners.get(name).copied().unwrap_or_default();
        let mut header = Header::new_gnu();
        header.set_mode(data.mode() & 0o7777);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(0);
        header.set_size(0);
        header
    }
}

/// Hashes what passes through.
struct Hashing {
    inner: GzEncoder<Vec<u8>>,
    hash: Sha256,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use flate2::read::GzDecoder;

    use super::*;

    fn tree(root: &Path, names: &[&str]) {
        fs::create_dir_all(root.join("etc")).unwrap();
        for name in names {
            fs::write(root.join("etc").join(name), name).unwrap();
        }
        symlink("b", root.join("etc/link")).unwrap();
        fs::hard_link(root.join("etc/b"), root.join("etc/second-name")).unwrap();
        fs::set_permissions(root.join("etc/b"), fs::Permissions::from_mode(0o4755)).unwrap();
    }

    #[test]
    fn a_layer_does_not_depend_on_times_or_the_order_of_creation() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tree(one.path(), &["a", "b"]);
        tree(two.path(), &["b", "a"]);
        fs::File::open(one.path().join("etc/a")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        let (one, two) = (pack(one.path(), &Owners::new()).unwrap(), pack(two.path(), &Owners::new()).unwrap());
        assert_eq!(one.diff_id, two.diff_id);
        assert!(one.compressed == two.compressed);
    }

    #[test]
    fn entries_keep_mode_kind_and_the_owner_of_the_table() {
        let dir = tempfile::tempdir().unwrap();
        tree(dir.path(), &["a", "b"]);
        let owners = Owners::from([(PathBuf::from("etc/a"), (33, 44))]);
        let layer = pack(dir.path(), &owners).unwrap();
        let mut raw = Vec::new();
        GzDecoder::new(&layer.compressed[..]).read_to_end(&mut raw).unwrap();
        assert_eq!(layer.diff_id, hex(&Sha256::digest(&raw)));
        let mut archive = tar::Archive::new(&raw[..]);
        let entries: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                let name = entry.path().unwrap().display().to_string();
                let link = entry.link_name().unwrap().map(|link| link.display().to_string());
                (name, header.entry_type(), header.mode().unwrap(), header.uid().unwrap(), header.gid().unwrap(), link)
            })
            .collect();
        let entry = |name: &str| entries.iter().find(|entry| entry.0.trim_end_matches('/') == name).unwrap().clone();
        assert_eq!(entry("etc").1, EntryType::Directory);
        assert_eq!((entry("etc/a").3, entry("etc/a").4), (33, 44));
        assert_eq!((entry("etc/b").1, entry("etc/b").2, entry("etc/b").3), (EntryType::Regular, 0o4755, 0));
        assert_eq!((entry("etc/link").1, entry("etc/link").5), (EntryType::Symlink, Some("b".to_owned())));
        assert_eq!(
            (entry("etc/second-name").1, entry("etc/second-name").5),
            (EntryType::Link, Some("etc/b".to_owned()))
        );
    }
}
