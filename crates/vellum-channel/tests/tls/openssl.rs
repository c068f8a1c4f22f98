//! OpenSSL at the other end.

use crate::pki;
use crate::{client_of, refusal, server_of, shake, soon};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use vellum_channel::{
    ChannelExt, ClientCertificates, ErrorKind, Interest, Pem, Stream, Tls, TlsClient, TlsClientOptions,
    TlsIdentity, TlsServer, TlsServerOptions, TlsVersions,
};

/// A folder with what OpenSSL needs, and the issuer behind it.
struct Place {
    folder: TempDir,
    ca: pki::Ca,
}

impl Place {
    fn new() -> Self {
        let (folder, ca) = (tempfile::tempdir().unwrap(), pki::ca("ca"));
        let store = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let (server, client) = (ca.holder(pki::server), ca.holder(pki::client));
        store("ca.pem", &ca.issuer.pem());
        store("stranger.pem", &pki::ca("stranger").issuer.pem());
        store("server.pem", &server.chain);
        store("server.key", &server.key);
        store("client.pem", &client.chain);
        store("client.key", &client.key);
        Self { folder, ca }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn openssl(&self, args: &[&str]) -> Child {
        let mut command = Command::new("openssl");
        command.args(args).current_dir(self.folder.path()).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().expect("openssl is installed")
    }

    /// A server of OpenSSL that sends every line back reversed.
    async fn server(&self, args: &[&str]) -> Child {
        let fixed =
            ["s_server", "-unix", "socket", "-cert", "server.pem", "-key", "server.key", "-rev", "-quiet"];
        let child = self.openssl(&[&fixed[..], args].concat());
        soon(appears(&self.socket())).await;
        child
    }

    async fn connect(&self, options: TlsClientOptions) -> std::io::Result<Tls<Stream<UnixStream>>> {
        let wire = UnixStream::connect(self.socket()).await.unwrap();
        let client = TlsClient::new(options).unwrap();
        soon(client.connect(Stream::new(wire), "server.test")).await
    }

    /// A server of ours that a client of OpenSSL, with these arguments, connects to.
    async fn accept(
        &self,
        options: TlsServerOptions,
        args: &[&str],
    ) -> (std::io::Result<Tls<Stream<UnixStream>>>, Child) {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let fixed =
            ["s_client", "-unix", "socket", "-servername", "server.test", "-verify_return_error", "-quiet"];
        let child = self.openssl(&[&fixed[..], args].concat());
        let (wire, _) = soon(listener.accept()).await.unwrap();
        let server = TlsServer::new(options).unwrap();
        (soon(server.accept(Stream::new(wire))).await, child)
    }
}

async fn appears(path: &Path) {
    while UnixStream::connect(path).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn question_and_answer(channel: &mut Tls<Stream<UnixStream>>) {
    channel.write_all(b"stressed\n").await.unwrap();
    channel.flush().await.unwrap();
    let mut answer = [0; 9];
    soon(channel.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"desserts\n");
}

#[tokio::test]
async fn our_client_and_its_server() {
    for (args, versions, version) in [
        (&["-tls1_3"][..], TlsVersions::Tls13, "1.3"),
        (&["-tls1_2"], TlsVersions::Tls12AndLater, "1.2"),
        (
            &["-tls1_3", "-Verify", "3", "-CAfile", "ca.pem", "-verify_return_error"],
            TlsVersions::Tls13,
            "1.3",
        ),
        (
            &["-tls1_2", "-Verify", "3", "-CAfile", "ca.pem", "-verify_return_error"],
            TlsVersions::Tls12,
            "1.2",
        ),
    ] {
        let place = Place::new();
        let _server = place.server(args).await;
        let identity = Some(place.ca.holder(pki::client).identity());
        let options = TlsClientOptions { identity, versions, ..client_of(&place.ca) };
        let mut channel = place.connect(options).await.expect("content");
        assert_eq!(channel.version(), version);
        question_and_answer(&mut channel).await;
        soon(channel.close()).await.unwrap();
    }
}

#[tokio::test]
async fn its_server_refuses_and_is_refused() {
    let place = Place::new();
    let _server = place.server(&["-tls1_2"]).await;
    let refused = place.connect(client_of(&place.ca)).await;
    refusal(refused, ErrorKind::TlsNoCommonParameters, &["protocol_version (70)", "allow TLS 1.2"]);
    let versions = TlsVersions::Tls12AndLater;
    let refused = place.connect(TlsClientOptions { versions, ..client_of(&pki::ca("stranger")) }).await;
    refusal(refused, ErrorKind::TlsCertificateUnknownIssuer, &["C=UK,CN=the server"]);

    let place = Place::new();
    let _server = place.server(&["-Verify", "3", "-CAfile", "ca.pem", "-verify_return_error"]).await;
    let mut channel = place.connect(client_of(&place.ca)).await.expect("the client is done first");
    let told = soon(channel.read(&mut [0; 1])).await;
    refusal(told, ErrorKind::TlsAlert, &["certificate_required (116)"]);
    let identity = Some(pki::ca("stranger").holder(pki::client).identity());
    let mut channel =
        place.connect(TlsClientOptions { identity, ..client_of(&place.ca) }).await.expect("done first");
    refusal(soon(channel.read(&mut [0; 1])).await, ErrorKind::TlsAlert, &["the alert"]);
}

fn asking(place: &Place, versions: TlsVersions) -> TlsServerOptions {
    TlsServerOptions {
        client_certificates: ClientCertificates::Required,
        ca: Some(place.ca.pem()),
        allowed_names: vec!["C=UK,CN=qemu*".to_owned()],
        versions,
        ..server_of(&place.ca)
    }
}

#[tokio::test]
async fn its_client_and_our_server() {
    let shown =
        ["-CAfile", "ca.pem", "-verify_hostname", "server.test", "-cert", "client.pem", "-key", "client.key"];
    for (flag, version) in [("-tls1_3", "1.3"), ("-tls1_2", "1.2")] {
        let place = Place::new();
        let options = asking(&place, TlsVersions::Tls12AndLater);
        let (accepted, mut client) = place.accept(options, &[&shown[..], &[flag]].concat()).await;
        let mut channel = accepted.expect("content");
        assert_eq!(channel.version(), version);
        assert_eq!(channel.peer_certificate().unwrap().subject, "C=UK,CN=qemu.client");
        client.stdin.as_mut().unwrap().write_all(b"question\n").await.unwrap();
        let mut question = [0; 9];
        soon(channel.read_exact(&mut question)).await.unwrap();
        assert_eq!(&question, b"question\n");
        channel.write_all(b"answer\n").await.unwrap();
        channel.close().await.unwrap();
        let mut answer = Vec::new();
        soon(client.stdout.as_mut().unwrap().read_to_end(&mut answer)).await.unwrap();
        assert_eq!(answer, b"answer\n");
        soon(client.wait()).await.unwrap();
    }
}

#[tokio::test]
async fn its_client_refuses_and_is_refused() {
    for flag in ["-tls1_3", "-tls1_2"] {
        let place = Place::new();
        let options = TlsServerOptions { versions: TlsVersions::Tls12AndLater, ..server_of(&place.ca) };
        let (accepted, _client) = place.accept(options, &["-CAfile", "stranger.pem", flag]).await;
        refusal(accepted, ErrorKind::TlsAlert, &["the client", "unknown_ca (48)"]);

        let place = Place::new();
        let options = asking(&place, TlsVersions::Tls12AndLater);
        let (accepted, _client) = place.accept(options, &["-CAfile", "ca.pem", flag]).await;
        refusal(accepted, ErrorKind::TlsCertificateMissing, &["the client"]);
    }
    let place = Place::new();
    let (accepted, _client) = place.accept(server_of(&place.ca), &["-CAfile", "ca.pem", "-tls1_2"]).await;
    refusal(accepted, ErrorKind::TlsNoCommonParameters, &["the client"]);
}

/// It asks for a new handshake, which TLS 1.2 has and this crate has not.
#[tokio::test]
async fn its_client_cannot_renegotiate() {
    let place = Place::new();
    let options = TlsServerOptions { versions: TlsVersions::Tls12AndLater, ..server_of(&place.ca) };
    let listener = UnixListener::bind(place.socket()).unwrap();
    let args = ["s_client", "-unix", "socket", "-servername", "server.test", "-CAfile", "ca.pem", "-tls1_2"];
    let mut client = place.openssl(&args);
    let (wire, _) = soon(listener.accept()).await.unwrap();
    let mut channel =
        soon(TlsServer::new(options).unwrap().accept(Stream::new(wire))).await.expect("content");
    // A line that begins with R means that, to a client that was not told to be quiet.
    client.stdin.as_mut().unwrap().write_all(b"R\n").await.unwrap();
    let ended = soon(channel.read(&mut [0; 16])).await;
    // It gives up, since it is refused: nothing was read, and nothing hangs.
    assert!(!matches!(ended, Ok(1..)), "{ended:?}");
    soon(client.wait()).await.unwrap();
}

/// A line that begins with K has it change its keys and ask for the same. T01: a few such lines between data are nothing,
/// a flood of them is an error.
#[tokio::test]
async fn its_client_floods_with_key_updates() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let args = ["s_client", "-unix", "socket", "-servername", "server.test", "-CAfile", "ca.pem", "-tls1_3"];
    let mut client = place.openssl(&args);
    let (wire, _) = soon(listener.accept()).await.unwrap();
    let server = TlsServer::new(server_of(&place.ca)).unwrap();
    let mut channel = soon(server.accept(Stream::new(wire))).await.expect("content");
    let mut lines = client.stdin.take().unwrap();
    // It takes what it reads at once for one line: there is a pause behind each.
    let pause = || tokio::time::sleep(Duration::from_millis(5));
    for round in 0..40 {
        if round > 0 {
            lines.write_all(b"K\n").await.unwrap();
            pause().await;
        }
        let mut data = [0; 5];
        soon(async {
            // Where it was too slow for the pause, the line is gone with the one before it.
            let mut saying = lines.write_all(b"data\n").await;
            while tokio::time::timeout(Duration::from_millis(500), channel.ready(Interest::READ))
                .await
                .is_err()
            {
                saying = lines.write_all(b"data\n").await;
            }
            saying.unwrap();
            channel.read_exact(&mut data).await.unwrap();
        })
        .await;
        assert_eq!(&data, b"data\n");
        channel.write_all(b"yes\n").await.unwrap();
        channel.flush().await.unwrap();
    }
    let flood = async {
        while lines.write_all(b"K\n").await.is_ok() {
            pause().await;
        }
    };
    let mut rest = [0; 16];
    let ended = soon(async {
        tokio::select! { ended = channel.read(&mut rest) => ended, () = flood => panic!("it gave up first") }
    })
    .await;
    refusal(ended, ErrorKind::Limit, &["the client", "TooManyKeyUpdateRequests"]);
}

/// Keys of every kind and in every form that its tools write.
#[tokio::test]
async fn its_keys_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let openssl = |args: &[&str]| {
        let done =
            std::process::Command::new("openssl").args(args).current_dir(folder.path()).output().unwrap();
        assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    };
    for (make, form) in [
        (&["genrsa", "-traditional", "-out", "key", "2048"][..], "BEGIN RSA PRIVATE KEY"),
        (&["genpkey", "-algorithm", "RSA", "-out", "key"], "BEGIN PRIVATE KEY"),
        (&["ecparam", "-genkey", "-name", "prime256v1", "-out", "key"], "BEGIN EC PRIVATE KEY"),
        (&["ecparam", "-genkey", "-name", "secp384r1", "-noout", "-out", "key"], "BEGIN EC PRIVATE KEY"),
        (&["genpkey", "-algorithm", "ED25519", "-out", "key"], "BEGIN PRIVATE KEY"),
    ] {
        openssl(make);
        assert!(std::fs::read_to_string(folder.path().join("key")).unwrap().contains(form));
        let names =
            ["-addext", "subjectAltName=DNS:server.test", "-addext", "basicConstraints=critical,CA:FALSE"];
        let fixed = ["req", "-x509", "-key", "key", "-subj", "/CN=server", "-days", "2", "-out", "cert"];
        openssl(&[&fixed[..], &names].concat());
        let [cert, key] = ["cert", "key"].map(|name| Pem::file(folder.path().join(name)));
        // A certificate that vouches for itself can be trusted by itself.
        let client = TlsClientOptions { ca: Some(cert.clone()), ..TlsClientOptions::default() };
        let server = TlsServer::new(TlsServerOptions::new(TlsIdentity::new(cert, key))).unwrap();
        shake(&TlsClient::new(client).unwrap(), &server).await.both();
    }
}
