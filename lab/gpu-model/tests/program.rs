//! Runs the program: how it is started, how it ends, what it refuses.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_gpu-model");

fn refused(arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = Command::new(PROGRAM).args(arguments).output().unwrap();
    assert!(!status.success(), "{arguments:?}");
    String::from_utf8(stderr).unwrap()
}

/// Asks for the device's information and reads the answer.
fn ask(stream: &mut UnixStream) {
    let mut request = vec![1, 0, 4, 0, 32, 0, 0, 0];
    request.resize(32, 0);
    stream.write_all(&request).unwrap();
    let mut answer = [0; 32];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[16..20], [16, 0, 0, 0]);
}

#[test]
fn it_serves_one_client_after_the_other_and_ends_with_its_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gpu.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // Closed on exec: the model must not keep itself alive.
    let (life, output) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let mut model = Command::new(PROGRAM)
        .args(["--inherited", "--memory", "1M"])
        .stdin(OwnedFd::from(listener))
        .stdout(output)
        .spawn()
        .unwrap();
    for _ in 0..3 {
        ask(&mut UnixStream::connect(&path).unwrap());
    }
    drop(life);
    assert!(model.wait().unwrap().success());
}

#[test]
fn sizes_that_no_bar_can_have_are_refused_with_what_can_be() {
    for size in ["3G", "1", "512K", "2T", "0"] {
        let message = refused(&["/nowhere/gpu.sock", "--memory", size]);
        assert!(message.contains("1 MiB to 1 TiB") || message.contains("as 8G"), "{size}: {message}");
    }
}

#[test]
fn a_socket_that_cannot_be_made_is_named() {
    let message = refused(&["/nowhere/gpu.sock", "--memory", "1M"]);
    assert!(message.contains("/nowhere/gpu.sock"), "{message}");
    assert!(refused(&[]).contains("<SOCKET>"));
}
