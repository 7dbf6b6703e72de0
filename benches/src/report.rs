//! The figures, and how they are written down.

use std::fmt::Write as _;

use serde::Serialize;

use crate::chart;
use crate::sample::Sample;

/// What a figure has to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// The value is at most this, in the figure's unit.
    AtMost(f64),
    /// The ratio to the peer is at most this.
    RatioAtMost(f64),
    /// The ratio to the peer is at least this.
    RatioAtLeast(f64),
}

/// One measured quantity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What was measured; unique in a report.
    pub name: String,
    /// The median.
    pub value: f64,
    /// Unit of value, min and max.
    pub unit: &'static str,
    /// Name of the figure that this one is compared with.
    pub peer: Option<String>,
    /// Median of the ratios to the peer of the same run.
    pub ratio: Option<f64>,
    /// Number of measurements.
    pub n: usize,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
    /// The group that it is reported in.
    #[serde(skip)]
    pub group: &'static str,
    /// What it has to reach.
    #[serde(skip)]
    pub goal: Option<Goal>,
}

impl Figure {
    /// The figure of a sample, with neither peer nor goal.
    #[must_use]
    pub fn new(group: &'static str, name: impl Into<String>, unit: &'static str, sample: &Sample) -> Self {
        Self {
            name: name.into(),
            value: sample.median(),
            unit,
            peer: None,
            ratio: None,
            n: sample.count(),
            min: sample.min(),
            max: sample.max(),
            group,
            goal: None,
        }
    }

    /// Adds the figure that it is compared with.
    #[must_use]
    pub fn against(mut self, peer: &str, own: &Sample, others: &Sample) -> Self {
        self.peer = Some(peer.to_owned());
        self.ratio = Some(own.ratio(others));
        self
    }

    /// The same at another place of the sample than its median, with the ratio to the peer's there.
    #[must_use]
    pub fn at_percentile(mut self, percent: usize, own: &Sample, peer: Option<&Sample>) -> Self {
        self.value = own.percentile(percent);
        self.ratio = peer.map(|peer| self.value / peer.percentile(percent));
        self
    }

    /// Adds what it has to reach.
    #[must_use]
    pub fn with_goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    /// Whether it reaches its goal, where it has one.
    #[must_use]
    pub fn is_met(&self) -> Option<bool> {
        match self.goal? {
            Goal::AtMost(limit) => Some(self.value <= limit),
            Goal::RatioAtMost(limit) => self.ratio.map(|ratio| ratio <= limit),
            Goal::RatioAtLeast(limit) => self.ratio.map(|ratio| ratio >= limit),
        }
    }

    fn goal_text(&self) -> String {
        match self.goal {
            None => String::new(),
            Some(Goal::AtMost(limit)) => format!("≤ {limit} {}", self.unit),
            Some(Goal::RatioAtMost(limit)) => format!("≤ {limit} ×"),
            Some(Goal::RatioAtLeast(limit)) => format!("≥ {limit} ×"),
        }
    }
}

/// All figures of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// The figures, in the order measured.
    pub figures: Vec<Figure>,
    /// Paragraphs for people: what a figure's parts are, what could not be measured and why.
    pub notes: Vec<String>,
}

impl Report {
    /// The groups, in the order of their first figures.
    fn groups(&self) -> Vec<&'static str> {
        let mut groups = Vec::new();
        for figure in &self.figures {
            if !groups.contains(&figure.group) {
                groups.push(figure.group);
            }
        }
        groups
    }

    /// The charts: file name and SVG text of each group.
    #[must_use]
    pub fn charts(&self) -> Vec<(String, String)> {
        let of = |group| self.figures.iter().filter(move |figure| figure.group == group);
        let chart = |group| (chart_name(group), chart::bars(group, &of(group).collect::<Vec<_>>()));
        self.groups().into_iter().map(chart).collect()
    }

    /// The report as Markdown; it refers to the charts' files beside it.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text =
            String::from("# Figures\n\nMedians; ratios are medians over pairs measured one after the other.\n");
        for group in self.groups() {
            text.push_str(&self.section(group));
        }
        for note in &self.notes {
            // Writing to a String cannot fail.
            let _ = write!(text, "\n{note}\n");
        }
        text
    }

    fn section(&self, group: &str) -> String {
        let mut text = format!(
            "\n## {group}\n\n![{group}]({})\n\n\
             | figure | median | min – max | n | peer | ratio | goal | |\n|---|--:|--:|--:|---|--:|---|---|\n",
            chart_name(group)
        );
        for figure in self.figures.iter().filter(|figure| figure.group == group) {
            let _ = writeln!(
                text,
                "| {} | {} {} | {} – {} | {} | {} | {} | {} | {} |",
                figure.name,
                round(figure.value),
                figure.unit,
                round(figure.min),
                round(figure.max),
                figure.n,
                figure.peer.as_deref().unwrap_or_default(),
                figure.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
                figure.goal_text(),
                figure.is_met().map_or("", |met| if met { "met" } else { "**missed**" }),
            );
        }
        text
    }
}

fn chart_name(group: &str) -> String {
    let word = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    format!("{}.svg", group.chars().map(word).collect::<String>())
}

/// A value with three significant digits or its whole part, whichever is more.
#[must_use]
pub fn round(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let sample = |values: &[f64]| Sample::new(values.to_vec()).unwrap();
        let (own, peer) = (sample(&[1.0, 2.0, 3.0]), sample(&[2.0, 4.0, 6.0]));
        let figures = vec![
            Figure::new("Boot", "ours", "ms", &own).against("theirs", &own, &peer).with_goal(Goal::RatioAtMost(0.4)),
            Figure::new("Boot", "theirs", "ms", &peer),
            Figure::new("Memory", "size", "MiB", &own).with_goal(Goal::AtMost(2.0)),
        ];
        Report { figures, notes: vec!["A note.".to_owned()] }
    }

    #[test]
    fn the_json_list_has_exactly_the_promised_keys() {
        let json = serde_json::to_value(report().figures).unwrap();
        let mut keys: Vec<&String> = json[0].as_object().unwrap().keys().collect();
        keys.sort();
        assert_eq!(keys, ["max", "min", "n", "name", "peer", "ratio", "unit", "value"]);
        assert_eq!((json[0]["ratio"].as_f64(), json[0]["peer"].as_str()), (Some(0.5), Some("theirs")));
    }

    #[test]
    fn goals_are_judged_by_value_or_by_ratio() {
        let mut figures = report().figures;
        figures.push(figures[0].clone().with_goal(Goal::RatioAtLeast(0.5)));
        figures.push(figures[0].clone().with_goal(Goal::RatioAtLeast(0.6)));
        let met: Vec<Option<bool>> = figures.iter().map(Figure::is_met).collect();
        assert_eq!(met, [Some(false), None, Some(true), Some(true), Some(false)]);
    }

    #[test]
    fn the_markdown_has_a_section_and_a_chart_for_each_group() {
        let report = report();
        let text = report.markdown();
        for expected in ["## Boot", "(boot.svg)", "## Memory", "(memory.svg)", "**missed**", "A note."] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
        let names: Vec<String> = report.charts().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["boot.svg", "memory.svg"]);
    }
}
