//! An OCI image archive that `ctr image import` and `docker load` read.
//!
//! One tar file is both an OCI image layout (`oci-layout`, `index.json`, `blobs/`; OCI image
//! specification 1.1, "image-layout") and a docker archive (`manifest.json`).

use std::path::Path;

use oci_spec::image::{
    Arch, ConfigBuilder, Descriptor, DescriptorBuilder, HistoryBuilder, ImageConfiguration, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
    Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::str::FromStr;
use tool::io;

use crate::error::Error;
use crate::guest_image::hex;
use crate::layer::Layer;

/// containerd's name of an image in an index.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// The specification's: the tag alone.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Nothing in an image tells when it was built.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// How a container of the image starts when its user says nothing else.
#[derive(Clone, Debug)]
pub struct Start {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// `NAME=value`.
    pub environment: Vec<String>,
}

/// Checks that `name` is `registry/repository:tag`, the form in which containerd keeps names.
///
/// # Errors
/// [`Error::Name`] when it is not.
pub fn check_name(name: &str) -> Result<(), Error> {
    let whole = name.split_once('/').and_then(|(registry, rest)| Some((registry, rest.rsplit_once(':')?)));
    let plain = |text: &str| {
        !text.is_empty()
            && text.len() <= 128
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    let parts = |text: &str| text.split('/').all(|part| plain(part) && part == part.to_ascii_lowercase());
    match whole {
        Some((registry, (repository, tag)))
            if registry.split(':').all(plain) && registry.contains(['.', ':']) && parts(repository) && plain(tag) =>
        {
            Ok(())
        }
        _ => Err(Error::Name { name: name.to_owned() }),
    }
}

/// Writes the image `name` with its one `layer` to `output`; answers the manifest's digest.
///
/// # Errors
/// When the name is not valid or `output` cannot be written.
pub fn write(name: &str, layer: &Layer, start: &Start, output: &Path) -> Result<String, Error> {
    check_name(name)?;
    let layer_digest = digest(&layer.compressed);
    let config = json(&configuration(layer, start)?)?;
    let config_digest = digest(&config);
    let manifest = json(
        &ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .config(descriptor(MediaType::ImageConfig, &config)?)
            .layers(vec![descriptor(MediaType::ImageLayerGzip, &layer.compressed)?])
            .build()?,
    )?;
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    let mut entry = descriptor(MediaType::ImageManifest, &manifest)?;
    entry.set_platform(Some(PlatformBuilder::default().architecture(Arch::Amd64).os(Os::Linux).build()?));
    entry.set_annotations(Some([(CONTAINERD_NAME, name), (REF_NAME, tag)].map(|(k, v)| (k.into(), v.into())).into()));
    let index = json(
        &ImageIndexBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageIndex)
            .manifests(vec![entry])
            .build()?,
    )?;
    let layout = json(&OciLayoutBuilder::default().image_layout_version("1.0.0").build()?)?;
    let blob = |digest: &str| format!("blobs/sha256/{digest}");
    let docker = json(&serde_json::json!([{
        "Config": blob(&config_digest),
        // docker knows its own library by the short name.
        "RepoTags": [name.strip_prefix("docker.io/library/").unwrap_or(name)],
        "Layers": [blob(&layer_digest)],
    }]))?;
    let manifest_digest = digest(&manifest);
    let files = [
        ("oci-layout".to_owned(), &layout),
        ("index.json".to_owned(), &index),
        ("manifest.json".to_owned(), &docker),
        (blob(&manifest_digest), &manifest),
        (blob(&config_digest), &config),
        (blob(&layer_digest), &layer.compressed),
    ];
    pack(&files, output).map_err(io("write", output))?;
    Ok(format!("sha256:{manifest_digest}"))
}

fn configuration(layer: &Layer, start: &Start) -> Result<ImageConfiguration, Error> {
    let config =
        ConfigBuilder::default().env(start.environment.clone()).cmd(start.command.clone()).working_dir("/").build()?;
    let root = RootFsBuilder::default().typ("layers").diff_ids(vec![format!("sha256:{}", layer.diff_id)]).build()?;
    let history = HistoryBuilder::default().created(CREATED).created_by("rootfs-builder").build()?;
    Ok(ImageConfigurationBuilder::default()
        .created(CREATED)
        .architecture(Arch::Amd64)
        .os(Os::Linux)
        .config(config)
        .rootfs(root)
        .history(vec![history])
        .build()?)
}

fn descriptor(kind: MediaType, content: &[u8]) -> Result<Descriptor, Error> {
    let digest = Sha256Digest::from_str(&digest(content))?;
    Ok(DescriptorBuilder::default().media_type(kind).digest(digest).size(content.len() as u64).build()?)
}

fn digest(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

/// JSON whose maps are in the order of their keys, so that equal values are equal bytes.
fn json(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    let sorted = serde_json::to_value(value).and_then(|value| serde_json::to_vec(&value));
    sorted.map_err(|error| Error::Describe(oci_spec::OciSpecError::SerDe(error)))
}

fn pack(files: &[(String, &Vec<u8>)], output: &Path) -> std::io::Result<()> {
    let mut archive = tar::Builder::new(std::io::BufWriter::new(std::fs::File::create(output)?));
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content.as_slice())?;
    }
    archive.into_inner()?.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_containerd_would_misread_are_refused() {
        for name in ["docker.io/library/busybox:latest", "localhost:5000/a/b:1.2-x"] {
            check_name(name).unwrap();
        }
        for name in
            ["", "busybox", "busybox:latest", "docker.io/busybox", "docker.io/A:1", "docker.io/a b:1", "docker.io//a:1"]
        {
            assert!(matches!(check_name(name), Err(Error::Name { .. })), "{name}");
        }
    }

    #[test]
    fn an_archive_describes_its_blobs_by_their_true_digests() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "content").unwrap();
        let layer = crate::layer::pack(dir.path(), &crate::layer::Owners::new()).unwrap();
        let start = Start { command: vec!["/bin/sh".into()], environment: vec!["PATH=/bin".into()] };
        let outputs = [tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap()];
        let name = "docker.io/library/tiny:1";
        let digests = outputs.each_ref().map(|output| write(name, &layer, &start, output.path()).unwrap());
        assert_eq!(digests[0], digests[1]);
        let bytes = std::fs::read(outputs[0].path()).unwrap();
        assert!(bytes == std::fs::read(outputs[1].path()).unwrap());
        let mut manifest = None;
        for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
            if let Some(named) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(digest(&content), named);
                if format!("sha256:{named}") == digests[0] {
                    manifest = Some(serde_json::from_slice::<serde_json::Value>(&content).unwrap());
                }
            } else if path == "index.json" {
                let index: serde_json::Value = serde_json::from_slice(&content).unwrap();
                assert_eq!(index["manifests"][0]["digest"], digests[0].as_str());
                assert_eq!(index["manifests"][0]["annotations"][CONTAINERD_NAME], name);
            }
        }
        let manifest = manifest.unwrap();
        assert_eq!(manifest["layers"][0]["digest"], format!("sha256:{}", digest(&layer.compressed)));
        assert_eq!(manifest["layers"][0]["size"], layer.compressed.len());
    }
}
