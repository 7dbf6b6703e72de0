//! A disk's throughput and latency, by fio in the guest.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::machine::{Job, Machine, Parts, run};
use super::{Samples, push, retry};

/// Length of the disk, in MiB. It lies in memory, all of it written before.
const DISK_SIZE: usize = 64;

/// What is measured: fio's job, whether it reads, and the samples' name.
pub const QUANTITIES: [(&str, Direction, Measure, &str); 6] = [
    ("sequential-read", Direction::Read, Measure::Bandwidth, "sequential read, 128 KiB, depth 8"),
    ("sequential-write", Direction::Write, Measure::Bandwidth, "sequential write, 128 KiB, depth 8"),
    ("random-read", Direction::Read, Measure::Operations, "random read, 4 KiB, depth 32"),
    ("random-write", Direction::Write, Measure::Operations, "random write, 4 KiB, depth 32"),
    ("single-read", Direction::Read, Measure::Latency, "random read, 4 KiB, depth 1: mean latency"),
    ("single-write", Direction::Write, Measure::Latency, "random write, 4 KiB, depth 1: mean latency"),
];

/// Whether a job reads or writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// It reads.
    Read,
    /// It writes.
    Write,
}

/// What counts of a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Measure {
    /// Bytes per second, in MB/s.
    Bandwidth,
    /// Requests per second, in thousands.
    Operations,
    /// From a request to its answer, in microseconds.
    Latency,
}

impl Measure {
    /// The unit of its values.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Bandwidth => "MB/s",
            Self::Operations => "k/s",
            Self::Latency => "µs",
        }
    }
}

/// Runs the jobs on each machine's disk in turn, `rounds` times; samples `MACHINE JOB`.
///
/// # Errors
/// When a guest does not answer.
pub fn measure(parts: Parts<'_>, rounds: usize) -> Result<Samples> {
    let mut samples = Samples::new();
    let disk = disk()?;
    for _ in 0..rounds {
        for machine in Machine::ALL {
            let values = retry(|| parse(&run(machine, parts, Job::Block(disk.path()))?))
                .with_context(|| format!("The disk of {} was not measured", machine.name()))?;
            for ((job, ..), value) in QUANTITIES.iter().zip(values) {
                push(&mut samples, &format!("{} {job}", machine.name()), value);
            }
        }
    }
    Ok(samples)
}

/// A file in memory that is written to its last byte.
fn disk() -> Result<tempfile::NamedTempFile> {
    let mut file = tempfile::NamedTempFile::new_in(MEMORY_FILES).context("Cannot make a disk")?;
    for number in 0..DISK_SIZE {
        file.write_all(&vec![u8::try_from(number % 251).unwrap_or_default(); 1 << 20]).context("Cannot fill a disk")?;
    }
    Ok(file)
}

/// Where a file's content is memory.
const MEMORY_FILES: &str = "/dev/shm";

#[derive(Deserialize)]
struct Answer {
    jobs: Vec<Jobs>,
}

#[derive(Deserialize)]
struct Jobs {
    jobname: String,
    error: i32,
    read: Side,
    write: Side,
}

#[derive(Deserialize)]
struct Side {
    bw_bytes: f64,
    iops: f64,
    lat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    mean: f64,
}

/// The values of [`QUANTITIES`] in fio's answer.
fn parse(text: &str) -> Result<Vec<f64>> {
    let answer: Answer = serde_json::from_str(text).context("fio's answer cannot be read")?;
    QUANTITIES
        .iter()
        .map(|(name, direction, measure, _)| {
            let job = answer.jobs.iter().find(|job| job.jobname == *name && job.error == 0);
            let job = job.with_context(|| format!("fio did not finish {name}"))?;
            let side = if *direction == Direction::Read { &job.read } else { &job.write };
            Ok(match measure {
                Measure::Bandwidth => side.bw_bytes / 1e6,
                Measure::Operations => side.iops / 1e3,
                Measure::Latency => side.lat_ns.mean / 1e3,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// fio's answer in which every job read and wrote as said.
    fn answer(read: f64, write: f64) -> Value {
        let side = |value: f64| json!({"bw_bytes": value * 1e6, "iops": value * 1e3, "lat_ns": {"mean": value * 1e3}});
        let job = |(name, ..): &(&str, Direction, Measure, &str)| json!({"jobname": name, "error": 0, "read": side(read), "write": side(write)});
        json!({"jobs": QUANTITIES.iter().map(job).collect::<Vec<_>>()})
    }

    #[test]
    fn each_job_counts_on_the_side_that_it_measures() {
        assert_eq!(parse(&answer(2.0, 3.0).to_string()).unwrap(), [2.0, 3.0, 2.0, 3.0, 2.0, 3.0]);
    }

    #[test]
    fn a_job_that_failed_or_is_missing_is_named() {
        let mut failed = answer(2.0, 3.0);
        failed["jobs"][2]["error"] = json!(5);
        let mut missing = answer(2.0, 3.0);
        missing["jobs"][2]["jobname"] = json!("other");
        for text in [failed, missing] {
            assert!(parse(&text.to_string()).unwrap_err().to_string().contains("random-read"));
        }
    }

    #[test]
    fn every_job_is_in_the_file_that_the_guest_has() {
        for (job, ..) in QUANTITIES {
            assert!(crate::tools::BLOCK_JOBS.contains(&format!("[{job}]\n")), "{job}");
        }
    }
}
