//! Restores a real machine and uses it as the suites do. Builds the machine first if it is not in the cache.

#![expect(clippy::unwrap_used, reason = "a failure in a test's helper fails the test")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use lab::{Command, Error, Event, Input, Machine, Setup, Snapshot, Status};
use sha2::{Digest, Sha256};

/// Bytes that no compression shortens, the same in each run.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(length)
    .collect()
}

fn machine(name: &str) -> Machine {
    Machine::restore(Snapshot::Base, &format!("test-{name}-{}", std::process::id())).unwrap()
}

fn shell(machine: &Machine, script: &str) -> lab::Output {
    machine.run(&Command::shell(script).limit(Duration::from_secs(120)), Input::Empty).unwrap()
}

#[test]
fn commands_answer_with_their_output_and_status() {
    let machine = machine("status");
    for (script, code) in [("true", 0), ("exit 42", 42), ("exit 255", 255), ("kill -9 $$", 137), ("nosuch", 127)] {
        assert_eq!(shell(&machine, script).status.code(), code, "{script}");
    }
    let output = shell(&machine, "echo out; echo err >&2");
    assert_eq!((output.text().as_str(), output.stderr.as_slice()), ("out\n", b"err\n".as_slice()));
    let missing = machine.run(&Command::new("/no/such/program"), Input::Empty);
    assert!(matches!(missing, Err(Error::Refused { errno: Some(libc::ENOENT), .. })), "{missing:?}");
    let there = Command::shell("pwd; echo $COLOR").directory("/usr").env("COLOR", "blue");
    assert_eq!(machine.run(&there, Input::Empty).unwrap().text(), "/usr\nblue\n");
}

#[test]
fn input_arrives_whole_and_ends() {
    let machine = machine("input");
    let bytes = noise(5_000_000);
    let output = machine.run(&Command::new("sha256sum"), Input::Bytes(bytes.clone())).unwrap();
    let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(output.text().split(' ').next(), Some(sum.as_str()));
    let echoed = machine.run(&Command::new("cat"), Input::Bytes(bytes.clone())).unwrap();
    assert!(echoed.stdout == bytes, "{} of {} bytes came back", echoed.stdout.len(), bytes.len());
    // More than fits on the way, to a command that reads none of it.
    let unread = machine.run(&Command::shell("exit 3"), Input::Bytes(bytes)).unwrap();
    assert_eq!(unread.status, Status::Exited(3));
}

#[test]
fn signals_pass_input_that_nobody_reads() {
    let machine = machine("signal");
    let command = Command::shell("trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 1; done");
    let mut process = machine.spawn(&command, Input::Reader(Box::new(std::io::repeat(b'x')))).unwrap();
    assert_eq!(process.next_event().unwrap(), Event::Stdout(b"ready\n".to_vec()));
    process.handle().signal(libc::SIGTERM).unwrap();
    let output = process.output().unwrap();
    assert_eq!((output.text().as_str(), output.status), ("caught\n", Status::Exited(7)));
}

#[test]
fn a_commands_session_ends_with_its_driver_and_daemons_stay() {
    let machine = machine("session");
    let script =
        "setsid sleep 4711 & until [ $(ps -o sid= -p $!) = $! ]; do :; done; sleep 4712 & echo ready; sleep 4713";
    let mut process = machine.spawn(&Command::shell(script), Input::Empty).unwrap();
    assert_eq!(process.next_event().unwrap(), Event::Stdout(b"ready\n".to_vec()));
    drop(process);
    // The next session on the same port begins after the former one was ended.
    let left = shell(&machine, "pgrep -a sleep").text();
    assert!(left.contains("4711") && !left.contains("4712") && !left.contains("4713"), "{left}");
}

#[test]
fn a_command_above_its_limit_is_killed_and_the_machine_goes_on() {
    let machine = machine("limit");
    let late = machine.run(&Command::new("sleep").arg("4714").limit(Duration::from_millis(200)), Input::Empty);
    assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
    assert_eq!(shell(&machine, "pgrep -x sleep || echo none").text(), "none\n");
}

#[test]
fn what_a_command_wrote_before_its_end_is_not_lost_to_a_background_child() {
    let machine = machine("background");
    let output = shell(&machine, "sleep 4715 & head -c 60000 /dev/zero; exit 5");
    assert_eq!((output.stdout.len(), output.status), (60_000, Status::Exited(5)));
}

#[test]
fn many_commands_run_at_once() {
    let machine = machine("parallel");
    std::thread::scope(|scope| {
        // More than there are ports: the last ones wait for a free one.
        for number in 0..12 {
            let machine = &machine;
            scope.spawn(move || {
                let output = machine.run(&Command::new("cat"), Input::from(format!("{number}").as_str())).unwrap();
                assert_eq!(output.text(), number.to_string());
            });
        }
    });
}

#[test]
fn files_arrive_as_they_were() {
    let machine = machine("files");
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(20_000_000);
    let file = dir.path().join("big file");
    fs::write(&file, &bytes).unwrap();
    machine.push(&file, "/root/new/dir/copy").unwrap();
    let back = dir.path().join("back");
    machine.pull("/root/new/dir/copy", &back).unwrap();
    assert!(fs::read(&back).unwrap() == bytes);
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("usr/bin")).unwrap();
    fs::write(tree.join("usr/bin/hello"), "#!/bin/sh\necho hello\n").unwrap();
    fs::set_permissions(tree.join("usr/bin/hello"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("hello", tree.join("usr/bin/hallo")).unwrap();
    machine.push(&tree, "/").unwrap();
    assert_eq!(shell(&machine, "hallo && stat -c %u /usr/bin/hello").text(), "hello\n0\n");
    machine.pull("/usr/share/base-passwd", Path::new(&format!("{}/", dir.path().display()))).unwrap();
    assert!(dir.path().join("base-passwd/passwd.master").is_file());
    let missing = machine.pull("/no/such/file", &dir.path().join("missing"));
    assert!(matches!(missing, Err(Error::Command { .. })), "{missing:?}");
}

#[test]
fn a_terminal_has_its_size_and_echoes() {
    let machine = machine("terminal");
    let (reader, mut writer) = std::io::pipe().unwrap();
    let command = Command::shell("stty size; read -r line; echo got $line").terminal(33, 77);
    let process = machine.spawn(&command, Input::Reader(Box::new(reader))).unwrap();
    writer.write_all(b"word\n").unwrap();
    let output = process.output().unwrap();
    assert_eq!(output.text().replace("word\r\n33 77", "33 77\r\nword"), "33 77\r\nword\r\ngot word\r\n");
}

#[test]
fn machines_are_apart_and_gone_when_dropped() {
    let (first, second) = (machine("first"), machine("second"));
    shell(&first, "echo mine > /root/mark").check().unwrap();
    assert_eq!(shell(&second, "cat /root/mark").status.code(), 1);
    let name = first.name().to_owned();
    let again = Machine::restore(Snapshot::Base, &name);
    assert!(matches!(again, Err(Error::Runs(_))), "{again:?}");
    assert!(Machine::list().unwrap().iter().any(|(listed, _)| *listed == name));
    drop(first);
    assert!(!Machine::list().unwrap().iter().any(|(listed, _)| *listed == name));
    assert!(matches!(Machine::attach(&name), Err(Error::NotRunning(_))));
}

#[test]
fn the_machines_kvm_is_hardware_virtualization() {
    let machine = machine("kvm");
    machine.push(Path::new(env!("CARGO_BIN_EXE_lab")), "/root/lab").unwrap();
    let output =
        machine.run(&Command::new("/root/lab").args(["probe", "--json"]), Input::Empty).unwrap().check().unwrap();
    let probe: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&probe["module"], &probe["cpu"]), (&"kvm_amd".into(), &"svm".into()), "{probe:#}");
    assert!(probe["instructions_per_second"].is_u64(), "{probe:#}");
}

#[test]
fn a_setup_is_done_once_and_found_in_each_machine() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "content").unwrap();
    let count = "echo done >> /root/log; mount -t tmpfs mark /mnt; setsid sleep 4716 < /dev/null > /dev/null 2>&1 &";
    let setup = Setup::new().push(&file, "/root/").run(Command::shell(count));
    setup.forget(Snapshot::Base).unwrap();
    for turn in 0..2 {
        let name = format!("test-setup{turn}-{}", std::process::id());
        let machine = Machine::restore_with(Snapshot::Base, &setup, &name).unwrap();
        assert_eq!(shell(&machine, "cat /root/log").text(), "done\n");
        assert_eq!(shell(&machine, "cat /root/file").stdout, fs::read(&file).unwrap());
        // Not only files: mounts and processes are in it too.
        assert!(shell(&machine, "pgrep -f '[s]leep 4716' && mountpoint /mnt").success());
        shell(&machine, "echo more >> /root/log").check().unwrap();
    }
    setup.forget(Snapshot::Base).unwrap();
    let failing = Machine::restore_with(Snapshot::Base, &setup.run(Command::shell("exit 9")), "test-failing");
    assert!(matches!(failing, Err(Error::Command { code: 9, .. })), "{failing:?}");
}

#[test]
fn a_paused_machine_says_so() {
    let machine = machine("paused");
    machine.pause().unwrap();
    assert!(!machine.running());
    let refused = machine.run(&Command::new("true"), Input::Empty);
    assert!(matches!(refused, Err(Error::Paused(_))), "{refused:?}");
    machine.resume().unwrap();
    assert!(shell(&machine, "true").success());
}

#[test]
fn a_reader_that_comes_late_gets_everything() {
    let machine = machine("slow");
    let process = machine.spawn(&Command::shell("exec head -c 32000000 /dev/zero"), Input::Empty).unwrap();
    // All that lies between the command and this process is full when the command waits for its pipe.
    let until_stuck = "until grep -q pipe_write /proc/$(pgrep -x head)/wchan; do :; done";
    shell(&machine, until_stuck).check().unwrap();
    let output = process.output().unwrap();
    assert_eq!((output.stdout.len(), output.status), (32_000_000, Status::Exited(0)));
}
