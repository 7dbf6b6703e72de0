//! What containerd may rely on.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use libtest_mimic::Trial;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use protocols::containerd::api::*;
use protocols::containerd::topics::*;
use protocols::containerd::ttrpc;
use protocols::containerd::types::task::Status;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::node::{Io, Node, code, read_all};
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("a container runs to its exit code and leaves nothing", runs),
        trial("the task API answers under its second and its third name", both_versions),
        trial("64 MiB go in and out whole with a slow reader", streams),
        trial("closing the input ends a process that reads it", close_input),
        trial("input that ends before the process starts arrives whole, and ends", early_close),
        trial("signals end processes with 128 plus their number", signals),
        trial("execs have their own stdio, exits and deletes", execs),
        trial("the end of a process is told when its output is read, or not being read", ends_after_output),
        trial("output without a reader waits for one, and goes with its process", late_readers),
        trial("requests in the wrong state are refused with containerd's codes", wrong_states),
        trial("a guest that ends or hangs early is reported as what it was", early_ends),
        trial("a request that the agent lets pass is reported as that, and not as the guest's end", unanswered),
        trial("bad input is refused with its code and its remedy", bad_input),
        trial("the end of the machine is the end of every process with 137", machine_ends),
        trial("a pod has one process and its containers join it", pods),
        trial("the same id in two namespaces is two sandboxes", namespaces),
        trial("a pod process that is killed at any moment leaves nothing after delete", killed_pods),
        trial("a start that is killed at any moment leaves nothing", killed_starts),
        trial("a container whose client gives up while it is being made leaves nothing", given_up),
        trial("a pod that nobody connects to ends by itself", unwanted),
        trial("delete succeeds when there is nothing and says 137", delete_nothing),
        trial("the timeline names every hop in order", timelines),
        trial("info and version describe the runtime", describes),
    ]
}

/// What containerd does at the end of a task.
async fn finish(node: &Node, task: &crate::node::TaskHandle) {
    task.shutdown().await;
    node.delete(&task.id);
    node.expect_nothing_left().await;
}

async fn runs() {
    let node = Node::new().await;
    let io = Io { stdout: node.fifo("out"), stderr: node.fifo("err"), ..Io::default() };
    let (out, err) = (read_all(&io.stdout), read_all(&io.stderr));
    let task = node.create("one", &["/bin/sh", "-c", "cat hello; echo oops >&2; exit 42"], &io).await;
    assert_eq!(task.state("").await.unwrap().status, Status::CREATED.into());
    let pid = task.start("").await.unwrap();
    assert_eq!(i32::try_from(pid).unwrap(), task.pid().await);
    assert_eq!(task.wait("").await.unwrap(), 42);
    let state = task.state("").await.unwrap();
    assert_eq!((state.status, state.exit_status, state.stdout), (Status::STOPPED.into(), 42, io.stdout));
    assert_eq!(out.await.unwrap(), b"hello from the root file system\n");
    assert_eq!(err.await.unwrap(), b"oops\n");
    assert_eq!(task.delete("").await.unwrap().exit_status, 42);
    node.expect_events(&[
        TASK_CREATE_EVENT_TOPIC,
        TASK_START_EVENT_TOPIC,
        TASK_EXIT_EVENT_TOPIC,
        TASK_DELETE_EVENT_TOPIC,
    ])
    .await;
    task.shutdown().await;
    // Without `delete`: the pod process itself leaves nothing.
    node.expect_nothing_left().await;
}

async fn both_versions() {
    let node = Node::new().await;
    let task = node.create("versions", &["/bin/sleep", "600"], &Io::default()).await;
    for version in ["v2", "v3"] {
        let request = PidsRequest { id: "versions".to_owned(), ..Default::default() };
        let request = ttrpc::proto::Request {
            service: format!("containerd.task.{version}.Task"),
            method: "Pids".to_owned(),
            payload: protobuf::Message::write_to_bytes(&request).unwrap(),
            ..Default::default()
        };
        let response: PidsResponse =
            protobuf::Message::parse_from_bytes(&task.raw.request(request).await.unwrap().payload).unwrap();
        assert_eq!(response.processes.len(), 1, "{version}");
    }
    node.delete("versions");
    node.expect_nothing_left().await;
}

async fn streams() {
    const SIZE: usize = 64 << 20;
    let node = Node::new().await;
    let io = Io { stdin: node.fifo("in"), stdout: node.fifo("out"), ..Io::default() };
    let task = node.create("cat", &["/bin/cat"], &io).await;
    let pattern = |at: usize| u8::try_from((at * 31 + at / 257) % 251).unwrap();
    let writer = tokio::task::spawn_blocking({
        let stdin = io.stdin.clone();
        move || {
            let bytes: Vec<u8> = (0..SIZE).map(pattern).collect();
            fs::OpenOptions::new().write(true).open(stdin).unwrap().write_all(&bytes).unwrap();
        }
    });
    let reader = tokio::task::spawn_blocking({
        let stdout = io.stdout.clone();
        move || {
            let mut file = fs::File::open(stdout).unwrap();
            let (mut at, mut buffer) = (0, [0; 4096]);
            loop {
                match file.read(&mut buffer).unwrap() {
                    0 => return at,
                    count => {
                        assert!((at..).zip(&buffer[..count]).all(|(at, byte)| *byte == pattern(at)));
                        at += count;
                        // A reader that is slower than the writer for a while, then not.
                        if at < 1 << 20 {
                            std::thread::sleep(std::time::Duration::from_millis(1));
                        }
                    }
                }
            }
        }
    });
    task.start("").await.unwrap();
    writer.await.unwrap();
    task.close_input("").await;
    assert_eq!(task.wait("").await.unwrap(), 0);
    assert_eq!(reader.await.unwrap(), SIZE);
    task.delete("").await.unwrap();
    finish(&node, &task).await;
}

async fn close_input() {
    let node = Node::new().await;
    let io = Io { stdin: node.fifo("in"), stdout: node.fifo("out"), ..Io::default() };
    let output = read_all(&io.stdout);
    let task = node.create("eof", &["/bin/cat"], &io).await;
    task.start("").await.unwrap();
    // Two clients, one after the other: the end of the first is not the end of the input.
    for text in ["first ", "second"] {
        fs::OpenOptions::new().write(true).open(&io.stdin).unwrap().write_all(text.as_bytes()).unwrap();
    }
    task.close_input("").await;
    assert_eq!(task.wait("").await.unwrap(), 0);
    assert_eq!(output.await.unwrap(), b"first second");
    task.delete("").await.unwrap();
    finish(&node, &task).await;
}

async fn early_close() {
    let node = Node::new().await;
    let io = Io { stdin: node.fifo("in"), stdout: node.fifo("out"), ..Io::default() };
    let output = read_all(&io.stdout);
    let writer = tokio::task::spawn_blocking({
        let stdin = io.stdin.clone();
        move || fs::OpenOptions::new().write(true).open(stdin).unwrap().write_all(b"early").unwrap()
    });
    let task = node.create("early", &["/bin/cat"], &io).await;
    // Nobody reads before the start: a client can tell the end of its input to a task that exists.
    assert!(!writer.is_finished());
    task.close_input("").await;
    task.start("").await.unwrap();
    writer.await.unwrap();
    assert_eq!(task.wait("").await.unwrap(), 0);
    assert_eq!(output.await.unwrap(), b"early");
    task.delete("").await.unwrap();
    finish(&node, &task).await;
}

async fn signals() {
    let node = Node::new().await;
    for (signal, id) in [(15, "term"), (9, "kill")] {
        let task = node.create(id, &["/bin/sleep", "600"], &Io::default()).await;
        task.start("").await.unwrap();
        task.kill("", signal).await.unwrap();
        assert_eq!(task.wait("").await.unwrap(), 128 + signal);
        let late = task.kill("", signal).await.unwrap_err();
        assert_eq!(code(&late), Code::NOT_FOUND);
        assert!(late.to_string().contains("process already finished"));
        task.delete("").await.unwrap();
        finish(&node, &task).await;
    }
}

async fn execs() {
    let node = Node::new().await;
    let task = node.create("exec", &["/bin/sleep", "600"], &Io::default()).await;
    task.start("").await.unwrap();
    for (number, status) in [(1, 0), (2, 7)] {
        let (exec_id, io) = (format!("e{number}"), Io { stdout: node.fifo(&format!("out{number}")), ..Io::default() });
        let output = read_all(&io.stdout);
        task.exec(&exec_id, &["/bin/sh", "-c", &format!("echo {number}; exit {status}")], &io).await.unwrap();
        assert_eq!(code(&task.exec(&exec_id, &["x"], &Io::default()).await.unwrap_err()), Code::ALREADY_EXISTS);
        task.start(&exec_id).await.unwrap();
        assert_eq!(task.wait(&exec_id).await.unwrap(), status);
        assert_eq!(task.state(&exec_id).await.unwrap().stdout, io.stdout);
        assert_eq!(output.await.unwrap(), format!("{number}\n").as_bytes());
        assert_eq!(task.delete(&exec_id).await.unwrap().exit_status, status);
        assert_eq!(code(&task.state(&exec_id).await.unwrap_err()), Code::NOT_FOUND);
    }
    // Deleted without having run.
    task.exec("never", &["/bin/true"], &Io { stdin: node.fifo("in"), ..Io::default() }).await.unwrap();
    task.delete("never").await.unwrap();
    task.kill("", 9).await.unwrap();
    task.wait("").await.unwrap();
    task.delete("").await.unwrap();
    node.expect_events(&[
        TASK_CREATE_EVENT_TOPIC,
        TASK_START_EVENT_TOPIC,
        TASK_EXEC_ADDED_EVENT_TOPIC,
        TASK_EXEC_STARTED_EVENT_TOPIC,
        TASK_EXIT_EVENT_TOPIC,
        TASK_EXEC_ADDED_EVENT_TOPIC,
        TASK_EXEC_STARTED_EVENT_TOPIC,
        TASK_EXIT_EVENT_TOPIC,
        TASK_EXEC_ADDED_EVENT_TOPIC,
        TASK_EXIT_EVENT_TOPIC,
        TASK_DELETE_EVENT_TOPIC,
    ])
    .await;
    finish(&node, &task).await;
}

/// Clients close their ends of the FIFOs when they hear of the end.
async fn ends_after_output() {
    const SIZE: usize = 40_000;
    let script = format!("head -c {SIZE} /dev/zero");
    let node = Node::new().await;
    for (id, reads) in [("read", true), ("unread", false)] {
        let io = Io { stdout: node.fifo(id), ..Io::default() };
        let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&io.stdout).unwrap();
        let task = node.create(id, &["/bin/sh", "-c", &script], &io).await;
        // Only from here on the FIFO does not look ended to its reader.
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let reader = reads.then(|| {
            let mut file = file.try_clone().unwrap();
            tokio::task::spawn_blocking(move || {
                let mut page = [0; 4096];
                while file.read(&mut page).unwrap() > 0 {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            })
        });
        task.start("").await.unwrap();
        assert_eq!(task.wait("").await.unwrap(), 0);
        match reader {
            Some(reader) => {
                assert_eq!(queued(&file), 0);
                reader.await.unwrap();
            }
            None => assert_eq!(queued(&file), SIZE),
        }
        task.delete("").await.unwrap();
        assert_eq!(file.read_to_end(&mut Vec::new()).unwrap(), if reads { 0 } else { SIZE });
        finish(&node, &task).await;
    }
}

fn queued(file: &fs::File) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD of a pipe writes one int, and `count` is one.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), libc::FIONREAD, &raw mut count) }, 0);
    usize::try_from(count).unwrap()
}

async fn late_readers() {
    let node = Node::new().await;
    let task = node.create("late", &["/bin/sleep", "600"], &Io::default()).await;
    task.start("").await.unwrap();
    for (exec_id, read) in [("read", true), ("unread", false)] {
        let io = Io { stdout: node.fifo(exec_id), ..Io::default() };
        task.exec(exec_id, &["/bin/echo", "text"], &io).await.unwrap();
        task.start(exec_id).await.unwrap();
        assert_eq!(task.wait(exec_id).await.unwrap(), 0);
        if read {
            assert_eq!(read_all(&io.stdout).await.unwrap(), b"text\n");
        }
        task.delete(exec_id).await.unwrap();
        if !read {
            let mut rest = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&io.stdout).unwrap();
            assert_eq!(rest.read(&mut [0; 8]).unwrap(), 0);
        }
    }
    task.kill("", 9).await.unwrap();
    task.wait("").await.unwrap();
    task.delete("").await.unwrap();
    finish(&node, &task).await;
}

async fn wrong_states() {
    let node = Node::new().await;
    let task = node.create("states", &["/bin/sleep", "600"], &Io::default()).await;
    assert_eq!(code(&task.create(&Io::default()).await.unwrap_err()), Code::ALREADY_EXISTS);
    assert_eq!(code(&task.exec("early", &["x"], &Io::default()).await.unwrap_err()), Code::FAILED_PRECONDITION);
    task.start("").await.unwrap();
    assert_eq!(code(&task.start("").await.unwrap_err()), Code::FAILED_PRECONDITION);
    assert_eq!(code(&task.delete("").await.unwrap_err()), Code::FAILED_PRECONDITION);
    assert_eq!(code(&task.start("nobody").await.unwrap_err()), Code::NOT_FOUND);
    assert_eq!(code(&task.wait("nobody").await.unwrap_err()), Code::NOT_FOUND);
    // With a container in it, the sandbox stays.
    task.shutdown().await;
    assert_eq!(task.state("").await.unwrap().status, Status::RUNNING.into());
    task.kill("", 9).await.unwrap();
    task.wait("").await.unwrap();
    task.delete("").await.unwrap();
    finish(&node, &task).await;

    let task = node.create("unstarted", &["/bin/sleep", "600"], &Io::default()).await;
    task.delete("").await.unwrap();
    finish(&node, &task).await;
}

async fn early_ends() {
    for (fate, expected, status) in [
        ("poweroff", "the guest powered off before its agent answered", Code::UNAVAILABLE),
        ("panic", "the guest kernel panicked before its agent answered", Code::UNAVAILABLE),
        ("triple", "the guest met a triple fault before its agent answered", Code::UNAVAILABLE),
        ("hang", "reconnect_timeout_ms", Code::DEADLINE_EXCEEDED),
    ] {
        let node = Node::new().await;
        node.configure(&format!(
            "[hypervisor.dragonball]\nkernel_params = \"fake={fate}\"\n[agent.kata]\nreconnect_timeout_ms = 300"
        ));
        let bundle = node.bundle("early", &["/bin/true"], Value::Null);
        let task = node.connect("early", &bundle).await;
        let error = task.create(&Io::default()).await.unwrap_err();
        assert_eq!(code(&error), status, "{fate}: {error}");
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("the last line of the console"), "{fate}: {text}");
        finish(&node, &task).await;
    }
}

async fn unanswered() {
    let node = Node::new().await;
    node.configure(
        "[hypervisor.dragonball]\nkernel_params = \"fake=deaf\"\n[agent.kata]\ncreate_container_timeout = 1",
    );
    let bundle = node.bundle("deaf", &["/bin/true"], Value::Null);
    let task = node.connect("deaf", &bundle).await;
    let error = task.create(&Io::default()).await.unwrap_err();
    assert_eq!(code(&error), Code::DEADLINE_EXCEEDED, "{error}");
    assert!(error.to_string().contains("did not answer within"), "{error}");
    finish(&node, &task).await;
}

async fn bad_input() {
    let bind =
        json!({"mounts": [{"type": "bind", "source": "/nonexistent/x", "destination": "/x", "options": ["rbind"]}]});
    let device = json!({"linux": {"devices": [{"path": "/dev/vfio/1", "type": "c", "major": 240, "minor": 1}]}});
    let cases = [
        ("unknown key", "kernl = \"/k\"", Value::Null, "`kernel`", Code::FAILED_PRECONDITION),
        ("no memory", "default_memory = 0", Value::Null, "64 MiB", Code::FAILED_PRECONDITION),
        ("device", "", device, "/dev/vfio/1", Code::INVALID_ARGUMENT),
        ("mount", "", bind, "/nonexistent/x", Code::INVALID_ARGUMENT),
        ("root", "", json!({"root": {"path": "nowhere"}}), "nowhere", Code::FAILED_PRECONDITION),
        ("program", "", json!({"process": {"args": ["/no/such/program"]}}), "no such file", Code::NOT_FOUND),
    ];
    for (what, configuration, extra, expected, status) in cases {
        let node = Node::new().await;
        node.configure(configuration);
        let bundle = node.bundle("bad", &["/bin/true"], extra);
        let task = node.connect("bad", &bundle).await;
        let error = task.create(&Io::default()).await.unwrap_err();
        assert_eq!(code(&error), status, "{what}: {error}");
        assert!(error.to_string().contains(expected), "{what}: {error}");
        finish(&node, &task).await;
    }

    for stdout in ["binary:///usr/bin/logger", "relative", "/etc/hostname"] {
        let node = Node::new().await;
        let bundle = node.bundle("stdio", &["/bin/true"], Value::Null);
        let task = node.connect("stdio", &bundle).await;
        let error = task.create(&Io { stdout: stdout.to_owned(), ..Io::default() }).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT, "{stdout}: {error}");
        assert!(error.to_string().contains(stdout), "{error}");
        finish(&node, &task).await;
    }
}

async fn machine_ends() {
    let node = Node::new().await;
    node.configure("kernel_params = \"fake=dies-at-start\"");
    let io = Io { stdout: node.fifo("out"), ..Io::default() };
    let output = read_all(&io.stdout);
    let task = node.create("dies", &["/bin/sleep", "600"], &io).await;
    let (started, ended) = tokio::join!(task.start(""), task.wait(""));
    assert_eq!(code(&started.unwrap_err()), Code::UNAVAILABLE);
    assert_eq!(ended.unwrap(), 137);
    assert_eq!(output.await.unwrap(), b"");
    let state = task.state("").await.unwrap();
    assert_eq!((state.status, state.exit_status), (Status::STOPPED.into(), 137));
    assert!(state.exited_at.seconds > 0);
    assert_eq!(task.delete("").await.unwrap().exit_status, 137);
    node.expect_events(&[TASK_CREATE_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC]).await;
    finish(&node, &task).await;
}

async fn pods() {
    let node = Node::new().await;
    let annotations = |kind: &str| json!({"annotations": {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "pod"}});
    let bundle = node.bundle("pod", &["/pause"], annotations("sandbox"));
    let pod = node.connect("pod", &bundle).await;
    pod.create(&Io::default()).await.unwrap();
    pod.start("").await.unwrap();
    let mut members = Vec::new();
    for id in ["a", "b"] {
        let bundle = node.bundle(id, &["/bin/sleep", "600"], annotations("container"));
        let member = node.connect(id, &bundle).await;
        member.create(&Io::default()).await.unwrap();
        member.start("").await.unwrap();
        assert_eq!(member.pid().await, pod.pid().await);
        members.push(member);
    }
    for member in &members {
        member.kill("", 9).await.unwrap();
        assert_eq!(member.wait("").await.unwrap(), 137);
        member.delete("").await.unwrap();
        member.shutdown().await;
        node.delete(&member.id);
        assert_eq!(pod.state("").await.unwrap().status, Status::RUNNING.into());
    }
    pod.kill("", 15).await.unwrap();
    assert_eq!(pod.wait("").await.unwrap(), 143);
    pod.delete("").await.unwrap();
    finish(&node, &pod).await;

    let bundle = node.bundle("stray", &["/bin/true"], annotations("container"));
    let output = node.start("stray", &bundle);
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("sandbox pod of container stray does not run"));
}

async fn namespaces() {
    let mut node = Node::new().await;
    let bundle = node.bundle("same", &["/bin/sleep", "600"], Value::Null);
    let mut tasks = Vec::new();
    for namespace in ["one", "two"] {
        node.namespace = namespace.to_owned();
        let task = node.connect("same", &bundle).await;
        task.create(&Io::default()).await.unwrap();
        tasks.push(task);
    }
    assert_ne!(tasks[0].pid().await, tasks[1].pid().await);
    let again = node.start("same", &bundle);
    assert!(!again.status.success());
    assert!(String::from_utf8(again.stderr).unwrap().contains("already exists"));
    node.namespace = "one".to_owned();
    node.delete("same");
    tasks[1].start("").await.unwrap();
    node.namespace = "two".to_owned();
    node.delete("same");
    node.expect_nothing_left().await;
}

/// The pod process is killed after this many of the steps of a container's life.
async fn killed_pods() {
    for step in 0..=6 {
        let node = Node::new().await;
        let io = Io { stdin: node.fifo("in"), stdout: node.fifo("out"), ..Io::default() };
        let bundle = node.bundle("victim", &["/bin/cat"], Value::Null);
        let task = node.connect("victim", &bundle).await;
        let pid = nix::unistd::Pid::from_raw(task.pid().await);
        if step == 1 {
            // In the middle of Create.
            let _ = tokio::time::timeout(std::time::Duration::from_millis(3), task.create(&io)).await;
        }
        if step >= 2 {
            task.create(&io).await.unwrap();
        }
        if step >= 3 {
            task.start("").await.unwrap();
        }
        if step >= 4 {
            task.exec("e", &["/bin/sleep", "600"], &Io::default()).await.unwrap();
        }
        if step >= 5 {
            task.kill("", 9).await.unwrap();
            task.wait("").await.unwrap();
        }
        if step >= 6 {
            task.delete("").await.unwrap();
        }
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        assert!(task.wait("").await.is_err());
        assert_eq!(node.delete("victim").exit_status, 137);
        assert_eq!(node.delete("victim").exit_status, 137);
        node.expect_nothing_left().await;
    }
}

async fn killed_starts() {
    let node = Node::new().await;
    for microseconds in (0..20_000).step_by(500) {
        let bundle = node.path("bundle-test-start");
        let _ = fs::remove_dir_all(&bundle);
        let bundle_again = node.bundle("start", &["/bin/true"], Value::Null);
        assert_eq!(bundle, bundle_again);
        let mut start = node.spawn_start("start", &bundle);
        std::thread::sleep(std::time::Duration::from_micros(microseconds));
        start.kill().unwrap();
        let output = start.wait_with_output().unwrap();
        if output.status.success() {
            // It was too late: this one printed its address and ended.
            node.delete("start");
        }
        node.expect_nothing_left().await;
    }
}

/// What containerd does when the client of a `Create` hangs up: `Delete`, `Shutdown`, and nothing else.
async fn given_up() {
    let node = Node::new().await;
    node.configure("kernel_params = \"fake=hang\"");
    let bundle = node.bundle("given-up", &["/bin/true"], Value::Null);
    let task = node.connect("given-up", &bundle).await;
    let create = tokio::time::timeout(std::time::Duration::from_millis(300), task.create(&Io::default())).await;
    assert!(create.is_err());
    assert_eq!(code(&task.delete("").await.unwrap_err()), Code::NOT_FOUND);
    task.shutdown().await;
    node.expect_nothing_left().await;
}

async fn unwanted() {
    let node = Node::new().await;
    let bundle = node.bundle("unwanted", &["/bin/true"], Value::Null);
    assert!(node.start("unwanted", &bundle).status.success());
    assert!(!node.leftovers().is_empty());
    node.expect_nothing_left().await;
}

async fn delete_nothing() {
    let node = Node::new().await;
    let response = node.delete("nobody");
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.seconds > 0);
}

async fn timelines() {
    let node = Node::new().await;
    let io = Io { stdout: node.fifo("out"), ..Io::default() };
    let output = read_all(&io.stdout);
    let task = node.create("time", &["/bin/echo", "now"], &io).await;
    task.start("").await.unwrap();
    task.wait("").await.unwrap();
    output.await.unwrap();
    task.delete("").await.unwrap();
    task.shutdown().await;
    node.expect_nothing_left().await;
    let text = fs::read_to_string(node.path("timeline/time.json")).unwrap();
    let timeline = timeline::Timeline::from_json(&text).unwrap();
    let names: Vec<&str> = timeline.stamps.iter().map(|stamp| &*stamp.name).collect();
    let expected = [
        "start",
        "config.json read",
        "pod process",
        "Create",
        "configuration read",
        "agent dialled",
        "agent ready",
        "container created",
        "started",
        "exited",
        "deleted",
    ];
    let found: Vec<&str> = names.iter().copied().filter(|name| expected.contains(name)).collect();
    assert_eq!(found, expected, "{names:?}");
    for name in ["init", "vmm: kernel entered", "rootfs mounted", "first output"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
}

async fn describes() {
    let node = Node::new().await;
    let run = |action: &str| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.arg(action).env(crate::node::ROOT_VARIABLE, node.root()).output().unwrap().stdout
    };
    let info: protocols::containerd::types::introspection::RuntimeInfo =
        protobuf::Message::parse_from_bytes(&run("-info")).unwrap();
    assert_eq!(info.name, "io.containerd.kata.v2");
    assert!(String::from_utf8(run("-v")).unwrap().contains(&info.version.version));
}
