//! A pod's network: what a network namespace has, the container has, and packets go both ways.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::{crash, strings};
use crate::context::{BUSYBOX, Context};
use crate::ctr::Container;
use crate::event::readable;
use crate::harness::Case;
use crate::process::Running;

pub(super) const CASES: &[Case] = &[
    Case::any("network: a container has the addresses and routes of its network namespace, and is reached", reached),
    Case::any("network: a pod's containers have one network", shared),
    Case::any("network: a container without a network has loopback alone", alone),
    Case::kata("network: nothing of a container stays in its network namespace", parted),
    Case::kata("network: after the death of a pod's process the namespace receives its packets again", after_death),
    Case::kata("network: a container is not given the host's network", refused),
];

/// The host's and the pod's end, and a gateway that no address of the pod leads to, as some CNI plugins have it.
const HOST: &str = "10.78.0.1";
const POD: &str = "10.78.0.2";
const GATEWAY: &str = "169.254.78.1";
const HOST6: &str = "fd78::1";
const POD6: &str = "fd78::2";
const HOST_MAC: &str = "02:00:00:00:78:01";
const MTU: &str = "1420";
const PORT: u16 = 7801;

/// A network namespace with one interface, as a CNI plugin leaves it; it goes with this value.
struct PodNetwork(&'static str);

impl PodNetwork {
    fn new() -> Result<Self> {
        let network = Self("tatami-case");
        ip(&format!("netns add {}", network.0))?;
        let peer = "type veth peer name eth0";
        ip(&format!("link add host78 mtu {MTU} address {HOST_MAC} {peer} mtu {MTU} netns {}", network.0))?;
        ip(&format!("addr add {HOST}/24 dev host78"))?;
        ip(&format!("-6 addr add {HOST6}/64 dev host78 nodad"))?;
        ip("link set host78 up")?;
        for step in [
            "link set lo up".to_owned(),
            format!("addr add {POD}/24 dev eth0"),
            format!("-6 addr add {POD6}/64 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            format!("route add default via {GATEWAY} dev eth0 onlink"),
            format!("-6 route add default via {HOST6} dev eth0 metric 77"),
            format!("neigh add {GATEWAY} lladdr {HOST_MAC} dev eth0 nud permanent"),
        ] {
            network.ip(&step)?;
        }
        Ok(network)
    }

    fn ip(&self, arguments: &str) -> Result<String> {
        ip(&format!("-n {} {arguments}", self.0))
    }

    /// What `ctr run` is told so that the container is in it.
    fn options(&self) -> [String; 2] {
        ["--with-ns".to_owned(), format!("network:/run/netns/{}", self.0)]
    }

    /// What takes packets off in the namespace, and its interfaces.
    fn traces(&self) -> Result<String> {
        let disciplines = run(Command::new("tc").args(["-n", self.0, "qdisc", "show", "dev", "eth0", "ingress"]))?;
        Ok(disciplines + &self.ip("-o link")?)
    }

    fn expect_no_trace(&self) -> Result<()> {
        let traces = self.traces()?;
        ensure!(!traces.contains("ingress") && !traces.contains("tap"), "Left in the namespace: {traces}");
        Ok(())
    }
}

impl Drop for PodNetwork {
    fn drop(&mut self) {
        // Its interface goes with it, and so does the other end; the mount is what ip keeps names on.
        let gone = ip(&format!("netns delete {}", self.0))
            .and_then(|_| nix::mount::umount("/run/netns").context("Cannot unmount /run/netns"));
        if let Err(error) = gone {
            eprintln!("{error:#}");
        }
    }
}

fn ip(arguments: &str) -> Result<String> {
    run(Command::new("ip").args(arguments.split(' ')))
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("Cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn in_container(container: &Container<'_>, name: &str, script: &str) -> Result<String> {
    Ok(container.exec(name, &[], &["sh", "-c", script], b"")?.expect_code(0)?.text())
}

/// Sends both ways over TCP, each side being the server once.
fn exchange(context: &Context, container: &Container<'_>) -> Result<()> {
    let deadline = context.ctr.deadline();
    let listener = TcpListener::bind((HOST, PORT)).context("Cannot listen on the pod's gateway")?;
    let script = format!("echo from the pod | nc {HOST} {PORT}");
    let client = Running::start(container.exec_command("client", &[], &["sh", "-c", &script]), Some(Vec::new()))?;
    readable(listener.as_fd(), "a connection from the container", deadline)?;
    let (mut stream, peer) = listener.accept()?;
    ensure!(peer.ip().to_string() == POD, "The container comes from {peer}");
    let mut text = String::new();
    stream.set_read_timeout(Some(deadline.left()))?;
    stream.read_to_string(&mut text)?;
    ensure!(text == "from the pod\n", "{text:?}");
    drop(stream);
    client.finish(deadline)?.expect_code(0)?;

    let server = container.exec_command("server", &[], &["nc", "-l", "-p", &PORT.to_string()]);
    let server = Running::start(server, Some(Vec::new()))?;
    // State 0A is a listening socket's (proc_net_tcp(5)).
    let script = format!("until grep -q ':{PORT:04X} 0*:0000 0A ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done");
    in_container(container, "listening", &script)?;
    let mut stream = TcpStream::connect_timeout(&format!("{POD}:{PORT}").parse()?, deadline.left())?;
    stream.write_all(b"from the host\n")?;
    drop(stream);
    let said = server.finish(deadline)?.expect_code(0)?.text();
    ensure!(said == "from the host", "{said:?}");
    Ok(())
}

fn reached(context: &Context) -> Result<()> {
    let network = PodNetwork::new()?;
    let container =
        context.ctr.detach(&strings(&network.options()), BUSYBOX, &context.id("net"), &["sleep", "10000"])?;
    let addresses = in_container(&container, "addresses", "ip addr show dev eth0")?;
    for expected in [&format!("inet {POD}/24"), &format!("inet6 {POD6}/64"), &format!("mtu {MTU} ")] {
        ensure!(addresses.contains(expected), "No {expected:?} in {addresses}");
    }
    let routes = in_container(&container, "routes", "ip route; ip -6 route; ip neigh")?;
    let gateway = format!("default via {GATEWAY} dev eth0");
    for expected in [&gateway, "onlink", &format!("default via {HOST6} dev eth0  metric 77"), HOST_MAC] {
        // Programs print one blank or two.
        let found = routes.replace("  ", " ").contains(&expected.replace("  ", " "));
        ensure!(found, "No {expected:?} in {routes}");
    }
    exchange(context, &container)?;
    in_container(&container, "ping6", &format!("ping -c 1 -w 60 {HOST6}"))?;
    container.remove().map(drop)
}

fn shared(context: &Context) -> Result<()> {
    let network = PodNetwork::new()?;
    let pod = context.id("pod");
    let member = |id: &str, kind: &str| {
        let kind = format!("io.kubernetes.cri.container-type={kind}");
        let sandbox = format!("io.kubernetes.cri.sandbox-id={pod}");
        let options = ["--annotation".to_owned(), kind, "--annotation".to_owned(), sandbox];
        context.ctr.detach(&strings(&[&options[..], &network.options()].concat()), BUSYBOX, id, &["sleep", "10000"])
    };
    let sandbox = member(&pod, "sandbox")?;
    let (first, second) = (member(&context.id("first"), "container")?, member(&context.id("second"), "container")?);
    exchange(context, &second)?;
    // What one listens on, the other reaches by loopback.
    let server = first.exec_command("server", &[], &["nc", "-l", "-p", &PORT.to_string()]);
    let server = Running::start(server, Some(Vec::new()))?;
    let script = format!("until echo hello | nc 127.0.0.1 {PORT}; do sleep 0.1; done");
    in_container(&second, "client", &script)?;
    let said = server.finish(context.ctr.deadline())?.expect_code(0)?.text();
    ensure!(said == "hello", "{said:?}");
    for container in [second, first, sandbox] {
        container.remove()?;
    }
    network.expect_no_trace()
}

fn alone(context: &Context) -> Result<()> {
    let said = context.ctr.run(&[], BUSYBOX, &context.id("alone"), &["ls", "/sys/class/net"])?.expect_code(0)?.text();
    ensure!(said == "lo", "{said:?}");
    Ok(())
}

fn parted(context: &Context) -> Result<()> {
    let network = PodNetwork::new()?;
    let options = network.options();
    let container = context.ctr.detach(&strings(&options), BUSYBOX, &context.id("net"), &["sleep", "10000"])?;
    let traces = network.traces()?;
    ensure!(traces.contains("ingress") && traces.contains("tap0_kata"), "The interface is not joined: {traces}");
    container.remove()?;
    network.expect_no_trace()?;
    // One that cannot start leaves as little.
    let failed = context.ctr.run(&strings(&options), BUSYBOX, &context.id("fails"), &["/no/such/program"])?;
    ensure!(failed.code != 0, "{failed:?}");
    network.expect_no_trace()
}

fn after_death(context: &Context) -> Result<()> {
    let network = PodNetwork::new()?;
    crash::run_and_kill(context, &strings(&network.options()), |_| Ok(()))?;
    network.expect_no_trace()?;
    let next = context.ctr.detach(&strings(&network.options()), BUSYBOX, &context.id("next"), &["sleep", "10000"])?;
    exchange(context, &next)?;
    next.remove().map(drop)
}

fn refused(context: &Context) -> Result<()> {
    for options in [&["--net-host"][..], &["--with-ns", "network:/proc/1/ns/net"]] {
        let refused = context.ctr.run(options, BUSYBOX, &context.id("host"), &["true"])?;
        let text = refused.error_text();
        ensure!(refused.code != 0 && text.contains("host's network namespace"), "{options:?}: {refused:?}");
    }
    let missing =
        context.ctr.run(&["--with-ns", "network:/run/netns/none"], BUSYBOX, &context.id("none"), &["true"])?;
    ensure!(missing.code != 0 && missing.error_text().contains("/run/netns/none"), "{missing:?}");
    Ok(())
}
