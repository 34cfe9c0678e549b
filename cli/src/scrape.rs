//! The nodes' pages, and their own counters from them, for the benchmark and the tests.

use crate::error::CliError;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for a connection, and for each piece of a page.
const LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a page: far more than any node's has, in case something else answers.
const PAGE_BYTES_MAX: u64 = 64 << 20;

/// Sums over the data cores of all nodes.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Counters {
    /// `io_uring_enter` calls.
    pub enters: f64,
    /// Heap allocations of data cores' threads.
    pub allocations: f64,
}

/// The counters of all nodes of a fleet that serve.
pub fn fleet_counters(fleet: &crate::children::Fleet) -> Result<Counters, CliError> {
    let mut sum = Counters::default();
    for addresses in fleet.nodes.iter().filter_map(|node| node.addresses.as_ref()) {
        sum.add(&scrape(addresses.http)?);
    }
    Ok(sum)
}

impl Counters {
    /// Adds what a node's page says.
    pub fn add(&mut self, page: &str) {
        self.enters += data_core_sum(page, "drystone_loop_enters_total");
        self.allocations += data_core_sum(page, "drystone_heap_allocations_total");
    }

    /// The difference to an earlier reading.
    pub fn since(&self, earlier: &Self) -> Self {
        Self { enters: self.enters - earlier.enters, allocations: self.allocations - earlier.allocations }
    }
}

/// Sum of a family's values over all data cores; the control core is left out.
fn data_core_sum(page: &str, family: &str) -> f64 {
    page.lines()
        .filter_map(|line| line.strip_prefix(family)?.strip_prefix('{')?.split_once("} "))
        .filter(|(labels, _)| !labels.contains("core=\"control\""))
        .filter_map(|(_, value)| value.trim().parse::<f64>().ok())
        .sum()
}

/// Reads a node's metrics page.
pub fn scrape(http: SocketAddr) -> Result<String, CliError> {
    page(http, "/metrics")
}

/// Reads one of a node's pages.
#[allow(clippy::disallowed_methods, reason = "a scraper lives outside the seam")]
pub fn page(http: SocketAddr, path: &str) -> Result<String, CliError> {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&http, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(
            format!("GET {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n").as_bytes(),
        )?;
        let mut answer = String::new();
        stream.take(PAGE_BYTES_MAX).read_to_string(&mut answer)?;
        body(&answer).map(str::to_owned).map_err(std::io::Error::other)
    };
    ask().map_err(|source| CliError::Io { what: format!("read http://{http}{path}"), source })
}

/// What comes behind the head of an answer, if the answer is a page.
fn body(answer: &str) -> Result<&str, String> {
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the answer is no HTTP")?;
    let status = head.lines().next().and_then(|line| line.split_once(' ')).map_or("", |(_, status)| status);
    if status.starts_with("200") { Ok(body) } else { Err(format!("the answer is {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_cores_are_summed_and_the_control_core_is_not() {
        let page = "# HELP drystone_loop_enters_total x\n\
                    drystone_loop_enters_total{core=\"0\"} 10\n\
                    drystone_loop_enters_total{core=\"1\"} 5.5\n\
                    drystone_loop_enters_total{core=\"control\"} 1000\n\
                    drystone_loop_enters_total_other{core=\"0\"} 7\n";
        assert_eq!(data_core_sum(page, "drystone_loop_enters_total"), 15.5);
    }

    #[test]
    fn only_a_good_answer_has_a_body() {
        assert_eq!(body("HTTP/1.1 200 OK\r\nA: b\r\n\r\n[]"), Ok("[]"));
        assert_eq!(body("HTTP/1.1 404 Not Found\r\n\r\nno"), Err("the answer is 404 Not Found".to_owned()));
        assert!(body("").is_err() && body("SSH-2.0\r\n").is_err());
    }
}
