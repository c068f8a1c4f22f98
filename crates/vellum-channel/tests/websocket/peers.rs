//! Other implementations at the other end.

use crate::support::{Result, options, pattern, within};
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::{self, Message};
use vellum_channel::{
    Channel, ChannelExt, Pem, Socket, Stream, TlsIdentity, TlsServer, TlsServerOptions, WebSocket,
};

const SIZES: [usize; 8] = [1, 125, 126, 127, 65535, 65536, 1 << 20, 3 << 20];

/// A program that is stopped when the test ends, however it ends.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _killed = self.0.kill();
        let _status = self.0.wait();
    }
}

impl Program {
    /// Waits for its end, which must be a good one.
    async fn finish(mut self) {
        let ended = tokio::task::spawn_blocking(move || self.0.wait());
        let status = within(ended).await.expect("no panic").expect("waited for");
        assert!(status.success(), "the peer failed: {status}");
    }
}

const PYTHON: &str = "/usr/bin/python3";

fn needs_python() {
    let ran = Command::new(PYTHON).args(["-c", "import websockets"]).output();
    let is_there = ran.is_ok_and(|output| output.status.success());
    assert!(is_there, "the package python3-websockets is needed: scripts/install-test-deps.sh");
}

fn run(program: &str, flag: &str, script: &str, arguments: &[&str]) -> Program {
    let mut command = Command::new(program);
    command.arg(flag).arg(script).args(arguments).stdout(Stdio::piped());
    Program(command.spawn().expect("it starts"))
}

/// Sends back all that comes, until the peer closes.
async fn echo(mut channel: impl Channel) -> io::Result<usize> {
    let mut buf = vec![0; 100_000];
    let mut total = 0;
    loop {
        match channel.read(&mut buf).await? {
            0 => break,
            count => {
                channel.write_all(&buf[..count]).await?;
                channel.flush().await?;
                total += count;
            }
        }
    }
    channel.close().await?;
    Ok(total)
}

/// Sends data of every size to an echoing peer and checks what comes back.
async fn talk(mut channel: impl Channel) -> Result {
    for size in SIZES {
        let data = pattern(size);
        let mut got = vec![0; size];
        let (mut reader, mut writer) = tokio::io::split(&mut channel);
        let writing = async {
            writer.write_all(&data).await?;
            writer.flush().await
        };
        let (written, read) = within(async { tokio::join!(writing, reader.read_exact(&mut got)) }).await;
        written?;
        read?;
        assert!(got == data, "{size} bytes come back as they were");
    }
    within(channel.close()).await?;
    Ok(())
}

const PYTHON_CLIENT: &str = r#"
import asyncio, sys, websockets
async def main():
    uri = f"ws://127.0.0.1:{sys.argv[1]}/"
    # It offers compression, as it does by default: it is not agreed on.
    async with websockets.connect(uri, subprotocols=["binary"], max_size=None) as ws:
        assert ws.subprotocol == "binary", ws.subprotocol
        assert ws.extensions == [], ws.extensions
        async def back(size):
            got = b""
            while len(got) < size:
                message = await ws.recv()
                assert isinstance(message, bytes)
                got += message
            return got
        for size in map(int, sys.argv[2].split(",")):
            data = bytes((i * 7 + i // 256) % 256 for i in range(size))
            await ws.send(data)
            assert await back(size) == data
        parts = [b"a" * 10, b"", b"b" * 200, b"c" * 70000]
        sending = asyncio.ensure_future(ws.send(parts))
        ping = await ws.ping(b"hello")
        await asyncio.wait_for(ping, 5)
        await sending
        assert await back(70210) == b"".join(parts)
        await ws.close(1000, "done")
    assert ws.close_code == 1000, ws.close_code
    assert ws.close_reason == "peer requested close", ws.close_reason
    # And the other way round: a path that is not there.
    try:
        await websockets.connect(uri + "other")
    except websockets.InvalidStatusCode as error:
        assert error.status_code == 404, error
    else:
        raise AssertionError("connected to no path")
asyncio.run(main())
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_python_client() -> Result {
    needs_python();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port().to_string();
    let sizes = SIZES.map(|size| size.to_string()).join(",");
    let client = run(PYTHON, "-c", PYTHON_CLIENT, &[&port, &sizes]);
    let (stream, _) = within(listener.accept()).await?;
    let server = within(WebSocket::accept(Stream::new(stream), &options())).await?;
    assert_eq!(server.protocol(), Some("binary"));
    let total = within(echo(server)).await?;
    assert_eq!(total, SIZES.iter().sum::<usize>() + 70_210);
    let (stream, _) = within(listener.accept()).await?;
    within(WebSocket::accept(Stream::new(stream), &options())).await.expect_err("no such path");
    client.finish().await;
    Ok(())
}

const PYTHON_SERVER: &str = r#"
import asyncio, sys, websockets
async def main():
    over = asyncio.get_running_loop().create_future()
    async def echo(ws):
        try:
            assert ws.extensions == [], ws.extensions
            await asyncio.wait_for(await ws.ping(), 5)
            async for message in ws:
                # In fragments.
                await ws.send([message[:len(message) // 2], message[len(message) // 2:]])
            assert ws.close_code == 1000, ws.close_code
            over.set_result(None)
        except BaseException as error:
            over.set_exception(error)
    async with websockets.serve(echo, "127.0.0.1", 0, subprotocols=["binary"], max_size=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await over
asyncio.run(main())
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_python_server() -> Result {
    needs_python();
    let mut server = run(PYTHON, "-c", PYTHON_SERVER, &[]);
    let mut port = String::new();
    BufReader::new(server.0.stdout.take().expect("piped")).read_line(&mut port)?;
    let stream = TcpStream::connect(format!("127.0.0.1:{}", port.trim())).await?;
    let mut client = within(WebSocket::connect(Stream::new(stream), "localhost", &options())).await?;
    assert_eq!(client.protocol(), Some("binary"));
    within(client.ping()).await?;
    talk(client).await?;
    server.finish().await;
    Ok(())
}

const NODE_CLIENT: &str = r#"
const port = process.argv[1];
const socket = new WebSocket(`ws://127.0.0.1:${port}/`, ["binary"]);
socket.binaryType = "arraybuffer";
const data = new Uint8Array(300000).map((_, i) => i * 7);
let got = 0;
socket.onopen = () => { if (socket.protocol !== "binary" || socket.extensions) process.exit(3); socket.send(data); };
socket.onmessage = (event) => {
    for (const byte of new Uint8Array(event.data)) if (byte !== data[got++]) process.exit(4);
    if (got === data.length) socket.close(1000, "done");
};
socket.onclose = (event) => process.exit(event.code === 1000 && event.wasClean && got === data.length ? 0 : 5);
socket.onerror = () => process.exit(6);
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_client() -> Result {
    let flag = "--experimental-websocket";
    let is_there =
        Command::new("node").args([flag, "-e", "new WebSocket('ws://[::1]:1').onerror = () => {}"]).output();
    if !is_there.is_ok_and(|output| output.status.success()) {
        println!("note: skipped, there is no node with a WebSocket client");
        return Ok(());
    }
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port().to_string();
    let client = run("node", flag, "-e", &[NODE_CLIENT, &port]);
    let (stream, _) = within(listener.accept()).await?;
    let server = within(WebSocket::accept(Stream::new(stream), &options())).await?;
    assert_eq!(within(echo(server)).await?, 300_000);
    client.finish().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tungstenite_client() -> Result {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let client = tokio::task::spawn_blocking(move || {
        let stream = std::net::TcpStream::connect(address).expect("connected");
        let (mut socket, _) = tungstenite::client(format!("ws://{address}/"), stream).expect("a handshake");
        for size in SIZES {
            let data = pattern(size);
            socket.send(Message::Binary(data.clone().into())).expect("sent");
            let mut got = Vec::new();
            while got.len() < size {
                match socket.read().expect("a message") {
                    Message::Binary(part) => got.extend_from_slice(&part),
                    other => panic!("{other:?}"),
                }
            }
            assert!(got == data);
            socket.send(Message::Ping(vec![7; 125].into())).expect("sent");
            assert_eq!(socket.read().expect("a pong"), Message::Pong(vec![7; 125].into()));
        }
        socket.close(None).expect("closed");
        while socket.read().is_ok() {}
    });
    let (stream, _) = within(listener.accept()).await?;
    let server = within(WebSocket::accept(Stream::new(stream), &options())).await?;
    assert_eq!(server.protocol(), None);
    assert_eq!(within(echo(server)).await?, SIZES.iter().sum::<usize>());
    within(client).await.expect("no panic");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tungstenite_server() -> Result {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let server = tokio::task::spawn_blocking(move || {
        let (stream, _) = listener.accept().expect("a client");
        let mut socket = tungstenite::accept(stream).expect("a handshake");
        while let Ok(message) = socket.read() {
            if message.is_binary() {
                socket.send(message).expect("sent");
            }
        }
    });
    let stream = TcpStream::connect(address).await?;
    let mut client = within(WebSocket::connect(Stream::new(stream), "localhost", &options())).await?;
    within(client.ping()).await?;
    talk(client).await?;
    within(server).await.expect("no panic");
    Ok(())
}

const PYTHON_TLS_CLIENT: &str = r#"
import asyncio, ssl, sys, websockets
async def main():
    context = ssl.create_default_context(cafile=sys.argv[2])
    uri = f"wss://localhost:{sys.argv[1]}/"
    async with websockets.connect(uri, ssl=context, host="127.0.0.1", server_hostname="localhost", subprotocols=["binary"], max_size=None) as ws:
        data = bytes(i % 251 for i in range(1000000))
        await ws.send(data)
        got = b""
        while len(got) < len(data):
            got += await ws.recv()
        assert got == data
    assert ws.close_code == 1000, ws.close_code
asyncio.run(main())
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_python_client_over_tls() -> Result {
    needs_python();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (directory, pem) = (tempfile::tempdir()?, made.cert.pem());
    let ca = directory.path().join("ca.pem");
    std::fs::write(&ca, &pem)?;
    let identity = TlsIdentity::new(Pem::text(pem), Pem::text(made.signing_key.serialize_pem()));
    let tls = TlsServer::new(TlsServerOptions::new(identity))?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port().to_string();
    let client = run(PYTHON, "-c", PYTHON_TLS_CLIENT, &[&port, ca.to_str().expect("text")]);
    let (stream, _) = within(listener.accept()).await?;
    let serving = async {
        let socket = Socket::from_fd(stream.into_std()?.into())?;
        let server = WebSocket::accept(tls.accept(socket).await?, &options()).await?;
        echo(server).await
    };
    let served = within(serving).await;
    // It tells best what it does not like.
    client.finish().await;
    assert_eq!(served?, 1_000_000);
    Ok(())
}

/// A peer without any library: what `socat` or `nc` would send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_by_hand() -> Result {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let client = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).expect("connected");
        stream.write_all(b"GET / HTTP/1.1\r\n").expect("sent");
        stream.write_all(b"QUIT\r\n\r\n").expect("sent");
        let mut answer = String::new();
        io::Read::read_to_string(&mut stream, &mut answer).expect("an answer, and no reset");
        answer
    });
    let (stream, _) = within(listener.accept()).await?;
    within(WebSocket::accept(Stream::new(stream), &options())).await.expect_err("not HTTP");
    assert!(within(client).await.expect("no panic").starts_with("HTTP/1.1 400 "));
    Ok(())
}
