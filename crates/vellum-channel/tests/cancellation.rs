//! Operations of channels that stand on others, dropped wherever they wait: what was reported is there, nothing else.
//! Below is a channel that is short and slow as its seed says, so that they wait at every point of a record or a frame.

use proptest::prelude::*;
use std::io::{self, IoSlice};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use vellum_channel::{
    Channel, ChannelExt, Faulty, FaultyOptions, Interest, Pair, Pem, Tls, TlsClient, TlsClientOptions,
    TlsIdentity, TlsServer, TlsServerOptions, WebSocket, WebSocketOptions,
};

type Below = Faulty<Pair>;

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("does not hang")
}

/// Polls a future once, and drops it: as `select!` does with those that lose.
async fn poll_once_and_drop<F: Future>(future: F) -> Option<F::Output> {
    tokio::select! {
        biased;
        done = future => Some(done),
        () = std::future::ready(()) => None,
    }
}

fn below(seed: u64, capacity: usize) -> (Below, Below) {
    let options = FaultyOptions { seed, short_percent: 50, pending_percent: 50, ..FaultyOptions::default() };
    let (near, far) = Pair::with_capacity(capacity);
    (Faulty::new(near, options), Faulty::new(far, options))
}

async fn tls((near, far): (Below, Below)) -> (Tls<Below>, Tls<Below>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let pem = Pem::text(made.cert.pem());
    let identity = TlsIdentity::new(pem.clone(), Pem::text(made.signing_key.serialize_pem()));
    let client = TlsClient::new(TlsClientOptions { ca: Some(pem), ..TlsClientOptions::default() });
    let server = TlsServer::new(TlsServerOptions::new(identity)).expect("a server");
    let client = client.expect("a client");
    tokio::try_join!(client.connect(near, "localhost"), server.accept(far)).expect("both are content")
}

async fn web_socket((near, far): (Below, Below)) -> (WebSocket<Below>, WebSocket<Below>) {
    let options = WebSocketOptions { write_max: 1000, ..WebSocketOptions::default() };
    tokio::try_join!(WebSocket::connect(near, "localhost", &options), WebSocket::accept(far, &options))
        .expect("both are content")
}

fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// Writes, flushes, waits, reads and at last closes, and drops all of that again and again.
async fn nothing_is_lost(near: &mut impl Channel, far: &mut impl Channel, len: usize) {
    let data = noise(len);
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < data.len() {
        let rest = [IoSlice::new(&data[sent..])];
        let mut writing = near.writev_all(&rest);
        poll_once_and_drop(&mut writing).await.transpose().expect("written");
        sent += writing.transferred();
        poll_once_and_drop(near.flush()).await.transpose().expect("flushed");
        poll_once_and_drop(near.ready(Interest::all())).await.transpose().expect("no error");
        poll_once_and_drop(far.ready(Interest::READ)).await.transpose().expect("no error");
        let mut room = vec![0; (data.len() - got.len()).min(997)];
        let mut reading = far.read_all(&mut room);
        poll_once_and_drop(&mut reading).await.transpose().expect("read");
        let count = reading.transferred();
        got.extend_from_slice(&room[..count]);
    }
    assert!(got == data, "bytes were lost or doubled");

    // What is taken before a close arrives, also when the close is dropped and begun again.
    near.writev_all(&[IoSlice::new(b"last words")]).await.expect("written");
    let closing = async {
        while poll_once_and_drop(near.close()).await.transpose()?.is_none() {
            tokio::task::yield_now().await;
        }
        io::Result::Ok(())
    };
    let reading = async {
        let mut words = [0; 10];
        far.read_all(&mut words).await?;
        assert_eq!(&words, b"last words");
        assert!(!far.read_all_eof(&mut words).await?, "and then the end");
        while poll_once_and_drop(far.close()).await.transpose()?.is_none() {
            tokio::task::yield_now().await;
        }
        io::Result::Ok(())
    };
    let (closed, read) = tokio::join!(closing, reading);
    closed.expect("closed");
    read.expect("read to the end");
}

fn run(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(within(work));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn of_tls(
        seed in any::<u64>(), len in 1_usize..40_000, capacity in 1_usize..3000, is_swapped in any::<bool>(),
    ) {
        run(async {
            let (mut near, mut far) = tls(below(seed, capacity.max(200))).await;
            if is_swapped {
                std::mem::swap(&mut near, &mut far);
            }
            nothing_is_lost(&mut near, &mut far, len).await;
        });
    }

    #[test]
    fn of_web_sockets(
        seed in any::<u64>(), len in 1_usize..40_000, capacity in 1_usize..3000, is_swapped in any::<bool>(),
    ) {
        run(async {
            let (mut near, mut far) = web_socket(below(seed, capacity.max(200))).await;
            if is_swapped {
                std::mem::swap(&mut near, &mut far);
            }
            nothing_is_lost(&mut near, &mut far, len).await;
        });
    }
}
