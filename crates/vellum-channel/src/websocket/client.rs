//! The client's side of the opening handshake.

use super::head::{FIELDS_MAX, Fields, Input, accept_key, make_key, quote, read_head};
use super::options::{WebSocketOptions, check_host};
use crate::channel::Channel;
use crate::error::{ErrorKind, error};
use std::io;
use tokio::io::AsyncWriteExt;

/// Sends the request, checks the answer; tells the subprotocol that was agreed on.
pub(super) async fn connect<C: Channel>(
    channel: &mut C,
    host: &str,
    options: &WebSocketOptions,
) -> io::Result<(Input, Option<String>)> {
    check_host(host)?;
    let label = channel.label();
    let key = make_key()?;
    channel.write_all(request(host, &key, options).as_bytes()).await?;
    channel.flush().await?;
    let read = read_head(channel, |bytes| {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        httparse::Response::new(&mut fields).parse(bytes)
    });
    let input = read.await.map_err(|failed| failed.into_io(&label, "answer"))?;
    match check(&input.bytes[..input.head], &key, options) {
        Ok(protocol) => Ok((input, protocol)),
        Err(why) => {
            let message = format!("{label}: {host} does not switch to WebSocket: {why}");
            Err(error(ErrorKind::WebSocketHandshake, message))
        }
    }
}

fn request(host: &str, key: &str, options: &WebSocketOptions) -> String {
    let path = &options.path;
    let mut request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
    );
    if !options.protocols.is_empty() {
        request += &format!("Sec-WebSocket-Protocol: {}\r\n", options.protocols.join(", "));
    }
    for (name, value) in &options.headers {
        request += &format!("{name}: {value}\r\n");
    }
    request + "\r\n"
}

/// Looks at a complete answer.
fn check(head: &[u8], key: &str, options: &WebSocketOptions) -> Result<Option<String>, String> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut answer = httparse::Response::new(&mut fields);
    answer.parse(head).map_err(|error| error.to_string())?;
    if answer.code != Some(101) {
        return Err(other_status(&answer, &options.path));
    }
    if answer.version != Some(1) {
        return Err("it answers in HTTP/1.0".into());
    }
    let fields = Fields(answer.headers);
    fields.check_upgrade()?;
    if fields.one("Sec-WebSocket-Accept")? != Some(accept_key(key).as_str()) {
        return Err("Sec-WebSocket-Accept does not fit the key: it may be an old answer from a cache".into());
    }
    if let Some(extension) = fields.list("Sec-WebSocket-Extensions")?.first() {
        return Err(format!("it wants the extension \"{}\", which was not offered", quote(extension)));
    }
    let protocol = fields.one("Sec-WebSocket-Protocol")?.map(str::to_owned);
    match &protocol {
        Some(chosen) if !options.protocols.contains(chosen) => {
            Err(format!("it chose the subprotocol \"{}\", which was not offered", quote(chosen)))
        }
        None if options.require_protocol => {
            Err(format!("it takes none of the subprotocols {}", options.protocols.join(", ")))
        }
        _ => Ok(protocol),
    }
}

fn other_status(answer: &httparse::Response<'_, '_>, path: &str) -> String {
    let code = answer.code.unwrap_or_default();
    let mut why = format!("it answered {code} {}", quote(answer.reason.unwrap_or_default()));
    match code {
        300..=399 => {
            if let Ok(Some(location)) = Fields(answer.headers).one("Location") {
                why += &format!(" (moved to \"{}\"; redirects are not followed)", quote(location));
            }
        }
        401 | 407 => why += " (it wants an Authorization header)",
        404 => why += &format!(" (is the path {path} right?)"),
        _ => {}
    }
    why
}
