//! Addresses read, refused, and printed back.

use super::*;
use crate::error::ErrorKind;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

fn read(text: &str) -> Address {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refuse(text: &str) -> String {
    let error = text.parse::<Address>().expect_err(text);
    assert_eq!(error.kind(), ErrorKind::AddressSyntax, "{text}");
    error.to_string()
}

fn tcp(text: &str) -> (String, u16, Option<u16>, Families) {
    match read(text).place {
        Place::Tcp { host, port, to, families } => (host, port, to, families),
        other => panic!("{text}: {other:?}"),
    }
}

/// Each text, and what it prints as.
const PRINTED: &[(&str, &str)] = &[
    ("tcp://localhost:80", "tcp://localhost:80"),
    ("tcp:localhost:80", "tcp://localhost:80"),
    ("localhost:80", "tcp://localhost:80"),
    ("127.0.0.1:0", "tcp://127.0.0.1:0"),
    ("[::1]:80", "tcp://[::1]:80"),
    ("[fe80::1%eth0]:80", "tcp://[fe80::1%25eth0]:80"),
    ("[fe80::1%25eth0]:80", "tcp://[fe80::1%25eth0]:80"),
    (":80", "tcp://:80"),
    ("tcp://a:1?to=9&ipv4", "tcp://a:1?ipv4=on&to=9"),
    (
        "a:1?timeout=1.5&nodelay=no&keepalive-idle=60",
        "tcp://a:1?timeout=1500ms&nodelay=off&keepalive=on&keepalive-idle=60s",
    ),
    (
        "a:1?nodelay&timeout=2m&keepalive=off&sndbuf=4096&rcvbuf=1&backlog=5&user-timeout=500ms",
        "tcp://a:1?timeout=120s&sndbuf=4096&rcvbuf=1&backlog=5&nodelay=on&user-timeout=500ms&keepalive=off",
    ),
    ("unix:///run/a%20b", "unix:///run/a%20b"),
    ("unix:/run/x", "unix:///run/x"),
    ("unix:x", "unix:x"),
    ("unix:%40x", "unix:%40x"),
    ("unix:@name", "unix:@name"),
    ("unix:@n%e9", "unix:@n%E9"),
    ("unix:////x?mode=660&unlink=off", "unix:////x?mode=660&unlink=off"),
    ("vsock://host:1024", "vsock://2:1024"),
    ("vsock:any:1", "vsock://any:1"),
    (
        "tls+tcp://a:1?ca=/x/ca.pem&cert=c&key=k&crl=1&crl=2&sni=b&alpn=h2&alpn=nbd&tls=1.2",
        "tls+tcp://a:1?ca=/x/ca.pem&cert=c&key=k&crl=1&crl=2&sni=b&alpn=h2&alpn=nbd&tls=1.2",
    ),
    (
        "tls+unix:///x?client-cert=required&allow=CN%3Da*&handshake-timeout=3&cert=c",
        "tls+unix:///x?handshake-timeout=3s&cert=c&client-cert=required&allow=CN%3Da%2A",
    ),
    ("tls+vsock://1:2", "tls+vsock://1:2"),
    ("tls+fd:3?sni=a", "tls+fd:3?sni=a"),
    ("ws://a", "ws://a:80/"),
    ("wss://a", "wss://a:443/"),
    (
        "ws://a:1/b/c%20d?query=e%3Df&protocol=binary&host=g:1",
        "ws://a:1/b/c%20d?query=e%3Df&host=g:1&protocol=binary",
    ),
    ("ws+tcp://a:1/", "ws://a:1/"),
    ("ws+unix:///run/x?path=/y", "ws+unix:///run/x?path=/y"),
    ("ws+unix:x?path=/", "ws+unix:x"),
    ("wss+vsock://1:2/y", "wss+vsock://1:2/y"),
    ("wss+fd:4", "wss+fd:4"),
    ("exec:cat -n | tee a?b=c%20", "exec:cat -n | tee a?b=c%20"),
    ("fd:0", "fd:0"),
    ("fd:3?nodelay", "fd:3?nodelay=on"),
    ("file:///etc/motd", "file:///etc/motd"),
    ("file:a%3Fb?mode=read-write", "file:a%3Fb?mode=read-write"),
    ("file:a?mode=read", "file:a"),
    ("stdio:", "stdio:"),
    ("-", "stdio:"),
    ("null:", "null:"),
    ("tcp://a:1?", "tcp://a:1"),
];

#[test]
fn addresses_read_and_print() {
    for (text, printed) in PRINTED {
        let address = read(text);
        assert_eq!(address.to_string(), *printed, "{text}");
        assert_eq!(read(printed), address, "{text}");
    }
}

/// What QEMU's `inet_parse` takes and refuses, with its options.
#[test]
fn hosts_and_ports_as_qemu_has_them() {
    let any = Families::Any;
    assert_eq!(tcp(":5000"), (String::new(), 5000, None, any));
    assert_eq!(tcp("127.0.0.1:5000"), ("127.0.0.1".to_owned(), 5000, None, any));
    assert_eq!(tcp("[::1]:5000"), ("::1".to_owned(), 5000, None, any));
    assert_eq!(tcp("localhost:5000"), ("localhost".to_owned(), 5000, None, any));
    for text in
        ["", ":", "127.0.0.1", "localhost", "[::1", "[::1:5000", "[::1]", "[]:5000", "[::1]5000", "::1:5000"]
    {
        refuse(text);
    }
    assert_eq!(tcp("localhost:5000,ipv4=on,ipv6=off,to=5500,keep-alive=on").3, Families::Ipv4);
    assert_eq!(tcp("localhost:5000,to=5500").2, Some(5500));
    let bare = read("tcp:localhost:5000,ipv4,ipv6,keep-alive");
    assert_eq!(bare, read("localhost:5000?ipv4&ipv6&keepalive=on"));
    let times = KeepAlive {
        idle: Some(Duration::from_secs(20)),
        interval: Some(Duration::from_secs(30)),
        count: Some(10),
    };
    let all =
        read("localhost:5000,keep-alive=on,keep-alive-count=10,keep-alive-idle=20,keep-alive-interval=30");
    assert_eq!(all.socket.keep_alive, Some(KeepAlivePart::On(times)));
}

#[test]
fn families_follow_from_both_switches() {
    for (options, families) in [
        ("", Families::Any),
        ("?ipv4&ipv6", Families::Any),
        ("?ipv4", Families::Ipv4),
        ("?ipv4=on&ipv6=off", Families::Ipv4),
        ("?ipv6=off", Families::Ipv4),
        ("?ipv6", Families::Ipv6),
        ("?ipv4=off", Families::Ipv6),
    ] {
        assert_eq!(tcp(&format!("a:1{options}")).3, families, "{options}");
    }
    assert!(refuse("a:1?ipv4=off&ipv6=off").contains("one of ipv4 and ipv6"));
}

#[test]
fn errors_say_where_and_what_was_expected() {
    for (text, at, expected) in [
        ("tcp://localhost", "its end", "\":\" and a port"),
        ("tcp://localhost:", "its end", "a port"),
        ("tcp://localhost:http", "byte 16", "a number from 0 to 65535, found \"http\""),
        ("tcp://localhost:65536", "byte 16", "a number from 0 to 65535"),
        ("tcp://localhost:+1", "byte 16", "a port"),
        ("tcp://a:1/b", "byte 9", "options after ?"),
        ("tcp://a b:1", "byte 6", "letters, digits"),
        ("tcp://ä:1", "byte 6", "xn--"),
        ("tcp://user@a:1", "byte 6", "letters, digits"),
        ("[1.2.3.4]:1", "byte 1", "an IPv6 address"),
        ("[::1%]:1", "byte 5", "network interface"),
        ("http://a:1", "byte 0", "one of the schemes tcp, unix"),
        ("tls+exec:ls", "byte 0", "one of the schemes tcp, unix"),
        ("/run/x", "byte 0", "file: or unix: before a path"),
        ("unix:", "its end", "a path of 1 to 107 bytes"),
        ("unix:@", "its end", "an abstract name of 1 to 107 bytes"),
        ("unix://run/x", "byte 7", "an absolute path (a relative one is unix:path)"),
        ("unix:a%2", "byte 6", "two hexadecimal digits"),
        ("unix:@x%00", "byte 6", "text without a zero byte"),
        ("unix:a%", "byte 6", "two hexadecimal digits"),
        ("unix:a?mode=888", "byte 12", "octal permissions"),
        ("unix:a?mode=1777", "byte 12", "octal permissions"),
        ("vsock://2", "byte 8", "a context identifier"),
        ("vsock://4294967296:1", "byte 8", "a number from 0 to 4294967295"),
        ("fd:", "its end", "the number of a descriptor"),
        ("fd:-1", "byte 3", "the number of a descriptor"),
        ("fd:2147483648", "byte 3", "the number of a descriptor"),
        ("exec: ", "byte 5", "a command"),
        ("file:", "its end", "a path"),
        ("file:a?mode=x", "byte 12", "mode=read, write, read-write or append"),
        ("null:x", "byte 5", "the end"),
        ("stdio:?a", "byte 7", "no option"),
        ("a:1?=x", "byte 4", "the name of an option"),
        ("a:1?&", "byte 4", "the name of an option"),
        ("a:1?nodelay&nodelay", "byte 12", "nodelay only once"),
        ("a:1?nodelay=maybe", "byte 12", "nodelay=on or nodelay=off"),
        ("a:1?timeout", "byte 4", "timeout= with a value"),
        ("a:1?timeout=0", "byte 12", "a time"),
        ("a:1?timeout=1h", "byte 12", "a time"),
        ("a:1?timeout=1.2345", "byte 12", "a time"),
        ("a:1?timeout=99999999999", "byte 12", "a time"),
        ("a:1?timeout=.5", "byte 12", "a time"),
        ("a:1?keepalive=off&keepalive-count=2", "byte 4", "keepalive=on"),
        ("a:1?keepalive-idle=1500ms", "byte 19", "whole seconds"),
        ("a:9?to=8", "byte 7", "a number from 9 to 65535"),
        ("tls+tcp://a:1?ca=", "its end", "a value for ca"),
        ("tls+tcp://a:1?client-cert=yes", "byte 26", "required, optional or none"),
        ("tls+tcp://a:1?tls=1.1", "byte 18", "tls=1.3, tls=1.2 (and later)"),
        ("tls+tcp://a:1?alpn=%ff", "byte 19", "UTF-8"),
        ("ws://a:1/b#c", "byte 8", "a path"),
        ("ws://a:1/b c", "byte 8", "a path"),
        ("ws://a:1?protocol=a%20b", "byte 18", "a subprotocol"),
        ("ws+unix:a?path=b", "byte 15", "a path"),
    ] {
        let message = refuse(text);
        assert!(message.contains(&format!("at {at}: expected ")), "{text}: {message}");
        assert!(message.contains(expected), "{text}: {message}");
        assert!(message.starts_with("cannot read the address \""), "{message}");
    }
}

#[test]
fn unknown_options_are_named_with_those_that_are_known() {
    let message = refuse("tcp://a:1?nodely");
    assert!(message.contains("found \"nodely\""), "{message}");
    for known in ["ipv4", "ipv6", "to", "nodelay", "keepalive", "timeout"] {
        assert!(message.contains(known), "{message}");
    }
    assert!(!message.contains("alpn"), "{message}");
    assert!(refuse("tls+tcp://a:1?x=1").contains("alpn"));
    assert!(refuse("a:1?ca=x").contains("one of the options"));
    assert!(refuse("unix:a?ipv4").contains("mode, unlink"));
    assert!(refuse("fd:1?mode=600").contains("one of the options"));
}

#[test]
fn lengths_are_limited() {
    assert!(refuse(&"a".repeat(ADDRESS_MAX + 1)).contains("too long"));
    refuse(&format!("{}:1", "a".repeat(256)));
    read(&format!("{}:1", "a".repeat(255)));
    refuse(&format!("unix:{}", "a".repeat(108)));
    read(&format!("unix:{}", "a".repeat(107)));
    refuse(&format!("unix:@{}", "%61".repeat(108)));
    let message = refuse(&format!("a:1?{}", "crl=x&".repeat(65)));
    assert!(message.contains("64 options"), "{message}");
    // The errors themselves are short.
    assert!(refuse(&format!("a:{}", "é".repeat(9999))).len() < 600);
}

#[test]
fn endpoints_print_as_addresses_that_lead_to_them() {
    for endpoint in [
        Endpoint::Ip("127.0.0.1:80".parse().expect("an address")),
        Endpoint::Ip("[::1]:80".parse().expect("an address")),
        Endpoint::Ip(std::net::SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, 80, 0, 251).into()),
        Endpoint::UnixPath(PathBuf::from("/run/a ?%@b")),
        Endpoint::UnixPath(PathBuf::from("@relative")),
        Endpoint::UnixPath(PathBuf::from("//double")),
        Endpoint::UnixAbstract(b"na\xffme ?".to_vec()),
        Endpoint::Vsock { cid: 3, port: 1024 },
    ] {
        let address = Address::try_from(&endpoint).expect("it has an address");
        assert_eq!(address.to_string(), endpoint.to_string());
        assert_eq!(read(&endpoint.to_string()), address);
    }
    assert!(Address::try_from(&Endpoint::UnixUnnamed).is_err());
}

fn path(most: usize) -> impl Strategy<Value = PathBuf> {
    vec(1u8.., 1..most).prop_map(|bytes| PathBuf::from(OsString::from_vec(bytes)))
}

fn text() -> impl Strategy<Value = String> {
    "[^\\x00]{1,12}"
}

fn time() -> impl Strategy<Value = Duration> {
    (1u64..1_000_000_000).prop_map(Duration::from_millis)
}

fn seconds() -> impl Strategy<Value = Duration> {
    (1u64..32768).prop_map(Duration::from_secs)
}

fn host() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-zA-Z0-9._-]{0,30}",
        any::<[u16; 8]>().prop_map(|groups| std::net::Ipv6Addr::from(groups).to_string()),
        "[a-z0-9._-]{1,8}".prop_map(|zone| format!("fe80::1%{zone}")),
    ]
}

fn tcp_place() -> impl Strategy<Value = Place> {
    let families = prop_oneof![Just(Families::Any), Just(Families::Ipv4), Just(Families::Ipv6)];
    (host(), any::<u16>(), option::of(any::<u16>()), families).prop_map(|(host, port, to, families)| {
        let to = to.map(|to| to.max(port));
        Place::Tcp { host, port, to, families }
    })
}

fn stackable() -> impl Strategy<Value = Place> {
    prop_oneof![
        tcp_place(),
        (path(108), option::of(0u32..0o1000), option::of(any::<bool>()))
            .prop_map(|(path, mode, unlink)| Place::UnixPath { path, mode, unlink }),
        vec(1u8.., 1..108).prop_map(|name| Place::UnixAbstract { name }),
        any::<(u32, u32)>().prop_map(|(cid, port)| Place::Vsock { cid, port }),
        (0..=i32::MAX).prop_map(|number| Place::Fd { number }),
    ]
}

fn keep_alive() -> impl Strategy<Value = KeepAlivePart> {
    let times = (option::of(seconds()), option::of(seconds()), option::of(1u32..128))
        .prop_map(|(idle, interval, count)| KeepAlivePart::On(KeepAlive { idle, interval, count }));
    prop_oneof![Just(KeepAlivePart::Off), times]
}

fn socket() -> impl Strategy<Value = SocketPart> {
    let times = (option::of(time()), option::of(time()), option::of(time()));
    let numbers = (option::of(1u32..1 << 30), option::of(1u32..1 << 30), option::of(1u32..65536));
    (times, option::of(any::<bool>()), option::of(keep_alive()), numbers).prop_map(
        |((timeout, handshake_timeout, user_timeout), no_delay, keep_alive, (send, receive, backlog))| {
            SocketPart {
                timeout,
                handshake_timeout,
                no_delay,
                keep_alive,
                user_timeout,
                send_buffer: send,
                receive_buffer: receive,
                backlog,
            }
        },
    )
}

fn tls() -> impl Strategy<Value = TlsPart> {
    let client = prop_oneof![
        Just(ClientCertificates::None),
        Just(ClientCertificates::Optional),
        Just(ClientCertificates::Required)
    ];
    let versions =
        prop_oneof![Just(TlsVersions::Tls13), Just(TlsVersions::Tls12AndLater), Just(TlsVersions::Tls12)];
    let files = (option::of(path(20)), option::of(path(20)), option::of(path(20)), vec(path(9), 0..3));
    let names = (option::of(text()), vec(text(), 0..3), vec(text(), 0..3));
    (files, names, option::of(client), option::of(versions)).prop_map(
        |((ca, certificate, key, crls), (server_name, alpn, allowed_names), client_certificate, versions)| {
            TlsPart {
                ca,
                certificate,
                key,
                crls,
                server_name,
                alpn,
                versions,
                client_certificate,
                allowed_names,
            }
        },
    )
}

fn web_socket() -> impl Strategy<Value = WebSocketPart> {
    let path = "/[!-~&&[^?#]]{0,20}";
    let query = option::of("[!-~&&[^#]]{1,20}");
    let host = option::of("[a-z0-9.:\\[\\]%-]{1,20}");
    (path, query, host, vec("[A-Za-z0-9!$%&'*+.^_`|~-]{1,9}", 0..3))
        .prop_map(|(path, query, host, protocols)| WebSocketPart { path, query, host, protocols })
}

fn address() -> impl Strategy<Value = Address> {
    let stacked = (stackable(), option::of(tls()), option::of(web_socket()), socket()).prop_map(
        |(place, tls, web_socket, mut socket)| {
            if !matches!(place, Place::Tcp { .. } | Place::Fd { .. }) {
                (socket.no_delay, socket.keep_alive, socket.user_timeout) = (None, None, None);
            }
            if tls.is_none() && web_socket.is_none() {
                socket.handshake_timeout = None;
            }
            Address { place, tls, web_socket, socket }
        },
    );
    let mode = prop_oneof![
        Just(FileMode::Read),
        Just(FileMode::Write),
        Just(FileMode::ReadWrite),
        Just(FileMode::Append)
    ];
    let alone = prop_oneof![
        "[^\\x00 \\t\\n][^\\x00]{0,40}"
            .prop_filter("blank", |command| !command.trim().is_empty())
            .prop_map(|command| Place::Exec { command }),
        (path(200), mode).prop_map(|(path, mode)| Place::File { path, mode }),
        Just(Place::Stdio),
        Just(Place::Null),
    ];
    prop_oneof![4 => stacked, 1 => alone.prop_map(Address::new)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_printed_reads_back_as_the_same(address in address()) {
        let text = address.to_string();
        let back = text.parse::<Address>();
        prop_assert!(back.is_ok(), "{text}: {}", back.unwrap_err());
        prop_assert_eq!(back.unwrap(), address, "{}", text);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,60}") {
        if let Ok(address) = text.parse::<Address>() {
            prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
    }

    #[test]
    fn damaged_addresses_are_read_or_refused(
        which in 0..PRINTED.len(),
        changes in vec((any::<prop::sample::Index>(), "[a-z0-9:/?&=%,@+\\[\\]. é-]"), 1..4),
    ) {
        let mut text: Vec<char> = PRINTED[which].0.chars().collect();
        for (at, with) in changes {
            let at = at.index(text.len().max(1));
            text.splice(at..text.len().min(at + 1), with.chars());
        }
        let text: String = text.into_iter().collect();
        if let Ok(address) = text.parse::<Address>() {
            prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
    }
}
