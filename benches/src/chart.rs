//! Draws a group of figures as horizontal bars, an SVG that reads in light and dark pages.

use std::fmt::Write as _;

use crate::report::{Figure, Goal, round};

/// Sizes in pixels.
const WIDTH: f64 = 860.0;
const ROW: f64 = 30.0;
const LABELS: f64 = 380.0;
const VALUES: f64 = 130.0;
const TOP: f64 = 40.0;
const COLOURS: &str = ":root{color-scheme:light dark}text{font:13px system-ui,sans-serif;fill:#222}.title{font-weight:600}\
    .own{fill:#2f7d5b}.peer{fill:#9aa5b1}.range{stroke:#555;stroke-width:1.5}.goal{stroke:#c0392b;stroke-width:2}\
    @media(prefers-color-scheme:dark){text{fill:#ddd}.range{stroke:#bbb}}";

/// Bars of the medians, each with a line from min to max; a red mark where the goal is.
#[must_use]
pub fn bars(title: &str, figures: &[&Figure]) -> String {
    let height = TOP + ROW * (figures.len() as f64) + 12.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\"><style>{COLOURS}</style>\n\
         <text class=\"title\" x=\"8\" y=\"24\">{}</text>\n",
        escape(title)
    );
    for (row, figure) in figures.iter().enumerate() {
        let limit = limit(figures, figure);
        svg.push_str(&bar(figure, limit, TOP + ROW * (row as f64), scale(figures, figure.unit)));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Pixels per unit: bars of one unit share a scale.
fn scale(figures: &[&Figure], unit: &str) -> f64 {
    let largest = figures
        .iter()
        .filter(|figure| figure.unit == unit)
        .map(|figure| limit(figures, figure).map_or(figure.max, |limit| limit.max(figure.max)))
        .fold(f64::MIN_POSITIVE, f64::max);
    (WIDTH - LABELS - VALUES) / largest
}

/// Where the goal is in the figure's own unit.
fn limit(figures: &[&Figure], figure: &Figure) -> Option<f64> {
    match figure.goal? {
        Goal::AtMost(limit) => Some(limit),
        Goal::RatioAtMost(ratio) | Goal::RatioAtLeast(ratio) => {
            let peer = figures.iter().find(|other| Some(&other.name) == figure.peer.as_ref())?;
            Some(ratio * peer.value)
        }
    }
}

fn bar(figure: &Figure, limit: Option<f64>, y: f64, scale: f64) -> String {
    let class = if figure.goal.is_some() || figure.peer.is_some() { "own" } else { "peer" };
    let (width, middle) = (figure.value * scale, y + ROW / 2.0);
    let mut svg = format!("<text x=\"8\" y=\"{:.0}\">{}</text>", middle + 4.0, escape(&figure.name));
    let _ = write!(
        svg,
        "<rect class=\"{class}\" x=\"{LABELS}\" y=\"{:.0}\" width=\"{width:.1}\" height=\"{:.0}\" rx=\"2\"/>\
         <line class=\"range\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.0}\" y2=\"{middle:.0}\"/>",
        y + 5.0,
        ROW - 10.0,
        LABELS + figure.min * scale,
        LABELS + figure.max * scale,
    );
    if let Some(limit) = limit {
        let x = LABELS + limit * scale;
        let _ = write!(svg, "<line class=\"goal\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{y:.0}\" y2=\"{:.0}\"/>", y + ROW);
    }
    let ratio = figure.ratio.map(|ratio| format!(" ({ratio:.2} ×)")).unwrap_or_default();
    let _ = writeln!(
        svg,
        "<text x=\"{:.0}\" y=\"{:.0}\">{} {}{ratio}</text>",
        WIDTH - VALUES + 6.0,
        middle + 4.0,
        round(figure.value),
        figure.unit,
    );
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
