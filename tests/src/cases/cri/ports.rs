//! Ports of pods, reached through the node.

use anyhow::{Result, ensure};

use super::{forever, run_pod};
use crate::context::Context;
use crate::cri::Pod;
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("cri: a port of a pod is forwarded, also one that listens at the loopback address alone", forwarded)
        .with_pods(),
    Case::any("cri: a port at which nothing listens ends a forwarded connection, and the others go on", nobody)
        .with_pods(),
];

/// A server at all addresses that sends back what it gets.
const ECHO: &str =
    "nc -ll -p 8080 -e cat < /dev/null > /dev/null 2>&1 & until netstat -tln | grep -q :8080; do :; done";
/// A server at the loopback address alone.
const PAGE: &str = "mkdir /www; echo page > /www/index.html; httpd -p 127.0.0.1:8081 -h /www";

/// Has bytes sent back, more than any buffer on the way holds.
fn there_and_back(pod: &Pod<'_>) -> Result<()> {
    const CHUNK: usize = 30_000;
    let mut connection = pod.forward(8080)?;
    for round in 0..50_u8 {
        let sent: Vec<u8> = (0..CHUNK).map(|at| u8::try_from(at % 251).unwrap_or_default() ^ round).collect();
        connection.write(&sent)?;
        ensure!(connection.read(CHUNK)? == sent, "Round {round}");
    }
    Ok(())
}

fn forwarded(context: &Context) -> Result<()> {
    let pod = run_pod(context, "forwarded")?;
    let server = pod.run(forever("one"))?;
    server.shell(ECHO)?;
    there_and_back(&pod)?;
    there_and_back(&pod)?;
    server.shell(PAGE)?;
    let mut page = pod.forward(8081)?;
    page.write(b"GET / HTTP/1.0\r\n\r\n")?;
    let answer = page.read(usize::MAX)?;
    ensure!(answer.ends_with(b"page\n"), "{}", String::from_utf8_lossy(&answer));
    pod.remove()
}

fn nobody(context: &Context) -> Result<()> {
    let pod = run_pod(context, "nobody")?;
    let server = pod.run(forever("one"))?;
    server.shell(ECHO)?;
    let mut open = pod.forward(8080)?;
    open.write(b"before")?;
    ensure!(open.read(6)? == b"before");
    // A runtime may tell it as an error, or end what had been accepted.
    let refused = pod.forward(8081)?.read(1);
    ensure!(refused.as_ref().map_or(true, Vec::is_empty), "{refused:?}");
    open.write(b"after")?;
    ensure!(open.read(5)? == b"after");
    pod.remove()
}
