//! HTTP for people and Prometheus: `GET /metrics`, `/links` and `/healthz`, one request per connection.

use crate::config::{HELLO_TIMEOUT_MS, HTTP_CONNS_MAX, HTTP_HEADERS_MAX, HTTP_REQUEST_BYTES_MAX};
use reactor::{ConnId, Env, IoBuf, Mono};
use std::collections::BTreeMap;

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// `/metrics`.
    Metrics,
    /// `/links`.
    Links,
    /// `/healthz`.
    Health,
}

enum Parsed {
    More,
    Get(Wanted),
    Error(u16, &'static str),
}

struct Session {
    since: Mono,
    bytes: Vec<u8>,
    answered: bool,
}

/// All HTTP connections.
#[derive(Default)]
pub struct Http {
    sessions: BTreeMap<ConnId, Session>,
}

impl Http {
    /// A new connection.
    pub fn accept(&mut self, env: &mut dyn Env, conn: ConnId) {
        if self.sessions.len() >= HTTP_CONNS_MAX {
            env.close(conn, false);
            return;
        }
        self.sessions.insert(conn, Session { since: env.now(), bytes: Vec::new(), answered: false });
    }

    /// A connection has ended.
    pub fn closed(&mut self, conn: ConnId) {
        self.sessions.remove(&conn);
    }

    /// Bytes arrived. What is wanted is to be given to `answer`.
    pub fn bytes(&mut self, env: &mut dyn Env, conn: ConnId, bytes: &[u8]) -> Option<Wanted> {
        let session = self.sessions.get_mut(&conn)?;
        if session.answered {
            return None;
        }
        let room = HTTP_REQUEST_BYTES_MAX.saturating_sub(session.bytes.len());
        let oversized = bytes.len() > room;
        session.bytes.extend_from_slice(bytes.get(..room.min(bytes.len())).unwrap_or(&[]));
        match parse(&session.bytes) {
            Parsed::Get(wanted) => return Some(wanted),
            Parsed::Error(code, text) => self.answer(env, conn, code, "text/plain; charset=utf-8", text),
            Parsed::More if oversized => {
                self.answer(env, conn, 400, "text/plain; charset=utf-8", "request too large\n");
            }
            Parsed::More => {}
        }
        None
    }

    /// Answers and ends the connection.
    pub fn answer(&mut self, env: &mut dyn Env, conn: ConnId, code: u16, kind: &str, body: &str) {
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.answered = true;
            session.bytes = Vec::new();
        }
        let reason = match code {
            200 => "OK",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            500 => "Internal Server Error",
            _ => "Service Unavailable",
        };
        let head = format!(
            "HTTP/1.1 {code} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        let mut text = head.into_bytes();
        text.extend_from_slice(body.as_bytes());
        let sent = IoBuf::copy_of(&text).is_ok_and(|bytes| env.send_bytes(conn, bytes).is_ok());
        env.close(conn, sent);
    }

    /// Ends connections whose request has not come in time.
    pub fn on_tick(&mut self, env: &mut dyn Env) {
        let now = env.now();
        let late = |s: &Session| now > s.since.plus_ms(HELLO_TIMEOUT_MS);
        let conns: Vec<ConnId> = self.sessions.iter().filter(|(_, s)| late(s)).map(|(c, _)| *c).collect();
        for conn in conns {
            // Once is enough: only `Closed` is awaited after this.
            if let Some(session) = self.sessions.get_mut(&conn) {
                session.since = Mono(u64::MAX);
            }
            env.close(conn, false);
        }
    }
}

fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; HTTP_HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => Parsed::More,
        Err(_) => Parsed::Error(400, "bad request\n"),
        Ok(httparse::Status::Complete(_)) => match (request.method, request.path) {
            (Some("GET"), Some(path)) => match path.split('?').next() {
                Some("/metrics") => Parsed::Get(Wanted::Metrics),
                Some("/links") => Parsed::Get(Wanted::Links),
                Some("/healthz") => Parsed::Get(Wanted::Health),
                _ => Parsed::Error(404, "there is /metrics, /links and /healthz\n"),
            },
            _ => Parsed::Error(405, "GET only\n"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let code = |text: &str| match parse(text.as_bytes()) {
            Parsed::More => 0,
            Parsed::Get(_) => 200,
            Parsed::Error(code, _) => code,
        };
        assert_eq!(code("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), 200);
        assert_eq!(code("GET /healthz?x=1 HTTP/1.0\r\n\r\n"), 200);
        assert_eq!(code("GET /links HTTP/1.1\r\n\r\n"), 200);
        assert_eq!(code("GET / HTTP/1.1\r\n\r\n"), 404);
        assert_eq!(code("POST /metrics HTTP/1.1\r\n\r\n"), 405);
        assert_eq!(code("GET /metrics HTTP/1.1\r\nHost"), 0);
        assert_eq!(code("\x00\x01\x02"), 400);
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(HTTP_HEADERS_MAX + 1));
        assert_eq!(code(&many), 400);
    }
}
