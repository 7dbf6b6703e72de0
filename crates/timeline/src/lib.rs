//! Spans from the start of a pod to its first byte, as text and as SVG.
//!
//! A [`Timeline`] is a list of stamps of CLOCK_MONOTONIC, each at the end of a hop. Host and guest are two lanes of one
//! clock: [`ClockOffset`] converts the guest's stamps. What is between two stamps of a lane is a span.

mod clock;
mod svg;
mod text;

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

pub use clock::{ClockOffset, now_ns};

/// A timeline with more stamps than this takes no further ones.
const MAX_STAMPS: usize = 256;
/// Longer names are cut (bytes): a guest chooses some of them.
const MAX_NAME: usize = 64;

/// Where a hop happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// In a process of the host.
    Host,
    /// In the guest.
    Guest,
}

/// The end of one hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// What ended here.
    pub name: Cow<'static, str>,
    /// Where.
    pub lane: Lane,
    /// CLOCK_MONOTONIC of the host in nanoseconds.
    pub at_ns: u64,
}

/// The hops of one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The sandbox.
    pub id: String,
    /// In the order of time once [`Timeline::sort`] ran.
    pub stamps: Vec<Stamp>,
}

/// Why a stored timeline cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TimelineError {
    /// The text is no timeline.
    #[error("not a timeline: {0}; give a file that the runtime wrote to [runtime] timeline_dir")]
    Format(#[from] serde_json::Error),
}

impl Timeline {
    /// An empty timeline of this sandbox.
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into(), stamps: Vec::new() }
    }

    /// Stamps the end of a host hop now.
    pub fn stamp(&mut self, name: &'static str) {
        self.stamp_at(name, Lane::Host, now_ns());
    }

    /// Adds a stamp that was taken elsewhere.
    pub fn stamp_at(&mut self, name: impl Into<Cow<'static, str>>, lane: Lane, at_ns: u64) {
        if self.stamps.len() >= MAX_STAMPS {
            return;
        }
        let mut name = name.into();
        if name.len() > MAX_NAME {
            let end = (0..=MAX_NAME).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
            name = Cow::Owned(name[..end].to_owned());
        }
        self.stamps.push(Stamp { name, lane, at_ns });
    }

    /// Whether a hop of this name is stamped.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.stamps.iter().any(|stamp| stamp.name == name)
    }

    /// Puts the stamps in the order of time; stamps of the same instant keep theirs.
    pub fn sort(&mut self) {
        self.stamps.sort_by_key(|stamp| stamp.at_ns);
    }

    /// From the first stamp to the last, in nanoseconds.
    #[must_use]
    pub fn total_ns(&self) -> u64 {
        let times = || self.stamps.iter().map(|stamp| stamp.at_ns);
        times().max().unwrap_or(0) - times().min().unwrap_or(0)
    }

    /// One JSON object, as stored.
    ///
    /// # Errors
    ///
    /// Never for a timeline that was made here; the serializer's signature has one.
    pub fn to_json(&self) -> Result<String, TimelineError> {
        Ok(serde_json::to_string(self)?)
    }

    /// Reads what [`Timeline::to_json`] wrote.
    ///
    /// # Errors
    ///
    /// [`TimelineError::Format`].
    pub fn from_json(text: &str) -> Result<Self, TimelineError> {
        let mut timeline: Self = serde_json::from_str(text)?;
        timeline.sort();
        Ok(timeline)
    }

    /// A table with one line per hop.
    #[must_use]
    pub fn text(&self) -> String {
        text::render(self)
    }

    /// A drawing with one bar per hop.
    #[must_use]
    pub fn svg(&self) -> String {
        svg::render(self)
    }

    /// The hops of one lane in the order of time: what ended each, and how many nanoseconds it took.
    pub fn hops(&self, lane: Lane) -> impl Iterator<Item = (&str, u64)> {
        self.spans()
            .into_iter()
            .filter(move |(stamp, ..)| stamp.lane == lane)
            .map(|(stamp, _, took)| (&*stamp.name, took))
    }

    /// Per stamp: nanoseconds since the first stamp, and nanoseconds since the one before in its lane.
    fn spans(&self) -> Vec<(&Stamp, u64, u64)> {
        let mut stamps: Vec<&Stamp> = self.stamps.iter().collect();
        stamps.sort_by_key(|stamp| stamp.at_ns);
        let origin = stamps.first().map_or(0, |stamp| stamp.at_ns);
        let mut previous = [None, None];
        stamps
            .into_iter()
            .map(|stamp| {
                let lane = &mut previous[usize::from(stamp.lane == Lane::Guest)];
                let span = stamp.at_ns - lane.unwrap_or(stamp.at_ns);
                *lane = Some(stamp.at_ns);
                (stamp, stamp.at_ns - origin, span)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Timeline {
        let mut timeline = Timeline::new("redis");
        timeline.stamp_at("start exec'd", Lane::Host, 1_000_000);
        timeline.stamp_at("agent ready", Lane::Host, 51_000_000);
        timeline.stamp_at("kernel", Lane::Guest, 21_000_000);
        timeline.stamp_at("init <&\">", Lane::Guest, 41_500_000);
        timeline
    }

    #[test]
    fn a_stored_timeline_reads_back_in_the_order_of_time() {
        let read = Timeline::from_json(&example().to_json().unwrap()).unwrap();
        let names: Vec<&str> = read.stamps.iter().map(|stamp| &*stamp.name).collect();
        assert_eq!(names, ["start exec'd", "kernel", "init <&\">", "agent ready"]);
        assert_eq!(read.total_ns(), 50_000_000);
    }

    #[test]
    fn the_text_names_every_hop_with_its_time_and_its_span() {
        let text = example().text();
        let line = text.lines().find(|line| line.contains("init <&\">")).unwrap();
        assert!(line.contains("40.500") && line.contains("20.500") && line.contains("guest"), "{text}");
        assert!(text.lines().next().unwrap().contains("redis"));
        assert!(text.contains("50.000"));
    }

    #[test]
    fn the_drawing_escapes_names_that_a_guest_chose() {
        let svg = example().svg();
        assert!(svg.contains("init &lt;&amp;&quot;&gt;"), "{svg}");
        assert!(!svg.contains("init <"));
        assert_eq!(svg.matches("<rect class=\"host\"").count() + svg.matches("<rect class=\"guest\"").count(), 4);
    }

    #[test]
    fn a_timeline_is_bounded_in_stamps_and_in_names() {
        let mut timeline = Timeline::new("x");
        for _ in 0..1000 {
            timeline.stamp_at("ä".repeat(1000), Lane::Guest, 1);
        }
        assert_eq!(timeline.stamps.len(), MAX_STAMPS);
        assert!(timeline.stamps.iter().all(|stamp| stamp.name.len() <= MAX_NAME));
    }

    #[test]
    fn an_empty_timeline_renders() {
        let timeline = Timeline::new("nothing");
        assert!(timeline.text().contains("nothing"));
        assert!(timeline.svg().starts_with("<svg"));
    }
}
