//! The agent as a host sees it: PID 1 of its own namespaces, real containers, unix sockets in place of vsock.
#![expect(clippy::expect_used, reason = "a test that cannot go on fails")]

mod console;
mod harness;
mod isolation;
mod lifecycle;
mod network;
mod sandbox;
mod streams;
