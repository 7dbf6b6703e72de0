//! What is installed: checked, and told to containerd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::ctl::{Printed, command, run};
use crate::trial;

pub(crate) fn all() -> Vec<Trial> {
    vec![
        trial("an installation is checked, and each fault has its level and its remedy", checks),
        trial("containerd's configuration of version 2 gets the runtime once, and is as before afterwards", version_2),
        trial("containerd's configuration of version 3 gets a drop-in, and is as before afterwards", version_3),
        trial("a configuration that does not exist is made, and goes again", no_file),
        trial("a configuration that is not understood is left as it is", not_understood),
        trial("a handler that somebody else has made is left alone", theirs),
    ]
}

const MAIN: &str = "/etc/containerd/config.toml";
const DROP_IN: &str = "/etc/containerd/conf.d/kata.toml";

/// A system below a directory.
struct System(tempfile::TempDir);

impl System {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    /// All files below /etc.
    fn etc(&self) -> Vec<(String, String)> {
        let mut files = Vec::new();
        let mut directories = vec![self.path("/etc")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    directories.push(entry.path());
                } else {
                    let name = entry.path().strip_prefix(self.0.path()).unwrap().display().to_string();
                    files.push((name, fs::read_to_string(entry.path()).unwrap()));
                }
            }
        }
        files.sort();
        files
    }

    async fn ctl(&self, arguments: &[&str]) -> Printed {
        let destdir = self.0.path().display().to_string();
        let mut all = arguments.to_vec();
        all.extend(["--destdir", &destdir]);
        run(command(Path::new(""), &all)).await
    }

    async fn containerd(&self, action: &str) -> Printed {
        self.ctl(&["containerd", action]).await
    }

    /// The level and the text with the remedy of one finding.
    async fn check(&self, what: &str) -> (String, String) {
        let root = self.path("/run/kata").display().to_string();
        let printed = self.ctl(&["check", "--json", "--root", &root]).await;
        let findings = printed.json();
        let findings = findings.as_array().unwrap();
        let has_errors = findings.iter().any(|finding| finding["level"] == "error");
        assert_eq!(printed.code, i32::from(has_errors));
        let finding = findings.iter().find(|finding| finding["what"] == what).unwrap();
        assert_eq!(finding["level"] == "ok", finding["remedy"] == Value::Null, "{finding}");
        let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        (text("level"), text("text") + " " + &text("remedy"))
    }
}

async fn checks() {
    let system = System::new();
    let expect = async |what: &str, level: &str, part: &str| {
        let (found, text) = system.check(what).await;
        assert!(found == level && text.contains(part), "{what}: {found}: {text}");
    };
    expect("configuration", "error", "configuration.toml").await;
    expect("shim", "error", "--runtime-path").await;
    expect("containerd", "warning", "kata-ctl containerd add").await;
    expect("sandboxes", "ok", "0 run").await;

    system.write("/usr/share/defaults/kata-containers/configuration.toml", include_str!("../../configuration.toml"));
    expect("configuration", "ok", "configuration.toml").await;
    expect("guest kernel", "error", "vmlinux").await;
    expect("guest image", "error", "kata-containers.img").await;
    system.write("/usr/share/kata-containers/vmlinux", "no kernel, but longer than the place of its magic".repeat(20));
    expect("guest kernel", "error", "neither an ELF file nor a bzImage").await;
    system.write("/usr/share/kata-containers/vmlinux", "\x7fELF and so on");
    expect("guest kernel", "ok", "vmlinux").await;
    let mut image = vec![0; 4096];
    image[1024..1028].copy_from_slice(&[0xE2, 0xE1, 0xF5, 0xE0]);
    system.write("/usr/share/kata-containers/kata-containers.img", image);
    expect("guest image", "ok", "kata-containers.img").await;
    // The administrator's file goes before the installed one.
    system.write("/etc/kata-containers/configuration.toml", "[hypervisor.dragonball]\nkernl = 1\n");
    expect("configuration", "error", "line 2").await;
    fs::remove_file(system.path("/etc/kata-containers/configuration.toml")).unwrap();

    system.write("/usr/bin/containerd-shim-kata-v2", "");
    expect("shim", "error", "no directory of PATH").await;
    fs::set_permissions(system.path("/usr/bin/containerd-shim-kata-v2"), fs::Permissions::from_mode(0o755)).unwrap();
    expect("shim", "ok", "/usr/bin/containerd-shim-kata-v2").await;
    assert_eq!(system.containerd("add").await.code, 0);
    expect("containerd", "ok", "\"kata\"").await;
    let printed = system.ctl(&["containerd", "add", "--runtime-path", "/opt/kata/shim"]).await;
    assert_eq!(printed.code, 0, "{printed:?}");
    expect("shim", "error", "/opt/kata/shim").await;
    system.write(MAIN, "version = 2\ndisabled_plugins = [\"cri\"]\n");
    expect("containerd", "warning", "disabled_plugins").await;
    system.write(MAIN, "version = \n");
    expect("containerd", "error", "line 1").await;
    system.write(MAIN, "[plugins.cri]\n");
    expect("containerd", "warning", "containerd config migrate").await;
    // For people: a line for each, and its remedy below it.
    let text = system.ctl(&["check"]).await.out;
    assert!(
        text.contains("warning  containerd: ") && text.contains("\n         → containerd config migrate"),
        "{text}"
    );
    assert!(!text.contains('\x1b'));
}

async fn version_2() {
    let system = System::new();
    let before = "version = 2\n\n# mine\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause\"\n";
    system.write(MAIN, before);
    fs::set_permissions(system.path(MAIN), fs::Permissions::from_mode(0o640)).unwrap();
    let added = system.containerd("add").await;
    assert!(added.code == 0 && added.out.contains(MAIN) && added.out.contains("systemctl restart"), "{added:?}");
    let table: toml::Table = system.read(MAIN).parse().unwrap();
    let cri = &table["plugins"]["io.containerd.grpc.v1.cri"];
    assert_eq!(cri["sandbox_image"].as_str(), Some("pause"));
    let runtime = &cri["containerd"]["runtimes"]["kata"];
    assert_eq!(runtime["runtime_type"].as_str(), Some("io.containerd.kata.v2"));
    assert_eq!(runtime["pod_annotations"][0].as_str(), Some("io.katacontainers.*"));
    // containerd before 2.0 would have lost it: the defaults' runtimes are gone once one is named.
    assert_eq!(cri["containerd"]["runtimes"]["runc"]["runtime_type"].as_str(), Some("io.containerd.runc.v2"));
    assert!(system.read(MAIN).starts_with(before));
    assert_eq!(fs::metadata(system.path(MAIN)).unwrap().permissions().mode() & 0o7777, 0o640);
    assert_eq!(system.read(&format!("{MAIN}.before-kata")), before);
    assert!(!system.path(DROP_IN).exists());

    let after = system.etc();
    let again = system.containerd("add").await;
    assert!(again.out.contains("nothing changed"), "{again:?}");
    assert_eq!(system.etc(), after);
    assert_eq!(system.containerd("remove").await.code, 0);
    assert_eq!(system.etc(), [(MAIN[1..].to_owned(), before.to_owned())]);
    assert!(system.containerd("remove").await.out.contains("nothing changed"));
}

async fn version_3() {
    let system = System::new();
    for before in [
        "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'overlayfs'\n",
        "version = 3\nimports = ['/etc/containerd/other.toml']\n",
        "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n",
        "imports = [\"conf.d/*.toml\"]\nversion = 4\n",
    ] {
        system.write(MAIN, before);
        assert_eq!(system.containerd("add").await.code, 0, "{before}");
        let (main, drop_in): (toml::Table, toml::Table) =
            (system.read(MAIN).parse().unwrap(), system.read(DROP_IN).parse().unwrap());
        assert_eq!(drop_in["version"], main["version"]);
        let runtime = &drop_in["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]["kata"];
        assert_eq!(runtime["runtime_type"].as_str(), Some("io.containerd.kata.v2"));
        let imports = main["imports"].as_array().unwrap();
        assert!(imports.iter().any(|import| matches!(
            import.as_str(),
            Some(DROP_IN | "conf.d/*.toml" | "/etc/containerd/conf.d/*.toml")
        )));
        assert!(system.containerd("add").await.out.contains("nothing changed"));
        assert_eq!(system.containerd("remove").await.code, 0);
        assert_eq!(system.etc(), [(MAIN[1..].to_owned(), before.to_owned())]);
    }
}

async fn no_file() {
    let system = System::new();
    let shown = system.containerd("show").await.out;
    assert!(shown.starts_with("[plugins.\"io.containerd.grpc.v1.cri\""), "{shown}");
    assert!(system.etc().is_empty());
    system.containerd("add").await;
    let table: toml::Table = system.read(MAIN).parse().unwrap();
    assert_eq!(table["version"].as_integer(), Some(2));
    assert!(system.containerd("add").await.out.contains("nothing changed"));
    system.containerd("remove").await;
    assert!(system.etc().is_empty(), "{:?}", system.etc());

    // A containerd that reads drop-ins without a main file would not read them with one of ours.
    let other = "/etc/containerd/conf.d/other.toml";
    system.write(other, "version = 3\n");
    system.containerd("add").await;
    assert!(!system.path(MAIN).exists() && system.path(DROP_IN).exists());
    assert!(system.containerd("add").await.out.contains("nothing changed"));
    system.containerd("remove").await;
    assert_eq!(system.etc(), [(other[1..].to_owned(), "version = 3\n".to_owned())]);
}

async fn not_understood() {
    let system = System::new();
    for (before, part) in [
        ("version = 2\nkey =\n", "line 2"),
        ("[plugins.cri]\n", "containerd config migrate"),
        ("version = 3\nimports = 'one'\n", "by hand"),
        ("version = 2\nplugins = { 'io.containerd.grpc.v1.cri' = {} }\n", "by hand"),
    ] {
        system.write(MAIN, before);
        let refused = system.containerd("add").await;
        assert!(refused.code == 2 && refused.errors.contains(part), "{before}: {refused:?}");
        assert_eq!(system.etc(), [(MAIN[1..].to_owned(), before.to_owned())]);
    }
}

async fn theirs() {
    let system = System::new();
    let before = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\n  \
        runtime_type = \"io.containerd.kata.v2\"\n";
    system.write(MAIN, before);
    assert!(system.containerd("add").await.out.contains("there already"));
    assert!(system.containerd("remove").await.out.contains("nothing to take back"));
    assert_eq!(system.read(MAIN), before);
}
