//! Containers from create to delete: exit codes, signals, exec, what is refused, and what is left behind.

use protocols::containerd::api::{
    CreateTaskRequest, KillRequest, PauseRequest, PidsRequest, ResumeRequest, StateRequest, Status,
};
use protocols::containerd::types::mount::Mount;
use ttrpc::Code;

use crate::harness::{Host, Stdio, context, create_request, privileged, process, refusal, shell, spec, unique, within};

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

/// Runs until it is killed, and says when its signal handler is in place.
const SERVER: &str = "trap 'exit 7' TERM; echo ready; while :; do sleep 1 & wait $!; done";

#[tokio::test]
async fn a_container_reports_its_output_and_exit_code() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    for status in [0, 1, 42, 127] {
        let script = format!("echo out {status}; echo err {status} >&2; exit {status}");
        let result = host.run(&unique("run"), &spec(shell(&script))).await;
        assert_eq!(result, (status, format!("out {status}\n"), format!("err {status}\n")));
    }
}

#[tokio::test]
async fn death_by_signal_is_128_and_its_number() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    for (signal, status) in [(SIGKILL, 137), (34, 162)] {
        let (id, exec_id) = (unique("signal"), unique("exec"));
        let stdio = Stdio::outputs();
        host.create(&id, &spec(shell(SERVER)), &stdio).await.expect("create");
        host.begin(&id, "").await.expect("start");
        // PID 1 of a namespace is immune to real-time signals without a handler; a further process is not.
        host.exec(&id, &exec_id, &process(&["sleep", "1000"]), &Stdio::default()).await.expect("exec");
        host.begin(&id, &exec_id).await.expect("start exec");
        host.kill(&id, &exec_id, signal).await.expect("kill exec");
        assert_eq!(host.wait(&id, &exec_id).await.expect("wait exec"), status);
        host.kill(&id, "", SIGKILL).await.expect("kill");
        assert_eq!(host.wait(&id, "").await.expect("wait"), 137);
        host.delete(&id, "").await.expect("delete");
        drop(host.outputs(&stdio).await);
    }
}

#[tokio::test]
async fn a_container_may_handle_a_signal() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("term");
    let stdio = Stdio { stdout: Stdio::outputs().stdout, ..Stdio::default() };
    host.create(&id, &spec(shell(SERVER)), &stdio).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let mut stdout = host.stream(stdio.stdout.expect("a stream")).await;
    let mut ready = [0; 6];
    within(tokio::io::AsyncReadExt::read_exact(&mut stdout, &mut ready)).await.expect("ready");
    host.kill(&id, "", SIGTERM).await.expect("kill");
    assert_eq!(host.wait(&id, "").await.expect("wait"), 7);
    let (code, text) = refusal(host.kill(&id, "", SIGTERM).await);
    assert_eq!((code, text.contains("process already finished")), (Code::NOT_FOUND, true), "{text}");
}

#[tokio::test]
async fn a_created_container_can_be_killed_or_deleted_before_it_starts() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let id = unique("created");
    host.create(&id, &spec(shell("true")), &Stdio::default()).await.expect("create");
    host.kill(&id, "", SIGTERM).await.expect("kill");
    assert_eq!(host.wait(&id, "").await.expect("wait"), 137);
    assert_eq!(refusal(host.begin(&id, "").await).0, Code::FAILED_PRECONDITION);
    host.delete(&id, "").await.expect("delete");

    host.create(&id, &spec(shell("true")), &Stdio::default()).await.expect("create again");
    let deleted = host.delete(&id, "").await.expect("delete while created");
    assert_eq!(deleted.exit_status, 137);
}

#[tokio::test]
async fn nothing_is_left_of_a_deleted_container() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("clean");
    host.run(&id, &spec(shell("mkdir /tmp/x; echo y > /tmp/x/y"))).await;
    for directory in ["/run/kata-containers/bundles", "/run/kata-containers/state", "/run/kata-containers/consoles"] {
        assert_eq!(host.list(directory), Vec::<String>::new(), "{directory}");
    }
    assert!(!host.list("/sys/fs/cgroup").contains(&id));
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", host.agent_pid())).expect("mounts");
    assert!(!mounts.contains(&id), "{mounts}");
    let kept = host.directory.path().join(&id).join("tmp/x/y");
    assert_eq!(std::fs::read_to_string(kept).expect("the container's file"), "y\n", "the rootfs itself is the host's");
}

#[tokio::test]
async fn what_cannot_be_created_is_refused_as_runc_does_and_leaves_nothing() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let cases = [
        (spec(process(&["nothing"])), "exec: \"nothing\": executable file not found in $PATH"),
        (spec(process(&["/no/such"])), "no such file or directory"),
        (spec(process(&["/etc/passwd"])), "permission denied"),
    ];
    for (spec, expected) in cases {
        let id = unique("bad");
        let (_, text) = refusal(host.create(&id, &spec, &Stdio::default()).await);
        assert!(text.contains(expected), "expected {expected:?} in {text:?}");
        assert!(text.starts_with("OCI runtime create failed: "), "{text}");
        assert_eq!(host.list("/run/kata-containers/bundles"), Vec::<String>::new());
        assert!(!host.list("/sys/fs/cgroup").contains(&id));
        assert_eq!(refusal(host.wait(&id, "").await).0, Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn specs_that_are_none_are_refused_with_what_is_wrong() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let without = |field: &str| {
        let mut spec = spec(shell("true"));
        spec.as_object_mut().expect("an object").remove(field);
        spec
    };
    let mut misspelt = spec(shell("true"));
    misspelt["linux"]["namespaces"] = serde_json::json!([{"type": "pidd"}]);
    let cases = [
        (serde_json::json!("no object"), "the spec is not what the OCI runtime specification describes"),
        (without("process"), "the spec has no process"),
        (without("linux"), "the spec has no linux section"),
        (misspelt, "pidd"),
        (spec(process(&[])), "the spec has no args"),
    ];
    for (spec, expected) in cases {
        let id = unique("spec");
        let (_, text) = refusal(host.create(&id, &spec, &Stdio::default()).await);
        assert!(text.contains(expected), "expected {expected:?} in {text:?}");
        assert_eq!(host.list("/run/kata-containers/bundles"), Vec::<String>::new());
    }
}

#[tokio::test]
async fn requests_beyond_their_bounds_are_refused_before_anything_happens() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let request = |change: &dyn Fn(&mut CreateTaskRequest)| {
        let mut request = create_request("bounds", &spec(shell("true")), &Stdio::default(), Vec::new());
        change(&mut request);
        request
    };
    let huge = serde_json::json!({"padding": "x".repeat(protocols::MAX_SPEC)});
    let cases = [
        (request(&|r| r.options.mut_or_insert_default().type_url = "other".into()), "tatami.agent.v1.ContainerOptions"),
        (request(&|r| r.options = None.into()), "ContainerOptions"),
        (request(&|r| r.stdout = "/run/fifo".into()), "stdout \"/run/fifo\""),
        (request(&|r| r.bundle = "/etc".into()), "bundle \"/etc\""),
        (create_request("bounds", &huge, &Stdio::default(), Vec::new()), "the limit is 3145728"),
        (request(&|r| r.rootfs = vec![Mount::default(); 300]), "the limit is 256"),
    ];
    for (request, expected) in cases {
        let (code, text) = refusal(within(host.task.create(context(), &request)).await);
        assert_eq!((code, text.contains(expected)), (Code::INVALID_ARGUMENT, true), "{text}");
    }
    let restore = request(&|r| r.checkpoint = "/somewhere".into());
    assert_eq!(refusal(within(host.task.create(context(), &restore)).await).0, Code::UNIMPLEMENTED);
    assert_eq!(host.list("/run/kata-containers/bundles"), Vec::<String>::new());
}

#[tokio::test]
async fn a_mount_that_fails_is_said_with_its_cause() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let mut spec = spec(shell("true"));
    spec["mounts"].as_array_mut().expect("mounts").push(serde_json::json!(
        {"destination": "/data", "type": "bind", "source": "/no/such/directory", "options": ["rbind", "ro"]}
    ));
    let (_, text) = refusal(host.create(&unique("mount"), &spec, &Stdio::default()).await);
    assert!(text.contains("/no/such/directory") || text.contains("No such file"), "{text}");
}

#[tokio::test]
async fn requests_for_what_is_not_there_or_not_fitting_get_their_codes() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("codes");
    assert_eq!(refusal(host.begin(&id, "").await).0, Code::NOT_FOUND);
    assert_eq!(
        refusal(host.create("../escape", &spec(shell("true")), &Stdio::default()).await).0,
        Code::INVALID_ARGUMENT
    );
    host.create(&id, &spec(shell(SERVER)), &Stdio::default()).await.expect("create");
    assert_eq!(refusal(host.create(&id, &spec(shell("true")), &Stdio::default()).await).0, Code::ALREADY_EXISTS);
    let early = host.exec(&id, "e", &shell("true"), &Stdio::default()).await;
    assert_eq!(refusal(early).0, Code::FAILED_PRECONDITION);
    host.begin(&id, "").await.expect("start");
    assert_eq!(refusal(host.begin(&id, "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refusal(host.delete(&id, "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refusal(host.kill(&id, "", 65).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(refusal(host.kill(&id, "nobody", SIGTERM).await).0, Code::NOT_FOUND);

    host.exec(&id, "e", &process(&["nothing"]), &Stdio::default()).await.expect("exec");
    assert_eq!(refusal(host.exec(&id, "e", &shell("true"), &Stdio::default()).await).0, Code::ALREADY_EXISTS);
    let (_, text) = refusal(host.begin(&id, "e").await);
    assert!(text.contains("exec: \"nothing\": executable file not found in $PATH"), "{text}");
    host.delete(&id, "e").await.expect("delete exec");
    assert_eq!(host.run_exec(&id, &shell("echo still here; exit 3")).await, (3, "still here\n".into()));
}

#[tokio::test]
async fn state_tells_each_phase_and_echoes_stdio() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let id = unique("state");
    let stdio = Stdio::outputs();
    let state = async |expected: Status| {
        let request = StateRequest { id: id.clone(), ..Default::default() };
        let state = within(host.task.state(context(), &request)).await.expect("state");
        assert_eq!(state.status.enum_value(), Ok(expected));
        assert_eq!(state.stdout, format!("stream:{}", stdio.stdout.expect("a stream")));
        state
    };
    let pid = host.create(&id, &spec(shell(SERVER)), &stdio).await.expect("create");
    assert_eq!(state(Status::CREATED).await.pid, pid);
    host.begin(&id, "").await.expect("start");
    state(Status::RUNNING).await;
    let request = PauseRequest { id: id.clone(), ..Default::default() };
    within(host.task.pause(context(), &request)).await.expect("pause");
    state(Status::PAUSED).await;
    let early = host.exec(&id, "e", &shell("true"), &Stdio::default()).await;
    early.expect("exec is registered");
    assert_eq!(refusal(host.begin(&id, "e").await).0, Code::FAILED_PRECONDITION);
    let request = ResumeRequest { id: id.clone(), ..Default::default() };
    within(host.task.resume(context(), &request)).await.expect("resume");
    state(Status::RUNNING).await;
    host.kill(&id, "", SIGKILL).await.expect("kill");
    host.wait(&id, "").await.expect("wait");
    let stopped = state(Status::STOPPED).await;
    assert_eq!(stopped.exit_status, 137);
    assert!(stopped.exited_at.seconds > 1_500_000_000);
}

#[tokio::test]
async fn pids_are_listed_and_all_of_them_can_be_signalled() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("pids");
    let stdio = Stdio { stdout: Stdio::outputs().stdout, ..Stdio::default() };
    let script = "sleep 1000 & sleep 1000 & echo ready; wait";
    let pid = host.create(&id, &spec(shell(script)), &stdio).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let mut stdout = host.stream(stdio.stdout.expect("a stream")).await;
    let mut ready = [0; 6];
    within(tokio::io::AsyncReadExt::read_exact(&mut stdout, &mut ready)).await.expect("ready");
    let request = PidsRequest { id: id.clone(), ..Default::default() };
    let pids: Vec<u32> =
        within(host.task.pids(context(), &request)).await.expect("pids").processes.iter().map(|p| p.pid).collect();
    assert_eq!((pids.len(), pids.contains(&pid)), (3, true), "{pids:?}");
    host.kill_with(KillRequest { id: id.clone(), signal: SIGTERM, all: true, ..Default::default() })
        .await
        .expect("kill");
    // The shell's children die of it; the shell itself, PID 1, then has nothing to wait for.
    assert_eq!(host.wait(&id, "").await.expect("wait"), 0);
}
