//! Handshakes as `openssl s_time -new` counts them: of `openssl s_server` and of a TLS channel, with one certificate.

use super::relay::{Ends, connect_when_there, free_port};
use super::setup::TlsSetup;
use super::{Result, explain};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Instant;
use tokio::io::AsyncReadExt;
use tokio::runtime::Builder;
use vellum_channel::{Endpoint, ListenOptions, SocketListener, TlsServer};

/// Handshakes a second with `openssl s_server`.
pub fn its_server(tls: &TlsSetup) -> Result<f64> {
    let at = free_port()?;
    let mut command = Command::new("openssl");
    command.args(["s_server", "-quiet", "-accept", &at.to_string()]);
    command.arg("-cert").arg(&tls.certificate).arg("-key").arg(&tls.key);
    // It ends with its input, which is the pipe to here.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Ends(command.spawn().map_err(|error| format!("openssl: {error}"))?);
    drop(connect_when_there(at)?);
    count(at)
}

/// The same with a TLS channel, which serves one connection after another, as `s_server` does.
pub fn our_server(tls: &TlsSetup) -> Result<f64> {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(explain)?;
    let any = Endpoint::Ip("127.0.0.1:0".parse().expect("an address"));
    let (listener, at) = runtime.block_on(async {
        let listener = SocketListener::bind(&any, &ListenOptions::default()).map_err(explain)?;
        match listener.local_endpoint().map_err(explain)? {
            Endpoint::Ip(at) => Ok((listener, at)),
            other => Err(format!("a TCP listener has no address of {other}")),
        }
    })?;
    let server = tls.server.clone();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { () = serve(&listener, &server) => {}, _ = stopped => {} }
        });
    });
    let counted = count(at);
    drop(stop);
    serving.join().map_err(|_| "the server panicked".to_owned())?;
    counted
}

async fn serve(listener: &SocketListener, server: &TlsServer) {
    while let Ok(socket) = listener.accept().await {
        // What goes wrong with one shows in the client's count.
        if let Ok(mut channel) = server.accept(socket).await {
            let _ = channel.read(&mut [0; 64]).await;
        }
    }
}

fn count(at: SocketAddr) -> Result<f64> {
    let mut command = Command::new("openssl");
    command.args(["s_time", "-new", "-tls1_3", "-time", "1", "-connect", &at.to_string()]);
    let started = Instant::now();
    let done = command.output().map_err(|error| format!("openssl s_time: {error}"))?;
    // It stops at a full second of the clock, not after exactly one second: the time is taken here.
    let seconds = started.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&done.stdout);
    let count =
        text.lines().find_map(|line| line.split_once(" connections in ")?.0.trim().parse::<f64>().ok());
    match count {
        Some(count) if done.status.success() && count > 0.0 => Ok(count / seconds),
        _ => Err(format!("openssl s_time: {}{text}", String::from_utf8_lossy(&done.stderr))),
    }
}
