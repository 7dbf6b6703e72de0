//! Writes a cpio archive in the "newc" format that the kernel unpacks as initrd
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).

/// File type and permission bits.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive that is being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    /// Adds a directory; directories stand before what is in them.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[], (0, 0));
    }

    /// Adds an executable file.
    pub fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, PROGRAM, content, (0, 0));
    }

    /// Adds a character device node with its major and minor number.
    pub fn character_device(&mut self, path: &str, number: (u32, u32)) {
        self.entry(path, CHARACTER_DEVICE, &[], number);
    }

    /// The whole archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.entries += 1;
        self.bytes.extend(b"070701");
        let fields = [
            self.entries,
            mode as usize,
            0, // owner
            0, // group
            1, // links
            0, // time
            content.len(),
            0, // device that holds the file
            0,
            device.0 as usize,
            device.1 as usize,
            path.len() + 1,
            0, // checksum, unused in this format
        ];
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_lists_what_was_put_in() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.character_device("dev/mem", (1, 1));
        archive.program("init", b"content");
        let mut child = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let output = child.wait_with_output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(output.status.success());
        assert_eq!(lines.iter().map(|line| line[0]).collect::<Vec<_>>(), ["drwxr-xr-x", "crw-------", "-rwxr-xr-x"]);
        assert_eq!(lines[2][4], "7", "size of init: {listed}");
        assert!(listed.contains("1,   1") || listed.contains("1, 1"), "{listed}");
    }
}
