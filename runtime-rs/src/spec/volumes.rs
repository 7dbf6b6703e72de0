//! Volumes that somebody on the host keeps up to date for programs that wait for changes.

use std::fs;
use std::path::Path;

use protocols::{MAX_COPY_BYTES, MAX_COPY_ENTRIES};

/// Directories of a kubelet's pods that hold such volumes (`pods/<uid>/volumes/<kind>/<name>`).
const KEPT_UP_TO_DATE: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];
/// Directories within each other, more than any such volume has.
const MAX_DEPTH: usize = 16;

/// Whether a container gets a copy of `source` that is changed when the volume is: the kernel of a guest tells nobody of what
/// the host changes in a shared directory. A volume that would take too much of the guest's memory stays shared.
pub(super) fn is_copied(source: &Path) -> bool {
    let kind = source.parent().and_then(Path::file_name).and_then(|kind| kind.to_str());
    if !kind.is_some_and(|kind| KEPT_UP_TO_DATE.contains(&kind)) {
        return false;
    }
    let mut left = (MAX_COPY_ENTRIES, MAX_COPY_BYTES);
    let small = fits(source, MAX_DEPTH, &mut left);
    if !small {
        tracing::warn!(source = %source.display(), "the volume is too large for programs to be told of its changes");
    }
    small
}

/// Takes what `directory` holds off the entries and bytes that are `left`; whether there were enough.
fn fits(directory: &Path, depth: usize, left: &mut (usize, u64)) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return false };
    for entry in entries {
        let Ok(metadata) = entry.as_ref().map_err(drop).and_then(|entry| entry.metadata().map_err(drop)) else {
            return false;
        };
        let bytes = if metadata.is_file() { metadata.len() } else { 0 };
        let (Some(entries), Some(bytes)) = (left.0.checked_sub(1), left.1.checked_sub(bytes)) else { return false };
        *left = (entries, bytes);
        let Ok(path) = entry.map(|entry| entry.path()) else { return false };
        if metadata.is_dir() && (depth == 0 || !fits(&path, depth - 1, left)) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelet_s_small_volumes_are_copied_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let make = |kind: &str| {
            let volume = directory.path().join("pods/1/volumes").join(kind).join("name");
            fs::create_dir_all(volume.join("..data")).unwrap();
            fs::write(volume.join("..data/key"), "value").unwrap();
            volume
        };
        assert!(is_copied(&make("kubernetes.io~configmap")) && is_copied(&make("kubernetes.io~projected")));
        assert!(!is_copied(&make("kubernetes.io~empty-dir")));
        let secret = make("kubernetes.io~secret");
        assert!(!is_copied(&secret.join("..data")));
        fs::File::create(secret.join("..data/large")).unwrap().set_len(MAX_COPY_BYTES).unwrap();
        assert!(!is_copied(&secret));
    }
}
