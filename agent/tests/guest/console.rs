//! Commands in the guest itself, beside its containers.

use protobuf::Message;
use protocols::agent::{GuestCommand, SetupRequest};
use protocols::containerd::api::{KillRequest, PauseRequest, ResizePtyRequest, ShutdownRequest};
use protocols::{GUEST, GUEST_COMMAND_TYPE_URL};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

use crate::harness::{Host, Stdio, context, privileged, process, refusal, send_all, within};

/// A guest whose host lets commands be executed in it.
async fn opened() -> Host {
    let host = Host::start().await;
    let request = SetupRequest { debug_console: true, ..Default::default() };
    within(host.agent.setup(context(), &request)).await.expect("setup");
    host
}

async fn exec(host: &Host, exec_id: &str, arguments: &[&str], stdio: &Stdio) -> ttrpc::Result<()> {
    let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let environment = owned(&["PATH=/usr/bin:/bin", "COLOUR=blue"]);
    let command = GuestCommand { arguments: owned(arguments), environment, ..Default::default() };
    let command = command.write_to_bytes().expect("a message");
    host.exec_as(GUEST, exec_id, (GUEST_COMMAND_TYPE_URL, &command), stdio).await
}

#[tokio::test]
async fn a_command_has_its_environment_streams_and_exit_status() {
    if !privileged() {
        return;
    }
    let mut host = opened().await;
    let stdio = Stdio::all();
    exec(&host, "one", &["sh", "-c", "cat; echo $COLOUR $(pwd) >&2; exit 42"], &stdio).await.expect("exec");
    host.begin(GUEST, "one").await.expect("start");
    let mut stdin = host.stream(stdio.stdin.expect("stdin")).await;
    send_all(&mut stdin, b"input").await;
    assert_eq!(host.outputs(&stdio).await, ("input".to_owned(), "blue /\n".to_owned()));
    assert_eq!(host.wait(GUEST, "one").await.expect("wait"), 42);
    host.delete(GUEST, "one").await.expect("delete");
    assert_eq!(refusal(host.wait(GUEST, "one").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_command_on_a_terminal_has_its_size_and_is_interrupted_by_it() {
    if !privileged() {
        return;
    }
    let mut host = opened().await;
    let stdio = Stdio::terminal();
    exec(&host, "shell", &["sh", "-c", "stty size; exec sleep 1000"], &stdio).await.expect("exec");
    let size = ResizePtyRequest {
        id: GUEST.to_owned(),
        exec_id: "shell".to_owned(),
        width: 132,
        height: 43,
        ..Default::default()
    };
    within(host.task.resize_pty(context(), &size)).await.expect("resize");
    host.begin(GUEST, "shell").await.expect("start");
    let mut output = host.stream(stdio.stdout.expect("stdout")).await;
    let mut text = [0; 8];
    within(output.read_exact(&mut text)).await.expect("output");
    assert_eq!(&text, b"43 132\r\n");
    let mut input = host.stream(stdio.stdin.expect("stdin")).await;
    input.write_all(b"\x03").await.expect("input");
    assert_eq!(host.wait(GUEST, "shell").await.expect("wait"), 128 + 2);
}

#[tokio::test]
async fn a_command_is_signalled_alone_and_does_not_keep_the_sandbox() {
    if !privileged() {
        return;
    }
    let host = opened().await;
    exec(&host, "long", &["sleep", "1000"], &Stdio::default()).await.expect("exec");
    host.begin(GUEST, "long").await.expect("start");
    exec(&host, "other", &["sleep", "1000"], &Stdio::default()).await.expect("exec");
    host.begin(GUEST, "other").await.expect("start");
    host.kill(GUEST, "long", 15).await.expect("kill");
    assert_eq!(host.wait(GUEST, "long").await.expect("wait"), 128 + 15);
    let all = KillRequest { id: GUEST.to_owned(), signal: 9, all: true, ..Default::default() };
    assert_eq!(refusal(host.kill_with(all).await).0, Code::INVALID_ARGUMENT);
    within(host.task.shutdown(context(), &ShutdownRequest::default())).await.expect("shutdown");
    host.ended().await;
}

#[tokio::test]
async fn what_is_no_command_of_the_guest_is_refused_with_its_reason() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let (code, text) = refusal(exec(&host, "one", &["true"], &Stdio::default()).await);
    assert!(code == Code::FAILED_PRECONDITION && text.contains("the guest itself executes no commands"), "{text}");
    host.hang_up().await;

    let host = opened().await;
    let (code, text) = refusal(host.exec(GUEST, "one", &process(&["true"]), &Stdio::default()).await);
    assert!(code == Code::INVALID_ARGUMENT && text.contains("GuestCommand"), "{text}");
    for (number, (arguments, reason)) in [
        (vec!["no-such-program"], "\"no-such-program\": executable file not found in $PATH"),
        (vec!["/etc/passwd"], "\"/etc/passwd\": permission denied"),
        (vec![], "names no program"),
    ]
    .into_iter()
    .enumerate()
    {
        let exec_id = format!("bad-{number}");
        exec(&host, &exec_id, &arguments, &Stdio::default()).await.expect("exec");
        let (_, text) = refusal(host.begin(GUEST, &exec_id).await);
        assert!(text.contains(reason), "{text}");
    }
    let pause = PauseRequest { id: GUEST.to_owned(), ..Default::default() };
    assert_eq!(refusal(within(host.task.pause(context(), &pause)).await).0, Code::NOT_FOUND);
    assert_eq!(refusal(host.delete(GUEST, "").await).0, Code::FAILED_PRECONDITION);
}
