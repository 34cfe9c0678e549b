//! Finding NVMe drives by the serial numbers that the host gave them, and pulling them out.

use super::system::{text, wait_until};
use crate::error::GuestError;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// The kernel's NVMe controllers.
const CONTROLLERS: &str = "/sys/class/nvme";

/// A drive.
pub struct Nvme {
    /// Its controller's directory in sysfs.
    pub controller: PathBuf,
    /// Its first namespace's name, such as `nvme0n1`.
    pub name: String,
}

impl Nvme {
    /// Waits for the drive with a serial number: drives are found in their own time.
    pub fn with_serial(serial: &str) -> Result<Self, GuestError> {
        let mut found = None;
        wait_until(&format!("the NVMe drive '{serial}'"), || {
            found = look(serial);
            Ok(found.as_ref().is_some_and(|drive| is_block(&drive.path())))
        })?;
        found.ok_or_else(|| GuestError::Missing(format!("NVMe drive '{serial}'")))
    }

    /// Its device.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// A partition's device.
    pub fn partition(&self, number: u32) -> Result<PathBuf, GuestError> {
        let path = Path::new("/dev").join(format!("{}p{number}", self.name));
        wait_until(&format!("{}", path.display()), || Ok(is_block(&path)))?;
        Ok(path)
    }

    /// What the kernel says of its queue.
    pub fn queue(&self, attribute: &str) -> Result<String, GuestError> {
        text(Path::new("/sys/block").join(&self.name).join("queue").join(attribute))
    }

    /// Hot removal: the kernel loses the device at once, whoever uses it.
    pub fn pull(&self) -> Result<(), GuestError> {
        let path = self.controller.join("device/remove");
        std::fs::write(&path, "1").map_err(GuestError::io(format!("write {}", path.display())))?;
        wait_until(&format!("{} to be gone", self.name), || Ok(!self.controller.exists()))
    }
}

fn look(serial: &str) -> Option<Nvme> {
    let controllers = std::fs::read_dir(CONTROLLERS).ok()?;
    let controller = controllers
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| text(path.join("serial")).is_ok_and(|found| found == serial))?;
    let names =
        std::fs::read_dir(&controller).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    // With native multipath a namespace's hidden path is called nvme0c0n1: not that one.
    let mut names = names.filter(|name| name.starts_with("nvme"));
    let name = names.find_map(|name| {
        let (front, namespace) = name.rsplit_once('n')?;
        let front =
            front.rsplit_once('c').filter(|(_, path)| !path.is_empty()).map_or(front, |(front, _)| front);
        Some(format!("{front}n{namespace}"))
    })?;
    Some(Nvme { controller, name })
}

fn is_block(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}
