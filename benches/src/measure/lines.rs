//! Lines from a peer that may never come.

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The longest line that is taken, in bytes.
const LINE_MAX: usize = 1 << 20;

/// The lines of a pipe or socket.
#[derive(Debug)]
pub(super) struct Lines {
    source: std::fs::File,
    /// What came and was not yet answered.
    rest: Vec<u8>,
}

impl Lines {
    /// The lines of `source`.
    #[must_use]
    pub(super) fn new(source: OwnedFd) -> Self {
        Self { source: source.into(), rest: Vec::new() }
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// When it has not come within `limit`, is too long, or the peer has ended.
    pub(super) fn next(&mut self, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            if self.rest.len() > LINE_MAX {
                bail!("A line of more than {LINE_MAX} bytes");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.source.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))? == 0 {
                bail!("Nothing came within {} s", limit.as_secs());
            }
            let mut part = [0; 4096];
            match self.source.read(&mut part).context("Cannot read a peer's output")? {
                0 => bail!("The peer has ended"),
                count => self.rest.extend_from_slice(&part[..count]),
            }
        }
    }

    /// Reads until a line is the one.
    ///
    /// # Errors
    /// As [`Self::next`]; the limit is for all lines together.
    pub(super) fn find(&mut self, limit: Duration, is_it: impl Fn(&str) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !is_it(&self.next(deadline.saturating_duration_since(Instant::now()))?) {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn lines_come_as_they_were_written_and_an_end_is_said() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut lines = Lines::new(reader.into());
        writer.write_all(b"one\r\ntwo\nthr").unwrap();
        assert_eq!(lines.next(Duration::from_secs(60)).unwrap(), "one");
        lines.find(Duration::from_secs(60), |line| line == "two").unwrap();
        assert!(lines.next(Duration::ZERO).unwrap_err().to_string().contains("Nothing came"));
        drop(writer);
        assert!(lines.next(Duration::from_secs(60)).unwrap_err().to_string().contains("ended"));
    }
}
