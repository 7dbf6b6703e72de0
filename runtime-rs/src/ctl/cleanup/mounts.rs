//! The mount points of this mount namespace.

use std::path::{Path, PathBuf};

/// Mount points below `root` (not `root` itself), the latest first: that is the order in which they can go.
pub(super) fn below(root: &Path) -> std::io::Result<Vec<PathBuf>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(parse(&text, root))
}

/// Field 5 of each line (proc(5)).
fn parse(text: &[u8], root: &Path) -> Vec<PathBuf> {
    let lines = text.split(|byte| *byte == b'\n');
    let targets = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(unescape);
    let mut targets: Vec<PathBuf> = targets.filter(|target| target.starts_with(root) && target != root).collect();
    targets.reverse();
    let mut seen = std::collections::HashSet::new();
    targets.retain(|target| seen.insert(target.clone()));
    targets
}

/// Blanks and backslashes are written as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_below_the_root_come_the_latest_first_and_once() {
        let text = b"25 30 0:23 / /sys rw - sysfs sysfs rw\n\
            40 30 0:9 / /run/kata rw - tmpfs x rw\n\
            41 30 0:9 / /run/kata/a/b/mounts rw shared:1 - tmpfs x rw\n\
            42 41 0:9 / /run/kata/a/b/mounts/c\\040d\\134 rw - tmpfs x rw\n\
            43 41 0:9 / /run/kata/a/b/mounts rw - tmpfs x rw\n\
            44 30 0:9 / /run/katana rw - tmpfs x rw\n";
        let expected = [Path::new("/run/kata/a/b/mounts"), Path::new("/run/kata/a/b/mounts/c d\\")];
        assert_eq!(parse(text, Path::new("/run/kata")), expected);
    }
}
