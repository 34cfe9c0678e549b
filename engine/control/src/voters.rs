//! Who keeps the metadata changes while the cluster runs: this node's way to the store and its connections to
//! the voters follow.
//!
//! A node that has room for the metadata holds a `MetaNode` whether it votes or not. Until it votes, `spare` waits
//! with a blank region or is being filled, and the node lives from a voter as any other; when it votes and is
//! as far as what this node has seen, it becomes the way to the store. A voter that was removed goes the other way.

use crate::config::{ControlConfig, ControlError, Voter};
use crate::core::{ControlCore, META_TOKENS};
use crate::drive::Meta;
use crate::links::{Link, Uplink};
use consensus::bounds::VOTERS_MAX;
use consensus::{MetaConfig, MetaError, MetaNode, MetaOutput, Standing, VOTERS_KEY};
use reactor::Env;
use serde::Deserialize;
use std::net::SocketAddr;
use wire::control::{KeyValue, VoterAddress};
use wire::{NodeId, Revision};

/// Connections to members of the group: twice the voters while all of them change.
const LINKS_MAX: usize = 2 * VOTERS_MAX;

/// What counts here of the value of `VOTERS_KEY`.
#[derive(Deserialize, Default)]
struct Known {
    #[serde(default)]
    voters: Vec<KnownVoter>,
}

#[derive(Deserialize)]
struct KnownVoter {
    node: NodeId,
    address: Option<String>,
}

fn meta_config(config: &ControlConfig) -> Option<MetaConfig> {
    let region = config.meta?;
    let address = |voter: &Voter| VoterAddress { node: voter.node, address: voter.addr.to_string() };
    Some(MetaConfig {
        node: config.node,
        voters: config.voters.iter().map(|voter| voter.node).collect(),
        addresses: config.voters.iter().map(address).collect(),
        cluster: config.cluster,
        disk: region.disk,
        region_offset: region.offset,
        region_len: region.len,
        tokens: META_TOKENS,
        planted: config.meta_planted,
    })
}

impl ControlCore {
    /// The way to the metadata as the configuration says; what the region says comes when it has been read.
    pub(crate) fn open_meta(&mut self, env: &mut dyn Env) -> Result<(), ControlError> {
        let config = &self.config;
        let meta = meta_config(config);
        if config.voters.iter().any(|voter| voter.node == config.node) {
            let meta = meta.ok_or(ControlError::Config("a voter needs a metadata region"))?;
            let others = config.voters.iter().filter(|voter| voter.node != config.node);
            self.links = others.map(|voter| Link::new(*voter)).collect();
            self.meta = Meta::Voter(Box::new(MetaNode::open(env, meta)));
            return Ok(());
        }
        let uplink = Uplink::new(&config.voters, env.random(), Revision(0))
            .ok_or(ControlError::Config("there must be a voter"))?;
        self.meta = Meta::Remote(Box::new(uplink));
        self.spare = meta.map(|meta| Box::new(MetaNode::open(env, meta)));
        Ok(())
    }

    /// This node's part in the group, whether it is the way to the store or not.
    fn part(&self) -> Option<&MetaNode> {
        match &self.meta {
            Meta::Voter(node) => Some(node),
            _ => self.spare.as_deref(),
        }
    }

    /// The same, to work on.
    pub(crate) fn member(&mut self) -> Option<&mut MetaNode> {
        match &mut self.meta {
            Meta::Voter(node) => Some(node),
            _ => self.spare.as_deref_mut(),
        }
    }

    fn known_voters(&self) -> Known {
        let item = self.mirror.get(VOTERS_KEY);
        item.and_then(|item| serde_json::from_str(&item.value).ok()).unwrap_or_default()
    }

    /// Where a node's control core is reached. What the configuration says comes first: it may have been changed
    /// because all addresses have.
    fn address_of(&self, node: NodeId) -> Option<SocketAddr> {
        let configured = self.config.voters.iter().find(|voter| voter.node == node).map(|voter| voter.addr);
        let registered = || self.view.nodes().get(&node).map(|record| record.control);
        let own = self.part();
        let replicated = || own?.address_of(node)?.parse().ok();
        let published = || {
            let known = self.known_voters().voters;
            known.iter().find(|voter| voter.node == node)?.address.as_ref()?.parse().ok()
        };
        configured.or_else(registered).or_else(replicated).or_else(published)
    }

    /// The connection to a member, made when there is none.
    pub(crate) fn link_to(&mut self, node: NodeId) -> Option<&Link> {
        if !self.links.iter().any(|link| link.peer() == node) && self.links.len() < LINKS_MAX {
            let addr = self.address_of(node).filter(|_| node != self.config.node)?;
            self.links.push(Link::new(Voter { node, addr }));
        }
        self.links.iter().find(|link| link.peer() == node)
    }

    /// Ends connections to nodes that are no members any more, when others need the room: until then they carry the
    /// news that a node was removed.
    pub(crate) fn prune_links(&mut self, env: &mut dyn Env) {
        if self.links.len() < LINKS_MAX {
            return;
        }
        let Some(node) = self.member() else { return };
        let voter = node.standing() == Standing::Voter;
        let members = node.members();
        if !voter || self.links.iter().all(|link| members.contains(&link.peer())) {
            return;
        }
        self.links.retain_mut(|link| {
            let stays = members.contains(&link.peer());
            if !stays {
                link.drop_connection(env);
            }
            stays
        });
    }

    /// Who votes, by the newest that this node knows, without itself: the store as it has seen it, or what its part in
    /// the group knows or was told when it was removed. Log indexes and revisions are the same numbers.
    fn present_voters(&self) -> Vec<Voter> {
        let own = self.part();
        let told = own.and_then(|own| own.latest_voters()).filter(|(_, voters)| !voters.is_empty());
        let told = told.filter(|(index, _)| *index > self.mirror.revision().0);
        let addr_of = |node: NodeId, address: &str| self.address_of(node).or_else(|| address.parse().ok());
        let mut present: Vec<Voter> = match told {
            Some((_, voters)) => voters
                .iter()
                .filter_map(|told| Some(Voter { node: told.node, addr: addr_of(told.node, &told.address)? }))
                .collect(),
            None => self
                .known_voters()
                .voters
                .iter()
                .filter_map(|known| Some(Voter { node: known.node, addr: addr_of(known.node, "")? }))
                .collect(),
        };
        present.retain(|voter| voter.node != self.config.node);
        // Nodes spread over the voters.
        let start = self.config.node.0 % present.len().max(1) as u64;
        present.rotate_left(start as usize);
        present
    }

    /// Whom this node can live from, the present voters first, and how many those are. Behind them come those in its
    /// own region and those it was started with: each may be one no more, but knows later ones. Who has nobody asks
    /// any other node.
    fn others(&self) -> (Vec<Voter>, usize) {
        let mut all = self.present_voters();
        let present = all.len();
        let own = self.part();
        let members = own.map(|own| own.members()).unwrap_or_default();
        all.extend(members.into_iter().filter_map(|node| Some(Voter { node, addr: self.address_of(node)? })));
        all.extend(&self.config.voters);
        all.retain(|voter| voter.node != self.config.node);
        if all.is_empty() {
            let nodes = self.view.nodes().values().filter(|node| node.id != self.config.node);
            all.extend(nodes.map(|node| Voter { node: node.id, addr: node.control }));
        }
        let mut seen = std::collections::BTreeSet::new();
        all.retain(|voter| seen.insert(voter.node));
        (all, present)
    }

    /// Hears what the spare has to say; whether there was anything.
    pub(crate) fn hear_spare(&mut self, env: &mut dyn Env) -> bool {
        let mut heard = false;
        while let Some(output) = self.spare.as_mut().and_then(|node| node.poll()) {
            heard = true;
            match output {
                MetaOutput::Send { to, bytes } => self.carry(env, to, bytes),
                MetaOutput::Reply { ticket, reply } => self.answered(env, ticket, reply),
                MetaOutput::Failed(error) => self.spare_failed(&error),
                MetaOutput::Changes { .. } | MetaOutput::Leader { .. } => {}
            }
        }
        heard
    }

    /// The node serves its disks all the same.
    fn spare_failed(&mut self, error: &MetaError) {
        tracing::error!(node = %self.config.node, %error, "this node cannot become a metadata voter");
        self.spare = None;
    }

    /// Changes the way to the store when this node has become a voter or is none any more. To be called when
    /// everything has been heard.
    pub(crate) fn follow_voters(&mut self, env: &mut dyn Env) {
        match &self.meta {
            // One that was taken back and is being filled may be given up again without hearing of it. What it has
            // heard must have been passed on first: the uplink is not to begin before it.
            Meta::Voter(node)
                if matches!(node.standing(), Standing::Outside | Standing::Learner)
                    && self.incoming.is_empty() =>
            {
                self.leave_group(env);
            }
            Meta::Remote(_) => {
                let seen = self.mirror.revision();
                let ready = self.spare.as_ref().is_some_and(|node| {
                    node.standing() == Standing::Voter && node.is_ready() && node.kv().revision() >= seen
                });
                if ready && self.incoming.is_empty() {
                    self.enter_group(env);
                } else {
                    self.follow_uplink();
                }
            }
            _ => {}
        }
    }

    fn enter_group(&mut self, env: &mut dyn Env) {
        let Some(mut node) = self.spare.take() else { return };
        tracing::info!(node = %self.config.node, "this node is a metadata voter from now on");
        let items: Vec<KeyValue> = node
            .kv()
            .range("")
            .map(|(key, item)| KeyValue {
                key: key.to_owned(),
                value: item.value.clone(),
                mod_revision: item.mod_revision,
                lease: item.lease,
            })
            .collect();
        let changes = self.mirror.difference(&items);
        let revision = node.kv().revision();
        let before = match std::mem::replace(&mut self.meta, Meta::None) {
            Meta::Remote(uplink) => uplink.end(env),
            _ => return,
        };
        for (ticket, request) in before.unsent {
            node.submit(env, ticket, request);
        }
        self.meta = Meta::Voter(node);
        for (ticket, reply) in before.replies {
            self.answered(env, ticket, reply);
        }
        self.changed(revision, changes);
    }

    fn leave_group(&mut self, env: &mut dyn Env) {
        let (others, present) = self.others();
        // With a voter to begin with, when there is one: others may have been removed, too.
        let start = env.random() % present.max(1) as u64;
        let Some(mut uplink) = Uplink::new(&others, start, self.mirror.revision()) else { return };
        uplink.set_voters(others, present);
        tracing::warn!(node = %self.config.node, "this node is no metadata voter any more; it goes on as any other");
        if let Meta::Voter(mut node) = std::mem::replace(&mut self.meta, Meta::Remote(Box::new(uplink))) {
            // The lease is to be renewed elsewhere, now.
            node.abandon_requests();
            self.spare = Some(node);
        }
    }

    /// The uplink learns of new voters: at once from the store, and within a second from the node's own region.
    fn follow_uplink(&mut self) {
        let at = self.mirror.get(VOTERS_KEY).map_or(Revision(0), |item| item.mod_revision);
        if at == self.voters_seen && !self.voters_due {
            return;
        }
        self.voters_seen = at;
        self.voters_due = false;
        let (others, present) = self.others();
        if let Meta::Remote(uplink) = &mut self.meta {
            uplink.set_voters(others, present);
        }
    }
}
