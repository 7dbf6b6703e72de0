//! The `rootfs-builder` command: guest images and OCI archives.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};
use rootfs_builder::guest_image;
use rootfs_builder::progress::Progress;
use rootfs_builder::recipe::{self, Image};

/// Builds what pods run from: the guest image, and OCI archives to try them with.
#[derive(Debug, Parser)]
#[command(version, about, after_help = "Results are kept in the cache ($TATAMI_CACHE, else ~/.cache/tatami).")]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Builds the guest image: a read-only EROFS with the agent, a shell for `kata-ctl exec`, and mount points.
    ///
    /// The same programs give the same image to the last bit. Needs mkfs.erofs (package erofs-utils).
    Image {
        /// The agent: a static x86-64 executable.
        #[arg(long)]
        agent: PathBuf,
        /// The shell and its tools: Debian's static busybox (package busybox-static).
        #[arg(long, default_value = guest_image::BUSYBOX)]
        busybox: PathBuf,
        /// Where to write the image.
        #[arg(long)]
        output: PathBuf,
        /// Describe the result as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Builds an OCI archive from Debian packages, without a registry.
    ///
    /// Import it with `ctr image import FILE` or `docker load -i FILE`.
    Oci {
        /// Which image.
        #[arg(long)]
        image: Image,
        /// Where to write the archive.
        #[arg(long)]
        output: PathBuf,
        /// The image's name for containerd, registry/repository:tag.
        #[arg(long)]
        name: Option<String>,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Action::Image { agent, busybox, output, json } => {
            let image = guest_image::build(&agent, &busybox, &output)?;
            if json {
                println!("{}", serde_json::to_string(&image)?);
            } else {
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a figure for a person; images are far below 2^52 bytes"
                )]
                let mib = image.size as f64 / f64::from(1 << 20);
                println!("{}: {mib:.1} MiB, sha256 {}", image.path.display(), image.sha256);
            }
        }
        Action::Oci { image, output, name } => {
            let name = name.unwrap_or_else(|| image.default_name().to_owned());
            let cache = cache::Cache::open()?;
            let progress = Progress::new(5);
            recipe::build(image, &name, &output, &cache, &progress).with_context(|| format!("Image {name}"))?;
            drop(progress);
            println!("{}: {name}", output.display());
        }
    }
    Ok(())
}
