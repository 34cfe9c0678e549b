//! What can go wrong in a command, said so that a person knows what failed, why, and what to do.

use crate::config::ConfigError;
use std::path::PathBuf;
use thiserror::Error;

/// Why a command failed. `Display` says what and why; `hint` says what to do.
#[derive(Debug, Error)]
pub enum CliError {
    /// No `--cluster`, no `DRYSTONE_CLUSTER`.
    #[error("no cluster given")]
    NoCluster,
    /// An address that is none, or whose host name has no address.
    #[error("'{text}' is not a usable address: {why}")]
    Address {
        /// As given.
        text: String,
        /// What is wrong.
        why: String,
    },
    /// The client library could not start in this process.
    #[error("cannot start the client: {0}")]
    Client(String),
    /// A metadata request failed.
    #[error("cannot {what}: {source}")]
    Admin {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: client::AdminError,
    },
    /// Reading or writing image data failed.
    #[error("cannot {what} at byte {offset}: {why}")]
    ImageIo {
        /// What was tried.
        what: &'static str,
        /// Where in the image.
        offset: u64,
        /// Why.
        why: String,
    },
    /// Something of that name does not exist.
    #[error("no {kind} named '{name}'")]
    NotFound {
        /// Pool, image, key.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A request that makes no sense or would do harm.
    #[error("cannot {what}: {why}")]
    Refused {
        /// What was asked.
        what: String,
        /// Why not.
        why: String,
    },
    /// The metadata voters could not be changed.
    #[error("cannot {what}: {problem}")]
    Voters {
        /// What was asked.
        what: String,
        /// Why not.
        problem: VotersProblem,
    },
    /// What was asked of pools or images cannot be.
    #[error(transparent)]
    Plan(#[from] control::admin::AdminError),
    /// A compare-and-swap lost too often, or the given revision is not the present one.
    #[error("{what} was changed by somebody else meanwhile")]
    Changed {
        /// What.
        what: String,
    },
    /// A value in the metadata store that is not what its key says.
    #[error("the value of metadata key {key} is not what it should be: {problem}")]
    Schema {
        /// The key.
        key: String,
        /// The parser's complaint.
        problem: String,
    },
    /// Text that should be JSON.
    #[error("'{text}' is not JSON: {problem}")]
    NotJson {
        /// As given.
        text: String,
        /// The parser's complaint.
        problem: String,
    },
    /// Output that could not be made.
    #[error("cannot print as JSON: {0}")]
    Json(String),
    /// Configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file or stream.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A disk cannot be opened.
    #[error(transparent)]
    DiskOpen(#[from] reactor::backend::DiskOpenError),
    /// A disk's superblock.
    #[error("{path}: {problem}")]
    Disk {
        /// The disk.
        path: PathBuf,
        /// What is wrong with it.
        problem: DiskProblem,
    },
    /// `disk check` found damage; it has been printed.
    #[error("{path} is damaged: {findings} finding(s)")]
    Damaged {
        /// The disk.
        path: PathBuf,
        /// How many.
        findings: usize,
    },
    /// A core could not start, or a node ended by itself.
    #[error("node {node} cannot run: {why}")]
    Node {
        /// The node.
        node: wire::NodeId,
        /// Why.
        why: String,
    },
    /// A program that is needed and missing, or that failed.
    #[error("{program} {why}")]
    Program {
        /// Its name.
        program: String,
        /// What happened.
        why: String,
    },
    /// Something did not happen in time.
    #[error("gave up after {seconds} s waiting for {what}")]
    TimedOut {
        /// What was awaited.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// `doctor` found what keeps a node from working as it should; it has been printed.
    #[error("this host has {problems} problem(s)")]
    Unfit {
        /// How many.
        problems: usize,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

/// What a node's start or a disk command finds wrong with a disk.
#[derive(Debug, Error)]
pub enum DiskProblem {
    /// Never prepared.
    #[error("the disk is blank: it was never prepared")]
    Blank,
    /// Prepared already, and not as asked for.
    #[error("the disk is prepared already: Drystone disk {disk} of cluster {cluster}, {slices} slices")]
    Prepared {
        /// Its identity.
        disk: wire::DiskUuid,
        /// Its cluster.
        cluster: wire::ClusterId,
        /// Its slices.
        slices: usize,
    },
    /// Something else lives there.
    #[error("the disk holds data that is not Drystone's")]
    Foreign,
    /// Belongs to another cluster.
    #[error("the disk belongs to cluster {found}, this is cluster {ours}")]
    OtherCluster {
        /// Its cluster.
        found: wire::ClusterId,
        /// The configured one.
        ours: wire::ClusterId,
    },
    /// Belongs to another node.
    #[error("the disk belongs to node {found}, this is node {ours}")]
    OtherNode {
        /// Its node.
        found: wire::NodeId,
        /// This one.
        ours: wire::NodeId,
    },
    /// The same disk under another path too.
    #[error("the disk is the same as {other}: one of the two is a copy")]
    Twice {
        /// The other path.
        other: PathBuf,
    },
    /// Both copies of the superblock are unusable.
    #[error("the superblock is unusable ({first}; second copy: {second})")]
    Superblock {
        /// Why the first copy is.
        first: String,
        /// Why the second is.
        second: String,
    },
    /// The disk is smaller than it was when it was prepared.
    #[error("the disk is truncated: with {now} bytes it is smaller than its superblock says")]
    Truncated {
        /// Bytes now.
        now: u64,
    },
    /// Written by another version of Drystone.
    #[error("the disk has format version {0}, which this version cannot read")]
    Version(u32),
    /// It cannot be divided as asked.
    #[error("{0}")]
    Layout(String),
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Why the metadata voters could not be changed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum VotersProblem {
    /// One change at a time.
    #[error("another change of the voters is under way")]
    UnderWay,
    /// Its new voters vote.
    #[error("the new voters vote already: it can only be completed, which takes a moment")]
    TooLate,
    /// There is none.
    #[error("no change is under way")]
    NothingToCancel,
    /// An even number, none, or too many.
    #[error("a metadata group has 1, 3, 5 or 7 voters, no other number")]
    Count,
    /// Most of those that would be left are down.
    #[error("too few of the voters that would be left can be reached: the group would stop")]
    Quorum,
    /// A node that votes cannot be added.
    #[error("a node that is to be added votes already")]
    AlreadyVoter,
    /// A node that does not vote cannot be removed.
    #[error("a node that is to be removed is no voter")]
    NoVoter,
    /// Never registered.
    #[error("the cluster does not know node {0}")]
    UnknownNode(wire::NodeId),
    /// Its lease has ended.
    #[error("node {0} is down")]
    NodeDown(wire::NodeId),
    /// Somebody has cancelled it.
    #[error("somebody has given the change up meanwhile")]
    GivenUp,
    /// It goes on.
    #[error("it is not complete after {seconds} s{}", learner_text(.learner))]
    TakesLong {
        /// How long was waited.
        seconds: u64,
        /// A node that has not caught up, by how many entries, and whether it can be heard.
        learner: Option<(wire::NodeId, u64, bool)>,
    },
    /// Something else.
    #[error("{0}")]
    Other(wire::Status),
}

fn learner_text(learner: &Option<(wire::NodeId, u64, bool)>) -> String {
    match learner {
        Some((node, behind, true)) => format!(": node {node} is {behind} log entries behind"),
        Some((node, _, false)) => format!(": the leader does not hear node {node}"),
        None => String::new(),
    }
}

impl VotersProblem {
    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::UnderWay => "`drystone meta voters ls` shows how far it is, `cancel` gives it up",
            Self::TooLate | Self::NothingToCancel | Self::AlreadyVoter | Self::NoVoter | Self::GivenUp => {
                "`drystone meta voters ls` shows who votes"
            }
            Self::Count => "replace a voter, or add and remove two at a time",
            Self::Quorum => "start the voters that are down, or replace them one by one first",
            Self::UnknownNode(_) => "start it (`drystone node`); `drystone node ls` shows what there is",
            Self::NodeDown(_) => "start it first: it must be filled before it can vote",
            Self::TakesLong { .. } => {
                "it goes on: repeat the command to wait on, or give it up with `drystone meta voters cancel`"
            }
            Self::Other(_) => return None,
        })
    }
}

impl CliError {
    /// What the person can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoCluster => {
                "name any node's control address: --cluster HOST:PORT, or DRYSTONE_CLUSTER in the environment".into()
            }
            Self::Address { .. } => "write HOST:PORT, like 10.0.0.1:7700 or node1:7700".into(),
            Self::Admin { source: client::AdminError::Unreachable { .. }, .. } => {
                "is a node running there (`drystone node`), and is this its control address?".into()
            }
            Self::Admin { source: client::AdminError::NoAnswer { .. }, .. } => {
                "more than half of the voters must be running: start the missing nodes".into()
            }
            Self::Admin { source: client::AdminError::Removing, .. } => {
                "`drystone image rm` again finishes the removal".into()
            }
            Self::NotFound { kind: "image", .. } => "`drystone image ls` shows what there is".into(),
            Self::Plan(control::admin::AdminError::NotFound { kind, .. }) => {
                format!("`drystone {kind} ls` shows what there is")
            }
            Self::NotFound { kind: "key", .. } => "`drystone meta get / --keys` shows what there is".into(),
            Self::Voters { problem, .. } => problem.hint()?.into(),
            Self::Changed { .. } => "look at it again and repeat the command if it still makes sense".into(),
            Self::Config(_) => "docs/config.md explains every key; `drystone node --new-config` prints a file".into(),
            Self::DiskOpen(reactor::backend::DiskOpenError::InUse(_)) => {
                "another node or a mounted file system has it: `fuser -v DISK` says who".into()
            }
            Self::Disk { path, problem } => problem.hint(&path.display().to_string())?,
            Self::Damaged { .. } => {
                "the other copies hold the data: with the node stopped, `drystone disk check --repair` repairs \
                 what is safe to repair"
                    .into()
            }
            Self::Program { program, .. } if program.contains("fio") => {
                "apt-get install fio (Debian 12 has the version the engine is built for)".into()
            }
            _ => return None,
        })
    }
}

impl DiskProblem {
    fn hint(&self, path: &str) -> Option<String> {
        Some(match self {
            Self::Blank => format!("prepare it: drystone disk prepare {path}"),
            Self::Prepared { .. } => "--force prepares it anew and destroys what is on it".into(),
            Self::Foreign => format!(
                "if it is the right disk and its data is no longer needed: drystone disk prepare --force {path}"
            ),
            Self::OtherCluster { .. } => {
                "move the disk back, or check cluster.id in the configuration".into()
            }
            Self::OtherNode { .. } => {
                "move the disk back, or check node.id and node.disks in the configuration".into()
            }
            Self::Twice { .. } => {
                "take the copy out of the configuration; if you do not know which it is, the \
                one that the cluster refuses as an older copy"
                    .into()
            }
            Self::Superblock { .. } => format!("see what is left of it: drystone disk check {path}"),
            Self::Truncated { .. } => "is the partition table, or the file, what it was?".into(),
            Self::Version(_) => "use the version of Drystone that wrote it".into(),
            Self::Layout(_) | Self::Io(_) => return None,
        })
    }
}
