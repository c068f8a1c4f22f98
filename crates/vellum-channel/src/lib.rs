//! Channels: ordered streams of bytes between two ends.
//!
//! One trait, [`Channel`], over sockets, TLS, WebSocket, child processes, files and memory, with what Tokio's streams do
//! not have: descriptors passed along, partial progress, peeking, shutdown from any thread, corking, seeking, readiness,
//! zero-copy sends, and moving between executors. Every channel is a Tokio stream and every Tokio stream a channel
//! ([`Stream`]).
//!
#![doc = include_str!("counterparts.md")]
#![deny(unsafe_op_in_unsafe_fn)]

mod activation;
mod address;
mod blocking;
mod buffer;
mod channel;
mod command;
mod connector;
mod control;
mod descriptors;
mod dns;
mod endpoint;
mod error;
mod ext;
mod file;
mod happy_eyeballs;
mod inherited;
mod layers;
mod listener;
mod no_shutdown;
mod null;
mod pair;
mod passed;
mod poll_fd;
mod shared;
mod socket;
mod stream;
mod tls;
mod turns;
mod watch;
mod websocket;
mod wrap;

pub use activation::{Activated, activated};
pub use address::{
    ADDRESS_MAX, Address, Families, FileMode, KeepAlivePart, Place, SocketPart, TlsPart, WebSocketPart,
};
pub use blocking::Blocking;
pub use buffer::Buffer;
pub use channel::{Base, Channel, Closed, Features, Interest, ReadFlags, Shutdown, WriteFlags, ZeroCopy};
pub use command::{Command, CommandOptions, Direction};
pub use connector::{
    ConnectOptions, Connecting, Connector, Destination, SystemConnector, connect, connect_through,
};
pub use control::{Control, Controls, WakeReader};
pub use descriptors::{Descriptors, MESSAGE_DESCRIPTORS_MAX};
pub use dns::{LookupOptions, lookup};
pub use endpoint::{Endpoint, PeerProcess};
pub use error::{Error, ErrorKind, error, kind_of};
pub use ext::{ChannelExt, ReadAll, ReadAllEof, ReadSome, WriteAll, WriteSome};
pub use file::{File, FileOptions};
pub use inherited::open_fd;
pub use listener::{Admission, Agreed, Listener, ListenerCounts, ListenerHandle, ListenerOptions, Peer};
pub use null::Null;
pub use pair::Pair;
pub use shared::Shared;
pub use socket::{KeepAlive, ListenOptions, Socket, SocketListener, SocketOptions};
pub use stream::Stream;
pub use tls::{
    Certificate, ClientCertificates, Pem, Tls, TlsClient, TlsClientOptions, TlsIdentity, TlsServer,
    TlsServerOptions, TlsVersions,
};
pub use watch::Watch;
pub use websocket::{Pinger, WebSocket, WebSocketClose, WebSocketOptions};
pub use wrap::{
    Counters, Counts, DirectionCounts, Faulty, FaultyOptions, Observe, Operation, Rate, Rates, Throttle,
    Timeout, TimeoutOptions, Trace,
};
