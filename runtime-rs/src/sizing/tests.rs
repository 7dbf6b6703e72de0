//! Tables of what limits make of a machine.

use rstest::rstest;
use serde_json::json;

use super::*;

const MIB: u64 = 1 << 20;
const HOST: Host = Host { cpus: 8, memory: 16 << 30 };

fn config(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::default();
    change(&mut config);
    config
}

fn cpus(count: u64) -> Demand {
    Demand { cpu: count * MILLION, memory: 0 }
}

fn mib(count: u64) -> Demand {
    Demand { cpu: 0, memory: count * MIB }
}

#[rstest]
#[case::nothing(json!({}), Demand::default())]
#[case::two_and_a_half(json!({"cpu": {"quota": 250_000, "period": 100_000}}), Demand { cpu: 2_500_000, memory: 0 })]
#[case::default_period(json!({"cpu": {"quota": 150_000}}), Demand { cpu: 1_500_000, memory: 0 })]
#[case::zero_period(json!({"cpu": {"quota": 100_000, "period": 0}}), cpus(1))]
#[case::no_quota(json!({"cpu": {"quota": -1, "period": 100_000}}), Demand::default())]
#[case::shares_are_no_limit(json!({"cpu": {"shares": 1024}}), Demand::default())]
#[case::memory(json!({"memory": {"limit": 536_870_912}}), mib(512))]
#[case::no_memory_limit(json!({"memory": {"limit": -1}}), Demand::default())]
#[case::nonsense(json!({"cpu": {"quota": "many"}, "memory": 7}), Demand::default())]
fn limits_are_read_as_the_specification_writes_them(#[case] resources: Value, #[case] expected: Demand) {
    assert_eq!(Demand::of(&resources, Demand::default()), expected);
}

#[test]
fn an_update_keeps_what_it_does_not_name_and_lifts_what_it_says_is_unlimited() {
    let before = Demand { cpu: 2 * MILLION, memory: 512 * MIB };
    assert_eq!(Demand::of(&json!({"memory": {"limit": MIB}}), before), Demand { memory: MIB, ..before });
    assert_eq!(Demand::of(&json!({"cpu": {"quota": -1}}), before), Demand { cpu: 0, ..before });
    assert_eq!(Demand::of(&json!({"pids": {"limit": 5}}), before), before);
}

#[test]
fn an_orchestrator_announces_limits_says_that_there_are_none_or_says_nothing() {
    let announced = |pairs: &[(&str, &str)]| {
        Demand::of_sandbox(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    };
    assert_eq!(announced(&[]), None);
    assert_eq!(announced(&[(SANDBOX_QUOTA, "0"), (SANDBOX_PERIOD, "100000"), (SANDBOX_MEMORY, "0")]), Some(mib(0)));
    assert_eq!(
        announced(&[(SANDBOX_QUOTA, "220000"), (SANDBOX_PERIOD, "100000"), (SANDBOX_MEMORY, "1048576")]),
        Some(Demand { cpu: 2_200_000, memory: MIB })
    );
    assert_eq!(announced(&[(SANDBOX_QUOTA, "many"), (SANDBOX_MEMORY, "")]), None);
}

#[test]
fn fractions_of_cpus_add_up_before_they_are_rounded() {
    let third = Demand::of(&json!({"cpu": {"quota": 10_000, "period": 30_000}}), Demand::default());
    let range = Range::plan(&Config::default(), None, HOST).unwrap();
    assert_eq!(range.target(Demand::sum([third; 3].iter())).unwrap().vcpus, 2);
    assert_eq!(range.target(Demand::sum([third; 4].iter())).unwrap().vcpus, 3);
}

#[test]
fn limits_are_added_to_the_default_size() {
    let range = Range::plan(&Config::default(), None, HOST).unwrap();
    assert_eq!(range.target(Demand::default()).unwrap(), range.boot);
    let limits = Demand { cpu: 2 * MILLION, memory: 100 * MIB + 1 };
    assert_eq!(range.target(limits).unwrap(), Size { vcpus: 3, memory: (256 + 102) * MIB });
}

#[rstest]
#[case::known_to_be_unlimited(Some(Demand::default()), 1, 256 * MIB)]
#[case::nothing_said(None, 4, HOST.memory)]
#[case::cpu_only(Some(cpus(1)), 4, 256 * MIB)]
#[case::memory_only(Some(mib(100)), 1, HOST.memory)]
#[case::twice_what_is_announced(Some(cpus(2)), 6, 256 * MIB)]
#[case::not_more_than_the_host_has(Some(cpus(5)), 8, 256 * MIB)]
fn room_to_grow_is_made_where_it_may_be_needed(
    #[case] announced: Option<Demand>,
    #[case] vcpus: u8,
    #[case] memory: u64,
) {
    let range = Range::plan(&Config::default(), announced, HOST).unwrap();
    assert_eq!((range.max, range.boot.vcpus), (Size { vcpus, memory }, 1));
    assert_eq!(range.vcpus_can_come(), vcpus > 1);
}

#[test]
fn a_configured_maximum_is_the_room_whatever_is_announced() {
    let config = config(|config| {
        config.hypervisor.default_maxvcpus = 3;
        config.hypervisor.default_maxmemory = 512 * MIB;
    });
    let range = Range::plan(&config, Some(Demand::default()), HOST).unwrap();
    assert_eq!(range.max, Size { vcpus: 3, memory: 512 * MIB });
}

#[test]
fn what_the_host_has_is_enough_for_limits_that_are_more() {
    let range = Range::plan(&Config::default(), Some(Demand { cpu: 100 * MILLION, memory: 1 << 50 }), HOST).unwrap();
    assert_eq!(range.target(Demand { cpu: 100 * MILLION, memory: u64::MAX }).unwrap(), range.max);
    assert_eq!(range.max, Size { vcpus: HOST.cpus, memory: HOST.memory });
    let small = Host { cpus: 1, memory: 128 * MIB };
    let range = Range::plan(&Config::default(), Some(cpus(4)), small).unwrap();
    assert_eq!(range.target(cpus(4)).unwrap(), range.boot);
}

#[test]
fn limits_above_a_configured_maximum_are_refused_with_need_have_and_remedy() {
    let config = config(|config| {
        config.hypervisor.default_maxvcpus = 2;
        config.hypervisor.default_maxmemory = 300 * MIB;
    });
    let range = Range::plan(&config, None, HOST).unwrap();
    let text = range.target(cpus(2)).unwrap_err().to_string();
    assert!(
        text.contains("need 3 vCPUs") && text.contains("can have 2") && text.contains("default_maxvcpus"),
        "{text}"
    );
    let text = range.target(mib(64)).unwrap_err().to_string();
    assert!(
        text.contains("need 320 MiB") && text.contains("have 300 MiB") && text.contains("default_maxmemory"),
        "{text}"
    );
    // Before a machine is started.
    assert!(Range::plan(&config, Some(mib(64)), HOST).is_err());
}

#[test]
fn a_machine_without_room_takes_limits_that_it_satisfies() {
    let range = Range::plan(&Config::default(), Some(Demand::default()), HOST).unwrap();
    assert_eq!(range.target(Demand { cpu: MILLION / 2, memory: 128 * MIB }), Ok(range.boot));
    assert_eq!(range.target(Demand { cpu: MILLION, memory: 256 * MIB }), Ok(range.boot));
    assert!(matches!(range.target(cpus(2)), Err(SizeError::Vcpus { needed: 3, .. })));
    assert!(matches!(range.target(mib(257)), Err(SizeError::Memory { .. })));
}

#[test]
fn a_machine_of_fixed_size_has_what_was_announced_and_stays_so() {
    let config = config(|config| config.runtime.static_sandbox_resource_mgmt = true);
    let announced = Demand { cpu: 1_200_000, memory: 512 * MIB };
    let range = Range::plan(&config, Some(announced), HOST).unwrap();
    let size = Size { vcpus: 3, memory: 768 * MIB };
    assert_eq!((range.boot, range.max), (size, size));
    assert_eq!(range.target(cpus(100)), Ok(size));
}

#[test]
fn a_maximum_below_the_default_is_refused() {
    let vcpus = config(|config| (config.hypervisor.default_vcpus, config.hypervisor.default_maxvcpus) = (4, 2));
    let memory = config(|config| config.hypervisor.default_maxmemory = 128 * MIB);
    for (config, key) in [(vcpus, "default_maxvcpus"), (memory, "default_maxmemory")] {
        let text = Range::plan(&config, None, HOST).unwrap_err().to_string();
        assert!(text.contains(key) && text.contains("raise it"), "{text}");
    }
}
