//! A process in the middle that joins two TCP connections.

use super::streams::stream;
use super::{RELAY_BYTES, Result, explain};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::runtime::Runtime;

/// A process that ends with this.
pub struct Ends(pub Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes a second through a process that joins two TCP connections.
pub fn relay(runtime: &Runtime, program: &str, vellum: &std::path::Path) -> Result<f64> {
    let sink = TcpListener::bind("127.0.0.1:0").map_err(explain)?;
    let to = sink.local_addr().map_err(explain)?;
    let at = free_port()?;
    let mut command = if program == "socat" {
        let mut command = Command::new("socat");
        command
            .arg("-b262144")
            .arg(format!("TCP-LISTEN:{},bind=127.0.0.1", at.port()))
            .arg(format!("TCP:{to}"));
        command
    } else {
        let mut command = Command::new(vellum);
        command.args(["channel", "-q", &format!("listen:tcp://{at}"), &format!("tcp://{to}")]);
        command
    };
    let spawned = command.stdin(Stdio::null()).stderr(Stdio::null()).stdout(Stdio::null()).spawn();
    let _relay = Ends(spawned.map_err(|error| format!("{program}: {error}"))?);
    let source = connect_when_there(at)?;
    let (drain, _) = sink.accept().map_err(explain)?;
    for end in [&source, &drain] {
        end.set_nonblocking(true).map_err(explain)?;
    }
    runtime.block_on(async {
        let raw = |end| tokio::net::TcpStream::from_std(end).map_err(explain);
        let (source, drain) = (raw(source)?, raw(drain)?);
        let seconds = stream(Box::new(source), Box::new(drain), RELAY_BYTES).await.map_err(explain)?;
        Ok(RELAY_BYTES as f64 / seconds)
    })
}

pub fn free_port() -> Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).map_err(explain)
}

pub fn connect_when_there(at: SocketAddr) -> Result<TcpStream> {
    for _ in 0..200 {
        if let Ok(stream) = TcpStream::connect(at) {
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!("nothing listens on {at}"))
}
