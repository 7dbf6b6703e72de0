//! The keys that exist: one table that the parser, the error texts and the documentation of the default file share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use regex_lite::Regex;

use crate::{Config, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

/// One key of the configuration file.
#[derive(Debug)]
pub struct Key {
    /// Table and key, with dots.
    pub name: &'static str,
    pub(crate) value: Value,
}

/// The type of a value, its limits, and where it goes.
#[derive(Debug)]
pub(crate) enum Value {
    Flag(fn(&mut Config, bool)),
    Text(fn(&mut Config, String)),
    /// Must be absolute.
    Path(fn(&mut Config, PathBuf)),
    /// The one word that is served, and why others are not.
    Only {
        word: &'static str,
        others: &'static str,
    },
    /// Regular expressions.
    Patterns(fn(&mut Config, Vec<String>)),
    /// Must be absolute; empty means unset.
    OptionalPath(fn(&mut Config, Option<PathBuf>)),
    /// Inclusive range and unit.
    Number {
        min: u64,
        max: u64,
        unit: &'static str,
        set: fn(&mut Config, u64),
    },
}

/// Every key, in the order of the default file.
pub const KEYS: &[Key] = &[
    Key { name: "hypervisor.dragonball.kernel", value: Value::Path(|config, path| config.hypervisor.kernel = path) },
    Key { name: "hypervisor.dragonball.image", value: Value::Path(|config, path| config.hypervisor.image = path) },
    Key {
        name: "hypervisor.dragonball.kernel_params",
        value: Value::Text(|config, text| config.hypervisor.kernel_params = text),
    },
    Key {
        name: "hypervisor.dragonball.default_vcpus",
        value: Value::Number {
            min: 1,
            max: MAX_VCPUS,
            unit: "vCPUs",
            set: |config, count| config.hypervisor.default_vcpus = u8::try_from(count).unwrap_or(u8::MAX),
        },
    },
    Key {
        name: "hypervisor.dragonball.default_maxvcpus",
        value: Value::Number {
            min: 0,
            max: MAX_VCPUS,
            unit: "vCPUs",
            set: |config, count| config.hypervisor.default_maxvcpus = u8::try_from(count).unwrap_or(u8::MAX),
        },
    },
    Key {
        name: "hypervisor.dragonball.default_memory",
        value: Value::Number {
            min: MIN_MEMORY_MIB,
            max: MAX_MEMORY_MIB,
            unit: "MiB",
            set: |config, mib| config.hypervisor.default_memory = mib << 20,
        },
    },
    Key {
        name: "hypervisor.dragonball.default_maxmemory",
        value: Value::Number {
            min: 0,
            max: MAX_MEMORY_MIB,
            unit: "MiB",
            set: |config, mib| config.hypervisor.default_maxmemory = mib << 20,
        },
    },
    Key {
        name: "hypervisor.dragonball.enable_hugepages",
        value: Value::Flag(|config, flag| config.hypervisor.enable_hugepages = flag),
    },
    Key {
        name: "hypervisor.dragonball.enable_annotations",
        value: Value::Patterns(|config, patterns| config.hypervisor.enable_annotations = patterns),
    },
    Key {
        name: "hypervisor.dragonball.enable_debug",
        value: Value::Flag(|config, flag| config.hypervisor.enable_debug = flag),
    },
    Key { name: "agent.kata.enable_debug", value: Value::Flag(|config, flag| config.agent.enable_debug = flag) },
    Key {
        name: "agent.kata.debug_console_enabled",
        value: Value::Flag(|config, flag| config.agent.debug_console = flag),
    },
    Key {
        name: "agent.kata.reconnect_timeout_ms",
        value: Value::Number {
            min: 100,
            max: 600_000,
            unit: "milliseconds",
            set: |config, ms| config.agent.reconnect_timeout = Duration::from_millis(ms),
        },
    },
    Key {
        name: "agent.kata.create_container_timeout",
        value: Value::Number {
            min: 1,
            max: 3_600,
            unit: "seconds",
            set: |config, seconds| config.agent.create_container_timeout = Duration::from_secs(seconds),
        },
    },
    Key { name: "runtime.enable_debug", value: Value::Flag(|config, flag| config.runtime.enable_debug = flag) },
    Key {
        name: "runtime.static_sandbox_resource_mgmt",
        value: Value::Flag(|config, flag| config.runtime.static_sandbox_resource_mgmt = flag),
    },
    Key {
        name: "runtime.vfio_mode",
        value: Value::Only {
            word: "guest-kernel",
            others: "a device of the host is used through its driver in the guest's kernel, not through VFIO in the guest",
        },
    },
    Key { name: "runtime.timeline_dir", value: Value::OptionalPath(|config, path| config.runtime.timeline_dir = path) },
];

/// Whether keys exist below this table.
pub(crate) fn is_table(name: &str) -> bool {
    KEYS.iter().any(|key| key.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}

/// What to write instead of an unknown name.
pub(crate) fn advice(name: &str) -> String {
    match nearest(name, KEYS.iter().map(|key| key.name)).and_then(|nearest| nearest.rsplit_once('.')) {
        Some((table, key)) => {
            format!("the nearest known one is `{key}` in [{table}]; correct the name or remove the line")
        }
        None => "remove the line".to_owned(),
    }
}

/// The one among `known` that `name` resembles most, by the whole and by its last part.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let score = |known: &str| strsim::jaro_winkler(name, known) + strsim::jaro_winkler(&last(name), &last(known));
    known.max_by(|left, right| score(left).total_cmp(&score(right)))
}

/// Relative paths would depend on the directory that containerd happens to run in.
pub(crate) fn is_absolute(text: &str) -> bool {
    Path::new(text).is_absolute()
}

/// The number, if it is within the limits; else the problem and the remedy.
pub(crate) fn within(count: i128, min: u64, max: u64, unit: &str) -> Result<u64, (String, String)> {
    let problem = match u64::try_from(count) {
        Ok(count) if (min..=max).contains(&count) => return Ok(count),
        Ok(count) if count > max => format!("more than the limit of {max} {unit}"),
        Err(_) if count > 0 => format!("more than the limit of {max} {unit}"),
        _ => format!("less than the least of {min} {unit}"),
    };
    Err((problem, format!("write a whole number from {min} to {max}")))
}

/// The regular expression that a whole name must match.
pub(crate) fn whole_name(pattern: &str) -> Result<Regex, regex_lite::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}
