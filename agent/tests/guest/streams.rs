//! Standard streams: whole, in order, ended when their last writer is gone; and terminals.

use protocols::containerd::api::{CloseIORequest, ResizePtyRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Host, Stdio, context, privileged, process, send_all, shell, spec, unique, within};

const MEGABYTE: usize = 1 << 20;

#[tokio::test]
async fn much_data_passes_stdin_and_stdout_whole_with_a_slow_reader() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("much");
    let stdio = Stdio { stderr: None, ..Stdio::all() };
    host.create(&id, &spec(process(&["cat"])), &stdio).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let mut stdin = host.stream(stdio.stdin.expect("stdin")).await;
    let mut stdout = host.stream(stdio.stdout.expect("stdout")).await;
    let sent: Vec<u8> = (0..16 * MEGABYTE).map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect();
    let expected = sent.clone();
    let writer = tokio::spawn(async move { send_all(&mut stdin, &sent).await });
    // A reader that takes little at a time: everything in between is full most of the time.
    let mut got = Vec::with_capacity(expected.len());
    let mut chunk = [0; 777];
    loop {
        match within(stdout.read(&mut chunk)).await.expect("stdout") {
            0 => break,
            n => got.extend_from_slice(&chunk[..n]),
        }
    }
    within(writer).await.expect("the writer");
    assert!(got == expected, "{} of {} bytes came back", got.len(), expected.len());
    assert_eq!(host.wait(&id, "").await.expect("wait"), 0, "cat ended at the end of its input");
}

#[tokio::test]
async fn output_ends_when_the_last_process_that_holds_it_ends() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("last");
    host.create(&id, &spec(shell("while :; do sleep 1000; done")), &Stdio::default()).await.expect("create");
    host.begin(&id, "").await.expect("start");
    // The process that was asked for ends at once; its child writes later, into the same pipe.
    let stdio = Stdio { stdin: None, stderr: None, ..Stdio::outputs() };
    let script = "mkfifo /tmp/go; (read line < /tmp/go; echo late $line) & echo early";
    host.exec(&id, "writer", &shell(&script.replace("mkfifo", "busybox mkfifo")), &stdio).await.expect("exec");
    host.begin(&id, "writer").await.expect("start exec");
    assert_eq!(host.wait(&id, "writer").await.expect("wait"), 0);
    assert_eq!(host.run_exec(&id, &shell("echo word > /tmp/go")).await.0, 0);
    assert_eq!(host.outputs(&stdio).await.0, "early\nlate word\n");
}

#[tokio::test]
async fn a_host_that_hangs_up_a_stream_does_not_stop_the_writer() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("deaf");
    let stdio = Stdio { stdin: None, stderr: None, ..Stdio::outputs() };
    host.create(&id, &spec(shell("dd if=/dev/zero bs=1M count=8 2>/dev/null; exit 5")), &stdio).await.expect("create");
    drop(host.stream(stdio.stdout.expect("stdout")).await);
    host.begin(&id, "").await.expect("start");
    assert_eq!(host.wait(&id, "").await.expect("wait"), 5);
}

#[tokio::test]
async fn without_streams_a_process_has_dev_null() {
    if !privileged() {
        return;
    }
    let host = Host::start().await;
    let id = unique("null");
    host.create(&id, &spec(shell("cat; echo lost; exit 4")), &Stdio::default()).await.expect("create");
    host.begin(&id, "").await.expect("start");
    assert_eq!(host.wait(&id, "").await.expect("wait"), 4);
}

#[tokio::test]
async fn a_terminal_echoes_has_a_size_and_belongs_to_its_user() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("tty");
    let stdio = Stdio::terminal();
    let mut process =
        shell("stty size; test -t 0 && test -O $(readlink /proc/self/fd/0) && echo mine; read x; stty size; exit 6");
    process["user"] = serde_json::json!({"uid": 33, "gid": 33});
    host.create(&id, &spec(process), &stdio).await.expect("create");
    let resize = async |width, height| {
        let request = ResizePtyRequest { id: id.clone(), width, height, ..Default::default() };
        within(host.task.resize_pty(context(), &request)).await.expect("resize");
    };
    resize(80, 24).await;
    host.begin(&id, "").await.expect("start");
    resize(80, 24).await;
    let (stdin, stdout) = (stdio.stdin.expect("stdin"), stdio.stdout.expect("stdout"));
    let mut terminal = (host.stream(stdin).await, host.stream(stdout).await);
    read_until(&mut terminal.1, "24 80\r\nmine\r\n").await;
    let request = ResizePtyRequest { id: id.clone(), width: 132, height: 50, ..Default::default() };
    within(host.task.resize_pty(context(), &request)).await.expect("resize");
    terminal.0.write_all(b"x\n").await.expect("input");
    read_until(&mut terminal.1, "x\r\n50 132\r\n").await;
    assert_eq!(host.wait(&id, "").await.expect("wait"), 6);
    let mut rest = Vec::new();
    within(terminal.1.read_to_end(&mut rest)).await.expect("the end of the terminal");
}

#[tokio::test]
async fn exec_can_have_a_terminal_too() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("exectty");
    host.create(&id, &spec(shell("while :; do sleep 1000; done")), &Stdio::default()).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let stdio = Stdio::terminal();
    let mut process = shell("stty size; exit 8");
    process["consoleSize"] = serde_json::json!({"width": 99, "height": 11});
    host.exec(&id, "tty", &process, &stdio).await.expect("exec");
    host.begin(&id, "tty").await.expect("start exec");
    assert_eq!(host.wait(&id, "tty").await.expect("wait"), 8);
    assert_eq!(host.outputs(&stdio).await.0, "11 99\r\n");
}

#[tokio::test]
async fn closing_stdin_is_answered_and_the_half_close_ends_it() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("close");
    let stdio = Stdio { stderr: None, ..Stdio::all() };
    host.create(&id, &spec(process(&["cat"])), &stdio).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let mut stdin = host.stream(stdio.stdin.expect("stdin")).await;
    let request = CloseIORequest { id: id.clone(), stdin: true, ..Default::default() };
    within(host.task.close_io(context(), &request)).await.expect("close");
    // The request overtook these bytes; they must arrive all the same.
    send_all(&mut stdin, b"late\n").await;
    assert_eq!(host.outputs(&stdio).await.0, "late\n");
    assert_eq!(host.wait(&id, "").await.expect("wait"), 0);
}

async fn read_until(stream: &mut tokio::net::UnixStream, expected: &str) {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with(expected) {
        let n = within(stream.read(&mut byte)).await.expect("terminal output");
        assert!(n > 0, "the terminal ended after {text:?} without {expected:?}");
        text.push(char::from(byte[0]));
    }
}
