//! A fragment: a data file of kernel symbols, each with the value asked for and the reason.
//!
//! ```toml
//! about = "What these symbols are for, in one sentence"
//!
//! [symbols]
//! VIRTIO_BLK = { value = "y", reason = "block devices of containers" }
//! NR_CPUS = { value = 240, reason = "the most vCPUs a pod may have" }
//! LOCALVERSION = { value = "-tatami", reason = "tells guest and host apart" }
//! ```

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a fragment was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is no TOML, has an unknown key, or names a symbol twice.
    #[error("Fragment {fragment}: {source}")]
    Syntax {
        /// Name of the fragment.
        fragment: String,
        /// What the parser says, with line and column.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A symbol's name is not one that Kconfig knows.
    #[error(
        "Fragment {fragment}: {symbol:?} is no symbol name; write capitals, digits and underscores, without CONFIG_"
    )]
    Name {
        /// Name of the fragment.
        fragment: String,
        /// The name as it stands in the file.
        symbol: String,
    },
    /// A symbol has no real reason.
    #[error("Fragment {fragment}: {symbol} has no reason; say in a few words who needs this value")]
    Reason {
        /// Name of the fragment.
        fragment: String,
        /// The symbol.
        symbol: String,
    },
    /// Two fragments of one profile ask for the same symbol.
    #[error("{symbol} stands in fragment {first} and in fragment {second}; keep one of them")]
    Duplicate {
        /// The symbol.
        symbol: String,
        /// The fragment that came first.
        first: String,
        /// The one that repeats it.
        second: String,
    },
}

/// The value that a symbol shall have (Kconfig's types: `Documentation/kbuild/kconfig-language.rst`).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// `y`, `m` or `n` of a bool or tristate symbol, or the text of a string symbol.
    Text(String),
    /// The value of an int or hex symbol.
    Number(i64),
}

impl Value {
    /// Whether this asks for the symbol to be off.
    #[must_use]
    pub fn is_off(&self) -> bool {
        matches!(self, Self::Text(text) if text == "n")
    }
}

impl fmt::Display for Value {
    /// The value as it stands to the right of `=` in a `.config`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) if matches!(text.as_str(), "y" | "m" | "n") => f.write_str(text),
            Self::Text(text) => write!(f, "\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

/// One symbol's request.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The value that must be in the final `.config`.
    pub value: Value,
    /// Who needs it, or what it costs or saves.
    pub reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    about: String,
    symbols: BTreeMap<String, Request>,
}

/// A fragment, checked.
#[derive(Clone, Debug)]
pub struct Fragment {
    /// Its file name without the ending.
    pub name: String,
    /// What its symbols have in common.
    pub about: String,
    /// The requests by symbol name (without `CONFIG_`).
    pub symbols: BTreeMap<String, Request>,
}

impl Fragment {
    /// Reads the text of the fragment called `name`.
    ///
    /// # Errors
    /// [`Error::Syntax`] (a symbol that stands twice included), [`Error::Name`], [`Error::Reason`].
    pub fn parse(name: &str, text: &str) -> Result<Self, Error> {
        let file: File = toml::from_str(text)
            .map_err(|source| Error::Syntax { fragment: name.to_owned(), source: Box::new(source) })?;
        for (symbol, request) in &file.symbols {
            let (fragment, symbol) = (name.to_owned(), symbol.clone());
            if !is_symbol_name(&symbol) {
                return Err(Error::Name { fragment, symbol });
            }
            if request.reason.split_whitespace().count() < 2 {
                return Err(Error::Reason { fragment, symbol });
            }
        }
        Ok(Self { name: name.to_owned(), about: file.about, symbols: file.symbols })
    }
}

fn is_symbol_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with("CONFIG_")
        && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn parse(symbols: &str) -> Result<Fragment, Error> {
        Fragment::parse("test", &format!("about = \"a test\"\n[symbols]\n{symbols}\n"))
    }

    #[test]
    fn values_of_every_kconfig_type_are_read_and_written() {
        let fragment = parse(concat!(
            "PCI = { value = \"y\", reason = \"has a reason\" }\n",
            "HZ = { value = 250, reason = \"has a reason\" }\n",
            "LOCALVERSION = { value = \"-a\\\"b\", reason = \"has a reason\" }\n"
        ))
        .unwrap();
        let written: Vec<String> = fragment.symbols.values().map(|request| request.value.to_string()).collect();
        assert_eq!(written, ["250", "\"-a\\\"b\"", "y"]);
    }

    #[rstest]
    #[case::twice("A = { value = \"y\", reason = \"x y\" }\nA = { value = \"n\", reason = \"x y\" }", "duplicate key")]
    #[case::unknown_key("A = { value = \"y\", reason = \"x y\", why = \"\" }", "unknown field `why`")]
    #[case::no_reason("A = { value = \"y\" }", "missing field `reason`")]
    #[case::empty_reason("A = { value = \"y\", reason = \"  \" }", "A has no reason")]
    #[case::prefixed("CONFIG_A = { value = \"y\", reason = \"x y\" }", "is no symbol name")]
    #[case::lower_case("a = { value = \"y\", reason = \"x y\" }", "is no symbol name")]
    #[case::wrong_type("A = { value = true, reason = \"x y\" }", "did not match")]
    fn a_bad_request_is_refused_and_named(#[case] symbols: &str, #[case] expected: &str) {
        let error = parse(symbols).unwrap_err().to_string();
        assert!(error.contains("test") && error.contains(expected), "{error}");
    }
}
