//! A network card's throughput and latency, by iperf3 and ping in the guest against the lab machine.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::machine::{Job, Machine, Parts, Process, run};
use super::{Samples, push, retry};
use crate::tools::{LIBRARIES, LOADER};

const TAP: &str = "bench0";
const HOST: &str = "10.77.0.1";
const GUEST: &str = "10.77.0.2";
/// How many echo requests, each sent when the one before was answered.
const PINGS: u32 = 200;
/// How long is sent each way: an amount would not do, as iperf3 looks only once a second whether it is sent.
const SECONDS: u32 = 1;

/// Whether the host's kernel moves the packets, and the name of that in samples and figures.
pub const WAYS: [(bool, &str); 2] = [(false, "tap"), (true, "vhost-net")];
/// The quantities, as the names of samples: Mbit/s to the host and to the guest, and microseconds there and back.
pub const QUANTITIES: [&str; 3] = ["send", "receive", "ping"];

/// Runs iperf3 both ways and ping over each machine's card in turn, `rounds` times; samples `MACHINE WAY QUANTITY`.
///
/// # Errors
/// When a guest does not answer.
pub fn measure(parts: Parts<'_>, rounds: usize) -> Result<Samples> {
    let mut samples = Samples::new();
    let root = Mount::new(parts.tools)?;
    let _tap = Tap::new()?;
    let words = format!("guest={GUEST} host={HOST} pings={PINGS} seconds={SECONDS}");
    for _ in 0..rounds {
        for (vhost, way) in WAYS {
            for machine in Machine::ALL {
                let job = Job::Net { tap: TAP, vhost, words: &words };
                let values = retry(|| {
                    let _server = serve(root.path())?;
                    parse(&run(machine, parts, job)?)
                });
                let values =
                    values.with_context(|| format!("The card of {} ({way}) was not measured", machine.name()))?;
                for (quantity, value) in QUANTITIES.iter().zip(values) {
                    push(&mut samples, &format!("{} {way} {quantity}", machine.name()), value);
                }
            }
        }
    }
    Ok(samples)
}

fn succeed(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).status().with_context(|| format!("Cannot run {program}"))?;
    if status.success() { Ok(()) } else { bail!("{program} {} failed: {status}", arguments.join(" ")) }
}

/// The tools' image, mounted on this side of the card too.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(image: &Path) -> Result<Self> {
        let dir = tempfile::tempdir().context("Cannot make a directory")?;
        let [image, target] = [image, dir.path()].map(|path| path.display().to_string());
        succeed("mount", &["-t", "erofs", "-o", "loop,ro", &image, &target])?;
        Ok(Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The machine that it is in ends soon.
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

/// The tap interface, with this side's address.
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        succeed("ip", &["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        // No router is looked for and no group joined: nothing but what is measured passes.
        succeed("sysctl", &["-q", &format!("net.ipv6.conf.{TAP}.disable_ipv6=1")])?;
        succeed("ip", &["address", "add", &format!("{HOST}/24"), "dev", TAP])?;
        succeed("ip", &["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // The machine that it is in ends soon.
        let _ = Command::new("ip").args(["link", "delete", TAP]).status();
    }
}

/// Starts iperf3's server and waits until it listens.
fn serve(root: &Path) -> Result<Process> {
    let mut command = Command::new(root.join(LIBRARIES).join(LOADER));
    command.arg("--library-path").arg(root.join(LIBRARIES));
    command.arg(root.join("usr/bin/iperf3")).args(["--server", "--forceflush"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = Process(command.spawn().context("Cannot start iperf3")?);
    let output = process.0.stdout.as_mut().context("iperf3 has no pipe")?;
    for line in BufReader::new(output).lines() {
        if line.context("Cannot read iperf3's output")?.contains("listening") {
            return Ok(process);
        }
    }
    bail!("iperf3 ended before it listened")
}

#[derive(Deserialize)]
struct Answer {
    end: End,
}

#[derive(Deserialize)]
struct End {
    sum_received: Sum,
}

#[derive(Deserialize)]
struct Sum {
    bits_per_second: f64,
}

/// The values of [`QUANTITIES`] in what the tools said: ping first, then two documents of iperf3.
fn parse(text: &str) -> Result<Vec<f64>> {
    let (ping, rest) = text.split_at(text.find("\n{").context("iperf3 said nothing")?);
    let answers: Vec<Answer> = serde_json::Deserializer::from_str(rest)
        .into_iter()
        .collect::<Result<_, _>>()
        .context("iperf3's answer cannot be read")?;
    let [send, receive] = answers.as_slice() else { bail!("iperf3 ran {} times, not twice", answers.len()) };
    let megabits = |answer: &Answer| answer.end.sum_received.bits_per_second / 1e6;
    Ok(vec![megabits(send), megabits(receive), round_trip(ping).context("ping had no answers")?])
}

/// Microseconds of the mean in `rtt min/avg/max/mdev = 0.020/0.025/0.100/0.010 ms`.
fn round_trip(ping: &str) -> Option<f64> {
    let line = ping.lines().find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "))?;
    line.split('/').nth(1)?.parse::<f64>().ok().map(|milliseconds| milliseconds * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "PING 10.77.0.1 (10.77.0.1) 56(84) bytes of data.\n\n--- 10.77.0.1 ping statistics ---\n\
        200 packets transmitted, 200 received, 0% packet loss, time 9ms\n\
        rtt min/avg/max/mdev = 0.020/0.025/0.100/0.010 ms, ipg/ewma 0.045/0.024 ms\n\
        {\"end\":{\"sum_received\":{\"bits_per_second\":2e9}}}\n{\"end\":{\"sum_received\":{\"bits_per_second\":3e9}}}\n";

    #[test]
    fn both_directions_and_the_round_trip_are_read() {
        assert_eq!(parse(ANSWER).unwrap(), [2000.0, 3000.0, 25.0]);
    }

    #[test]
    fn an_answer_that_lacks_a_part_is_refused() {
        let lost = ANSWER.replace("rtt", "pipe");
        for text in ["", "{", ANSWER.rsplit_once("\n{").unwrap().0, &lost] {
            parse(text).unwrap_err();
        }
    }
}
