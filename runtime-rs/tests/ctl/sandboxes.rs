//! Sandboxes, told as they are.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::ctl::{Printed, command, run};
use crate::node::{Io, Node};
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("sandboxes are listed with their processes and containers, dead ones as dead", lists),
        trial("a pod that containerd has not connected to is listed and not connected to", unconnected),
        trial("directories of others are no sandboxes", strangers),
        trial("the largest sandbox is on top, and looking again ends with a signal", tops),
        trial("the console of a sandbox is shown, followed to its end, and missed with its remedy", logs),
        trial("an id in two namespaces asks for the namespace", ambiguous),
    ]
}

/// A command about the sandboxes of this node.
pub(crate) async fn ctl(node: &Node, arguments: &[&str]) -> Printed {
    let root = node.root().display().to_string();
    let mut all = arguments.to_vec();
    all.splice(1..1, ["--root", &root]);
    run(command(&node.path("configuration.toml"), &all)).await
}

async fn lists() {
    let node = Node::new().await;
    assert_eq!(ctl(&node, &["list", "--json"]).await.json(), json!([]));
    let task = node.create("one", &["/bin/sleep", "600"], &Io::default()).await;
    let pid = task.pid().await;

    let listed = ctl(&node, &["list", "--json"]).await;
    assert_eq!((listed.code, &*listed.errors), (0, ""));
    let one = listed.json()[0].clone();
    assert_eq!((&one["namespace"], &one["id"], &one["state"]), (&json!("test"), &json!("one"), &json!("running")));
    assert_eq!(one["pid"], json!(pid));
    assert_eq!(one["containers"], json!([{"id": "one", "state": "created"}]));
    // A process with its libraries has more than a MiB, and this one's guest is no machine.
    assert!(one["usage"]["own_rss"].as_u64().unwrap() > 1 << 20);
    assert_eq!((&one["usage"]["guest"], &one["usage"]["vcpus"]), (&Value::Null, &json!(0)));

    task.start("").await.unwrap();
    assert_eq!(ctl(&node, &["list", "--json"]).await.json()[0]["containers"][0]["state"], "running");
    let text = ctl(&node, &["list"]).await.out;
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..4], ["NAMESPACE", "SANDBOX", "STATE", "PID"]);
    assert_eq!(lines[1][..4], ["test", "one", "running", &pid.to_string()]);
    assert!(text.lines().nth(1).unwrap().ends_with("one running"), "{text}");
    task.kill("", 9).await.unwrap();
    task.wait("").await.unwrap();
    let ended = ctl(&node, &["list", "--json"]).await.json()[0]["containers"][0].clone();
    assert_eq!(ended, json!({"id": "one", "state": "stopped", "exit_status": 137}));

    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let dead = loop {
        let seen = ctl(&node, &["list", "--json"]).await.json()[0].clone();
        if seen["state"] == "dead" {
            break seen;
        }
    };
    assert_eq!((&dead["pid"], &dead["containers"], &dead["usage"]), (&json!(pid), &Value::Null, &Value::Null));
    node.delete("one");
    assert_eq!(ctl(&node, &["list", "--json"]).await.json(), json!([]));
    node.expect_nothing_left().await;
}

async fn unconnected() {
    let node = Node::new().await;
    let bundle = node.bundle("waits", &["/bin/true"], Value::Null);
    assert!(node.start("waits", &bundle).status.success());
    let listed = ctl(&node, &["list", "--json"]).await.json();
    assert_eq!((&listed[0]["state"], &listed[0]["containers"]), (&json!("running"), &json!([])));
    // It ends by itself because nobody has connected: a connection of the list would have kept it.
    node.expect_nothing_left().await;
}

async fn strangers() {
    let node = Node::new().await;
    let other = node.root().join("0123abcd/root");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("file"), "of another runtime").unwrap();
    fs::create_dir_all(node.root().join(".s/0123456789abcdef0123")).unwrap();
    fs::write(node.root().join("file"), "in between").unwrap();
    let listed = ctl(&node, &["list", "--json"]).await;
    assert_eq!((listed.code, listed.json()), (0, json!([])));
}

async fn tops() {
    let node = Node::new().await;
    let small = node.create("small", &["/bin/sleep", "600"], &Io::default()).await;
    let dead = node.create("dead", &["/bin/sleep", "600"], &Io::default()).await;
    kill(Pid::from_raw(dead.pid().await), Signal::SIGKILL).unwrap();
    let root = node.root().display().to_string();
    let arguments = ["top", "--json", "--watch", "1", "--root", &root];
    let mut watching = command(&node.path("configuration.toml"), &arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    for look in 0..3 {
        let seen: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(seen.as_array().unwrap().len(), 2);
        // The kill may be on its way at the first look.
        if look > 0 {
            assert_eq!((&seen[0]["id"], &seen[1]["id"]), (&json!("small"), &json!("dead")));
        }
    }
    kill(Pid::from_raw(i32::try_from(watching.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(watching.wait().unwrap().success());
    let text = ctl(&node, &["top"]).await.out;
    assert!(text.starts_with("1 sandboxes hold "), "{text}");
    assert_eq!(ctl(&node, &["top", "--watch", "0"]).await.code, 2);

    node.delete("dead");
    small.kill("", 9).await.unwrap();
    node.delete("small");
    node.expect_nothing_left().await;
}

async fn logs() {
    let node = Node::new().await;
    node.create("quiet", &["/bin/sleep", "600"], &Io::default()).await;
    let missing = ctl(&node, &["logs", "quiet"]).await;
    let configuration = node.path("configuration.toml").display().to_string();
    assert_eq!((missing.code, &*missing.out), (2, ""));
    assert!(missing.errors.contains("enable_debug = true") && missing.errors.contains(&configuration), "{missing:?}");
    let unknown = ctl(&node, &["logs", "none"]).await;
    assert!(unknown.code == 2 && unknown.errors.contains("kata-ctl list"), "{unknown:?}");

    // The machine would write this file.
    let console = node.root().join("test/quiet/console.log");
    fs::write(&console, "first line\n").unwrap();
    assert_eq!(ctl(&node, &["logs", "test/quiet"]).await.out, "first line\n");
    let root = node.root().display().to_string();
    let arguments = ["logs", "--follow", "quiet", "--root", &root];
    let mut following = command(&node.path("configuration.toml"), &arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(following.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "first line");
    let mut file = fs::OpenOptions::new().append(true).open(&console).unwrap();
    for line in ["second", "third"] {
        writeln!(file, "{line}").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), line);
    }
    write!(file, "the last words").unwrap();
    // The file is still open, as the machine's would be.
    fs::remove_file(&console).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "the last words");
    assert!(lines.next().is_none());
    assert!(following.wait().unwrap().success());
    node.delete("quiet");
    node.expect_nothing_left().await;
}

async fn ambiguous() {
    let mut node = Node::new().await;
    node.create("same", &["/bin/sleep", "600"], &Io::default()).await;
    node.namespace = "other".to_owned();
    node.create("same", &["/bin/sleep", "600"], &Io::default()).await.pid().await;
    let refused = ctl(&node, &["logs", "same"]).await;
    assert!(refused.errors.contains("other/same") && refused.errors.contains("test/same"), "{refused:?}");
    node.delete("same");
    node.namespace = "test".to_owned();
    node.delete("same");
    node.expect_nothing_left().await;
}
