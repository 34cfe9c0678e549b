//! The parts of fio 3.33's memory that an engine touches, as facts about its binary interface
//! (`FIO_IOOPS_VERSION` 31, x86-64, Debian's build).
//!
//! fio hands an engine pointers into its own structures. Only the few fields named here are ever read
//! or written, each at an offset that was looked up in a running fio; everything between them stays
//! opaque. Another fio has other offsets, so `check_version` must pass before anything is touched:
//! fio itself compares `ENGINE_VERSION` when it loads the engine, and the version string is compared
//! once more because fio 3.34 and 3.35 moved fields without changing that number.
//!
//! | structure | size | fields used, with offsets |
//! |---|---|---|
//! | `ioengine_ops` | 264 | name 16, version 24, flags 28, hooks 40..248, option size 248, options 256 |
//! | `fio_option` | 1512 | name 0, lname 8, type 24, off1 28, help 112, def 120, category 1464, group 1472 |
//! | `thread_data` | opaque | eo 4216, files 188832 |
//! | `io_u` | opaque | file 32, ddir 44, offset 72, xfer_buf 104, xfer_buflen 112, error 144 |
//! | `fio_file` | opaque | file_name 40, real_file_size 48 |

use libc::{c_char, c_int, c_uint, c_void, timespec};
use std::ffi::CStr;
use std::ptr::NonNull;

/// The interface version that fio compares when it loads an engine.
pub const ENGINE_VERSION: c_int = 31;
/// The only fio whose layout is written down here. Distributions append their own suffix.
pub const FIO_VERSION: &str = "fio-3.33";

/// `ioengine_ops.flags`: the engine has no file behind it.
pub const FLAG_DISKLESS: c_int = 1 << 2;
/// The engine cannot make files longer.
pub const FLAG_NO_EXTEND: c_int = 1 << 3;
/// There is no kernel disk whose utilisation fio could show.
pub const FLAG_NO_DISK_UTIL: c_int = 1 << 4;
/// Buffers are wanted aligned as for direct I/O.
pub const FLAG_MEM_ALIGN: c_int = 1 << 9;

/// `fio_option.type` of a string whose copy is stored in the options block.
pub const OPTION_STRING: c_int = 6;
/// `fio_option.category`: options of engines.
pub const CATEGORY_ENGINE: u64 = 1 << 6;
/// `fio_option.group`: a group must be named; this is the one of network block devices.
pub const GROUP_NETWORK_BLOCK: u64 = 1 << 37;

/// What fio asks of a queued `io_u`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Read,
    Write,
    Trim,
    Sync,
    /// Anything this engine has no operation for, by fio's number.
    Other(c_int),
}

/// fio's answer codes of `queue`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum Answer {
    /// Done already; `io_u.error` says how.
    Completed = 0,
    /// Taken; `getevents` will bring it.
    Queued = 1,
    /// No room now; fio reaps events and asks again.
    Busy = 2,
}

/// `ioengine_ops`. fio links engines by its first 16 bytes.
#[repr(C)]
pub struct EngineOps {
    pub list: [*mut c_void; 2],
    pub name: *const c_char,
    pub version: c_int,
    pub flags: c_int,
    pub reserved: *mut c_void,
    pub setup: Option<unsafe extern "C" fn(*mut ThreadData) -> c_int>,
    pub init: Option<unsafe extern "C" fn(*mut ThreadData) -> c_int>,
    pub post_init: Option<unsafe extern "C" fn(*mut ThreadData) -> c_int>,
    pub prep: Option<unsafe extern "C" fn(*mut ThreadData, *mut IoU) -> c_int>,
    pub queue: Option<unsafe extern "C" fn(*mut ThreadData, *mut IoU) -> c_int>,
    pub commit: Option<unsafe extern "C" fn(*mut ThreadData) -> c_int>,
    pub getevents: Option<unsafe extern "C" fn(*mut ThreadData, c_uint, c_uint, *const timespec) -> c_int>,
    pub event: Option<unsafe extern "C" fn(*mut ThreadData, c_int) -> *mut IoU>,
    pub errdetails: *const c_void,
    pub cancel: *const c_void,
    pub cleanup: Option<unsafe extern "C" fn(*mut ThreadData)>,
    pub open_file: Option<unsafe extern "C" fn(*mut ThreadData, *mut File) -> c_int>,
    pub close_file: Option<unsafe extern "C" fn(*mut ThreadData, *mut File) -> c_int>,
    pub invalidate: Option<unsafe extern "C" fn(*mut ThreadData, *mut File) -> c_int>,
    pub unlink_file: *const c_void,
    pub get_file_size: Option<unsafe extern "C" fn(*mut ThreadData, *mut File) -> c_int>,
    pub unused: [*const c_void; 10],
    pub option_struct_size: c_int,
    pub options: *mut OptionEntry,
}

// SAFETY: fio alone writes to the structure (its list links), under its own locking, and everything
// that the pointers lead to is immutable after loading.
unsafe impl Sync for EngineOps {}

const _: () = {
    assert!(size_of::<EngineOps>() == 264);
    assert!(std::mem::offset_of!(EngineOps, name) == 16);
    assert!(std::mem::offset_of!(EngineOps, setup) == 40);
    assert!(std::mem::offset_of!(EngineOps, queue) == 72);
    assert!(std::mem::offset_of!(EngineOps, cleanup) == 120);
    assert!(std::mem::offset_of!(EngineOps, get_file_size) == 160);
    assert!(std::mem::offset_of!(EngineOps, option_struct_size) == 248);
};

/// `fio_option`: one entry of the engine's option table, ended by an entry without a name.
#[repr(C)]
pub struct OptionEntry {
    pub name: *const c_char,
    pub long_name: *const c_char,
    pub alias: *const c_char,
    pub kind: c_int,
    pub offset: c_uint,
    pub gap_a: [u8; 24],
    pub max: u64,
    pub gap_b: [u8; 48],
    pub help: *const c_char,
    pub default: *const c_char,
    pub gap_c: [u8; 1336],
    pub category: u64,
    pub group: u64,
    pub gap_d: [u8; 32],
}

const _: () = {
    assert!(size_of::<OptionEntry>() == 1512);
    assert!(std::mem::offset_of!(OptionEntry, kind) == 24);
    assert!(std::mem::offset_of!(OptionEntry, max) == 56);
    assert!(std::mem::offset_of!(OptionEntry, help) == 112);
    assert!(std::mem::offset_of!(OptionEntry, default) == 120);
    assert!(std::mem::offset_of!(OptionEntry, category) == 1464);
};

impl OptionEntry {
    /// The entry that ends the table.
    pub const END: Self = Self {
        name: std::ptr::null(),
        long_name: std::ptr::null(),
        alias: std::ptr::null(),
        kind: 0,
        offset: 0,
        gap_a: [0; 24],
        max: 0,
        gap_b: [0; 48],
        help: std::ptr::null(),
        default: std::ptr::null(),
        gap_c: [0; 1336],
        category: 0,
        group: 0,
        gap_d: [0; 32],
    };

    /// A string option stored as `char *` at `offset` of the options block.
    pub const fn string(
        name: &'static CStr,
        title: &'static CStr,
        help: &'static CStr,
        offset: usize,
    ) -> Self {
        Self {
            name: name.as_ptr(),
            long_name: title.as_ptr(),
            kind: OPTION_STRING,
            offset: offset as c_uint,
            help: help.as_ptr(),
            category: CATEGORY_ENGINE,
            group: GROUP_NETWORK_BLOCK,
            ..Self::END
        }
    }
}

/// fio's job, opaque but for the fields below.
#[repr(C)]
pub struct ThreadData {
    opaque: [u8; 0],
}

/// fio's file, opaque but for the fields below.
#[repr(C)]
pub struct File {
    opaque: [u8; 0],
}

/// fio's unit of I/O, opaque but for the fields below.
#[repr(C)]
pub struct IoU {
    opaque: [u8; 0],
}

const TD_EO: usize = 4216;
const TD_FILES: usize = 188_832;
const FILE_NAME: usize = 40;
const FILE_REAL_SIZE: usize = 48;
const IO_U_DDIR: usize = 44;
const IO_U_OFFSET: usize = 72;
const IO_U_XFER_BUF: usize = 104;
const IO_U_XFER_BUFLEN: usize = 112;
const IO_U_ERROR: usize = 144;

/// Reads the field of type `T` at `offset` bytes behind `base`.
///
/// # Safety
/// `base` must point to the fio structure that the offset belongs to, in a fio that `check_version`
/// accepted.
unsafe fn get<T: Copy, B>(base: *const B, offset: usize) -> T {
    // SAFETY: by the caller's promise the field lies there with this type; read unaligned because the
    // opaque type promises no alignment.
    unsafe { base.cast::<u8>().add(offset).cast::<T>().read_unaligned() }
}

/// Writes the field of type `T` at `offset` bytes behind `base`.
///
/// # Safety
/// As `get`, and nobody else accesses the field at the same time.
unsafe fn set<T, B>(base: *mut B, offset: usize, value: T) {
    // SAFETY: by the caller's promise the field lies there with this type.
    unsafe { base.cast::<u8>().add(offset).cast::<T>().write_unaligned(value) }
}

/// The engine's options block of a job: allocated and filled by fio, one per job.
///
/// # Safety
/// `td` is fio's live `thread_data`.
pub unsafe fn options<T>(td: *mut ThreadData) -> *mut T {
    // SAFETY: `eo` is a pointer at this offset in the accepted version.
    unsafe { get::<*mut T, _>(td, TD_EO) }
}

/// The job's first file, if it has any.
///
/// # Safety
/// `td` is fio's live `thread_data`.
pub unsafe fn first_file(td: *mut ThreadData) -> Option<NonNull<File>> {
    // SAFETY: `files` is an array of pointers, null while the job has no file.
    unsafe {
        let files = NonNull::new(get::<*mut *mut File, _>(td, TD_FILES))?;
        NonNull::new(files.as_ptr().read())
    }
}

/// The file's name, for the check that the layout is the expected one.
///
/// # Safety
/// `file` is a live `fio_file` of this job.
pub unsafe fn file_name<'a>(file: NonNull<File>) -> Option<&'a CStr> {
    // SAFETY: `file_name` is null or a C string that fio keeps as long as the file.
    unsafe {
        let name = NonNull::new(get::<*mut c_char, _>(file.as_ptr(), FILE_NAME))?;
        Some(CStr::from_ptr(name.as_ptr()))
    }
}

/// Tells fio how long the file is.
///
/// # Safety
/// `file` is a live `fio_file` of this job; called from the job's set-up.
pub unsafe fn set_real_file_size(file: NonNull<File>, bytes: u64) {
    // SAFETY: the field is a `uint64_t` at this offset in the accepted version.
    unsafe { set(file.as_ptr(), FILE_REAL_SIZE, bytes) }
}

/// What an `io_u` asks for.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub direction: Direction,
    pub offset: u64,
    pub buf: *mut u8,
    pub len: u64,
}

/// Reads an `io_u`.
///
/// # Safety
/// `io_u` is the live unit that fio passed in.
pub unsafe fn request(io_u: *const IoU) -> Request {
    // SAFETY: fields and types of the accepted version.
    unsafe {
        Request {
            direction: match get::<c_int, _>(io_u, IO_U_DDIR) {
                0 => Direction::Read,
                1 => Direction::Write,
                2 => Direction::Trim,
                3 | 4 => Direction::Sync,
                other => Direction::Other(other),
            },
            offset: get(io_u, IO_U_OFFSET),
            buf: get(io_u, IO_U_XFER_BUF),
            len: get(io_u, IO_U_XFER_BUFLEN),
        }
    }
}

/// Sets an `io_u`'s errno; 0 is success.
///
/// # Safety
/// `io_u` is a live unit that the engine holds.
pub unsafe fn set_error(io_u: *mut IoU, errno: c_int) {
    // SAFETY: the field is an `unsigned int` at this offset in the accepted version.
    unsafe { set(io_u, IO_U_ERROR, errno as c_uint) }
}

/// The version that the fio in this process says it is, or `None` when it says nothing (not a fio).
pub fn running_version() -> Option<&'static str> {
    // SAFETY: a fio exports the NUL-terminated array `fio_version_string`; a null result is handled.
    unsafe {
        let at = NonNull::new(libc::dlsym(libc::RTLD_DEFAULT, c"fio_version_string".as_ptr()))?;
        CStr::from_ptr(at.as_ptr().cast()).to_str().ok()
    }
}

/// Whether the layouts above are those of the fio that says it is `version`.
pub fn version_fits(version: &str) -> bool {
    // "fio-3.33" or "fio-3.33-dirty", but neither "fio-3.330" nor "fio-3.33.1".
    version
        .strip_prefix(FIO_VERSION)
        .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_known_version_fits() {
        assert!(version_fits("fio-3.33"));
        assert!(version_fits("fio-3.33-dirty"));
        for other in ["fio-3.3", "fio-3.330", "fio-3.34", "fio-3.33.1", "3.33", ""] {
            assert!(!version_fits(other), "{other}");
        }
    }
}
