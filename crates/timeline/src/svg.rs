//! A timeline as a drawing.

use std::fmt::Write;

use crate::text::millis;
use crate::{Lane, Timeline};

/// Pixels of one row.
const ROW: u64 = 22;
/// Pixels left of the bars, for the names.
const LEFT: u64 = 220;
/// Pixels of the whole time.
const SCALE: u64 = 640;
/// Pixels right of the bars, for the figures.
const RIGHT: u64 = 110;
/// Pixels above the bars, for the title.
const TOP: u64 = 44;

pub(crate) fn render(timeline: &Timeline) -> String {
    let spans = timeline.spans();
    let total = timeline.total_ns().max(1);
    let rows = spans.len() as u64;
    let (width, height) = (LEFT + SCALE + RIGHT, TOP + rows * ROW + 16);
    let pixels = |ns: u64| u64::try_from(u128::from(ns) * u128::from(SCALE) / u128::from(total)).unwrap_or(SCALE);

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <style>.host{{fill:#2a78b8}}.guest{{fill:#d9822b}}text{{fill:#222}}.figure{{fill:#666}}</style>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"15\">{}: {} ms, host blue, guest orange</text>\n",
        escape(&timeline.id),
        millis(total)
    );
    for (row, (stamp, at, span)) in (0u64..).zip(spans) {
        let class = match stamp.lane {
            Lane::Host => "host",
            Lane::Guest => "guest",
        };
        let y = TOP + row * ROW;
        let (begin, length) = (LEFT + pixels(at - span), pixels(span).max(1));
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text><rect class=\"{class}\" x=\"{begin}\" y=\"{y}\" \
             width=\"{length}\" height=\"{}\" rx=\"2\"/><text class=\"figure\" x=\"{}\" y=\"{}\">{} ms</text>",
            LEFT - 10,
            y + 12,
            escape(&stamp.name),
            ROW - 8,
            begin + length + 6,
            y + 12,
            millis(span),
        );
    }
    out.push_str("</svg>\n");
    out
}

/// Text for XML 1.0: markup is escaped, and characters that XML has no word for are replaced.
fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
        out
    })
}
