//! Bad certificates of every kind, as seen from both ends.

use crate::pki::{self, Ca, Holder};
use crate::{Wire, client_of, refusal, server_of, shake, shake_over, wires};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use vellum_channel::{
    ChannelExt, ClientCertificates, ErrorKind, Pem, Tls, TlsClient, TlsClientOptions, TlsServer,
    TlsServerOptions, TlsVersions,
};

/// A server of which clients should think ill.
struct BadServer {
    holder: Holder,
    name: &'static str,
    crls: Vec<Pem>,
    kind: ErrorKind,
    words: &'static [&'static str],
    alert: &'static str,
}

fn bad(holder: Holder, kind: ErrorKind, words: &'static [&'static str], alert: &'static str) -> BadServer {
    BadServer { holder, name: "server.test", crls: Vec::new(), kind, words, alert }
}

fn with(
    first: impl FnOnce(&mut CertificateParams),
    then: impl FnOnce(&mut CertificateParams),
) -> impl FnOnce(&mut CertificateParams) {
    move |params| {
        first(params);
        then(params);
    }
}

fn bad_servers(ca: &Ca) -> Vec<BadServer> {
    let below = ca.issuer_below("below", |_| ());
    let expired_below = ca.issuer_below("expired below", pki::expired);
    let unfit_below = ca.issuer_below("unfit below", |params| {
        params.key_usages = vec![KeyUsagePurpose::CrlSign];
    });
    let no_ca_below = ca.issuer_below("no ca", |params| params.is_ca = IsCa::ExplicitNoCa);
    let mut cut_off = below.holder(pki::server);
    cut_off.chain.clone_from(&cut_off.own);
    let number =
        |number: u64| move |params: &mut CertificateParams| params.serial_number = Some(number.into());
    let wrong_use = ErrorKind::TlsCertificateWrongUsage;
    vec![
        bad(
            ca.holder(with(pki::server, pki::expired)),
            ErrorKind::TlsCertificateExpired,
            &["server.test", "C=UK,CN=the server", "expired on 2020-01-01 00:00:00 UTC", "renew"],
            "certificate_expired",
        ),
        bad(
            ca.holder(with(pki::server, pki::not_yet_valid)),
            ErrorKind::TlsCertificateNotYetValid,
            &["not valid yet", "from 3000-01-01"],
            "certificate_expired",
        ),
        bad(
            expired_below.holder(pki::server),
            ErrorKind::TlsCertificateExpired,
            &["the issuer \"CN=expired below\"", "2020-01-01"],
            "certificate_expired",
        ),
        BadServer {
            name: "other.test",
            ..bad(
                ca.holder(pki::server),
                ErrorKind::TlsCertificateWrongName,
                &["for server.test, 127.0.0.1, ::1", "not for \"other.test\"", "sni"],
                "bad_certificate",
            )
        },
        BadServer {
            name: "127.0.0.2",
            ..bad(
                ca.holder(pki::server),
                ErrorKind::TlsCertificateWrongName,
                &["not for \"127.0.0.2\""],
                "bad_certificate",
            )
        },
        bad(
            ca.holder(with(pki::server, |params| params.subject_alt_names.clear())),
            ErrorKind::TlsCertificateWrongName,
            &["no name at all (it has no subjectAltName)"],
            "bad_certificate",
        ),
        bad(
            ca.holder(with(pki::server, |params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            })),
            wrong_use,
            &["server authentication", "client authentication"],
            "unsupported_certificate",
        ),
        bad(
            ca.holder(with(pki::server, |params| {
                params.key_usages = vec![KeyUsagePurpose::KeyEncipherment];
            })),
            wrong_use,
            &["lacks digitalSignature"],
            "unsupported_certificate",
        ),
        bad(
            ca.holder(with(pki::server, |params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            })),
            wrong_use,
            &["belongs to an issuer of certificates"],
            "unsupported_certificate",
        ),
        bad(
            no_ca_below.holder(pki::server),
            wrong_use,
            &["CN=no ca", "not an issuer"],
            "unsupported_certificate",
        ),
        bad(
            unfit_below.holder(pki::server),
            wrong_use,
            &["CN=unfit below", "keyCertSign"],
            "unsupported_certificate",
        ),
        bad(
            pki::ca("stranger").holder(pki::server),
            ErrorKind::TlsCertificateUnknownIssuer,
            &["CN=stranger", "trust that issuer"],
            "unknown_ca",
        ),
        bad(
            cut_off,
            ErrorKind::TlsCertificateUnknownIssuer,
            &["CN=below", "certificates between"],
            "unknown_ca",
        ),
        // The name of the trusted issuer, but not its key.
        bad(
            pki::ca("ca").holder(pki::server),
            ErrorKind::TlsCertificateBad,
            &["BadSignature"],
            "decrypt_error",
        ),
        BadServer {
            crls: vec![ca.revocation_list(&[66], 4000)],
            ..bad(
                ca.holder(with(pki::server, number(66))),
                ErrorKind::TlsCertificateRevoked,
                &["has been revoked"],
                "certificate_revoked",
            )
        },
        BadServer {
            crls: vec![ca.revocation_list(&[66], 2021)],
            ..bad(
                ca.holder(with(pki::server, number(1))),
                ErrorKind::TlsCredentials,
                &["revocation list", "valid until 2021-01-01", "get the present one"],
                "unknown_ca",
            )
        },
    ]
}

#[tokio::test]
async fn clients_refuse_bad_servers() {
    let ca = pki::ca("ca");
    for versions in [TlsVersions::Tls13, TlsVersions::Tls12] {
        for case in bad_servers(&ca) {
            let client = TlsClientOptions { crls: case.crls, versions, ..client_of(&ca) };
            let server = TlsServerOptions::new(case.holder.identity());
            let server = TlsServerOptions { versions: TlsVersions::Tls12AndLater, ..server };
            let (client, server) = (TlsClient::new(client).unwrap(), TlsServer::new(server).unwrap());
            let shaken = shake_over(wires(), &client, &server, case.name).await;
            refusal(shaken.client, case.kind, case.words);
            refusal(shaken.server, ErrorKind::TlsAlert, &["the client broke off", case.alert]);
        }
    }
}

#[tokio::test]
async fn clients_accept_good_servers() {
    let ca = pki::ca("ca");
    let below = ca.issuer_below("below", |_| ()).issuer_below("further below", |_| ());
    let list = ca.revocation_list(&[66], 4000);
    for (holder, crls) in [
        (ca.holder(pki::server), vec![]),
        (below.holder(pki::server), vec![]),
        // Nothing about key usage at all.
        (ca.holder(with(pki::server, |params| params.key_usages.clear())), vec![]),
        (ca.holder(with(pki::server, |params| params.extended_key_usages.clear())), vec![]),
        // Not on the list, or of an issuer without a list.
        (
            ca.holder(with(pki::server, |params| params.serial_number = Some(65u64.into()))),
            vec![list.clone()],
        ),
        (below.holder(pki::server), vec![list]),
    ] {
        let client = TlsClient::new(TlsClientOptions { crls, ..client_of(&ca) }).unwrap();
        let server = TlsServer::new(TlsServerOptions::new(holder.identity())).unwrap();
        for name in ["server.test", "SERVER.test", "127.0.0.1", "::1", "[::1]"] {
            let (near, _far) = shake_over(wires(), &client, &server, name).await.both();
            let certificate = near.peer_certificate().expect("a certificate");
            assert_eq!(certificate.subject, "C=UK,CN=the server");
            assert!(near.peer_certificates().count() >= 1);
        }
    }
}

/// A client of which servers should think ill.
fn bad_clients(ca: &Ca) -> Vec<(Holder, ErrorKind, &'static [&'static str], &'static str)> {
    let wrong_use = ErrorKind::TlsCertificateWrongUsage;
    vec![
        (
            ca.holder(with(pki::client, pki::expired)),
            ErrorKind::TlsCertificateExpired,
            &["the client", "C=UK,CN=qemu.client", "expired on 2020-01-01"],
            "certificate_expired",
        ),
        (
            ca.holder(with(pki::client, pki::not_yet_valid)),
            ErrorKind::TlsCertificateNotYetValid,
            &["not valid yet"],
            "certificate_expired",
        ),
        (
            ca.holder(with(pki::client, |params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            })),
            wrong_use,
            &["client authentication"],
            "unsupported_certificate",
        ),
        (
            pki::ca("stranger").holder(pki::client),
            ErrorKind::TlsCertificateUnknownIssuer,
            &["CN=stranger"],
            "unknown_ca",
        ),
        (pki::ca("ca").holder(pki::client), ErrorKind::TlsCertificateBad, &["BadSignature"], "decrypt_error"),
        (
            ca.holder(with(pki::client, |params| params.serial_number = Some(66u64.into()))),
            ErrorKind::TlsCertificateRevoked,
            &["has been revoked"],
            "certificate_revoked",
        ),
        (
            ca.holder(with(pki::client, |params| {
                params.distinguished_name = pki::subject("other");
                params.subject_alt_names.clear();
            })),
            ErrorKind::TlsCertificateNotAllowed,
            &["C=UK,CN=other", "not on the list"],
            "access_denied",
        ),
    ]
}

fn asking(ca: &Ca, versions: TlsVersions) -> TlsServerOptions {
    TlsServerOptions {
        client_certificates: ClientCertificates::Required,
        ca: Some(ca.pem()),
        allowed_names: vec!["nobody.test".to_owned(), "C=UK,CN=qemu*".to_owned()],
        crls: vec![ca.revocation_list(&[66], 4000)],
        versions,
        ..server_of(ca)
    }
}

/// What a client of TLS 1.3 finds when it uses a connection that the server has refused.
async fn first_use(client: &mut Tls<Wire>) -> std::io::Result<usize> {
    crate::soon(client.readv(&mut [std::io::IoSliceMut::new(&mut [0; 16])])).await
}

#[tokio::test]
async fn servers_refuse_bad_clients() {
    let ca = pki::ca("ca");
    for (holder, kind, words, alert) in bad_clients(&ca) {
        for versions in [TlsVersions::Tls13, TlsVersions::Tls12] {
            let client = TlsClientOptions { identity: Some(holder.identity()), versions, ..client_of(&ca) };
            let (client, server) =
                (TlsClient::new(client).unwrap(), TlsServer::new(asking(&ca, versions)).unwrap());
            let shaken = shake(&client, &server).await;
            refusal(shaken.server, kind, words);
            // With TLS 1.3 the client is done first, and told afterwards.
            let told = match shaken.client {
                Ok(mut client) if versions == TlsVersions::Tls13 => first_use(&mut client).await,
                refused => refused.map(|_| 0),
            };
            refusal(told, ErrorKind::TlsAlert, &["the server \"server.test\"", alert]);
        }
    }
}

#[tokio::test]
async fn a_certificate_must_be_given_where_it_is_required() {
    let ca = pki::ca("ca");
    let client = TlsClient::new(client_of(&ca)).unwrap();
    let server = TlsServer::new(asking(&ca, TlsVersions::Tls13)).unwrap();
    let shaken = shake(&client, &server).await;
    refusal(shaken.server, ErrorKind::TlsCertificateMissing, &["the client", "one is required"]);
    let mut client = shaken.client.expect("the client is done first");
    refusal(first_use(&mut client).await, ErrorKind::TlsAlert, &["certificate_required", "identity"]);
    // A list of names asks for a certificate even where it is optional.
    let optional = ClientCertificates::Optional;
    let listed = TlsServerOptions { client_certificates: optional, ..asking(&ca, TlsVersions::Tls13) };
    let shaken = shake(&client_again(&ca), &TlsServer::new(listed.clone()).unwrap()).await;
    refusal(shaken.server, ErrorKind::TlsCertificateMissing, &[]);
    let open = TlsServerOptions { allowed_names: Vec::new(), ..listed };
    let (_near, far) = shake(&client_again(&ca), &TlsServer::new(open).unwrap()).await.both();
    assert!(far.peer_certificate().is_none());
}

fn client_again(ca: &Ca) -> TlsClient {
    TlsClient::new(client_of(ca)).unwrap()
}

#[tokio::test]
async fn servers_accept_good_clients() {
    let ca = pki::ca("ca");
    let below = ca.issuer_below("below", |_| ());
    for holder in [ca.holder(pki::client), below.holder(pki::client)] {
        for versions in [TlsVersions::Tls13, TlsVersions::Tls12] {
            let client = TlsClientOptions { identity: Some(holder.identity()), versions, ..client_of(&ca) };
            for names in ["C=UK,CN=qemu*", "*.test", "qemu.*", "CLIENT.test"] {
                let allowed_names = vec![names.to_owned()];
                let server = TlsServerOptions { allowed_names, ..asking(&ca, versions) };
                let client = TlsClient::new(client.clone()).unwrap();
                let (_near, far) = shake(&client, &TlsServer::new(server).unwrap()).await.both();
                assert_eq!(far.peer_certificate().expect("a certificate").subject, "C=UK,CN=qemu.client");
            }
        }
    }
}

/// The explanation of a refusal reaches a client that only writes.
#[tokio::test]
async fn a_client_that_writes_first_is_told_why_it_is_refused() {
    let ca = pki::ca("ca");
    let client = TlsClient::new(client_of(&ca)).unwrap();
    let server = TlsServer::new(asking(&ca, TlsVersions::Tls13)).unwrap();
    let shaken = shake(&client, &server).await;
    drop(shaken.server);
    let mut client = shaken.client.expect("the client is done first");
    let told = crate::soon(async {
        loop {
            client.writev_all(&[std::io::IoSlice::new(&[0; 1000])]).await?;
        }
        #[allow(unreachable_code)]
        std::io::Result::Ok(())
    });
    refusal(told.await, ErrorKind::TlsAlert, &["certificate_required"]);
}
