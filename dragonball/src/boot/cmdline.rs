//! The kernel command line: the machine's own part, then the user's.

use crate::config::{ConsoleOutput, MachineConfig};

/// What every guest gets. Each word saves time or memory, or makes a failure visible:
/// - `panic=-1` restarts at once after a panic, which ends the machine;
/// - `random.trust_cpu=on`, `cryptomgr.notests`: no wait for entropy, no self-tests;
/// - `tsc=reliable`, `no_timer_check`: there is no second clock to check the TSC against;
/// - `rcupdate.rcu_expedited=1`: boot waits for few grace periods;
/// - `swiotlb=noforce`: no bounce buffers, which would take 64 MiB;
/// - `quiet`: printing costs an exit per chunk.
const BASE: &str = "panic=-1 random.trust_cpu=on cryptomgr.notests tsc=reliable no_timer_check \
                    rcupdate.rcu_expedited=1 swiotlb=noforce";
/// Hot-added memory is usable at once, and for all purposes.
const MEMORY_FIXED: &str = "memhp_default_state=online_kernel";
/// The same where the machine may also shrink again: three quarters of what is added are kept free of what cannot be moved
/// (`Documentation/admin-guide/mm/memory-hotplug.rst`), so that they can be taken away.
const MEMORY_MOVABLE: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// The whole command line of the machine.
pub(crate) fn of(config: &MachineConfig) -> String {
    let grows = config.memory_max() > config.memory;
    let mut words = vec![BASE, if grows { MEMORY_MOVABLE } else { MEMORY_FIXED }];
    if config.device_count() == 0 {
        words.push("pci=off");
    }
    words.extend(console_words(config));
    if !config.cmdline.trim().is_empty() {
        words.push(config.cmdline.trim());
    }
    words.join(" ")
}

/// The kernel takes the last `console=` as `/dev/console`.
fn console_words(config: &MachineConfig) -> &'static [&'static str] {
    match (&config.debug_uart, &config.console) {
        (ConsoleOutput::None, ConsoleOutput::None) => &["quiet", "8250.nr_uarts=0"],
        (ConsoleOutput::None, _) => &["quiet", "8250.nr_uarts=0", "console=hvc0"],
        (_, ConsoleOutput::None) => &["8250.nr_uarts=1", "console=ttyS0"],
        _ => &["8250.nr_uarts=1", "console=ttyS0", "console=hvc0"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_gets_the_consoles_that_it_has() {
        let file = || ConsoleOutput::File("log".into());
        let none = || ConsoleOutput::None;
        let cases = [
            (none(), none(), &["quiet", "pci=off"][..], &["console="][..]),
            (file(), none(), &["console=hvc0", "quiet"], &["ttyS0", "pci=off"]),
            (none(), file(), &["console=ttyS0", "8250.nr_uarts=1"], &["hvc0", "quiet"]),
            (file(), file(), &["console=ttyS0 console=hvc0"], &["quiet"]),
        ];
        for (console, debug_uart, present, absent) in cases {
            let text = of(&MachineConfig { console, debug_uart, ..MachineConfig::new("vmlinux") });
            assert!(present.iter().all(|word| text.contains(word)), "{text}");
            assert!(!absent.iter().any(|word| text.contains(word)), "{text}");
        }
    }

    #[test]
    fn memory_that_may_go_again_is_kept_movable() {
        let config = MachineConfig::new("vmlinux");
        assert!(!of(&config).contains("auto-movable"), "persistent memory alone does not go");
        let config = MachineConfig { memory_max: Some(config.memory * 2), ..config };
        assert!(of(&config).contains("online_policy=auto-movable"));
    }

    #[test]
    fn the_users_words_come_last() {
        let text = of(&MachineConfig { cmdline: " init=/sbin/x panic=5 ".to_owned(), ..MachineConfig::new("vmlinux") });
        assert!(text.ends_with(" init=/sbin/x panic=5"), "{text}");
    }
}
