//! The files of a pod whose containers come without them: as the kubelet's description says.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use journal::{Effect, Journal};
use protocols::agent::{Dns, Interface};
use protocols::cri::{DNSConfig, PodSandboxConfig};
use protocols::dns;

use crate::error::Error;

/// Where containers look for them, by their names in the pod's directory.
const PLACES: [(&str, &str); 3] =
    [("hostname", "/etc/hostname"), ("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf")];
/// Longest of these files (bytes); a kubelet's are a few lines.
const MAX_FILE: usize = 64 << 10;

/// The files, on the host.
#[derive(Debug)]
pub struct PodFiles(Vec<(&'static str, PathBuf)>);

impl PodFiles {
    /// Writes them into `directory`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], [`Error::Journal`], [`Error::Host`].
    pub fn write(
        directory: &Path,
        config: &PodSandboxConfig,
        hostname: &str,
        interfaces: &[Interface],
        journal: &Journal,
    ) -> Result<Self, Error> {
        let texts = [format!("{hostname}\n"), hosts(hostname, interfaces), resolv_conf(config)?];
        journal.record(Effect::Tree { path: directory.to_owned() })?;
        std::fs::create_dir(directory).map_err(Error::host("make the directory", directory))?;
        let mut files = Vec::new();
        for ((name, place), text) in PLACES.into_iter().zip(texts) {
            if text.len() > MAX_FILE {
                return Err(Error::Invalid(format!(
                    "{place} would have {} bytes; the limit is {MAX_FILE}",
                    text.len()
                )));
            }
            let path = directory.join(name);
            std::fs::write(&path, text).map_err(Error::host("write", &path))?;
            files.push((place, path));
        }
        Ok(Self(files))
    }

    /// Where they belong in a container, and where they are.
    #[must_use]
    pub fn places(&self) -> Vec<(&str, &Path)> {
        self.0.iter().map(|(place, path)| (*place, path.as_path())).collect()
    }
}

/// hosts(5): the pod by all of its addresses.
fn hosts(hostname: &str, interfaces: &[Interface]) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
    for address in addresses.filter_map(|address| address.split('/').next()).filter(|_| !hostname.is_empty()) {
        let _ = writeln!(text, "{address}\t{hostname}");
    }
    text
}

/// resolv.conf(5).
fn resolv_conf(config: &PodSandboxConfig) -> Result<String, Error> {
    let DNSConfig { servers, searches, options, .. } = config.dns_config.clone().unwrap_or_default();
    dns::resolv_conf(&Dns { servers, searches, options, ..Dns::default() }).map_err(Error::Invalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::MessageField;

    fn config(server: &str) -> PodSandboxConfig {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let dns = DNSConfig {
            servers: words(&[server]),
            searches: words(&["a.example", "b.example"]),
            options: words(&["ndots:5"]),
            ..DNSConfig::default()
        };
        PodSandboxConfig { dns_config: MessageField::some(dns), ..PodSandboxConfig::default() }
    }

    #[test]
    fn a_pod_s_files_say_what_its_description_says_and_go_with_the_journal() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::create(&directory.path().join("journal")).unwrap();
        let interface = Interface { addresses: vec!["10.1.0.2/24".to_owned()], ..Interface::default() };
        let place = directory.path().join("files");
        let files = PodFiles::write(&place, &config("10.0.0.1"), "web", &[interface], &journal).unwrap();
        let read = |wanted: &str| {
            let (_, path) = files.places().into_iter().find(|(place, _)| *place == wanted).unwrap();
            std::fs::read_to_string(path).unwrap()
        };
        assert_eq!(read("/etc/hostname"), "web\n");
        assert!(read("/etc/hosts").ends_with("10.1.0.2\tweb\n"));
        assert_eq!(read("/etc/resolv.conf"), "nameserver 10.0.0.1\nsearch a.example b.example\noptions ndots:5\n");
        assert!(journal.finish().is_empty());
        assert!(!place.exists());
    }

    #[test]
    fn a_name_server_that_would_be_several_lines_is_refused() {
        let error = resolv_conf(&config("10.0.0.1\noptions debug")).unwrap_err();
        assert!(error.to_string().contains("not one word"), "{error}");
    }
}
