//! A timeline as a table for a terminal.

use std::fmt::Write;

use crate::{Lane, Timeline};

/// Columns of the longest bar.
const BAR: u64 = 40;

pub(crate) fn render(timeline: &Timeline) -> String {
    let mut out = format!("{}: {} ms in all\n", timeline.id, millis(timeline.total_ns()));
    let spans = timeline.spans();
    let width = spans.iter().map(|(stamp, _, _)| stamp.name.chars().count()).max().unwrap_or(0);
    let longest = spans.iter().map(|(_, _, span)| *span).max().unwrap_or(0).max(1);
    let _ = writeln!(out, "{:>10} {:>10}  lane   hop", "at ms", "took ms");
    for (stamp, at, span) in spans {
        let lane = match stamp.lane {
            Lane::Host => "host ",
            Lane::Guest => "guest",
        };
        let columns = usize::try_from(u128::from(span) * u128::from(BAR) / u128::from(longest)).unwrap_or(0);
        let name = stamp.name.chars().map(|c| if c.is_control() { '?' } else { c }).collect::<String>();
        let line = format!("{:>10} {:>10}  {lane}  {name:<width$}  {}", millis(at), millis(span), "▇".repeat(columns));
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// Milliseconds with three decimals, without floating point.
pub(crate) fn millis(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000, ns / 1_000 % 1_000)
}
