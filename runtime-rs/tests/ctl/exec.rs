//! Commands in the guest itself.

use std::io::Write;
use std::process::Stdio;

use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocols::containerd::topics::{TASK_CREATE_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_START_EVENT_TOPIC};

use crate::ctl::command;
use crate::node::{Io, Node, TaskHandle};
use crate::sandboxes::ctl;
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("a command of the guest has our input, both outputs and its own exit code", executes),
        trial("containerd hears nothing of commands of the guest", unheard),
        trial("a signal goes to the command of the guest", signalled),
        trial("without a debug console, and for a missing program, the refusal says why", refuses),
    ]
}

async fn pod(node: &Node) -> TaskHandle {
    node.configure("[agent.kata]\ndebug_console_enabled = true\n");
    let task = node.create("one", &["/bin/sleep", "600"], &Io::default()).await;
    task.start("").await.unwrap();
    task
}

async fn end(node: &Node, task: &TaskHandle) {
    task.kill("", 9).await.unwrap();
    task.wait("").await.unwrap();
    node.delete("one");
    node.expect_nothing_left().await;
}

async fn executes() {
    let node = Node::new().await;
    let task = pod(&node).await;
    let root = node.root().display().to_string();
    let arguments = ["exec", "--root", &root, "one", "sh", "-c", "cat; echo problem >&2; exit 42"];
    let mut running = command(&node.path("configuration.toml"), &arguments);
    let mut running = running.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let input: Vec<u8> = (0..1 << 18).flat_map(|number: u32| number.to_le_bytes()).collect();
    let (mut stdin, sent) = (running.stdin.take().unwrap(), input.clone());
    let output = tokio::task::spawn_blocking(move || {
        std::thread::spawn(move || stdin.write_all(&sent).unwrap());
        running.wait_with_output().unwrap()
    });
    let output = output.await.unwrap();
    assert_eq!((output.status.code(), &*output.stderr), (Some(42), &b"problem\n"[..]));
    assert!(output.stdout == input, "{} bytes came back", output.stdout.len());
    end(&node, &task).await;
}

async fn unheard() {
    let node = Node::new().await;
    let task = pod(&node).await;
    assert_eq!(ctl(&node, &["exec", "one", "true"]).await.code, 0);
    let listed = ctl(&node, &["list", "--json"]).await.json();
    assert_eq!(listed[0]["containers"].as_array().unwrap().len(), 1);
    task.kill("", 9).await.unwrap();
    task.wait("").await.unwrap();
    node.expect_events(&[TASK_CREATE_EVENT_TOPIC, TASK_START_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC]).await;
    node.delete("one");
    node.expect_nothing_left().await;
}

async fn signalled() {
    let node = Node::new().await;
    let task = pod(&node).await;
    let root = node.root().display().to_string();
    let arguments =
        ["exec", "--root", &root, "one", "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 1; done"];
    let mut running = command(&node.path("configuration.toml"), &arguments).stdout(Stdio::piped()).spawn().unwrap();
    let status = tokio::task::spawn_blocking(move || {
        let mut ready = [0; 6];
        std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut ready).unwrap();
        kill(Pid::from_raw(i32::try_from(running.id()).unwrap()), Signal::SIGTERM).unwrap();
        running.wait().unwrap()
    });
    assert_eq!(status.await.unwrap().code(), Some(5));
    end(&node, &task).await;
}

async fn refuses() {
    let node = Node::new().await;
    let closed = node.create("closed", &["/bin/sleep", "600"], &Io::default()).await;
    let refused = ctl(&node, &["exec", "closed", "true"]).await;
    assert_eq!((refused.code, &*refused.out), (125, ""));
    assert!(refused.errors.contains("debug_console_enabled = true in [agent.kata]"), "{refused:?}");
    closed.kill("", 9).await.unwrap();
    node.delete("closed");

    let task = pod(&node).await;
    let missing = ctl(&node, &["exec", "one", "/no/such/program"]).await;
    assert!(missing.code == 125 && missing.errors.contains("no such program"), "{missing:?}");
    assert_eq!(ctl(&node, &["exec", "one", "true"]).await.code, 0);
    end(&node, &task).await;
}
