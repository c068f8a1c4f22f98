//! What an address asks of sockets, TLS and WebSocket, as their options.

use crate::address::{Address, KeepAlivePart, Place, SocketPart, TlsPart, WebSocketPart};
use crate::error::{ErrorKind, error};
use crate::socket::SocketOptions;
use crate::tls::{Pem, TlsClientOptions, TlsIdentity, TlsServerOptions};
use crate::websocket::WebSocketOptions;
use std::io;

impl SocketPart {
    /// `options`, with what the address says instead.
    pub(crate) fn over(&self, options: &SocketOptions) -> SocketOptions {
        let bytes = |number: Option<u32>| number.and_then(|number| usize::try_from(number).ok());
        let mut options = options.clone();
        options.no_delay = self.no_delay.unwrap_or(options.no_delay);
        options.user_timeout = self.user_timeout.or(options.user_timeout);
        options.send_buffer = bytes(self.send_buffer).or(options.send_buffer);
        options.receive_buffer = bytes(self.receive_buffer).or(options.receive_buffer);
        match self.keep_alive {
            None => {}
            Some(KeepAlivePart::Off) => options.keep_alive = None,
            Some(KeepAlivePart::On(times)) => options.keep_alive = Some(times),
        }
        options
    }
}

impl TlsPart {
    pub(crate) fn client_options(&self, socket: &SocketPart) -> io::Result<TlsClientOptions> {
        // Whoever names these means to keep somebody out, and would not.
        if self.client_certificate.is_some() || !self.allowed_names.is_empty() {
            return Err(error(
                ErrorKind::Invalid,
                "client-cert and allow say whom a server lets in: they belong to an address that is listened on",
            ));
        }
        let defaults = TlsClientOptions::default();
        Ok(TlsClientOptions {
            ca: self.ca.as_ref().map(Pem::file),
            identity: self.identity()?,
            crls: self.crls.iter().map(Pem::file).collect(),
            alpn: self.alpn.clone(),
            server_name: self.server_name.clone(),
            versions: self.versions.unwrap_or_default(),
            handshake_timeout: socket.handshake_timeout.unwrap_or(defaults.handshake_timeout),
            ..defaults
        })
    }

    pub(crate) fn server_options(&self, socket: &SocketPart) -> io::Result<TlsServerOptions> {
        let Some(identity) = self.identity()? else {
            return Err(error(
                ErrorKind::TlsCredentials,
                "a TLS server shows a certificate: name its file, and that of its key, with ?cert=FILE&key=FILE",
            ));
        };
        let mut options = TlsServerOptions::new(identity);
        options.ca = self.ca.as_ref().map(Pem::file);
        options.crls = self.crls.iter().map(Pem::file).collect();
        options.alpn.clone_from(&self.alpn);
        options.versions = self.versions.unwrap_or_default();
        options.client_certificates = self.client_certificate.unwrap_or_default();
        options.allowed_names.clone_from(&self.allowed_names);
        options.handshake_timeout = socket.handshake_timeout.unwrap_or(options.handshake_timeout);
        Ok(options)
    }

    /// Certificate and key, which may be one file.
    fn identity(&self) -> io::Result<Option<TlsIdentity>> {
        match (&self.certificate, &self.key) {
            (None, None) => Ok(None),
            (Some(certificate), key) => {
                let key = key.as_ref().unwrap_or(certificate);
                Ok(Some(TlsIdentity::new(Pem::file(certificate), Pem::file(key))))
            }
            (None, Some(_)) => Err(error(
                ErrorKind::TlsCredentials,
                "the address names a key but no certificate: name its file with cert=FILE",
            )),
        }
    }
}

impl WebSocketPart {
    pub(crate) fn options(&self, socket: &SocketPart) -> WebSocketOptions {
        let mut options = WebSocketOptions { path: self.path.clone(), ..WebSocketOptions::default() };
        if !self.protocols.is_empty() {
            options.protocols.clone_from(&self.protocols);
        }
        options.handshake_timeout = socket.handshake_timeout.unwrap_or(options.handshake_timeout);
        options
    }

    /// The same for a client, which also asks for the query.
    pub(crate) fn client_options(&self, socket: &SocketPart) -> WebSocketOptions {
        let mut options = self.options(socket);
        if let Some(query) = &self.query {
            options.path = format!("{}?{query}", self.path);
        }
        options
    }
}

impl Address {
    /// What a WebSocket client names as `Host`: with the port, where it is not the scheme's own.
    pub(crate) fn web_socket_host(&self) -> String {
        if let Some(host) = self.web_socket.as_ref().and_then(|part| part.host.as_ref()) {
            return host.clone();
        }
        let host = self.own_host();
        // A zone is known to this machine alone.
        let host = match host.split_once('%') {
            Some((number, _)) => format!("[{number}]"),
            None if host.contains(':') => format!("[{host}]"),
            None => host.to_owned(),
        };
        let own_port = if self.tls.is_some() { 443 } else { 80 };
        match &self.place {
            Place::Tcp { port, .. } if *port != own_port => format!("{host}:{port}"),
            _ => host,
        }
    }

    /// The name that a TLS client looks for in the server's certificate.
    pub(crate) fn tls_name(&self) -> &str {
        if let Some(name) = self.tls.as_ref().and_then(|part| part.server_name.as_ref()) {
            return name;
        }
        let host = self.own_host();
        host.split_once('%').map_or(host, |(number, _)| number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::kind_of;
    use crate::socket::KeepAlive;
    use std::time::Duration;

    fn address(text: &str) -> Address {
        text.parse().expect("a good address")
    }

    #[test]
    fn hosts_are_named_with_ports_that_are_not_the_schemes_own() {
        for (text, host) in [
            ("ws://a.example", "a.example"),
            ("ws://a.example:8080/x", "a.example:8080"),
            ("ws://a.example:443", "a.example:443"),
            ("wss://a.example:443", "a.example"),
            ("wss://[::1]", "[::1]"),
            ("wss://[fe80::1%25eth0]:1", "[fe80::1]:1"),
            ("ws+unix:///run/x", "localhost"),
            ("ws+unix:///run/x?host=b.example:1", "b.example:1"),
        ] {
            assert_eq!(address(text).web_socket_host(), host, "{text}");
        }
        assert_eq!(address("tls+tcp://[fe80::1%25eth0]:1").tls_name(), "fe80::1");
        assert_eq!(address("tls+unix:x").tls_name(), "localhost");
        assert_eq!(address("tls+tcp://a:1?sni=b").tls_name(), "b");
    }

    #[test]
    fn an_address_changes_what_it_names_and_nothing_else() {
        let base = SocketOptions {
            no_delay: true,
            keep_alive: Some(KeepAlive::default()),
            send_buffer: Some(5),
            ..SocketOptions::default()
        };
        assert_eq!(address("a:1").socket.over(&base), base);
        let over = address("a:1?nodelay=off&keepalive=off&rcvbuf=7&user-timeout=2s").socket.over(&base);
        let expected = SocketOptions {
            no_delay: false,
            keep_alive: None,
            send_buffer: Some(5),
            receive_buffer: Some(7),
            user_timeout: Some(Duration::from_secs(2)),
            ..SocketOptions::default()
        };
        assert_eq!(over, expected);
    }

    #[test]
    fn credentials_are_complete_or_refused() {
        let options = |text: &str| {
            let address = address(text);
            address.tls.expect("TLS").server_options(&address.socket)
        };
        for text in ["tls+tcp://:1", "tls+tcp://:1?key=k.pem"] {
            assert_eq!(kind_of(&options(text).expect_err(text)), Some(ErrorKind::TlsCredentials), "{text}");
        }
        let one_file = options("tls+tcp://:1?cert=both.pem&handshake-timeout=3").expect("complete");
        assert_eq!(one_file.identity, TlsIdentity::new(Pem::file("both.pem"), Pem::file("both.pem")));
        assert_eq!(one_file.handshake_timeout, Duration::from_secs(3));
    }

    #[test]
    fn a_query_is_asked_for_and_not_listened_on() {
        let address = address("ws://a/b?query=c%3Dd&protocol=p");
        let part = address.web_socket.expect("WebSocket");
        assert_eq!(part.client_options(&address.socket).path, "/b?c=d");
        assert_eq!(part.options(&address.socket).path, "/b");
        assert_eq!(part.options(&address.socket).protocols, ["p"]);
    }
}
