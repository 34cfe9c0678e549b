//! Opening an image: its name leads to its number, its number to its pool, and both to the keys to follow.

use crate::core::{Asker, ClientCore};
use crate::error::AdminError;
use crate::op::{AdminDone, AdminTicket, ImageHandle};
use crate::options::OpenMode;
use placement::{Image, key};
use reactor::{Env, Mono};
use wire::ImageId;
use wire::control::{KeyValue, MetaReply, MetaRequest};

/// How far an opening has come.
enum Stage {
    /// Asked for the name's key.
    Name,
    /// Asked for the image's key.
    Image,
    /// Subscribed to these keys; the snapshot is to come.
    Snapshot { id: ImageId, keys: Vec<String> },
}

/// An image being opened.
pub(crate) struct Opening {
    ticket: AdminTicket,
    name: String,
    mode: OpenMode,
    deadline: Mono,
    stage: Stage,
}

/// The item of exactly this key: a range by prefix may bring others.
fn exact<'a>(reply: &'a MetaReply, key: &str) -> Option<&'a KeyValue> {
    match reply {
        MetaReply::Range { items, .. } => items.iter().find(|item| item.key == key),
        _ => None,
    }
}

impl ClientCore {
    pub(crate) fn start_opening(&mut self, env: &mut dyn Env, name: &str, mode: OpenMode) -> AdminTicket {
        let ticket = self.admin_ticket();
        let deadline = env.now().plus_ms(self.options.admin_timeout_ms);
        let name = name.to_owned();
        let key = key::image_name(&name);
        self.openings.push(Opening { ticket, name, mode, deadline, stage: Stage::Name });
        self.ask(env, ticket, key);
        ticket
    }

    /// Asks for one key on behalf of an opening.
    fn ask(&mut self, env: &mut dyn Env, ticket: AdminTicket, key: String) {
        // The exact key is the first of its prefix.
        let request = MetaRequest::Range { prefix: key, limit: 1 };
        match self.control.call(env, request, self.options.admin_timeout_ms) {
            Ok(call) => {
                self.askers.insert(call, Asker::Opening(ticket));
            }
            Err(error) => self.end_opening(ticket, Err(error)),
        }
    }

    fn end_opening(&mut self, ticket: AdminTicket, result: Result<ImageHandle, AdminError>) {
        if let Some(place) = self.openings.iter().position(|opening| opening.ticket == ticket) {
            self.openings.swap_remove(place);
            self.admin_done.push_back(AdminDone::Opened { ticket, result });
        }
    }

    /// An answer to `ask`.
    pub(crate) fn opening_answered(
        &mut self,
        env: &mut dyn Env,
        ticket: AdminTicket,
        result: Result<MetaReply, AdminError>,
    ) {
        let reply = match result {
            Ok(reply) => reply,
            Err(error) => return self.end_opening(ticket, Err(error)),
        };
        match self.opening_step(env, ticket, &reply) {
            Ok(()) => self.finish_openings(env),
            Err(error) => self.end_opening(ticket, Err(error)),
        }
    }

    fn opening_step(
        &mut self,
        env: &mut dyn Env,
        ticket: AdminTicket,
        reply: &MetaReply,
    ) -> Result<(), AdminError> {
        let Some(opening) = self.openings.iter_mut().find(|opening| opening.ticket == ticket) else {
            return Ok(());
        };
        let name_key = key::image_name(&opening.name);
        match opening.stage {
            Stage::Name => {
                let item = exact(reply, &name_key).ok_or(AdminError::NotFound)?;
                let id = serde_json::from_str::<ImageId>(&item.value)
                    .map_err(|_| AdminError::Malformed { key: name_key })?;
                opening.stage = Stage::Image;
                self.ask(env, ticket, key::image(id));
            }
            Stage::Image => {
                let item = match reply {
                    MetaReply::Range { items, .. } => items.first(),
                    _ => None,
                };
                // Removed between the two questions.
                let item = item.ok_or(AdminError::NotFound)?;
                let image = serde_json::from_str::<Image>(&item.value)
                    .map_err(|_| AdminError::Malformed { key: item.key.clone() })?;
                if image.removing && opening.mode != OpenMode::Removal {
                    return Err(AdminError::Removing);
                }
                let keys = vec![
                    key::image(image.id),
                    name_key,
                    key::pool(image.pool),
                    key::pgs_of(image.pool),
                    key::NODES.to_owned(),
                    key::LIVE.to_owned(),
                ];
                opening.stage = Stage::Snapshot { id: image.id, keys };
                self.want_keys(env);
            }
            Stage::Snapshot { .. } => {}
        }
        Ok(())
    }

    /// Subscribes to what open images, images being opened and the watch need.
    pub(crate) fn want_keys(&mut self, env: &mut dyn Env) {
        let mut keys: Vec<String> = self.open_keys.values().flatten().cloned().collect();
        for opening in &self.openings {
            if let Stage::Snapshot { keys: more, .. } = &opening.stage {
                keys.extend(more.iter().cloned());
            }
        }
        if let Some(watch) = &self.watch {
            keys.extend(watch.prefixes.iter().cloned());
        }
        self.control.want(env, keys);
    }

    /// Completes openings whose keys the map now follows.
    pub(crate) fn finish_openings(&mut self, env: &mut dyn Env) {
        let mut at = 0;
        while let Some(opening) = self.openings.get(at) {
            let Stage::Snapshot { id, keys } = &opening.stage else {
                at += 1;
                continue;
            };
            if !self.control.covers(keys) {
                at += 1;
                continue;
            }
            let (id, keys) = (*id, keys.clone());
            let opening = self.openings.swap_remove(at);
            let result = self.usable(id, opening.mode);
            if let Ok(handle) = result {
                self.open_keys.insert(handle, keys);
            } else {
                self.want_keys(env);
            }
            self.admin_done.push_back(AdminDone::Opened { ticket: opening.ticket, result });
        }
    }

    fn usable(&mut self, id: ImageId, mode: OpenMode) -> Result<ImageHandle, AdminError> {
        let image = self.map.image(id).ok_or(AdminError::NotFound)?;
        if image.removing && mode != OpenMode::Removal {
            return Err(AdminError::Removing);
        }
        if self.map.pool(image.pool).is_none() {
            return Err(AdminError::Malformed { key: key::pool(image.pool) });
        }
        self.io.open(&self.map, id, mode).ok_or(AdminError::TooManyImages)
    }

    /// Ends openings whose time is over.
    pub(crate) fn expire_openings(&mut self, now: Mono) {
        let late: Vec<AdminTicket> =
            self.openings.iter().filter(|o| o.deadline <= now).map(|o| o.ticket).collect();
        for ticket in late {
            let error = self.no_answer();
            self.end_opening(ticket, Err(error));
        }
    }
}
