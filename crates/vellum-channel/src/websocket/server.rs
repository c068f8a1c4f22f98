//! The server's side of the opening handshake.

use super::head::{FIELDS_MAX, Fields, HeadError, Input, accept_key, is_key, quote, read_head};
use super::options::WebSocketOptions;
use crate::channel::Channel;
use crate::error::{ErrorKind, error};
use std::io;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How the server calls itself.
const SERVER: &str = "Vellum";
/// After a refusal, what the client is still sending is read so that the answer reaches it: at most this, for so long.
const LINGER_BYTES: usize = 64 << 10;
const LINGER: Duration = Duration::from_secs(1);

/// What the handshake came to.
#[derive(Debug)]
pub(super) struct Agreed {
    pub input: Input,
    pub path: String,
    pub protocol: Option<String>,
}

/// Why a client is turned away.
struct Refusal {
    status: &'static str,
    /// For the log: it may quote the client. The client itself is told the status only.
    why: String,
    kind: ErrorKind,
}

const BAD: &str = "400 Bad Request";

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self { status: BAD, why, kind: ErrorKind::WebSocketHandshake }
    }
}

impl From<&str> for Refusal {
    fn from(why: &str) -> Self {
        why.to_owned().into()
    }
}

/// Reads the request and answers it.
pub(super) async fn accept<C: Channel>(channel: &mut C, options: &WebSocketOptions) -> io::Result<Agreed> {
    let label = channel.label();
    let read = read_head(channel, |bytes| {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        httparse::Request::new(&mut fields).parse(bytes)
    });
    let refusal = match read.await {
        Ok(input) => match check(&input.bytes[..input.head], options) {
            Ok(request) => {
                channel.write_all(welcome(&request).as_bytes()).await?;
                channel.flush().await?;
                return Ok(Agreed { input, path: request.path, protocol: request.protocol });
            }
            Err(refusal) => refusal,
        },
        Err(HeadError::Io(error)) => return Err(error),
        Err(failed @ HeadError::Ended { .. }) => return Err(failed.into_io(&label, "request")),
        Err(failed) => {
            let status = match failed {
                HeadError::Syntax(_) => BAD,
                _ => "431 Request Header Fields Too Large",
            };
            turn_away(channel, status).await;
            return Err(failed.into_io(&label, "request"));
        }
    };
    turn_away(channel, refusal.status).await;
    let (why, status) = (refusal.why, refusal.status);
    Err(error(
        refusal.kind,
        format!("{label}: the WebSocket client was turned away: {why} (answered {status})"),
    ))
}

struct Request {
    path: String,
    protocol: Option<String>,
    accept_key: String,
}

/// Looks at a complete request.
fn check(head: &[u8], options: &WebSocketOptions) -> Result<Request, Refusal> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    request.parse(head).map_err(|error| error.to_string())?;
    if request.method != Some("GET") {
        return Err(format!("the method is {:?}, not GET", quote(request.method.unwrap_or_default())).into());
    }
    if request.version != Some(1) {
        return Err("the request is not of HTTP/1.1".into());
    }
    let path = path_of(request.path.unwrap_or_default());
    let fields = Fields(request.headers);
    check_fields(fields)?;
    if !options.any_path && path_part(path) != path_part(&options.path) {
        return Err(Refusal {
            status: "404 Not Found",
            why: format!("there is no path \"{}\"", quote(path)),
            kind: ErrorKind::WebSocketHandshake,
        });
    }
    check_origin(fields, options)?;
    let key = fields.one("Sec-WebSocket-Key")?.unwrap_or_default();
    if !is_key(key) {
        return Err("Sec-WebSocket-Key is not the base64 text of 16 bytes".into());
    }
    let protocol = choose_protocol(fields, options)?;
    Ok(Request { path: path.to_owned(), protocol, accept_key: accept_key(key) })
}

fn check_fields(fields: Fields<'_>) -> Result<(), Refusal> {
    if fields.one("Host")?.is_none_or(str::is_empty) {
        return Err("there is no Host".into());
    }
    fields.check_upgrade()?;
    if fields.one("Sec-WebSocket-Version")? != Some("13") {
        return Err("Sec-WebSocket-Version is not 13".into());
    }
    // A body would be taken for frames.
    if fields.has("Transfer-Encoding") || fields.one("Content-Length")?.is_some_and(|len| len != "0") {
        return Err("the request has a body".into());
    }
    Ok(())
}

fn check_origin(fields: Fields<'_>, options: &WebSocketOptions) -> Result<(), Refusal> {
    let Some(origin) = fields.one("Origin")? else { return Ok(()) };
    if options.origins.is_empty() || options.origins.iter().any(|one| one.eq_ignore_ascii_case(origin)) {
        return Ok(());
    }
    Err(Refusal {
        status: "403 Forbidden",
        why: format!("a page of \"{}\" may not connect", quote(origin)),
        kind: ErrorKind::Refused,
    })
}

fn choose_protocol(fields: Fields<'_>, options: &WebSocketOptions) -> Result<Option<String>, Refusal> {
    let offered = fields.list("Sec-WebSocket-Protocol")?;
    let chosen = options.protocols.iter().find(|ours| offered.contains(&ours.as_str())).cloned();
    let may_lack = !options.require_protocol && (offered.is_empty() || options.protocols.is_empty());
    if chosen.is_none() && !may_lack {
        let offered = quote(&offered.join(", "));
        let ours = options.protocols.join(", ");
        return Err(format!("no subprotocol in common: offered \"{offered}\", taken \"{ours}\"").into());
    }
    Ok(chosen)
}

/// The path of a request's target, which may be a whole address.
fn path_of(target: &str) -> &str {
    let Some((_, rest)) = target.split_once("://").filter(|_| !target.starts_with('/')) else {
        return target;
    };
    rest.find('/').map_or("/", |at| &rest[at..])
}

fn path_part(path: &str) -> &str {
    path.split_once('?').map_or(path, |(path, _)| path)
}

fn welcome(request: &Request) -> String {
    let date = httpdate::fmt_http_date(SystemTime::now());
    let key = &request.accept_key;
    let mut answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nServer: {SERVER}\r\nDate: {date}\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\nSec-WebSocket-Accept: {key}\r\n"
    );
    if let Some(protocol) = &request.protocol {
        answer += &format!("Sec-WebSocket-Protocol: {protocol}\r\n");
    }
    answer + "\r\n"
}

/// Answers with an error. Failing at that changes nothing: the client is gone then.
async fn turn_away<C: Channel>(channel: &mut C, status: &str) {
    let date = httpdate::fmt_http_date(SystemTime::now());
    let answer = format!(
        "HTTP/1.1 {status}\r\nServer: {SERVER}\r\nDate: {date}\r\nConnection: close\r\nSec-WebSocket-Version: 13\r\n\
         Content-Length: 0\r\n\r\n"
    );
    if channel.write_all(answer.as_bytes()).await.is_err() || channel.shutdown().await.is_err() {
        return;
    }
    let drain = async {
        let (mut scratch, mut left) = ([0; 1024], LINGER_BYTES);
        while let Ok(read @ 1..) = channel.read(&mut scratch).await {
            left = left.saturating_sub(read);
            if left == 0 {
                break;
            }
        }
    };
    // Either way the connection is dropped next.
    let _ended = tokio::time::timeout(LINGER, drain).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_a_path() {
        for (target, path) in [
            ("/", "/"),
            ("/a?b=c", "/a?b=c"),
            ("ws://host:1/x", "/x"),
            ("http://host", "/"),
            ("/a://b/c", "/a://b/c"),
            ("*", "*"),
        ] {
            assert_eq!(path_of(target), path);
        }
        assert_eq!(path_part("/a?b"), "/a");
    }
}
