//! Errors with their causes in one line.

use std::error::Error;

/// The texts of `error` and of its causes, joined by `separator`.
pub(crate) fn joined(error: &dyn Error, separator: &str) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}{separator}{inner}");
        cause = inner.source();
    }
    text
}
