//! Options made into what rustls works with.

use super::credentials::{anchors, identity, refused, revocation_lists, system_anchors};
use super::names::AllowedNames;
use super::options::{ClientCertificates, TlsClientOptions, TlsServerOptions, TlsVersions};
use super::verify::{ClientCheck, ServerCheck};
use crate::error::{ErrorKind, error};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{Ticketer, default_provider};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use std::io;
use std::sync::{Arc, LazyLock};

/// Sessions that a client remembers.
const SESSIONS_MAX: usize = 256;

/// Tickets that a server hands out for a connection.
const TICKETS: usize = 2;

/// The cryptography: this crate's own choice, whatever the process has made its default.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(default_provider()));

/// Makes a client's configuration.
pub(super) fn client(options: &TlsClientOptions) -> io::Result<ClientConfig> {
    let roots = match &options.ca {
        Some(pem) => anchors(pem)?,
        None => system_anchors()?,
    };
    let lists = revocation_lists(&options.crls)?;
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), PROVIDER.clone())
        .with_crls(lists)
        .allow_unknown_revocation_status()
        .enforce_revocation_expiration()
        .build()
        .map_err(|error| refused("the revocation lists cannot be used", error))?;
    let builder = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(versions(options.versions))
        .map_err(|error| refused("the TLS versions cannot be used", error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerCheck { by: verifier }));
    let mut config = match &options.identity {
        None => builder.with_no_client_auth(),
        Some(from) => {
            let (chain, key) = identity(from)?;
            builder.with_client_auth_cert(chain, key).map_err(mismatch)?
        }
    };
    config.alpn_protocols = protocols(&options.alpn)?;
    config.enable_early_data = false;
    config.resumption = match options.resumption {
        true => Resumption::in_memory_sessions(SESSIONS_MAX),
        false => Resumption::disabled(),
    };
    Ok(config)
}

/// Makes a server's configuration, and its check of clients if it has one.
pub(super) fn server(options: &TlsServerOptions) -> io::Result<(ServerConfig, Option<Arc<ClientCheck>>)> {
    let check = client_check(options)?.map(Arc::new);
    let builder = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(versions(options.versions))
        .map_err(|error| refused("the TLS versions cannot be used", error))?;
    let builder = match &check {
        Some(check) => builder.with_client_cert_verifier(check.clone()),
        None => builder.with_no_client_auth(),
    };
    let (chain, key) = identity(&options.identity)?;
    let mut config = builder.with_single_cert(chain, key).map_err(mismatch)?;
    config.alpn_protocols = protocols(&options.alpn)?;
    config.max_early_data_size = 0;
    // Tickets keep the state with the client: nothing grows here, however many clients there are.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    if options.resumption {
        config.ticketer = Ticketer::new().map_err(|error| refused("cannot make keys for tickets", error))?;
        config.send_tls13_tickets = TICKETS;
    }
    Ok((config, check))
}

fn client_check(options: &TlsServerOptions) -> io::Result<Option<ClientCheck>> {
    if options.client_certificates == ClientCertificates::None {
        // Whoever names any of these means to keep others out, and would not.
        if options.ca.is_some() || !options.allowed_names.is_empty() || !options.crls.is_empty() {
            return Err(error(
                ErrorKind::Invalid,
                "trusted issuers (ca), allowed names and revocation lists are of no use when clients are not asked for \
                 certificates: ask for them (in an address client-cert=required)",
            ));
        }
        return Ok(None);
    }
    let Some(ca) = &options.ca else {
        return Err(error(
            ErrorKind::TlsCredentials,
            "clients are asked for certificates, but no issuer of them is trusted: name a file of trusted issuers (ca)",
        ));
    };
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(anchors(ca)?), PROVIDER.clone())
        .with_crls(revocation_lists(&options.crls)?)
        .allow_unknown_revocation_status()
        .enforce_revocation_expiration();
    if options.client_certificates == ClientCertificates::Optional {
        builder = builder.allow_unauthenticated();
    }
    let by = builder.build().map_err(|error| refused("the revocation lists cannot be used", error))?;
    Ok(Some(ClientCheck { by, allowed: AllowedNames::new(&options.allowed_names) }))
}

static ONLY_13: [&SupportedProtocolVersion; 1] = [&TLS13];
static ONLY_12: [&SupportedProtocolVersion; 1] = [&TLS12];
static FROM_12: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

fn versions(wanted: TlsVersions) -> &'static [&'static SupportedProtocolVersion] {
    match wanted {
        TlsVersions::Tls13 => &ONLY_13,
        TlsVersions::Tls12AndLater => &FROM_12,
        TlsVersions::Tls12 => &ONLY_12,
    }
}

fn protocols(names: &[String]) -> io::Result<Vec<Vec<u8>>> {
    if let Some(bad) = names.iter().find(|name| name.is_empty() || name.len() > 255) {
        let what = format!("{bad:?} is no application protocol (ALPN): it takes 1 to 255 bytes");
        return Err(error(ErrorKind::Invalid, what));
    }
    Ok(names.iter().map(|name| name.clone().into_bytes()).collect())
}

fn mismatch(error: rustls::Error) -> io::Error {
    let what = "certificate and key cannot be used together: the key must belong to the first certificate, and be RSA, \
                ECDSA (P-256, P-384) or Ed25519";
    refused(what, error)
}
