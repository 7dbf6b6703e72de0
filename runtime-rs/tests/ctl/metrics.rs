//! Metrics, printed and served.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use libtest_mimic::Trial;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::ctl::command;
use crate::node::{Io, Node};
use crate::sandboxes::ctl;
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("metrics tell of sandboxes, their processes, and what their containers use", prints),
        trial("metrics are served to an HTTP client, and nothing else is", serves),
        trial("a client that sends too much or hangs up does not end the service", bad_clients),
        trial("the socket of an earlier service is replaced, that of a living one is not", sockets),
    ]
}

async fn prints() {
    let node = Node::new().await;
    let task = node.create("one", &["/bin/sleep", "600"], &Io::default()).await;
    task.start("").await.unwrap();
    let printed = ctl(&node, &["metrics"]).await;
    assert_eq!((printed.code, &*printed.errors), (0, ""));
    for line in [
        "kata_sandboxes{state=\"running\"} 1",
        "kata_sandbox_answers{namespace=\"test\",sandbox=\"one\"} 1",
        "kata_containers{namespace=\"test\",sandbox=\"one\",state=\"running\"} 1",
        "kata_container_cpu_seconds_total{namespace=\"test\",sandbox=\"one\",container=\"one\"} 2.500000",
        "kata_container_memory_bytes{namespace=\"test\",sandbox=\"one\",container=\"one\"} 3145728",
        "kata_container_pids{namespace=\"test\",sandbox=\"one\",container=\"one\"} 2",
    ] {
        assert!(printed.out.lines().any(|other| other == line), "{line} is not in\n{}", printed.out);
    }
    assert!(printed.out.contains("kata_pod_process_rss_bytes{namespace=\"test\",sandbox=\"one\"} "));
    let without = ctl(&node, &["metrics", "--no-containers"]).await.out;
    assert!(without.contains("state=\"running\"} 1") && !without.contains("kata_container_pids{"), "{without}");

    kill(Pid::from_raw(task.pid().await), Signal::SIGKILL).unwrap();
    node.delete("one");
    node.expect_nothing_left().await;
    assert!(ctl(&node, &["metrics"]).await.out.contains("kata_sandboxes{state=\"running\"} 0"));
}

/// A running service.
struct Service {
    child: Child,
    socket: PathBuf,
}

impl Service {
    /// Starts it, and waits until its socket is there.
    async fn start(node: &Node) -> Self {
        let socket = node.path("metrics.sock");
        let watch = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        watch.add_watch(socket.parent().unwrap(), AddWatchFlags::IN_CREATE).unwrap();
        let mut child = Self::spawn(node, &socket);
        let appeared = socket.clone();
        let wait = tokio::task::spawn_blocking(move || {
            while !watch.read_events().unwrap().iter().any(|event| event.name.as_deref() == appeared.file_name()) {}
        });
        let waited = tokio::time::timeout(std::time::Duration::from_secs(30), wait).await;
        if waited.is_err() {
            let _ = child.kill();
            panic!("the service does not begin");
        }
        Self { child, socket }
    }

    fn spawn(node: &Node, socket: &Path) -> Child {
        let root = node.root().display().to_string();
        let listen = format!("unix:{}", socket.display());
        let arguments = ["metrics", "--root", &root, "--listen", &listen];
        command(&node.path("configuration.toml"), &arguments).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Ends it as an operator does.
    fn end(mut self) -> String {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        assert!(!self.socket.exists());
        let mut errors = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        errors
    }

    async fn request(&self, method: Method, path: &str) -> (Response<()>, String) {
        let stream = TokioIo::new(UnixStream::connect(&self.socket).await.unwrap());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let request =
            Request::builder().method(method).uri(path).header("host", "localhost").body(Empty::<Bytes>::new());
        let response: Response<Incoming> = sender.send_request(request.unwrap()).await.unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (Response::from_parts(head, ()), String::from_utf8(body.to_vec()).unwrap())
    }
}

async fn serves() {
    let node = Node::new().await;
    node.create("one", &["/bin/sleep", "600"], &Io::default()).await;
    let service = Service::start(&node).await;
    assert_eq!(fs::metadata(&service.socket).unwrap().permissions().mode() & 0o777, 0o600);

    let (head, body) = service.request(Method::GET, "/metrics").await;
    assert_eq!(head.status(), StatusCode::OK);
    assert_eq!(head.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert!(body.contains("kata_sandboxes{state=\"running\"} 1\n"), "{body}");
    assert_eq!(service.request(Method::HEAD, "/metrics").await.1, "");
    let (head, _) = service.request(Method::POST, "/metrics").await;
    assert!(head.status() == StatusCode::METHOD_NOT_ALLOWED && head.headers()["allow"] == "GET, HEAD");
    let (head, body) = service.request(Method::GET, "/").await;
    assert!(head.status() == StatusCode::NOT_FOUND && body.contains("/metrics"));

    node.delete("one");
    let (_, body) = service.request(Method::GET, "/metrics").await;
    assert!(body.contains("kata_sandboxes{state=\"running\"} 0\n"), "{body}");
    assert_eq!(service.end(), "");
    node.expect_nothing_left().await;
}

async fn bad_clients() {
    let node = Node::new().await;
    let service = Service::start(&node).await;
    // More of them than are served at a time.
    for _ in 0..8 {
        let mut silent = UnixStream::connect(&service.socket).await.unwrap();
        silent.write_all(b"GET /met").await.unwrap();
        drop(silent);
    }
    for request in [
        format!("GET /metrics HTTP/1.1\r\nhost: x\r\nlong: {}\r\n\r\n", "x".repeat(1 << 20)),
        "no request at all\r\n\r\n".to_owned(),
        format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(1 << 17)),
    ] {
        let mut client = UnixStream::connect(&service.socket).await.unwrap();
        // The service may hang up before all of it is sent.
        let _ = client.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(service.request(Method::GET, "/metrics").await.0.status(), StatusCode::OK);
    service.end();
}

async fn sockets() {
    let node = Node::new().await;
    let service = Service::start(&node).await;
    let second = Service::spawn(&node, &service.socket).wait_with_output().unwrap();
    let errors = String::from_utf8(second.stderr).unwrap();
    assert!(second.status.code() == Some(2) && errors.contains(service.socket.to_str().unwrap()), "{errors}");
    assert_eq!(service.request(Method::GET, "/metrics").await.0.status(), StatusCode::OK);

    // One that is killed leaves its socket.
    let Service { mut child, socket } = service;
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(socket.exists());
    let service = Service::start(&node).await;
    assert_eq!(service.request(Method::GET, "/metrics").await.0.status(), StatusCode::OK);
    service.end();
    // A file of somebody else is none.
    fs::write(node.path("metrics.sock"), "precious").unwrap();
    let refused = Service::spawn(&node, &node.path("metrics.sock")).wait_with_output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(fs::read_to_string(node.path("metrics.sock")).unwrap(), "precious");
}
