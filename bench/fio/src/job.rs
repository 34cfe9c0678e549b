//! One fio job: a client with one open image, and the operations under way.

use drystone::{
    AdminDone, AdminError, Client, CoreError, Hosting, ImageHandle, IoBuf, IoDone, IoError, OnNoSpace, Op,
    OpenMode, Options, SubmitError, TransportChoice,
};
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::ptr::NonNull;
use std::time::Duration;

/// One sleep while waiting: a safety net, everything that matters ends it earlier.
const TURN: Duration = Duration::from_secs(1);

/// What a job works on.
pub struct Start<'a> {
    /// `IP:PORT[,…]`.
    pub cluster: &'a str,
    /// The image's name.
    pub image: &'a str,
    /// What a write does when there is no space.
    pub on_no_space: OnNoSpace,
    /// RDMA, TCP or whichever works.
    pub transport: Option<TransportChoice>,
}

/// Why something failed.
#[derive(Debug)]
pub enum JobError {
    /// Too much is under way; not an error, fio asks again.
    Busy,
    /// `--cluster` makes no sense.
    Address(String),
    /// The client could not be made, or broke.
    Client(CoreError),
    /// The image could not be opened.
    Open(String, AdminError),
    /// An operation was refused; nothing has happened.
    Submit { offset: u64, len: u64, error: SubmitError },
    /// An operation failed.
    Io { error: IoError },
    /// fio passed a null buffer.
    NoBuffer,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => write!(f, "too much is under way"),
            Self::Address(text) => {
                write!(f, "--cluster={text} names no usable address: write IP:PORT[,IP:PORT…]")
            }
            Self::Client(error) => write!(f, "the client cannot run: {error}"),
            Self::Open(image, error) => write!(f, "cannot open image {image}: {error}"),
            Self::Submit { offset, len, error } => {
                write!(f, "operation of {len} bytes at {offset} refused: {error}")
            }
            Self::Io { error } => write!(f, "operation failed: {error}"),
            Self::NoBuffer => write!(f, "fio passed no buffer"),
        }
    }
}

impl JobError {
    /// The errno that fio is told.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Busy => libc::EAGAIN,
            Self::Address(_) | Self::Submit { .. } | Self::NoBuffer => libc::EINVAL,
            Self::Open(_, AdminError::NotFound) => libc::ENOENT,
            Self::Client(_) | Self::Open(..) => libc::EIO,
            Self::Io { error } => match error {
                IoError::TimedOut => libc::ETIMEDOUT,
                IoError::NoSpace => libc::ENOSPC,
                IoError::Corrupt => libc::EILSEQ,
                IoError::Invalid => libc::EINVAL,
                IoError::NotFound | IoError::ImageRemoved => libc::ENOENT,
                IoError::Device | IoError::Refused(_) => libc::EIO,
            },
        }
    }
}

/// An operation that ended.
pub struct Completed {
    /// As given when it was submitted.
    pub user: u64,
    /// What became of it.
    pub result: Result<(), JobError>,
}

/// A running job.
pub struct Job {
    client: Client,
    image: ImageHandle,
    reaped: Vec<Completed>,
}

fn addresses(text: &str) -> Result<Vec<SocketAddr>, JobError> {
    let mut all = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        all.extend(part.to_socket_addrs().map_err(|_| JobError::Address(text.to_string()))?);
    }
    if all.is_empty() { Err(JobError::Address(text.to_string())) } else { Ok(all) }
}

/// The image's size in bytes, asked through a client that is gone afterwards.
pub fn image_size(start: &Start<'_>) -> Result<u64, JobError> {
    let job = Job::start(start)?;
    Ok(job.client.info(job.image).map_or(0, |info| info.size_bytes))
}

impl Job {
    /// Connects and opens the image, in the thread that will use it.
    pub fn start(start: &Start<'_>) -> Result<Self, JobError> {
        let options = Options { on_no_space: start.on_no_space, ..Options::default() };
        let mut hosting = Hosting::default();
        if let Some(transport) = start.transport {
            hosting.transport = transport;
        }
        let mut client =
            Client::hosted(&addresses(start.cluster)?, options, hosting).map_err(JobError::Client)?;
        let ticket = client.open(start.image, OpenMode::ReadWrite);
        loop {
            match client.next_admin() {
                Some(AdminDone::Opened { ticket: of, result }) if of == ticket => {
                    let image = result.map_err(|error| JobError::Open(start.image.to_string(), error))?;
                    return Ok(Self { client, image, reaped: Vec::new() });
                }
                Some(_) => {}
                None => {
                    client.poll(Some(TURN)).map_err(JobError::Client)?;
                }
            }
        }
    }

    fn submit(&mut self, user: u64, offset: u64, len: u64, op: Op) -> Result<(), JobError> {
        match self.client.submit(self.image, op, user) {
            Ok(_) => Ok(()),
            Err((SubmitError::Busy, _)) => Err(JobError::Busy),
            Err((error, _)) => Err(JobError::Submit { offset, len, error }),
        }
    }

    /// Starts a read into `buf`.
    ///
    /// # Safety
    /// `buf .. buf + len` stays valid, and nobody else touches it, until the operation has come back from
    /// `reap` or the job is dropped.
    pub unsafe fn read(&mut self, user: u64, offset: u64, buf: *mut u8, len: u64) -> Result<(), JobError> {
        let buf = NonNull::new(buf).ok_or(JobError::NoBuffer)?;
        // SAFETY: by the caller's promise.
        let buf = unsafe { IoBuf::foreign(buf, len as usize) };
        self.submit(user, offset, len, Op::Read { offset, buf })
    }

    /// Starts a write from `buf`.
    ///
    /// # Safety
    /// As `read`.
    pub unsafe fn write(&mut self, user: u64, offset: u64, buf: *mut u8, len: u64) -> Result<(), JobError> {
        let buf = NonNull::new(buf).ok_or(JobError::NoBuffer)?;
        // SAFETY: by the caller's promise.
        let buf = unsafe { IoBuf::foreign(buf, len as usize) };
        self.submit(user, offset, len, Op::Write { offset, buf })
    }

    /// Starts a discard.
    pub fn discard(&mut self, user: u64, offset: u64, len: u64) -> Result<(), JobError> {
        self.submit(user, offset, len, Op::Discard { offset, len })
    }

    /// Starts a flush.
    pub fn flush(&mut self, user: u64) -> Result<(), JobError> {
        self.submit(user, 0, 0, Op::Flush)
    }

    /// Collects at least `min` and at most `max` completions, waiting at most `timeout` (`None`: for as
    /// long as it takes). Returns how many; `reaped` has them until the next call.
    pub fn reap(&mut self, min: usize, max: usize, timeout: Option<Duration>) -> Result<usize, JobError> {
        self.reaped.clear();
        if min == 0 {
            self.client.poll(None).map_err(JobError::Client)?;
        }
        let mut left = timeout;
        loop {
            while self.reaped.len() < max
                && let Some(done) = self.client.next_io()
            {
                self.reaped.push(completed(done));
            }
            if self.reaped.len() >= min.min(max) || left.is_some_and(|left| left.is_zero()) {
                return Ok(self.reaped.len());
            }
            // One system call sends what was queued and waits for what comes.
            let wait = left.map_or(TURN, |left| left.min(TURN));
            let events = self.client.poll(Some(wait)).map_err(JobError::Client)?;
            if events == 0 {
                left = left.map(|left| left.saturating_sub(wait));
            }
        }
    }

    /// A completion of the last `reap`.
    pub fn reaped(&self, index: usize) -> Option<&Completed> {
        self.reaped.get(index)
    }
}

/// Turns the client's completion into fio's; the buffer's handle goes, the memory is fio's.
fn completed(done: IoDone) -> Completed {
    Completed { user: done.user, result: done.result.map_err(|error| JobError::Io { error }) }
}
