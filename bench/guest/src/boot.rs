//! A running guest: virtme-ng starts QEMU, QEMU writes its process number to a file, and by that it is killed.

use crate::drives::{self, Drive};
use crate::error::GuestError;
use crate::prepare::Tools;
use cli::children::wait_for_end;
use cli::deadline::Deadline;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Processors and memory.
const CPUS: &str = "2";
const MEMORY: &str = "3G";
/// On the kernel's command line: NVMe drives get a queue for polling and are seen as they are (QEMU's claim to have
/// several paths, and what stands above those hides atomic writes), and a panic ends the machine.
const KERNEL_OPTIONS: &str = "nvme.poll_queues=1 nvme_core.multipath=N panic=-1";
/// How long a killed or stopped virtme-ng may take to end.
const END_LIMIT: Duration = Duration::from_secs(20);

/// What to boot with.
pub struct BootPlan<'a> {
    /// Kernel and virtme-ng.
    pub tools: &'a Tools,
    /// The directory that guest and host share.
    pub share: &'a Path,
    /// Drives.
    pub drives: &'a [Drive],
    /// What the guest runs; nothing: a shell at this terminal.
    pub program: Option<Vec<OsString>>,
}

/// A guest that runs. Dropping it kills it.
pub struct Guest {
    child: Child,
    pid_file: PathBuf,
}

impl Guest {
    /// Starts it. The console's output goes to `console` in the directory above the shared one.
    pub fn boot(plan: &BootPlan<'_>) -> Result<Self, GuestError> {
        let pid_file = plan.share.with_file_name("qemu.pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut command = command(plan, &pid_file);
        if plan.program.is_some() {
            let path = plan.share.with_file_name("console");
            let what = || format!("open {}", path.display());
            let console =
                File::options().create(true).append(true).open(&path).map_err(GuestError::io(what()))?;
            let errors = console.try_clone().map_err(GuestError::io(what()))?;
            // In a group of its own: a Ctrl-C is for this program, which kills the guest.
            command.stdin(Stdio::null()).stdout(console).stderr(errors).process_group(0);
        }
        let child = command.spawn().map_err(GuestError::io("start virtme-ng"))?;
        Ok(Self { child, pid_file })
    }

    /// How it ended, if it does within this time.
    pub fn ended(&mut self, within: Duration) -> Result<Option<ExitStatus>, GuestError> {
        wait_for_end(&mut self.child, Deadline::after(within)).map_err(GuestError::io("wait for the guest"))
    }

    /// Waits for its end however long that takes.
    pub fn wait(&mut self) -> Result<ExitStatus, GuestError> {
        self.child.wait().map_err(GuestError::io("wait for the guest"))
    }

    /// SIGKILL to QEMU: for the guest, a power cut.
    pub fn cut_power(mut self) -> Result<(), GuestError> {
        let qemu = self.qemu().ok_or_else(|| GuestError::Missing("QEMU's process number".into()))?;
        kill_process(qemu, Signal::KILL).map_err(|error| GuestError::io("kill QEMU")(error.into()))?;
        match self.ended(END_LIMIT)? {
            Some(_) => Ok(()),
            None => {
                Err(GuestError::TimedOut { what: "QEMU to be gone".into(), seconds: END_LIMIT.as_secs() })
            }
        }
    }

    /// QEMU's process, as long as the number in the file is one of a QEMU.
    fn qemu(&self) -> Option<Pid> {
        let number: i32 = std::fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{number}/comm")).ok()?;
        name.starts_with("qemu-system").then(|| Pid::from_raw(number)).flatten()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Some(qemu) = self.qemu() {
            let _ = kill_process(qemu, Signal::KILL);
        }
        if let Some(group) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn command(plan: &BootPlan<'_>, pid_file: &Path) -> Command {
    let bin = plan.tools.virtme.join("bin");
    let mut path = OsString::from(&bin);
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    // The machine's administration programs are found in the guest, too.
    path.push(":/usr/sbin:/sbin");
    let options = format!("-no-reboot -pidfile {} {}", pid_file.display(), drives::options(plan.drives));
    let mut command = Command::new("python3");
    command
        .arg(bin.join("vng"))
        .env("PYTHONPATH", &plan.tools.virtme)
        .env("PATH", path)
        .arg("--run")
        .arg(&plan.tools.kernel)
        .args(["--cpus", CPUS, "--memory", MEMORY, "--disable-kvm", "--disable-microvm", "--user", "root"])
        .arg(format!("--append={KERNEL_OPTIONS}"))
        .arg("--rwdir")
        .arg(plan.share)
        .arg(format!("--qemu-opts={options}"));
    if let Some(program) = &plan.program {
        command.args(["--verbose", "--"]).args(program);
    }
    command
}
