//! The C interface. `include/drystone.h` is generated from this file (`make header`, checked by a test).
//!
//! Every function returns 0 or a count on success and a negative errno on failure, and never unwinds into
//! the caller: a panic is caught, and the client it happened in answers `-EIO` from then on.

#![allow(non_camel_case_types, reason = "names as C programs write them")]

use crate::errno;
use crate::nonblocking::{Client, Hosting};
use client::{AdminDone, AdminTicket, ImageHandle, OnNoSpace, Op, OpenMode, Options};
use reactor::IoBuf;
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::time::Duration;

/// Version of this interface: rises when a program has to be compiled anew.
pub const DRYSTONE_ABI_VERSION: u32 = 1;

/// `drystone_open`: reads, writes, discards, write-zeroes and flushes.
pub const DRYSTONE_READ_WRITE: u32 = 0;
/// `drystone_open`: reads and flushes only.
pub const DRYSTONE_READ_ONLY: u32 = 1;

/// `drystone_options.flags`: the client may be called from different threads, one at a time.
pub const DRYSTONE_MOVABLE: u32 = 1;
/// `drystone_options.flags`: a write that finds no space waits until there is some.
pub const DRYSTONE_WAIT_FOR_SPACE: u32 = 2;

/// `drystone_completion.kind`: a read, write, discard, write-zeroes or flush.
pub const DRYSTONE_IO: u32 = 0;
/// `drystone_completion.kind`: a `drystone_open_async`.
pub const DRYSTONE_OPENED: u32 = 1;

/// A client: any number of images of one cluster, served by the thread that calls. Use several in several
/// threads.
pub struct drystone_client {
    client: Client,
    /// A panic or a failed ring: nothing can be relied on any more.
    dead: bool,
    error: CString,
    /// Opens under way: their tickets and what the caller calls them; `None` for `drystone_open`.
    opens: Vec<(AdminTicket, Option<u64>)>,
    /// Opens that are done and not yet polled.
    opened: VecDeque<drystone_completion>,
}

/// How a client behaves. All zero means the defaults.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct drystone_options {
    /// `DRYSTONE_MOVABLE`, `DRYSTONE_WAIT_FOR_SPACE`.
    pub flags: u32,
    /// Reserved, zero.
    pub reserved: u32,
    /// Milliseconds after which an operation ends with `-ETIMEDOUT`; 0 = it is tried forever.
    pub io_timeout_ms: u64,
    /// Milliseconds that opening an image may take; 0 = 10,000.
    pub open_timeout_ms: u64,
}

/// A finished operation.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct drystone_completion {
    /// From the call that started it.
    pub user: u64,
    /// The image opened (`DRYSTONE_OPENED`), else 0.
    pub image: u64,
    /// 0, or a negative errno.
    pub result: i32,
    /// `DRYSTONE_IO` or `DRYSTONE_OPENED`.
    pub kind: u32,
}

/// A negative errno and what to tell a person.
struct Failure(c_int, String);

impl Failure {
    fn new(errno: c_int, text: impl Into<String>) -> Self {
        Self(errno, text.into())
    }
}

fn c_string(text: String) -> CString {
    let clean: Vec<u8> = text.into_bytes().into_iter().filter(|byte| *byte != 0).collect();
    CString::new(clean).unwrap_or_default()
}

/// Runs `act` unless the client cannot be used, and turns what it says into a return value.
///
/// # Safety
/// `client` is null or came from `drystone_connect` and has not been freed.
unsafe fn enter(
    client: *mut drystone_client,
    act: impl FnOnce(&mut drystone_client) -> Result<c_int, Failure>,
) -> c_int {
    // SAFETY: promised by the caller; calls do not overlap, by the interface's rules.
    let Some(client) = (unsafe { client.as_mut() }) else { return -libc::EINVAL };
    let result = if client.dead {
        Err(Failure::new(libc::EIO, "the client has failed earlier"))
    } else if !client.client.admits_caller() {
        Err(Failure::new(libc::EPERM, "called from another thread than the one that connected"))
    } else {
        catch_unwind(AssertUnwindSafe(|| act(client))).unwrap_or_else(|_| {
            client.dead = true;
            Err(Failure::new(libc::EIO, "internal error (panic); see standard error"))
        })
    };
    match result {
        Ok(value) => value,
        Err(Failure(errno, text)) => {
            client.error = c_string(text);
            -errno
        }
    }
}

fn text_of<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::new(libc::EINVAL, format!("{what} is NULL")));
    }
    // SAFETY: not null, and the interface asks for a NUL-terminated string that lives during the call.
    unsafe { CStr::from_ptr(text) }
        .to_str()
        .map_err(|_| Failure::new(libc::EINVAL, format!("{what} is not UTF-8")))
}

fn addresses_of(text: &str) -> Result<Vec<SocketAddr>, Failure> {
    let mut all = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let found = part.to_socket_addrs().map_err(|error| {
            Failure::new(libc::EINVAL, format!("address {part}: {error} (want HOST:PORT)"))
        })?;
        all.extend(found);
    }
    if all.is_empty() {
        return Err(Failure::new(libc::EINVAL, "no address given"));
    }
    Ok(all)
}

fn mode_of(mode: u32) -> Result<OpenMode, Failure> {
    match mode {
        DRYSTONE_READ_WRITE => Ok(OpenMode::ReadWrite),
        DRYSTONE_READ_ONLY => Ok(OpenMode::ReadOnly),
        _ => Err(Failure::new(libc::EINVAL, format!("unknown mode {mode}"))),
    }
}

fn connect(addresses: *const c_char, options: drystone_options) -> Result<drystone_client, Failure> {
    let addresses = addresses_of(text_of(addresses, "addresses")?)?;
    if options.flags & !(DRYSTONE_MOVABLE | DRYSTONE_WAIT_FOR_SPACE) != 0 || options.reserved != 0 {
        return Err(Failure::new(libc::EINVAL, "unknown option flags"));
    }
    let movable = options.flags & DRYSTONE_MOVABLE != 0;
    let mut choices = Options::default();
    if options.io_timeout_ms > 0 {
        choices.io_timeout_ms = Some(options.io_timeout_ms);
    }
    if options.open_timeout_ms > 0 {
        choices.admin_timeout_ms = options.open_timeout_ms;
    }
    if options.flags & DRYSTONE_WAIT_FOR_SPACE != 0 {
        choices.on_no_space = OnNoSpace::Wait;
    }
    let client = Client::hosted(&addresses, choices, Hosting { movable, ..Hosting::default() })
        .map_err(|error| Failure::new(libc::EIO, error.to_string()))?;
    Ok(drystone_client {
        client,
        dead: false,
        error: CString::default(),
        opens: Vec::new(),
        opened: VecDeque::new(),
    })
}

/// Makes a client. `addresses` is `HOST:PORT[,HOST:PORT...]`, control addresses of any nodes; `options`
/// may be NULL. On success `*client` is set. Connecting itself happens later: an unreachable cluster shows
/// in `drystone_open`.
///
/// # Safety
/// `addresses` is NUL-terminated; `options` and `client` point to what they say or are NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_connect(
    addresses: *const c_char,
    options: *const drystone_options,
    client: *mut *mut drystone_client,
) -> c_int {
    if client.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: null or valid, by the interface's rules.
    let options = unsafe { options.as_ref() }.copied().unwrap_or_default();
    match catch_unwind(|| connect(addresses, options)) {
        Ok(Ok(made)) => {
            // SAFETY: not null, and points to a pointer by the interface's rules.
            unsafe { client.write(Box::into_raw(Box::new(made))) };
            0
        }
        Ok(Err(Failure(errno, _))) => -errno,
        Err(_) => -libc::EIO,
    }
}

/// Ends a client and sets `*client` to NULL, so that a second call does nothing. Operations under way are
/// given up: writes may have happened or not. Afterwards no buffer is touched any more.
///
/// # Safety
/// `client` is NULL or points to NULL or to what `drystone_connect` gave.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_free(client: *mut *mut drystone_client) {
    if client.is_null() {
        return;
    }
    // SAFETY: not null, and points to a pointer by the interface's rules.
    let taken = unsafe { client.replace(std::ptr::null_mut()) };
    if !taken.is_null() {
        // SAFETY: came from `Box::into_raw` in `drystone_connect`, and is dropped only here, once,
        // because the caller's pointer is NULL from now on.
        let owned = unsafe { Box::from_raw(taken) };
        // A panic while ending must not reach the caller; there is nobody left to report it to.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(owned)));
    }
}

fn turn(client: &mut drystone_client, wait: Option<Duration>) -> Result<usize, Failure> {
    let events = client.client.poll(wait).map_err(|error| {
        client.dead = true;
        Failure::new(libc::EIO, error.to_string())
    })?;
    while let Some(done) = client.client.next_admin() {
        let AdminDone::Opened { ticket, result } = done else { continue };
        let Some(place) = client.opens.iter().position(|(of, _)| *of == ticket) else { continue };
        let (_, user) = client.opens.swap_remove(place);
        let mut completion = drystone_completion { kind: DRYSTONE_OPENED, ..Default::default() };
        completion.user = user.unwrap_or(ticket.0);
        match result {
            Ok(handle) => completion.image = handle.to_raw(),
            Err(error) => {
                completion.result = -errno::of_admin(&error);
                client.error = c_string(error.to_string());
            }
        }
        match user {
            Some(_) => client.opened.push_back(completion),
            // For the `drystone_open` that waits in this very call.
            None => client.opened.push_front(completion),
        }
    }
    Ok(events)
}

/// Opens an image by name and waits for it; operations under way go on meanwhile. On success `*image` is
/// set. `mode` is `DRYSTONE_READ_WRITE` or `DRYSTONE_READ_ONLY`. Typical errors: `-ENOENT`,
/// `-EHOSTUNREACH`, `-ETIMEDOUT`; `drystone_last_error` says more.
///
/// # Safety
/// `client` came from `drystone_connect`; `name` is NUL-terminated; `image` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_open(
    client: *mut drystone_client,
    name: *const c_char,
    mode: u32,
    image: *mut u64,
) -> c_int {
    let act = |client: &mut drystone_client| {
        if image.is_null() {
            return Err(Failure::new(libc::EINVAL, "image is NULL"));
        }
        let ticket = client.client.open(text_of(name, "name")?, mode_of(mode)?);
        client.opens.push((ticket, None));
        // Ends by itself: opening has a time limit.
        while client.opens.iter().any(|(of, _)| *of == ticket) {
            turn(client, Some(Duration::from_millis(100)))?;
        }
        let done = client.opened.pop_front().unwrap_or_default();
        if done.result < 0 {
            let text = client.error.to_string_lossy().into_owned();
            return Err(Failure::new(-done.result, text));
        }
        // SAFETY: not null, and writable by the interface's rules.
        unsafe { image.write(done.image) };
        Ok(0)
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

/// Starts opening an image; a completion of kind `DRYSTONE_OPENED` with `user` follows.
///
/// # Safety
/// `client` came from `drystone_connect`; `name` is NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_open_async(
    client: *mut drystone_client,
    name: *const c_char,
    mode: u32,
    user: u64,
) -> c_int {
    let act = |client: &mut drystone_client| {
        let ticket = client.client.open(text_of(name, "name")?, mode_of(mode)?);
        client.opens.push((ticket, Some(user)));
        Ok(0)
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

fn handle_of(client: &drystone_client, image: u64) -> Result<ImageHandle, Failure> {
    let handle = ImageHandle::from_raw(image);
    match client.client.info(handle) {
        Some(_) => Ok(handle),
        None => Err(Failure::new(libc::EBADF, "image is not open")),
    }
}

/// Takes no more operations for an image; those under way complete. A second close gives `-EBADF`.
///
/// # Safety
/// `client` came from `drystone_connect`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_close(client: *mut drystone_client, image: u64) -> c_int {
    let act = |client: &mut drystone_client| {
        let handle = handle_of(client, image)?;
        client.client.close(handle);
        Ok(0)
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

/// The image's size in bytes, which follows a resize.
///
/// # Safety
/// `client` came from `drystone_connect`; `size_bytes` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_size(
    client: *mut drystone_client,
    image: u64,
    size_bytes: *mut u64,
) -> c_int {
    let act = |client: &mut drystone_client| {
        if size_bytes.is_null() {
            return Err(Failure::new(libc::EINVAL, "size_bytes is NULL"));
        }
        let handle = handle_of(client, image)?;
        let info =
            client.client.info(handle).ok_or_else(|| Failure::new(libc::EBADF, "image is not open"))?;
        if info.removed {
            return Err(Failure::new(libc::ESTALE, "image was removed"));
        }
        // SAFETY: not null, and writable by the interface's rules.
        unsafe { size_bytes.write(info.size_bytes) };
        Ok(0)
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

fn submit(client: &mut drystone_client, image: u64, op: Op, user: u64) -> Result<c_int, Failure> {
    match client.client.submit(ImageHandle::from_raw(image), op, user) {
        Ok(_) => Ok(0),
        Err((error, _)) => Err(Failure::new(errno::of_submit(error), error.to_string())),
    }
}

fn buffer(ptr: *mut c_void, len: usize) -> Result<IoBuf, Failure> {
    let ptr = NonNull::new(ptr.cast::<u8>()).ok_or_else(|| Failure::new(libc::EINVAL, "buffer is NULL"))?;
    // SAFETY: the interface asks the caller to leave the memory alone until the completion, or until the
    // client is freed; the client gives up its handles before either.
    Ok(unsafe { IoBuf::foreign(ptr, len) })
}

/// Starts a read of `len` bytes at `offset`, both multiples of 4096, into `buffer`, which must not be
/// touched until the completion. `-EAGAIN`: too much is under way, poll first.
///
/// # Safety
/// `client` came from `drystone_connect`; `buffer` is writable for `len` bytes until the completion was
/// polled or the client was freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_read(
    client: *mut drystone_client,
    image: u64,
    offset: u64,
    buffer: *mut c_void,
    len: usize,
    user: u64,
) -> c_int {
    let act = |client: &mut drystone_client| {
        let buf = self::buffer(buffer, len)?;
        submit(client, image, Op::Read { offset, buf }, user)
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

/// Starts a write of `len` bytes at `offset`, both multiples of 4096, from `buffer`, which must not change
/// until the completion. Once completed the data is durable. `-EAGAIN`: too much is under way, poll first.
///
/// # Safety
/// `client` came from `drystone_connect`; `buffer` is readable for `len` bytes until the completion was
/// polled or the client was freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_write(
    client: *mut drystone_client,
    image: u64,
    offset: u64,
    buffer: *const c_void,
    len: usize,
    user: u64,
) -> c_int {
    let act = |client: &mut drystone_client| {
        let buf = self::buffer(buffer.cast_mut(), len)?;
        submit(client, image, Op::Write { offset, buf }, user)
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

/// Says that a range need not be kept: it reads as zeroes from then on, and its space is freed.
///
/// # Safety
/// `client` came from `drystone_connect`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_discard(
    client: *mut drystone_client,
    image: u64,
    offset: u64,
    len: u64,
    user: u64,
) -> c_int {
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, |client| submit(client, image, Op::Discard { offset, len }, user)) }
}

/// Makes a range read as zeroes.
///
/// # Safety
/// `client` came from `drystone_connect`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_write_zeroes(
    client: *mut drystone_client,
    image: u64,
    offset: u64,
    len: u64,
    user: u64,
) -> c_int {
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, |client| submit(client, image, Op::WriteZeroes { offset, len }, user)) }
}

/// Completes once every write, discard and write-zeroes of this image submitted before has completed.
///
/// # Safety
/// `client` came from `drystone_connect`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_flush(client: *mut drystone_client, image: u64, user: u64) -> c_int {
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, |client| submit(client, image, Op::Flush, user)) }
}

/// Sends, receives, and writes up to `max` completions to `completions`; returns how many. With none at
/// hand it waits up to `timeout_us` microseconds for one (0: not at all, negative: as long as it takes).
/// Before waiting on `drystone_event_fd` instead, call it until it returns 0.
///
/// # Safety
/// `client` came from `drystone_connect`; `completions` is writable for `max` entries.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_poll(
    client: *mut drystone_client,
    completions: *mut drystone_completion,
    max: u32,
    timeout_us: i64,
) -> c_int {
    let act = |client: &mut drystone_client| {
        if completions.is_null() || max == 0 {
            return Err(Failure::new(libc::EINVAL, "no room for completions"));
        }
        let max = max.min(c_int::MAX as u32) as usize;
        let mut count = 0;
        let wait_us = u64::try_from(timeout_us).ok().filter(|us| *us > 0);
        let end = wait_us.map(|us| client.client.now().plus_ns(us.saturating_mul(1000)));
        loop {
            while count < max
                && let Some(done) = next_completion(client)
            {
                // SAFETY: `count < max` entries are writable by the interface's rules.
                unsafe { completions.add(count).write(done) };
                count += 1;
            }
            let wait = match end {
                _ if count > 0 || timeout_us == 0 => None,
                None => Some(Duration::from_secs(1)),
                Some(end) => Some(Duration::from_nanos(end.since(client.client.now()))),
            };
            let events = turn(client, wait)?;
            let expired = wait.is_some_and(|wait| wait.is_zero());
            if count > 0 || (events == 0 && (wait.is_none() || expired) && !has_completion(client)) {
                return Ok(count as c_int);
            }
        }
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

fn next_completion(client: &mut drystone_client) -> Option<drystone_completion> {
    if let Some(opened) = client.opened.pop_front() {
        return Some(opened);
    }
    let done = client.client.next_io()?;
    let result = done.result.map_or_else(|error| -errno::of_io(error), |()| 0);
    Some(drystone_completion { user: done.user, image: 0, result, kind: DRYSTONE_IO })
}

fn has_completion(client: &drystone_client) -> bool {
    !client.opened.is_empty() || client.client.has_io()
}

/// A descriptor that becomes readable when `drystone_poll` has something to do. It belongs to the client:
/// do not read or close it.
///
/// # Safety
/// `client` came from `drystone_connect`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_event_fd(client: *mut drystone_client) -> c_int {
    let act = |client: &mut drystone_client| match client.client.event_fd() {
        Ok(fd) => Ok(fd.as_raw_fd()),
        Err(error) => Err(Failure::new(error.raw_os_error().unwrap_or(libc::EIO), error.to_string())),
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

/// Milliseconds after which `drystone_poll` has to be called even if the descriptor stays silent, rounded
/// up; `-1` when there is no such time. Fits `poll(2)` and `epoll_wait(2)`.
///
/// # Safety
/// `client` came from `drystone_connect`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_next_due_ms(client: *mut drystone_client) -> c_int {
    let act = |client: &mut drystone_client| {
        let due = client.client.next_due().map(|due| due.as_micros().div_ceil(1000));
        Ok(due.map_or(-1, |ms| c_int::try_from(ms).unwrap_or(c_int::MAX)))
    };
    // SAFETY: the caller's promise is this function's.
    unsafe { enter(client, act) }
}

/// What went wrong last with this client, for a person; empty when nothing did. Valid until the next call
/// with this client.
///
/// # Safety
/// `client` is NULL or came from `drystone_connect`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drystone_last_error(client: *const drystone_client) -> *const c_char {
    // SAFETY: null or valid by the interface's rules.
    match unsafe { client.as_ref() } {
        Some(client) => client.error.as_ptr(),
        None => c"no client".as_ptr(),
    }
}

/// A return value or a completion's result in words. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drystone_strerror(result: c_int) -> *const c_char {
    let text = match result.saturating_neg() {
        libc::EAGAIN => c"too many operations under way",
        libc::EINVAL => c"invalid argument (offset and length must be multiples of 4096)",
        libc::E2BIG => c"longer than 32 MiB",
        libc::ERANGE => c"range ends behind the end of the image",
        libc::EBADF => c"image is not open",
        libc::ESTALE => c"image was removed",
        libc::EACCES => c"not allowed by the mode the image was opened with",
        libc::ETIMEDOUT => c"timed out",
        libc::ENOSPC => c"no space left in the pool",
        libc::EIO => c"I/O error",
        libc::EILSEQ => c"checksum mismatch",
        libc::ENOENT => c"not found",
        libc::EPROTO => c"unexpected answer",
        libc::EHOSTUNREACH => c"no node of the cluster can be reached",
        libc::EPROTONOSUPPORT => c"the node speaks another protocol version",
        libc::ECONNREFUSED => c"the node refused the connection",
        libc::EMFILE => c"too many images are open",
        libc::EPERM => c"called from another thread than the one that connected",
        ok if ok <= 0 => c"ok",
        _ => c"unknown error",
    };
    text.as_ptr()
}

/// The library's version, such as `0.1.0`. Static.
#[unsafe(no_mangle)]
pub extern "C" fn drystone_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// `DRYSTONE_ABI_VERSION` of the library that is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn drystone_abi_version() -> u32 {
    DRYSTONE_ABI_VERSION
}
