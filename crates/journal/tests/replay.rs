//! Whatever instant an owner dies at, a replay leaves nothing of what it did, and touches nothing else.
#![allow(clippy::unwrap_used, reason = "the helpers of tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use journal::{Effect, Journal, ProcessId, replay};
use nix::mount::{MsFlags, mount};

/// The effects of a small sandbox, in the order in which they happen.
fn effects(root: &Path) -> Vec<Effect> {
    vec![
        Effect::Directory { path: root.join("sandbox") },
        Effect::File { path: root.join("sandbox/socket") },
        Effect::Directory { path: root.join("sandbox/shared") },
        Effect::Directory { path: root.join("sandbox/shared/a") },
        Effect::File { path: root.join("sandbox/shared/a/config") },
        Effect::Tree { path: root.join("sandbox/guest") },
    ]
}

fn carry_out(effect: &Effect) {
    match effect {
        Effect::Directory { path } => fs::create_dir(path).unwrap(),
        Effect::File { path } => fs::write(path, "x").unwrap(),
        Effect::Tree { path } => {
            fs::create_dir_all(path.join("made/by/the guest")).unwrap();
            fs::write(path.join("made/file"), "x").unwrap();
            std::os::unix::fs::symlink("/etc", path.join("made/link")).unwrap();
        }
        other => panic!("not part of this test: {other:?}"),
    }
}

/// Records and carries out `done` effects; then records one more that never happens when `torn_between` is set.
fn die_after(root: &Path, done: usize, torn_between: bool) -> PathBuf {
    let path = root.join("journal");
    let journal = Journal::create(&path).unwrap();
    let effects = effects(root);
    for effect in &effects[..done] {
        journal.record(effect.clone()).unwrap();
        carry_out(effect);
    }
    if let Some(effect) = effects.get(done)
        && torn_between
    {
        journal.record(effect.clone()).unwrap();
    }
    path
}

fn names(root: &Path) -> Vec<String> {
    fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_death_at_any_record_leaves_nothing_after_the_replay() {
    let count = effects(Path::new("/")).len();
    for done in 0..=count {
        for torn_between in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let path = die_after(root.path(), done, torn_between);
            let replay = replay(&path).unwrap();
            assert!(replay.found);
            assert!(replay.failures.is_empty(), "{:?}", replay.failures);
            assert_eq!(names(root.path()), Vec::<String>::new(), "died after {done}, torn {torn_between}");
        }
    }
}

#[test]
fn a_journal_torn_at_any_byte_is_replayed_up_to_there() {
    let count = effects(Path::new("/")).len();
    let whole = {
        let root = tempfile::tempdir().unwrap();
        fs::read(die_after(root.path(), count, false)).unwrap().len()
    };
    for cut in (0..whole).step_by(7) {
        let root = tempfile::tempdir().unwrap();
        let path = die_after(root.path(), count, false);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - cut.min(bytes.len())]).unwrap();
        // What the missing lines did is done by hand: a torn line means that its effect never happened.
        let lines = bytes[..bytes.len() - cut.min(bytes.len())].iter().filter(|byte| **byte == b'\n').count();
        let torn_line_is_whole = serde_json::from_slice::<serde_json::Value>(
            bytes[..bytes.len() - cut.min(bytes.len())].split(|byte| *byte == b'\n').next_back().unwrap(),
        )
        .is_ok();
        for effect in effects(root.path())[lines + usize::from(torn_line_is_whole)..].iter().rev() {
            effect.undo().unwrap();
        }
        let replay = replay(&path).unwrap();
        assert!(replay.failures.is_empty(), "{:?}", replay.failures);
        assert_eq!(names(root.path()), Vec::<String>::new());
    }
}

#[test]
fn a_missing_journal_is_an_empty_one() {
    let root = tempfile::tempdir().unwrap();
    let replay = replay(&root.path().join("journal")).unwrap();
    assert!(!replay.found);
    assert_eq!(replay.undone, 0);
}

#[test]
fn what_was_undone_is_not_undone_again() {
    let root = tempfile::tempdir().unwrap();
    let journal = Journal::create(&root.path().join("journal")).unwrap();
    let path = root.path().join("file");
    let id = journal.record(Effect::File { path: path.clone() }).unwrap();
    fs::write(&path, "mine").unwrap();
    journal.undo(id).unwrap();
    fs::write(&path, "somebody else's").unwrap();
    assert!(replay(&root.path().join("journal")).unwrap().failures.is_empty());
    assert!(path.exists());
}

#[test]
fn one_refused_step_stops_no_other_and_keeps_the_journal() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    let journal = Journal::create(&path).unwrap();
    for name in ["first", "second"] {
        journal.record(Effect::Directory { path: root.path().join(name) }).unwrap();
        fs::create_dir(root.path().join(name)).unwrap();
    }
    fs::write(root.path().join("second/unexpected"), "x").unwrap();
    let failed = replay(&path).unwrap();
    assert_eq!(failed.failures.len(), 1);
    assert!(failed.failures[0].to_string().contains("second"));
    assert!(!root.path().join("first").exists());
    fs::remove_file(root.path().join("second/unexpected")).unwrap();
    assert!(replay(&path).unwrap().failures.is_empty());
    assert_eq!(names(root.path()), Vec::<String>::new());
}

#[test]
fn a_recorded_process_is_ended_before_its_effects_are_undone() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    let journal = Journal::create(&path).unwrap();
    let mut child = Command::new("/bin/sleep").arg("600").spawn().unwrap();
    let process = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
    journal.record(Effect::Process { process }).unwrap();
    let replay = replay(&path).unwrap();
    assert!(replay.failures.is_empty());
    assert!(!process.is_alive());
    assert!(!child.wait().unwrap().success());
}

#[test]
fn mounts_are_undone_and_a_tree_is_never_removed_through_a_mount() {
    let root = tempfile::tempdir().unwrap();
    let precious = root.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("data"), "keep me").unwrap();
    let tree = root.path().join("tree");
    fs::create_dir_all(tree.join("bind")).unwrap();
    if let Err(error) = mount(Some(&precious), &tree.join("bind"), None::<&str>, MsFlags::MS_BIND, None::<&str>) {
        eprintln!("SKIPPED: this test needs the right to mount ({error})");
        return;
    }
    let refused = Effect::Tree { path: tree.clone() }.undo();
    assert!(refused.is_err());
    assert!(precious.join("data").exists());
    Effect::Mount { target: tree.join("bind") }.undo().unwrap();
    Effect::Mount { target: tree.join("bind") }.undo().unwrap();
    Effect::Tree { path: tree.clone() }.undo().unwrap();
    assert!(!tree.exists());
    assert!(precious.join("data").exists());
}

#[test]
fn replays_of_one_journal_follow_one_another() {
    let root = tempfile::tempdir().unwrap();
    let path = die_after(root.path(), 6, false);
    let replays: Vec<_> = (0..8)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || replay(&path).unwrap())
        })
        .collect();
    let replays: Vec<_> = replays.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert_eq!(replays.iter().map(|replay| replay.undone).filter(|undone| *undone > 0).collect::<Vec<_>>(), [6]);
    assert!(replays.iter().all(|replay| replay.failures.is_empty()));
    assert!(names(root.path()).is_empty());
}

#[test]
fn a_replay_that_is_not_wanted_any_more_touches_neither_the_process_nor_the_effects() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("journal");
    let mut owner = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
    let process = ProcessId::of(i32::try_from(owner.id()).unwrap()).unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    let journal = Journal::create(&path).unwrap();
    journal.record(Effect::Process { process }).unwrap();
    journal.record(Effect::File { path: file.clone() }).unwrap();
    let gone = journal.record(Effect::File { path: root.path().join("gone") }).unwrap();
    journal.undo(gone).unwrap();
    assert_eq!(journal::standing(&path).unwrap(), [Effect::Process { process }, Effect::File { path: file.clone() }]);

    let dead = |owners: &[ProcessId]| owners == [process] && !process.is_alive();
    assert!(journal::replay_if(&path, dead).unwrap().is_none());
    assert!(process.is_alive() && file.exists() && path.exists());
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert_eq!(journal::replay_if(&path, dead).unwrap().unwrap().undone, 2);
    assert!(!file.exists() && !path.exists());
    assert!(journal::standing(&path).unwrap().is_empty());
}
