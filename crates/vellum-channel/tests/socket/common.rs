//! What the tests share.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use vellum_channel::{Endpoint, ListenOptions, Socket, SocketListener, SocketOptions};

/// Nothing in these tests takes long; what hangs fails.
pub async fn within<T>(operation: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), operation).await.expect("in time")
}

/// Two connected ends, and what keeps their address alive.
pub struct Ends {
    pub near: Socket,
    pub far: Socket,
    pub listener: SocketListener,
    pub directory: TempDir,
}

/// The kinds of address that this machine has.
pub fn families(directory: &TempDir) -> Vec<Endpoint> {
    let mut all = vec![
        Endpoint::Ip("127.0.0.1:0".parse().expect("an address")),
        Endpoint::UnixPath(directory.path().join("socket")),
        Endpoint::UnixAbstract(format!("vellum {}", directory.path().display()).into_bytes()),
    ];
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        all.push(Endpoint::Ip("[::1]:0".parse().expect("an address")));
    } else {
        eprintln!("note: this machine has no IPv6, which is not tested");
    }
    all
}

pub async fn ends_at(at: &Endpoint, directory: TempDir, options: &SocketOptions) -> Ends {
    let listening = ListenOptions { socket: options.clone(), ..ListenOptions::default() };
    let listener = SocketListener::bind(at, &listening).expect("a listener");
    let to = listener.local_endpoint().expect("an address");
    let near = within(Socket::connect(&to, options)).await.expect("a connection");
    let far = within(listener.accept()).await.expect("a connection");
    Ends { near, far, listener, directory }
}

pub async fn tcp_ends(options: &SocketOptions) -> Ends {
    let directory = TempDir::new().expect("a directory");
    ends_at(&Endpoint::Ip("127.0.0.1:0".parse().expect("an address")), directory, options).await
}

/// Two connected ends of every kind that this machine has.
pub async fn all_ends(options: &SocketOptions) -> Vec<Ends> {
    let mut all = Vec::new();
    let count = families(&TempDir::new().expect("a directory")).len();
    for index in 0..count {
        let directory = TempDir::new().expect("a directory");
        let at = families(&directory).remove(index);
        all.push(ends_at(&at, directory, options).await);
    }
    all
}

/// Small buffers of the kernel, so that transfers are partial.
pub fn small_buffers() -> SocketOptions {
    SocketOptions { send_buffer: Some(64 * 1024), ..SocketOptions::default() }
}

/// How many descriptors of this process are open on `path`.
pub fn open_on(path: &Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").expect("a list");
    all.filter_map(Result::ok).filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == path)).count()
}

/// A file of its own, to count the descriptors on.
pub struct Marked {
    pub file: OwnedFd,
    directory: TempDir,
}

impl Marked {
    pub fn new() -> Self {
        let directory = TempDir::new().expect("a directory");
        let path = directory.path().join("marked");
        let file =
            std::fs::File::options().create_new(true).read(true).write(true).open(path).expect("a file");
        Self { file: file.into(), directory }
    }

    /// How many descriptors are open on it, its own among them.
    pub fn count(&self) -> usize {
        open_on(&self.directory.path().canonicalize().expect("a path").join("marked"))
    }
}

/// Runs the body of the test `name` in a process of its own, for what concerns a whole process. True in that process.
pub fn is_alone(name: &str) -> bool {
    const ALONE: &str = "VELLUM_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().expect("a path"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(ALONE, "1")
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}
