//! A container's log file, as kubelets read it: a line has a time, a stream, a tag and the text.

use std::path::Path;

use anyhow::{Context as _, Result};

/// One line of a container.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Line {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// What the container wrote, without the line's end.
    pub text: String,
}

/// The lines of the log at `path`, in their order. Parts of long lines are joined.
///
/// # Errors
/// When it cannot be read, or has a line in another form.
pub fn lines(path: &Path) -> Result<Vec<Line>> {
    let content = std::fs::read_to_string(path).with_context(|| format!("Cannot read {}", path.display()))?;
    parse(&content).with_context(|| format!("{} is no container's log", path.display()))
}

fn parse(content: &str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut parts = std::collections::BTreeMap::<&str, String>::new();
    for line in content.lines() {
        let mut fields = line.splitn(4, ' ');
        let mut field = || fields.next().with_context(|| format!("an unknown line: {line}"));
        let (_time, stream, tag, text) = (field()?, field()?, field()?, field()?);
        parts.entry(stream).or_default().push_str(text);
        if tag == "F" {
            lines.push(Line { stream: stream.to_owned(), text: parts.remove(stream).unwrap_or_default() });
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_and_streams_kept_apart() {
        let line = |stream: &str, text: &str| Line { stream: stream.to_owned(), text: text.to_owned() };
        let content = "2026-01-01T00:00:00.1Z stdout P one \n2026-01-01T00:00:00.2Z stderr F other\n\
                       2026-01-01T00:00:00.3Z stdout F and two\n2026-01-01T00:00:00.4Z stdout F \n";
        assert_eq!(
            parse(content).unwrap(),
            [line("stderr", "other"), line("stdout", "one and two"), line("stdout", "")]
        );
        assert!(parse("2026-01-01T00:00:00.1Z stdout").is_err());
    }
}
