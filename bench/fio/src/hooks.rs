//! The functions that fio calls, in the order of a job's life: `setup` in fio's main process before it
//! forks (how large is the image?), `init` in the job's own thread or process, then `queue`, `getevents`
//! and `event` in a loop, and `cleanup`.
//!
//! fio allocates the options block of each job and hands its address back through `thread_data`; the job
//! lives behind its last field. Every hook is called by the job's own thread, so nothing here is shared.

use crate::job::{Job, JobError, Start};
use crate::layout::{self, Answer, Direction, EngineOps, File, IoU, OptionEntry, ThreadData};
use drystone::OnNoSpace;
use libc::{c_char, c_int, c_uint, c_void, timespec};
use std::ffi::{CStr, CString};
use std::mem::offset_of;
use std::time::Duration;

/// A job's options as fio fills them in. `parent` must come first: fio keeps its own pointer there.
#[repr(C)]
struct Options {
    parent: *mut c_void,
    cluster: *mut c_char,
    image: *mut c_char,
    full: *mut c_char,
    transport: *mut c_char,
    /// Ours: null until `init`, and again after `cleanup`. fio zeroes the block when it makes it.
    job: *mut Job,
}

#[repr(transparent)]
struct OptionTable([OptionEntry; 5]);

// SAFETY: the table is never written to, and all its pointers lead to constants.
unsafe impl Sync for OptionTable {}

static OPTIONS: OptionTable = OptionTable([
    OptionEntry::string(
        c"cluster",
        c"Drystone cluster",
        c"Control address of any node, or several separated by commas (IP:PORT)",
        offset_of!(Options, cluster),
    ),
    OptionEntry::string(
        c"image",
        c"Drystone image",
        c"Name of the image to read and write",
        offset_of!(Options, image),
    ),
    OptionEntry::string(
        c"full",
        c"Drystone full",
        c"What a write does when there is no space: fail (error, the default) or wait until there is (wait)",
        offset_of!(Options, full),
    ),
    OptionEntry::string(
        c"transport",
        c"Drystone transport",
        c"How nodes are reached: auto (the default, or what DRYSTONE_TRANSPORT says), rdma or tcp",
        offset_of!(Options, transport),
    ),
    OptionEntry::END,
]);

/// What fio looks up in the library: the engine.
#[allow(non_upper_case_globals, reason = "fio looks this name up")]
#[unsafe(no_mangle)]
pub static mut ioengine: EngineOps = EngineOps {
    list: [std::ptr::null_mut(); 2],
    name: c"drystone".as_ptr(),
    version: layout::ENGINE_VERSION,
    flags: layout::FLAG_DISKLESS
        | layout::FLAG_NO_EXTEND
        | layout::FLAG_NO_DISK_UTIL
        | layout::FLAG_MEM_ALIGN,
    reserved: std::ptr::null_mut(),
    setup: Some(setup),
    init: Some(init),
    post_init: None,
    prep: Some(prep),
    queue: Some(queue),
    commit: Some(commit),
    getevents: Some(getevents),
    event: Some(event),
    errdetails: std::ptr::null(),
    cancel: std::ptr::null(),
    cleanup: Some(cleanup),
    open_file: Some(nothing_to_do_for_a_file),
    close_file: Some(nothing_to_do_for_a_file),
    invalidate: Some(nothing_to_do_for_a_file),
    unlink_file: std::ptr::null(),
    get_file_size: Some(nothing_to_do_for_a_file),
    unused: [std::ptr::null(); 10],
    option_struct_size: size_of::<Options>() as c_int,
    options: (&raw const OPTIONS).cast::<OptionEntry>().cast_mut(),
};

/// Prints a line where fio prints its own errors.
fn complain(message: &str) {
    type LogErr = unsafe extern "C" fn(*const c_char, ...) -> usize;
    let Ok(line) = CString::new(format!("drystone: {message}\n")) else { return };
    // SAFETY: a fio exports `log_err` with printf's signature; the text is passed as an argument, never
    // as the format.
    unsafe {
        let at = libc::dlsym(libc::RTLD_DEFAULT, c"log_err".as_ptr());
        if at.is_null() {
            eprint!("{}", line.to_string_lossy());
        } else {
            let log_err = std::mem::transmute::<*mut c_void, LogErr>(at);
            log_err(c"%s".as_ptr(), line.as_ptr());
        }
    }
}

/// Refuses every fio whose structures are not the ones written down in `layout`. Called before any of
/// them is looked at.
fn refuse_other_fio() -> Result<(), String> {
    let version = layout::running_version().unwrap_or("an unknown program");
    if cfg!(target_arch = "x86_64") && layout::version_fits(version) {
        return Ok(());
    }
    Err(format!(
        "this engine is built for {} on x86-64 and cannot run inside {version}: fio's internal layout \
         differs between versions. Install Debian 12's fio.",
        layout::FIO_VERSION
    ))
}

/// An option's text.
///
/// # Safety
/// `text` is null or a C string that lives as long as the result is used.
unsafe fn text<'a>(name: &str, text: *const c_char) -> Result<&'a str, String> {
    if text.is_null() {
        return Err(format!("--{name} is missing; usage: --cluster=IP:PORT[,IP:PORT…] --image=NAME"));
    }
    // SAFETY: not null, and a C string by the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| format!("--{name} is not valid UTF-8"))
}

/// What the job's options say.
///
/// # Safety
/// `td` is fio's live `thread_data` of a job of this engine.
unsafe fn start_of<'a>(td: *mut ThreadData) -> Result<Start<'a>, String> {
    // SAFETY: fio allocated the block with `option_struct_size` bytes for this engine and keeps it, with
    // its strings, until the job is over.
    unsafe {
        let options = layout::options::<Options>(td);
        if options.is_null() {
            return Err("fio passed no options".into());
        }
        let full = if (*options).full.is_null() { "error" } else { text("full", (*options).full)? };
        let on_no_space = match full {
            "error" => OnNoSpace::Fail,
            "wait" => OnNoSpace::Wait,
            other => return Err(format!("--full must be error or wait, not {other}")),
        };
        let transport = match (*options).transport {
            none if none.is_null() => None,
            name => Some(text("transport", name)?.parse().map_err(|error| format!("--transport: {error}"))?),
        };
        let (cluster, image) = (text("cluster", (*options).cluster)?, text("image", (*options).image)?);
        Ok(Start { cluster, image, on_no_space, transport })
    }
}

/// Asks the cluster for the image's size, so that `--size` defaults to all of it. Runs in fio's main
/// process before it forks: the client made here is gone when this returns.
unsafe extern "C" fn setup(td: *mut ThreadData) -> c_int {
    let outcome = refuse_other_fio().and_then(|()| {
        // SAFETY: the version was checked, and `td` comes from fio.
        let start = unsafe { start_of(td) }?;
        let size = crate::job::image_size(&start).map_err(|error| error.to_string())?;
        // SAFETY: as above; the name is only compared, to notice a layout that is not the expected one.
        unsafe {
            let file = layout::first_file(td).ok_or("fio gave the job no file")?;
            if layout::file_name(file).is_none_or(|name| name.is_empty()) {
                return Err("fio's file structure is not the expected one".to_string());
            }
            layout::set_real_file_size(file, size);
        }
        Ok(())
    });
    status(outcome)
}

/// Opens the image for this job, in the thread or process that runs it.
unsafe extern "C" fn init(td: *mut ThreadData) -> c_int {
    let outcome = refuse_other_fio().and_then(|()| {
        // SAFETY: the version was checked, and `td` comes from fio.
        let start = unsafe { start_of(td) }?;
        let job = Job::start(&start).map_err(|error| error.to_string())?;
        // SAFETY: the block is this job's own, and only its thread is running its hooks.
        unsafe { (*layout::options::<Options>(td)).job = Box::into_raw(Box::new(job)) };
        Ok(())
    });
    status(outcome)
}

fn status(outcome: Result<(), String>) -> c_int {
    match outcome {
        Ok(()) => 0,
        Err(message) => {
            complain(&message);
            1
        }
    }
}

/// The job that `init` made, if it is still there.
///
/// # Safety
/// `td` is fio's live `thread_data`, `setup` accepted this fio, and no other reference to the job lives.
unsafe fn job_of<'a>(td: *mut ThreadData) -> Option<&'a mut Job> {
    // SAFETY: `job` is null or came from `Box::into_raw` in `init`; hooks of one job never overlap.
    unsafe { (*layout::options::<Options>(td)).job.as_mut() }
}

unsafe extern "C" fn prep(_: *mut ThreadData, _: *mut IoU) -> c_int {
    0
}

unsafe extern "C" fn commit(_: *mut ThreadData) -> c_int {
    // Submission and waiting are one system call, made in `getevents`.
    0
}

unsafe extern "C" fn nothing_to_do_for_a_file(_: *mut ThreadData, _: *mut File) -> c_int {
    0
}

unsafe extern "C" fn queue(td: *mut ThreadData, io_u: *mut IoU) -> c_int {
    // SAFETY: fio calls with its live structures, after `init`.
    let (job, request) = unsafe { (job_of(td), layout::request(io_u)) };
    let Some(job) = job else { return fail(io_u, libc::EBADF) };
    let user = io_u as u64;
    let taken = match request.direction {
        // SAFETY: fio keeps the buffer of a queued `io_u`, and leaves it alone, until `event` has
        // brought it back or the job's memory is freed, which is after `cleanup`.
        Direction::Read => unsafe { job.read(user, request.offset, request.buf, request.len) },
        // SAFETY: as for reading.
        Direction::Write => unsafe { job.write(user, request.offset, request.buf, request.len) },
        Direction::Trim => job.discard(user, request.offset, request.len),
        Direction::Sync => job.flush(user),
        Direction::Other(_) => return fail(io_u, libc::EOPNOTSUPP),
    };
    match taken {
        Ok(()) => Answer::Queued as c_int,
        Err(JobError::Busy) => Answer::Busy as c_int,
        Err(error) => {
            complain(&error.to_string());
            fail(io_u, error.errno())
        }
    }
}

fn fail(io_u: *mut IoU, errno: c_int) -> c_int {
    // SAFETY: called from `queue` with the live `io_u` that fio passed in.
    unsafe { layout::set_error(io_u, errno) };
    Answer::Completed as c_int
}

unsafe extern "C" fn getevents(
    td: *mut ThreadData,
    min: c_uint,
    max: c_uint,
    timeout: *const timespec,
) -> c_int {
    // SAFETY: fio calls with its live structures, after `init`.
    let Some(job) = (unsafe { job_of(td) }) else { return -libc::EBADF };
    // SAFETY: null or a valid `timespec` by fio's interface.
    let timeout = unsafe { timeout.as_ref() }
        .map(|t| Duration::new(t.tv_sec.max(0) as u64, t.tv_nsec.clamp(0, 999_999_999) as u32));
    match job.reap(min as usize, max as usize, timeout) {
        Ok(count) => count as c_int,
        Err(error) => {
            complain(&error.to_string());
            -error.errno()
        }
    }
}

unsafe extern "C" fn event(td: *mut ThreadData, index: c_int) -> *mut IoU {
    // SAFETY: fio calls with its live structures, after `getevents` said how many there are.
    let Some(job) = (unsafe { job_of(td) }) else { return std::ptr::null_mut() };
    let Some(done) = job.reaped(index as usize) else { return std::ptr::null_mut() };
    let io_u = done.user as *mut IoU;
    if let Err(error) = &done.result {
        complain(&error.to_string());
    }
    // SAFETY: `user` is the address of the `io_u` given to `queue`, which fio keeps until it comes back
    // from here.
    unsafe { layout::set_error(io_u, done.result.as_ref().map_or_else(JobError::errno, |()| 0)) };
    io_u
}

unsafe extern "C" fn cleanup(td: *mut ThreadData) {
    if refuse_other_fio().is_err() {
        return;
    }
    // SAFETY: the pointer is null or came from `Box::into_raw` in `init`, and is taken exactly once.
    unsafe {
        let options = layout::options::<Options>(td);
        if !options.is_null() {
            let job = std::mem::replace(&mut (*options).job, std::ptr::null_mut());
            if !job.is_null() {
                drop(Box::from_raw(job));
            }
        }
    }
}
