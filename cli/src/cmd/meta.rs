//! `drystone meta`: the metadata store, shown to a person.

use super::Global;
use super::voters::{self, VotersCommand};
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output;
use clap::Subcommand;
use serde::Serialize;
use serde_json::Value;
use wire::Revision;
use wire::control::{Change, Compare, KeyValue, MetaReply, Write};

/// What to do with the metadata.
#[derive(Subcommand, Debug)]
pub enum MetaCommand {
    /// Print the keys that begin with a prefix, and their values
    #[command(after_help = "Examples:
  drystone meta get /              everything
  drystone meta get /pools/        all pools
  drystone meta get /cluster --exact --json")]
    Get {
        /// Where the keys begin
        prefix: String,
        /// Only the key of exactly this name
        #[arg(long)]
        exact: bool,
        /// Print keys only
        #[arg(long)]
        keys: bool,
    },
    /// Set a key to a JSON value
    ///
    /// The keys below /cluster, /pools, /images, /nodes and /pg belong to Drystone: a wrong value there
    /// can make data unreachable.
    #[command(after_help = "Examples:
  drystone meta put /notes/rack2 '\"power work on Friday\"'
  drystone meta put /notes/rack2 '{\"until\": 9}' --if-revision 42")]
    Put {
        /// The key
        key: String,
        /// The value: JSON text
        value: String,
        /// Only if the key was last changed at this revision; 0 means that it must not exist
        #[arg(long, value_name = "REVISION")]
        if_revision: Option<u64>,
    },
    /// Remove a key, or all keys with a prefix
    #[command(after_help = "Examples:
  drystone meta del /notes/rack2
  drystone meta del /notes/ --prefix")]
    Del {
        /// The key
        key: String,
        /// Remove every key that begins with this
        #[arg(long)]
        prefix: bool,
    },
    /// Print current values and then every change, until interrupted
    #[command(after_help = "Examples:
  drystone meta watch /pg/
  drystone --json meta watch / | jq .")]
    Watch {
        /// Where the keys begin
        prefix: String,
        /// Stop after this many events (the current values are the first)
        #[arg(long, value_name = "N")]
        events: Option<u64>,
    },
    /// List the nodes that keep the metadata, replace one that is lost, add and remove some
    #[command(subcommand)]
    Voters(VotersCommand),
}

#[derive(Serialize)]
struct Item<'a> {
    key: &'a str,
    value: Value,
    revision: Revision,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<u64>,
}

impl<'a> Item<'a> {
    fn of(item: &'a KeyValue) -> Self {
        Self { key: &item.key, value: value_of(&item.value), revision: item.mod_revision, lease: item.lease }
    }
}

/// JSON where it is JSON, else the text itself: this tool must also show what should not be there.
fn value_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_string()))
}

/// Runs the command.
pub fn run(global: &Global, command: MetaCommand) -> Result<(), CliError> {
    if let MetaCommand::Voters(command) = command {
        return voters::run(global, command);
    }
    let mut cluster = Cluster::connect(global)?;
    match command {
        MetaCommand::Voters(_) => Ok(()),
        MetaCommand::Get { prefix, exact, keys } => get(global, &mut cluster, &prefix, exact, keys),
        MetaCommand::Put { key, value, if_revision } => {
            serde_json::from_str::<Value>(&value)
                .map_err(|error| CliError::NotJson { text: value.clone(), problem: error.to_string() })?;
            let compares = if_revision
                .map(|revision| Compare::ModRevision { key: key.clone(), revision: Revision(revision) })
                .into_iter()
                .collect();
            change(global, &mut cluster, compares, Write::Put { key, value, lease: None })
        }
        MetaCommand::Del { key, prefix } => {
            let write = if prefix { Write::DeletePrefix { prefix: key } } else { Write::Delete { key } };
            change(global, &mut cluster, Vec::new(), write)
        }
        MetaCommand::Watch { prefix, events } => watch(global, &mut cluster, &prefix, events),
    }
}

fn get(
    global: &Global,
    cluster: &mut Cluster,
    prefix: &str,
    exact: bool,
    keys: bool,
) -> Result<(), CliError> {
    let mut items = cluster.range(prefix)?;
    items.retain(|item| !exact || item.key == prefix);
    if exact && items.is_empty() {
        return Err(CliError::NotFound { kind: "key", name: prefix.to_string() });
    }
    if global.json {
        return output::json(&items.iter().map(Item::of).collect::<Vec<_>>());
    }
    for item in &items {
        output::line(&if keys { item.key.clone() } else { format!("{} {}", item.key, item.value) })?;
    }
    Ok(())
}

fn change(
    global: &Global,
    cluster: &mut Cluster,
    compares: Vec<Compare>,
    write: Write,
) -> Result<(), CliError> {
    match cluster.txn(compares, vec![write])? {
        MetaReply::Applied { revision } if global.json => {
            output::json(&serde_json::json!({ "revision": revision }))
        }
        MetaReply::Applied { revision } => output::line(&format!("revision {revision}")),
        _ => Err(CliError::Changed { what: "the key".into() }),
    }
}

fn watch(global: &Global, cluster: &mut Cluster, prefix: &str, events: Option<u64>) -> Result<(), CliError> {
    let mut left = events.unwrap_or(u64::MAX);
    cluster.watch(prefix, |revision, changes| {
        print_event(global, revision, changes)?;
        left = left.saturating_sub(1);
        Ok(left > 0)
    })
}

/// One event: one line of JSON, or one line per changed key.
fn print_event(global: &Global, revision: Revision, changes: &[Change]) -> Result<(), CliError> {
    if global.json {
        let changes: Vec<Value> = changes
            .iter()
            .map(|change| match change {
                Change::Put(item) => serde_json::json!({ "put": Item::of(item) }),
                Change::Delete { key } => serde_json::json!({ "delete": { "key": key } }),
            })
            .collect();
        return output::json_line(&serde_json::json!({ "revision": revision, "changes": changes }));
    }
    for change in changes {
        output::line(&match change {
            Change::Put(item) => format!("{revision} put {} {}", item.key, item.value),
            Change::Delete { key } => format!("{revision} del {key}"),
        })?;
    }
    Ok(())
}
