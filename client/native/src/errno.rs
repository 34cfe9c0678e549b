//! Errors as the numbers that C programs know.

use client::{AdminError, IoError, SubmitError};
use wire::Status;

/// The errno (positive) of a refused operation.
pub(crate) fn of_submit(error: SubmitError) -> i32 {
    match error {
        SubmitError::Busy => libc::EAGAIN,
        SubmitError::Unaligned | SubmitError::Empty | SubmitError::BufferShared => libc::EINVAL,
        SubmitError::TooLong => libc::E2BIG,
        SubmitError::OutOfRange { .. } => libc::ERANGE,
        SubmitError::NotOpen => libc::EBADF,
        SubmitError::ImageRemoved => libc::ESTALE,
        SubmitError::NotAllowed => libc::EACCES,
    }
}

/// The errno (positive) of a failed operation.
pub(crate) fn of_io(error: IoError) -> i32 {
    match error {
        IoError::TimedOut => libc::ETIMEDOUT,
        IoError::NoSpace => libc::ENOSPC,
        IoError::Device => libc::EIO,
        IoError::Corrupt => libc::EILSEQ,
        IoError::Invalid => libc::EINVAL,
        IoError::NotFound => libc::ENOENT,
        IoError::ImageRemoved => libc::ESTALE,
        IoError::Refused(_) => libc::EPROTO,
    }
}

/// The errno (positive) of a failed open or metadata request.
pub(crate) fn of_admin(error: &AdminError) -> i32 {
    match error {
        AdminError::Unreachable { .. } => libc::EHOSTUNREACH,
        AdminError::NoAnswer { .. } => libc::ETIMEDOUT,
        AdminError::Refused { status: Status::WrongVersion, .. } => libc::EPROTONOSUPPORT,
        AdminError::Refused { .. } => libc::ECONNREFUSED,
        AdminError::NotFound => libc::ENOENT,
        AdminError::Removing => libc::ESTALE,
        AdminError::TooLarge => libc::E2BIG,
        AdminError::OutcomeUnknown => libc::EINPROGRESS,
        AdminError::Malformed { .. } => libc::EPROTO,
        AdminError::TooManyImages => libc::EMFILE,
    }
}
