//! Versions, names, application protocols, sessions, reloads, and credentials that cannot be used.

use crate::pki::{self, Holder};
use crate::{client_of, good, good_with, refusal, server_of, shake, shake_over, soon, wires};
use std::io::Write;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    ClientCertificates, ErrorKind, Pem, Tls, TlsClient, TlsClientOptions, TlsIdentity, TlsServer,
    TlsServerOptions, TlsVersions,
};

fn list(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[tokio::test]
async fn the_server_chooses_among_application_protocols() {
    let ca = pki::ca("ca");
    let client_with =
        |alpn: &[&str]| TlsClient::new(TlsClientOptions { alpn: list(alpn), ..client_of(&ca) }).unwrap();
    let server_with =
        |alpn: &[&str]| TlsServer::new(TlsServerOptions { alpn: list(alpn), ..server_of(&ca) }).unwrap();
    let (near, far) = shake(&client_with(&["http/1.1", "nbd"]), &server_with(&["nbd", "h2"])).await.both();
    assert_eq!((near.alpn(), far.alpn()), (Some("nbd"), Some("nbd")));

    let shaken = shake(&client_with(&["http/1.1"]), &server_with(&["nbd"])).await;
    refusal(shaken.server, ErrorKind::TlsNoCommonProtocol, &["ALPN"]);
    refusal(shaken.client, ErrorKind::TlsNoCommonProtocol, &["no_application_protocol"]);

    // What is asked for must be there.
    let shaken = shake(&client_with(&["nbd"]), &server_with(&[])).await;
    refusal(shaken.client, ErrorKind::TlsNoCommonProtocol, &["server.test", "nbd"]);
    let shaken = shake(&client_with(&[]), &server_with(&["nbd"])).await;
    refusal(shaken.server, ErrorKind::TlsNoCommonProtocol, &["the client", "nbd"]);
    refusal(
        TlsClient::new(TlsClientOptions { alpn: list(&[""]), ..client_of(&ca) }),
        ErrorKind::Invalid,
        &["ALPN"],
    );
}

#[tokio::test]
async fn the_name_to_expect_can_be_another() {
    let ca = pki::ca("ca");
    let server = TlsServer::new(server_of(&ca)).unwrap();
    let server_name = Some("server.test".to_owned());
    let client = TlsClient::new(TlsClientOptions { server_name, ..client_of(&ca) }).unwrap();
    let (near, far) = shake_over(wires(), &client, &server, "10.1.2.3").await.both();
    assert_eq!((near.server_name(), far.server_name()), (Some("server.test"), Some("server.test")));
    // Of an address the server learns nothing.
    let client = TlsClient::new(client_of(&ca)).unwrap();
    let (near, far) = shake_over(wires(), &client, &server, "127.0.0.1").await.both();
    assert_eq!((near.server_name(), far.server_name()), (None, None));
    refusal(client.connect(wires().0, "/run/socket").await, ErrorKind::Invalid, &["/run/socket", "sni"]);
    let server_name = Some(String::new());
    refusal(TlsClient::new(TlsClientOptions { server_name, ..client_of(&ca) }), ErrorKind::Invalid, &[]);
}

/// Has the client read something, and with it the tickets that a server sends after the handshake.
async fn talk<C: vellum_channel::Channel>((near, far): (&mut Tls<C>, &mut Tls<C>)) {
    far.write_all(b"x").await.unwrap();
    soon(near.read_exact(&mut [0; 1])).await.unwrap();
}

#[tokio::test]
async fn sessions_are_resumed_until_a_reload() {
    for versions in [TlsVersions::Tls13, TlsVersions::Tls12] {
        let (client, server) = good_with(versions);
        for is_resumed in [false, true, true] {
            let (mut near, mut far) = shake(&client.clone(), &server.clone()).await.both();
            assert_eq!((near.is_resumed(), far.is_resumed()), (is_resumed, is_resumed));
            assert!(near.peer_certificate().is_some(), "it is remembered");
            talk((&mut near, &mut far)).await;
        }
        server.reload().unwrap();
        let (mut near, mut far) = shake(&client, &server).await.both();
        assert!(!near.is_resumed() && !far.is_resumed());
        talk((&mut near, &mut far)).await;
        assert!(shake(&client, &server).await.both().0.is_resumed());
    }
}

#[tokio::test]
async fn resumption_can_be_turned_off() {
    let ca = pki::ca("ca");
    for (of_client, of_server) in [(true, false), (false, true)] {
        let client = TlsClient::new(TlsClientOptions { resumption: of_client, ..client_of(&ca) }).unwrap();
        let server = TlsServer::new(TlsServerOptions { resumption: of_server, ..server_of(&ca) }).unwrap();
        for _ in 0..2 {
            let (mut near, mut far) = shake(&client, &server).await.both();
            assert!(!near.is_resumed() && !far.is_resumed());
            talk((&mut near, &mut far)).await;
        }
    }
}

/// A ticket is no way round the clock (or a revocation list, or the list of names).
#[tokio::test]
async fn a_client_that_comes_back_is_checked_again() {
    let ca = pki::ca("ca");
    let life = Duration::from_secs(3);
    let holder = ca.holder(|params| {
        pki::client(params);
        params.not_after = time::OffsetDateTime::now_utc() + life;
    });
    let client = TlsClientOptions { identity: Some(holder.identity()), ..client_of(&ca) };
    let server = TlsServerOptions {
        client_certificates: ClientCertificates::Required,
        ca: Some(ca.pem()),
        ..server_of(&ca)
    };
    let (client, server) = (TlsClient::new(client).unwrap(), TlsServer::new(server).unwrap());
    let (mut near, mut far) = shake(&client, &server).await.both();
    talk((&mut near, &mut far)).await;
    let (near, far) = shake(&client, &server).await.both();
    assert!(near.is_resumed() && far.peer_certificate().is_some());
    tokio::time::sleep(life + Duration::from_secs(1)).await;
    let shaken = shake(&client, &server).await;
    refusal(shaken.server, ErrorKind::TlsCertificateExpired, &["qemu.client"]);
}

#[tokio::test]
async fn files_are_read_again_on_request() {
    let ca = pki::ca("ca");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let store = |holder: &Holder| {
        std::fs::write(path("chain.pem"), &holder.chain).unwrap();
        std::fs::write(path("key.pem"), &holder.key).unwrap();
    };
    store(&ca.holder(pki::server));
    let identity = TlsIdentity::new(Pem::file(path("chain.pem")), Pem::file(path("key.pem")));
    let server = TlsServer::new(TlsServerOptions::new(identity)).unwrap();
    let client = TlsClient::new(client_of(&ca)).unwrap();
    let subject = async || {
        let (near, _far) = shake(&client, &server).await.both();
        near.peer_certificate().unwrap().subject
    };
    assert_eq!(subject().await, "C=UK,CN=the server");
    let other = ca.holder(|params| {
        pki::server(params);
        params.distinguished_name = pki::subject("renewed");
    });
    store(&other);
    assert_eq!(subject().await, "C=UK,CN=the server", "not without request");
    server.clone().reload().unwrap();
    assert_eq!(subject().await, "C=UK,CN=renewed");
    std::fs::remove_file(path("key.pem")).unwrap();
    refusal(server.reload(), ErrorKind::TlsCredentials, &["key.pem", "check its name"]);
    assert_eq!(subject().await, "C=UK,CN=renewed", "the server goes on");
}

#[test]
fn credentials_that_cannot_be_used_are_explained() {
    let ca = pki::ca("ca");
    let holder = ca.holder(pki::server);
    let (chain, key) = (Pem::text(holder.chain.clone()), Pem::text(holder.key.clone()));
    let other = Pem::text(ca.holder(pki::server).key);
    let damaged = Pem::text(holder.chain.replace("-----END", "*---END"));
    let encrypted =
        Pem::text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n");
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"nothing of use").unwrap();
    for (chain, key, words) in [
        (Pem::text(""), &key, &["no certificate in the given PEM text"][..]),
        (Pem::file("/nonexistent/x.pem"), &key, &["/nonexistent/x.pem", "check its name"]),
        (Pem::file(file.path()), &key, &["no certificate in the file"]),
        (damaged, &key, &["damaged", "-----END"]),
        (chain.clone(), &other, &["must belong to the first certificate"]),
        (chain.clone(), &chain, &["no private key"]),
        (chain.clone(), &encrypted, &["encrypted", "openssl pkey"]),
    ] {
        let options = TlsServerOptions::new(TlsIdentity::new(chain, key.clone()));
        refusal(TlsServer::new(options), ErrorKind::TlsCredentials, words);
    }
    let expired = pki::ca_with("old", pki::expired);
    let unfit =
        pki::ca_with("unfit", |params| params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature]);
    for (ca, words) in [
        (expired.pem(), &["CN=old", "expired on 2020-01-01"][..]),
        (unfit.pem(), &["CN=unfit", "keyCertSign"]),
    ] {
        let options = TlsClientOptions { ca: Some(ca), ..TlsClientOptions::default() };
        refusal(TlsClient::new(options), ErrorKind::TlsCredentials, words);
    }
    let crls = vec![Pem::text("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")];
    refusal(
        TlsClient::new(TlsClientOptions { crls, ..client_of(&ca) }),
        ErrorKind::TlsCredentials,
        &["revocation"],
    );
    let client_certificates = ClientCertificates::Required;
    let asking = TlsServerOptions { client_certificates, ..server_of(&ca) };
    refusal(TlsServer::new(asking), ErrorKind::TlsCredentials, &["no issuer of them is trusted"]);
    let allowed_names = vec!["*".to_owned()];
    let names = TlsServerOptions { allowed_names, ..server_of(&ca) };
    let lists = TlsServerOptions { crls: vec![ca.revocation_list(&[66], 4000)], ..server_of(&ca) };
    let issuers = TlsServerOptions { ca: Some(ca.pem()), ..server_of(&ca) };
    for useless in [names, lists, issuers] {
        refusal(
            TlsServer::new(useless),
            ErrorKind::Invalid,
            &["not asked for certificates", "client-cert=required"],
        );
    }
}

/// An expired issuer beside a good one is left out.
#[tokio::test]
async fn trust_anchors_out_of_date_are_left_out() {
    let (old, new) = (pki::ca_with("old", pki::expired), pki::ca("new"));
    let both = Pem::text(format!("{}{}", old.issuer.pem(), new.issuer.pem()));
    let client = TlsClientOptions { ca: Some(both), ..TlsClientOptions::default() };
    let client = TlsClient::new(client).unwrap();
    shake(&client, &TlsServer::new(server_of(&new)).unwrap()).await.both();
    let shaken = shake(&client, &TlsServer::new(server_of(&old)).unwrap()).await;
    refusal(shaken.client, ErrorKind::TlsCertificateUnknownIssuer, &["CN=old"]);
}

#[tokio::test]
async fn the_trusted_issuers_of_the_system_do_not_know_ours() {
    let client = match TlsClient::new(TlsClientOptions::default()) {
        Ok(client) => client,
        Err(error) => {
            println!("note: this system has no trusted issuers: {error}");
            return refusal(Err::<(), _>(error), ErrorKind::TlsCredentials, &["ca-certificates"]);
        }
    };
    let (_, server) = good();
    refusal(shake(&client, &server).await.client, ErrorKind::TlsCertificateUnknownIssuer, &[]);
}

#[tokio::test]
async fn versions_must_meet() {
    use TlsVersions::{Tls12, Tls12AndLater, Tls13};
    let ca = pki::ca("ca");
    let shake_with = async |of_client, of_server| {
        let client = TlsClient::new(TlsClientOptions { versions: of_client, ..client_of(&ca) }).unwrap();
        let server = TlsServer::new(TlsServerOptions { versions: of_server, ..server_of(&ca) }).unwrap();
        shake(&client, &server).await
    };
    for (of_client, of_server, version) in
        [(Tls12AndLater, Tls12AndLater, "1.3"), (Tls12AndLater, Tls12, "1.2"), (Tls12, Tls12AndLater, "1.2")]
    {
        let (near, far) = shake_with(of_client, of_server).await.both();
        assert_eq!((near.version(), far.version()), (version, version));
    }
    for (of_client, of_server) in [(Tls13, Tls12), (Tls12, Tls13)] {
        let shaken = shake_with(of_client, of_server).await;
        refusal(shaken.client, ErrorKind::TlsNoCommonParameters, &["server.test"]);
        refusal(shaken.server, ErrorKind::TlsNoCommonParameters, &["the client"]);
    }
}
