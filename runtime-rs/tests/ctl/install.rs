//! `deploy/install.sh`, which `make install` and `make uninstall` run, below a directory.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use libtest_mimic::Trial;

use crate::ctl::{command, run};
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("an installation is complete, is replaced by the next one, and goes without a trace", usual),
        trial("another prefix is told to the runtime and to containerd", other_prefix),
        trial("files of others and the administrator's configuration stay", others),
        trial("an incomplete tree and a bad prefix are refused before anything is changed", refusals),
    ]
}

struct Target(tempfile::TempDir);

impl Target {
    fn new() -> Self {
        let target = Self(tempfile::tempdir().unwrap());
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&[0xE2, 0xE1, 0xF5, 0xE0]);
        target.stage("bin/containerd-shim-kata-v2", b"the shim");
        target.stage("bin/dragonball", b"the monitor");
        target.stage("bin/kata-ctl", &fs::read(env!("CARGO_BIN_EXE_kata-ctl")).unwrap());
        target.stage("share/kata-containers/vmlinux", b"\x7fELF and so on");
        target.stage("share/kata-containers/kata-containers.img", &image);
        target.stage("share/defaults/kata-containers/configuration.toml", include_bytes!("../../configuration.toml"));
        fs::create_dir(target.path("")).unwrap();
        target
    }

    fn stage(&self, path: &str, bytes: &[u8]) {
        let path = self.0.path().join("dist/usr").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join("root").join(path.trim_start_matches('/'))
    }

    fn script(&self, action: &str, variables: &[(&str, &str)]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/install.sh");
        let mut command = Command::new(script);
        command.arg(action).env("DIST", self.0.path().join("dist")).env("DESTDIR", self.path(""));
        command.envs(variables.iter().copied()).output().unwrap()
    }

    fn good(&self, action: &str, variables: &[(&str, &str)]) -> String {
        let output = self.script(action, variables);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Files and links below the root, with their permissions.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut directories = vec![self.path("")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    directories.push(entry.path());
                } else {
                    let mode = entry.metadata().unwrap().permissions().mode() & 0o7777;
                    let path = entry.path().strip_prefix(self.path("")).unwrap().display().to_string();
                    files.push(format!("{path} {mode:o}"));
                }
            }
        }
        files.sort();
        files
    }

    /// What `kata-ctl check` finds wrong with what is installed here.
    async fn faults(&self) -> Vec<String> {
        let destdir = self.path("").display().to_string();
        let mut check = command(Path::new(""), &["check", "--json", "--root", &destdir, "--destdir", &destdir]);
        check.env("PATH", "/usr/bin");
        let printed = run(check).await;
        let findings = printed.json();
        let ours = ["configuration", "guest kernel", "guest image", "shim", "containerd"];
        let of_files = findings.as_array().unwrap().iter().filter(|it| ours.contains(&it["what"].as_str().unwrap()));
        of_files.filter(|it| it["level"] != "ok").map(ToString::to_string).collect()
    }
}

const USUAL: [&str; 6] = [
    "usr/bin/containerd-shim-kata-v2 755",
    "usr/bin/dragonball 755",
    "usr/bin/kata-ctl 755",
    "usr/share/defaults/kata-containers/configuration.toml 644",
    "usr/share/kata-containers/kata-containers.img 644",
    "usr/share/kata-containers/vmlinux 644",
];

async fn usual() {
    let target = Target::new();
    let said = target.good("install", &[]);
    assert!(said.contains("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]"), "{said}");
    assert_eq!(target.files(), USUAL);
    let faults = target.faults().await;
    assert!(faults.len() == 1 && faults[0].contains("kata-ctl containerd add"), "{faults:?}");

    // A pod that runs has the kernel open.
    let mut open = fs::File::open(target.path("usr/share/kata-containers/vmlinux")).unwrap();
    target.stage("share/kata-containers/vmlinux", b"\x7fELF, a newer one");
    let said = target.good("install", &[("CONTAINERD", "1")]);
    assert!(said.contains("changed /etc/containerd/config.toml"), "{said}");
    assert_eq!(fs::read(target.path("usr/share/kata-containers/vmlinux")).unwrap(), b"\x7fELF, a newer one");
    let mut old = Vec::new();
    open.read_to_end(&mut old).unwrap();
    assert_eq!(old, b"\x7fELF and so on");
    assert_eq!(target.faults().await, Vec::<String>::new());
    assert!(target.good("install", &[("CONTAINERD", "1")]).contains("nothing changed"));

    target.good("uninstall", &[]);
    assert_eq!(target.files(), Vec::<String>::new());
    assert!(!target.path("usr/share/kata-containers").exists());
    target.good("uninstall", &[]);
}

async fn other_prefix() {
    let target = Target::new();
    let variables = [("PREFIX", "/opt/tatami"), ("CONTAINERD", "1")];
    target.good("install", &variables);
    let link = target.path("etc/kata-containers/configuration.toml");
    let configuration = "/opt/tatami/share/defaults/kata-containers/configuration.toml";
    assert_eq!(fs::read_link(&link).unwrap(), Path::new(configuration));
    let text = fs::read_to_string(target.path(configuration)).unwrap();
    assert!(
        text.contains("kernel = \"/opt/tatami/share/kata-containers/vmlinux\"") && !text.contains("/usr/share/kata")
    );
    let containerd = fs::read_to_string(target.path("etc/containerd/config.toml")).unwrap();
    assert!(containerd.contains("runtime_path = \"/opt/tatami/bin/containerd-shim-kata-v2\""), "{containerd}");
    // The link is one of the installed system: read from outside, it leads nowhere.
    fs::remove_file(&link).unwrap();
    fs::copy(target.path(configuration), &link).unwrap();
    assert_eq!(target.faults().await, Vec::<String>::new());
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(configuration, &link).unwrap();

    target.good("uninstall", &variables[..1]);
    assert_eq!(target.files(), Vec::<String>::new());
    assert!(!target.path("opt/tatami").exists() && !target.path("etc/kata-containers").exists());
}

async fn others() {
    let target = Target::new();
    for path in ["etc/kata-containers/configuration.toml", "usr/share/kata-containers/theirs", "opt/tatami/bin/theirs"]
    {
        fs::create_dir_all(target.path(path).parent().unwrap()).unwrap();
        fs::write(target.path(path), "precious").unwrap();
    }
    let before = target.files();
    for variables in [[("PREFIX", "/usr")], [("PREFIX", "/opt/tatami")]] {
        target.good("install", &variables);
        assert_eq!(fs::read(target.path("etc/kata-containers/configuration.toml")).unwrap(), b"precious");
        target.good("uninstall", &variables);
        assert_eq!(target.files(), before);
    }
}

async fn refusals() {
    let target = Target::new();
    for (variables, part) in [
        ([("PREFIX", "opt")], "absolute"),
        ([("PREFIX", "/opt/a|b")], "characters"),
        ([("DIST", "/nonexistent")], "make dist"),
        ([("DIST", "")], "make dist"),
    ] {
        let refused = target.script("install", &variables);
        let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(1) && errors.contains(part), "{variables:?}: {errors}");
    }
    fs::remove_file(target.0.path().join("dist/usr/share/kata-containers/kata-containers.img")).unwrap();
    assert!(!target.script("install", &[]).status.success());
    assert!(!target.script("", &[]).status.success());
    assert_eq!(target.files(), Vec::<String>::new());
}
