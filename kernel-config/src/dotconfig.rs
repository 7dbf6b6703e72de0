//! The kernel's own `.config` format: writing what is asked for, reading what came out.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::fragment::{Request, Value};

/// A `.config` as Kconfig wrote it: the value of every symbol that is on, as it stands in the file.
#[derive(Clone, Debug, Default)]
pub struct DotConfig(BTreeMap<String, String>);

impl DotConfig {
    /// Reads a `.config`; a symbol that is "not set" or absent reads as `n`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let set = text.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('='));
        Self(set.map(|(symbol, value)| (symbol.to_owned(), value.to_owned())).collect())
    }

    /// The value of `symbol` as written, `n` where it is off or unknown.
    #[must_use]
    pub fn get(&self, symbol: &str) -> &str {
        self.0.get(symbol).map_or("n", String::as_str)
    }

    /// How many symbols are on (or have a value).
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn satisfies(&self, symbol: &str, wanted: &Value) -> bool {
        let found = self.get(symbol);
        match wanted {
            Value::Number(number) => parse_number(found) == Some(*number),
            Value::Text(_) => found == wanted.to_string(),
        }
    }
}

fn parse_number(text: &str) -> Option<i64> {
    text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |digits| i64::from_str_radix(digits, 16).ok())
}

/// A request that Kconfig did not grant.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// The symbol.
    pub symbol: String,
    /// The value that was asked for.
    pub wanted: String,
    /// The value in the final `.config`.
    pub found: String,
}

/// The requests as lines of a `.config`, for `KCONFIG_ALLCONFIG`.
#[must_use]
pub fn write_requests<'a>(requests: impl IntoIterator<Item = (&'a String, &'a Request)>) -> String {
    let mut text = String::new();
    for (symbol, request) in requests {
        // Writing to a String cannot fail.
        let _ = if request.value.is_off() {
            writeln!(text, "# CONFIG_{symbol} is not set")
        } else {
            writeln!(text, "CONFIG_{symbol}={}", request.value)
        };
    }
    text
}

/// The requests that did not survive Kconfig's dependencies and selects, in the order of their names.
#[must_use]
pub fn refusals<'a>(requests: impl IntoIterator<Item = (&'a String, &'a Request)>, config: &DotConfig) -> Vec<Refusal> {
    requests
        .into_iter()
        .filter(|(symbol, request)| !config.satisfies(symbol, &request.value))
        .map(|(symbol, request)| Refusal {
            symbol: symbol.clone(),
            wanted: request.value.to_string(),
            found: config.get(symbol).to_owned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(value: Value) -> Request {
        Request { value, reason: "a test".to_owned() }
    }

    fn text(value: &str) -> Request {
        request(Value::Text(value.to_owned()))
    }

    #[test]
    fn every_kind_of_lost_request_is_found_and_granted_ones_are_not() {
        let config =
            DotConfig::parse("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=0x1000\nCONFIG_D=12\nCONFIG_E=\"-x\"\n");
        let requests: BTreeMap<String, Request> = [
            ("A", text("y")),
            ("B", text("n")),
            ("C", request(Value::Number(0x1000))),
            ("D", request(Value::Number(12))),
            ("E", text("-x")),
            ("ABSENT", text("n")),
            ("LOST", text("y")),
            ("D2", request(Value::Number(1))),
        ]
        .into_iter()
        .chain([("A2", text("n"))])
        .map(|(symbol, request)| (symbol.to_owned(), request))
        .collect();
        let lost: Vec<String> = refusals(&requests, &config).into_iter().map(|refusal| refusal.symbol).collect();
        assert_eq!(lost, ["D2", "LOST"]);
        let on = DotConfig::parse("CONFIG_A2=y\n");
        let lost = refusals(&requests, &on);
        assert!(lost.contains(&Refusal { symbol: "A2".into(), wanted: "n".into(), found: "y".into() }));
    }

    #[test]
    fn requests_are_written_as_kconfig_reads_them() {
        let requests: BTreeMap<String, Request> =
            [("A".to_owned(), text("y")), ("B".to_owned(), text("n")), ("S".to_owned(), text("-x"))].into();
        assert_eq!(write_requests(&requests), "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"-x\"\n");
    }
}
