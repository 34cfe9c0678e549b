//! Choices of whoever creates a client, and the bounds it works within.

/// Longest read, write, discard or write-zeroes in one operation: 256 objects, so that one operation
/// cannot use up the parts of all others.
pub const MAX_IO_BYTES: u64 = 32 << 20;
/// Operations accepted and not yet polled. fio at depth 1024 with several images stays below.
pub const OPS_MAX: usize = 4096;
/// Parts (pieces of operations within one object) accepted and not finished: sixteen longest operations
/// are split at once, everything else is refused as `Busy` until some finish.
pub const PARTS_MAX: usize = 8192;
/// Parts sent and not answered. Bounds what a read burst can make the nodes send at us; below a
/// connection's send queue (4096 frames), so that one node taking all of it cannot refuse.
pub const IN_FLIGHT_MAX: usize = 1024;
/// Images open at once in one client.
pub const IMAGES_MAX: usize = 1024;
/// Tries of a part that ends in a checksum mismatch or a device error, before the caller hears of it.
pub const FAULT_TRIES_MAX: u8 = 4;

/// What to do when a slice of the PG is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnNoSpace {
    /// Complete the operation with `IoError::NoSpace`.
    #[default]
    Fail,
    /// Try again until there is space: what a virtual machine wants that must not see an error.
    Wait,
}

/// What an image may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OpenMode {
    /// Everything but deleting objects.
    #[default]
    ReadWrite,
    /// Reads and flushes.
    ReadOnly,
    /// Everything, also while the image is marked as being removed: for removal itself.
    Removal,
}

/// How a client behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Milliseconds after which an operation ends with `IoError::TimedOut`; `None` tries forever.
    pub io_timeout_ms: Option<u64>,
    /// Milliseconds that opening an image or a metadata request may take.
    pub admin_timeout_ms: u64,
    /// What to do when a slice is full.
    pub on_no_space: OnNoSpace,
    /// A deliberate bug, for proving that the simulator sees it.
    #[cfg(feature = "planted")]
    pub bug: Option<crate::planted::Bug>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            io_timeout_ms: None,
            admin_timeout_ms: 10_000,
            on_no_space: OnNoSpace::Fail,
            #[cfg(feature = "planted")]
            bug: None,
        }
    }
}
