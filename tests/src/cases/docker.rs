//! Containers as docker makes them: its networks come after the container was made, and change while it runs.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, bail, ensure};

use crate::context::Context;
use crate::docker::{self, Docker};
use crate::event::readable;
use crate::harness::Case;
use crate::process::Running;
use crate::pty::OnTerminal;

pub(super) const CASES: &[Case] = &[
    Case::with_docker("docker: a container on the default bridge reaches the host and is reached by its port", bridge),
    Case::with_docker("docker: the services of a network find each other by their names", names),
    Case::with_docker("docker: networks are connected to a running container and disconnected", connected),
    Case::with_docker("docker: a container without a network has loopback alone", alone),
    Case::with_docker("docker: volumes and limits are the container's", volumes_and_limits),
    Case::with_docker("docker: -it gives a terminal", terminal),
    Case::with_docker("docker: exec, logs, stats, kill, stop and wait work on a running container", life),
    Case::with_docker("docker: a container that was stopped starts again, with its network", again),
    Case::with_docker("docker: events tell of a container's life", events),
];

/// The port of a container's server, and the one of the host that leads there.
const INSIDE: u16 = 8080;
const OUTSIDE: u16 = 18_080;

fn docker(context: &Context) -> Result<&Docker> {
    docker::of(context.docker.as_ref())
}

/// A program that serves the files of `/etc`.
const SERVER: &[&str] = &["httpd", "-f", "-p", "8080", "-h", "/etc"];

/// Waits in the container `name` until its server listens; state 0A is a listening socket's (proc_net_tcp(5)).
fn await_server(docker: &Docker, name: &str) -> Result<()> {
    let files = "/proc/net/tcp /proc/net/tcp6";
    let script = format!("until grep -q ':{INSIDE:04X} [0-9A-F:]* 0A ' {files}; do sleep 0.1; done");
    docker.script(name, &script).map(drop)
}

/// What the container's server at `address` says of its host names.
fn fetch(docker: &Docker, address: &str) -> Result<String> {
    let deadline = docker.deadline();
    let mut stream = TcpStream::connect_timeout(&address.parse()?, deadline.left())
        .with_context(|| format!("Cannot reach the container by {address}"))?;
    stream.set_read_timeout(Some(deadline.left()))?;
    stream.write_all(b"GET /hosts HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The address of a network's gateway, which is the host.
fn gateway(docker: &Docker, network: &str) -> Result<String> {
    Ok(docker.ok(&["network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", network])?.trim().to_owned())
}

fn bridge(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    docker.detach("web", &["-p", &format!("{OUTSIDE}:{INSIDE}"), "--hostname", "the-web"], SERVER)?;
    let addresses = docker.script("web", "ip addr show dev eth0; ip route")?;
    let format = "{{.NetworkSettings.IPAddress}} {{.NetworkSettings.MacAddress}}";
    let known = docker.ok(&["inspect", "--format", format, "web"])?;
    for known in known.split_whitespace() {
        ensure!(addresses.contains(known), "docker knows {known}, the container has {addresses}");
    }
    await_server(docker, "web")?;
    let host = gateway(docker, "bridge")?;
    ensure!(addresses.contains(&format!("default via {host} ")), "No default route by {host} in {addresses}");
    for address in ["127.0.0.1", &host] {
        let said = fetch(docker, &format!("{address}:{OUTSIDE}"))?;
        ensure!(said.contains("the-web"), "By {address}: {said}");
    }
    let listener = TcpListener::bind((host.as_str(), 0))?;
    let port = listener.local_addr()?.port();
    let script = format!("echo from the container | nc {host} {port}");
    let client = Running::start(docker.command(&["exec", "web", "sh", "-c", &script]), Some(Vec::new()))?;
    readable(listener.as_fd(), "a connection from the container", docker.deadline())?;
    let mut text = String::new();
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(docker.deadline().left()))?;
    stream.read_to_string(&mut text)?;
    ensure!(text == "from the container\n", "{text:?}");
    drop(stream);
    client.finish(docker.deadline())?.expect_code(0)?;
    docker.ok(&["rm", "--force", "web"]).map(drop)
}

/// A question for the address of "web" as DNS has it by TCP (RFC 1035, §4), for printf(1).
const QUESTION: &str = r"\000\025\022\064\001\000\000\001\000\000\000\000\000\000\003web\000\000\001\000\001";

fn names(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    docker.ok(&["network", "create", "services"])?;
    docker.detach("web", &["--network", "services", "--network-alias", "shop"], SERVER)?;
    await_server(docker, "web")?;
    docker.detach("client", &["--network", "services"], &["sleep", "10000"])?;
    for name in ["web", "shop", "web.services"] {
        let said = docker.script("client", &format!("wget -q -O - http://{name}:{INSIDE}/hostname"))?;
        ensure!(said.len() >= 12, "By {name}: {said:?}");
    }
    let back = docker.script("web", "nslookup client 127.0.0.11")?;
    ensure!(back.contains("Name:"), "{back}");
    // By TCP, too: the answer repeats the question's number.
    let script = format!("printf '{QUESTION}' | nc -w 20 127.0.0.11 53 | od -A n -t x1 -N 4");
    let answer = docker.script("client", &script)?;
    ensure!(answer.trim().ends_with("12 34"), "{answer:?}");
    docker.ok(&["rm", "--force", "client", "web"])?;
    docker.ok(&["network", "rm", "services"]).map(drop)
}

/// Waits in the container until it has an interface, or has not.
fn await_interface(docker: &Docker, name: &str, interface: &str, there: bool) -> Result<()> {
    let wanted = if there { "-e" } else { "! -e" };
    docker.script(name, &format!("until [ {wanted} /sys/class/net/{interface} ]; do sleep 0.1; done")).map(drop)
}

fn connected(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    for network in ["first", "second"] {
        docker.ok(&["network", "create", network])?;
    }
    docker.detach("web", &["--network", "second"], SERVER)?;
    await_server(docker, "web")?;
    docker.detach("client", &["--network", "first"], &["sleep", "10000"])?;
    let reach = format!("wget -T 100 -q -O - http://web:{INSIDE}/hostname");
    let alone = docker.any(&["exec", "client", "sh", "-c", &reach])?;
    ensure!(alone.code != 0, "The client reaches a network that it is not in: {alone:?}");
    for round in 0..2 {
        docker.ok(&["network", "connect", "second", "client"])?;
        // Its name is the kernel's first free one, or docker's.
        let script = "until [ $(ls /sys/class/net | grep -c eth) = 2 ] && [ $(ip route | grep -c 'scope link') = 2 ]; do \
                      sleep 0.1; done";
        docker.script("client", script)?;
        let said = docker.script("client", &reach).with_context(|| format!("In round {round}"))?;
        ensure!(said.len() >= 12, "{said:?}");
        docker.ok(&["network", "disconnect", "second", "client"])?;
        await_interface(docker, "client", "eth1", false)?;
    }
    // All of them may go, and come again.
    docker.ok(&["network", "disconnect", "first", "client"])?;
    await_interface(docker, "client", "eth0", false)?;
    docker.ok(&["network", "connect", "second", "client"])?;
    docker.script("client", "until ip route | grep -q default; do sleep 0.1; done")?;
    docker.script("client", &reach)?;
    docker.ok(&["rm", "--force", "client", "web"])?;
    docker.ok(&["network", "rm", "first", "second"]).map(drop)
}

fn alone(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    let said = docker.run(&["--network", "none"], &["ls", "/sys/class/net"])?.expect_code(0)?.text();
    ensure!(said.trim() == "lo", "{said:?}");
    Ok(())
}

fn volumes_and_limits(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    let directory = context.work.join("shared");
    std::fs::create_dir(&directory)?;
    std::fs::write(directory.join("given"), "from the host\n")?;
    let volume = format!("{}:/data", directory.display());
    let script = "cat /data/given; echo from the container > /data/taken; nproc; \
                  cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    let options = ["-v", &volume, "--memory", "200m", "--cpus", "1.5"];
    let said = docker.run(&options, &["sh", "-c", script])?.expect_code(0)?.text();
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines.first() == Some(&"from the host"), "{said}");
    ensure!(lines.ends_with(&["209715200", "150000 100000"]), "{said}");
    ensure!(std::fs::read_to_string(directory.join("taken"))? == "from the container\n");
    Ok(())
}

fn terminal(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    let mut command = docker.run_command(&["--rm", "-it"], &["sh"]);
    let mut terminal = OnTerminal::start(&mut command, 80, 24)?;
    terminal.expect("# ", docker.deadline())?;
    terminal.type_text("echo result $((6 * 7)); tty; exit 5\n")?;
    terminal.expect("result 42", docker.deadline())?;
    let (code, shown) = terminal.finish(docker.deadline())?;
    ensure!(code == 5, "exit code {code}, shown: {shown:?}");
    Ok(())
}

fn life(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    let script = "trap 'echo bye; exit 7' TERM; trap 'echo again' HUP; echo hello; echo oops >&2; \
                  while true; do sleep 0.2; done";
    docker.detach("box", &[], &["sh", "-c", script])?;
    let ran = docker.any(&["exec", "box", "sh", "-c", "cat /etc/hostname; exit 9"])?.expect_code(9)?;
    ensure!(ran.text().len() >= 12, "{ran:?}");
    let format = "{{.Name}} {{.PIDs}} {{.MemUsage}}";
    let stats = docker.ok(&["stats", "--no-stream", "--format", format, "box"])?;
    ensure!(stats.starts_with("box ") && stats.contains("iB") && !stats.contains(" 0B /"), "{stats}");
    docker.ok(&["kill", "--signal", "HUP", "box"])?;
    let mut logs = Running::start_with_pipes(&mut docker.command(&["logs", "--follow", "box"]))?;
    let mut lines = BufReader::new(logs.take_stdout()?).lines();
    for expected in ["hello", "again"] {
        let line = lines.next().with_context(|| format!("The logs end before {expected:?}"))??;
        ensure!(line == expected, "{line:?} in the logs, not {expected:?}");
    }
    let waits = Running::start(docker.command(&["wait", "box"]), Some(Vec::new()))?;
    docker.ok(&["stop", "--timeout", "200", "box"])?;
    ensure!(waits.finish(docker.deadline())?.expect_code(0)?.text().trim() == "7");
    ensure!(lines.next().context("The logs end before their end")?? == "bye");
    ensure!(docker.ok(&["inspect", "--format", "{{.State.ExitCode}}", "box"])?.trim() == "7");
    docker.ok(&["rm", "box"])?;
    docker.detach("box", &[], &["sleep", "10000"])?;
    docker.ok(&["kill", "box"])?;
    ensure!(docker.ok(&["wait", "box"])?.trim() == "137");
    docker.ok(&["rm", "box"]).map(drop)
}

fn again(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    docker.detach("web", &["-p", &format!("{OUTSIDE}:{INSIDE}"), "--hostname", "the-web"], SERVER)?;
    for _ in 0..2 {
        await_server(docker, "web")?;
        let said = fetch(docker, &format!("127.0.0.1:{OUTSIDE}"))?;
        ensure!(said.contains("the-web"), "{said}");
        docker.ok(&["restart", "--timeout", "0", "web"])?;
    }
    docker.ok(&["rm", "--force", "web"]).map(drop)
}

fn events(context: &Context) -> Result<()> {
    let docker = docker(context)?;
    let filter = ["events", "--filter", "container=told", "--format", "{{.Action}}", "--since", "0"];
    let mut listener = Running::start_with_pipes(&mut docker.command(&filter))?;
    let mut lines = BufReader::new(listener.take_stdout()?).lines();
    docker.run(&["--name", "told"], &["sh", "-c", "exit 3"])?.expect_code(3)?;
    for expected in ["create", "attach", "start", "die", "destroy"] {
        match lines.next() {
            Some(Ok(line)) if line == expected => {}
            other => bail!("{other:?} among the events, not {expected:?}"),
        }
    }
    Ok(())
}
