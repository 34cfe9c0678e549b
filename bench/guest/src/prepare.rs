//! What the guest needs from elsewhere: programs of this machine, a kernel, virtme-ng. Fetched once.
//!
//! Each part is complete when its stamp is written, which happens last: an interrupted download is made anew.

use crate::apt::{Apt, codename};
use crate::error::GuestError;
use crate::program;
use rustix::fs::FlockOperation;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The release that the kernel comes from.
const KERNEL_SUITE: &str = "trixie";
/// The package that depends on that release's kernel, and how the kernel's own name begins.
const KERNEL_META: &str = "linux-image-amd64";
const KERNEL_PREFIX: &str = "linux-image-6.12";
/// Boots a kernel on the machine's own root file system. Pinned: its command line is used.
const VIRTME: &str = "virtme-ng==1.42";
/// Where kernels' modules are looked for, by us and in the guest.
const MODULES: &str = "/lib/modules";
/// Programs, on the machine and in the guest, and their packages.
const PROGRAMS: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("depmod", "kmod"),
    ("busybox", "busybox-static"),
    ("mkfs.ext4", "e2fsprogs"),
    ("rdma", "iproute2"),
    ("fio", "fio"),
    ("python3", "python3"),
];
/// Written into a part's directory when it is complete; says which version it is.
const STAMP: &str = "complete";

/// Everything that boots.
pub struct Tools {
    /// The kernel.
    pub kernel: PathBuf,
    /// virtme-ng's directory.
    pub virtme: PathBuf,
}

/// The directory of what is kept between runs.
pub fn cache() -> Result<PathBuf, GuestError> {
    let target = || std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    let dir = std::env::var_os("DRYSTONE_GUEST_CACHE").map_or_else(|| target().join("guest"), PathBuf::from);
    std::fs::create_dir_all(&dir).map_err(GuestError::io(format!("make {}", dir.display())))?;
    let dir = dir.canonicalize().map_err(GuestError::io(format!("find {}", dir.display())))?;
    // QEMU's options and the guest's command line are split at these.
    if dir.to_string_lossy().contains([',', ' ', '\'', '"']) {
        return Err(GuestError::Path(dir));
    }
    Ok(dir)
}

/// Held as long as a run uses the directory: a second one would take its files away.
pub struct CacheLock(#[allow(dead_code, reason = "locks as long as it is open")] File);

/// Locks the directory, or says that somebody else has.
pub fn lock(cache: &Path) -> Result<CacheLock, GuestError> {
    let path = cache.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(GuestError::io(format!("open {}", path.display())))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(CacheLock(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(GuestError::InUse(cache.into())),
        Err(error) => Err(GuestError::io(format!("lock {}", path.display()))(error.into())),
    }
}

/// Fetches what is missing.
pub fn prepare(cache: &Path) -> Result<Tools, GuestError> {
    programs(cache)?;
    let (kernel, version) = kernel(&cache.join("kernel"))?;
    link_modules(&cache.join("kernel/root/usr/lib/modules").join(&version), &version)?;
    let virtme = virtme(&cache.join("virtme"))?;
    Ok(Tools { kernel, virtme })
}

/// Installs the programs that are missing, all in one call and from the release's backports where they are there:
/// QEMU's packages must be of one version, and one of them may be installed already, from there.
fn programs(cache: &Path) -> Result<(), GuestError> {
    let missing: Vec<&str> = PROGRAMS
        .iter()
        .filter(|(name, _)| program::find(name).is_none())
        .map(|(_, package)| *package)
        .collect();
    let has_pip = program::run(Command::new("python3").args(["-m", "pip", "--version"])).is_ok();
    let mut wanted = missing;
    if !has_pip {
        wanted.push("python3-pip");
    }
    if wanted.is_empty() {
        return Ok(());
    }
    if wanted.contains(&"qemu-system-x86") && !wanted.contains(&"qemu-utils") {
        wanted.push("qemu-utils");
    }
    eprintln!("guest: installing {}", wanted.join(" "));
    let (suite, backports) = (codename()?, format!("{}-backports", codename()?));
    let apt = Apt::with(&cache.join("apt-programs"), &[&suite, &backports])?;
    apt.install(&backports, &wanted)?;
    let still = PROGRAMS.iter().find(|(name, _)| program::find(name).is_none());
    still.map_or(Ok(()), |(name, _)| Err(GuestError::Missing(format!("program {name}"))))
}

/// The kernel's file and version.
fn kernel(dir: &Path) -> Result<(PathBuf, String), GuestError> {
    let version = match stamp(dir) {
        Some(version) => version,
        None => {
            let version = fetch_kernel(dir)?;
            complete(dir, &version)?;
            version
        }
    };
    let file = dir.join(format!("root/boot/vmlinuz-{version}"));
    if file.is_file() { Ok((file, version)) } else { Err(GuestError::Missing(file.display().to_string())) }
}

fn fetch_kernel(dir: &Path) -> Result<String, GuestError> {
    anew(dir)?;
    eprintln!("guest: downloading a kernel");
    let apt = Apt::with(&dir.join("apt"), &[KERNEL_SUITE])?;
    let names = apt.depends(KERNEL_META)?;
    let package = names.iter().find(|name| name.starts_with(KERNEL_PREFIX));
    let package = package.ok_or_else(|| GuestError::Missing(format!("a package {KERNEL_PREFIX}…")))?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    let (packages, root) = (dir.join("packages"), dir.join("root"));
    for path in [&packages, &root] {
        std::fs::create_dir_all(path).map_err(GuestError::io(format!("make {}", path.display())))?;
    }
    apt.download(package, &packages)?;
    let file = std::fs::read_dir(&packages)
        .map_err(GuestError::io(format!("list {}", packages.display())))?
        .find_map(|entry| {
            Some(entry.ok()?.path()).filter(|path| path.extension().is_some_and(|e| e == "deb"))
        });
    let file = file.ok_or_else(|| GuestError::Missing("the downloaded kernel package".into()))?;
    program::run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&root))?;
    let depmod = program::find("depmod").ok_or_else(|| GuestError::Missing("program depmod".into()))?;
    program::run(Command::new(depmod).arg("-b").arg(root.join("usr")).arg(&version))?;
    // Unpacked: the package itself and apt's lists are not needed again.
    for path in [packages, dir.join("apt")] {
        std::fs::remove_dir_all(&path).map_err(GuestError::io(format!("remove {}", path.display())))?;
    }
    Ok(version)
}

/// Makes the modules visible under their usual name. What the machine itself has there is left alone.
fn link_modules(modules: &Path, version: &str) -> Result<(), GuestError> {
    let link = Path::new(MODULES).join(version);
    if std::fs::read_link(&link).is_ok_and(|to| to == modules) || (link.is_dir() && !link.is_symlink()) {
        return Ok(());
    }
    program::run(program::as_root("mkdir").args(["-p", MODULES]))?;
    program::run(program::as_root("ln").arg("-sfn").arg(modules).arg(&link)).map(|_| ())
}

fn virtme(dir: &Path) -> Result<PathBuf, GuestError> {
    if stamp(dir).as_deref() != Some(VIRTME) {
        anew(dir)?;
        eprintln!("guest: downloading {VIRTME}");
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--target"]).arg(dir).arg(VIRTME);
        program::run(&mut pip)?;
        complete(dir, VIRTME)?;
    }
    Ok(dir.to_path_buf())
}

fn stamp(dir: &Path) -> Option<String> {
    std::fs::read_to_string(dir.join(STAMP)).ok()
}

fn complete(dir: &Path, what: &str) -> Result<(), GuestError> {
    std::fs::write(dir.join(STAMP), what).map_err(GuestError::io(format!("write to {}", dir.display())))
}

/// An empty directory in place of whatever is there.
pub fn anew(dir: &Path) -> Result<(), GuestError> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(GuestError::io(format!("remove {}", dir.display()))(error));
        }
        _ => {}
    }
    std::fs::create_dir_all(dir).map_err(GuestError::io(format!("make {}", dir.display())))
}
