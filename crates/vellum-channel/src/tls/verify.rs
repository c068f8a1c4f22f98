//! The verification of a peer's certificate: rustls does it, this adds what rustls leaves out and remembers what was
//! refused, for the message.

use super::certificate::Certificate;
use super::names::AllowedNames;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use std::cell::RefCell;
use std::sync::Arc;

thread_local! {
    /// The last chain that was refused on this thread. rustls verifies within the call that handed it the bytes, and
    /// has no other way to tell which certificate it found wanting.
    static REFUSED: RefCell<Option<Refused>> = const { RefCell::new(None) };
}

/// A peer's certificates, and why they were refused.
#[derive(Debug)]
pub(super) struct Refused {
    /// The peer's own, if it could be read.
    pub own: Option<Certificate>,
    /// Those of its issuers that could be read.
    pub issuers: Vec<Certificate>,
    /// The part that rustls has no words for.
    pub why: Option<String>,
}

/// What was refused by the last call to rustls on this thread.
pub(super) fn take_refused() -> Option<Refused> {
    REFUSED.take()
}

/// A client's check of the server.
#[derive(Debug)]
pub(super) struct ServerCheck {
    pub by: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for ServerCheck {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.by.verify_server_cert(own, issuers, name, ocsp, now);
        judge(own, issuers, verified, &AllowedNames::default())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.by.supported_verify_schemes()
    }
}

/// A server's check of its clients.
#[derive(Debug)]
pub(super) struct ClientCheck {
    pub by: Arc<dyn ClientCertVerifier>,
    pub allowed: AllowedNames,
}

impl ClientCertVerifier for ClientCheck {
    fn offer_client_auth(&self) -> bool {
        self.by.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.by.client_auth_mandatory() || !self.allowed.is_everyone()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.by.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        judge(own, issuers, self.by.verify_client_cert(own, issuers, now), &self.allowed)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.by.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.by.supported_verify_schemes()
    }
}

/// Adds this crate's own checks to what rustls `verified`, and remembers a refusal.
fn judge<T>(
    own: &CertificateDer<'_>,
    issuers: &[CertificateDer<'_>],
    verified: Result<T, Error>,
    allowed: &AllowedNames,
) -> Result<T, Error> {
    let mut refused = Refused {
        own: Certificate::from_der(own).ok(),
        issuers: issuers.iter().filter_map(|issuer| Certificate::from_der(issuer).ok()).collect(),
        why: None,
    };
    let error = match verified {
        Ok(done) => match own_rules(&refused, allowed) {
            Ok(()) => return Ok(done),
            Err((error, why)) => {
                refused.why = Some(why);
                error.into()
            }
        },
        Err(error) => {
            refused.why = misused(&error, &refused);
            if refused.why.is_some() { CertificateError::InvalidPurpose.into() } else { error }
        }
    };
    REFUSED.set(Some(refused));
    Err(error)
}

/// Key usages, which rustls does not look at, and the list of those allowed. The chain is verified already.
fn own_rules(chain: &Refused, allowed: &AllowedNames) -> Result<(), (CertificateError, String)> {
    let Some(own) = &chain.own else {
        // rustls could read what this crate cannot: only a rule that needs to know the holder stands in the way.
        let refusal = || {
            let why = "it cannot be read here, so its holder is unknown".to_owned();
            (CertificateError::ApplicationVerificationFailure, why)
        };
        return allowed.is_everyone().then_some(()).ok_or_else(refusal);
    };
    if !own.may_sign {
        let why = "its key usage lacks digitalSignature".to_owned();
        return Err((CertificateError::InvalidPurpose, why));
    }
    let has_issued = |one: &Certificate| {
        one.is_ca
            && (own.issuer == one.subject || chain.issuers.iter().any(|other| other.issuer == one.subject))
    };
    if let Some(issuer) = chain.issuers.iter().find(|one| has_issued(one) && !one.may_certify) {
        let why = format!("the key usage of its issuer {} lacks keyCertSign", issuer.describe());
        return Err((CertificateError::InvalidPurpose, why));
    }
    if !allowed.allow(own) {
        let why = "it is not on the list of names that are allowed here".to_owned();
        return Err((CertificateError::ApplicationVerificationFailure, why));
    }
    Ok(())
}

/// What rustls lumps together as "other": certificates of issuers and of holders in each other's place.
fn misused(error: &Error, chain: &Refused) -> Option<String> {
    if !matches!(error, Error::InvalidCertificate(CertificateError::Other(_))) {
        return None;
    }
    if chain.own.as_ref()?.is_ca {
        return Some(
            "it belongs to an issuer of certificates (CA), which may not speak for itself".to_owned(),
        );
    }
    let wrong = chain.issuers.iter().find(|issuer| !issuer.is_ca)?;
    Some(format!("{} in its chain is not an issuer of certificates (CA)", wrong.describe()))
}
