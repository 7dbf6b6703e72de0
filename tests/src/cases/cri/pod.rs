//! What the containers of a pod have in common.

use anyhow::{Result, ensure};

use super::{forever, run_pod, script, spec};
use crate::context::{BUSYBOX, Context};
use crate::cri::ContainerSpec;
use crate::cri::api::{DnsConfig, NamespaceMode, NamespaceOption};
use crate::harness::Case;

pub(in crate::cases) const CASES: &[Case] = &[
    Case::any("cri: containers of a pod have one network, host name and IPC, and process numbers of their own", common)
        .with_pods(),
    Case::any("cri: containers of a pod that asks for it see each other's processes", processes).with_pods(),
    Case::any("cri: a pod is reached at its address, and reaches the node and other pods", reached).with_pods(),
    Case::any("cri: a pod has the host name and the name servers that it was given", names).with_pods(),
    Case::any("cri: a pod has the sysctls that it was given", sysctls).with_pods(),
    Case::any("cri: containers of a pod share /dev/shm, which is as large as containerd says", shared_memory)
        .with_pods(),
    Case::any("cri: init containers run to their end before the others, in the same pod", init).with_pods(),
];

/// The namespaces of a container's shell.
const NAMESPACES: &str = "for name in net uts ipc pid; do readlink /proc/self/ns/$name; done";

fn common(context: &Context) -> Result<()> {
    let pod = run_pod(context, "common")?;
    let (one, two) = (pod.run(forever("one"))?, pod.run(forever("two"))?);
    let namespaces = [one.shell(NAMESPACES)?, two.shell(NAMESPACES)?];
    let [first, second] = namespaces.each_ref().map(|text| text.lines().collect::<Vec<_>>());
    ensure!(first[..3] == second[..3] && first[3] != second[3], "{namespaces:?}");
    one.shell("nc -l -p 7000 > /heard 2>&1 & echo $! > /listener; until netstat -tln | grep -q :7000; do :; done")?;
    two.shell("echo hello | nc 127.0.0.1 7000")?;
    ensure!(one.shell("while kill -0 $(cat /listener) 2>/dev/null; do :; done; cat /heard")? == "hello\n");
    pod.remove()
}

fn processes(context: &Context) -> Result<()> {
    let shared = || Some(NamespaceOption { pid: NamespaceMode::Pod.into(), ..NamespaceOption::default() });
    let mut asked = spec(context, "processes");
    asked.linux().security_context.get_or_insert_default().namespace_options = shared();
    let pod = context.cri.run_pod(asked)?;
    let member = |name: &str, program: &[&str]| {
        let mut container = ContainerSpec::new(name, BUSYBOX, program);
        container.security().namespace_options = shared();
        pod.run(container)
    };
    let (one, two) =
        (member("one", &["sleep", "12345"])?, member("two", &["sh", "-c", "sleep 54321 & exec sleep 67890"])?);
    ensure!(one.shell("readlink /proc/self/ns/pid")? == two.shell("readlink /proc/self/ns/pid")?);
    let listed = one.shell("ps -o comm,args")?;
    for expected in ["pause", "sleep 12345", "sleep 54321", "sleep 67890"] {
        ensure!(listed.contains(expected), "{expected}: {listed}");
    }
    // The one that the namespace began with stays, and takes over orphans.
    one.shell("kill -KILL 1; orphan=$(sh -c 'sleep 99999 > /dev/null & echo $!'); kill $orphan; while [ -e /proc/$orphan ]; do :; done")?;
    // What a container has started goes with its first process, and the others' go on.
    one.shell("kill $(ps -o pid,args | awk '$2 == \"sleep\" && $3 == 67890 { print $1 }')")?;
    two.ended()?;
    let listed = one.shell("ps -o args")?;
    ensure!(!listed.contains("54321") && listed.contains("12345"), "{listed}");
    pod.remove()
}

fn reached(context: &Context) -> Result<()> {
    let (pod, other) = (run_pod(context, "reached")?, run_pod(context, "other")?);
    let (server, client) = (pod.run(forever("one"))?, other.run(forever("one"))?);
    let address = pod.address()?;
    server.shell("mkdir /www; echo page > /www/index.html; httpd -p 8080 -h /www < /dev/null > /dev/null 2>&1")?;
    ensure!(client.shell(&format!("wget -q -O - http://{address}:8080/"))? == "page\n");
    let mut stream = std::net::TcpStream::connect((address.as_str(), 8080))?;
    std::io::Write::write_all(&mut stream, b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer)?;
    ensure!(answer.ends_with("page\n"), "{answer}");
    // The node is the pod's gateway.
    client.shell("ping -c 1 -W 10 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')")?;
    other.remove()?;
    pod.remove()
}

fn names(context: &Context) -> Result<()> {
    let mut asked = spec(context, "names");
    asked.config.dns_config = Some(DnsConfig {
        servers: vec!["10.79.0.53".to_owned()],
        searches: vec!["pods.test".to_owned()],
        options: vec!["ndots:5".to_owned()],
    });
    let name = asked.config.hostname.clone();
    let pod = context.cri.run_pod(asked)?;
    let container = pod.run(forever("one"))?;
    ensure!(container.shell("hostname; cat /etc/hostname")? == format!("{name}\n{name}\n"));
    let resolv = container.shell("cat /etc/resolv.conf")?;
    for line in ["nameserver 10.79.0.53", "search pods.test", "options ndots:5"] {
        ensure!(resolv.lines().any(|found| found == line), "{resolv}");
    }
    pod.remove()
}

fn sysctls(context: &Context) -> Result<()> {
    let mut asked = spec(context, "sysctls");
    let wanted = [("net.ipv4.ip_local_port_range", "20000\t20010"), ("kernel.msgmax", "4096")];
    asked.linux().sysctls = wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let pod = context.cri.run_pod(asked)?;
    let container = pod.run(forever("one"))?;
    let told = container.shell("cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/msgmax")?;
    ensure!(told == "20000\t20010\n4096\n", "{told:?}");
    pod.remove()
}

fn shared_memory(context: &Context) -> Result<()> {
    let pod = run_pod(context, "shm")?;
    let (one, two) = (pod.run(forever("one"))?, pod.run(forever("two"))?);
    one.shell("echo shared > /dev/shm/file")?;
    ensure!(two.shell("cat /dev/shm/file")? == "shared\n");
    // containerd's size for a pod.
    let size = two.shell("df -k /dev/shm | awk 'NR == 2 { print $2 }'")?;
    ensure!(size == "65536\n", "{size}");
    pod.remove()
}

fn init(context: &Context) -> Result<()> {
    let pod = run_pod(context, "init")?;
    let volume = context.work.join("volume");
    std::fs::create_dir(&volume)?;
    for number in 1..=2 {
        let say = format!("echo {number} >> /volume/order");
        let first = pod.run(script(&format!("init-{number}"), &say).with_mount(&volume, "/volume", false))?;
        ensure!(first.ended()?.exit_code == 0);
    }
    let main = pod.run(forever("main").with_mount(&volume, "/volume", true))?;
    ensure!(main.shell("cat /volume/order")? == "1\n2\n");
    pod.remove()
}
