//! Name servers of a pod, as programs read them.

use std::fmt::Write as _;

use crate::agent::Dns;

/// Bytes that servers, search domains and options may have in all.
const LIMIT: usize = 64 << 10;

/// What `/etc/resolv.conf` says (resolv.conf(5)).
///
/// # Errors
/// What is wrong with `dns`: it is too long, or a word of it would be several words or lines.
pub fn resolv_conf(dns: &Dns) -> Result<String, String> {
    let words = || dns.servers.iter().chain(&dns.searches).chain(&dns.options);
    let whole = |word: &&String| !word.is_empty() && !word.contains(|c: char| c.is_whitespace() || c.is_control());
    if let Some(bad) = words().find(|word| !whole(word)) {
        return Err(format!("dns: {bad:?} is not one word"));
    }
    if words().map(String::len).sum::<usize>() > LIMIT {
        return Err(format!("dns: more than {LIMIT} bytes"));
    }
    let mut text = String::new();
    for server in &dns.servers {
        // Writing to a string does not fail.
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, words) in [("search", &dns.searches), ("options", &dns.options)] {
        if !words.is_empty() {
            let _ = writeln!(text, "{keyword} {}", words.join(" "));
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_one_line_per_server_and_no_injected_lines() {
        let dns = Dns {
            servers: vec!["10.0.0.10".into(), "fd00::10".into()],
            searches: vec!["svc.local".into(), "local".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        let expected = "nameserver 10.0.0.10\nnameserver fd00::10\nsearch svc.local local\noptions ndots:5\n";
        assert_eq!(resolv_conf(&dns).as_deref(), Ok(expected));
        for bad in ["", "1.1.1.1\nsearch evil", "a b"] {
            let dns = Dns { servers: vec![bad.into()], ..Default::default() };
            assert!(resolv_conf(&dns).is_err(), "{bad:?} must be refused");
        }
        let long = Dns { searches: vec!["x".repeat(LIMIT + 1)], ..Default::default() };
        assert!(resolv_conf(&long).is_err());
    }
}
