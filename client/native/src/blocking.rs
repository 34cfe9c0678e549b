//! A client with a thread of its own, for programs that want to wait: every call blocks until it is done.
//!
//! The thread owns the `Client`; calls go to it through a queue and come back through a channel. Buffers
//! are not copied: the worker refers to the caller's memory while the caller waits, and gives that up
//! before it answers.

use crate::nonblocking::Client;
use client::{
    AdminDone, AdminError, AdminTicket, ImageHandle, ImageInfo, IoError, MAX_IO_BYTES, Op, OpenMode, Options,
    SubmitError,
};
use reactor::IoBuf;
use reactor::backend::{CoreError, HostThread, Poster};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use thiserror::Error;
use wire::control::{Change, MetaReply, MetaRequest};
use wire::{ImageId, Revision};

/// The worker's longest sleep; posts and frames wake it earlier.
const TURN: Duration = Duration::from_millis(500);

/// Why a call failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The operation was not accepted.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The operation failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Opening or a metadata request failed.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The client cannot be made or has failed.
    #[error("client: {0}")]
    Core(#[from] CoreError),
    /// No thread can be started.
    #[error("cannot start the client's thread: {0}")]
    Thread(#[source] std::io::Error),
    /// The worker thread has ended.
    #[error("the client's thread has ended")]
    Ended,
}

/// Changes up to a revision, from `Cluster::watch`.
pub type News = (Revision, Vec<Change>);

/// Memory of a caller that waits.
struct Borrowed {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the thread that lent the memory does nothing but wait for the answer, which the worker sends
// only after it has given up every handle to the memory (see `Call::wait`).
unsafe impl Send for Borrowed {}

impl Borrowed {
    fn into_buf(self) -> IoBuf {
        // SAFETY: as above: the memory is valid and untouched until the worker answers.
        unsafe { IoBuf::foreign(self.ptr, self.len) }
    }
}

enum Work {
    Read { offset: u64, into: Borrowed },
    Write { offset: u64, from: Borrowed },
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64 },
    DeleteObjects { first: u64, count: u64 },
    Flush,
}

impl Work {
    fn into_op(self) -> Op {
        match self {
            Work::Read { offset, into } => Op::Read { offset, buf: into.into_buf() },
            Work::Write { offset, from } => Op::Write { offset, buf: from.into_buf() },
            Work::Discard { offset, len } => Op::Discard { offset, len },
            Work::WriteZeroes { offset, len } => Op::WriteZeroes { offset, len },
            Work::DeleteObjects { first, count } => Op::DeleteObjects { first, count },
            Work::Flush => Op::Flush,
        }
    }
}

enum Command {
    Open { name: String, mode: OpenMode, answer: Sender<Result<ImageHandle, AdminError>> },
    Meta { request: MetaRequest, answer: Sender<Result<MetaReply, AdminError>> },
    Watch { prefixes: Vec<String>, news: Sender<News> },
    Info { image: ImageHandle, answer: Sender<Option<ImageInfo>> },
    Io { image: ImageHandle, work: Work, answer: Sender<Result<(), Error>> },
    Close { image: ImageHandle },
    Stop,
}

#[derive(Default)]
struct Queue {
    commands: VecDeque<Command>,
    /// The worker takes no more.
    ended: bool,
}

/// The queue's both ends: handles push, the worker pops.
#[derive(Clone, Default)]
struct Commands(Arc<Mutex<Queue>>);

impl Commands {
    fn with<R>(&self, act: impl FnOnce(&mut Queue) -> R) -> R {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes no more; what is queued is dropped, which answers `Ended`.
    fn end(&self) {
        let left = self.with(|queue| {
            queue.ended = true;
            std::mem::take(&mut queue.commands)
        });
        drop(left);
    }
}

struct Shared {
    commands: Commands,
    poster: Poster,
    /// Ends after `Command::Stop`; dropped, and so waited for, after that was sent.
    _worker: HostThread,
}

impl Shared {
    fn send(&self, command: Command) -> Result<(), Error> {
        let taken = self.commands.with(|queue| {
            if !queue.ended {
                queue.commands.push_back(command);
            }
            !queue.ended
        });
        if !taken {
            return Err(Error::Ended);
        }
        // Refused when the letter box is full: then the worker is being woken already.
        let _ = self.poster.post(Box::new(()));
        Ok(())
    }

    /// Sends a command and waits for its answer.
    fn call<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, Error> {
        let (answer, answered) = channel();
        self.send(command(answer))?;
        // Not before the worker has answered or dropped the command, and with it every handle to memory
        // lent: see `Borrowed`.
        answered.recv().map_err(|_| Error::Ended)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
    }
}

/// A cluster. Clones share the connection; the last one ends it.
#[derive(Clone)]
pub struct Cluster {
    shared: Arc<Shared>,
}

impl Cluster {
    /// A client of the cluster to which any of these control addresses belongs. An unreachable cluster
    /// shows in the first call.
    pub fn connect(addresses: &[SocketAddr], options: Options) -> Result<Self, Error> {
        let (ready, started) = channel();
        let addresses = addresses.to_vec();
        let commands = Commands::default();
        let queue = commands.clone();
        let work = move || match Client::new(&addresses, options) {
            Ok(client) => {
                if ready.send(Ok(client.poster())).is_ok() {
                    Worker::new(client, queue).run();
                }
            }
            Err(error) => drop(ready.send(Err(error))),
        };
        let worker = HostThread::start("drystone-client", work).map_err(Error::Thread)?;
        let poster = started.recv().map_err(|_| Error::Ended)??;
        Ok(Self { shared: Arc::new(Shared { commands, poster, _worker: worker }) })
    }

    /// Opens an image.
    pub fn open(&self, name: &str, mode: OpenMode) -> Result<Image, Error> {
        let name = name.to_owned();
        let handle = self.shared.call(|answer| Command::Open { name, mode, answer })??;
        Ok(Image { shared: self.shared.clone(), handle })
    }

    /// A metadata request and its answer.
    pub fn meta(&self, request: MetaRequest) -> Result<MetaReply, Error> {
        Ok(self.shared.call(|answer| Command::Meta { request, answer })??)
    }

    /// Watches key prefixes in place of those watched before. The first message has every present key, in
    /// later ones no change is skipped and none repeated.
    pub fn watch(&self, prefixes: &[&str]) -> Result<Receiver<News>, Error> {
        let (news, receiver) = channel();
        let prefixes = prefixes.iter().map(|prefix| (*prefix).to_owned()).collect();
        self.shared.send(Command::Watch { prefixes, news })?;
        Ok(receiver)
    }
}

/// An open image. Closed when dropped.
pub struct Image {
    shared: Arc<Shared>,
    handle: ImageHandle,
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = self.shared.send(Command::Close { image: self.handle });
    }
}

impl Image {
    /// Size and state, following the cluster's changes.
    pub fn info(&self) -> Result<ImageInfo, Error> {
        let info = self.shared.call(|answer| Command::Info { image: self.handle, answer })?;
        info.ok_or(Error::Submit(SubmitError::NotOpen))
    }

    /// Its number in the cluster.
    pub fn id(&self) -> Result<ImageId, Error> {
        Ok(self.info()?.id)
    }

    fn io(&self, work: Work) -> Result<(), Error> {
        self.shared.call(|answer| Command::Io { image: self.handle, work, answer })?
    }

    /// Fills `buf` from `offset`. Offset and length are multiples of 4096; any length.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let mut at = offset;
        for part in buf.chunks_mut(MAX_IO_BYTES as usize) {
            let into = Borrowed { ptr: NonNull::from(&mut *part).cast(), len: part.len() };
            self.io(Work::Read { offset: at, into })?;
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    /// Writes `buf` to `offset`. Offset and length are multiples of 4096; any length.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), Error> {
        let mut at = offset;
        for part in buf.chunks(MAX_IO_BYTES as usize) {
            let from = Borrowed { ptr: NonNull::from(part).cast(), len: part.len() };
            self.io(Work::Write { offset: at, from })?;
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    fn ranges(&self, offset: u64, len: u64, work: impl Fn(u64, u64) -> Work) -> Result<(), Error> {
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let take = left.min(MAX_IO_BYTES);
            self.io(work(at, take))?;
            (at, left) = (at.saturating_add(take), left - take);
        }
        Ok(())
    }

    /// Says that a range need not be kept; it reads as zeroes from then on. Any length.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.ranges(offset, len, |offset, len| Work::Discard { offset, len })
    }

    /// Makes a range read as zeroes. Any length.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.ranges(offset, len, |offset, len| Work::WriteZeroes { offset, len })
    }

    /// Removes whole objects; needs `OpenMode::Removal`.
    pub fn delete_objects(&self, first: u64, count: u64) -> Result<(), Error> {
        self.io(Work::DeleteObjects { first, count })
    }

    /// Waits for every change of this image submitted before, by any thread.
    pub fn flush(&self) -> Result<(), Error> {
        self.io(Work::Flush)
    }
}

/// An operation whose caller waits.
type Waiting = Sender<Result<(), Error>>;

/// The thread's side. The client is the first field: when a worker ends, by an error or a panic, it gives
/// up its handles to lent memory before the senders go, whose end lets the lenders return.
struct Worker {
    client: Client,
    /// Operations that the client had no room for, oldest first.
    backlog: VecDeque<(ImageHandle, Op, Waiting)>,
    waiting: BTreeMap<u64, Waiting>,
    next_user: u64,
    opens: BTreeMap<AdminTicket, Sender<Result<ImageHandle, AdminError>>>,
    metas: BTreeMap<AdminTicket, Sender<Result<MetaReply, AdminError>>>,
    watch: Option<(AdminTicket, Sender<News>)>,
    commands: Commands,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.commands.end();
    }
}

impl Worker {
    fn new(client: Client, commands: Commands) -> Self {
        Self {
            client,
            backlog: VecDeque::new(),
            waiting: BTreeMap::new(),
            next_user: 0,
            opens: BTreeMap::new(),
            metas: BTreeMap::new(),
            watch: None,
            commands,
        }
    }

    fn run(mut self) {
        loop {
            while let Some(command) = self.commands.with(|queue| queue.commands.pop_front()) {
                if matches!(command, Command::Stop) {
                    return;
                }
                self.take(command);
            }
            // Without a working ring nothing more can be done; every caller hears `Ended`.
            if self.client.poll(Some(TURN)).is_err() {
                return;
            }
            self.answer();
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Open { name, mode, answer } => {
                let ticket = self.client.open(&name, mode);
                self.opens.insert(ticket, answer);
            }
            Command::Meta { request, answer } => {
                let ticket = self.client.meta(request);
                self.metas.insert(ticket, answer);
            }
            Command::Watch { prefixes, news } => {
                let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
                self.watch = Some((self.client.watch(&prefixes), news));
            }
            Command::Info { image, answer } => drop(answer.send(self.client.info(image))),
            Command::Io { image, work, answer } => {
                self.backlog.push_back((image, work.into_op(), answer));
                self.submit();
            }
            Command::Close { image } => self.client.close(image),
            Command::Stop => {}
        }
    }

    /// Submits what waits, in order, as far as there is room.
    fn submit(&mut self) {
        while let Some((image, op, answer)) = self.backlog.pop_front() {
            let user = self.next_user;
            match self.client.submit(image, op, user) {
                Ok(_) => {
                    self.waiting.insert(user, answer);
                    self.next_user += 1;
                }
                Err((SubmitError::Busy, op)) => return self.backlog.push_front((image, op, answer)),
                Err((error, op)) => {
                    drop(op);
                    let _ = answer.send(Err(error.into()));
                }
            }
        }
    }

    fn answer(&mut self) {
        while let Some(done) = self.client.next_io() {
            drop(done.buf);
            if let Some(answer) = self.waiting.remove(&done.user) {
                let _ = answer.send(done.result.map_err(Error::from));
            }
        }
        self.submit();
        while let Some(done) = self.client.next_admin() {
            match done {
                AdminDone::Opened { ticket, result } => {
                    if let Some(answer) = self.opens.remove(&ticket) {
                        let _ = answer.send(result);
                    }
                }
                AdminDone::Meta { ticket, result } => {
                    if let Some(answer) = self.metas.remove(&ticket) {
                        let _ = answer.send(result);
                    }
                }
                AdminDone::Watch { ticket, revision, changes } => {
                    if let Some((of, news)) = &self.watch
                        && *of == ticket
                        && news.send((revision, changes)).is_err()
                    {
                        self.watch = None;
                        self.client.watch(&[]);
                    }
                }
            }
        }
    }
}
