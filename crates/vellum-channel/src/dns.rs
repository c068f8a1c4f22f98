//! Addresses of host names, looked up off the executor.

use crate::address::Families;
use crate::error::{Error, ErrorKind, error};
use std::fmt::Write;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

/// Addresses of one host that are used.
const RESULTS_MAX: usize = 64;

/// Lookups that run at a time in this process, those included that nobody waits for any more: the system's resolver
/// cannot be stopped, so that is what bounds its threads.
const LOOKUPS_MAX: usize = 32;

static LOOKUPS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(LOOKUPS_MAX)));

/// How to look up a host.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LookupOptions {
    /// Which addresses are wanted.
    pub families: Families,
    /// How long it may take. Default: 10 s.
    pub timeout: Duration,
}

impl Default for LookupOptions {
    fn default() -> Self {
        Self { families: Families::Any, timeout: Duration::from_secs(10) }
    }
}

/// The addresses of a host, by the system's resolver, in the order of its preference (RFC 6724); at least one, none
/// twice. A number is its own address, and nobody is asked.
///
/// The resolver runs on a thread of its own: neither the executor nor its end waits for one that does not answer.
///
/// # Errors
/// [`ErrorKind::Resolve`] if it has no address of these families, [`ErrorKind::Timeout`].
pub async fn lookup(host: &str, port: u16, options: &LookupOptions) -> io::Result<Vec<SocketAddr>> {
    let found = match host.parse::<IpAddr>() {
        Ok(number) => vec![SocketAddr::new(number, port)],
        Err(_) => match timeout(options.timeout, ask(host.to_owned(), port)).await {
            Ok(found) => found?,
            Err(_) => {
                let why =
                    format!("no answer within {:?}: check the name servers of this machine", options.timeout);
                return Err(failed(ErrorKind::Timeout, host, port, why).into());
            }
        },
    };
    select(&found, options.families).map_err(|why| failed(ErrorKind::Resolve, host, port, why).into())
}

/// Those that are wanted, or why there are none.
fn select(found: &[SocketAddr], families: Families) -> Result<Vec<SocketAddr>, String> {
    let mut selected = Vec::new();
    for address in found {
        if families.contains(address.ip()) && !selected.contains(address) && selected.len() < RESULTS_MAX {
            selected.push(*address);
        }
    }
    if !selected.is_empty() {
        return Ok(selected);
    }
    let wanted = match families {
        Families::Any => return Err("the name has no address".to_owned()),
        Families::Ipv4 => "IPv4",
        Families::Ipv6 => "IPv6",
    };
    let mut why = format!("the name has no {wanted} address");
    if let Some(other) = found.first() {
        // Cannot fail: it is a string.
        let _ = write!(why, ", only such as {}", other.ip());
    }
    Err(why)
}

fn failed(kind: ErrorKind, host: &str, port: u16, why: String) -> Error {
    Error::new(kind, format!("address resolution failed for {host}:{port}: {why}"))
}

/// Asks the resolver on a thread of its own.
async fn ask(host: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    let slot =
        LOOKUPS.clone().acquire_owned().await.map_err(|_| error(ErrorKind::Closed, "no more lookups"))?;
    let (answer, answered) = oneshot::channel();
    let asked = host.clone();
    let resolve = move || {
        let _slot: OwnedSemaphorePermit = slot;
        let found = (asked.as_str(), port).to_socket_addrs().map(|all| all.take(RESULTS_MAX * 4).collect());
        // Whoever asked may have gone.
        let _ = answer.send(found);
    };
    thread::Builder::new()
        .name("vellum-lookup".to_owned())
        .spawn(resolve)
        .map_err(|error| failed(ErrorKind::Resolve, &host, port, format!("no thread for it: {error}")))?;
    let found: io::Result<Vec<SocketAddr>> =
        answered.await.unwrap_or_else(|_| Err(io::Error::other("the resolver broke off")));
    found.map_err(|error| failed(ErrorKind::Resolve, &host, port, told_once(&error)).into())
}

/// What the resolver says, without the words that this module says itself.
fn told_once(error: &io::Error) -> String {
    let text = error.to_string();
    text.strip_prefix("failed to lookup address information: ").unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::kind_of;

    #[tokio::test]
    async fn a_number_is_its_own_address() {
        let options = LookupOptions::default();
        let found = lookup("192.0.2.7", 80, &options).await.expect("a number");
        assert_eq!(found, ["192.0.2.7:80".parse().expect("an address")]);
        let found = lookup("::1", 80, &options).await.expect("a number");
        assert_eq!(found, ["[::1]:80".parse().expect("an address")]);
        let only = LookupOptions { families: Families::Ipv4, ..options };
        let refused = lookup("::1", 80, &only).await.expect_err("not of that family");
        assert_eq!(kind_of(&refused), Some(ErrorKind::Resolve));
        assert_eq!(
            refused.to_string(),
            "address resolution failed for ::1:80: the name has no IPv4 address, only such as ::1"
        );
    }

    #[tokio::test]
    async fn localhost_is_this_machine() {
        let found = lookup("localhost", 4711, &LookupOptions::default()).await.expect("localhost");
        assert!(found.iter().all(|at| at.ip().is_loopback() && at.port() == 4711), "{found:?}");
    }

    #[tokio::test]
    async fn a_name_that_is_not_there_is_told() {
        // RFC 6761: never exists. An empty label is refused without asking the network.
        let refused = lookup("no..such", 1, &LookupOptions::default()).await.expect_err("no such host");
        assert_eq!(kind_of(&refused), Some(ErrorKind::Resolve), "{refused}");
        assert!(refused.to_string().starts_with("address resolution failed for no..such:1: "), "{refused}");
    }

    #[test]
    fn selected_addresses_are_of_the_families_and_told_once() {
        let all: Vec<SocketAddr> =
            ["[::1]:1", "127.0.0.1:1", "[::1]:1", "127.0.0.2:1"].map(|one| one.parse().expect("good")).into();
        assert_eq!(select(&all, Families::Any).expect("some").len(), 3);
        assert_eq!(select(&all, Families::Ipv4).expect("some"), [all[1], all[3]]);
        assert_eq!(select(&all, Families::Ipv6).expect("some"), [all[0]]);
        assert!(select(&[], Families::Any).is_err());
        let many: Vec<_> = (0..200).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        assert_eq!(select(&many, Families::Any).expect("some").len(), RESULTS_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookup_ends_in_time() {
        // All slots are taken: it cannot even begin.
        let slots = u32::try_from(LOOKUPS_MAX).expect("small");
        let taken = LOOKUPS.acquire_many(slots).await.expect("slots");
        let options = LookupOptions { timeout: Duration::from_millis(50), ..LookupOptions::default() };
        let late = lookup("localhost", 1, &options).await.expect_err("no slot");
        assert_eq!(kind_of(&late), Some(ErrorKind::Timeout));
        drop(taken);
    }
}
