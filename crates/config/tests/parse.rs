//! What the configuration file accepts, and what it says about everything else.
#![allow(clippy::unwrap_used, reason = "the helpers of tests fail by panicking")]

use std::path::Path;

use config::{Config, KEYS};
use rstest::rstest;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("/etc/c.toml")).map_err(|error| error.to_string())
}

#[test]
fn an_empty_file_gives_the_defaults() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn the_shipped_file_names_every_key_and_says_what_the_defaults_are() {
    let text = include_str!("../../../runtime-rs/configuration.toml");
    let mut expected = Config::default();
    assert_eq!(parse(text).unwrap(), expected);
    for key in KEYS {
        let short = key.name.rsplit('.').next().unwrap();
        assert!(text.lines().any(|line| line.starts_with(&format!("{short} = "))), "{} is not in the file", key.name);
    }
    // Equal because it is parsed, not because it is empty.
    expected.hypervisor.default_vcpus = 2;
    assert_eq!(parse(&text.replace("default_vcpus = 1", "default_vcpus = 2")).unwrap(), expected);
}

#[test]
fn every_key_reaches_its_field() {
    let config = parse(
        r#"
        [hypervisor.dragonball]
        kernel = "/k"
        image = "/i"
        kernel_params = "quiet"
        default_vcpus = 4
        default_maxvcpus = 6
        default_memory = 2048
        default_maxmemory = 4096
        enable_hugepages = true
        enable_annotations = ["default_.*"]
        enable_debug = true
        [agent.kata]
        enable_debug = true
        reconnect_timeout_ms = 1500
        create_container_timeout = 9
        [runtime]
        enable_debug = true
        static_sandbox_resource_mgmt = true
        vfio_mode = "guest-kernel"
        timeline_dir = "/t"
        "#,
    )
    .unwrap();
    assert_eq!(config.hypervisor.kernel, Path::new("/k"));
    assert_eq!(config.hypervisor.image, Path::new("/i"));
    assert_eq!(config.hypervisor.kernel_params, "quiet");
    assert_eq!((config.hypervisor.default_vcpus, config.hypervisor.default_memory), (4, 2048 << 20));
    assert_eq!((config.hypervisor.default_maxvcpus, config.hypervisor.default_maxmemory), (6, 4096 << 20));
    assert_eq!(config.hypervisor.enable_annotations, ["default_.*"]);
    assert!(config.runtime.static_sandbox_resource_mgmt && config.hypervisor.enable_hugepages);
    assert!(config.hypervisor.enable_debug && config.agent.enable_debug && config.runtime.enable_debug);
    assert_eq!(config.agent.reconnect_timeout.as_millis(), 1500);
    assert_eq!(config.agent.create_container_timeout.as_secs(), 9);
    assert_eq!(config.runtime.timeline_dir.as_deref(), Some(Path::new("/t")));
}

#[rstest]
#[case::misspelt("\n[hypervisor.dragonball]\nkernl = \"/k\"", &["line 3", "`hypervisor.dragonball.kernl`", "`kernel` in [hypervisor.dragonball]"])]
#[case::wrong_table("[runtime]\ndefault_memory = 1", &["`runtime.default_memory`", "`default_memory` in [hypervisor.dragonball]"])]
#[case::unknown_table("[hypervisr.dragonball]\nkernel = \"/k\"", &["line 1", "`hypervisr`", "hypervisor.dragonball"])]
#[case::other_hypervisor("[hypervisor.qemu]\nkernel = \"/k\"", &["`hypervisor.qemu`"])]
#[case::table_as_value("runtime = 1", &["`runtime`"])]
#[case::no_memory("[hypervisor.dragonball]\ndefault_memory = 0", &["line 2", "default_memory = 0", "64 MiB", "from 64 to"])]
#[case::too_much("[hypervisor.dragonball]\ndefault_memory = 104857600", &["104857600", "limit of 1048576 MiB"])]
#[case::negative("[hypervisor.dragonball]\ndefault_memory = -1", &["least of 64"])]
#[case::huge("[hypervisor.dragonball]\ndefault_memory = 99999999999999999999999999999999999999999999", &["limit of 1048576 MiB"])]
#[case::float("[hypervisor.dragonball]\ndefault_vcpus = 1.5", &["not a whole number"])]
#[case::vcpus("[hypervisor.dragonball]\ndefault_vcpus = 65", &["limit of 64 vCPUs"])]
#[case::relative("[hypervisor.dragonball]\nkernel = \"vmlinux\"", &["not an absolute path", "from /"])]
#[case::empty_path("[hypervisor.dragonball]\nimage = \"\"", &["not an absolute path"])]
#[case::no_string("[hypervisor.dragonball]\nkernel = 7", &["not a string", "double quotes"])]
#[case::no_flag("[runtime]\nenable_debug = \"yes\"", &["not a flag", "true or false"])]
#[case::vfio_mode("[runtime]\nvfio_mode = \"vfio\"", &["\"vfio\"", "driver in the guest's kernel", "write \"guest-kernel\""])]
#[case::no_list("[hypervisor.dragonball]\nenable_annotations = \"a\"", &["not a list", "[\"one\", \"two\"]"])]
#[case::no_strings("[hypervisor.dragonball]\nenable_annotations = [1]", &["not a list of strings"])]
#[case::no_pattern("[hypervisor.dragonball]\nenable_annotations = [\"(\"]", &["line 2", "regular expression"])]
#[case::syntax("[runtime]\nenable_debug = = 1", &["line 2", "TOML"])]
#[case::twice("[runtime]\nenable_debug = true\nenable_debug = true", &["line 3", "duplicate key"])]
fn a_bad_file_is_refused_with_its_line_the_limit_and_the_remedy(#[case] text: &str, #[case] parts: &[&str]) {
    let message = parse(text).unwrap_err();
    assert!(message.contains("/etc/c.toml"), "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn a_named_file_that_is_missing_is_not_replaced_by_another() {
    let message = Config::load(Some(Path::new("/nonexistent/c.toml"))).unwrap_err().to_string();
    assert!(message.contains("/nonexistent/c.toml") && message.contains("KATA_CONF_FILE"), "{message}");
}
