//! What a container may and may not: user, capabilities, seccomp, limits, paths, namespaces, hooks.

use serde_json::json;

use crate::harness::{Host, Stdio, privileged, process, shell, spec, unique, within};

/// Lets everything but mkdir, which gets "Operation not permitted".
fn no_mkdir() -> serde_json::Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    })
}

#[tokio::test]
async fn a_process_is_who_where_and_what_its_spec_says() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let mut process =
        shell("id -u; id -g; id -G; pwd; echo $HOME; echo $COLOUR; ulimit -n; umask; grep CapEff /proc/self/status");
    process["user"] = json!({"uid": 33, "gid": 34, "additionalGids": [35, 36], "umask": 0o27});
    process["cwd"] = "/etc".into();
    process["env"].as_array_mut().expect("env").push("COLOUR=red".into());
    let (status, stdout, stderr) = host.run(&unique("who"), &spec(process)).await;
    let expected = "33\n34\n34 35 36\n/etc\n/srv/www\nred\n1024\n0027\nCapEff:\t0000000000000000\n";
    assert_eq!((status, stdout.as_str(), stderr.as_str()), (0, expected, ""));
}

#[tokio::test]
async fn signals_that_the_runtime_ignores_are_default_again() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let (_, stdout, _) =
        host.run(&unique("signals"), &spec(process(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]))).await;
    assert_eq!(stdout, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

#[tokio::test]
async fn root_in_a_container_has_the_capabilities_of_its_spec_and_no_more() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("caps");
    let mut long = shell("grep CapEff /proc/self/status; while :; do sleep 1000; done");
    long["noNewPrivileges"] = false.into();
    let stdio = Stdio::default();
    host.create(&id, &spec(long), &stdio).await.expect("create");
    host.begin(&id, "").await.expect("start");
    // containerd's fourteen defaults.
    let default = "CapEff:\t00000000a80425fb\n";
    assert_eq!(host.run_exec(&id, &shell("grep CapEff /proc/self/status")).await, (0, default.into()));
    let mut bare = process(&["grep", "Cap", "/proc/self/status"]);
    bare["capabilities"] = json!({});
    let (_, text) = host.run_exec(&id, &bare).await;
    let zero = "0000000000000000";
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(text.contains(&format!("{set}:\t{zero}\n")), "{text}");
    }
}

#[tokio::test]
async fn seccomp_holds_for_the_first_and_for_further_processes() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    for no_new_privileges in [true, false] {
        let id = unique("seccomp");
        let with_flag = |mut process: serde_json::Value| {
            process["noNewPrivileges"] = no_new_privileges.into();
            process
        };
        let mut spec =
            spec(with_flag(shell("busybox mkdir /tmp/a; echo $? > /tmp/first; while :; do sleep 1000; done")));
        spec["linux"]["seccomp"] = no_mkdir();
        host.create(&id, &spec, &Stdio::default()).await.expect("create");
        host.begin(&id, "").await.expect("start");
        let (status, text) =
            host.run_exec(&id, &with_flag(shell("busybox mkdir /tmp/b; grep Seccomp: /proc/self/status"))).await;
        assert_eq!(status, 0);
        assert!(text.contains("Operation not permitted") && text.contains("Seccomp:\t2"), "{text}");
        let mut other = with_flag(shell("busybox mkdir /tmp/c; id -u"));
        other["user"] = json!({"uid": 33, "gid": 33});
        let (_, text) = host.run_exec(&id, &other).await;
        assert!(text.contains("Operation not permitted") && text.contains("33\n"), "{text}");
        assert!(!host.directory.path().join(&id).join("tmp/a").exists(), "the first process has the filter too");
    }
}

#[tokio::test]
async fn masked_and_read_only_paths_are_so() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let script = "cat /proc/kcore | busybox wc -c; echo x > /proc/sys/kernel/domainname; echo $?; cat /proc/keys | busybox wc -c";
    let (_, stdout, stderr) = host.run(&unique("paths"), &spec(shell(script))).await;
    assert_eq!(stdout, "0\n1\n0\n");
    assert!(stderr.contains("Read-only file system"), "{stderr}");
}

#[tokio::test]
async fn a_read_only_root_refuses_writes() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let mut spec = spec(shell("echo x > /x"));
    spec["root"]["readonly"] = true.into();
    let (status, _, stderr) = host.run(&unique("ro"), &spec).await;
    assert_eq!((status, stderr.contains("Read-only file system")), (1, true), "{stderr}");
}

#[tokio::test]
async fn a_container_sees_its_own_processes_and_its_own_cgroup_only() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let (_, stdout, _) = host.run(&unique("own"), &spec(shell("echo $$; cat /proc/self/cgroup | grep ^0"))).await;
    assert_eq!(stdout, "1\n0::/\n");
}

#[tokio::test]
async fn an_output_can_be_opened_again_by_the_user_of_the_process() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let mut process = shell("echo again > /proc/self/fd/1");
    process["user"] = json!({"uid": 33, "gid": 33});
    let (status, stdout, stderr) = host.run(&unique("reopen"), &spec(process)).await;
    assert_eq!((status, stdout.as_str(), stderr.as_str()), (0, "again\n", ""));
}

#[tokio::test]
async fn hooks_run_at_their_stages() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("hooks");
    let log = host.directory.path().join("hooks");
    let hook = |stage: &str| {
        json!([{"path": "/bin/busybox", "args": ["sh", "-c", format!("echo {stage} >> {}", log.display())],
                "env": ["PATH=/bin:/usr/bin"]}])
    };
    let mut spec = spec(shell("exit 0"));
    spec["hooks"] = json!({
        "createRuntime": hook("createRuntime"), "poststart": hook("poststart"), "poststop": hook("poststop"),
    });
    host.run(&id, &spec).await;
    let ran = std::fs::read_to_string(&log).expect("the hooks' log");
    assert_eq!(ran, "createRuntime\npoststart\npoststop\n");
}

#[tokio::test]
async fn a_program_that_the_kernel_refuses_is_named_on_stderr() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("format");
    let rootfs = host.rootfs_mount(&id);
    let broken = host.directory.path().join(&id).join("bin/broken");
    std::fs::write(&broken, "\u{7f}ELF is not enough").expect("a file");
    std::fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    let stdio = Stdio::outputs();
    host.create_with(&id, &spec(process(&["broken"])), &stdio, rootfs).await.expect("create");
    host.begin(&id, "").await.expect("start");
    assert_eq!(host.wait(&id, "").await.expect("wait"), 255);
    assert_eq!(host.outputs(&stdio).await.1, "exec /bin/broken: Exec format error\n");
}

#[tokio::test]
async fn a_device_that_no_rule_allows_can_be_made_but_not_used() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    if !std::fs::read_to_string("/proc/misc").is_ok_and(|misc| misc.contains("229 fuse")) {
        eprintln!("SKIPPED: this kernel has no /dev/fuse, the one device that anybody may open");
        return;
    }
    let script = "busybox mknod /tmp/fuse c 10 229 && echo x > /dev/null && exec 3<>/tmp/fuse";
    let deny = json!({"allow": false, "access": "rwm"});
    let mut spec = spec(shell(script));
    spec["linux"]["resources"] = json!({"devices": [deny]});
    let (status, _, stderr) = host.run(&unique("denied"), &spec).await;
    assert_eq!((status, stderr.contains("Operation not permitted")), (1, true), "{stderr}");
    spec["linux"]["resources"] =
        json!({"devices": [deny, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}]});
    let (status, _, stderr) = host.run(&unique("allowed"), &spec).await;
    assert_eq!(status, 0, "{stderr}");
}

#[tokio::test]
async fn a_further_process_joins_the_cgroup_that_the_first_has_moved_to() {
    if !privileged() {
        return;
    }
    let mut host = Host::start().await;
    let id = unique("moved");
    let script =
        "busybox mkdir /sys/fs/cgroup/sub && echo 1 > /sys/fs/cgroup/sub/cgroup.procs && echo moved; sleep 1000";
    let mut spec = spec(shell(script));
    spec["mounts"].as_array_mut().expect("mounts").push(json!(
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "rw"]}
    ));
    let stdio = Stdio { stdout: Stdio::outputs().stdout, ..Stdio::default() };
    host.create(&id, &spec, &stdio).await.expect("create");
    host.begin(&id, "").await.expect("start");
    let mut stdout = host.stream(stdio.stdout.expect("a stream")).await;
    let mut moved = [0; 6];
    within(tokio::io::AsyncReadExt::read_exact(&mut stdout, &mut moved)).await.expect("moved");
    assert_eq!(host.run_exec(&id, &shell("grep ^0 /proc/self/cgroup")).await, (0, "0::/sub\n".into()));
    host.kill(&id, "", 9).await.expect("kill");
    host.wait(&id, "").await.expect("wait");
    host.delete(&id, "").await.expect("delete removes the nested cgroup too");
    assert!(!host.list("/sys/fs/cgroup").contains(&id));
}
