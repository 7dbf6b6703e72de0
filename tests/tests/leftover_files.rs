//! Files and sockets that a case leaves are found. A program of its own: a child that another test starts would hold the
//! socket until it has executed its program.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use tests::event::Deadline;
use tests::leftovers::{Scope, Snapshot, Thing, settle};

fn of_directory(things: Vec<Thing>, directory: &Path) -> Vec<Thing> {
    let inside = |thing: &Thing| match thing {
        Thing::File { path } => path.starts_with(directory),
        Thing::Socket { name } => Path::new(name).starts_with(directory),
        _ => false,
    };
    things.into_iter().filter(inside).collect()
}

#[test]
fn a_planted_directory_file_and_socket_are_found_and_their_end_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let marker = format!("leftovers-test-{}", std::process::id());
    let scope =
        Scope { marker, programs: Vec::new(), directories: vec![(directory.path().to_owned(), 3)], daemon: None };
    let before = Snapshot::take(&scope).unwrap();
    let planted = directory.path().join("sandbox");
    fs::create_dir(&planted).unwrap();
    fs::write(planted.join("journal"), "").unwrap();
    let socket = UnixListener::bind(planted.join("task.sock")).unwrap();
    let left = settle(&before, &scope, Deadline::after(Duration::ZERO)).unwrap();
    let name = planted.join("task.sock").display().to_string();
    assert_eq!(
        of_directory(left, directory.path()),
        [
            Thing::Socket { name: name.clone() },
            Thing::File { path: planted.clone() },
            Thing::File { path: planted.join("journal") },
            Thing::File { path: name.into() },
        ]
    );
    drop(socket);
    fs::remove_dir_all(&planted).unwrap();
    let left = Snapshot::take(&scope).unwrap().since(&before);
    assert_eq!(of_directory(left, directory.path()), []);
}
