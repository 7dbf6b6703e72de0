//! The machine's initrd: a newc archive (the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`).

/// A newc archive being written.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const TRAILER: &str = "TRAILER!!!";

impl Archive {
    /// Adds an empty directory.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds an executable file.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, EXECUTABLE, content);
    }

    /// The archive, ended.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let fields = [
            u64::from(self.inode),
            u64::from(mode),
            0, // user
            0, // group
            1, // links
            0, // time
            content.len() as u64,
            0, // device major
            0, // device minor
            0, // special file's major
            0, // special file's minor
            path.len() as u64 + 1,
            0, // checksum, unused in this format
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.file("init", b"#!/bin/sh");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<_> = (0..bytes.len()).step_by(4).filter(|at| bytes[*at..].starts_with(b"070701")).collect();
        assert_eq!(starts.len(), 3);
        assert_eq!(&bytes[starts[1] + 14..starts[1] + 22], b"000081ed", "mode of a file");
        assert_eq!(&bytes[starts[1] + 54..starts[1] + 62], b"00000009", "its size");
        assert!(bytes[starts[2] + 110..].starts_with(b"TRAILER!!!\0"));
    }
}
