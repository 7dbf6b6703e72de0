//! From TOML to [`Config`], with the line of everything that is wrong.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::keys::{self, KEYS, Key, Value};
use crate::{Config, ConfigError};

pub(crate) fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let source = Source { text, path };
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: source.line(&error.span().unwrap_or(0..0)),
        message: error.message().to_owned(),
    })?;
    let mut config = Config::default();
    source.table("", table.get_ref(), &mut config)?;
    Ok(config)
}

/// The text that spans point into.
struct Source<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Source<'_> {
    fn line(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or(self.text.as_bytes());
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    fn table(&self, prefix: &str, table: &DeTable<'_>, config: &mut Config) -> Result<(), ConfigError> {
        for (key, value) in table.iter() {
            let name =
                if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
            if let Some(known) = KEYS.iter().find(|known| known.name == name) {
                self.value(known, value, config)?;
            } else if let (true, Some(inner)) = (keys::is_table(&name), value.get_ref().as_table()) {
                self.table(&name, inner, config)?;
            } else {
                return Err(ConfigError::UnknownKey {
                    path: self.path.to_owned(),
                    line: self.line(&key.span()),
                    advice: keys::advice(&name),
                    key: name,
                });
            }
        }
        Ok(())
    }

    fn value(&self, key: &Key, value: &Spanned<DeValue<'_>>, config: &mut Config) -> Result<(), ConfigError> {
        let bad = |problem: String, remedy: &str| ConfigError::BadValue {
            path: self.path.to_owned(),
            line: self.line(&value.span()),
            key: key.name,
            value: self.text.get(value.span()).unwrap_or_default().into(),
            problem: problem.into(),
            remedy: remedy.into(),
        };
        let found = value.get_ref();
        let text = || found.as_str().ok_or_else(|| bad("not a string".to_owned(), "write it in double quotes"));
        let absolute = |text: &str| match keys::is_absolute(text) {
            true => Ok(PathBuf::from(text)),
            false => Err(bad("not an absolute path".to_owned(), "write the whole path, from /")),
        };
        match &key.value {
            Value::Flag(set) => {
                let flag = found.as_bool().ok_or_else(|| bad("not a flag".to_owned(), "write true or false"))?;
                set(config, flag);
            }
            Value::Text(set) => set(config, text()?.to_owned()),
            Value::Only { word, others } => {
                if text()? != *word {
                    return Err(bad((*others).to_owned(), &format!("write \"{word}\" or remove the line")));
                }
            }
            Value::Patterns(set) => set(config, patterns(found).map_err(|(problem, remedy)| bad(problem, remedy))?),
            Value::Path(set) => set(config, absolute(text()?)?),
            Value::OptionalPath(set) => {
                set(config, Some(text()?).filter(|text| !text.is_empty()).map(absolute).transpose()?)
            }
            Value::Number { min, max, unit, set } => {
                let number = found.as_integer().ok_or_else(|| {
                    bad("not a whole number".to_owned(), &format!("write a whole number from {min} to {max}"))
                })?;
                // What does not fit 128 bits is more than any limit.
                let count = i128::from_str_radix(number.as_str(), number.radix()).unwrap_or(i128::MAX);
                set(config, keys::within(count, *min, *max, unit).map_err(|(problem, remedy)| bad(problem, &remedy))?);
            }
        }
        Ok(())
    }
}

/// Strings that are regular expressions.
fn patterns(value: &DeValue<'_>) -> Result<Vec<String>, (String, &'static str)> {
    const REMEDY: &str = "write [\"one\", \"two\"]";
    let list = value.as_array().ok_or_else(|| ("not a list".to_owned(), REMEDY))?;
    let pattern = |value: &Spanned<DeValue<'_>>| {
        let text = value.get_ref().as_str().ok_or_else(|| ("not a list of strings".to_owned(), REMEDY))?;
        match keys::whole_name(text) {
            Ok(_) => Ok(text.to_owned()),
            Err(error) => Err((error.to_string(), "correct the regular expression")),
        }
    };
    list.iter().map(pattern).collect()
}
