//! One certificate, and what speaks TLS with it: tokio-rustls, TLS channels, and files for OpenSSL.

use super::{Result, explain, tools};
use std::path::PathBuf;
use std::sync::Arc;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vellum_channel::{Pem, TlsClient, TlsClientOptions, TlsIdentity, TlsServer, TlsServerOptions};

/// One certificate for all.
pub struct TlsSetup {
    pub connector: TlsConnector,
    pub acceptor: TlsAcceptor,
    pub name: ServerName<'static>,
    pub client: TlsClient,
    pub server: TlsServer,
    /// Certificate and key, in PEM form.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl TlsSetup {
    pub fn new() -> Result<Self> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])
            .map_err(|error| format!("no certificate: {error}"))?;
        let (certificate, key) =
            (made.cert.pem().into_bytes(), made.signing_key.serialize_pem().into_bytes());
        let tls = |error: tokio_rustls::rustls::Error| format!("TLS cannot be set up: {error}");
        let pem = |error: tokio_rustls::rustls::pki_types::pem::Error| format!("PEM: {error}");
        let der = CertificateDer::from_pem_slice(&certificate).map_err(pem)?;
        let private = PrivateKeyDer::from_pem_slice(&key).map_err(pem)?;
        let mut roots = RootCertStore::empty();
        roots.add(der.clone()).map_err(tls)?;
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Full handshakes, on both sides of the comparison.
        client.resumption = tokio_rustls::rustls::client::Resumption::disabled();
        let server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_no_client_auth()
            .with_single_cert(vec![der], private)
            .map_err(tls)?;
        let identity = TlsIdentity::new(Pem::text(certificate.clone()), Pem::text(key.clone()));
        let ours = TlsClientOptions {
            ca: Some(Pem::text(certificate.clone())),
            resumption: false,
            ..TlsClientOptions::default()
        };
        let directory = tools::target().join("bench");
        let store = |name: &str, text: &[u8]| {
            let path = directory.join(name);
            std::fs::create_dir_all(&directory)
                .and_then(|()| std::fs::write(&path, text))
                .map_err(|error| format!("{}: {error}", path.display()))?;
            Result::Ok(path)
        };
        let files = [store("channel.pem", &certificate)?, store("channel.key", &key)?];
        Ok(Self {
            connector: TlsConnector::from(Arc::new(client)),
            acceptor: TlsAcceptor::from(Arc::new(server)),
            name: ServerName::try_from("localhost").map_err(|error| error.to_string())?,
            client: TlsClient::new(ours).map_err(explain)?,
            server: TlsServer::new(TlsServerOptions::new(identity)).map_err(explain)?,
            certificate: files[0].clone(),
            key: files[1].clone(),
        })
    }
}
