//! The client in the caller's thread.

use client::{
    AdminDone, AdminTicket, ClientCore, Counters, ImageHandle, ImageInfo, IoDone, Op, OpenMode, Options,
    SubmitError, Ticket,
};
use net_rdma::{Choice, Plan};
use net_tcp::TcpTransport;
use reactor::Mono;
use reactor::backend::{CoreError, CoreOptions, ForeignCore, Poster};
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use wire::control::MetaRequest;

/// How the client sits in its host program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hosting {
    /// The client may be called from different threads, one at a time. Costs a little speed.
    pub movable: bool,
    /// How long a waiting `poll` spins before it sleeps; zero never spins.
    pub spin: Duration,
    /// RDMA, TCP or whichever works. The default is what the environment variable `DRYSTONE_TRANSPORT` says, or
    /// whichever works.
    pub transport: Choice,
    /// Memory for what does not arrive in the caller's own: replies to reads into heap buffers, and small
    /// pieces. Taken when first used.
    pub arena_bytes: usize,
}

impl Default for Hosting {
    fn default() -> Self {
        let core = CoreOptions::default();
        Self {
            movable: core.movable,
            spin: core.spin,
            transport: Choice::from_environment(),
            arena_bytes: 32 << 20,
        }
    }
}

/// Images of one cluster, served by the thread that calls.
///
/// Nothing happens between calls: `submit` accepts operations, `poll` sends them, receives and completes.
/// Unless `Hosting::movable` is set, all calls come from the thread that made it.
pub struct Client {
    core: ForeignCore<ClientCore>,
}

impl Client {
    /// A client of the cluster to which any of these control addresses belongs. Connecting begins with
    /// the first `poll`; an unreachable cluster shows in `open` and `meta`.
    pub fn new(addresses: &[SocketAddr], options: Options) -> Result<Self, CoreError> {
        Self::hosted(addresses, options, Hosting::default())
    }

    /// The same with choices about threads and memory.
    pub fn hosted(addresses: &[SocketAddr], options: Options, hosting: Hosting) -> Result<Self, CoreError> {
        let core = CoreOptions {
            arena_bytes: hosting.arena_bytes,
            // TCP has no use for registered memory, and the memlock limit belongs to the host program.
            registered_bytes_max: 0,
            spin: hosting.spin,
            movable: hosting.movable,
            ..CoreOptions::default()
        };
        let service = ClientCore::new(addresses.to_vec(), options);
        let plan = Plan { choice: hosting.transport, ..Plan::default() };
        let transport = plan
            .transport(TcpTransport::boxed, TcpTransport::beneath)
            .map_err(|error| CoreError::Transport(Box::new(error)))?;
        Ok(Self { core: ForeignCore::new(core, transport, service)? })
    }

    /// One turn: sends what is queued and takes what has come. `None` never sleeps; `Some(wait)` sleeps
    /// until something comes or the time is over, in the same system call. Returns how many events came:
    /// zero means that there is nothing more to do now.
    pub fn poll(&mut self, wait: Option<Duration>) -> Result<usize, CoreError> {
        self.core.poll(wait)
    }

    /// Whether the calling thread may use this client: it made it, or `Hosting::movable` is set.
    pub fn admits_caller(&self) -> bool {
        self.core.admits_caller()
    }

    /// The time of the loop's clock, for deadlines around `poll`.
    pub fn now(&mut self) -> Mono {
        self.core.now()
    }

    /// Becomes readable when `poll` has something to do. Wait for it, at most `next_due` long, after
    /// `poll` has returned 0.
    pub fn event_fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        self.core.event_fd()
    }

    /// How long until `poll` has to be called even if nothing comes.
    pub fn next_due(&mut self) -> Option<Duration> {
        self.core.next_due()
    }

    /// Wakes a sleeping `poll` from another thread, by posting any message.
    pub fn poster(&self) -> Poster {
        self.core.poster()
    }

    /// Starts opening an image; `AdminDone::Opened` follows.
    pub fn open(&mut self, name: &str, mode: OpenMode) -> AdminTicket {
        self.core.with(|client, env| client.open(env, name, mode))
    }

    /// Takes no more operations for an image; those under way complete.
    pub fn close(&mut self, image: ImageHandle) {
        self.core.with(|client, env| client.close(env, image));
    }

    /// An open image's size and state, following the cluster's changes.
    pub fn info(&self, image: ImageHandle) -> Option<ImageInfo> {
        self.core.service().info(image)
    }

    /// Accepts an operation; an `IoDone` with this ticket and `user` follows. It is sent by the next
    /// `poll`. On refusal nothing has happened and the operation comes back.
    pub fn submit(&mut self, image: ImageHandle, op: Op, user: u64) -> Result<Ticket, (SubmitError, Op)> {
        self.core.with(|client, env| client.submit(env, image, op, user))
    }

    /// The next completed operation, if `poll` has brought one.
    pub fn next_io(&mut self) -> Option<IoDone> {
        self.core.with(|client, _| client.poll())
    }

    /// Whether `next_io` has something.
    pub fn has_io(&self) -> bool {
        self.core.service().has_done()
    }

    /// Starts a metadata request; `AdminDone::Meta` follows.
    pub fn meta(&mut self, request: MetaRequest) -> AdminTicket {
        self.core.with(|client, env| client.meta(env, request))
    }

    /// Watches all keys with these prefixes instead of those watched before; `AdminDone::Watch` follows
    /// again and again.
    pub fn watch(&mut self, prefixes: &[&str]) -> AdminTicket {
        let prefixes = prefixes.iter().map(|prefix| (*prefix).to_owned()).collect();
        self.core.with(|client, env| client.watch(env, prefixes))
    }

    /// The next result of `open` or `meta`, or news of the watch, if `poll` has brought one.
    pub fn next_admin(&mut self) -> Option<AdminDone> {
        self.core.with(|client, _| client.poll_admin())
    }

    /// Whether any operation is under way.
    pub fn is_busy(&self) -> bool {
        self.core.service().is_busy()
    }

    /// Numbers since the start.
    pub fn counters(&self) -> Counters {
        self.core.service().counters()
    }
}
