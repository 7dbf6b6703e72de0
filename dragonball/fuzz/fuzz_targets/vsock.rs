//! The socket device, with programs of the host on the other side: one that listens, and some that connect.
#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use dragonball::virtio::testing::Harness;
use dragonball::virtio::testing::script::{Script, run};
use dragonball::virtio::vsock::Vsock;
use libfuzzer_sys::fuzz_target;

/// The most programs of the host at a time.
const PROGRAMS: usize = 8;

fuzz_target!(|bytes: &[u8]| {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("vsock");
    let listener = UnixListener::bind(directory.path().join("vsock_1024")).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    let device = Vsock::new(3, &path).expect("a device");
    let mut programs: Vec<UnixStream> = Vec::new();
    run(&mut Harness::new(device), Script::new(bytes), |_, script| match script.byte() % 6 {
        0 => programs.extend(listener.accept().ok().map(|(stream, _)| stream)),
        1 if programs.len() < PROGRAMS => programs.extend(UnixStream::connect(&path).ok()),
        2 => {
            let count = usize::from(script.byte());
            each(&mut programs, |stream| drop(stream.write(script.clone().bytes(count))));
        }
        3 => each(&mut programs, |stream| drop(stream.write(b"CONNECT 1024\n"))),
        4 => each(&mut programs, |stream| match stream.read(&mut [0; 4096]) {
            Err(error) => assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset)),
            Ok(_) => {}
        }),
        _ => {
            if let Some(stream) = programs.pop() {
                drop(stream.shutdown(if script.byte() & 1 == 0 { Shutdown::Write } else { Shutdown::Both }));
            }
        }
    });
});

fn each(programs: &mut [UnixStream], mut action: impl FnMut(&mut UnixStream)) {
    for stream in programs {
        stream.set_nonblocking(true).expect("a socket");
        action(stream);
    }
}
