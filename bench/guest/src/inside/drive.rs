//! Finding drives by the serial numbers that the host gave them, and pulling them out.

use super::system::{text, wait_until};
use crate::error::GuestError;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// The kernel's NVMe controllers, and its block devices.
const CONTROLLERS: &str = "/sys/class/nvme";
const BLOCK_DEVICES: &str = "/sys/block";

/// A drive.
pub struct Drive {
    /// Its NVMe controller's or SCSI device's directory in sysfs.
    pub controller: PathBuf,
    /// Its name, such as `nvme0n1` or `sda`.
    pub name: String,
}

impl Drive {
    /// Waits for the drive with a serial number: drives are found in their own time.
    pub fn with_serial(serial: &str) -> Result<Self, GuestError> {
        let mut found = None;
        wait_until(&format!("the drive '{serial}'"), || {
            found = nvme(serial).or_else(|| scsi(serial));
            Ok(found.as_ref().is_some_and(|drive| is_block(&drive.path())))
        })?;
        found.ok_or_else(|| GuestError::Missing(format!("drive '{serial}'")))
    }

    /// Its device.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// A partition's device.
    pub fn partition(&self, number: u32) -> Result<PathBuf, GuestError> {
        let path = Path::new("/dev").join(partition_name(&self.name, number));
        wait_until(&format!("{}", path.display()), || Ok(is_block(&path)))?;
        Ok(path)
    }

    /// What the kernel says of its queue.
    pub fn queue(&self, attribute: &str) -> Result<String, GuestError> {
        text(Path::new(BLOCK_DEVICES).join(&self.name).join("queue").join(attribute))
    }

    /// Hot removal: the kernel loses the device at once, whoever uses it.
    pub fn pull(&self) -> Result<(), GuestError> {
        let path = self.controller.join("device/remove");
        std::fs::write(&path, "1").map_err(GuestError::io(format!("write {}", path.display())))?;
        wait_until(&format!("{} to be gone", self.name), || Ok(!self.controller.exists()))
    }
}

/// A name that ends in a digit gets a `p` before the partition's number.
fn partition_name(drive: &str, number: u32) -> String {
    let separator = if drive.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
    format!("{drive}{separator}{number}")
}

fn names(dir: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

fn nvme(serial: &str) -> Option<Drive> {
    let controllers = names(Path::new(CONTROLLERS)).map(|name| Path::new(CONTROLLERS).join(name));
    let mut fits = controllers.filter(|path| text(path.join("serial")).is_ok_and(|found| found == serial));
    let controller = fits.next()?;
    let name = names(&controller).find(|name| name.starts_with("nvme"))?;
    Some(Drive { controller, name })
}

fn scsi(serial: &str) -> Option<Drive> {
    names(Path::new(BLOCK_DEVICES)).filter(|name| name.starts_with("sd")).find_map(|name| {
        let controller = Path::new(BLOCK_DEVICES).join(&name).join("device");
        // The page of the serial number: four bytes, then the number.
        let page = std::fs::read(controller.join("vpd_pg80")).ok()?;
        let found = std::str::from_utf8(page.get(4..)?).ok()?.trim();
        (found == serial).then_some(Drive { controller, name })
    })
}

fn is_block(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}
