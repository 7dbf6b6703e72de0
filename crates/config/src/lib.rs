//! The configuration file: Kata's keys, typed, with defaults.
