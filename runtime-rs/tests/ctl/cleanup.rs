//! Leftovers, planted and swept.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use journal::{Effect, Journal, ProcessId};
use libtest_mimic::Trial;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::ctl::Printed;
use crate::node::{Io, Node};
use crate::sandboxes::ctl;
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("the sandbox of a killed pod process is shown, and swept when asked", dead_sandbox),
        trial("what lives, begins, or is another's is left alone", left_alone),
        trial("mounts, state and sockets that no journal knows are swept", without_journal),
        trial("cgroups of ours that nobody is in are swept, others stay", cgroups),
        trial(
            "a step that fails is told, the others are done, and the exit code says that something is left",
            failures,
        ),
    ]
}

/// `cleanup` with no cgroups but those of the test.
async fn cleanup(node: &Node, more: &[&str]) -> Printed {
    let cgroups = node.path("cgroups").display().to_string();
    let mut arguments = vec!["cleanup", "--cgroups", &cgroups];
    arguments.extend(more);
    ctl(node, &arguments).await
}

/// Makes a file or directory look as if nobody had touched it for an hour.
fn age(path: &Path) {
    fs::File::open(path).unwrap().set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
}

fn tmpfs(on: &Path) {
    mount(Some("planted"), on, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

trait Made {
    fn made(self) -> Self;
}

impl Made for PathBuf {
    /// The path, after a directory was made there.
    fn made(self) -> Self {
        fs::create_dir_all(&self).unwrap();
        self
    }
}

async fn kill_pod(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    // A zombie is dead, too: its parent, this test, reaps it later. But its threads may take a moment.
    let process = ProcessId::of(pid).unwrap();
    tokio::task::spawn_blocking(move || process.end().unwrap()).await.unwrap();
}

async fn dead_sandbox() {
    let node = Node::new().await;
    let task = node.create("one", &["/bin/sleep", "600"], &Io::default()).await;
    kill_pod(task.pid().await).await;
    let before = node.leftovers();
    assert!(before.iter().any(|line| line.starts_with("mount")));

    let shown = cleanup(&node, &[]).await;
    assert_eq!(shown.code, 1, "{shown:?}");
    assert!(shown.out.contains("sandbox test/one, whose pod process"), "{shown:?}");
    assert!(shown.out.contains("3 × mount") && shown.out.contains("cleanup --yes"), "{shown:?}");
    let json = cleanup(&node, &["--json"]).await.json();
    assert_eq!((&json["found"][0]["kind"], &json["removed"]), (&json!("journal"), &json!([])));
    assert_eq!(json["found"], json["left"]);
    assert_eq!(node.leftovers(), before, "showing changed something");

    let swept = cleanup(&node, &["--yes"]).await;
    assert_eq!((swept.code, &*swept.errors), (0, ""), "{swept:?}");
    assert!(swept.out.starts_with("removed sandbox test/one"), "{swept:?}");
    node.expect_nothing_left().await;
    assert_eq!(cleanup(&node, &["--yes"]).await.out, "Nothing is left behind.\n");
    // What containerd does sooner or later.
    assert_eq!(node.delete("one").exit_status, 137);
}

async fn left_alone() {
    let node = Node::new().await;
    let task = node.create("lives", &["/bin/sleep", "600"], &Io::default()).await;
    task.start("").await.unwrap();
    // As others have it below /run.
    let other = node.root().join("0123abcd/root");
    fs::create_dir_all(other.join("mounts")).unwrap();
    fs::write(other.join("file"), "of another runtime").unwrap();
    tmpfs(&other.join("file-system-of-others").made());
    // As `start` has it in the instant before the pod process is in its journal.
    let begins = node.root().join("test/begins");
    fs::create_dir_all(&begins).unwrap();
    drop(Journal::create(&begins.join("journal")).unwrap());
    fs::create_dir_all(node.root().join("fresh/empty")).unwrap();
    for path in [&other, other.parent().unwrap()] {
        age(path);
    }

    let before = node.leftovers();
    let swept = cleanup(&node, &["--yes"]).await;
    assert_eq!((swept.code, &*swept.out), (0, "Nothing is left behind.\n"));
    assert_eq!(node.leftovers(), before);

    age(&begins.join("journal"));
    assert!(cleanup(&node, &[]).await.out.contains("test/begins, whose pod process never began"));
    assert_eq!(cleanup(&node, &["--yes"]).await.code, 0);
    assert!(!begins.exists());
    task.kill("", 9).await.unwrap();
    assert_eq!(task.wait("").await.unwrap(), 137);
    task.delete("").await.unwrap();
    task.shutdown().await;
    umount2(&other.join("file-system-of-others"), MntFlags::MNT_DETACH).unwrap();
    fs::remove_dir_all(node.root().join("0123abcd")).unwrap();
    fs::remove_dir_all(node.root().join("fresh")).unwrap();
    node.delete("lives");
    node.expect_nothing_left().await;
}

async fn without_journal() {
    let node = Node::new().await;
    let state = node.root().join("ns/gone");
    for name in ["mounts", "shared"] {
        tmpfs(&state.join(name).made());
    }
    tmpfs(&state.join("mounts/container with a blank/rootfs").made());
    fs::write(state.join("console.log"), "last words").unwrap();
    let sockets = node.root().join(".s/0123456789abcdef0123").made();
    fs::write(sockets.join("vsock"), "").unwrap();
    let empty = node.root().join("ns2/empty").made();
    for path in [&state, &empty, empty.parent().unwrap()] {
        age(path);
    }

    let shown = cleanup(&node, &[]).await;
    assert_eq!(shown.code, 1);
    for part in [
        "mount ".to_owned() + state.join("mounts/container with a blank/rootfs").to_str().unwrap(),
        format!("mount {}", state.join("shared").display()),
        format!("state directory {} without a journal", state.display()),
        format!("sockets {} of no sandbox", sockets.display()),
        format!("empty directory {}", empty.display()),
    ] {
        assert!(shown.out.contains(&part), "{part}: {}", shown.out);
    }
    let swept = cleanup(&node, &["--yes"]).await;
    assert_eq!(swept.code, 0, "{swept:?}");
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

/// A cgroup file system of this test.
struct Cgroups(PathBuf);

impl Cgroups {
    fn mount(node: &Node) -> Self {
        let path = node.path("cgroups").made();
        mount(Some("none"), &path, Some("cgroup2"), MsFlags::empty(), None::<&str>).unwrap();
        Self(path)
    }

    fn make(&self, name: &str, marked: bool) -> PathBuf {
        let path = self.0.join(name).made();
        if marked {
            let c_path = CString::new(path.to_str().unwrap()).unwrap();
            // SAFETY: both names are NUL-terminated and outlive the call; the value has the byte that its length says.
            let result = unsafe { libc::setxattr(c_path.as_ptr(), c"user.kata".as_ptr(), c"1".as_ptr().cast(), 1, 0) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        }
        path
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

async fn cgroups() {
    let node = Node::new().await;
    let cgroups = Cgroups::mount(&node);
    let base = format!("kata-ctl-test-{}", std::process::id());
    let make = |name: &str, marked| cgroups.make(&format!("{base}/{name}"), marked);
    let (parent, child) = (make("ours", true), make("ours/pod", true));
    let (used_parent, used) = (make("used", true), make("used/pod", true));
    let (mixed, foreign) = (make("mixed", true), make("mixed/foreign", false));
    let claimed = make("claimed", true);
    // A pod process that has just made its cgroup, and is not in it yet.
    let state = node.root().join("test/begins").made();
    let journal = Journal::create(&state.join("journal")).unwrap();
    journal.record(Effect::Process { process: ProcessId::current().unwrap() }).unwrap();
    journal.record(Effect::Cgroup { path: claimed.clone() }).unwrap();
    let mut sleeper = std::process::Command::new("/bin/sleep").arg("600").spawn().unwrap();
    fs::write(used.join("cgroup.procs"), sleeper.id().to_string()).unwrap();

    let found = cleanup(&node, &["--json"]).await.json()["found"].clone();
    let paths: Vec<&str> = found.as_array().unwrap().iter().map(|it| it["path"].as_str().unwrap()).collect();
    assert_eq!(paths, [child.to_str().unwrap(), parent.to_str().unwrap()]);
    assert_eq!(cleanup(&node, &["--yes"]).await.code, 0);
    assert!(!parent.exists());
    for path in [&used_parent, &used, &mixed, &foreign, &claimed] {
        assert!(path.exists(), "{}", path.display());
    }

    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    drop(journal);
    for path in [&used, &used_parent, &foreign, &mixed, &claimed, &cgroups.0.join(&base)] {
        fs::remove_dir(path).unwrap();
    }
}

async fn failures() {
    let node = Node::new().await;
    let task = node.create("one", &["/bin/sleep", "600"], &Io::default()).await;
    kill_pod(task.pid().await).await;
    // A file that the journal does not know: the directory cannot be removed, but all else can.
    let mounts = node.root().join("test/one/mounts");
    umount2(&mounts, MntFlags::MNT_DETACH).unwrap();
    umount2(&node.root().join("test/one/shared"), MntFlags::MNT_DETACH).unwrap();
    fs::write(mounts.join("unknown"), "").unwrap();

    let swept = cleanup(&node, &["--yes", "--json"]).await;
    assert_eq!(swept.code, 1);
    let json = swept.json();
    assert_eq!((&json["removed"], &json["left"][0]["id"]), (&json!([]), &json!("one")));
    let failed: Vec<&str> = json["failed"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(failed.len() == 1 && failed[0].contains(mounts.to_str().unwrap()), "{failed:?}");
    // The sockets were made before the directory, so they come after it.
    assert!(!node.leftovers().iter().any(|left| left.contains("/.s/")), "the step after the failure was not done");

    fs::remove_file(mounts.join("unknown")).unwrap();
    assert_eq!(cleanup(&node, &["--yes"]).await.code, 0);
    node.expect_nothing_left().await;
}
