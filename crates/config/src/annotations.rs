//! Annotations of a pod that change its configuration, under Kata's names.
//!
//! `io.katacontainers.config.hypervisor.<key>` sets a key of `[hypervisor.dragonball]` if `enable_annotations` there
//! lets it; the others are always allowed, as in Kata. A name that does nothing here is refused, because a pod that
//! silently runs with other settings than it asked for is worse than one that does not start.

use std::collections::HashMap;

use crate::keys::{self, KEYS, Value};
use crate::{Config, ConfigError};

/// What the names of such annotations begin with.
pub const PREFIX: &str = "io.katacontainers.config.";
/// Those that `enable_annotations` decides on.
const HYPERVISOR: &str = "hypervisor.";
/// A longer value is refused (bytes): it goes to the guest's command line.
const MAX_VALUE: usize = 1024;

/// Names behind [`PREFIX`], and the keys that they set.
const ANNOTATIONS: &[(&str, &str)] = &[
    ("hypervisor.kernel_params", "hypervisor.dragonball.kernel_params"),
    ("hypervisor.default_vcpus", "hypervisor.dragonball.default_vcpus"),
    ("hypervisor.default_maxvcpus", "hypervisor.dragonball.default_maxvcpus"),
    ("hypervisor.default_memory", "hypervisor.dragonball.default_memory"),
    ("hypervisor.default_maxmemory", "hypervisor.dragonball.default_maxmemory"),
    ("hypervisor.enable_hugepages", "hypervisor.dragonball.enable_hugepages"),
    // Kata has this one under `runtime`, though the key is the agent's.
    ("runtime.create_container_timeout", "agent.kata.create_container_timeout"),
];

/// Why a pod cannot have what its annotations ask for.
#[derive(Debug, thiserror::Error)]
pub enum AnnotationError {
    /// No such setting.
    #[error("annotation `{name}` sets nothing here; {advice}")]
    Unknown {
        /// As given.
        name: String,
        /// The nearest known one.
        advice: String,
    },
    /// The administrator does not allow it.
    #[error(
        "annotation `{name}` is not allowed: `enable_annotations` in [hypervisor.dragonball] has [{enabled}]; add \
         \"{key}\" there, or remove the annotation"
    )]
    NotEnabled {
        /// As given.
        name: String,
        /// The key that must be allowed.
        key: String,
        /// What is allowed.
        enabled: String,
    },
    /// A value that the key cannot have.
    #[error("annotation `{name}` = {value:?}: {problem}; {remedy}")]
    BadValue {
        /// As given.
        name: String,
        /// As given; cut where it is very long.
        value: String,
        /// The limit.
        problem: String,
        /// What to write instead.
        remedy: String,
    },
}

impl Config {
    /// Applies the annotations that are meant for this runtime, and none of the others.
    ///
    /// # Errors
    ///
    /// [`AnnotationError`] for the first one by name that cannot be applied.
    pub fn annotate(&mut self, annotations: &HashMap<String, String>) -> Result<(), AnnotationError> {
        let mut ours: Vec<_> =
            annotations.iter().filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?, value))).collect();
        ours.sort_unstable();
        ours.into_iter().try_for_each(|(short, value)| self.annotate_one(short, value))
    }

    fn annotate_one(&mut self, short: &str, value: &str) -> Result<(), AnnotationError> {
        let name = format!("{PREFIX}{short}");
        let known = ANNOTATIONS.iter().find(|(known, _)| *known == short);
        let key = known.and_then(|(_, key)| KEYS.iter().find(|known| known.name == *key));
        let Some(key) = key else { return Err(unknown(name)) };
        if let Some(key) = short.strip_prefix(HYPERVISOR)
            && !self.enables(key)
        {
            let enabled = self.hypervisor.enable_annotations.join(", ");
            return Err(AnnotationError::NotEnabled { name, key: key.to_owned(), enabled });
        }
        self.set(&key.value, value).map_err(|(problem, remedy)| AnnotationError::BadValue {
            name,
            value: value.chars().take(80).collect(),
            problem,
            remedy,
        })
    }

    fn enables(&self, key: &str) -> bool {
        let enabled = &self.hypervisor.enable_annotations;
        enabled.iter().any(|pattern| keys::whole_name(pattern).is_ok_and(|pattern| pattern.is_match(key)))
    }

    /// Sets a key from text; the problem and the remedy if it cannot be.
    fn set(&mut self, key: &Value, text: &str) -> Result<(), (String, String)> {
        if text.len() > MAX_VALUE {
            return Err((format!("{} bytes", text.len()), format!("write at most {MAX_VALUE}")));
        }
        match key {
            Value::Text(set) => {
                // The only text is the kernel's command line: to what the administrator wrote there, not instead of it.
                let words = format!("{} {}", self.hypervisor.kernel_params, text.trim());
                set(self, words.trim().to_owned());
            }
            Value::Number { min, max, unit, set } => {
                let count = quantity(text.trim(), unit).ok_or_else(|| {
                    let or_unit = if *unit == MIB { ", or one with the unit Mi or Gi" } else { "" };
                    ("not a whole number".to_owned(), format!("write a whole number from {min} to {max}{or_unit}"))
                })?;
                set(self, keys::within(count, *min, *max, unit)?);
            }
            Value::Flag(set) => {
                let flag = text.trim().parse().map_err(|_| ("not a flag", "write true or false"));
                set(self, flag.map_err(|(problem, remedy)| (problem.to_owned(), remedy.to_owned()))?);
            }
            Value::Only { .. } | Value::Patterns(_) | Value::Path(_) | Value::OptionalPath(_) => {
                return Err(("not a setting of one pod".to_owned(), "remove the annotation".to_owned()));
            }
        }
        Ok(())
    }
}

/// The unit of memory.
const MIB: &str = "MiB";

/// A number; for memory, in MiB or with a unit as Kubernetes writes it.
fn quantity(text: &str, unit: &str) -> Option<i128> {
    let (digits, factor) = match (text.strip_suffix("Gi"), text.strip_suffix("Mi")) {
        (Some(digits), _) if unit == MIB => (digits, 1024),
        (_, Some(digits)) if unit == MIB => (digits, 1),
        _ => (text, 1),
    };
    // The longest number that is worth reading has fewer digits than a 64-bit one.
    digits.parse::<i64>().ok().map(|count| i128::from(count) * factor)
}

fn unknown(name: String) -> AnnotationError {
    let advice = match keys::nearest(name.trim_start_matches(PREFIX), ANNOTATIONS.iter().map(|(known, _)| *known)) {
        Some(nearest) => {
            format!("the nearest known one is `{PREFIX}{nearest}`; correct the name or remove the annotation")
        }
        None => "remove the annotation".to_owned(),
    };
    AnnotationError::Unknown { name, advice }
}

impl From<AnnotationError> for ConfigError {
    fn from(error: AnnotationError) -> Self {
        Self::Annotation(Box::new(error))
    }
}
