//! Which annotations of a pod change its configuration, and what is said about the others.
#![allow(clippy::unwrap_used, reason = "the helpers of tests fail by panicking")]

use std::collections::HashMap;

use config::{ANNOTATION_PREFIX, Config};
use rstest::rstest;

fn annotated(config: Config, annotations: &[(&str, &str)]) -> Result<Config, String> {
    let mut config = config;
    let named = |(name, value): &(&str, &str)| (format!("{ANNOTATION_PREFIX}{name}"), (*value).to_owned());
    let mut annotations: HashMap<_, _> = annotations.iter().map(named).collect();
    annotations.insert("io.kubernetes.cri.sandbox-id".to_owned(), "of somebody else".to_owned());
    config.annotate(&annotations).map_err(|error| error.to_string())?;
    Ok(config)
}

fn enabling(patterns: &[&str]) -> Config {
    let mut config = Config::default();
    config.hypervisor.enable_annotations = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
    config
}

#[test]
fn every_annotation_reaches_its_field() {
    let mut config = enabling(&["default_.*", "kernel_params", "enable_hugepages"]);
    config.hypervisor.kernel_params = "quiet".to_owned();
    let config = annotated(
        config,
        &[
            ("hypervisor.default_vcpus", "3"),
            ("hypervisor.default_maxvcpus", "5"),
            ("hypervisor.default_memory", "512"),
            ("hypervisor.default_maxmemory", "2Gi"),
            ("hypervisor.enable_hugepages", "true"),
            ("hypervisor.kernel_params", "mitigations=off"),
            ("runtime.create_container_timeout", "7"),
        ],
    )
    .unwrap();
    assert_eq!((config.hypervisor.default_vcpus, config.hypervisor.default_maxvcpus), (3, 5));
    assert_eq!((config.hypervisor.default_memory, config.hypervisor.default_maxmemory), (512 << 20, 2 << 30));
    assert!(config.hypervisor.enable_hugepages);
    // To the administrator's words, not instead of them.
    assert_eq!(config.hypervisor.kernel_params, "quiet mitigations=off");
    assert_eq!(config.agent.create_container_timeout.as_secs(), 7);
}

#[test]
fn without_annotations_nothing_changes() {
    assert_eq!(annotated(Config::default(), &[]).unwrap(), Config::default());
}

#[rstest]
#[case::misspelt("hypervisor.default_vcpu", "2", &["sets nothing", "`io.katacontainers.config.hypervisor.default_vcpus`"])]
#[case::of_another_hypervisor("hypervisor.machine_type", "q35", &["hypervisor.machine_type", "sets nothing", "nearest"])]
#[case::a_path_of_the_host("hypervisor.kernel", "/tmp/evil", &["sets nothing"])]
#[case::not_enabled("hypervisor.default_maxvcpus", "2", &["not allowed", "[kernel_params, default_vcpus, default_memory]", "add \"default_maxvcpus\" there"])]
#[case::too_few("hypervisor.default_vcpus", "0", &["\"0\"", "less than the least of 1 vCPUs", "from 1 to 64"])]
#[case::too_many("hypervisor.default_vcpus", "65", &["more than the limit of 64 vCPUs"])]
#[case::fraction("hypervisor.default_vcpus", "1.5", &["not a whole number"])]
#[case::cpus_have_no_unit("hypervisor.default_vcpus", "1Gi", &["not a whole number"])]
#[case::too_little("hypervisor.default_memory", "1", &["less than the least of 64 MiB"])]
#[case::too_much("hypervisor.default_memory", "4096Gi", &["more than the limit of 1048576 MiB"])]
#[case::negative("hypervisor.default_memory", "-512", &["less than the least"])]
#[case::unit("hypervisor.default_memory", "512kB", &["not a whole number", "the unit Mi or Gi"])]
#[case::empty("hypervisor.default_memory", "", &["not a whole number"])]
fn what_cannot_be_applied_is_refused_by_name(#[case] name: &str, #[case] value: &str, #[case] parts: &[&str]) {
    let message = annotated(Config::default(), &[(name, value)]).unwrap_err();
    assert!(message.contains(name), "{message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn a_flag_is_true_or_false() {
    for (value, expected) in [("true", Some(true)), (" false ", Some(false)), ("yes", None), ("1", None), ("", None)] {
        let annotated = annotated(enabling(&["enable_hugepages"]), &[("hypervisor.enable_hugepages", value)]);
        match (annotated, expected) {
            (Ok(config), Some(expected)) => assert_eq!(config.hypervisor.enable_hugepages, expected),
            (Err(message), None) => assert!(message.contains("write true or false"), "{message}"),
            (other, _) => panic!("{value:?}: {other:?}"),
        }
    }
}

#[test]
fn a_value_that_is_too_long_is_refused_without_being_repeated() {
    let message = annotated(Config::default(), &[("hypervisor.kernel_params", &"x".repeat(5000))]).unwrap_err();
    assert!(message.contains("5000 bytes") && message.len() < 400, "{message}");
}

#[test]
fn enabled_annotations_are_whole_names() {
    let set = |patterns: &[&str]| annotated(enabling(patterns), &[("hypervisor.default_vcpus", "2")]);
    assert!(set(&["default"]).is_err());
    assert!(set(&["vcpus"]).is_err());
    assert!(set(&[]).is_err());
    assert!(set(&["a|default_vcpus"]).is_ok());
    assert!(set(&[".*"]).is_ok());
}
