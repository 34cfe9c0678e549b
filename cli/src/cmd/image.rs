//! `drystone image`: virtual disks.

use super::Global;
use crate::cluster::{Cluster, OpenImage};
use crate::error::CliError;
use crate::output::{self, Table};
use crate::stop::Stop;
use crate::transfer::{self, Beyond, Moved, Sink, Source};
use crate::units::ByteSize;
use clap::{Args, Subcommand};
use client::OpenMode;
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use wire::BLOCK_BYTES;

/// Requests of 1 MiB that a transfer keeps under way.
const DEFAULT_DEPTH: u16 = 16;
/// More would only fill the client's own bounds.
const DEPTH_MAX: i64 = 256;

/// Size of an image that is imported from a pipe without `--size`, until it has to grow. It ends with the
/// size of what came.
const PIPE_SIZE_FIRST_BYTES: u64 = 64 << 20;

/// What to do with images.
#[derive(Subcommand, Debug)]
pub enum ImageCommand {
    /// Create an image; it reads as zeroes and takes no space until written
    #[command(after_help = "Examples:
  drystone image create vm1 --pool ssd --size 100GiB
  drystone image create db --pool ssd --size 1.5T")]
    Create {
        /// Its name
        name: String,
        /// The pool it lives in
        #[arg(long)]
        pool: String,
        /// Its size, like 100GiB or 1.5T, a multiple of 4096 bytes
        #[arg(long)]
        size: ByteSize,
    },
    /// List images
    Ls,
    /// Show one image
    Info {
        /// Its name
        name: String,
    },
    /// Make an image larger, or smaller with --shrink
    #[command(after_help = "Examples:
  drystone image resize vm1 --size 200GiB
  drystone image resize vm1 --size 50GiB --shrink")]
    Resize {
        /// Its name
        name: String,
        /// Its new size
        #[arg(long)]
        size: ByteSize,
        /// Allow a smaller size: what lies behind it is destroyed
        #[arg(long)]
        shrink: bool,
    },
    /// Remove an image and its data
    #[command(after_help = "Example:
  drystone image rm vm1

An interrupted removal is finished by the same command.")]
    Rm {
        /// Its name
        name: String,
    },
    /// Create an image from a file, a block device or a pipe
    #[command(after_help = "Examples:
  drystone image import debian.raw vm2 --pool ssd
  drystone image import debian.raw vm2 --pool ssd --size 100G
  zstd -dc vm1.zst | drystone image import - vm3 --pool ssd

Holes and zeroes are not sent and take no space.")]
    Import(ImportArgs),
    /// Copy an image to a file or a pipe
    #[command(after_help = "Examples:
  drystone image export vm1 vm1.raw
  drystone image export vm1 - | zstd > vm1.zst

Zeroes become holes of the file.")]
    Export(ExportArgs),
}

/// An import.
#[derive(Args, Debug)]
pub struct ImportArgs {
    /// The file, or - for standard input
    pub source: PathBuf,
    /// Name of the new image
    pub name: String,
    /// The pool it lives in
    #[arg(long)]
    pub pool: String,
    /// Size of the image [default: the size of what is imported, rounded up to 4096]
    #[arg(long)]
    pub size: Option<ByteSize>,
    /// Requests of 1 MiB under way
    #[arg(long, default_value_t = DEFAULT_DEPTH, value_parser = clap::value_parser!(u16).range(1..=DEPTH_MAX))]
    pub depth: u16,
}

/// An export.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// The image
    pub name: String,
    /// The file, or - for standard output
    pub target: PathBuf,
    /// Overwrite a file that exists
    #[arg(long)]
    pub force: bool,
    /// Requests of 1 MiB under way
    #[arg(long, default_value_t = DEFAULT_DEPTH, value_parser = clap::value_parser!(u16).range(1..=DEPTH_MAX))]
    pub depth: u16,
}

/// Runs the command.
pub fn run(global: &Global, command: ImageCommand) -> Result<(), CliError> {
    let mut cluster = Cluster::connect(global)?;
    let cluster = &mut cluster;
    match command {
        ImageCommand::Create { name, pool, size } => create(global, cluster, &name, &pool, size),
        ImageCommand::Ls => list(global, cluster),
        ImageCommand::Info { name } => info(global, cluster, &name),
        ImageCommand::Resize { name, size, shrink } => resize(global, cluster, &name, size, shrink),
        ImageCommand::Rm { name } => remove(global, cluster, &name),
        ImageCommand::Import(args) => import(global, cluster, &args),
        ImageCommand::Export(args) => export(global, cluster, &args),
    }
}

fn create(
    global: &Global,
    cluster: &mut Cluster,
    name: &str,
    pool: &str,
    size: ByteSize,
) -> Result<(), CliError> {
    let image = cluster.create_image(name, pool, size.0)?;
    if global.json {
        return output::json(&image);
    }
    output::line(&format!("image {name} created: number {}, {size}", image.id))
}

fn list(global: &Global, cluster: &mut Cluster) -> Result<(), CliError> {
    let images = cluster.images()?;
    if global.json {
        return output::json(&images);
    }
    let pools = cluster.pools()?;
    let mut table = Table::new(&["NAME", ">NUMBER", "POOL", ">SIZE", "STATE"]);
    for image in &images {
        let pool = pools.iter().find(|pool| pool.id == image.pool);
        table.row([
            image.name.clone(),
            image.id.to_string(),
            pool.map_or_else(|| image.pool.to_string(), |pool| pool.name.clone()),
            ByteSize(image.size_bytes).to_string(),
            if image.removing { "removing" } else { "ready" }.to_string(),
        ]);
    }
    table.print()
}

fn info(global: &Global, cluster: &mut Cluster, name: &str) -> Result<(), CliError> {
    let image = cluster.image(name)?;
    if global.json {
        return output::json(&image);
    }
    let pools = cluster.pools()?;
    let pool = pools.iter().find(|pool| pool.id == image.pool);
    let pool_name = pool.map_or("?", |pool| pool.name.as_str());
    output::line(&format!(
        "name     {}\nnumber   {}\npool     {} (number {})\nsize     {} ({} bytes)\nobjects  {} at most\nstate    {}",
        image.name,
        image.id,
        pool_name,
        image.pool,
        ByteSize(image.size_bytes),
        image.size_bytes,
        image.size_bytes.div_ceil(wire::OBJECT_BYTES as u64),
        if image.removing { "removing" } else { "ready" },
    ))
}

fn resize(
    global: &Global,
    cluster: &mut Cluster,
    name: &str,
    size: ByteSize,
    shrink: bool,
) -> Result<(), CliError> {
    let image = cluster.image(name)?;
    let what = format!("resize image {name}");
    if image.removing {
        return Err(CliError::Refused { what, why: "it is being removed".into() });
    }
    if size.0 < image.size_bytes && shrink {
        if size.0 == 0 || !size.0.is_multiple_of(BLOCK_BYTES as u64) {
            let why = format!("{} bytes are no positive multiple of {BLOCK_BYTES}", size.0);
            return Err(CliError::Refused { what, why });
        }
        // Data first, size second: cut short in between, the image has its old size and the command can
        // be repeated; the other order would leave data that a later growth brings back.
        let open = cluster.open(name, OpenMode::Removal)?;
        let bar = progress(global, image.size_bytes - size.0, "wiping");
        transfer::wipe(cluster, open, size.0, image.size_bytes, DEFAULT_DEPTH.into(), &bar, &stop()?)?;
        bar.finish_and_clear();
    }
    cluster.set_image_size(name, size.0, shrink)?;
    output::done(global, &format!("image {name} now has {size}"))
}

fn remove(global: &Global, cluster: &mut Cluster, name: &str) -> Result<(), CliError> {
    let stop = stop()?;
    let image = cluster.mark_image_removed(name)?;
    let open = cluster.open(name, OpenMode::Removal)?;
    let bar = progress(global, open.size_bytes, "removing");
    transfer::wipe(cluster, open, 0, open.size_bytes, DEFAULT_DEPTH.into(), &bar, &stop)?;
    bar.finish_and_clear();
    cluster.forget_image(&image)?;
    output::done(global, &format!("image {name} removed"))
}

fn import(global: &Global, cluster: &mut Cluster, args: &ImportArgs) -> Result<(), CliError> {
    let stop = stop()?;
    let (source, length) = open_source(&args.source)?;
    let (size, beyond) = match (args.size, length) {
        (Some(size), Some(length)) if size.0 < length => {
            return Err(CliError::Refused {
                what: format!("import {}", args.source.display()),
                why: format!("it has {length} bytes, more than --size {size}"),
            });
        }
        (Some(size), _) => (size.0, Beyond::Refuse),
        (None, Some(length)) => (length.next_multiple_of(BLOCK_BYTES as u64), Beyond::Refuse),
        // A pipe does not say how much will come: the image grows with it.
        (None, None) => (PIPE_SIZE_FIRST_BYTES, Beyond::Grow(&args.name)),
    };
    cluster.create_image(&args.name, &args.pool, size)?;
    let imported = cluster.open(&args.name, OpenMode::ReadWrite).and_then(|image| {
        let bar = match beyond {
            Beyond::Grow(_) => progress_of_pipe(global, "importing"),
            Beyond::Refuse => progress(global, length.unwrap_or(size), "importing"),
        };
        let moved = transfer::import(cluster, image, source, beyond, args.depth.into(), &bar, &stop);
        bar.finish_and_clear();
        let moved = moved?;
        if let Beyond::Grow(name) = beyond {
            // Nothing was written behind the end of the source: the record alone becomes smaller.
            let size = moved.total_bytes.max(1).next_multiple_of(BLOCK_BYTES as u64);
            cluster.set_image_size(name, size, true)?;
        }
        Ok(moved)
    });
    match imported {
        Ok(moved) => moved_line(global, &format!("image {} imported", args.name), moved),
        Err(error) => {
            // Half an image under its final name would look like a whole one.
            let note = match remove_failed_import(cluster, &args.name) {
                Ok(()) => format!("image {} was removed again", args.name),
                Err(why) => format!("image {} is incomplete and could not be removed: {why}", args.name),
            };
            tracing::warn!("{note}");
            Err(error)
        }
    }
}

fn remove_failed_import(cluster: &mut Cluster, name: &str) -> Result<(), CliError> {
    let keep_going = Stop::never();
    let image = cluster.mark_image_removed(name)?;
    let open = cluster.open(name, OpenMode::Removal)?;
    let bar = ProgressBar::hidden();
    transfer::wipe(cluster, open, 0, open.size_bytes, DEFAULT_DEPTH.into(), &bar, &keep_going)?;
    cluster.forget_image(&image)
}

fn export(global: &Global, cluster: &mut Cluster, args: &ExportArgs) -> Result<(), CliError> {
    let stop = stop()?;
    let image: OpenImage = cluster.open(&args.name, OpenMode::ReadOnly)?;
    let to_stdout = args.target.as_os_str() == "-";
    let sink = if to_stdout {
        Sink::Stream(Box::new(std::io::stdout().lock()))
    } else {
        open_target(&args.target, args.force)?
    };
    let bar = progress(global, image.size_bytes, "exporting");
    let moved = transfer::export(cluster, image, sink, args.depth.into(), &bar, &stop);
    bar.finish_and_clear();
    if to_stdout {
        return moved.map(|_| ()); // standard output belongs to the data
    }
    moved_line(global, &format!("image {} exported", args.name), moved?)
}

fn moved_line(global: &Global, what: &str, moved: Moved) -> Result<(), CliError> {
    if global.json {
        return output::json(&moved);
    }
    let (data, total) = (ByteSize(moved.data_bytes), ByteSize(moved.total_bytes));
    output::line(&format!("{what}: {total}, of which {data} are not zero"))
}

/// Opens what is imported; the length is known for files and block devices.
fn open_source(path: &Path) -> Result<(Source, Option<u64>), CliError> {
    use std::io::Seek;
    use std::os::unix::fs::FileTypeExt;
    if path.as_os_str() == "-" {
        return Ok((Source::Stream(Box::new(std::io::stdin().lock())), None));
    }
    let failed = |source| CliError::Io { what: format!("open {}", path.display()), source };
    let mut file = OpenOptions::new().read(true).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if meta.is_file() {
        return Ok((Source::Sparse(file), Some(meta.len())));
    }
    if meta.file_type().is_block_device() {
        let length = file.seek(std::io::SeekFrom::End(0)).and_then(|end| file.rewind().map(|()| end));
        return Ok((Source::Stream(Box::new(file)), Some(length.map_err(failed)?)));
    }
    if meta.is_dir() {
        return Err(failed(std::io::ErrorKind::IsADirectory.into()));
    }
    Ok((Source::Stream(Box::new(file)), None))
}

/// Opens where an export goes. A regular file is emptied, so that what is not written is a hole.
fn open_target(path: &Path, force: bool) -> Result<Sink, CliError> {
    let failed = |source| CliError::Io { what: format!("open {}", path.display()), source };
    let regular = !std::fs::metadata(path).is_ok_and(|meta| !meta.is_file());
    let mut options = OpenOptions::new();
    options.write(true);
    match (regular, force) {
        (true, true) => options.create(true).truncate(true),
        (true, false) => options.create_new(true),
        (false, _) => &mut options,
    };
    let file: File = options.open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => CliError::Refused {
            what: format!("export to {}", path.display()),
            why: "the file exists: --force overwrites it".into(),
        },
        _ => failed(error),
    })?;
    Ok(if regular { Sink::Sparse(file) } else { Sink::Stream(Box::new(file)) })
}

fn stop() -> Result<Stop, CliError> {
    Stop::on_signals().map_err(|source| CliError::Io { what: "catch signals".into(), source })
}

/// Bytes and speed, where the end is not known.
fn progress_of_pipe(global: &Global, verb: &'static str) -> ProgressBar {
    if global.json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bytes} {binary_bytes_per_sec}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::new_spinner().with_style(style).with_message(verb)
}

/// A bar on standard error; indicatif hides it where that is no terminal.
fn progress(global: &Global, bytes: u64, verb: &'static str) -> ProgressBar {
    if global.json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{msg} {bar:32} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_style(style).with_message(verb)
}
